"""How the tokens of a batch are spread over the experts of a mixture, as the model's own load-balancing loss counts it.

transformers adds that loss to a model's own forward, which packed scoring does not call. Here the routers' logits are
read off while a batch is scored. A token counts as often as a response uses it: a prompt that is encoded once for K
responses counts K times, so that the sums are those of the responses, each in a row of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from prefopt.errors import ConfigError
from prefopt.model.packed_model import causal_model
from prefopt.model.packing import PackedBatch, Segment


class RoutingSums(NamedTuple):
    """Over all tokens and layers: ``prob_E``, the summed probabilities of each expert (with gradients), ``count_E``,
    how often each was chosen, and ``rows``, how many tokens there were; float64 where the device has it."""

    prob_E: torch.Tensor
    count_E: torch.Tensor
    rows: torch.Tensor

    def loss(self) -> torch.Tensor:
        """E sum_e f_e P_e, with f_e the average number of choices and P_e the average probability of expert e.

        Fedus et al. 2021 (Switch Transformer, arXiv 2101.03961), equations 4 to 6, as ``load_balancing_loss_func`` of
        transformers computes it. Gradients flow through P alone.
        """
        return len(self.prob_E) * (self.count_E / self.rows * (self.prob_E / self.rows)).sum()


@dataclass(frozen=True, slots=True)
class Routers:
    """The routers of a model: modules, and where in their output the logits are. ``chosen``: experts per token;
    ``coefficient``: what the model's configuration multiplies the loss by."""

    modules: tuple[tuple[torch.nn.Module, int], ...]
    chosen: int
    coefficient: float

    @contextmanager
    def recording(self) -> Iterator[list[list[torch.Tensor]]]:
        """Inside this context the logits of every call, a list for each router."""
        found: list[list[torch.Tensor]] = [[] for _ in self.modules]
        pairs = zip(self.modules, found, strict=True)
        hooks = [module.register_forward_hook(_keeper(calls, index)) for (module, index), calls in pairs]
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()

    def sums(self, calls: Sequence[Sequence[torch.Tensor]], batch: PackedBatch) -> RoutingSums:
        """Of logits that were recorded while ``batch`` was scored. The last calls are the policy's: a reference that is
        the same model with other weights goes before."""
        device = batch.target.device
        wide = torch.float32 if device.type == "mps" else torch.float64
        use_T = torch.cat([uses(p.segments, len(p.ids)) for p in batch.passes]).to(device, wide)
        parts = []
        for logits in calls:
            z_TE = torch.cat([x.flatten(0, -2) for x in logits[-len(batch.passes) :]]).to(wide)
            prob_TE = z_TE.softmax(-1)
            picked = torch.zeros_like(prob_TE).scatter(-1, prob_TE.topk(self.chosen, -1).indices, 1.0)
            parts.append(torch.stack([use_T @ prob_TE, use_T @ picked.detach()]))
        prob_E, count_E = torch.stack(parts).sum(0)
        return RoutingSums(prob_E, count_E.detach(), use_T.sum() * len(parts))


def routers_of(model: torch.nn.Module) -> Routers:
    """The routers that a model's load-balancing loss is computed on. Raises :class:`ConfigError` where it has none."""
    causal: Any = causal_model(model)
    config: Any = causal.config.get_text_config()
    coefficient = getattr(config, "router_aux_loss_coef", None) or getattr(config, "aux_loss_coef", None)  # JetMoe
    modules = tuple(_recorded(causal))
    has_loss = hasattr(sys.modules[type(causal).__module__], "load_balancing_loss_func")
    chosen = getattr(causal, "num_experts_per_tok", None) or getattr(config, "num_experts_per_tok", None)
    if not has_loss or not modules or not chosen:
        raise ConfigError(
            f"--router-aux-loss-coef: transformers computes no load-balancing loss for {type(causal).__name__};"
            " leave it out"
        )
    return Routers(modules, int(chosen), float(coefficient or 0.0))


def uses(segments: Sequence[Segment], tokens: int) -> torch.Tensor:
    """How many responses each token of a row belongs to, [T]."""
    use_T = torch.ones(tokens)
    for _, _, start, length in segments:
        use_T[start : start + length] += 1
    return use_T


def _recorded(causal: Any) -> Iterator[tuple[torch.nn.Module, int]]:
    """What transformers itself records as ``router_logits``, in the order of the layers."""
    for owner in causal.modules():
        recorders = (getattr(owner, "_can_record_outputs", None) or {}).get("router_logits")
        if recorders is None:
            continue
        for recorder in recorders if isinstance(recorders, list) else [recorders]:
            kind: Any = getattr(recorder, "target_class", recorder)
            index = getattr(recorder, "index", 0)
            place = getattr(recorder, "layer_name", None) or ""
            named = owner.named_modules()
            yield from ((module, index) for name, module in named if isinstance(module, kind) and place in name)
        return


def _keeper(found: list[torch.Tensor], index: int) -> Any:
    def keep(module: torch.nn.Module, args: Any, output: Any) -> None:
        found.append(output[index] if isinstance(output, tuple) else output)

    return keep
