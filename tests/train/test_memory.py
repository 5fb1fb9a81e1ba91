"""Memory of a training: budgets that fit, checkpointing where it is needed, 8-bit moments, and what is on the host."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from model.test_memory import WIDE, groups_of, scorer_of
from prefopt.config.dpo import DpoConfig
from prefopt.config.ppo import PpoConfig
from prefopt.errors import ConfigError
from prefopt.model.architectures import checkpoints_activations
from prefopt.train import budget, memory
from prefopt.train.checkpoint import optimizer_tensors, restore_optimizer
from prefopt.train.memory import Trainee, TrainingMemory
from prefopt.train.optim import adamw, adamw_8bit
from prefopt.train.policy import Policy
from train.small import dpo, pairs, same_bits, write_model
from train.test_resume import stopped_at

GIVEN: dict[str, Any] = {"model": "m", "data": "d", "output": "o"}
GROUPS = groups_of(40, 30, 20)
CPU = torch.device("cpu")
ROWS = pairs(9)
SHORT: dict[str, Any] = {"max_steps": 4, "batch_size": 3, "max_length": 128}


@pytest.fixture
def model(tmp_path: Path) -> str:
    return write_model(tmp_path / "m")


def of(dtype: torch.dtype = torch.float32, *, lora: bool = False, **options: Any) -> TrainingMemory:
    scorer, weights = scorer_of(WIDE, dtype, lora=lora)
    return TrainingMemory([Trainee(scorer, weights)], DpoConfig(**GIVEN, **options), CPU)


def free(patch: pytest.MonkeyPatch, found: TrainingMemory, room: int) -> None:
    """Let there be ``room`` for activations."""
    patch.setattr(memory, "free_memory", lambda device: int((room + found.to_come) / memory.SHARE["cpu"]) + 1)


def test_parts_are_the_bytes_of_what_there_is() -> None:
    scorer, _ = scorer_of(WIDE, torch.float32)
    count = sum(p.numel() for p in scorer.parameters())
    assert of().parts() == {"weights": 4 * count, "gradients": 4 * count, "optimiser state": 8 * count}
    narrow = of(torch.bfloat16).parts()
    assert narrow == {
        "weights": 2 * count,
        "float32 masters": 4 * count,
        "gradients": 4 * count,
        "optimiser state": 8 * count,
    }
    adapter = of(torch.bfloat16, lora=True)
    trained = sum(m.numel() for m in adapter.trainees[0].weights.masters.values())
    assert adapter.to_come == 12 * trained and 0 < trained < count / 4


def test_state_is_what_the_optimiser_holds() -> None:
    pytest.importorskip("bitsandbytes")
    for name, make in (("adamw", adamw), ("adamw-8bit", adamw_8bit)):
        _, weights = scorer_of(WIDE, torch.float32)
        more = {} if name == "adamw" else {"paged": False}
        optimizer = make(weights.masters, betas=(0.9, 0.99), epsilon=1e-8, weight_decay=0.0, **more)  # type: ignore
        for master in weights.masters.values():
            master.grad = torch.ones_like(master)
        optimizer.step()
        held = sum(t.numel() * t.element_size() for n, t in optimizer_tensors(optimizer).items() if "step" not in n)
        assert held == sum(memory.optimizer_bytes(m, name) for m in weights.masters.values())


def test_the_budget_is_the_largest_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    found = of()

    def peak(tokens: int) -> int:
        return found._largest(GROUPS, tokens).peak

    room = peak(15 * 70) + 1
    free(monkeypatch, found, room)
    tokens, fits = found.token_budget(GROUPS)
    assert fits and peak(tokens) <= room < peak(tokens + 3 * 70)
    free(monkeypatch, found, peak(70) - 1000)
    assert found.token_budget(GROUPS) == (70, False), "the largest group, for the trial to refuse"
    free(monkeypatch, found, 1 << 40)
    assert found.token_budget(GROUPS) == (budget.CEILING["cpu"], True)


def test_plenty_of_memory_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    found = of()
    monkeypatch.setattr(Trainee, "count", lambda *given: pytest.fail("a small run pays nothing"))
    free(monkeypatch, found, 1 << 40)
    assert found.plan(GROUPS, tokens=None, checkpointed=None) == budget.CEILING["cpu"]
    assert not found.trainees[0].checkpointed and "tokens below" in found.line(GROUPS, 2048)


def test_models_that_cannot_be_counted_are_estimated(caplog: pytest.LogCaptureFixture) -> None:
    found = of()
    found.trainees[0].scorer.model.config.num_hidden_layers = 77  # in no list
    assert found.of(GROUPS).peak == found.rough(40 * 70) > 0
    assert "estimated and not counted" in caplog.text


@pytest.mark.slow
def test_activations_are_checkpointed_where_few_tokens_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = of()
    tight = plain._largest(GROUPS, 140).peak
    free(monkeypatch, plain, 2 * plain._largest(GROUPS, 2048).peak)
    assert plain.plan(GROUPS, tokens=None, checkpointed=None) == 2048 and not plain.trainees[0].checkpointed
    free(monkeypatch, plain, tight)
    tokens = plain.plan(GROUPS, tokens=None, checkpointed=None)
    assert plain.trainees[0].checkpointed and tokens > 3 * 140
    for options, known, expected in (({"gradient_checkpointing": False}, None, False), ({}, False, False)):
        other = of(**options)
        assert other.plan(GROUPS, tokens=None, checkpointed=known) <= 140
        assert other.trainees[0].checkpointed is expected
    asked = of()
    assert asked.plan(GROUPS, tokens=700, checkpointed=None) == 700 and asked.trainees[0].checkpointed


def test_a_run_that_checkpoints_by_itself_ends_with_the_same_bits(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dpo(model, ROWS, tmp_path / "plain", **SHORT, gradient_checkpointing=False)
    monkeypatch.setattr(memory, "SMALL", 0.0)
    monkeypatch.setattr(memory, "free_memory", lambda device: 1_800_000)
    stopped_at(2, model, ROWS, tmp_path / "tight", **SHORT, progress="plain")
    assert json.loads((tmp_path / "tight/run.json").read_text())["checkpointed"] is True
    assert "with checkpointed activations" in capsys.readouterr().out
    monkeypatch.setattr(memory, "free_memory", lambda device: 1 << 40)  # found once, kept
    dpo(model, ROWS, tmp_path / "tight", **SHORT, progress="plain", resume=True)
    assert "with checkpointed activations" in capsys.readouterr().out
    assert same_bits(tmp_path / "tight", tmp_path / "plain")


def test_a_dry_run_tells_what_each_part_takes(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import prefopt

    assert prefopt.dpo(model, ROWS, output=tmp_path / "o", device="cpu", dry_run=True, progress="plain") is None
    out = capsys.readouterr().out
    (line,) = (line for line in out.splitlines() if line.startswith("memory on cpu, "))
    for part in ("weights", "gradients", "optimiser state", "activations kept for backward"):
        assert f" {part} " in line
    assert line.endswith(" in all")


@pytest.mark.parametrize("offload", [["optimizer"], ["activations"], ["optimizer", "activations"]], ids=str)
@pytest.mark.parametrize("how", [{}, {"lora": True, "dtype": "bfloat16"}], ids=["full", "lora"])
def test_runs_with_parts_on_the_host_end_with_the_same_bits(
    offload: list[str], how: dict[str, Any], model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moves = {"ref_model_sync_steps": 2, "loss": "dpo"} if not how else {}
    dpo(model, ROWS, tmp_path / "plain", **SHORT, **how, **moves)
    monkeypatch.setattr(budget, "prepare_machine", lambda *given: None)  # which refuses it where no GPU is
    monkeypatch.setattr("prefopt.model.offload.SMALLEST", 64)
    options = SHORT | how | moves | {"offload": offload}
    stopped_at(2, model, ROWS, tmp_path / "host", **options)
    dpo(model, ROWS, tmp_path / "host", resume=True, **options)
    assert same_bits(tmp_path / "host", tmp_path / "plain")
    record = json.loads((tmp_path / "host/run.json").read_text())
    assert record["options"]["offload"] == offload


def test_ppo_on_the_host_ends_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from methods import small_world as world
    from methods.test_ppo import ppo
    from methods.test_ppo import same_bits as same

    start = world.write_world(tmp_path / "m")
    ppo(start, tmp_path / "plain", critic="actor", max_steps=2)
    monkeypatch.setattr(budget, "prepare_machine", lambda *given: None)
    ppo(start, tmp_path / "host", critic="actor", max_steps=2, offload=["optimizer", "activations"])
    assert same(tmp_path / "host", tmp_path / "plain")


def test_moments_in_8_bits_lead_nearly_to_the_same_weights() -> None:
    """100 steps on a linear regression: the distance to AdamW's weights is within 6 % of the way, as is the loss."""
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    truth, x = torch.randn(64, 128), torch.randn(256, 128)
    ends = []
    for make in (adamw, adamw_8bit):
        weight = torch.nn.Parameter(torch.zeros(64, 128))
        more = {} if make is adamw else {"paged": False}
        optimizer = make({"weight": weight}, betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0.01, **more)  # type: ignore
        for step in range(100):
            for group in optimizer.param_groups:
                group["lr"] = 2e-2 * (1 - step / 100)
            optimizer.zero_grad()
            ((x @ (weight - truth).T) ** 2).mean().backward()
            optimizer.step()
        ends.append(weight.detach())
    plain, eight = ends
    assert 0 < float((eight - plain).norm()) < 0.06 * float(plain.norm())
    losses = [float(((x @ (end - truth).T) ** 2).mean()) for end in ends]
    assert losses[1] == pytest.approx(losses[0], abs=0.06 * float(((x @ truth.T) ** 2).mean()))


