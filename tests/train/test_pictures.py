"""Training on rows with pictures, from data to a folder that loads elsewhere."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import prefopt
from model.vision import FAMILY_PARAMS, picture, write_folder
from prefopt.chat.session import open_models
from prefopt.config.sample import ChatConfig
from prefopt.core.terminal import Reporter
from prefopt.data.chat.pictures import token_of_pictures
from prefopt.data.comparisons import read_comparisons
from prefopt.data.group import PicturedIds, Placed
from prefopt.data.load import load_groups
from prefopt.data.tokenizer import load_tokenizer
from prefopt.errors import ConfigError, DataError, ModelError
from prefopt.evaluate.judges import LlmJudge, Question
from prefopt.evaluate.samples import kl_to_reference
from prefopt.generate.chat_model import LocalChatModel
from prefopt.generate.model_io import SampledModel
from prefopt.generate.sampler import Sample, group_of, key_of
from prefopt.model.architectures import causal_model, takes_pictures
from prefopt.model.load import load_model
from prefopt.model.packing import pack
from prefopt.model.scorer import Scorer
from prefopt.rl.rollouts import Rollouts

QUICK: dict[str, Any] = {"epochs": 2, "batch_size": 4, "learning_rate": 3e-3, "progress": "none"}


def row(n: int, answers: tuple[str, str]) -> dict[str, Any]:
    url = "data:image/png;base64," + base64.b64encode(picture(20 + n % 3 * 7, 16, n).data).decode()
    words = {"type": "text", "text": f"what is in picture {n}?"}
    prompt = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, words]}]
    sides = [[{"role": "assistant", "content": f"{answer} {n}"}] for answer in answers]
    return {"prompt": prompt, "chosen": sides[0], "rejected": sides[1]}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven pairs with a picture each, and one without."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    found = [row(n, ("a red square", "two cats")) for n in range(7)]
    found.append({**row(7, ("a dog", "two cats")), "prompt": [{"role": "user", "content": "what is 12?"}]})
    path.write_text("\n".join(map(json.dumps, found)))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder("qwen3_vl", tmp_path_factory.mktemp("qwen3_vl"))


def towers(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for name, value in load_file(folder / "model.safetensors").items() if "visual" in name}


def margin(folder: Path, data: Path, base: Path | None = None) -> float:
    """Mean log-ratio of chosen to rejected of the data by a model folder, or an adapter on ``base``."""
    tokenizer = load_tokenizer(folder)
    table = load_groups([str(data)], tokenizer).groups
    adapter = str(folder) if base is not None else None
    made = load_model(
        str(base or folder), dtype=torch.float32, device=torch.device("cpu"), adapter=adapter, pictures=True
    )
    scorer = Scorer(made, pictures=True)
    with torch.no_grad():
        batch = pack(list(table), scorer.layout)
        sums = torch.zeros(len(batch.length)).index_add(0, batch.owner, scorer(batch))
    return float((sums[::2] - sums[1::2]).mean())


def test_dpo_with_a_frozen_tower(model: Path, data: Path, tmp_path: Path) -> None:
    """The folder loads in transformers; the tower is the checkpoint's to the bit, also in bfloat16; margins grow."""
    before = margin(model, data)
    result = prefopt.dpo(model=str(model), data=[str(data)], output=str(tmp_path / "out"), dtype="bfloat16", **QUICK)
    assert result is not None
    out = tmp_path / "out"
    assert margin(out, data) > before + 0.5
    for name, value in towers(model).items():
        assert torch.equal(value, towers(out)[name]), name
    trained = load_file(out / "model.safetensors")
    assert any(not torch.equal(v, trained[n]) for n, v in load_file(model / "model.safetensors").items())
    assert (out / "preprocessor_config.json").is_file() and (out / "processor_config.json").is_file()
    whole = AutoModelForImageTextToText.from_pretrained(out)
    assert type(whole).__name__ == json.loads((out / "config.json").read_text())["architectures"][0]
    # A second run reads all reference values from the cache, and its folder is the same to the bit.
    again = prefopt.dpo(model=str(model), data=[str(data)], output=str(tmp_path / "again"), dtype="bfloat16", **QUICK)
    assert again is not None
    other = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(value, other[name]) for name, value in trained.items())


