"""A folder with an adapter is a model's name everywhere: its base is found, and its tokens have rows."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import prefopt
from data.small import small_tokenizer
from prefopt.cli import main
from prefopt.config.dpo import DpoConfig
from prefopt.config.tools import ScoreConfig
from prefopt.data.comparisons import parse_comparisons
from prefopt.errors import ConfigError, ModelError
from prefopt.evaluate.score import load_row_scorer
from prefopt.model.adapter import add_adapter, new_lora
from prefopt.model.load import base_and_adapter, load_config, load_model
from prefopt.model.merge import merge_adapter
from prefopt.model.scalar import load_scalar
from prefopt.reference.identity import identity_of_name
from train.small import QUICK, metrics, pairs, weights, write_model

# What PEFT warns of, where these tests call it by themselves.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

CPU = torch.device("cpu")
ROWS = pairs(8)
PROMPTS = [{"prompt": row["prompt"]} for row in ROWS[:4]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A base, and what ``prefopt dpo --lora`` wrote on it."""
    place = tmp_path_factory.mktemp("models")
    base = write_model(place / "base")
    options = {**QUICK, "learning_rate": 1e-2}
    prefopt.dpo(base, ROWS, output=place / "adapter", lora=True, max_steps=4, **options)
    return base, str(place / "adapter")


def told(output: Path) -> list[dict[str, Any]]:
    clocks = ("second", "memory", "utilisation", "eps")
    return [{k: v for k, v in line.items() if not any(word in k for word in clocks)} for line in metrics(output)]


METHODS: dict[str, dict[str, Any]] = {
    "dpo": {},
    "sft": {},
    "ppo": {"reward": "length", "max_new_tokens": 4, "num": 2},
}


