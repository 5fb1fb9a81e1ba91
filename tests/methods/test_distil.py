"""Distillation: the divergences of plain transformers, a student that becomes its teacher, and runs from end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import prefopt
from methods import small_world as world
from methods.test_sft import CHOSEN, TEXTS, groups_of, same
from model.test_distributions import apart
from prefopt import theory
from prefopt.errors import ConfigError, DataError, Interrupted, ModelError
from prefopt.model.kernels.divergence import Divergence
from prefopt.model.load import load_model
from prefopt.model.scorer import Scorer
from train.small import evaluations, metrics, pairs, quick, steps, write_model, write_rows
from train.test_resume import stop_after

KINDS: dict[str, dict[str, Any]] = {
    "forward": {"divergence": "forward"},
    "reverse": {"divergence": "reverse"},
    "jsd": {"divergence": "jsd", "jsd_weight": 0.3},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a teacher of another shape and a larger embedding, and data."""
    found = tmp_path_factory.mktemp("distil")
    write_model(found / "model")
    write_model(found / "teacher", seed=1, num_hidden_layers=3, hidden_size=48, initializer_range=0.3)
    write_rows(found / "rows.jsonl", CHOSEN)
    return found


def distil(folder: Path, output: Path, **options: Any) -> Any:
    model = str(folder / "model")
    given = {"teacher": str(folder / "teacher"), "data": str(folder / "rows.jsonl"), **quick(model), **options}
    result = prefopt.distil(model, output=output, **given)
    assert result is not None
    return result


