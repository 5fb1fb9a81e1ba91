"""Losses from the option to the numbers: what a run loads, scores, says and refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import prefopt
from data.small import small_tokenizer
from model.oracle import oracle_logprobs
from prefopt.config.dpo import DpoConfig
from prefopt.core.cache_folder import cache_root
from prefopt.core.options import options as options_of
from prefopt.data.comparisons import parse_comparisons
from prefopt.data.group import Group
from prefopt.data.load import load_groups
from prefopt.errors import ConfigError, DataError
from prefopt.losses.common import DIVERGENCES
from prefopt.losses.declare import LOSSES
from prefopt.losses.pairs import ld_dpo
from prefopt.reference.cache import FillReport
from prefopt.train.reference import ReferenceRun
from train.small import dpo, pairs, steps, write_model, write_rows

ROWS = pairs(10)
FREE = [name for name, loss in LOSSES.items() if not loss.needs_reference]


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[FillReport]:
    """What each run's reference cost."""
    found: list[FillReport] = []
    values = ReferenceRun.values

    def noted(self: ReferenceRun, *arguments: Any) -> Any:
        result = values(self, *arguments)
        found.append(result[1])
        return result

    monkeypatch.setattr(ReferenceRun, "values", noted)
    return found


def token_values(model: str, rows: list[dict[str, str]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Token log-probabilities of each pair by transformers alone."""
    loaded = AutoModelForCausalLM.from_pretrained(model)
    groups = load_groups([parse_comparisons(rows, "data")], small_tokenizer(), max_length=64).groups
    with torch.no_grad():
        found = [oracle_logprobs(loaded, [g]).double() for g in groups]
    return [tuple(x.split([int(c.trained.sum()) for c in g.continuations])) for x, g in zip(found, groups, strict=True)]


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if i else ()) for i, n in enumerate(FREE)])
def test_a_loss_without_a_reference_touches_none(
    name: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("no reference is needed")

    monkeypatch.setattr(ReferenceRun, "__init__", refused)
    for place in ("identity_of_name", "identity_of_model"):
        monkeypatch.setattr(f"prefopt.train.reference.{place}", refused)
    dpo(model, ROWS, tmp_path / "out", loss=name, epochs=2, eval_fraction=0.3, progress="plain")
    assert f"reference: none is loaded, {name} compares with none" in capsys.readouterr().out
    assert not (cache_root() / "reference").exists()
    assert not any(key.startswith("log_ratios") for key in steps(tmp_path / "out")[0])
    with pytest.raises(ConfigError, match=f"^--reference: {name} uses no reference; leave it out$"):
        dpo(model, ROWS, tmp_path / "other", loss=name, reference=model)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loss": "plackett_luce", "pairs": "all"}, "--pairs: plackett_luce is not a loss on pairs"),
        ({"loss": "kto", "pairs": "best-worst"}, "--pairs: kto is not a loss on pairs"),
        ({"loss": "slic-hf", "beta": 0.1}, "--beta: slic_hf does not read beta"),
        ({"loss": "hinge", "label_smoothing": 0.1}, "--label-smoothing: hinge does not read label_smoothing"),
        ({"loss": "kto", "divergence": "js"}, "--divergence: kto does not read divergence"),
        ({"divergence_alpha": 0.3}, "reads divergence_alpha only with divergence=alpha"),
        ({"loss": "dpoo"}, "there is no loss 'dpoo'; did you mean dpo"),
        ({"loss_options": {"gama": 1}, "loss": "simpo"}, "does not read gama; did you mean gamma"),
        ({"loss": "dpo:1,kto:1"}, "a sum needs losses of one kind"),
    ],
)
def test_what_no_loss_reads_is_refused_before_anything_is_loaded(
    options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        dpo("no-model-there", ROWS, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_rows_without_scores_are_refused_by_number_before_anything_is_scored(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[dict[str, Any]] = [row | {"score_chosen": 3.0, "score_rejected": 1.5} for row in ROWS]
    for i in (2, 7):
        rows[i] = dict(ROWS[i])
    data = write_rows(tmp_path / "data.jsonl", rows)
    with monkeypatch.context() as patch:
        patch.setattr(ReferenceRun, "__init__", lambda *_, **__: pytest.fail("nothing is scored"))
        with pytest.raises(DataError, match=r"data\.jsonl: 2 of 10 rows cannot be used: no scores: 2 \(rows 3, 8"):
            dpo(model, data, tmp_path / "out", loss="dpo:1,reward_aware:0.5")
    dpo(model, data, tmp_path / "out", loss="reward_aware", on_bad_row="skip", progress="plain")
    assert "10 rows read, 8 kept, 2 refused" in capsys.readouterr().out
    assert {step["rewards/target_margins"] for step in steps(tmp_path / "out")} == {1.5}


def test_held_out_rows_are_not_all_in_memory(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups are objects of the size of a kilobyte; in columns they hardly weigh anything."""
    living, most = 0, 0

    class Counted(Group):
        def __init__(self, *values: Any, **named: Any) -> None:
            nonlocal living, most
            super().__init__(*values, **named)
            living += 1
            most = max(most, living)

        def __del__(self) -> None:
            nonlocal living
            living -= 1

    for module in ("batch", "data", "objective"):
        monkeypatch.setattr(f"prefopt.train.{module}.AT_ONCE", 16)
    held_out = write_rows(tmp_path / "eval.jsonl", pairs(90, seed=3))
    told = {}
    for name in ("dpo", "aot", "kto"):
        options: dict[str, Any] = {"loss": name, "max_steps": 1, "token_budget": 100, "dtype": "float64"}
        told[name] = dpo(model, ROWS, tmp_path / f"{name}0", eval_data=[held_out], **options).held_out_loss
        with monkeypatch.context() as patch:
            patch.setattr("prefopt.data.table.Group", Counted)
            most = 0
            result = dpo(model, ROWS, tmp_path / f"{name}1", eval_data=[held_out], **options)
        assert result.held_out_loss == told[name] and 8 < most < 60, name


def test_a_loss_from_python_is_told_everywhere(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dpo(model, ROWS, tmp_path / "out", loss="simpo", loss_options={"gamma": 0.4}, progress="plain")
    told = "simpo (beta 2, gamma 0.4, label_smoothing 0)"
    assert f"loss: {told}" in capsys.readouterr().out
    run = json.loads((tmp_path / "out/run.json").read_text())
    assert run["loss"] == told and run["options"]["beta"] == 2.0 and run["reference"] == "none"
    card = (tmp_path / "out/README.md").read_text()
    assert told in card and "- simpo" in card and "| loss_options | gamma=0.4 |" in card and "| beta | 2 |" in card
    config = (tmp_path / "out/config.yaml").read_text()
    assert "loss: simpo" in config and "gamma=0.4" in config


@pytest.mark.parametrize("name", [n for n, x in LOSSES.items() if x.needs_reference and x.kind != "ranking"])
def test_the_first_step_is_that_of_a_policy_which_is_its_reference(
    name: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if LOSSES[name].needs_scores or LOSSES[name].needs_distributions:
        pytest.skip("needs more than pairs of text")
    dpo(model, ROWS, tmp_path / "out", loss=name, max_steps=1, token_budget=60, progress="plain")
    out = capsys.readouterr().out
    assert "as it must be before any weight moves" in out
    known = {
        "dpo": math.log(2),
        "hinge": 1.0,
        "kto": 0.5,
        "apo_zero": 1.0,
        "robust": math.log(2),
        "sppo_hard": 500_000.0,
    }
    if name in known:
        assert steps(tmp_path / "out")[0]["loss"] == pytest.approx(known[name], rel=1e-5)


def test_ld_dpo_takes_token_values_from_the_cache(model: str, tmp_path: Path, reports: list[FillReport]) -> None:
    other = write_model(tmp_path / "other", seed=1)
    for n, options in enumerate([{}, {"loss": "ld_dpo"}, {"loss": "ld_dpo", "beta": 0.7}, {}]):
        dpo(model, ROWS, tmp_path / f"out{n}", reference=other, batch_size=10, **options)
    assert [r.scored_responses for r in reports] == [20, 20, 0, 0]
    sums: dict[str, list[torch.Tensor]] = {}
    for own, ref in zip(token_values(model, ROWS), token_values(other, ROWS), strict=True):
        head = min(map(len, own))
        for k, side in enumerate(("chosen", "rejected")):
            for word, values in (("logp", own[k]), ("ref_logp", ref[k])):
                sums.setdefault(f"{side}_{word}_P", []).append(values.sum())
                sums.setdefault(f"{side}_head_{word}_P", []).append(values[:head].sum())
    expected = ld_dpo(**{name: torch.stack(values) for name, values in sums.items()})
    assert steps(tmp_path / "out1")[0]["loss"] == pytest.approx(float(expected.numerator_R.mean()), rel=1e-4)


def test_mismatched_responses_are_cached(model: str, tmp_path: Path, reports: list[FillReport]) -> None:
    for n, options in enumerate([{"loss": "kto"}, {"loss": "kto", "seed": 4, "eval_fraction": 0.3}, {}]):
        dpo(model, ROWS, tmp_path / f"out{n}", batch_size=16, **options)
    assert [r.scored_responses for r in reports] == [40, 0, 0]
    dpo(model, [*ROWS, *pairs(1, seed=5)], tmp_path / "more", loss="kto", batch_size=16)
    assert reports[-1].scored_responses == 2 + 2 + 2  # its own, those to its prompt, and those of the row before it


def test_the_evaluation_of_a_whole_batch_loss_does_not_depend_on_the_token_budget(model: str, tmp_path: Path) -> None:
    from train.small import evaluations

    for name in ("kto", "aot", "bco"):
        options: dict[str, Any] = {"loss": name, "eval_fraction": 0.5, "dtype": "float64", "learning_rate": 3e-3}
        for budget in (1, 10_000):
            dpo(model, ROWS, tmp_path / f"{name}{budget}", token_budget=budget, **options)
        one, other = (evaluations(tmp_path / f"{name}{budget}") for budget in (1, 10_000))
        assert one[-1]["eval_loss"] == pytest.approx(other[-1]["eval_loss"], rel=1e-6)


def test_the_divergences_of_the_option_are_those_of_the_losses() -> None:
    (option,) = (o for o in options_of(DpoConfig) if o.name == "divergence")
    assert option.choices == DIVERGENCES


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loss": "kto"}, ["compares with 20 responses to other prompts", "40 responses are still to be scored"]),
        ({"loss": "tdpo"}, ["scored with every batch and not cached, since tdpo compares whole distributions"]),
        ({"loss": "simpo"}, ["reference: none is loaded, simpo compares with none"]),
        ({"loss": "aot", "ref_model_sync_steps": 5}, ["not cached, since it moves by 0.6 to the policy every 5 steps"]),
    ],
)
def test_a_dry_run_says_what_a_loss_takes(
    options: dict[str, Any], said: list[str], model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prefopt.dpo(model, ROWS, output=tmp_path / "out", dry_run=True, progress="plain", **options) is None
    out = capsys.readouterr().out
    assert all(line in out for line in [f"loss: {options['loss']} (", "dry run: nothing was trained", *said])
    assert ("with the reference" in out) == (options["loss"] == "kto")
    assert not (tmp_path / "out").exists() and not list(cache_root().glob("reference/*/block*"))


def test_a_loss_of_ones_own(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "from prefopt.losses.declare import LossOutput\n\n"
        "def squared(chosen_logp_P, rejected_logp_P, chosen_length_P, rejected_length_P, *, aim=1.0):\n"
        "    gap = chosen_logp_P / chosen_length_P - rejected_logp_P / rejected_length_P - aim\n"
        "    return LossOutput(gap**2, torch.ones_like(gap), {'gap': gap.detach()})\n"
    )
    monkeypatch.chdir(tmp_path)
    for aim in (0.5, 2.0):
        dpo(model, ROWS, tmp_path / f"out{aim}", loss="mine:squared", loss_options={"aim": aim}, epochs=4)
        told = steps(tmp_path / f"out{aim}")
        assert told[-1]["loss"] < 0.7 * told[0]["loss"] and abs(told[-1]["gap"]) < abs(told[0]["gap"])
        assert json.loads((tmp_path / f"out{aim}/run.json").read_text())["loss"] == f"mine:squared (aim {aim:g})"
