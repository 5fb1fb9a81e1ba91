"""A merged model gives what the model with its adapter gives, loaded by plain transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.small import small_tokenizer
from model.architectures import build
from prefopt.cli import main
from prefopt.errors import ModelError, RunError
from prefopt.model import merge
from prefopt.model.merge import merge_adapter
from train.small import pairs, write_model

# What PEFT warns of, where these tests call it by themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),
]

IDS = torch.tensor([[3, 20, 30, 40, 5, 6, 7, 50, 51, 12]])
CPU = torch.device("cpu")


def adapter_of(base: str, folder: Path, *, scale: float = 0.2, **options: Any) -> str:
    """A saved adapter that does something."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(base)
    fields = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    policy = get_peft_model(model, LoraConfig(**fields))
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name or "lora_embedding_B" in name or "modules_to_save" in name:
                weight.add_(torch.randn_like(weight), alpha=scale)
    policy.save_pretrained(folder)
    return str(folder)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS).logits.float()
    return found


def with_adapter(base: str, adapter: str) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("base") / "m")


KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "ranks and scales of their own": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32}},
    "biases": {"bias": "none", "target_modules": ["q_proj"]},
    "a head that is trained whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "an adapter on the head": {"target_modules": ["q_proj", "lm_head"]},
    "an adapter on the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
}


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*")
@pytest.mark.filterwarnings("ignore:.*tied.*")
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_those_of_the_adapter(kind: str, tied: bool, tmp_path: Path) -> None:
    base = write_model(tmp_path / "m", tie_word_embeddings=tied)
    adapter = adapter_of(base, tmp_path / "a", **KINDS[kind])
    report = merge_adapter(adapter, tmp_path / "out", dtype=torch.float32, device=CPU)
    expected = with_adapter(base, adapter)
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    plain = logits(AutoModelForCausalLM.from_pretrained(base))
    assert float((expected - plain).norm()) > 1e3 * float((expected - found).norm())
    assert report.difference < 1e-5 < 1e-2 < report.effect and report.rounding == 0.0
    assert report.untied == (tied and ("adapter on" in kind))
    assert not list((tmp_path / "out").glob("adapter*"))


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "qwen3_moe", "cohere"])
def test_other_architectures_are_merged_too(name: str, tmp_path: Path) -> None:
    build(name).float().save_pretrained(tmp_path / "m")
    small_tokenizer().save_pretrained(tmp_path / "m")
    options: dict[str, Any] = {"fan_in_fan_out": True} if name == "gpt2" else {}
    adapter = adapter_of(str(tmp_path / "m"), tmp_path / "a", **options)
    assert merge_adapter(adapter, tmp_path / "out", dtype=torch.float32, device=CPU).difference < 1e-5
    expected = with_adapter(str(tmp_path / "m"), adapter)
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_a_trained_adapter_goes_with_its_tokenizer_template_and_card(base: str, tmp_path: Path) -> None:
    import prefopt

    chats = [
        {"prompt": [{"role": "user", "content": r["prompt"]}]}
        | {side: [{"role": "assistant", "content": r[side]}] for side in ("chosen", "rejected")}
        for r in pairs(8)
    ]
    prefopt.dpo(
        base, chats, output=tmp_path / "a", lora=True, learning_rate=1e-2, max_length=96, progress="none", batch_size=4
    )
    assert main(["merge", "--adapter", str(tmp_path / "a"), "--output", str(tmp_path / "out"), "--device", "cpu"]) == 0
    mine, theirs = (AutoTokenizer.from_pretrained(tmp_path / x) for x in ("out", "a"))
    assert mine.chat_template == theirs.chat_template is not None
    assert mine.apply_chat_template(chats[0]["prompt"]) == theirs.apply_chat_template(chats[0]["prompt"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: transformers" in card and "merged in, in float32" in card and "peft" not in card
    assert "## Settings" in card, "what the adapter's card told is kept"
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    torch.testing.assert_close(found, with_adapter(base, str(tmp_path / "a")), rtol=1e-4, atol=1e-4)


def test_what_rounding_takes_is_told(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = adapter_of(base, tmp_path / "a", scale=3e-4)
    words = ["merge", "--adapter", adapter, "--output", str(tmp_path / "out"), "--dtype", "bfloat16", "--device", "cpu"]
    assert main(words) == 0
    said = capsys.readouterr().out
    before, after = load_file(f"{base}/model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert {t.dtype for t in after.values()} == {torch.bfloat16}
    lost = changed = 0.0
    exact = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload()
    for name, value in exact.state_dict().items():
        assert torch.equal(after[name], value.bfloat16()) or "_proj" not in name, "rounded once"
        if "_proj" in name:
            lost += float((after[name].float() - value).norm() ** 2)
            changed += float((value - before[name]).norm() ** 2)
    assert f"rounding to bfloat16 moves these weights {(lost / changed) ** 0.5:.2g} times as far as the adapter" in said


def test_an_adapter_that_does_nothing_is_told(base: str, tmp_path: Path) -> None:
    adapter = adapter_of(base, tmp_path / "a", scale=0.0)
    report = merge_adapter(adapter, tmp_path / "out", dtype=torch.float32, device=CPU)
    assert any("changes nothing" in line for line in report.lines())


def test_a_wrong_merge_is_not_written(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = adapter_of(base, tmp_path / "a")
    monkeypatch.setattr(merge, "_merge_layers", lambda wrapped, dtype: (0, 0.0))
    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self: self.unload(), raising=False)
    with pytest.raises(ModelError, match=r"logits differ by .* nothing was written"):
        merge_adapter(adapter, tmp_path / "out", dtype=torch.float32, device=CPU)
    assert not (tmp_path / "out").exists()


def test_what_was_written_and_gives_no_numbers_is_told(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = adapter_of(base, tmp_path / "a")

    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        save_file({n: t * float("nan") for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(merge, "apply_umask", spoil)
    with pytest.raises(RunError, match="the saved model differs by nan"):
        merge_adapter(adapter, tmp_path / "out", dtype=torch.float32, device=CPU)


def broken(place: Path, base: str, how: str) -> dict[str, Any]:
    adapter = Path(adapter_of(base, place / "a"))
    config = adapter / "adapter_config.json"
    if how == "quantised":
        other = Path(write_model(place / "q"))
        said = json.loads((other / "config.json").read_text()) | {
            "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}
        }
        (other / "config.json").write_text(json.dumps(said))
        return {"model": str(other)}
    if how == "another model":
        return {"model": write_model(place / "o", hidden_size=48)}
    if how == "no name":
        config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": None}))
    if how == "no adapter":
        config.unlink()
    if how == "weights missing":
        weights = load_file(adapter / "adapter_model.safetensors")
        del weights[next(iter(weights))]
        save_file(weights, adapter / "adapter_model.safetensors")
    if how == "prefix":
        model = AutoModelForCausalLM.from_pretrained(base)
        get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).save_pretrained(adapter)
    if how == "taken":
        (place / "out").mkdir()
        (place / "out" / "mine").touch()
    return {}


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("quantised", "q is quantised: .* serve model and adapter side by side"),
        ("another model", "its weights do not have the shapes of the model's"),
        ("no name", "does not name its base model; give --model"),
        ("no adapter", "it is not a PEFT adapter"),
        ("weights missing", "lacks weights for this model"),
        ("prefix", "of the kind PREFIX_TUNING, which cannot be merged"),
        ("taken", "out exists; name a new folder"),
    ],
)
def test_what_cannot_be_merged_is_one_line(how: str, said: str, base: str, tmp_path: Path) -> None:
    options = broken(tmp_path, base, how)
    with pytest.raises((ModelError, RunError), match=said):
        merge_adapter(str(tmp_path / "a"), tmp_path / "out", dtype=torch.float32, device=CPU, **options)
    assert how == "taken" or not (tmp_path / "out").exists()
