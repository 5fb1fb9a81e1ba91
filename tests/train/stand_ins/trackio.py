"""Stands in for trackio: what prefopt uses of it, with trackio's signatures; keeps what it is told."""

from __future__ import annotations

from typing import Any

runs: dict[str, Run] = {}


class Run:
    def __init__(self, id: str, project: str, config: dict[str, Any]) -> None:
        assert not any(key.startswith("_") for key in config), "trackio keeps such names for itself"
        self.id, self.project, self.config = id, project, config
        self.told: list[tuple[int, dict[str, float]]] = []
        self.ends: list[int] = []

    def log(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.told.append((step, metrics))

    def finish(self) -> None:
        self.ends.append(0)


def init(
    project: str,
    name: str | None = None,
    config: dict[str, Any] | None = None,
    resume: str = "never",
    embed: bool = True,
    auto_log_gpu: bool | None = None,
    auto_log_cpu: bool | None = None,
) -> Run:
    assert name and resume == "allow" and embed is auto_log_gpu is auto_log_cpu is False
    return runs.setdefault(name, Run(name, project, config or {}))
