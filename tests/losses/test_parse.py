"""What is written behind --loss and --loss-option, and what is wrong with it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from losses.inputs import drawn
from prefopt.cli import main
from prefopt.config.dpo import loss_names
from prefopt.errors import ConfigError
from prefopt.losses import declare
from prefopt.losses.common import LossOutput, loss_option
from prefopt.losses.declare import LOSSES, declared
from prefopt.losses.parse import parse_losses
from prefopt.rewards import load_reward

OWN = '''
from __future__ import annotations
import torch
from prefopt.losses.common import LossOutput, loss_option
from prefopt.losses.declare import loss

NUMBER = 3

def squared(chosen_logp_P, rejected_logp_P, label_P=None, *, aim=1.0, power: float, twice=False):
    """One's own.

    A quadratic loss.
    """
    value = (chosen_logp_P - rejected_logp_P - aim).abs() ** power * (2 if twice else 1)
    return LossOutput(value, torch.ones_like(value), {})

@loss(formula="0", paper="none", when="never", whole_batch=True, name="own_loss")
def whole(chosen_logp_P, *, beta=0.5):
    return LossOutput(beta * chosen_logp_P, torch.ones_like(chosen_logp_P), {})

def margins(margin_P):
    return torch.relu(1 - margin_P)

def words(prompts, responses):
    return [len(text.split()) for text in responses]

def old(chosen_logp_G, rejected_logp_G): ...
def typo(chosen_logps_P, rejected_logp_P): ...
def anything(*args): ...
def nothing(x): ...
def listed(chosen_logp_P, *, weights=[1]): ...
def liked(logp_N, label_N): ...
def ranked(logp_N, group_N): ...
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module of the user's in the current folder."""
    name = f"own_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(OWN, "utf-8")
    (tmp_path / f"{name}_broken.py").write_text("import not_there_either", "utf-8")
    (tmp_path / f"{name}_raises.py").write_text("1 / 0", "utf-8")
    monkeypatch.chdir(tmp_path)
    yield name
    LOSSES.pop("own_loss", None)


def test_names_weights_and_options() -> None:
    first, second = parse_losses(
        " sigmoid-norm : 2 , nll:0.2", ["sigmoid_norm.beta=7", "average=tokens"], beta=0.3, label_smoothing=0.1
    )
    assert (first.loss.name, first.weight, second.loss.name, second.weight) == ("sigmoid_norm", 2.0, "nll", 0.2)
    assert first.values["beta"] == 7.0 and first.values["label_smoothing"] == 0.1
    assert second.values == {"average": "tokens"}
    assert parse_losses("ipo", ["average=false"])[0].values["average"] is False
    assert parse_losses("dpo")[0].values == LOSSES["dpo"].defaults


def test_one_option_reaches_every_loss_that_reads_it() -> None:
    terms = parse_losses("dpo,simpo,nll", ["beta=3", "label-smoothing=0.25"])
    assert [t.values.get("beta") for t in terms] == [3.0, 3.0, None]
    assert [t.values.get("label_smoothing") for t in terms] == [0.25, 0.25, None]


def test_ones_own_function(own: str) -> None:
    (term,) = parse_losses(f"{own}:squared:2", ["squared.power=2", "twice=true"])
    assert term.loss.name == f"{own}:squared" and term.weight == 2 and term.loss.kind == "pairs"
    assert term.loss.inputs == ("chosen_logp_P", "rejected_logp_P") and term.loss.optional_inputs == ("label_P",)
    assert not term.loss.needs_reference and term.values == {"aim": 1.0, "power": 2.0, "twice": True}
    tensors = drawn(0)
    expected = 2 * (tensors["chosen_logp_P"] - tensors["rejected_logp_P"] - 1) ** 2
    torch.testing.assert_close(term(tensors).numerator_R, expected)
    assert [parse_losses(f"{own}:{f}")[0].loss.kind for f in ("liked", "ranked")] == ["labels", "ranking"]


def test_ones_own_function_may_be_declared(own: str) -> None:
    (term,) = parse_losses(f"{own}:whole", beta=0.2)
    assert term.loss.whole_batch and term.loss.name == "own_loss" and term.values == {"beta": 0.2}
    assert parse_losses("own_loss")[0].loss is term.loss, "its name is known from here on"


