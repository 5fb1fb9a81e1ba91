"""Runs of a mixture of experts: losses on routers by every method, and what is told of the experts' tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import prefopt
from data.small import small_tokenizer
from model.architectures import build
from prefopt.cli import main
from prefopt.config.sft import SftConfig
from prefopt.errors import Interrupted, RunError
from prefopt.model.scorer import Scorer
from prefopt.runs import experts
from prefopt.runs.experts import NAMES, ExpertUse, read_experts, shares
from prefopt.train.objectives import LikelihoodObjective
from prefopt.train.routing import RoutedObjective, routed
from train.small import QUICK, evaluations, pairs, same_bits, steps, weights
from train.test_resume import stop_after

ROWS = pairs(12)
RANKED = [{"prompt": r["prompt"], "chosen": r["chosen"], "rejected": r["rejected"]} for r in ROWS]
SFT = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in ROWS]
SAMPLED = {"num": 2, "max_new_tokens": 4, "max_kl": 1e6, "ppo_epochs": 1}


def vowels(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [float(sum(letter in "aeiou" for letter in text)) for text in responses]


METHODS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "sft": (SFT, {}),
    "dpo": (RANKED, {}),
    "reward": (RANKED, {}),
    "ppo": ([{"prompt": r["prompt"]} for r in ROWS], {**SAMPLED, "reward": vowels}),
    "rloo": ([{"prompt": r["prompt"]} for r in ROWS], {**SAMPLED, "reward": vowels, "algorithm": "rloo"}),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts") / "m"
    build("mixtral", vocab_size=len(small_tokenizer()), router_aux_loss_coef=0.02).float().save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return folder


def run(method: str, model: Any, output: Path, **options: Any) -> Path:
    rows, own = METHODS[method]
    quick = {k: v for k, v in QUICK.items() if k != "max_length" or "num" not in own}
    getattr(prefopt, "ppo" if method == "rloo" else method)(model, rows, output=output, **{**quick, **own, **options})
    return output


@pytest.mark.parametrize(
    "method", [pytest.param(method, marks=() if method in ("dpo", "rloo") else pytest.mark.slow) for method in METHODS]
)
def test_every_method_has_both_losses_and_tells_of_the_experts(method: str, model: Path, tmp_path: Path) -> None:
    exact = {"dtype": "float64"}
    plain = run(method, model, tmp_path / "plain", **exact)
    first = steps(plain)[0]
    assert not {"router/aux_loss", "router/z_loss"} & first.keys()
    assert 0 <= first["router/min_share"] < 0.25 < first["router/max_share"] <= 1
    assert 0 < first["router/entropy"] < 1
    gates = [name for name in weights(plain) if name.endswith("gate.weight")]
    assert len(gates) == 2
    ends = [weights(plain)]
    for options in ({"router_aux_loss_coef": 0.5}, {"router_z_loss_coef": 0.5}, {"router_aux_loss_coef": "auto"}):
        name = next(iter(options)).removesuffix("_coef").replace("router_", "router/")
        whole, cut = (
            run(method, model, tmp_path / f"{len(ends)} {tokens}", **exact, **options, token_budget=tokens)
            for tokens in (2000, 1)
        )
        ends.append(weights(whole))
        one, other = steps(whole), steps(cut)
        assert one[0]["loss"] == pytest.approx(first["loss"], rel=1e-9)
        for a, b in zip(one, other, strict=True):
            assert a[name] > 0
            assert {n: a[n] for n in (name, "loss", *NAMES)} == pytest.approx(
                {n: b[n] for n in (name, "loss", *NAMES)}, rel=1e-5, abs=1e-9
            )
        assert all(torch.allclose(ends[-1][n], weights(cut)[n], atol=1e-5) for n in ends[-1])
        if "router_z_loss_coef" in options:  # or the logits would have grown as without it
            assert one[-1][name] < one[0][name]
    for i, end in enumerate(ends):
        for other_end in ends[:i]:
            assert not torch.allclose(end[gates[0]], other_end[gates[0]], rtol=0, atol=1e-7)


def test_the_table_counts_every_position_of_every_update_once(model: Path, tmp_path: Path) -> None:
    output = run("dpo", model, tmp_path / "out", epochs=2, eval_fraction=0.25)
    found = json.loads((output / "experts.json").read_text())
    assert found["routers"] == ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    tokens = sum(line["tokens"] for line in steps(output))  # encoded ones, a shared prompt once
    assert np.sum(found["tokens"], 1).tolist() == [2 * tokens] * 2
    assert [sum(share) for _, share in read_experts(output)] == pytest.approx([1, 1])
    assert all(f"eval_{name}" in line for name in NAMES for line in evaluations(output))
    result = json.loads((output / "run.json").read_text())["results"]
    for name in NAMES:  # averages over the rows of the last epoch
        last = [line[name] for line in steps(output)][-3:]
        assert result[f"training: {name}"] == pytest.approx(np.average(last, weights=[4, 4, 2]), rel=1e-6)


def test_a_stopped_run_has_the_table_of_a_whole_one(model: Path, tmp_path: Path) -> None:
    run("dpo", model, tmp_path / "whole", epochs=2)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(4, patch)
        with pytest.raises(Interrupted):
            run("dpo", model, tmp_path / "parts", epochs=2)
    run("dpo", model, tmp_path / "parts", epochs=2, resume=True)
    assert same_bits(tmp_path / "whole", tmp_path / "parts")
    tables = [(tmp_path / name / "experts.json").read_bytes() for name in ("whole", "parts")]
    assert tables[0] == tables[1]


def test_a_model_without_experts_pays_nothing() -> None:
    scorer, plain = Scorer(build("llama")), LikelihoodObjective("tokens", device=torch.device("cpu"))
    config = SftConfig(model="m", data=["d"], output="o")
    assert routed(plain, scorer, config) is plain
    mixture = Scorer(build("mixtral"))
    assert isinstance(routed(plain, mixture, config), RoutedObjective)
    mixture.compiled = object()  # type: ignore[assignment]
    assert routed(plain, mixture, config) is plain


def test_a_starving_expert_is_told_of_once(capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
    import transformers

    hungry = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    hungry.model.layers[1].mlp.gate.register_forward_hook(_starve)
    options: dict[str, Any] = {"progress": "plain", "tokenizer": small_tokenizer(), "epochs": 40, "learning_rate": 1e-9}
    rows = METHODS["sft"][0]
    quick = {k: v for k, v in QUICK.items() if k != "device"}
    prefopt.sft(hungry, rows, output=tmp_path / "out", **{**quick, **options})
    lines = [line for line in capsys.readouterr().out.splitlines() if "experts starve" in line]
    assert len(lines) == 1
    assert (
        "the least expert 2 of model.layers.1.mlp.gate (0 of its layer's choices, an equal share is 0.25)" in lines[0]
    )
    assert lines[0].endswith("; --router-aux-loss-coef auto evens them out")


def _starve(module: Any, args: Any, output: Any) -> Any:
    """A router that sends nothing to expert 2."""
    logits = output[0].clone()
    logits[:, 2] = -1e4
    top, chosen = logits.softmax(-1).topk(2, -1)
    return logits, top / top.sum(-1, keepdim=True), chosen


def test_shares_by_hand() -> None:
    table_LE = np.array([[8, 4, 4, 0], [4, 4, 4, 4]])
    found = shares(table_LE)
    assert found["router/max_share"] == 0.5 and found["router/min_share"] == 0
    # 1/2 log 2 + 2 * 1/4 log 4 = 3/2 log 2, over log 4; and 1.
    assert found["router/entropy"] == pytest.approx((0.75 + 1) / 2)


def test_a_warning_waits_until_chance_cannot_explain_it() -> None:
    use = ExpertUse(["a", "b"], "; do this")
    # Equal shares of 999 choices, but for one expert of b.
    assert use.add(1, np.array([[999] * 4, [1300, 1300, 1390, 6]])) is None
    line = use.add(2, np.array([[1, 1, 1, 1], [1, 1, 1, 1]]))
    assert line is not None and line.startswith("experts starve: 1 of 8 got less than a hundredth")
    assert "of steps 1 to 2, the least expert 3 of b (0.0018 of" in line and line.endswith("; do this")
    again = ExpertUse(["a", "b"])
    again.restore(json.loads(json.dumps(use.state())))
    assert again.add(3, np.array([[4000, 0, 0, 0]] * 2)) is None, "it was said before"
    assert again.total_LE is not None and again.total_LE.sum() == use.total_LE.sum() + 8000  # type: ignore[union-attr]


def test_even_experts_are_not_warned_of() -> None:
    chance = np.random.default_rng(0)
    use = ExpertUse(["a"])
    for step in range(1, 200):
        p = np.array([0.011 / 64] + [(1 - 0.011 / 64) / 63] * 63)  # just above a hundredth, and all others
        assert use.add(step, 1000 * p.size * p[None] // 1 + chance.integers(0, 2, (1, 64))) is None


def test_the_report_has_the_whole_table(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    output = run("sft", model, tmp_path / "run")
    assert main(["report", str(output), "--output", str(tmp_path / "p.html")]) == 0
    page = (tmp_path / "p.html").read_text()
    assert "Where all are equal it is 25.00%" in page
    for name, share in read_experts(output):
        cells = "".join(f"<td>{x:.2%}</td>" for x in share)
        assert f'<tr><th scope="row">{name}</th>{cells}</tr>' in page


@pytest.mark.parametrize(
    "text", ["", "[]", '{"routers": ["a"], "tokens": [[1], [2]]}', '{"routers": ["a"], "tokens": [[-1]]}']
)
def test_a_damaged_table_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / experts.FILE).write_text(text)
    with pytest.raises(RunError, match="cannot be read"):
        read_experts(tmp_path)
