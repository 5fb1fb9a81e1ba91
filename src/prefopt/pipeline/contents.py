"""How far a folder's run came, and what its model is made of: by contents, not by names or times; how one goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefopt.disk.hashes import file_hashes
from prefopt.errors import DataError, Interrupted, RunError
from prefopt.model.load import base_and_adapter
from prefopt.train.record import RECORD, read_record

OF_A_MODEL = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
OF_A_RUN = {RECORD, "reliability.json"}  # what changes, or says nothing of the model


def status_of(folder: Path) -> str:
    """``finished``, ``begun``, or nothing where there is no run in the folder."""
    if not (folder / RECORD).exists():
        return ""
    record = read_record(folder, f"remove {folder}")
    return "finished" if record.get("status") == "finished" else "begun"


def contents_of(folder: Path) -> str:
    """A digest of the files of a model: weights, configuration, tokenizer, template."""
    files = sorted({p for pattern in OF_A_MODEL for p in folder.glob(pattern) if p.name not in OF_A_RUN})
    if not files:
        raise RunError(f"{folder} holds no model")
    hashes = file_hashes(files, error=DataError)
    text = json.dumps([[p.name, h] for p, h in zip(files, hashes, strict=True)])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def contents_of_name(name: str) -> str:
    """The same of a model by its name; an adapter's folder is taken together with that of its model."""
    base, adapter = base_and_adapter(name)
    parts = [contents_of(Path(folder)) for folder in (base, adapter) if folder is not None]
    return parts[0] if len(parts) == 1 else hashlib.blake2b("".join(parts).encode(), digest_size=16).hexdigest()


@contextmanager
def started_again() -> Iterator[None]:
    """A stage that is stopped speaks of --resume; what it is a part of goes on where it is started again."""
    try:
        yield
    except Interrupted as stop:
        where = str(stop).partition(";")[0]
        said = f"{where}; what was computed is kept: the same command goes on"
        raise Interrupted(said, stop.signal) from None
