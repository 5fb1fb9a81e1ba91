"""Defaults of the losses' options elsewhere: in the papers that a loss is from, and in TRL 1.16.

Shown beside the defaults of prefopt, in ``prefopt losses NAME`` and in docs/methods.md. Absent: the paper names no
single value, or TRL has no such option. TRL's ``DPOTrainer`` has one beta and one label smoothing for all its losses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Published(NamedTuple):
    """A default as text, in the paper or its authors' code, and in TRL."""

    paper: str | None = None
    trl: str | None = None


_NOT_SMOOTHED = Published(trl="0")
_DPO_TRAINER = Published(trl="0.1")
_LABELS = {"desirable_weight": Published("1", "1"), "undesirable_weight": Published("1", "1")}

PUBLISHED: Mapping[str, Mapping[str, Published]] = {
    "dpo": {"beta": Published("0.1; summaries 0.5", "0.1"), "label_smoothing": Published("0", "0")},
    "ipo": {"beta": Published("0.1 to 1 in its examples", "0.1"), "average": Published("false", "true")},
    "hinge": {"beta": _DPO_TRAINER},
    "rpo": {"beta": Published("0.1", "0.1"), "nll_weight": Published("1"), "label_smoothing": _NOT_SMOOTHED},
    "robust": {"beta": Published("0.1", "0.1"), "label_smoothing": Published("the rate of flips", "0, which is dpo")},
    "sigmoid_norm": {"beta": Published("5", "0.1"), "label_smoothing": _NOT_SMOOTHED},
    "r_dpo": {"alpha": Published("about 0.01")},
    "ld_dpo": {"beta": _DPO_TRAINER, "alpha": Published(trl="1, which is dpo"), "label_smoothing": _NOT_SMOOTHED},
    "exo": {"beta": _DPO_TRAINER, "label_smoothing": Published("0.001; code 4.5e-5", "0.001")},
    "discopop": {"beta": _DPO_TRAINER, "tau": Published("0.05", "0.05")},
    "dpop": {"beta": Published("0.3"), "penalty": Published("50")},
    "tdpo": {"beta": Published("0.1"), "version": Published("both"), "alpha": Published("0.5")},
    "nca": {"beta": _DPO_TRAINER},
    "apo_zero": {"beta": _DPO_TRAINER},
    "apo_down": {"beta": _DPO_TRAINER},
    "sppo_hard": {"beta": Published("0.001 (eta 1000)", "0.1")},
    "aot": {"beta": _DPO_TRAINER, "label_smoothing": _NOT_SMOOTHED},
    "aot_unpaired": {"beta": _DPO_TRAINER, "label_smoothing": _NOT_SMOOTHED},
    "bco": {"beta": _DPO_TRAINER, "shift": Published("true", "false"), "decay": Published(trl="1")},
    "beta_dpo": {
        "beta": Published("0.1"),
        "alpha": Published("0.6"),
        "momentum": Published("0.9"),
        "keep": Published("0.8"),
        "filter": Published("drawn"),
    },
    "nll": {"average": Published("response", "tokens")},
    "unlikelihood": {"alpha": Published("0 to 1"), "average": Published("false")},
    "simpo": {
        "beta": Published("2 to 10; code 2", "0.1"),
        "gamma": Published("0.3 to 1.6 beta; code 0.25 beta", "0.5"),
        "label_smoothing": Published("0", "0"),
    },
    "alphapo": {
        "beta": Published(trl="0.1"),
        "alpha": Published("0.25", "0, which is simpo"),
        "gamma": Published(trl="0.5"),
        "label_smoothing": _NOT_SMOOTHED,
    },
    "cpo": {
        "beta": Published("0.1", "0.1"),
        "nll_weight": Published("1", "1"),
        "average": Published("false", "over the tokens of the batch"),
        "label_smoothing": Published("0", "0"),
    },
    "orpo": {"beta": Published("0.1 to 0.25", "0.1")},
    "slic_hf": {"average": Published("false")},
    "kto": {"beta": Published("0.1", "0.1"), **_LABELS},
    "apo_zero_unpaired": {"beta": Published(trl="0.1"), **_LABELS},
    "bco_unpaired": {
        "beta": Published(trl="0.1"),
        **_LABELS,
        "shift": Published("true", "true"),
        "middle": Published("labels", "responses"),
        "decay": Published(trl="1"),
    },
    "wpo": {"clip": Published("false; code true")},
}


def published(loss: str, option: str) -> Published:
    """The defaults of an option elsewhere."""
    return PUBLISHED.get(loss, {}).get(option, Published())
