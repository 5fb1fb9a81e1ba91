"""Stands in for wandb: what prefopt uses of it, with wandb's signatures; keeps what it is told."""

from __future__ import annotations

from typing import Any

runs: dict[str, Run] = {}
fails: list[str] = []


class Settings:
    def __init__(self, *, console: str, disable_code: bool, disable_git: bool) -> None:
        assert (console, disable_code, disable_git) == ("off", True, True), "no code, no terminal leaves the machine"


class Run:
    def __init__(self, id: str, project: str, name: str, config: dict[str, Any]) -> None:
        self.id, self.project, self.name, self.config = id, project, name, config
        self.told: list[tuple[int, dict[str, float]]] = []
        self.ends: list[int] = []

    def log(self, data: dict[str, Any], step: int | None = None, commit: bool | None = None) -> None:
        if "log" in fails:
            raise ConnectionError("no route")
        assert step is not None
        assert not self.told or step >= self.told[-1][0], "wandb drops what goes back"
        self.told.append((step, data))

    def finish(self, exit_code: int | None = None) -> None:
        self.ends.append(exit_code or 0)


def init(
    project: str | None = None,
    dir: str | None = None,
    id: str | None = None,
    name: str | None = None,
    config: dict[str, Any] | None = None,
    reinit: str | None = None,
    resume: str | None = None,
    settings: Settings | None = None,
) -> Run:
    if "init" in fails:
        raise RuntimeError("no key: log in\nwith wandb login")
    assert settings is not None and reinit == "create_new" and resume == "allow" and id and project and name and dir
    run = runs.setdefault(id, Run(id, project, name, {}))
    run.config.update(config or {})
    return run
