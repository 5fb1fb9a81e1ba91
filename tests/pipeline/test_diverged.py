"""What a sweep tells of a training that diverged: why, and not what its user could do who has no such training."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pipeline.sweeping import frontier_config
from prefopt.config.sft import SftConfig
from prefopt.errors import Diverged
from prefopt.methods import sft
from prefopt.sweeps import frontier, train
from train.small import write_rows

AWAY = r"step \d: the divergence .* --max-kl 0\.001: the policy has diverged from its reference"
NO_NUMBER = r"step \d: (loss|grad_norm) is (nan|inf)"


def test_the_reason_is_told_and_no_remedy(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = frontier_config(
        place,
        tmp_path / "out",
        progress="plain",
        methods=["ppo-true:beta=0", "sft:learning_rate=1e38"],
        ppo=["batch_size=4", "num=2", "learning_rate=1e-2", "max_kl=1e-3"],
    )
    found = frontier.run(given)
    said = re.findall(r"diverged: (.*)", capsys.readouterr().out)
    for point, line, reason in zip(found.points[1:], said, (AWAY, NO_NUMBER), strict=True):
        assert point.why_not == line and re.fullmatch(reason, line)


def test_who_trains_it_alone_is_told_both(place: Path, tmp_path: Path) -> None:
    rows = [{"prompt": a, "response": b} for a in "abcd" for b in "ab"]
    options = {"model": str(place / "m"), "data": [write_rows(tmp_path / "rows.jsonl", rows)], "learning_rate": 1e38}
    options |= {"batch_size": 4, "device": "cpu", "dtype": "float32", "progress": "none", "eval_fraction": 0.0}
    with pytest.raises(Diverged, match=rf"^{NO_NUMBER}; lower --learning-rate, .* Checkpoints .* kept$") as caught:
        sft.run(SftConfig(**options, output=str(tmp_path / "one")))
    file = tmp_path / "other.json"
    file.write_text(json.dumps({"method": "sft", "options": options | {"output": str(tmp_path / "other")}}))
    train.main(file)
    told = json.loads(file.read_text())
    assert told == {"kind": "diverged", "what": caught.value.reason} and re.fullmatch(NO_NUMBER, told["what"])
