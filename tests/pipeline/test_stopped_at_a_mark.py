"""A sweep that is stopped within the step after the one whose policy it will measure."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from pipeline.sweeping import frontier_config
from prefopt.errors import Interrupted
from prefopt.sweeps import frontier
from prefopt.train.trainer import Trainer


@pytest.mark.slow
def test_the_policy_of_the_mark_is_measured(place: Path, tmp_path: Path) -> None:
    def run(name: str) -> Path:
        given = frontier_config(place, tmp_path / name, methods=["ppo-true:beta=0.1"])
        return tmp_path / name / frontier.run(given).points[1].folder

    def stopping(self: Trainer, *arguments: Any) -> Any:
        record = learn(self, *arguments)
        if (self.state.step, self.state.done) == (2, 1):  # of four steps the second is marked
            signal.raise_signal(signal.SIGTERM)
        return record

    whole, learn = run("whole"), Trainer._update
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_update", stopping)
        with pytest.raises(Interrupted):
            run("parts")
    parts = run("parts")
    for name in ("samples-2.jsonl", "samples.jsonl"):
        assert (parts / name).read_text() == (whole / name).read_text().replace(
            f"{tmp_path}/whole", f"{tmp_path}/parts"
        )