@pytest.mark.parametrize("method", METHODS)
def test_training_goes_on_as_with_base_and_adapter(
    method: str, folders: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = folders
    options = {**QUICK, "max_steps": 2, **METHODS[method]}
    if method == "ppo":
        options.pop("max_length")
    train = getattr(prefopt, method)
    train(base, ROWS, adapter=adapter, output=tmp_path / "one", **options)
    train(adapter, ROWS, output=tmp_path / "other", **{**options, "progress": "plain"})
    assert f"{adapter} is an adapter on {base}: both are loaded" in capsys.readouterr().out
    one, other = weights(tmp_path / "one"), weights(tmp_path / "other")
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
    assert told(tmp_path / "one") == told(tmp_path / "other")
    first, second = (json.loads((tmp_path / n / "run.json").read_text())["options"] for n in ("one", "other"))
    assert {k: v for k, v in first.items() if k not in ("output", "progress")} == {
        k: v for k, v in second.items() if k not in ("output", "progress")
    }
    assert json.loads((tmp_path / "other" / "adapter_config.json").read_text())["base_model_name_or_path"] == base


def test_a_reference_may_be_an_adapter(folders: tuple[str, str], tmp_path: Path) -> None:
    """The adapter as it was, by its folder: the very model that a run on it starts from."""
    base, adapter = folders
    options = {**QUICK, "max_steps": 1}
    prefopt.dpo(adapter, ROWS, output=tmp_path / "one", **options)
    prefopt.dpo(adapter, ROWS, reference=adapter, output=tmp_path / "two", **options)
    prefopt.dpo(base, ROWS, reference=base, reference_adapter=adapter, lora=True, output=tmp_path / "a", **options)
    prefopt.dpo(base, ROWS, reference=adapter, lora=True, output=tmp_path / "b", **options)
    assert told(tmp_path / "one") == told(tmp_path / "two")
    assert told(tmp_path / "a") == told(tmp_path / "b")
    assert told(tmp_path / "a")[0]["rewards/margins"] != 0
    prefopt.ppo(
        base,
        PROMPTS,
        reward="length",
        reference=adapter,
        max_new_tokens=4,
        num=2,
        output=tmp_path / "p",
        batch_size=4,
        max_steps=1,
        device="cpu",
        dtype="float32",
        progress="none",
    )
    assert told(tmp_path / "p")[0]["objective/kl"] != 0


def test_samples_and_identity_are_those_of_base_and_adapter(folders: tuple[str, str]) -> None:
    base, adapter = folders
    options: dict[str, Any] = {"max_new_tokens": 6, "num": 2, "device": "cpu", "dtype": "float32", "progress": "none"}
    one = prefopt.sample(base, PROMPTS, adapter=adapter, **options)
    other = prefopt.sample(adapter, PROMPTS, **options)
    assert [r["token_ids"] for r in one.rows] == [r["token_ids"] for r in other.rows]
    assert [r["logprobs"] for r in one.rows] == [r["logprobs"] for r in other.rows]
    assert identity_of_name(adapter) == identity_of_name(base, adapter) != identity_of_name(base)
    assert load_config(adapter).to_dict() == load_config(base).to_dict()


def test_every_other_verb_takes_it(folders: tuple[str, str], tmp_path: Path) -> None:
    base, adapter = folders
    rows, prompts = tmp_path / "pairs.jsonl", tmp_path / "prompts.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    prompts.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    quick = ["--progress", "none", "--device", "cpu", "--dtype", "float32"]
    judged = ["--judge", "length", "--reference", adapter, "--max-new-tokens", "4", *quick]
    assert main(["compare", "--a", adapter, "--b", base, "--prompts", str(prompts), *judged]) == 0
    assert main(["data", "check", str(rows), "--model", adapter]) == 0
    train = [*quick, "--max-steps", "1", "--batch-size", "4", "--output"]
    reward = tmp_path / "reward"
    assert main(["reward", "--model", adapter, "--data", str(rows), *train, str(reward)]) == 0
    assert (reward / "model.safetensors").is_file()
    chain = ["rlhf", "--model", adapter, "--data", str(rows), "--output", str(tmp_path / "chain"), *quick]
    stages = "--sft max_steps=1 --reward max_steps=1 --ppo max_steps=1 num=2 max_new_tokens=4"
    assert main([*chain, *stages.split()]) == 0
    assert (tmp_path / "chain" / "ppo" / "model.safetensors").is_file()
    scored = ["score", str(rows), "--reward", "implicit", "--output", str(tmp_path / "s"), "--device", "cpu"]
    assert main([*scored, "--dtype", "float32", "--model", adapter]) == 0


def test_reward_models_begin_with_its_change(folders: tuple[str, str]) -> None:
    base, adapter = folders
    found = load_scalar(adapter, dtype=torch.float32, device=CPU, tokenizer=small_tokenizer())
    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload()
    ids = torch.tensor([[5, 60, 70, 80, 9]])
    with torch.no_grad():
        mine, theirs = found.model(ids).last_hidden_state, whole.model(ids).last_hidden_state
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert all(weight.requires_grad for weight in found.parameters())


def test_an_adapter_with_a_scalar_head_is_a_reward_model(folders: tuple[str, str], tmp_path: Path) -> None:
    """As other trainers write them: layers by LoRA, the head whole."""
    base, _ = folders
    bare = load_scalar(base, dtype=torch.float32, device=CPU, tokenizer=small_tokenizer(), seed=5)
    wrapped = get_peft_model(bare, LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    wrapped.eval().save_pretrained(tmp_path / "r", save_embedding_layers=False)
    config = tmp_path / "r" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": base}))
    found = load_scalar(str(tmp_path / "r"), dtype=torch.float32, device=CPU, tokenizer=small_tokenizer())
    ids = torch.tensor([[5, 60, 70, 80, 9]])
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, wrapped(ids).logits, rtol=1e-4, atol=1e-5)
    for merges in (
        lambda: merge_adapter(str(tmp_path / "r"), tmp_path / "m", dtype=torch.float32, device=CPU),
        lambda: load_model(str(tmp_path / "r"), dtype=torch.float32, device=CPU),
    ):
        with pytest.raises(ModelError, match=r"is an adapter for a reward model, .* give it as --reward"):
            merges()


def test_implicit_rewards_are_against_its_base(folders: tuple[str, str]) -> None:
    base, adapter = folders
    options: dict[str, Any] = {"files": ["x"], "reward": "implicit", "output": "o", "device": "cpu", "dtype": "float32"}
    rows: Any = list(parse_comparisons(ROWS, "data"))
    one = load_row_scorer(ScoreConfig(model=base, adapter=adapter, **options))(rows)
    other = load_row_scorer(ScoreConfig(model=adapter, **options))(rows)
    assert one == other and any(abs(x) > 1e-4 for scores in one for x in scores)


def test_where_the_base_is_looked_for(
    folders: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is named, else from the adapter's folder; else one line that tells how to name both."""
    base, adapter = folders
    monkeypatch.chdir(tmp_path)
    shutil.copytree(adapter, "here/a")
    config = Path("here/a/adapter_config.json")

    def named(base: Any) -> None:
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": base}))

    for name in (base, os.path.relpath(base), os.path.relpath(base, "here/a")):
        named(name)
        assert Path(base_and_adapter("here/a")[0]).samefile(base)
    for gone in ("/no/such/base", "gone", "who/gone"):
        named(gone)
        with pytest.raises(ModelError, match=f"here/a is an adapter on {gone}, which .*--model BASE --adapter here/a"):
            base_and_adapter("here/a")
        with pytest.raises(ModelError, match="--model BASE --adapter here/a"):
            prefopt.dpo("here/a", ROWS, output="o", **QUICK)
    named(None)
    with pytest.raises(ModelError, match=r"here/a does not name its base model.*--model BASE --adapter here/a"):
        base_and_adapter("here/a")


def test_two_adapters_are_one_too_many(folders: tuple[str, str], tmp_path: Path) -> None:
    _, adapter = folders
    for call in (
        lambda: DpoConfig(model=adapter, adapter=adapter, data=["x"], output="o"),
        lambda: prefopt.sample(adapter, PROMPTS, adapter=adapter),
        lambda: merge_adapter(adapter, tmp_path / "o", model=adapter, dtype=torch.float32, device=CPU),
    ):
        with pytest.raises(ConfigError, match="is an adapter itself"):
            call()
    with pytest.raises(ConfigError, match=r"--lora-rank .* --model, which is an adapter, brings its own"):
        DpoConfig(model=adapter, lora_rank=16, data=["x"], output="o")
    assert DpoConfig(model=adapter, lora=True, data=["x"], output="o").lora_rank is None


def test_a_model_with_an_adapter_inside_is_refused(folders: tuple[str, str], tmp_path: Path) -> None:
    """transformers puts such an adapter on by itself: frozen, without a line, under the identity of the bare model."""
    base, adapter = folders
    both = Path(shutil.copytree(base, tmp_path / "both"))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(Path(adapter, name), both / name)
    for ask in (
        lambda: load_model(str(both), dtype=torch.float32, device=CPU),
        lambda: load_scalar(str(both), dtype=torch.float32, device=CPU, tokenizer=small_tokenizer()),
        lambda: prefopt.dpo(str(both), ROWS, output=tmp_path / "o", **QUICK),
    ):
        with pytest.raises(ModelError, match="both holds a whole model and an adapter"):
            ask()
    assert load_model(base, dtype=torch.float32, device=CPU, adapter=str(both)) is not None  # it is named as one


def test_names_from_home(folders: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell leaves the ~ of --model=~/m as it is."""
    monkeypatch.setenv("HOME", str(Path(folders[0]).parent))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for folder in folders:
        assert main(["data", "check", str(tmp_path / "rows.jsonl"), f"--model=~/{Path(folder).name}"]) == 0


def test_an_adapter_on_an_adapter_is_told_so(folders: tuple[str, str], tmp_path: Path) -> None:
    _, adapter = folders
    second = Path(shutil.copytree(adapter, tmp_path / "second"))
    config = second / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": adapter}))
    for ask in (lambda: load_model(str(second), dtype=torch.float32, device=CPU), lambda: load_config(str(second))):
        with pytest.raises(
            ModelError, match=r"second is an adapter on .*, which is an adapter itself: .* prefopt merge"
        ):
            ask()


# What makes rows of new tokens part of an adapter; and whether the head's new rows are in it.
GROWN: dict[str, dict[str, Any]] = {
    "trained whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "saved beside": {"target_modules": ["q_proj"]},
    "adapted": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "new rows alone": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [260, 261, 262]}},
}


def grown_adapter(base: str, folder: Path, kind: str) -> Any:
    """An adapter on ``base`` with three tokens more, as people make them by hand; the model that it was saved from."""
    torch.manual_seed(1)
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(263, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight[260:] = 0 if kind == "new rows alone" else torch.randn_like(layer.weight[260:])
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, **GROWN[kind]))
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if weight.requires_grad and "lora_A" not in name and "original" not in name:
                weight.add_(torch.randn_like(weight), alpha=0.2)
    wrapped.save_pretrained(folder, save_embedding_layers=kind in ("saved beside", "adapted"))
    tokenizer = small_tokenizer()
    tokenizer.add_tokens(["<new0>", "<new1>", "<new2>"])
    tokenizer.save_pretrained(folder)
    return wrapped.eval()


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*", "ignore:.*tied.*", "ignore:.*save_embedding_layers.*")
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.slow if i % 2 else ()) for i, k in enumerate(GROWN)]
)
def test_a_grown_vocabulary_loads_merges_and_trains_on(kind: str, tied: bool, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", tie_word_embeddings=tied)
    wrapped = grown_adapter(base, tmp_path / "a", kind)
    ids = torch.tensor([[5, 260, 70, 261, 262, 9]])

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = model.eval()(input_ids=ids).logits.float()
        return found

    expected = logits(wrapped)
    close: dict[str, float] = {"rtol": 1e-4, "atol": 1e-4 * float(expected.abs().max())}
    torch.testing.assert_close(
        logits(load_model(str(tmp_path / "a"), dtype=torch.float32, device=CPU)), expected, **close
    )
    merge_adapter(str(tmp_path / "a"), tmp_path / "merged", dtype=torch.float32, device=CPU)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, **close)
    assert merged.config.vocab_size == 263
    new = [{"prompt": "a<new0>", "chosen": "b<new1>", "rejected": "c<new2>"}] * 4
    options = {**QUICK, "learning_rate": 1e-9, "max_steps": 1}
    prefopt.dpo(str(tmp_path / "a"), new, output=tmp_path / "on", **options)
    again = load_model(str(tmp_path / "on"), dtype=torch.float32, device=CPU)
    torch.testing.assert_close(logits(again), expected, **close)


def test_shapes_that_do_not_fit_are_refused(folders: tuple[str, str], tmp_path: Path) -> None:
    base, _ = folders
    grown_adapter(base, tmp_path / "a", "trained whole")
    wider = write_model(tmp_path / "wide", hidden_size=48)
    more = write_model(tmp_path / "more", vocab_size=300)
    for other in (wider, more):
        with pytest.raises(ModelError, match="its weights do not have the shapes of the model's"):
            load_model(other, dtype=torch.float32, device=CPU, adapter=str(tmp_path / "a"))


def test_names_on_the_hub(folders: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter's name, whose base is a name too, is told from a model's once its files are here."""
    base, adapter = folders
    copy = tmp_path / "snapshots" / "a"
    shutil.copytree(adapter, copy)
    config = copy / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "org/base"}))
    there = {"org/base": base, "org/adapter": str(copy)}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: there[name])
    options = {**QUICK, "max_steps": 1}
    for name, lora in (("one", False), ("two", True)):
        prefopt.dpo("org/adapter", ROWS, output=tmp_path / name, lora=lora, **{**options, "learning_rate": 1e-3})
    prefopt.dpo(base, ROWS, adapter=adapter, output=tmp_path / "local", **options)
    one, local = weights(tmp_path / "one"), weights(tmp_path / "local")
    assert all(torch.equal(one[n], local[n]) for n in one)
    assert told(tmp_path / "one") == told(tmp_path / "two") == told(tmp_path / "local")
    saved = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == "org/base"
    assert len(prefopt.sample("org/adapter", PROMPTS, max_new_tokens=2, progress="none").rows) == 4