@torch.no_grad()
def plain(folder: Path, divergence: Divergence) -> tuple[float, float, float]:
    """By the classes' own forward passes, one row after the other: divergence and both models' nll, per token."""
    models = [AutoModelForCausalLM.from_pretrained(folder / name).double() for name in ("model", "teacher")]
    sums, tokens = np.zeros(3), 0
    for group in groups_of(CHOSEN):
        ids, trained = (torch.from_numpy(x.copy()) for x in group.sequence(0))
        at = trained.nonzero()[:, 0]
        logp, ref = (m(input_ids=ids.long()[None]).logits[0][at - 1].log_softmax(-1) for m in models)
        found = apart(logp, ref, divergence)
        nll = [-x.gather(-1, ids[at].long()[:, None]).sum().item() for x in (logp, ref)]
        sums += [found.sum().item(), *nll]
        tokens += len(at)
    return tuple(sums / tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_loss_is_that_of_plain_transformers(kind: str, folder: Path, tmp_path: Path) -> None:
    distil(folder, tmp_path / "out", **KINDS[kind], batch_size=13, max_steps=1, dtype="float64", token_budget=40)
    (first,) = steps(tmp_path / "out")
    found = [first[name] for name in ("divergence", "nll", "teacher_nll")]
    wanted = plain(folder, Divergence(kind, KINDS[kind].get("jsd_weight", 0.5)))
    assert found == pytest.approx(wanted, rel=1e-6)
    assert first["loss"] == pytest.approx(first["divergence"], rel=1e-12)


def test_a_teacher_teaches_itself_nothing(folder: Path, tmp_path: Path) -> None:
    for kind, options in KINDS.items():
        output = tmp_path / kind
        distil(folder, output, teacher=str(folder / "model"), **options, dtype="float64", weight_decay=0.0)
        assert all(abs(line["loss"]) < 1e-6 for line in steps(output))


def test_a_mean_over_rows(folder: Path, tmp_path: Path) -> None:
    """Rows count alike, whatever their lengths; the metric stays a mean over tokens."""
    distil(folder, tmp_path / "out", average="rows", batch_size=13, max_steps=1, dtype="float64")
    (first,) = steps(tmp_path / "out")
    assert first["divergence"] == pytest.approx(plain(folder, Divergence("forward"))[0], rel=1e-6)
    assert first["loss"] != pytest.approx(first["divergence"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_on_its_own_responses_a_student_becomes_its_teacher(kind: str, tmp_path: Path) -> None:
    """In a world that can be listed: every prefix of a response comes up, so the limit is the teacher itself."""
    model = world.write_world(tmp_path / "model")
    teacher = world.write_world(tmp_path / "teacher", seed=3)
    data = write_rows(tmp_path / "rows.jsonl", [{"prompt": world.PROMPT, "completion": "ab"}] * 64)
    prefopt.distil(
        model,
        data,
        teacher=teacher,
        output=tmp_path / "out",
        **KINDS[kind],
        on_policy=1.0,
        max_new_tokens=world.LONGEST,
        batch_size=64,
        epochs=250,
        learning_rate=5e-3,
        device="cpu",
        dtype="float32",
        progress="none",
    )
    start, end, goal = (
        world.distribution(Scorer(load_model(str(tmp_path / name), dtype=torch.float64, device=torch.device("cpu"))))
        .detach()
        .numpy()
        for name in ("model", "out", "teacher")
    )
    assert theory.total_variation(start, goal) > 0.3
    assert theory.total_variation(end, goal) <= 0.05


def test_a_stopped_run_draws_the_same_responses_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"on_policy": 0.6, "max_new_tokens": 6, "batch_size": 4, "epochs": 3}
    options |= {"eval_fraction": 0.25, "save_every": 2, "divergence": "reverse", "learning_rate": 1e-2}
    distil(folder, tmp_path / "whole", **options)
    drawn = [line["on_policy"] for line in steps(tmp_path / "whole")]
    assert set(drawn) == {0.0, 1.0}
    with monkeypatch.context() as patch:
        stop_after(drawn.index(1.0) + 1, patch)
        with pytest.raises(Interrupted):
            distil(folder, tmp_path / "parts", **options)
    distil(folder, tmp_path / "parts", resume=True, **options)
    assert same(tmp_path / "parts", tmp_path / "whole")
    assert evaluations(tmp_path / "whole")[-1].keys() >= {"eval_divergence", "eval_nll", "eval_teacher_nll"}


def test_drawn_responses_are_the_students_own(folder: Path, tmp_path: Path) -> None:
    """They change with the step and the seed, and never exceed their limit."""
    told = {}
    for seed in (0, 1):
        output = tmp_path / str(seed)
        distil(folder, output, on_policy=1.0, max_new_tokens=3, batch_size=13, epochs=2, seed=seed, learning_rate=1e-9)
        told[seed] = [line["nll"] for line in steps(output)]
        assert all(0 < line["lengths"] <= 3 and line["on_policy"] == 1 for line in steps(output))
    assert len({round(x, 6) for many in told.values() for x in many}) == 4


def test_what_may_be_drawn_is_planned_for_and_bounded(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Responses longer than any of the data: sequences end at --max-length, which the teacher must take."""
    long: dict[str, Any] = {"on_policy": 1.0, "max_new_tokens": 100, "progress": "plain", "learning_rate": 1e-9}
    distil(folder, tmp_path / "out", **long, max_length=50, epochs=1)
    assert max(line["lengths"] for line in steps(tmp_path / "out")) > 20  # the longest of the data have 17
    assert json.loads((tmp_path / "out/run.json").read_text())["sampled_at_once"] >= 1
    write_model(tmp_path / "short", seed=1, max_position_embeddings=40)
    with pytest.raises(ModelError, match=r"--teacher \S+: its context is 40 tokens, but a row may have 50"):
        distil(folder, tmp_path / "no", teacher=str(tmp_path / "short"), **long, max_length=50)


def test_lora_and_preferences(folder: Path, tmp_path: Path) -> None:
    """The best responses of preferences are learned, into an adapter."""
    data = write_rows(tmp_path / "pairs.jsonl", pairs(13))
    distil(folder, tmp_path / "out", data=data, lora=True, lora_rank=2, epochs=2)
    assert (tmp_path / "out/adapter_model.safetensors").exists()
    distil(folder, tmp_path / "whole", epochs=1, max_steps=1)
    distil(folder, tmp_path / "same", data=data, epochs=1, max_steps=1)
    assert steps(tmp_path / "whole")[0]["loss"] == steps(tmp_path / "same")[0]["loss"]
    record = json.loads((tmp_path / "out/run.json").read_text())
    assert record["status"] == "finished"
    assert metrics(tmp_path / "out")


def test_a_teacher_with_a_wider_embedding_counts_for_the_tokens_that_both_have(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    wide = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    with torch.no_grad():
        rows = wide.config.vocab_size
        wide.resize_token_embeddings(rows + 8)
        wide.get_output_embeddings().weight[rows:] = 9.0  # likely, if they counted
    wide.save_pretrained(tmp_path / "wide")
    AutoTokenizer.from_pretrained(folder / "teacher").save_pretrained(tmp_path / "wide")
    for name, teacher in (("a", folder / "teacher"), ("b", tmp_path / "wide")):
        distil(folder, tmp_path / name, teacher=str(teacher), epochs=1)
    assert [line["loss"] for line in steps(tmp_path / "b")] == pytest.approx(
        [line["loss"] for line in steps(tmp_path / "a")], rel=1e-5
    )
    with pytest.raises(ModelError, match=r"--teacher \S+: it has \d+ tokens and the model \d+, .* give another one$"):
        prefopt.distil(
            str(tmp_path / "wide"),
            str(folder / "rows.jsonl"),
            teacher=str(folder / "teacher"),
            output=tmp_path / "c",
            device="cpu",
        )


def test_mistakes_are_one_line(folder: Path, tmp_path: Path) -> None:
    other = world.write_world(tmp_path / "other")
    with pytest.raises(
        ModelError, match=r"--teacher \S+: its tokenizer is not that of .* give a teacher with the same"
    ):
        distil(folder, tmp_path / "out", teacher=other)
    texts = write_rows(tmp_path / "texts.jsonl", TEXTS)
    with pytest.raises(DataError, match="has no prompt that the model could respond to, for --on-policy"):
        distil(folder, tmp_path / "out", data=texts, on_policy=0.5)
    with pytest.raises(ConfigError, match="--jsd-weight is for --divergence jsd"):
        distil(folder, tmp_path / "out", jsd_weight=0.5)
    with pytest.raises(ConfigError, match="--max-new-tokens is for responses that are drawn"):
        distil(folder, tmp_path / "out", max_new_tokens=5)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_writes_nothing(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from prefopt.cli import main

    words = ["distil", "--model", str(folder / "model"), "--teacher", str(folder / "teacher"), "--device", "cpu"]
    words += ["--data", str(folder / "rows.jsonl"), "--output", str(tmp_path / "out"), "--dry-run"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "teacher: " in said and "dry run: nothing was trained" in said and not (tmp_path / "out").exists()
    assert main([*words, "--teacher", str(tmp_path / "absent")]) == 2
