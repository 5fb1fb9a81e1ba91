"""Routers of mixtures of experts, read while a packed batch is scored.

transformers adds the load-balancing loss of a mixture of experts to a model's own forward, which packed scoring does
not call. :class:`Routers` reads what the routers put out instead. Two ways of counting, each stated where it is used:

losses    a token counts once for every response that contains it, so that the sums are those of K separate rows also
          where a prompt is encoded once
shares    a token counts once, also where each response is encoded in a row of its own with its prompt
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from prefopt.data.table import IndexArray
from prefopt.errors import ConfigError
from prefopt.model.architectures import causal_model, experts_per_token
from prefopt.model.packing import ForwardPass, PackedBatch
from prefopt.transfer import on_device

_RECORDS_PROBABILITIES = {"Gemma4TextRouter", "DiffusionGemmaTextRouter"}
"""Routers whose ``router_logits`` in transformers are probabilities, of which no z loss can be computed."""


class RoutingSums(NamedTuple):
    """Sums over all tokens and layers: probability of each expert ``prob_E`` (with gradients), how often each was
    chosen ``count_E``, and ``rows``, the number of tokens; float64 where the device has it."""

    prob_E: torch.Tensor
    count_E: torch.Tensor
    rows: torch.Tensor

    def loss(self) -> torch.Tensor:
        """E sum_e f_e P_e, with f_e the average number of choices and P_e the average probability of expert e (Fedus et
        al. 2021, Switch Transformer, arXiv 2101.03961, equations 4 to 6). Gradients flow through P alone."""
        return len(self.prob_E) * (self.count_E / self.rows * (self.prob_E / self.rows)).sum()


class Routing(NamedTuple):
    """One call of a router: ``logits_TE`` (with gradients), and the experts ``chosen_TK`` that the tokens went to."""

    logits_TE: torch.Tensor
    chosen_TK: torch.Tensor


@dataclass(frozen=True, slots=True)
class Routers:
    """The L routers of a model in the order that transformers records them in, each with the index of the logits in its
    output, and their ``names``. ``chosen``: K, experts per token; ``coefficient``: of the load-balancing loss in the
    model's configuration. ``balances``: transformers computes that loss for the class."""

    modules: tuple[tuple[torch.nn.Module, int], ...]
    names: tuple[str, ...]
    chosen: int
    coefficient: float
    balances: bool

    @property
    def gives_logits(self) -> bool:
        """Whether what is recorded are logits; of some classes it is probabilities."""
        return not any(type(module).__name__ in _RECORDS_PROBABILITIES for module, _ in self.modules)

    @contextmanager
    def recording(self) -> Iterator[list[list[Routing]]]:
        """Record every call in this block, one list per router."""
        recorded: list[list[Routing]] = [[] for _ in self.modules]
        pairs = zip(self.modules, recorded, strict=True)
        hooks = [
            module.register_forward_hook(partial(_record, calls, index, self.chosen))
            for (module, index), calls in pairs
        ]
        try:
            yield recorded
        finally:
            for hook in hooks:
                hook.remove()

    def sums(
        self, calls: Sequence[Sequence[Routing]], batch: PackedBatch, tokens: TokenCounts | None = None
    ) -> RoutingSums:
        """Sums for the load-balancing loss. ``calls`` were recorded while ``batch`` was scored, as in all methods here.
        The last ones are the policy's: a reference that is the same model with other weights is scored before it."""
        use_T = (tokens or token_counts(batch)).responses_T.to(_wide(batch))
        parts = []
        for one in _of(calls, batch):
            z_TE = one.logits_TE.to(use_T.dtype)
            prob_TE = z_TE.softmax(-1)
            picked = torch.zeros_like(prob_TE).scatter(-1, prob_TE.topk(self.chosen, -1).indices, 1.0)
            parts.append(torch.stack([use_T @ prob_TE, use_T @ picked.detach()]))
        prob_E, count_E = torch.stack(parts).sum(0)
        return RoutingSums(prob_E, count_E.detach(), use_T.sum() * len(parts))

    def z_sum(
        self, calls: Sequence[Sequence[Routing]], batch: PackedBatch, tokens: TokenCounts | None = None
    ) -> torch.Tensor:
        """Sum of (log sum_e exp z_e)^2 over tokens and layers, with gradients: the numerator of the router z loss (Zoph
        et al. 2022, ST-MoE, arXiv 2202.08906, equation 5)."""
        use_T = (tokens or token_counts(batch)).responses_T.to(_wide(batch))
        logits = (one.logits_TE for one in _of(calls, batch))
        # As wide as the router's own softmax: what is kept for backward is T x E in every layer.
        z_LT = torch.stack([z.to(torch.promote_types(z.dtype, torch.float32)).logsumexp(-1) for z in logits])
        return (z_LT.to(use_T.dtype).square() @ use_T).sum()

    @torch.no_grad()
    def counts(
        self, calls: Sequence[Sequence[Routing]], batch: PackedBatch, tokens: TokenCounts | None = None
    ) -> torch.Tensor:
        """How many tokens each expert of each layer got, [L, E] int64."""
        found = list(_of(calls, batch))
        experts = found[0].logits_TE.shape[-1]
        once_T = (tokens or token_counts(batch)).once_T
        chosen_LTK = torch.stack([one.chosen_TK for one in found])
        first_L = torch.arange(len(found), device=chosen_LTK.device) * experts
        counts = chosen_LTK.new_zeros(len(found) * experts, dtype=torch.int64)
        weight = once_T[None, :, None].expand_as(chosen_LTK)
        counts.index_add_(0, (chosen_LTK + first_L[:, None, None]).flatten(), weight.flatten())
        return counts.view(len(found), experts)


