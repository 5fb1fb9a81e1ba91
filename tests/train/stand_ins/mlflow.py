"""Stands in for MLflow: what prefopt uses of its client, with its signatures; keeps what it is told."""

from __future__ import annotations

import types
from typing import Any

runs: dict[str, Run] = {}
experiments: dict[str, str] = {}


class Run:
    def __init__(self, id: str, project: str, name: str) -> None:
        self.id, self.project, self.name = id, project, name
        self.config: dict[str, Any] = {}
        self.rows: dict[int, dict[str, float]] = {}
        self.status = "RUNNING"
        self.ends: list[str] = []

    @property
    def told(self) -> list[tuple[int, dict[str, float]]]:
        return list(self.rows.items())


class MlflowClient:
    def get_experiment_by_name(self, name: str) -> Any:
        return types.SimpleNamespace(experiment_id=experiments[name]) if name in experiments else None

    def create_experiment(self, name: str) -> str:
        assert name not in experiments
        experiments[name] = f"{len(experiments)}"
        return experiments[name]

    def create_run(self, experiment_id: str, run_name: str | None = None) -> Any:
        (project,) = [name for name, number in experiments.items() if number == experiment_id]
        assert run_name
        run = Run(f"run{len(runs)}", project, run_name)
        runs[run.id] = run
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run.id))

    def update_run(self, run_id: str, status: str | None = None) -> None:
        assert status == "RUNNING"
        runs[run_id].status = status

    def log_param(self, run_id: str, key: str, value: Any) -> None:
        assert key not in runs[run_id].config, "MLflow refuses to change a parameter"
        runs[run_id].config[key] = value

    def log_metric(self, run_id: str, key: str, value: float, step: int | None = None) -> None:
        assert step is not None and runs[run_id].status == "RUNNING"
        row = runs[run_id].rows.setdefault(step, {})
        assert key not in row, f"{key} of step {step} is told twice"
        row[key] = value

    def set_terminated(self, run_id: str, status: str | None = None) -> None:
        assert status in ("FINISHED", "KILLED", "FAILED")
        runs[run_id].status = status
        runs[run_id].ends.append(status)
