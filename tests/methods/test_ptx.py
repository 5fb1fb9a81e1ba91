"""The pre-training term beside PPO and RLOO (PPO-ptx): its gradient, what it is for, and going on with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from methods import small_world as world
from methods.test_ppo import ROWS, metrics, ppo, same_bits, stopped
from prefopt.errors import ConfigError, DataError, UserError
from prefopt.model.load import load_model
from prefopt.train.optim import Network

PAIRS = [{"prompt": a + "b", "chosen": a * 3, "rejected": "f" * 5} for a in "abcde"]


@pytest.fixture
def small(tmp_path: Path) -> str:
    return world.write_world(tmp_path / "m")


@pytest.fixture
def kept(tmp_path: Path) -> str:
    """Preferences, of which the better side is to stay likely."""
    file = tmp_path / "kept.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    return str(file)


def likelihood(model: Any) -> torch.Tensor:
    """Negative log-likelihood per token of all the better sides and their end, by the class's own forward."""
    total, many = torch.zeros((), dtype=torch.float64), 0
    for row in PAIRS:
        prompt, response = ([world.LETTERS.index(x) for x in row[name]] for name in ("prompt", "chosen"))
        whole = torch.tensor([[*prompt, *response, world.STOP]])
        logp = model(whole).logits[0, :-1].log_softmax(-1).gather(-1, whole[0, 1:, None])[len(prompt) - 1 :]
        total, many = total - logp.double().sum(), many + len(logp)
    return total / many


def first_gradients(model: str, output: Path, **options: Any) -> dict[str, torch.Tensor]:
    """Of the actor, in the first update."""
    seen: list[dict[str, torch.Tensor]] = []
    update = Network.update

    def looking(self: Network, *given: Any) -> None:
        masters = self.weights.masters.items()
        seen.append({name: master.grad.clone() for name, master in masters if master.grad is not None})
        update(self, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Network, "update", looking)
        ppo(model, output, max_steps=1, **options)
    return seen[0]


@pytest.mark.parametrize("algorithm", ["ppo", "rloo"])
@pytest.mark.parametrize("token_budget", [12, 4096])
def test_the_gradient_is_that_of_both_terms(
    algorithm: str, token_budget: int, small: str, kept: str, tmp_path: Path
) -> None:
    common: dict[str, Any] = {"algorithm": algorithm, "temperature": 0.7, "token_budget": token_budget}
    without = first_gradients(small, tmp_path / "without", **common)
    options = {"ptx_data": [kept], "ptx_coefficient": 0.3, "ptx_batch_size": len(PAIRS), **common}
    both = first_gradients(small, tmp_path / "with", **options)
    model = world.model().double()
    likelihood(model).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(both[name] - without[name], 0.3 * parameter.grad, rtol=1e-6, atol=1e-7)
    plain, more = metrics(tmp_path / "without")[0], metrics(tmp_path / "with")[0]
    if algorithm == "rloo":  # one update in a step: the numbers are the first one's
        value = likelihood(model.requires_grad_(False))
        assert more["loss/ptx_avg"] == pytest.approx(float(value), rel=1e-6)
        assert more["loss"] == pytest.approx(plain["loss"] + 0.3 * float(value), rel=1e-6)
    assert "loss/ptx_avg" not in plain


@pytest.mark.parametrize("lora", [False, True], ids=["", "lora"])
def test_what_is_to_stay_likely_stays_likely(lora: bool, small: str, kept: str, tmp_path: Path) -> None:
    found = {}
    for name, more in {"without": {}, "with": {"ptx_data": [kept]}}.items():
        output = tmp_path / name
        ppo(small, output, algorithm="rloo", epochs=4, lora=lora, **more)
        adapter = str(output) if lora else None
        source = small if lora else str(output)
        model = load_model(source, dtype=torch.float64, device=torch.device("cpu"), adapter=adapter)
        with torch.no_grad():
            found[name] = float(likelihood(model).exp())
    assert found["with"] < 0.8 * found["without"]  # perplexities
    lines = metrics(tmp_path / "with")
    assert lines[-1]["loss/ptx_avg"] < lines[0]["loss/ptx_avg"]


@pytest.mark.parametrize("options", [{}, {"algorithm": "rloo", "lora": True}], ids=["ppo", "rloo-lora"])
def test_a_run_stopped_within_a_step_goes_on_to_the_same_bits(
    options: dict[str, Any], small: str, kept: str, tmp_path: Path
) -> None:
    options = {"epochs": 2, "minibatches": 2, "ppo_epochs": 2, "ptx_data": [kept], "ptx_batch_size": 2, **options}
    ppo(small, tmp_path / "whole", **options)
    stopped(6, small, tmp_path / "parts", **options)
    ppo(small, tmp_path / "parts", resume=True, **options)
    assert same_bits(tmp_path / "parts", tmp_path / "whole")


def test_every_row_is_learned_from_and_updates_differ(small: str, tmp_path: Path) -> None:
    """Raw text, a row in each of as many updates as make an epoch of it: each row's loss shows once."""
    texts = ["abc", "ddd", "fefe", "ba"]
    (tmp_path / "kept.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options: dict[str, Any] = {"algorithm": "rloo", "batch_size": 2, "learning_rate": 1e-12, "ptx_batch_size": 1}
    ppo(small, tmp_path / "out", ROWS, ptx_data=[str(tmp_path / "kept.jsonl")], **options)
    losses = [round(line["loss/ptx_avg"], 6) for line in metrics(tmp_path / "out")]
    assert len(losses) == len(texts) == len(set(losses))


BAD: dict[str, tuple[type[UserError], str, dict[str, Any]]] = {
    "a weight alone": (ConfigError, "--ptx-coefficient does nothing without --ptx-data", {"ptx_coefficient": 1.0}),
    "a size alone": (ConfigError, "--ptx-batch-size does nothing without --ptx-data", {"ptx_batch_size": 2}),
    "no file": (DataError, "nowhere.jsonl", {"ptx_data": ["nowhere.jsonl"]}),
    "no weight": (ConfigError, "ptx-coefficient", {"ptx_data": ["x"], "ptx_coefficient": 0.0}),
}


@pytest.mark.parametrize(("kind", "what", "options"), BAD.values(), ids=BAD)
def test_what_makes_no_sense_is_refused(
    kind: type[UserError], what: str, options: dict[str, Any], small: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=what) as caught:
        ppo(small, tmp_path / "out", **options)
    assert "\n" not in str(caught.value)


def test_other_data_are_refused_at_a_resume(small: str, kept: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"ptx_data": [kept], "ppo_epochs": 2}
    stopped(1, small, tmp_path / "out", **options)
    Path(kept).write_text(json.dumps({"prompt": "ab", "chosen": "e", "rejected": "f"}) + "\n")
    with pytest.raises(UserError, match="the data of --ptx-data changed"):
        ppo(small, tmp_path / "out", resume=True, **options)