def test_8_bit_moments_are_restored_to_the_bit() -> None:
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    start, gradients = torch.randn(80, 64), torch.randn(6, 80, 64)

    def stepped(weight: torch.Tensor, kept: Any, some: torch.Tensor) -> tuple[torch.nn.Parameter, Any]:
        masters = {"large": torch.nn.Parameter(weight.clone()), "small": torch.nn.Parameter(weight[0].clone())}
        optimizer = adamw_8bit(masters, betas=(0.9, 0.99), epsilon=1e-8, weight_decay=0.1, paged=False)
        restore_optimizer(optimizer, kept)
        for gradient in some:
            masters["large"].grad, masters["small"].grad = gradient.clone(), gradient[0].clone()
            optimizer.step()
        return masters["large"], {n: t.clone() for n, t in optimizer_tensors(optimizer).items()}

    whole, state = stepped(start, {}, gradients)
    half, kept = stepped(start, {}, gradients[:3])
    assert "0.state1" in kept and kept["0.state1"].dtype == torch.uint8 and int(kept["0.step"]) == 3
    end, found = stepped(half.detach(), kept, gradients[3:])
    assert torch.equal(end, whole) and found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in ("0.state1", "0.state2", "0.absmax1", "0.step"))


def test_a_stopped_8_bit_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    start = write_model(tmp_path / "wide", hidden_size=64, intermediate_size=96)
    options = SHORT | {"optimizer": "adamw-8bit", "dtype": "float32"}
    dpo(start, ROWS, tmp_path / "whole", **options)
    stopped_at(2, start, ROWS, tmp_path / "parts", **options)
    dpo(start, ROWS, tmp_path / "parts", resume=True, **options)
    assert same_bits(tmp_path / "parts", tmp_path / "whole")
    dpo(start, ROWS, tmp_path / "plain", **{**options, "optimizer": "adamw"})
    assert not same_bits(tmp_path / "plain", tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"offload": ["weights"]}, "--offload weights: it must be optimizer or activations"),
        ({"offload": ["activations"], "shard": "full"}, "--offload is for one GPU"),
        ({"optimizer": "adamw-8bit", "shard": "full"}, "--optimizer adamw-8bit does not work with --shard full"),
        ({"optimizer": "adamw-8bit", "offload": ["optimizer"]}, "does not work with --offload optimizer"),
        ({"optimizer": "adamw-8bit", "dtype": "float64"}, "does not work with --dtype float64"),
        ({"gradient_checkpointing": "sometimes"}, "it must be auto or true or false"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        DpoConfig(**GIVEN, **options)


def test_several_processes_keep_no_state_on_the_host(model: str) -> None:
    policy = Policy(DpoConfig(**{**GIVEN, "model": model}, offload=["optimizer"]), model, torch.float32, CPU, None)
    with pytest.raises(ConfigError, match="--offload optimizer is for one process"):
        policy.make_trainable(SimpleNamespace(alone=False))  # type: ignore[arg-type]
    policy.release()


def test_checkpointing_of_earlier_files_still_means_the_same() -> None:
    assert [
        DpoConfig.from_dict({**GIVEN, "gradient_checkpointing": x}).gradient_checkpointing for x in (True, False)
    ] == [
        True,
        False,
    ]
    assert DpoConfig(**GIVEN).gradient_checkpointing == "auto"
    prompts = {"model": "m", "prompts": ["p"], "output": "o", "reward": "length"}
    assert PpoConfig(**prompts, gradient_checkpointing=True).gradient_checkpointing is True


def test_8_bits_need_their_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "prefopt\[quantise\]"'):
        budget.refuse_8bit("adamw-8bit", CPU, torch.float32)


def test_checkpointing_is_read_off_the_model() -> None:
    scorer, _ = scorer_of(WIDE, torch.float32, checkpointed=True)
    assert checkpoints_activations(scorer.model)
    assert not checkpoints_activations(scorer_of(WIDE, torch.float32)[0].model)
