"""Host memory in the place of a GPU's: activations between forward and backward, and gradients on their way to
optimiser state on the host.

Both are exact: what is moved comes back bit for bit, in the same layout. Transfers go through pinned memory on a stream
of their own, beside the computation.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

SMALLEST = 2**20
"""Bytes below which saved memory stays on the device: a transfer has a fixed cost."""
AHEAD = 4
"""Saved blocks that come back before they are needed."""
IN_FLIGHT = 8
"""Gradients that wait on the host to be added up."""


class HeldElsewhere(Protocol):
    """Weights by the names of a scorer's parameters, which have them within ``gathered`` alone."""

    weights: Mapping[str, torch.Tensor]

    def gathered(self) -> AbstractContextManager[None]:
        """In this block the parameters have their values."""
        ...


class _Block:
    """One block of saved memory: on the ``host``, and again on the device once it is ``loaded``. ``users``: saved
    tensors in it that backward has not asked for yet."""

    def __init__(self, index: int, device: torch.device, size: int, host: Tensor | None) -> None:
        self.index, self.device, self.size, self.host = index, device, size, host
        self.loaded: Tensor | None = None
        self.ready: Any = None
        self.users = 0


class HostActivations:
    """What layers save for backward is kept in host memory. Weights stay where they are.

    Whole blocks of memory are moved, once for all tensors in them, and those needed next are fetched ahead. Blocks of
    ``meta`` tensors have no contents: memory is counted on them.
    """

    def __init__(self, module: torch.nn.Module, smallest: int = SMALLEST) -> None:
        self.module, self.smallest = module, smallest
        self._streams: dict[torch.device, Any] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> HostActivations:
        return HostActivations(memo.get(id(self.module), self.module), self.smallest)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """In this block what autograd saves is moved."""
        weights = {t.untyped_storage()._cdata for t in (*self.module.parameters(), *self.module.buffers())}
        blocks: list[_Block] = []
        known: dict[tuple[int, int], _Block] = {}
        owners: list[StorageWeakRef] = []  # as long as one is there, no other storage has its address

        def pack(tensor: Tensor) -> Any:
            storage = tensor.untyped_storage()
            if storage._cdata in weights or storage.nbytes() < self.smallest:
                return tensor.detach()
            key = (storage._cdata, tensor._version)
            block = known.get(key)
            if block is None:
                block = known[key] = self._moved(len(blocks), storage)
                blocks.append(block)
                owners.append(StorageWeakRef(storage))
            block.users += 1
            return block, tensor.dtype, tensor.storage_offset(), tensor.size(), tensor.stride()

        def unpack(packed: Any) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            block, dtype, offset, size, stride = packed
            memory = self._back(block, blocks)
            block.users -= 1
            if not block.users:
                block.loaded = None
            return torch.empty(0, dtype=dtype, device=memory.device).set_(
                memory.untyped_storage(), offset, size, stride
            )

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield

    def _moved(self, index: int, storage: torch.UntypedStorage) -> _Block:
        """Copy a block to the host."""
        size, device = storage.nbytes(), storage.device
        if device.type == "meta":
            return _Block(index, device, size, None)
        here = torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
        if device.type != "cuda":
            return _Block(index, device, size, here.clone())
        host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        stream = self._stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            host.copy_(here, non_blocking=True)
        here.record_stream(stream)  # its memory is used again only after the copy
        return _Block(index, device, size, host)

    def _back(self, block: _Block, blocks: list[_Block]) -> Tensor:
        """The memory of a block on the device; those saved before it are fetched too."""
        for other in blocks[max(0, block.index - AHEAD) : block.index + 1][::-1]:
            if other.loaded is None and other.users:
                self._fetch(other)
        if block.loaded is None:  # asked for again, in a second backward pass
            self._fetch(block)
        assert block.loaded is not None
        if block.ready is not None:
            current = torch.cuda.current_stream(block.device)
            current.wait_event(block.ready)
            block.loaded.record_stream(current)
        return block.loaded

    def _fetch(self, block: _Block) -> None:
        if block.host is None:
            block.loaded = torch.empty(block.size, dtype=torch.uint8, device=block.device)
        elif block.device.type != "cuda":
            block.loaded = block.host.clone()
        else:
            stream = self._stream(block.device)
            with torch.cuda.stream(stream):
                block.loaded = block.host.to(block.device, non_blocking=True)
                block.ready = stream.record_event()

    def _stream(self, device: torch.device) -> Any:
        return self._streams.setdefault(device, torch.cuda.Stream(device))


class HostGradients:
    """Adds gradients up in host memory, in the background and in the order in which they come."""

    def __init__(self) -> None:
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="gradients")
        self._pending: deque[Future[None]] = deque()

    def add(self, master: torch.nn.Parameter, copy: Tensor) -> None:
        """Move the gradient of ``copy`` to the host and add it to that of its ``master``."""
        assert copy.grad is not None
        if copy.grad.device.type == "meta":  # memory is counted
            copy.grad = None
            return
        found, copy.grad, ready = copy.grad, None, None
        if found.is_cuda:
            on_device, found = found, torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
            found.copy_(on_device, non_blocking=True)
            ready = torch.cuda.current_stream(on_device.device).record_event()
        while len(self._pending) >= IN_FLIGHT:
            self._pending.popleft().result()
        self._pending.append(self._worker.submit(_add, master, found, ready))

    def settle(self) -> None:
        """Wait until everything is added up."""
        while self._pending:
            self._pending.popleft().result()

    def close(self) -> None:
        """End the thread."""
        self.settle()
        self._worker.shutdown()


@torch.no_grad()
def _add(master: torch.nn.Parameter, gradient: Tensor, ready: Any) -> None:
    if ready is not None:
        ready.synchronize()
    if master.grad is None:
        master.grad = gradient.to(master.dtype)
    else:
        master.grad.add_(gradient)
