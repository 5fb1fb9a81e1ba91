"""The processes of a run, and what they tell one another.

Every rank calls the same methods in the same order. With one process nothing is sent, and torch.distributed is not
imported. Small values travel through the CPU and are summed in the order of ranks, so that every rank has the same
bits. An error on one rank ends the run: the others find the connection closed, see :class:`PeerFailed`.
"""

from __future__ import annotations

import atexit
import datetime
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast

from prefopt.core.ranks import Ranks, backend_of, ranks_in
from prefopt.errors import PrefoptError, RunError

if TYPE_CHECKING:
    import torch  # imported where it is needed: run folders and callbacks do without

T = TypeVar("T")

TIMEOUT_MINUTES = "PREFOPT_TIMEOUT_MINUTES"
"""The variable that sets how long a rank waits for the others."""


class PeerFailed(RunError):
    """Another process of the run ended, or stopped answering."""


class World:
    """The ranks of a run; ``World(Ranks())`` is one process alone."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._names: list[str] = []

    def __repr__(self) -> str:
        return f"World({self.rank} of {self.size})"

    @property
    def rank(self) -> int:
        """This process, from 0."""
        return self.ranks.rank

    @property
    def size(self) -> int:
        """How many processes."""
        return self.ranks.size

    @property
    def alone(self) -> bool:
        """Whether there is one process."""
        return self.ranks.alone

    @property
    def first(self) -> bool:
        """Whether this process writes the files and messages of the run."""
        return self.ranks.first

    # -- values ------------------------------------------------------------------------------------------------

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in their order."""
        if self.alone:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        with peer_errors():
            dist.all_gather_object(found, value)
        return found

    def from_first(self, value: T) -> T:
        """The first rank's value."""
        if self.alone:
            return value
        import torch.distributed as dist

        found: list[Any] = [value]
        with peer_errors():
            dist.broadcast_object_list(found, src=0)
        first: T = found[0]
        return first

    def largest(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        return number if self.alone else int(self._numbers([float(number)]).max())

    def smallest(self, number: int) -> int:
        """The smallest of the ranks' numbers."""
        return number if self.alone else int(self._numbers([float(number)]).min())

    def totals(self, values: Mapping[str, float]) -> dict[str, float]:
        """The sums over ranks of named numbers; a rank that lacks a name counts as 0. One message if no name is new.

        >>> World(Ranks()).totals({"loss": 2.0})
        {'loss': 2.0}
        """
        if self.alone:
            return dict(values)
        # Names are agreed on once; a rank with a new one says so in the last number, and then all tell theirs.
        while True:
            unknown = float(bool(set(values) - set(self._names)))
            found = self._numbers([*(values.get(name, 0.0) for name in self._names), unknown])
            if not found[:, -1].any():
                break
            every = self.gather(sorted(values))
            self._names = sorted({*self._names, *(name for names in every for name in names)})
        return dict(zip(self._names, found.sum(0).tolist(), strict=False))

    def _numbers(self, numbers: Sequence[float]) -> torch.Tensor:
        """The numbers of all ranks [ranks, numbers], float64."""
        import torch
        import torch.distributed as dist

        mine = torch.tensor(numbers, dtype=torch.float64)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        with peer_errors():
            dist.all_gather(found, mine)
        return torch.stack(found)

    # -- agreement ---------------------------------------------------------------------------------------------

    def agree(self, what: str, value: object) -> None:
        """Raise :class:`RunError` on every rank where ``value`` is not the same on all of them."""
        values = self.gather(value)
        other = next((r for r, v in enumerate(values) if v != values[0]), None)
        if other is not None:
            one, two = values[other], values[0]
            if isinstance(one, dict) and isinstance(two, dict):
                name = next(n for n in {**two, **one} if one.get(n) != two.get(n))
                what, one, two = f"{what}, {name}", one.get(name), two.get(name)
            raise RunError(
                f"rank {other} has other {what} than rank 0 ({_short(one)}, not {_short(two)}); give all processes the"
                " same files, options and versions"
            )

    def together(self, function: Callable[[], T]) -> T:
        """The result of ``function``, which every rank calls; where it fails on one, the error of the first of those is
        raised on all. ``function`` sends nothing itself."""
        if self.alone:
            return function()
        result, error = _tried(function)
        errors = self.gather(error)
        failed = next((rank for rank, other in enumerate(errors) if other is not None), None)
        if failed is not None:
            raise cast(Exception, error if failed == self.rank else errors[failed])
        return cast(T, result)

    def on_first(self, function: Callable[[], T]) -> T:
        """The result of ``function`` on the first rank, or its error, on all ranks."""
        if self.alone:
            return function()
        value, error = self.from_first(_tried(function) if self.first else _NOTHING)
        if error is not None:
            raise error
        return cast(T, value)

    def first_on_node(self, function: Callable[[], T]) -> T:
        """The result of ``function``, called on the first rank of each node before the others: those find the files
        that it wrote. Where it fails on one, its error is raised on all."""
        if self.alone:
            return function()
        leads = self.ranks.local_rank == 0
        outcome = _tried(function) if leads else None
        self.together(lambda: _result(outcome) if outcome is not None else None)
        found: T = self.together(lambda: _result(outcome if outcome is not None else _tried(function)))
        return found

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if not self.alone:
            self._numbers([0.0])

    # -- tensors -----------------------------------------------------------------------------------------------

    def add_(self, tensor: torch.Tensor) -> None:
        """Replace ``tensor`` by its sum over ranks."""
        if self.alone:
            return
        import torch.distributed as dist

        with peer_errors():
            dist.all_reduce(tensor)

    def send_(self, tensor: torch.Tensor) -> None:
        """Replace ``tensor`` by the first rank's."""
        if self.alone:
            return
        import torch.distributed as dist

        with peer_errors():
            dist.broadcast(tensor, src=0)


ALONE = World(Ranks())

SHARED = (PrefoptError, RuntimeError, OSError, MemoryError)
"""Errors that one rank tells the others: those for people, of the device's memory, and of the disk."""
Outcome = tuple[Any, Exception | None]
_NOTHING: Outcome = (None, None)


def _tried(function: Callable[[], Any]) -> Outcome:
    """What ``function`` gives, or its error."""
    try:
        return function(), None
    except SHARED as error:
        return None, error


def _result(outcome: Outcome) -> Any:
    value, error = outcome
    if error is not None:
        raise error
    return value


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


@contextmanager
def peer_errors() -> Iterator[None]:
    """Turn a broken connection into :class:`PeerFailed`."""
    try:
        yield
    except RuntimeError as error:
        if not is_of_peers(error):  # of this rank's own device, which shows where it is waited for
            raise
        raise peer_failed() from error


def peer_failed() -> PeerFailed:
    """The error that says so."""
    return PeerFailed(
        "another process of this run has ended, or stopped answering; its own message, or the launcher's, says"
        " why; continue with --resume"
    )


def is_of_peers(error: RuntimeError) -> bool:
    """Whether an error is of a broken connection: torch.distributed's own, and gloo's plain ones.

    >>> is_of_peers(RuntimeError("[.../gloo/transport/tcp/pair.cc:553] Connection closed by peer"))
    True
    >>> is_of_peers(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    False
    """
    return type(error).__name__.startswith("Dist") or any(name in str(error) for name in ("/gloo/", "NCCL"))


def open_world() -> World:
    """The processes that torchrun started, connected; one process alone without it. Each run of a process has an object
    of its own, since the names of :meth:`World.totals` are a run's; the connection is made once.

    Raises :class:`prefopt.errors.ConfigError` for an environment that no launcher sets, and :class:`PeerFailed` where
    the others do not answer.
    """
    ranks = ranks_in()
    if not ranks.alone:
        _connect(ranks)
    return World(ranks)


def _connect(ranks: Ranks) -> None:
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    if dist.is_initialized():  # by an earlier run, or by a script that uses prefopt as a library
        return
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus:
        torch.cuda.set_device(ranks.local_rank % gpus)
    timeout = datetime.timedelta(minutes=float(os.environ.get(TIMEOUT_MINUTES) or 30))
    options: dict[str, Any] = {}
    with peer_errors():
        if ranks.restarts and ranks.local_size == ranks.size:
            # torchrun keeps the store of the attempt before, with the addresses of processes that are gone. Of several
            # machines each counts attempts of its own: there the guide has it make a new store.
            store, *_ = next(rendezvous("env://", timeout=timeout))
            options = {"store": torch._C._distributed_c10d.PrefixStore(f"prefopt/attempt/{ranks.restarts}", store)}
            options |= {"rank": ranks.rank, "world_size": ranks.size}
        dist.init_process_group(backend_of(gpus), timeout=timeout, **options)
    atexit.register(_close)


def _close() -> None:
    """At a normal end. After a failure the others may wait in a collective for ever: there the process just ends."""
    import torch.distributed as dist

    if dist.is_initialized() and not _failed:
        dist.destroy_process_group()


_failed = False


def speaks_for_all() -> bool:
    """Whether this process, which has failed, is the one that says so: the first that failed of all processes."""
    global _failed
    _failed = True
    try:
        store, restarts = _store(), ranks_in().restarts
        return store is None or bool(store.add(f"prefopt/failed/{restarts}", 1) == 1)
    except Exception:  # it ended with the process that held it, or the environment is not a launcher's
        return True  # two lines are better than none


def _store() -> Any:
    """Numbers that all processes see, also before they are connected: torchrun's, which outlives them, or the run's."""
    import torch
    import torch.distributed as dist

    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return torch._C._distributed_c10d.TCPStore(*place, is_master=False, timeout=datetime.timedelta(seconds=10))
    return dist.distributed_c10d._get_default_store() if dist.is_initialized() else None
