"""What ``--compile`` comes to, and what it refuses."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
import torch

from data.small import small_tokenizer
from model.architectures import build
from prefopt.config.dpo import DpoConfig
from prefopt.config.ppo import PpoConfig
from prefopt.errors import ConfigError
from prefopt.model.scorer import PackedModel
from prefopt.train.policy import compiles
from train.small import dpo, metrics, pairs, write_rows


def scorer_on(device: str, kernel: str, name: str = "llama") -> PackedModel:
    """As much of a scorer as the choice reads."""
    model: Any = build(name)
    model.parameters = lambda: iter([types.SimpleNamespace(device=torch.device(device))])
    scorer: Any = types.SimpleNamespace(model=model, kernel=kernel)
    scorer.flash_takes_all = PackedModel.flash_takes_all.fget(scorer)  # type: ignore[attr-defined]
    return scorer  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("scorer", "options", "expected"),
    [
        (("cuda", "varlen"), {}, True),
        (("cuda", "varlen"), {"deterministic": True}, False),
        (("cuda", "varlen"), {"router_aux_loss_coef": 0.1}, False),
        (("cuda", "varlen"), {"router_z_loss_coef": 0.1}, False),
        (("cuda", "varlen", "gemma2"), {}, False),  # soft-capped
        (("cuda", "varlen", "latent attention"), {}, True),  # keys wider than values are padded
        (("cuda", "loop"), {"attention": "loop"}, False),
        (("cuda", "varlen"), {"compile": "off"}, False),
        (("cpu", "flash-cpu"), {}, False),
        (("cpu", "flash-cpu"), {"compile": "on"}, True),
    ],
    ids=str,
)
def test_auto_is_on_for_cuda_unless_something_speaks_against_it(
    scorer: tuple[str, ...], options: dict[str, Any], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DpoConfig(model="m", data=["d"], output="o", **options)
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    assert compiles(config, scorer_on(*scorer)) == expected
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    assert compiles(config, scorer_on(*scorer)) == (options.get("compile") == "on")


PPO: dict[str, Any] = {"prompts": "p", "reward": "length"}


@pytest.mark.parametrize("which", ["aux", "z"])
@pytest.mark.parametrize(("kind", "more"), [(DpoConfig, {"data": ["d"]}), (PpoConfig, PPO)], ids=["dpo", "ppo"])
def test_routers_are_not_read_inside_of_compiled_layers(kind: Any, more: dict[str, Any], which: str) -> None:
    """The options alone tell, before anything is read: there is no model."""
    asked: dict[str, Any] = {"model": "m", "output": "o", **more, f"router_{which}_loss_coef": 0.1}
    with pytest.raises(ConfigError, match=f"--compile on cannot read routers for --router-{which}-loss-coef"):
        kind(**asked, compile="on")
    assert kind(**asked).compile == "auto"


def hybrid(folder: Path, name: str) -> str:
    """A folder with a hybrid of :data:`model.architectures.HYBRIDS`."""
    build(name, torch.float32, vocab_size=len(small_tokenizer())).save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return str(folder)


def test_nothing_is_compiled_where_all_layers_are_recurrent(tmp_path: Path) -> None:
    model, data = hybrid(tmp_path / "m", "mamba"), write_rows(tmp_path / "data.jsonl", pairs(4))
    with pytest.raises(ConfigError, match=r"--compile on does nothing here: all layers are recurrent \(MambaMixer\)"):
        dpo(model=model, data=data, output=tmp_path / "out", compile="on")


def test_a_hybrid_trains_with_shared_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = hybrid(tmp_path / "m", "qwen3.5"), write_rows(tmp_path / "data.jsonl", pairs(8))
    dpo(model=model, data=data, output=tmp_path / "out", max_steps=3, gradient_checkpointing=True, progress="plain")
    assert "scoring: shared (flash-cpu, float32, cpu)" in capsys.readouterr().out
    losses = [line["loss"] for line in metrics(tmp_path / "out") if "loss" in line]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses[-1] < losses[0]
