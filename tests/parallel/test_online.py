"""Rounds on several processes: the samples, decisions and weights of one; and real kills in each phase."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parallel.ranks import Failure, on_ranks
from parallel.test_runs import EXACT, prepared, weights
from prefopt.core.ranks import ranks_in
from prefopt.rl.comparers import LanguageComparer
from prefopt.rl.round_file import RoundFiles
from prefopt.rl.rounds import Rounds
from prefopt.train.trainer import Trainer

OPTIONS: dict[str, Any] = {
    "max_new_tokens": 4,
    "batch_size": 4,
    "learning_rate": 1e-3,
    "passes": 2,
    "minibatches": 2,
    "max_kl": 1e6,
    "num": 3,
    "epochs": 2,
}


def vowels(prompts: list[str], responses: list[str]) -> list[float]:
    return [sum(x in "aeiou" for x in text) - 0.1 * len(text) for text in responses]


def prefer(self: Any, asked: Any, attempt: int) -> Any:
    """A language model that likes the letter e."""
    first, second = (asked[1].content.split(f"# {n} answer\n\n")[1].split("\n\n# ")[0] for n in ("First", "Second"))
    yield "[[1]]" if first.count("e") > second.count("e") else "[[2]]"


def train(options: dict[str, Any], model: str, data: str, output: str) -> int:
    """One run, in the process of this rank; its steps."""
    import prefopt
    from prefopt.generate.chat_model import RemoteChatModel

    RemoteChatModel.answer = prefer  # type: ignore[method-assign]
    given = {"reward": vowels, **EXACT, **OPTIONS, **options}
    found = prefopt.online(model=model, prompts=[data], output=output, **given)
    return int(found.steps)


def rounds(output: Path) -> list[dict[str, Any]]:
    files = [*output.glob("rounds/*.jsonl"), *output.glob("aside/*.jsonl")]
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return sorted(rows, key=lambda row: (row["round"], row["number"]))


CASES: dict[str, dict[str, Any]] = {
    "dpo": {"ref_model_sync_steps": 2, "max_kl": None, "shard": "none"},
    "kto": {"loss": "kto", "shard": "none"},
    "dapo": {"loss": "dapo", "shard": "full"},
    "llm": {"reward": "llm", "judge_url": "http://localhost:1/v1", "judge_model": "big", "shard": "none"},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_draw_decide_and_learn_as_one(case: str, tmp_path: Path) -> None:
    base, data = prepared(tmp_path, "pairs")
    for ranks, name in ((1, "one"), (2, "two")):
        os.environ["PREFOPT_CACHE"] = str(tmp_path / f"cache-{name}")
        options = {n: v for n, v in CASES[case].items() if ranks > 1 or n != "shard"}
        on_ranks(ranks, train, options, base, data, str(tmp_path / name))
    one, two = rounds(tmp_path / "one"), rounds(tmp_path / "two")
    exact = ("prompt", "responses", "token_ids", "judge_scores", "outcomes", "votes", "why")
    assert len(one) == 20
    assert [[row.get(n) for n in exact] for row in one] == [[row.get(n) for n in exact] for row in two]
    ours, theirs = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, wanted in ours.items():
        assert np.linalg.norm(theirs[name] - wanted) <= 1e-9 * max(1.0, np.linalg.norm(wanted)), name


def _draws(self: Rounds, trainer: Trainer) -> bool:
    return trainer.state.step == 2


KILLS: dict[str, tuple[type, str, Callable[..., bool]]] = {
    "drawing": (Rounds, "draw", _draws),
    "judging": (LanguageComparer, "__call__", lambda self, name, *given: name == "round 3"),
    "writing": (RoundFiles, "write", lambda self, step, *given: step == 2),
    "updating": (Trainer, "_update", lambda self, batch: (self.state.step, self.state.done) == (2, 3)),
}


def _killed(phase: str, *arguments: Any) -> None:
    """A run that is killed within a phase."""
    owner, method, when = KILLS[phase]
    own = getattr(owner, method)

    def dies(self: Any, *given: Any, **named: Any) -> Any:
        found = own(self, *given, **named) if phase in ("drawing", "writing") else None
        if when(self, *given):
            os.kill(os.getpid(), signal.SIGKILL)
        return found if phase in ("drawing", "writing") else own(self, *given, **named)

    setattr(owner, method, dies)
    train(*arguments)


@pytest.mark.slow
def test_a_run_killed_in_each_phase_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    base, data = prepared(tmp_path, "pairs")
    options = CASES["llm"] | {"labels": "soft", "ref_model_sync_steps": 2, "max_kl": None, "save_every": 2}
    del options["shard"]
    on_ranks(1, train, options, base, data, str(tmp_path / "whole"))
    wanted = weights(tmp_path / "whole")
    for phase in KILLS:
        place = (base, data, str(tmp_path / phase))
        assert on_ranks(1, _killed, phase, options, *place, failing=True) == [None], phase
        assert not (tmp_path / phase / "model.safetensors").exists()
        on_ranks(1, train, {**options, "resume": True}, *place)
        found = weights(tmp_path / phase)
        assert all((found[name] == wanted[name]).all() for name in wanted), phase
        assert rounds(tmp_path / phase) == rounds(tmp_path / "whole"), phase


def _one_killed(*arguments: Any) -> None:
    if ranks_in().rank == 1:
        _killed("updating", *arguments)
    train(*arguments)


@pytest.mark.slow
def test_where_one_of_two_processes_is_killed_both_end_and_go_on(tmp_path: Path) -> None:
    base, data = prepared(tmp_path, "pairs")
    options = {"loss": "grpo", "shard": "full"}
    on_ranks(2, train, options, base, data, str(tmp_path / "whole"))
    first, killed = on_ranks(2, _one_killed, options, base, data, str(tmp_path / "parts"), failing=True)
    assert killed is None and isinstance(first, Failure) and first.kind == "PeerFailed", first
    on_ranks(2, train, {**options, "resume": True}, base, data, str(tmp_path / "parts"))
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all((one[name] == other[name]).all() for name in one)