@pytest.mark.parametrize("vision", ["lora", "full"])
def test_towers_train_by_option(model: Path, data: Path, tmp_path: Path, vision: str) -> None:
    out = tmp_path / "out"
    more: dict[str, Any] = {"vision": vision, "lora": vision == "lora", "dtype": "float32"}
    prefopt.sft(model=str(model), data=[str(data)], output=str(out), **QUICK, **more)
    if vision == "full":
        before, after = towers(model), towers(out)
        assert any(not torch.equal(value, after[name]) for name, value in before.items())
        return
    adapter = load_file(out / "adapter_model.safetensors")
    assert any("visual" in name and value.abs().max() > 0 for name, value in adapter.items() if "lora_B" in name)
    assert any("language_model" in name for name in adapter)
    assert (out / "preprocessor_config.json").is_file()
    assert margin(out, data, base=model) != margin(model, data)


def test_a_reward_model_of_pictures(data: Path, tmp_path: Path) -> None:
    model = write_folder("gemma3", tmp_path / "gemma3")
    found = prefopt.reward(model=str(model), data=[str(data)], output=str(tmp_path / "out"), dtype="float32", **QUICK)
    assert found is not None and found.metrics["loss"] < 0.6
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()
    qwen = write_folder("qwen2_5_vl", tmp_path / "qwen")
    with pytest.raises(ModelError, match="no sequence classifier"):
        prefopt.reward(model=str(qwen), data=[str(data)], output=str(tmp_path / "other"), **QUICK)


def test_options_that_would_do_nothing_are_refused(model: Path, data: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"prompt": [{"role": "user", "content": "?"}], "chosen": "a", "rejected": "b"}))
    given: dict[str, Any] = {"model": str(model), "output": str(tmp_path / "out"), **QUICK}
    for more, what in (
        ({"data": [str(data)], "vision": "lora"}, "add --lora"),
        ({"data": [str(data)], "vision": "full", "lora": True}, "leave one out"),
        ({"data": [str(text)], "vision": "full"}, "no row has a picture"),
    ):
        with pytest.raises(ConfigError, match=what):
            prefopt.dpo(**given, **more)


def test_vllm_refuses_pictures(model: Path, data: Path) -> None:
    with pytest.raises(ConfigError, match="--engine vllm is not given pictures"):
        prefopt.sample(model=str(model), prompts=[str(data)], engine="vllm", progress="none")


DRAWN: dict[str, Any] = {
    **{"num": 2, "max_new_tokens": 6, "batch_size": 4, "max_steps": 2, "learning_rate": 1e-3, "dtype": "float32"},
    **{"progress": "none", "max_kl": 1e6},
}


@pytest.mark.parametrize("algorithm", ["ppo", pytest.param("rloo", marks=pytest.mark.slow)])
def test_ppo_learns_on_prompts_with_pictures(model: Path, data: Path, tmp_path: Path, algorithm: str) -> None:
    """Features of a picture are computed once for all responses to a prompt; the tower stays as it is."""
    out = tmp_path / "out"
    more = {"critic": "head"} if algorithm == "ppo" else {}
    found = prefopt.ppo(
        model=str(model), prompts=[str(data)], reward="length", output=str(out), algorithm=algorithm, **DRAWN, **more
    )
    assert found is not None
    before, after = (load_file(folder / "model.safetensors") for folder in (model, out))
    assert any(not torch.equal(v, after[n]) for n, v in before.items())
    assert all(torch.equal(v, after[n]) for n, v in before.items() if "visual" in n)
    assert (out / "preprocessor_config.json").is_file()


