"""Golden values of every loss that TRL has too, made by TRL's own trainers.

    python -m venv trl-env && trl-env/bin/pip install trl==1.16.0
    trl-env/bin/python tests/golden/make_losses_golden.py     # writes losses.json beside this file

TRL is no dependency of prefopt: the tests read only the JSON. Its layout:

    made_with           versions of trl, transformers and torch
    pairs               what every case on pairs is about: per side (chosen, rejected) a list of responses, each a
                        list of log-probabilities, one per trained token: policy_*, reference_*; and sum_sq_*, the
                        log of the sum of squared probabilities at each token, which WPO's weights need
    labels              for the losses on labels: logp, reference, mismatched, mismatched_reference (sums), label
    cases[]
        trl             trainer and the attributes that its constructor sets from its options
        loss, options   the same for prefopt: what --loss and --loss-option say (and weighting, where there is one)
        dtype           in which TRL computed; float32 where some of it is in that, whatever it is given
        pairs           how many of the pairs (from the first) the case is about
        value           the loss of the batch
        grad            per side [pairs][tokens] gradient in the log-probability of each token; for labels [N]

The model in front of each loss answers with given log-probabilities; masks, shift, sums, reference, weights and means
are TRL's. What of the reference is needed comes from TRL's own pass over it.
"""

from __future__ import annotations

import itertools
import json
import math
import tempfile
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
import trl
from accelerate import Accelerator
from make_dpo_golden import LLAMA, build, make_trainer
from trl import KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer import utils as trl_utils

SIDES = ("chosen", "rejected")
LENGTHS = {"chosen": [3, 12, 1, 7, 12, 20], "rejected": [9, 12, 2, 1, 30, 16]}
SUMS = {
    "policy_chosen": [-8.25, -31.5, -0.75, -20.125, -40.0, -61.0],
    "policy_rejected": [-21.5, -30.0, -3.5, -2.0, -90.25, -55.5],
    "reference_chosen": [-8.0, -33.0, -0.75, -18.0, -52.0, -49.0],
    "reference_rejected": [-20.75, -34.25, -3.5, -2.5, -78.0, -68.5],
}


def tokens(total: float, length: int, shift: int) -> list[float]:
    """``length`` log-probabilities that differ from one another and sum to ``total``."""
    parts = [1.0 + ((5 * t + shift) % 7) / 4 for t in range(length)]
    return [total * p / sum(parts) for p in parts]


def make_pairs() -> dict[str, list[list[float]]]:
    pairs = {
        name: [
            tokens(total, length, 3 * i)
            for i, (total, length) in enumerate(zip(totals, LENGTHS[name.split("_")[1]], strict=True))
        ]
        for name, totals in SUMS.items()
    }
    for side in SIDES:
        pairs[f"sum_sq_{side}"] = [[0.4 * x - 0.1 for x in row] for row in pairs[f"policy_{side}"]]
    return pairs


LABELS = {
    "logp": [-8.25, -31.5, -0.75, -20.125, -40.0, -61.0, -12.0],
    "reference": [-8.0, -33.0, -0.75, -18.0, -52.0, -49.0, -14.5],
    "mismatched": [-50.0, -41.5, -30.75, -60.125, -44.0, -66.0, -52.0],
    "mismatched_reference": [-53.0, -40.0, -33.75, -58.0, -49.0, -67.0, -55.5],
    "label": [True, False, False, True, True, False, True],
}


def padded(rows: list[list[float]], width: int, dtype: torch.dtype) -> torch.Tensor:
    """[rows, 1 + width]: two prompt positions stand before the responses, of which the shift takes one."""
    return torch.tensor([[0.0, *row, *[0.0] * (width - len(row))] for row in rows], dtype=dtype)


def answer(log_probs: torch.Tensor, sum_sq: torch.Tensor) -> Any:
    """A model that answers with these log-probabilities."""
    nothing = torch.zeros_like(log_probs)
    return lambda **_: trl_utils.FusedCausalLMOutput(
        log_probs=log_probs, entropy=nothing, log_sum_sq_probs=sum_sq, mean_logits=nothing, is_top1=nothing.bool()
    )


def unpadded(gradient: torch.Tensor, rows: list[list[float]]) -> list[list[float]]:
    return [g[: len(row)].tolist() for g, row in zip(gradient[:, 1:], rows, strict=True)]