def routers_of(model: torch.nn.Module) -> Routers | None:
    """The routers that transformers records for the class of ``model``; None for a model without them."""
    causal: Any = causal_model(model)
    config: Any = causal.config.get_text_config()
    coefficient = getattr(config, "router_aux_loss_coef", None) or getattr(config, "aux_loss_coef", None)  # JetMoe
    found = tuple(_router_modules(causal))
    chosen = getattr(causal, "num_experts_per_tok", None) or experts_per_token(config)
    if not found or not chosen:
        return None
    return Routers(
        tuple((module, index) for _, module, index in found),
        tuple(name for name, _, _ in found),
        int(chosen),
        float(coefficient or 0.0),
        hasattr(sys.modules[type(causal).__module__], "load_balancing_loss_func"),
    )


def balancing_routers(model: torch.nn.Module) -> Routers:
    """The routers that a model's load-balancing loss is computed on. Raises :class:`ConfigError` where it has none."""
    routers = routers_of(model)
    if routers is None or not routers.balances:
        raise ConfigError(
            "--router-aux-loss-coef: transformers computes no load-balancing loss for"
            f" {type(causal_model(model)).__name__}; leave it out"
        )
    return routers


def logit_routers(model: torch.nn.Module) -> Routers:
    """The routers that a z loss is computed on. Raises :class:`ConfigError` for a model whose class records no router
    logits."""
    routers, name = routers_of(model), type(causal_model(model)).__name__
    if routers is None:
        raise ConfigError(f"--router-z-loss-coef: transformers records no router logits for {name}; leave it out")
    if not routers.gives_logits:
        raise ConfigError(f"--router-z-loss-coef: the routers of {name} give probabilities, not logits; leave it out")
    return routers


def _wide(batch: PackedBatch) -> torch.dtype:
    return torch.float32 if batch.target.device.type == "mps" else torch.float64


def _of(calls: Sequence[Sequence[Routing]], batch: PackedBatch) -> Iterator[Routing]:
    """What each router put out for all tokens of the passes of ``batch``, end to end."""
    for recorded in calls:
        last = recorded[-len(batch.passes) :]
        yield Routing(*(torch.cat(parts) for parts in zip(*last, strict=True)))


class TokenCounts(NamedTuple):
    """Of each token of all passes, end to end, int64: the responses that contain it, and 1, or 0 where a pass before
    has encoded it already."""

    responses_T: torch.Tensor
    once_T: torch.Tensor


def token_counts(batch: PackedBatch) -> TokenCounts:
    """The counts, on the device of ``batch`` in one copy."""
    arrays = [np.concatenate([f(row) for row in batch.passes]) for f in (_responses_per_token, _counted_once)]
    return TokenCounts(*on_device(arrays, batch.target.device))


def _responses_per_token(row: ForwardPass) -> IndexArray:
    """How many responses contain each token of a row, [T]."""
    use_T = np.ones(len(row.ids), np.int64)
    for _, _, start, length in row.segments:
        use_T[start : start + length] += 1
    return use_T


def _counted_once(row: ForwardPass) -> IndexArray:
    """1 for each token of a row, [T]; 0 for those that a row before it has encoded already."""
    once_T = np.ones(len(row.ids), np.int64)
    once_T[: row.repeated] = 0
    return once_T


def _router_modules(causal: Any) -> Iterator[tuple[str, torch.nn.Module, int]]:
    """The modules that transformers records as ``router_logits``, in the order of the layers, with their names."""
    for owner in causal.modules():
        recorders = (getattr(owner, "_can_record_outputs", None) or {}).get("router_logits")
        if recorders is None:
            continue
        for recorder in recorders if isinstance(recorders, list) else [recorders]:
            kind: Any = getattr(recorder, "target_class", recorder)
            index = getattr(recorder, "index", 0)
            place = getattr(recorder, "layer_name", None) or ""
            named = owner.named_modules()
            for name, module in named:
                # PEFT keeps the router that an adapter replaces, and never calls it.
                if isinstance(module, kind) and place in name and "original_module" not in name.split("."):
                    yield name.replace(".modules_to_save.default", ""), module, index
        return


def _record(calls: list[Routing], index: int, chosen: int, module: torch.nn.Module, args: Any, output: Any) -> None:
    logits_TE = (output[index] if isinstance(output, tuple) else output).flatten(0, -2)
    with torch.no_grad():
        calls.append(Routing(logits_TE, _chosen(module, output, logits_TE, chosen)))


def _chosen(module: torch.nn.Module, output: Any, logits_TE: torch.Tensor, chosen: int) -> torch.Tensor:
    """The experts that a router sends its tokens to, [T, K]: of its output, since groups, biases and noise make others
    than the largest logits; those only where it puts out nothing else."""
    parts = output if isinstance(output, tuple) else ()
    tables = [x for x in parts if isinstance(x, torch.Tensor) and x.ndim == 2 and len(x) == len(logits_TE)]
    found = next((x for x in tables if not x.is_floating_point()), None)
    if found is None:
        return logits_TE.topk(chosen, -1).indices
    if hasattr(module, "num_router_classes"):  # Zaya writes expert 0, with weight 0, where a token skips its experts
        weight = next(x for x in tables if x.shape == found.shape and x.is_floating_point())
        return found.masked_fill(weight == 0, logits_TE.shape[-1] - 1)
    return found
