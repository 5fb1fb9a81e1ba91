"""What is written behind --loss and --loss-option, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from losses.inputs import drawn
from prefopt.errors import ConfigError
from prefopt.losses import declare
from prefopt.losses.declare import LOSSES, LossOption, LossOutput, declared
from prefopt.losses.parse import parse_losses

OWN = """
from __future__ import annotations
import torch
from prefopt.losses.declare import LossOutput, loss

NUMBER = 3

def squared(chosen_logp_P, rejected_logp_P, label_P=None, *, aim=1.0, power: float, twice=False):
    value = (chosen_logp_P - rejected_logp_P - aim).abs() ** power * (2 if twice else 1)
    return LossOutput(value, torch.ones_like(value), {})

@loss(kind="pairs", formula="0", paper="none", when="never", whole_batch=True, name="own_loss")
def whole(chosen_logp_P, *, beta=0.5):
    return LossOutput(beta * chosen_logp_P, torch.ones_like(chosen_logp_P), {})

def typo(chosen_logps_P, rejected_logp_P): ...
def anything(*args): ...
def nothing(x): ...
def listed(chosen_logp_P, *, weights=[1]): ...
def liked(logp_N, label_N): ...
def ranked(logp_N, group_N): ...
"""


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


WRONG: list[tuple[str, list[str], str]] = [
    ("dpoo", [], "there is no loss 'dpoo'; did you mean dpo?"),
    ("", [], "there is no loss ''"),
    ("dpo,", [], "there is no loss ''"),
    ("dpo:x", [], "the weight is 'x'; it must be a number above 0"),
    ("dpo:0", [], "the weight is '0'"),
    ("dpo:nan", [], "the weight is 'nan'"),
    ("dpo:-1", [], "the weight is '-1'"),
    ("dpo:1:2", [], "there is no loss 'dpo'"),
    ("dpo,nll,dpo", [], "dpo comes twice"),
    ("dpo,kto", [], "dpo is a loss on pairs and kto one on labels"),
    ("dpo", ["bta=1"], "--loss-options bta: dpo does not read bta; did you mean beta?"),
    ("nll", ["beta=1"], "nll does not read beta"),
    ("dpo,nll", ["gamma=1"], "dpo and nll do not read gamma"),
    ("dpo", ["simpo.gamma=1"], "simpo is not what --loss names; it is dpo"),
    ("dpo", ["beta"], "write NAME=VALUE or LOSS.NAME=VALUE"),
    ("dpo", ["beta="], "write NAME=VALUE"),
    ("dpo", ["beta=1", "beta=2"], "beta is given twice for dpo"),
    ("dpo", ["beta=0"], "beta is 0.0; it must be a number above 0"),
    ("dpo", ["beta=inf"], "beta is inf"),
    ("dpo", ["label_smoothing=0.5"], "of at least 0 and below 0.5"),
    ("dpo", ["divergence=jss"], "one of reverse_kl, forward_kl, js, alpha; did you mean js?"),
    ("dpo", ["divergence_alpha=0.5"], "reads divergence_alpha only with divergence=alpha"),
    ("nca", ["divergence=js"], "nca does not read divergence"),
    ("bco", ["shift=false", "decay=0.5"], "reads decay only with shift=true"),
    ("tdpo", ["version=1", "alpha=0.5"], "reads alpha only with version=2"),
    ("ipo", ["average=1"], "average is 1.0; it must be true or false"),
    ("not_there:f", [], "there is no module not_there in"),
    ("json:lods", [], "json has no lods; did you mean loads?"),
]


@pytest.mark.parametrize(("text", "options", "message"), WRONG)
def test_what_is_wrong_is_said(text: str, options: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_losses(text, options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (":NUMBER", "NUMBER is no function but of type int"),
        (":typo", "nothing is called 'chosen_logps_P' for a loss of kind pairs; did you mean chosen_logp_P?"),
        (":anything", "name every argument; *args tells nothing"),
        (":nothing", "its arguments are x; name them"),
        (":listed", "weights has [1] as default; it must be a number or a word"),
        (":squared", "needs --loss-options power=VALUE, a number"),
        ("_broken:f", "imports not_there_either, which is not installed"),
        ("_raises:f", "raised ZeroDivisionError: division by zero"),
    ],
)
def test_what_is_wrong_with_ones_own_is_said(own: str, part: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_losses(f"{own}{part}")
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "weighting", "options", "message"),
    [
        ("dpo", "wop", [], "there is no such weighting; did you mean wpo?"),
        ("aot", "wpo", [], "weighs pair by pair, and aot sorts the batch"),
        ("kto", "wpo", [], "kto is a loss on labels"),
        ("dpo", "wpo", ["wpo.clp=true"], "wpo does not read clp; did you mean clip?"),
        ("dpo", "wpo", ["wpo.clip=2"], "clip is 2.0; it must be true or false"),
        ("dpo", None, ["wpo.clip=true"], "wpo is not what --loss names"),
    ],
)
def test_what_is_wrong_with_a_weighting_is_said(
    text: str, weighting: str | None, options: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_losses(text, options, weighting=weighting)


def test_shared_options_that_no_loss_reads_are_refused_by_their_flag() -> None:
    with pytest.raises(ConfigError, match="--label-smoothing: hinge does not read label_smoothing"):
        parse_losses("hinge", label_smoothing=0.1)
    with pytest.raises(ConfigError, match="beta is given twice"):
        parse_losses("dpo", ["beta=0.1"], beta=0.1)


def test_a_name_can_be_declared_once() -> None:
    def dpo(chosen_logp_P: torch.Tensor) -> LossOutput:
        raise NotImplementedError

    with pytest.raises(ConfigError, match="declared already"):
        declare.loss(kind="pairs", formula="", paper="", when="")(dpo)


def test_declarations_that_do_not_fit_the_function_are_found() -> None:
    def f(chosen_logp_P: torch.Tensor, *, beta: float = 1.0) -> LossOutput:
        raise NotImplementedError

    with pytest.raises(AssertionError, match="does not read"):
        declared(f, "f", kind="pairs", options=(LossOption(name="gamma"),))
    with pytest.raises(AssertionError, match="state0 goes with"):
        declared(f, "f", kind="pairs", state0={"mean": 0.0})