def test_weighting_and_its_options() -> None:
    (term,) = parse_losses("dpo", ["wpo.clip=true"], weighting="wpo")
    assert term.inputs == (*LOSSES["dpo"].inputs, "chosen_wpo_P", "rejected_wpo_P")
    tensors = drawn(1)
    tensors["chosen_wpo_P"], tensors["rejected_wpo_P"] = torch.full((6,), 1.0), torch.full((6,), -3.0)
    torch.testing.assert_close(term(tensors).numerator_R, LOSSES["dpo"](tensors).numerator_R * torch.tensor(-2.0).exp())


WRONG: list[tuple[str, list[str], list[str]]] = [  # --loss, --loss-options, facts of the message
    ("dpoo", [], ["'dpoo'", "did you mean dpo?"]),
    ("", [], ["no loss ''"]),
    ("dpo,", [], ["no loss ''"]),
    ("dpo:x", [], ["--loss dpo:x", "'x'", "number above 0"]),
    *((f"dpo:{weight}", [], [f"'{weight}'", "number above 0"]) for weight in ("0", "nan", "-1")),
    ("dpo:1:2", [], ["--loss dpo:1:2"]),
    ("dpo,nll,dpo", [], ["dpo comes twice"]),
    ("dpo,kto", [], ["dpo is a loss on pairs", "kto one on labels"]),
    ("dpo", ["bta=1"], ["--loss-options bta", "dpo", "did you mean beta?"]),
    ("nll", ["beta=1"], ["nll does not read beta"]),
    ("dpo,nll", ["gamma=1"], ["dpo and nll", "gamma"]),
    ("dpo", ["simpo.gamma=1"], ["simpo.gamma", "it is dpo"]),
    ("dpo", ["beta"], ["NAME=VALUE", "LOSS.NAME=VALUE"]),
    ("dpo", ["beta="], ["NAME=VALUE"]),
    ("dpo", ["beta=1", "beta=2"], ["beta", "twice"]),
    ("dpo", ["beta=0"], ["beta is 0", "a number above 0"]),
    ("dpo", ["beta=inf"], ["beta is 'inf'", "a number above 0"]),
    ("dpo", ["label_smoothing=0.5"], ["of at least 0 and below 0.5"]),
    ("dpo", ["divergence=jss"], ["one of reverse_kl, forward_kl, js, alpha", "did you mean js?"]),
    ("dpo", ["divergence_alpha=0.5"], ["divergence_alpha only with divergence=alpha"]),
    ("nca", ["divergence=js"], ["nca does not read divergence"]),
    ("bco", ["shift=false", "decay=0.5"], ["decay only with shift=true"]),
    ("tdpo", ["version=1", "alpha=0.5"], ["alpha only with version=2"]),
    ("ipo", ["average=1"], ["average is 1", "true or false"]),
    ("not_there:f", [], ["no module not_there"]),
    ("json:lods", [], ["json has no lods", "did you mean loads?"]),
]


