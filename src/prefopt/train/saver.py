"""Checkpoints and best weights are written by a thread, from copies in host memory, while training goes on.

The thread writes, flushes and takes checksums; one process, or the first rank of replicas, also gives the checkpoint
its name there. Of shards the first rank does so when every rank has said that its files are whole. Ranks speak in the
main thread alone, at the end of a step (:attr:`Saver.agreed` comes with the message of an update): a message of the
thread could fall between the collectives of training.
"""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from prefopt.core.files import aside_of, output_errors
from prefopt.errors import Diverged
from prefopt.parallel.tensors import shards_of, whole_tensors
from prefopt.parallel.world import ALONE, World
from prefopt.runs.callbacks import CallbackFailed
from prefopt.train import checkpoint
from prefopt.train.checkpoint import Checkpoint
from prefopt.train.tensor_file import HostCopies, TensorFile

log = logging.getLogger(__name__)

Sums = dict[str, str]
"""Checksums by file."""


class _Files:
    """Files on their way to the disk. Once they are there on all ranks, the first one calls ``commit``, if there is
    one, with all checksums, and every rank calls ``then``."""

    def __init__(
        self,
        write: Callable[[], Sums],
        *,
        before: _Files | None,
        then: Callable[[], None] = lambda: None,
        commit: Callable[[Sums], None] | None = None,
        aside: Path | None = None,
    ) -> None:
        self.then, self.commit, self.aside = then, commit, aside
        self._write: Callable[[], Sums] | None = write
        self._before = before
        self._sums: Sums = {}
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Write in a thread. It does not outlive the process, which a second stop signal ends at once."""
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether there is nothing to wait for."""
        return self._thread is None or not self._thread.is_alive()

    def result(self) -> Sums:
        """Wait for the thread, or write now. Returns the checksums of this rank's files, or raises the error."""
        if self._thread is None:
            self._run()
        else:
            self._thread.join()
        if self._error is not None:
            raise self._error
        return self._sums

    def _run(self) -> None:
        write, before, self._write, self._before = self._write, self._before, None, None
        try:
            if before is not None:
                before.result()  # a checkpoint does not count without the best weights that it names
            self._sums = write() if write is not None else self._sums
        except Exception as error:
            self._error = error


class Saver:
    """Writes into the folder ``folder``. At most one checkpoint, and the best weights before it, are on their way; the
    next one waits for them. Every rank makes the same calls.

    Where the host's memory has no room for copies, training waits until all is written; ``say`` says so once.
    """

    agreed = False
    """Whether all ranks have told one another that they have written what is on its way."""

    def __init__(self, folder: Path, world: World = ALONE, say: Callable[[str], object] = log.info) -> None:
        self.folder, self.world, self._say = folder, world, say
        self._jobs: list[_Files] = []
        self._copies = HostCopies()
        self._told = False

    @property
    def written(self) -> bool:
        """Whether this rank has written all that is on its way."""
        return all(job.done for job in self._jobs)

    @property
    def due(self) -> bool:
        """Whether :meth:`settle` has something to do, on all ranks, and nothing to wait for."""
        return bool(self._jobs) and (self.written if self.world.alone else self.agreed)

    def save(
        self, found: Checkpoint, *, keep_last: int, wait: bool = True, then: Callable[[Path], None] = lambda path: None
    ) -> None:
        """Write a checkpoint; ``keep_last``: see :func:`checkpoint.commit`. ``then`` is called when it is there: before
        this returns if it is to ``wait``, else in a later :meth:`settle`."""
        if wait or any(job.aside for job in self._jobs):
            self.settle()
        world, state = self.world, found.state
        path = checkpoint.path_of(self.folder, state["step"], state["progress"]["done"])
        aside = world.from_first(aside_of(path))
        sharded = any(shards_of(t) > 1 for t in found.weights.values())
        files = checkpoint.files_of(found, world) if sharded or world.first else {}
        world.on_first(lambda: checkpoint.begin(path, aside))
        commit = partial(checkpoint.commit, aside, path, state, keep_last)

        def write() -> Sums:
            with output_errors(path):
                sums = {name: file.write(aside / name) for name, file in files.items()}
            if world.first and not sharded:
                commit(sums)
            return sums

        self._submit(
            write,
            [*files.values()],
            copies=None if wait else self._copies,
            wait=wait,
            processes=world.ranks.local_size if sharded else 1,
            then=lambda: then(path),
            commit=commit if sharded else None,
            aside=aside,
        )

    def save_best(self, step: int, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Write the weights of the best evaluation, while training goes on."""
        self.settle()
        named = dict(weights)
        whole = whole_tensors(named.items(), keep=self.world.first)
        files = [TensorFile.of(whole)] if self.world.first else []

        def write() -> Sums:
            for file in files:
                checkpoint.write_best(self.folder, step, file)
            return {}

        # What was put together from shards is a copy already.
        self._submit(write, files, copies=None if all(shards_of(t) > 1 for t in named.values()) else self._copies)

    def _submit(
        self,
        write: Callable[[], Sums],
        files: Sequence[TensorFile],
        *,
        copies: HostCopies | None,
        wait: bool = False,
        processes: int = 1,
        **about: Any,
    ) -> None:
        """Write in the thread, from ``copies``; at once if it is to ``wait``, or if some rank has no room for them."""
        held = nullcontext() if copies is None else copies.take(files, processes=processes)
        if not wait and not self.world.smallest(int(held is not None)):
            wait = True
            if not self._told:
                self._told = True
                self._say(
                    "checkpoints: there is no room in memory for a copy, so training waits while they are written"
                )

        def work() -> Sums:
            with held or nullcontext():
                return write()

        job = _Files(work, before=self._jobs[-1] if self._jobs else None, **about)
        self._jobs.append(job)
        if wait:
            self.settle()
        elif files:
            job.start()

    def settle(self) -> None:
        """Wait until everything on its way is there. Raises the first error of any rank on all of them."""
        jobs, self._jobs, self.agreed = self._jobs, [], False
        for job in jobs:
            try:
                sums = self.world.together(job.result)
            except Exception:
                if job.aside is not None and self.world.first:
                    shutil.rmtree(job.aside, ignore_errors=True)  # the disk may be full
                raise
            if job.commit is not None:
                every = {name: digest for one in self.world.gather(sums) for name, digest in one.items()}
                self.world.on_first(partial(job.commit, every))
            job.then()

    @contextmanager
    def around(self) -> Iterator[None]:
        """Around training. What is on its way when it fails is waited for; memory of copies is given back at the end.

        Shards are left without their name where ranks may have failed alone: the checkpoint before them is used.
        """
        try:
            yield
        except CallbackFailed:  # one more checkpoint is written then
            raise
        except Exception as error:
            try:
                if self.world.alone or isinstance(error, Diverged):  # which all ranks raise
                    self.settle()
                for job in self._jobs:
                    job.result()
            except Exception as second:
                log.warning("%s", second)
            raise
        finally:
            self._copies.forget()
