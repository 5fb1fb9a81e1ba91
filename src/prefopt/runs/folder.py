"""The output folder of a run: whose it is, how far it came, and whether a resumed run is the same run.

``run.json`` holds the options, the fingerprint of data and reference, the token budgets and the results;
``config.yaml`` the options alone, to be used again with ``--config``.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from prefopt.core.files import output_errors, remove_folder, remove_leftovers, write_json
from prefopt.data.group import Group, IntArray
from prefopt.data.table import GroupTable
from prefopt.errors import RunError
from prefopt.model.costs import Costs, combine_costs, count_costs, peak_memory
from prefopt.runs.history import RECORD, read_metrics, read_record

if TYPE_CHECKING:
    import torch

# Options that may differ at a resume: they change what is shown and kept, never the weights.
FREE = frozenset({"resume", "progress", "save_every", "keep_last", "output", "dry_run", "track", "track_project"})

_LOCK = ".lock"


class RunFolder:
    """An output folder, opened for a new run or to go on with the one it holds."""

    def __init__(self, path: Path, options: Mapping[str, Any], *, resume: bool, dry: bool = False) -> None:
        """Raises :class:`RunError` where the folder holds something else, or the run with other options.

        ``dry``: nothing is ever written.
        """
        self.path, self._dry = path, dry
        self._lock: FileLock | None = None
        self.file = path / RECORD
        self.record: dict[str, Any] = {"status": "started", "options": dict(options)}
        if dry:
            return
        if path.exists() and not path.is_dir():
            raise RunError(f"--output {path} is a file; name a folder")
        if self.file.exists():
            before = read_record(path, "name another --output")
            if not resume:
                what = "a finished run;" if _finished(before) else "an unfinished run; go on with it by --resume, or"
                raise RunError(f"--output {path} holds {what} name another folder")
            if _finished(before):
                self._tidy(before)
                raise RunError(f"--resume: the run in {path} is finished; to train further, name its folder as --model")
            read_metrics(path)  # what a resumed run would stumble over is told before anything slow
            self._refuse_other_options(before.get("options", {}), options)
            self.record = {**before, "status": "resumed"}
        elif path.exists() and any(not entry.name.startswith((".run.json.", _LOCK)) for entry in path.iterdir()):
            # (A run killed in its first moment leaves only its lock and its record, half written.)
            raise RunError(f"--output {path} is not empty and holds no run of prefopt; name another folder")

    def take(self) -> None:
        """Make the folder and hold it for this process. Raises :class:`RunError` where another one does."""
        with output_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            there = self.file.exists()
            self._lock = FileLock(self.path / _LOCK)
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                there = True
        if (there and self.record["status"] == "started") or not self._lock.is_locked:
            raise RunError(f"--output {self.path} is in use by another process; wait for it, or name another folder")
        remove_leftovers(self.path)

    def leave(self) -> None:
        """Let the folder go."""
        if self._lock is not None and self._lock.is_locked:
            (self.path / _LOCK).unlink(missing_ok=True)
            self._lock.release()

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints go."""
        return self.path / "checkpoints"

    @property
    def last_good(self) -> Path:
        """Where a run that ran away leaves a model."""
        return self.path / "last-good"

    def remember(self, **values: Any) -> None:
        """Add to ``run.json``."""
        self.record.update(values)
        if self._dry:
            return
        write_json(self.file, self.record)

    def finish(self, results: Mapping[str, Any], *, keep_checkpoints: bool) -> None:
        """The model is written: say so in ``run.json``, and remove the checkpoints unless they are to be kept.

        In this order: whoever is killed between the two has a finished run, and not one that begins anew.
        """
        self.record["checkpoints_kept"] = keep_checkpoints
        self.remember(status="finished", finished=time.strftime("%Y-%m-%dT%H:%M:%S%z"), results=dict(results))
        if not keep_checkpoints:
            remove_folder(self.checkpoints)  # they were there for what might have happened until now
        remove_folder(self.last_good)  # of a start of this run that ran away where this one did not

    def _tidy(self, before: Mapping[str, Any]) -> None:
        """Do what a kill kept a finished run from: see :meth:`finish`. Not while it is about to do so itself."""
        lock = FileLock(self.path / _LOCK)
        try:
            lock.acquire(timeout=0)
        except (Timeout, OSError):
            return
        remove_leftovers(self.path)
        if before.get("checkpoints_kept") is False:
            remove_folder(self.checkpoints)
            remove_folder(self.last_good)
        (self.path / _LOCK).unlink(missing_ok=True)
        lock.release()

    def spent(self, costs: Mapping[str, float]) -> None:
        """The run's costs so far, of all its starts together."""
        if self._lock is not None and self._lock.is_locked:
            self.remember(costs=dict(costs))

    def same(self, name: str, value: Any, what: str) -> None:
        """Record ``value`` at the first start; refuse another one at a resume."""
        before = self.record.get(name)
        if before is not None and before != value:
            raise RunError(
                f"--resume: {what} changed since {self.path} was started; put it back, or start anew elsewhere"
            )
        self.record[name] = value

    def _refuse_other_options(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        changed = [n for n in now if n not in FREE and n in before and before[n] != now[n]]
        if changed:
            listed = ", ".join(f"--{n.replace('_', '-')} was {before[n]!r} and is {now[n]!r}" for n in changed)
            raise RunError(f"--resume goes on with the same run, but {listed}; put it back, or start anew elsewhere")


def _finished(record: Mapping[str, Any]) -> bool:
    return record.get("status") == "finished"


def digest_of(many: Sequence[IntArray]) -> str:
    """A digest of sequences of token ids, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for ids in many:
        digest.update(len(ids).to_bytes(4, "little") + ids.astype("<i4").tobytes())
    return digest.hexdigest()


def fingerprint(groups: Sequence[Group]) -> str:
    """A digest of all token ids and masks, in order."""
    return hashlib.blake2b(GroupTable.of(groups).key_N.tobytes(), digest_size=16).hexdigest()


class Spending:
    """What this start of a run has spent so far, on top of what earlier ones have."""

    def __init__(self, folder: RunFolder, device: torch.device, costs: Costs) -> None:
        self._folder, self._device, self._costs = folder, device, costs
        self._before: dict[str, float] = dict(folder.record.get("costs", {}))
        self._started = time.monotonic()

    def note(self) -> None:
        """Write it down, where the folder is this run's: a process that is killed later has told this much."""

        seconds = time.monotonic() - self._started
        now = {**self._costs.to_dict(), "seconds": seconds, "peak_memory_bytes": peak_memory(self._device)}
        self._folder.spent(combine_costs([self._before, now]))


@contextmanager
def spending(folder: RunFolder, device: torch.device) -> Iterator[Spending]:
    """Count what is spent inside, note it as ``costs`` of ``run.json``, and let the folder go.

    Beside the counts of :class:`prefopt.model.costs.Costs` stand ``seconds`` and the ``peak_memory_bytes`` of the
    process (of the device's tensors, where that is a GPU).
    """
    with count_costs() as costs:
        found = Spending(folder, device, costs)
        try:
            yield found
        finally:
            found.note()
            folder.leave()