def refused(facts: list[str], text: str, options: list[str] | None = None, **more: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_losses(text, options or [], **more)
    message = str(caught.value)
    assert all(fact in message for fact in facts) and "\n" not in message, (text, options, message)


def test_mistakes_are_refused_in_one_line() -> None:
    for text, options, facts in WRONG:
        refused(facts, text, options)


def test_mistakes_in_ones_own_loss_are_refused(own: str) -> None:
    for part, facts in [
        (":NUMBER", ["NUMBER", "of type int"]),
        (":typo", ["'chosen_logps_P'", "did you mean chosen_logp_P?"]),
        (":old", ["'chosen_logp_G'", "it is now called chosen_logp_P"]),
        (":anything", ["name every argument", "*args"]),
        (":nothing", ["its arguments are x"]),
        (":listed", ["weights has [1]", "a number or a word"]),
        (":squared", ["--loss-options power=VALUE", "a number"]),
        ("_broken:f", ["imports not_there_either"]),
        ("_raises:f", ["ZeroDivisionError: division by zero"]),
    ]:
        refused(facts, f"{own}{part}")


def test_mistakes_in_a_weighting_are_refused() -> None:
    for text, weighting, options, facts in [
        ("dpo", "wop", [], ["--weighting wop", "did you mean wpo?"]),
        ("aot", "wpo", [], ["aot sorts the batch"]),
        ("kto", "wpo", [], ["kto is a loss on labels"]),
        ("dpo", "wpo", ["wpo.clp=true"], ["wpo does not read clp", "did you mean clip?"]),
        ("dpo", "wpo", ["wpo.clip=2"], ["clip is 2", "true or false"]),
        ("dpo", None, ["wpo.clip=true"], ["wpo", "it is dpo"]),
    ]:
        refused(facts, text, options, weighting=weighting)


def test_flags_that_no_loss_reads_are_refused() -> None:
    refused(["--label-smoothing", "hinge"], "hinge", label_smoothing=0.1)
    refused(["--divergence", "nca"], "nca", divergence="js")
    refused(["beta", "twice"], "dpo", ["beta=0.1"], beta=0.1)


def test_a_name_can_be_declared_once() -> None:
    def dpo(chosen_logp_P: torch.Tensor) -> LossOutput:
        raise NotImplementedError

    with pytest.raises(ConfigError, match="declared already"):
        declare.loss()(dpo)


def test_declarations_that_do_not_fit_the_function_are_found() -> None:
    def f(chosen_logp_P: torch.Tensor, *, beta: float = 1.0) -> LossOutput:
        raise NotImplementedError

    with pytest.raises(AssertionError, match="does not read"):
        declared(f, "f", options=(loss_option("gamma"),))
    with pytest.raises(AssertionError, match="state0 goes with"):
        declared(f, "f", state0={"mean": 0.0})


def test_a_loss_of_the_margin_needs_one_line(own: str) -> None:
    """It gets the options beta and divergence, and the metrics of losses on pairs."""
    (mine,) = parse_losses(f"{own}:margins", beta=0.3)
    (hinge,) = parse_losses("hinge", beta=0.3)
    tensors = drawn(2)
    found, expected = mine(tensors), hinge(tensors)
    assert mine.inputs == hinge.inputs and mine.loss.options == hinge.loss.options
    assert torch.equal(found.numerator_R, expected.numerator_R) and found.metrics.keys() == expected.metrics.keys()
    assert torch.equal(found.metrics["rewards/margins"], expected.metrics["rewards/margins"])
    (other,) = parse_losses(f"{own}:margins", divergence="js")
    assert not torch.equal(other(tensors).numerator_R, parse_losses(f"{own}:margins")[0](tensors).numerator_R)


def test_losses_and_rewards_of_installed_packages_are_found(
    own: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    info = Path(f"{own}-1.0.dist-info")
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {own}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        f"[prefopt.losses]\nsoft_margin = {own}:margins\nbad = {own}:absent\n[prefopt.rewards]\nwords = {own}:words\n"
    )
    monkeypatch.syspath_prepend(str(Path.cwd()))
    (loss,) = parse_losses("soft_margin:2", beta=0.5)
    assert loss.loss.name == "soft_margin" and loss.weight == 2 and loss.values["beta"] == 0.5
    refused(["bad", own, "absent"], "bad")
    refused(["did you mean soft_margin?"], "soft_margn")
    assert load_reward("words")(["a"], ["b c"]) == [2.0]
    assert main(["losses"]) == 0 and "soft_margin" in capsys.readouterr().out
    for name in ("soft_margin", f"{own}:squared"):
        assert main(["losses", name]) == 0
        shown = capsys.readouterr().out
        assert shown.startswith(name) and "On: pairs" in shown
    assert "power:" in shown and "A quadratic loss" in shown and "default: required" in shown


def test_an_unknown_loss_is_refused_without_torch(tmp_path: Path) -> None:
    assert sorted(loss_names()) == sorted(LOSSES)
    words = ["dpo", "--model", "m", "--data", "d.jsonl", "--output", "o", "--loss", "dpo:1,ipoo"]
    script = f"import sys; from prefopt.cli import main; print(main({words}), 'torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert found.stdout == "2 False\n" and "'ipoo'; did you mean ipo?" in found.stderr
