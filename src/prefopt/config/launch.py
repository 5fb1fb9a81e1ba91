"""What ``prefopt launch`` reads.

>>> LaunchConfig(gpus=2, command=["dpo", "--model", "m"]).manager
'here'
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from prefopt.core.options import Config, option
from prefopt.errors import ConfigError

MANAGERS = ("slurm", "kubernetes", "skypilot")
NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,50}[a-z0-9])?")
"""A name of a job that all managers take (a DNS label)."""


@dataclass(frozen=True, kw_only=True)
class LaunchConfig(Config):
    """A command on several processes: under torchrun on this machine, or as a job for a cluster."""

    command: list[str] = option(help="the prefopt command to run, behind --", group="launch", positional=True)
    nodes: int = option(1, "machines", group="launch", at_least=1)
    gpus: int | None = option(
        None, "processes on each machine, one per GPU", group="launch", default_text="the GPUs of this one", at_least=1
    )
    slurm: bool = option(False, "print a batch script for Slurm's sbatch", group="launch")
    kubernetes: bool = option(False, "print a Service and a Job for kubectl apply", group="launch")
    skypilot: bool = option(False, "print a task for sky launch", group="launch")
    dry_run: bool = option(False, "print the command for this machine, and do not run it", group="launch")

    name: str = option("prefopt", "name of the job", group="job")
    hours: float = option(24.0, "time limit of the job; Slurm requeues a run that reaches it", group="job")
    image: str | None = option(None, "container image with prefopt in it, for Kubernetes", group="job")
    accelerator: str | None = option(None, "kind of GPU, such as H100, for SkyPilot", group="job")
    lines: list[str] | None = option(
        None, "further #SBATCH options, such as partition=gpu account=me", group="job", default_text="none"
    )
    port: int = option(29500, "port of the first machine", group="job", at_least=1024, at_most=65535)

    @property
    def manager(self) -> str:
        """Who starts the processes: ``here``, or one of :data:`MANAGERS`."""
        return next((name for name in MANAGERS if getattr(self, name)), "here")

    def check(self) -> None:
        """Refuse contradictions."""
        super().check()
        if len(chosen := [f"--{name}" for name in MANAGERS if getattr(self, name)]) > 1:
            raise ConfigError(f"{' and '.join(chosen)} are two ways to start the job; give one")
        if not NAME.fullmatch(self.name):
            raise ConfigError(f"--name {self.name!r} must be of a-z, 0-9 and dashes, 52 at most")
        if not self.hours > 0:
            raise ConfigError(f"--hours {self.hours:g} must be more than 0")
        self.need("slurm", "lines")
        self.need("kubernetes", "image")
        self.need("skypilot", "accelerator")
        needed = {"kubernetes": "image", "skypilot": "accelerator"}.get(self.manager)
        if needed is not None and getattr(self, needed) is None:
            raise ConfigError(f"--{self.manager} needs --{needed}")
        if self.manager != "here":
            if self.gpus is None:
                raise ConfigError(f"--{self.manager} needs --gpus: how many each machine of the cluster has")
            if self.dry_run:
                raise ConfigError(f"--dry-run does nothing with --{self.manager}, which only prints; leave it out")
        elif self.nodes > 1:
            raise ConfigError(
                f"--nodes {self.nodes}: from one machine the others cannot be started; add --slurm, --kubernetes or"
                " --skypilot, or run the torchrun command of docs/guide/clusters.md on each"
            )
