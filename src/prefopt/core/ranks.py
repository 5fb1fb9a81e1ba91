"""Which of several processes this one is, from the environment that torchrun sets; torch is not imported.

>>> ranks_in({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"})
Ranks(rank=3, size=8, local_rank=1, local_size=2, restarts=0)
>>> ranks_in({}).alone
True
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from prefopt.errors import ConfigError

RANK_VARIABLES = ("RANK", "WORLD_SIZE")
"""Variables without which there is one process."""
_VARIABLES = {
    "rank": "RANK",
    "size": "WORLD_SIZE",
    "local_rank": "LOCAL_RANK",
    "local_size": "LOCAL_WORLD_SIZE",
    "restarts": "TORCHELASTIC_RESTART_COUNT",
}


@dataclass(frozen=True, slots=True)
class Ranks:
    """Process ``rank`` of ``size``, ``local_rank`` of ``local_size`` on its node, restarted so many times."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    restarts: int = 0

    @property
    def alone(self) -> bool:
        """Whether this is the only process."""
        return self.size == 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and messages."""
        return self.rank == 0


def ranks_in(environment: Mapping[str, str] = os.environ) -> Ranks:
    """The ranks that torchrun (or a launcher with its variables) gave this process.

    Raises :class:`ConfigError` where a variable is absent or no number, or the ranks do not fit their sizes.
    """
    if not any(name in environment for name in RANK_VARIABLES) or environment.get("WORLD_SIZE") == "1":
        return Ranks()
    values = {}
    for field, name in _VARIABLES.items():
        text = environment.get(name, "0" if field == "restarts" else "")
        if not text.isascii() or not text.isdecimal():
            raise ConfigError(f"the environment has {name}={text!r}, which torchrun sets to a number; use torchrun")
        values[field] = int(text)
    found = Ranks(**values)
    if not (found.rank < found.size and found.local_rank < found.local_size <= found.size):
        shown = ", ".join(f"{name}={values[field]}" for field, name in _VARIABLES.items())
        raise ConfigError(f"the environment has {shown}, which do not fit together; use torchrun")
    return found


def backend_of(gpus: int) -> str:
    """What carries the messages of a machine's processes: gloo those of the CPU, NCCL those of its GPUs.

    >>> backend_of(8), backend_of(0)
    ('cpu:gloo,cuda:nccl', 'gloo')
    """
    return "cpu:gloo,cuda:nccl" if gpus else "gloo"


def check_ranks(config: object, method: str | None, ranks: Ranks) -> None:
    """Refuse what several processes cannot do together, before anything is loaded. ``method``: that of ``config``.

    Raises :class:`ConfigError`.
    """
    shard = getattr(config, "shard", "auto")
    if ranks.alone:
        if shard != "auto":
            raise ConfigError(f"--shard {shard} needs several processes: start them by prefopt launch, or torchrun")
        return
    if method is None:
        raise ConfigError(f"this command runs in one process, and a launcher started {ranks.size}; run it by itself")
    if shard == "hybrid" and ranks.size == ranks.local_size:
        raise ConfigError("--shard hybrid keeps a whole model on each of several machines; on one give --shard full")
    batch = getattr(config, "batch_size", ranks.size)
    if batch < ranks.size:
        raise ConfigError(f"--batch-size {batch} is less than the {ranks.size} processes; give each a row at least")


def restarted(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun started this process again after a failure, or Slurm queued its job again.

    >>> restarted({"SLURM_RESTART_COUNT": "2"}), restarted({"TORCHELASTIC_RESTART_COUNT": "0"})
    (True, False)
    """
    counts = (environment.get(name, "") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    return any(count.isdecimal() and int(count) > 0 for count in counts)
