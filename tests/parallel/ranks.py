"""Run a function on several processes, as under torchrun, with gloo."""

from __future__ import annotations

import pickle
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from torch.distributed import TCPStore

from forked import CONTEXT, forked

SECONDS = 240
STORES: list[Any] = []


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def environment(rank: int, size: int, port: int, node: int) -> dict[str, str]:
    """What torchrun sets; ``node``: processes of each machine."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank % node, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": node}
    numbers["MASTER_PORT"] = port
    agent = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    return {name: str(value) for name, value in numbers.items()} | agent


def _rank(function: Callable[..., Any], arguments: tuple[Any, ...], out: Connection) -> None:
    try:
        result: Any = function(*arguments)
    except BaseException as error:  # told to the test, which expects it or shows it
        result = Failure(type(error).__name__, str(error), traceback.format_exc())
    out.send_bytes(pickle.dumps(result))


class Failure:
    """An error on a rank."""

    def __init__(self, kind: str, message: str, trace: str) -> None:
        self.kind, self.message, self.trace = kind, message, trace

    def __repr__(self) -> str:
        return self.trace


def started(
    size: int, function: Callable[..., Any], *arguments: Any, node: int | None = None
) -> list[tuple[Any, Connection]]:
    """Processes that call ``function(*arguments)``, which is at the top of a module, on ``size`` ranks (1: no ranks are
    set), ``node`` on each machine, each with the end of a pipe that its result comes out of."""
    # torchrun's store, which outlives the ranks.
    store = TCPStore("127.0.0.1", free_port(), is_master=True, wait_for_workers=False)
    STORES.append(store)
    found = []
    for rank in range(size):
        ours, theirs = CONTEXT.Pipe(duplex=False)
        variables = environment(rank, size, store.port, node or size) if size > 1 else None
        process = forked(_rank, function, arguments, theirs, variables=variables)
        theirs.close()
        found.append((process, ours))
    return found


def results(processes: list[tuple[Any, Connection]]) -> list[Any]:
    """What each rank gave back, or its :class:`Failure`; ``None`` of one that was killed."""
    found: list[Any] = []
    for _, end in processes:
        try:
            found.append(pickle.loads(end.recv_bytes()) if end.poll(SECONDS) else None)
        except EOFError:
            found.append(None)
    for process, _ in processes:
        process.join(10)
        if process.is_alive():
            process.kill()
    return found


def on_ranks(
    size: int, function: Callable[..., Any], *arguments: Any, failing: bool = False, node: int | None = None
) -> list[Any]:
    """The :func:`results` of ranks, ``node`` of them on each machine; unless ``failing``, all are to succeed."""
    found = results(started(size, function, *arguments, node=node))
    if not failing:
        wrong = [(rank, result) for rank, result in enumerate(found) if result is None or isinstance(result, Failure)]
        # A rank that only says that another failed says least.
        wrong.sort(key=lambda pair: getattr(pair[1], "kind", "") == "PeerFailed")
        assert not wrong, "\n".join(f"rank {rank}: {'killed or late' if r is None else repr(r)}" for rank, r in wrong)
    return found
