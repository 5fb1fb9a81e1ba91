"""The option of the load-balancing loss: for methods that train a language model on a file of data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prefopt.config.option import option


@dataclass(frozen=True, kw_only=True)
class BalanceOptions:
    """Part of the config of ``dpo`` and ``sft``."""

    router_aux_loss_coef: float | Literal["auto"] | None = option(
        None,
        "for a mixture of experts: add its load-balancing loss, multiplied by this; auto: by what the model's"
        " configuration says. A batch that does not fit into memory at once then takes a forward pass more",
        group="loss",
        default_text="no such loss",
        above=0,
    )
