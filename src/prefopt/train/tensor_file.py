"""Safetensors files, written as a stream: the checksum is taken of the bytes on their way to the disk.

The bytes are those of the tensors themselves, or of copies in host memory, so that training may go on while they are
written. The files are those that ``safetensors.torch.save_file`` writes, which would need all tensors of a file on the
host at once, and the file to be read again for its checksum.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prefopt.model.costs import host_room, out_of_memory

Tensors = Mapping[str, torch.Tensor]

CHUNK = 1 << 26
"""Bytes of host memory that are allocated at once: a power of two, to which torch rounds pinned memory up."""
SHARE = 0.5
"""Of the host's free memory, what copies may take: the next step needs some of it, too."""
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(slots=True)
class TensorFile:
    """A file that is to be written. ``data``: tensors whose bytes, one after the other, follow the ``header``."""

    header: bytes
    data: list[torch.Tensor]

    @classmethod
    def of(cls, tensors: Tensors, shards: Iterable[str] = ()) -> TensorFile:
        """A file of ``tensors``. ``shards``: the names of those that are parts."""
        parts, at = sorted(shards), 0
        fields: dict[str, object] = {"__metadata__": {"shards": json.dumps(parts)}} if parts else {}
        # As the library orders them: every tensor lies at a multiple of the size of its numbers.
        ordered = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
        for name in ordered:
            tensor, start = tensors[name], at
            at += tensor.nbytes
            fields[name] = {"dtype": _NAMES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [start, at]}
        text = json.dumps(fields, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return cls(len(text).to_bytes(8, "little") + text, [tensors[name] for name in ordered])

    @property
    def nbytes(self) -> int:
        """The bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self.data)

    def write(self, path: Path) -> str:
        """Write the file, flush it to the disk, and return its SHA-256. The tensors are let go one by one."""
        digest = hashlib.sha256(self.header)
        with path.open("wb") as file:
            file.write(self.header)
            self.data.reverse()
            while self.data:
                piece: Any = _bytes_of(self.data.pop()).cpu().numpy()
                digest.update(piece)
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        return digest.hexdigest()


class HostCopies:
    """Copies of tensors in host memory. Those of a GPU's are pinned, made while it goes on, and their memory is kept
    for the next ones."""

    def __init__(self) -> None:
        self._kept: list[torch.Tensor] = []

    def forget(self) -> None:
        """Give the memory that was kept back to the system."""
        if self._kept:
            self._kept.clear()
            empty = getattr(torch.accelerator, "empty_host_cache", None)  # new in torch 2.13
            if empty is not None:
                empty()

    def take(self, files: Sequence[TensorFile], *, processes: int = 1) -> AbstractContextManager[None] | None:
        """Put copies in the place of the tensors of ``files``, which are to be written in the context that is returned.
        None where there is no room for copies, and nothing has changed.

        ``processes``: how many of this machine make such copies at the same time.
        """
        pinned = any(tensor.is_cuda for file in files for tensor in file.data)
        free = self._kept if pinned else []
        left = sum(file.nbytes for file in files)
        if (left - sum(map(len, free))) * processes > SHARE * host_room():
            return None
        used: list[torch.Tensor] = []
        copied: list[list[torch.Tensor]] = []
        room = torch.empty(0, dtype=torch.uint8)
        try:
            for file in files:
                copied.append([])
                for tensor in file.data:
                    source = _bytes_of(tensor)
                    while len(source):
                        if not len(room):
                            size = CHUNK if pinned else min(CHUNK, left)
                            room = free.pop() if free else torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
                            used += [room] if pinned else []
                        size = min(len(source), len(room))
                        # In the order of the GPU's stream: what training does next finds the copy made. Other devices
                        # have no event to wait for, so their copies are waited for here.
                        copied[-1].append(room[:size].copy_(source[:size], non_blocking=pinned))
                        source, room, left = source[size:], room[size:], left - size
        except RuntimeError as error:
            self._kept += used
            if not out_of_memory(error):
                raise
            return None
        for file, pieces in zip(files, copied, strict=True):
            file.data = pieces
        if not pinned:
            return nullcontext()
        made = torch.cuda.Event()
        made.record()
        return self._in_use(used, made)

    @contextmanager
    def _in_use(self, chunks: list[torch.Tensor], made: torch.cuda.Event) -> Iterator[None]:
        """Wait until the copies in pinned memory are ``made``; afterwards it is free again."""
        made.synchronize()
        yield
        self._kept += chunks


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor [bytes], uint8; a view where it is contiguous."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)
