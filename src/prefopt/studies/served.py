"""Where a study is being served: its lock, and the address that links begin with."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout


def lock_of(study: Path) -> FileLock:
    """The lock that the server of a study holds."""
    return FileLock(study.with_name(study.name + ".lock"))


def note_address(study: Path, address: str) -> None:
    """Write down the address, for :func:`address_of`."""
    _note(study).write_text(address, "utf-8")


def forget_address(study: Path) -> None:
    _note(study).unlink(missing_ok=True)


def address_of(study: Path) -> str | None:
    """The address at which the study is served now; None where it is not (a killed server leaves its note)."""
    note, lock = _note(study), lock_of(study)
    if not note.exists():
        return None
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return note.read_text("utf-8").strip() or None
    lock.release()
    return None


def _note(study: Path) -> Path:
    return study.with_name(study.name + ".address")