def test_a_base_named_from_the_adapter_is_named_anew(
    folders: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = folders
    shutil.copytree(base, tmp_path / "pack" / "base")
    shutil.copytree(adapter, tmp_path / "pack" / "a")
    config = tmp_path / "pack" / "a" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "../base"}))
    first = str(tmp_path / "pack" / "a")
    prefopt.dpo(first, ROWS, output=tmp_path / "on", max_steps=1, **QUICK)
    assert Path(base_and_adapter(str(tmp_path / "on"))[0]).samefile(tmp_path / "pack" / "base")
    assert main(["merge", "--model", str(tmp_path / "on"), "--output", str(tmp_path / "whole"), "--device", "cpu"]) == 0
    assert main(["merge", "--model", base, "--output", str(tmp_path / "w"), "--device", "cpu"]) == 2
    assert "--adapter is missing" in capsys.readouterr().err


def test_a_pattern_of_an_adapter_is_never_matched(folders: tuple[str, str], tmp_path: Path) -> None:
    """Some take longer than anyone waits; the weights themselves say where they belong."""

    def base() -> torch.nn.Module:
        return load_model(folders[0], dtype=torch.float32, device=CPU)

    made = new_lora(base(), rank=2, alpha=4, dropout=0.0, targets=["q_proj", "down_proj"])
    folder = tmp_path / "adapter"
    made.save_pretrained(folder)  # type: ignore[operator]
    config = json.loads((folder / "adapter_config.json").read_text())

    def rewritten(**fields: Any) -> str:
        (folder / "adapter_config.json").write_text(json.dumps({**config, **fields}))
        return str(folder)

    def trained(policy: torch.nn.Module) -> set[str]:
        return {name for name, p in policy.named_parameters() if p.requires_grad}

    for endless in (r".*\.(self_attn|mlp)\.(q_proj|down_proj)", "(.|.)*x!", "([a-z._0-9]+)*!"):
        for more in ({}, {"exclude_modules": endless}):
            assert trained(add_adapter(base(), rewritten(target_modules=endless, **more))) == trained(made)
    for field in ("rank_pattern", "alpha_pattern"):
        with pytest.raises(ModelError, match=field):
            add_adapter(base(), rewritten(**{field: {"(.|.)*x!": 4}}))