def test_online_dpo_keeps_rows_with_pictures(model: Path, data: Path, tmp_path: Path) -> None:
    """Its rounds hold the pictures, and train another run."""
    out = tmp_path / "out"
    options: dict[str, Any] = {"model": str(model), "prompts": [str(data)], "reward": "length", **DRAWN}
    prefopt.online(output=str(out), **options)
    kept = sorted((out / "rounds").glob("*.jsonl"))
    rows = [c for path in kept for c in read_comparisons(path).comparisons]
    assert rows and any(c.pictures for c in rows)
    prefopt.dpo(model=str(model), data=[str(kept[0])], output=str(tmp_path / "next"), **{**QUICK, "epochs": 1})
    assert (tmp_path / "next" / "model.safetensors").is_file()


def test_rollouts_keep_their_pictures() -> None:
    """For a checkpoint and for other ranks: files by path and digest, others by their bytes."""
    file, held = replace(picture(), source="/somewhere/\udcff.png", data=b""), picture(seed=1)
    prompts = [
        PicturedIds(np.array([1, 9, 9, 2], np.int32), (Placed(file, 1, 3),)),
        np.array([1, 2], np.int32),
        PicturedIds(np.array([9, 9], np.int32), (Placed(held, 0, 1), Placed(file, 1, 2))),
    ]
    sample = Sample(np.array([4, 5], np.int32), np.zeros(2), np.zeros(2), True)
    groups = tuple(group_of(prompt, [sample, sample]) for prompt in prompts)
    zero_M, zero_N = torch.zeros(12), torch.zeros(6)
    found = Rollouts.from_tensors(Rollouts(groups, zero_M, zero_M, zero_M, None, zero_N, zero_N > 0).tensors())
    assert [g.pictures for g in found.groups] == [g.pictures for g in groups]
    assert found.groups[2].pictures[0].picture.data == held.data
    assert [g.prompt.tobytes() for g in found.groups] == [g.prompt.tobytes() for g in groups]


@pytest.mark.slow
@pytest.mark.parametrize("on_policy", [0.0, 1.0])
def test_distillation_and_the_kl_guard_draw_for_pictures(
    model: Path, data: Path, tmp_path: Path, on_policy: float
) -> None:
    """A student on its own responses, and a run of DPO that measures its KL on some."""
    given: dict[str, Any] = {**QUICK, "model": str(model), "data": [str(data)], "output": str(tmp_path / "out")}
    given |= {"dtype": "float32", "max_steps": 2, "max_new_tokens": 6}
    if on_policy:
        teacher = write_folder("qwen3_vl", tmp_path / "teacher", seed=1)
        found: Any = prefopt.distil(teacher=str(teacher), on_policy=on_policy, **given)
    else:
        found = prefopt.dpo(max_kl=1e6, kl_every=1, kl_samples=4, **given)
    assert found is not None and (tmp_path / "out" / "model.safetensors").is_file()
    if not on_policy:
        lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
        assert any("kl" in name for line in lines for name in json.loads(line))


@pytest.mark.slow
def test_a_reward_model_and_a_critic_see_pictures(data: Path, tmp_path: Path) -> None:
    """Of one family: scores depend on the pictures, and the critic learns."""
    model = write_folder("gemma3", tmp_path / "gemma3")
    prefopt.reward(model=str(model), data=[str(data)], output=str(tmp_path / "reward"), dtype="float32", **QUICK)
    given = {"prompts": [str(data)], "reward": str(tmp_path / "reward"), **DRAWN}
    assert prefopt.ppo(model=str(model), output=str(tmp_path / "out"), **given) is not None
    other = write_folder("gemma3", tmp_path / "other")
    settings = other / "preprocessor_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "do_normalize": False}))
    with pytest.raises(ModelError, match="reads pictures in another way"):
        prefopt.ppo(model=str(other), output=str(tmp_path / "none"), **given)


def test_judges_are_not_shown_pictures(model: Path, data: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"model": str(model), "prompts": [str(data)], "output": str(tmp_path / "out")}
    with pytest.raises(DataError, match="judges are not shown"):
        prefopt.online(reward="people", study=str(tmp_path / "study"), **given, **DRAWN)
    judge = LlmJudge.__new__(LlmJudge)  # without a server: it is not asked
    with pytest.raises(DataError, match="--judge llm is not shown"):
        judge([Question(read_comparisons(data).comparisons[0])])