def dpo_case(trainer: Any, pairs: dict[str, Any], dtype: torch.dtype, changes: dict[str, Any]) -> dict[str, Any]:
    """The loss of ``DPOTrainer`` and its gradient, with attributes changed."""
    attributes = {**DPO_DEFAULTS, **changes}
    tau = attributes.pop("discopop_tau")
    for name, value in attributes.items():
        assert hasattr(trainer, name), name
        setattr(trainer, name, value)
    trainer.args.discopop_tau = tau
    rows = {kind: pairs[f"{kind}_chosen"] + pairs[f"{kind}_rejected"] for kind in ("policy", "reference", "sum_sq")}
    width = max(map(len, rows["policy"]))
    mask = torch.tensor([[0, 0, *[1] * len(r), *[0] * (width - len(r))] for r in rows["policy"]])
    batch = {"input_ids": mask.clone(), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    sum_sq = padded(rows["sum_sq"], width, dtype)
    sums = trainer.compute_ref_log_probs(answer(padded(rows["reference"], width, dtype), sum_sq), batch)
    batch |= {f"ref_{side}_logps": s for side, s in zip(SIDES, sums, strict=True)}
    leaf = padded(rows["policy"], width, dtype).requires_grad_()
    trainer.precompute_ref_logps = True  # take the reference from the batch, as after a precompute
    trainer.model.train()
    loss = trainer.compute_loss(answer(leaf * mask[:, 1:], sum_sq), batch)
    trainer._metrics["train"].clear()
    (gradient,) = torch.autograd.grad(loss, leaf)
    halves = dict(zip(SIDES, gradient.chunk(2), strict=True))
    return {
        "trl": {"trainer": "DPOTrainer", **changes},
        "value": loss.item(),
        "grad": {side: unpadded(halves[side], pairs[f"policy_{side}"]) for side in SIDES},
    }


DPO_DEFAULTS: dict[str, Any] = {
    "beta": 0.1,
    "label_smoothing": 0.0,
    "loss_types": ["sigmoid"],
    "loss_weights": [1.0],
    "ld_alpha": None,
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 0.5,
    "use_weighting": False,
    "discopop_tau": 0.05,
}


def dpo_plan() -> list[tuple[dict[str, Any], str, list[str], str | None]]:
    """TRL's attributes, and prefopt's loss, options and weighting for the same."""
    e = {"label_smoothing": 0.2}
    said = ["label_smoothing=0.2"]
    same: dict[str, tuple[str, dict[str, Any], list[str]]] = {
        "sigmoid": ("dpo", {}, []),
        "hinge": ("hinge", {}, []),
        "ipo": ("ipo", {}, ["average=true"]),
        "exo_pair": ("exo", e, said),
        "nca_pair": ("nca", {}, []),
        "robust": ("robust", e, said),
        "bco_pair": ("bco", {}, ["shift=false"]),
        "sppo_hard": ("sppo_hard", {}, []),
        "aot": ("aot", e, said),
        "aot_unpaired": ("aot_unpaired", e, said),
        "apo_zero": ("apo_zero", {}, []),
        "apo_down": ("apo_down", {}, []),
        "discopop": ("discopop", {}, []),
        "sft": ("nll", {}, ["average=tokens"]),
        "sigmoid_norm": ("sigmoid_norm", {}, []),
    }
    plan: list[tuple[dict[str, Any], str, list[str], str | None]] = []
    for (theirs, (ours, more, options)), beta in itertools.product(same.items(), (0.1, 0.5)):
        shared = [] if theirs == "sft" else [f"beta={beta}"]
        plan.append(({"loss_types": [theirs], "beta": beta, **more}, ours, shared + options, None))
    divergences = {"forward_kl": "forward_kl", "js_divergence": "js", "alpha_divergence": "alpha"}
    on_difference = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop")
    for (theirs_div, ours_div), theirs in itertools.product(divergences.items(), on_difference):
        ours, more, options = same[theirs]
        # TRL's exponential of DiscoPOP overflows to NaN at the margins that exp(-s) makes under a larger beta.
        beta = 0.001 if theirs == "discopop" else 0.5
        options = [f"beta={beta}", f"divergence={ours_div}", *options]
        if ours_div == "alpha":  # TRL's coefficient is 1 - alpha
            more, options = {**more, "f_alpha_divergence_coef": 0.3}, [*options, "divergence_alpha=0.7"]
        plan.append(
            ({"loss_types": [theirs], "beta": beta, "f_divergence_type": theirs_div, **more}, ours, options, None)
        )
    for alpha in (0.0, 0.4, 1.0):
        plan.append(({"ld_alpha": alpha, "beta": 0.3}, "ld_dpo", ["beta=0.3", f"alpha={alpha}"], None))
    for theirs in ("sigmoid", "ipo", "nca_pair"):
        ours, _, options = same[theirs]
        plan.append(({"loss_types": [theirs], "use_weighting": True}, ours, ["beta=0.1", *options], "wpo"))
    sums: dict[str, Any] = {"loss_types": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
    sum_options = ["beta=0.1", "bco.shift=false", "average=tokens"]
    plan.append((sums, "dpo:0.8,bco:0.2,nll:1", sum_options, None))
    return plan


def logits_model(log_probs: torch.Tensor) -> Any:
    """A model over two tokens that gives the second the probabilities asked for; position t answers for token t + 1."""
    last = torch.full_like(log_probs[:, :1], math.log(0.5))
    chance = torch.cat([log_probs, last], 1)
    logits = torch.stack([torch.log(-torch.expm1(chance)), chance], -1)
    return lambda *_, **__: SimpleNamespace(logits=logits)


def bare(trainer: Any, **attributes: Any) -> Any:
    """A trainer without its constructor, which would want a data set and a model for nothing that matters here."""
    made = object.__new__(trainer)
    shared = {
        "accelerator": Accelerator(cpu=True),
        "is_encoder_decoder": False,
        "aux_loss_enabled": False,
        "pad_token_id": 0,
        "padding_value": 0,
        "_metrics": defaultdict(lambda: defaultdict(list)),
    }
    for name, value in (shared | attributes).items():
        setattr(made, name, value)
    return made


def reference_free_case(trainer: Any, pairs: dict[str, Any], count: int, changes: dict[str, Any]) -> dict[str, Any]:
    """The loss of ``CPOTrainer`` or ``ORPOTrainer`` on the first pairs, each with a prompt of one token."""
    made = bare(trainer, **changes)
    rows = {side: pairs[f"policy_{side}"][:count] for side in SIDES}
    width = max(len(r) for side in SIDES for r in rows[side])
    batch = {}
    for side in SIDES:
        ids = torch.tensor([[1, *[1] * len(r), *[0] * (width - len(r))] for r in rows[side]])
        labels = ids.masked_fill(ids == 0, -100)
        labels[:, 0] = -100
        batch |= {f"{side}_input_ids": ids, f"{side}_attention_mask": ids.clone(), f"{side}_labels": labels}
    every = rows["chosen"] + rows["rejected"]
    # Padding must be a probability too; no loss sees it.
    filled = [[*r, *[math.log(0.5)] * (width - len(r))] for r in every]
    leaf = torch.tensor(filled, dtype=torch.float64, requires_grad=True)
    loss, _ = made.get_batch_loss_metrics(logits_model(leaf), batch)
    (gradient,) = torch.autograd.grad(loss, leaf)
    halves = dict(zip(SIDES, gradient.chunk(2), strict=True))
    return {
        "trl": {"trainer": trainer.__name__, **changes},
        "pairs": count,
        "value": loss.item(),
        "grad": {side: [g[: len(r)].tolist() for g, r in zip(halves[side], rows[side], strict=True)] for side in SIDES},
    }


CPO = {"beta": 0.1, "label_smoothing": 0.0, "loss_type": "sigmoid", "cpo_alpha": 1.0, "alpha": 0.0, "simpo_gamma": 0.5}
REFERENCE_FREE: list[tuple[Any, dict[str, Any], str, list[str]]] = [
    (CPOTrainer, CPO, "cpo:1,nll:1", ["cpo.beta=0.1", "cpo.nll_weight=0", "nll.average=tokens"]),
    (
        CPOTrainer,
        CPO | {"label_smoothing": 0.2, "cpo_alpha": 0.5},
        "cpo:1,nll:0.5",
        ["cpo.beta=0.1", "cpo.nll_weight=0", "cpo.label_smoothing=0.2", "nll.average=tokens"],
    ),
    (
        CPOTrainer,
        CPO | {"loss_type": "hinge", "beta": 1.0},
        "slic_hf:1,nll:1",
        ["slic_hf.delta=1", "slic_hf.nll_weight=0", "nll.average=tokens"],
    ),
    (
        CPOTrainer,
        CPO | {"loss_type": "simpo", "beta": 2.0, "cpo_alpha": 0.0},
        "simpo",
        ["beta=2", "gamma=0.5"],
    ),
    (
        CPOTrainer,
        CPO | {"loss_type": "simpo", "beta": 2.0, "cpo_alpha": 0.0, "label_smoothing": 0.1},
        "simpo",
        ["beta=2", "gamma=0.5", "label_smoothing=0.1"],
    ),
    (
        CPOTrainer,
        CPO | {"loss_type": "simpo", "beta": 2.5, "cpo_alpha": 0.0, "alpha": 0.25},
        "alphapo",
        ["beta=2.5", "gamma=0.5", "alpha=0.25"],
    ),
    (
        CPOTrainer,
        CPO | {"loss_type": "simpo", "beta": 2.5, "cpo_alpha": 0.0, "alpha": -0.5},
        "alphapo",
        ["beta=2.5", "gamma=0.5", "alpha=-0.5"],
    ),
]


def kto_case(changes: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The loss of ``KTOTrainer``, each response one token long."""
    made = bare(KTOTrainer, **changes, precompute_ref_logps=True, model=SimpleNamespace(training=True))
    made.calculate_KL = made.loss_type != "apo_zero_unpaired"
    made._total_train_tokens, made._tp_size = 0, 1
    values = {k: torch.tensor(v, dtype=dtype) for k, v in LABELS.items() if k != "label"}
    count = len(LABELS["label"])
    mask = torch.tensor([[0, 1]] * count)
    batch = {
        "input_ids": torch.ones_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "KL_input_ids": 2 * torch.ones_like(mask),
        "KL_attention_mask": torch.ones_like(mask),
        "KL_completion_mask": mask,
        "label": torch.tensor(LABELS["label"]),
        "ref_logps": values["reference"],
        "ref_KL_logps": values["mismatched_reference"],
    }
    leaf = values["logp"].requires_grad_()

    def model(input_ids: torch.Tensor, **_: Any) -> Any:
        column = (leaf if input_ids[0, 0] == 1 else values["mismatched"])[:, None]
        return answer(column, torch.zeros_like(column))()

    loss = made._compute_loss(model, batch, False)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return {"trl": {"trainer": "KTOTrainer", **changes}, "value": loss.item(), "grad": gradient.tolist()}


KTO = {"beta": 0.1, "loss_type": "kto", "desirable_weight": 1.0, "undesirable_weight": 1.0}
LABEL_CASES: list[tuple[dict[str, Any], str, list[str]]] = [
    (KTO, "kto", ["beta=0.1"]),
    (
        KTO | {"desirable_weight": 0.75, "undesirable_weight": 1.5, "beta": 0.3},
        "kto",
        ["beta=0.3", "desirable_weight=0.75", "undesirable_weight=1.5"],
    ),
    (KTO | {"loss_type": "apo_zero_unpaired"}, "apo_zero_unpaired", ["beta=0.1"]),
]


def main() -> None:
    torch.manual_seed(0)
    pairs = make_pairs()
    cases: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        models = [build("llama", "eager", LLAMA, shift)[0] for shift in (0.0, 0.03)]
        trainer = make_trainer(folder, *models, beta=0.1)
        for changes, loss, options, weighting in dpo_plan():
            single = changes.get("f_divergence_type") == "alpha_divergence"  # TRL has no float64 branch there
            dtype = torch.float32 if single else torch.float64
            rounded = "float32" if single or loss == "exo" else "float64"  # EXO's smoothing is a float32 tensor
            about = {"loss": loss, "options": options, "weighting": weighting, "dtype": rounded}
            cases.append({**about, "pairs": 6, **dpo_case(trainer, pairs, dtype, changes)})
        for kind, changes, loss, options in REFERENCE_FREE:
            about = {"loss": loss, "options": options, "weighting": None, "dtype": "float64"}
            cases.append({**about, **reference_free_case(kind, pairs, 6, changes)})
        # One pair: over several, TRL's likelihood is a mean over tokens, ours over pairs. It computes odds in float32.
        about = {"loss": "orpo", "options": ["beta=0.2"], "weighting": None, "dtype": "float32"}
        cases.append({**about, **reference_free_case(ORPOTrainer, pairs, 1, {"beta": 0.2})})
        for changes, loss, options in LABEL_CASES:
            about = {"loss": loss, "options": options, "weighting": None, "dtype": "float64"}
            cases.append({**about, **kto_case(changes, torch.float64)})
    golden = {
        "made_with": {m.__name__: m.__version__ for m in (trl, transformers, torch)},
        "pairs": pairs,
        "labels": LABELS,
        "cases": cases,
    }
    path = Path(__file__).with_name("losses.json")
    path.write_text(json.dumps(golden, indent=None, separators=(",", ":")) + "\n", encoding="utf-8")
    print(f"{path}: {len(cases)} cases")


if __name__ == "__main__":
    main()