def test_prompts_that_differ_in_their_picture_have_random_numbers_of_their_own(model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(model)
    rows = [row(0, ("a", "b")), row(3, ("a", "b"))]  # pictures of one size
    rows[1]["prompt"][0]["content"][1] = rows[0]["prompt"][0]["content"][1]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    first, second = (g.prompt for g in load_groups([str(path)], tokenizer).groups)
    assert np.array_equal(np.asarray(first), np.asarray(second))
    assert key_of(0, first, 0, 0) != key_of(0, second, 0, 0)
    assert key_of(0, first, 0, 0) == key_of(0, first, 0, 0) != key_of(0, np.asarray(first), 0, 0)


def test_the_token_of_pictures_is_not_drawn_from_a_model_in_python(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = load_model(str(model), dtype=torch.float32, device=torch.device("cpu"), pictures=True)
    monkeypatch.chdir(write_folder("llava", tmp_path / "llava"))  # whose config.json is of another model
    sampled = SampledModel("given", given=given, tokenizer=load_tokenizer(model))
    sampled.pictures = True
    assert sampled.never_drawn == (token_of_pictures(str(model)),)


@pytest.mark.parametrize("family", FAMILY_PARAMS)
def test_samples_are_scored_as_they_were_drawn(family: str, data: Path, tmp_path: Path) -> None:
    """The sampler's cache of a prompt with pictures gives the scorer's log-probabilities."""
    folder = write_folder(family, tmp_path / family)
    out = tmp_path / "samples.jsonl"
    options: dict[str, Any] = {"num": 2, "max_new_tokens": 9, "dtype": "float32", "progress": "none"}
    found = prefopt.sample(model=str(folder), prompts=[str(data)], output=str(out), **options)
    assert found.mismatch is not None and found.mismatch.tokens == found.tokens > 100
    assert found.mismatch.largest < 1e-5
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert written[0]["prompt"][0]["content"][0]["type"] == "image"
    token = token_of_pictures(str(folder))
    assert token is not None and not any(token in ids for line in written for ids in line["token_ids"])


def test_samples_with_pictures_are_compared_with_a_reference(model: Path, data: Path, tmp_path: Path) -> None:
    """Where the token of pictures, which is never drawn, has a probability as in trained models; else it is said."""
    out = tmp_path / "samples.jsonl"
    options: dict[str, Any] = {"num": 1, "max_new_tokens": 5, "dtype": "float32", "progress": "none"}
    prefopt.sample(model=str(model), prompts=[str(data)], output=str(out), **options)
    rows = read_comparisons(out).comparisons

    def reference() -> SampledModel:
        return SampledModel(str(model), device="cpu", dtype="float32")

    with pytest.raises(DataError, match="without the token of pictures"):
        kl_to_reference(rows, reference())
    for row in rows:
        row.extra["sampling_logprobs"] = row.extra["logprobs"]
    found = kl_to_reference(rows, reference())
    assert found is not None and abs(found.k1.mean) < 1e-4
    other = write_folder("qwen3_vl", tmp_path / "other", seed=1)
    found = kl_to_reference(rows, SampledModel(str(other), device="cpu", dtype="float32"), reference())
    assert found is not None and found.k1.mean > 1e-3


def test_words_alone_leave_an_adapter_its_processor(model: Path, data: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"prompt": [{"role": "user", "content": "what is 12?"}], "completion": "the answer"}))
    given: dict[str, Any] = {**QUICK, "epochs": 1, "model": str(model)}
    prefopt.sft(data=[str(text)], output=str(tmp_path / "out"), lora=True, **given)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()


def test_chat_loads_a_tower_where_it_takes_pictures(tmp_path: Path) -> None:
    folder = write_folder("qwen3_5", tmp_path)
    (found,) = open_models(ChatConfig(model=str(folder), device="cpu", dtype="float32"), 0, Reporter("none"))
    assert isinstance(found, LocalChatModel)
    assert takes_pictures(causal_model(found.model.scorer.model))
