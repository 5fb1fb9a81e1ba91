"""The token budget of a micro-batch is tried, and halved where it does not fit; speed measurements.

The budget comes from :mod:`prefopt.train.memory`. Here is a rough estimate, for scoring and for models whose memory
cannot be counted: of the activations that a transformer layer keeps for backward, in numbers per token, about 20 times
the hidden and 4 times the intermediate width. With activation checkpointing only each layer's input is kept, and the
activations of one layer.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from prefopt.config.training import RunOptions
from prefopt.core.terminal import Reporter
from prefopt.data.group import Group
from prefopt.data.table import GroupTable, IndexArray
from prefopt.errors import ConfigError, RunError, first_line
from prefopt.model.architectures import causal_model, expert_fraction, experts_per_token
from prefopt.model.costs import MEMORY_ERRORS, MemoryFailure, free_memory, halved, out_of_memory, peak_memory
from prefopt.model.flops import FlopCount, matmul_peak
from prefopt.model.kernels.head import KEEP_BYTES
from prefopt.model.packing import PackedBatch
from prefopt.model.precision import MasterWeights, slow_dtype
from prefopt.model.scorer import PackedModel
from prefopt.runs.metrics import Record
from prefopt.train.batch import Batch
from prefopt.train.step import Differentiator, same_randomness

SHARE = 0.5
"""The fraction of free memory that is given out by the rough estimate."""
CEILING = {"cpu": 2048, "cuda": 32768, "mps": 4096}
"""Beyond these numbers of tokens matrix products get no faster."""
log = logging.getLogger(__name__)


def bytes_per_token(scorer: PackedModel, *, checkpointing: bool) -> int:
    """Estimated bytes of activations per token that are kept for backward. Of a mixture's experts, those that the token
    is sent to keep their input and output each."""
    config: Any = causal_model(scorer.model).config.get_text_config()
    hidden, layers = int(config.hidden_size), int(config.num_hidden_layers)
    experts = experts_per_token(config) if expert_fraction(config) < 1 else None
    layer = 20 * hidden + 4 * active_width(config) + 4 * hidden * (experts or 0)
    numbers = layers * hidden + layer if checkpointing else layers * layer
    return numbers * scorer.dtype.itemsize


def active_width(config: Any) -> int:
    """Width of the feed-forward layers that one token is computed with: of the experts that it is sent to and of shared
    ones together."""
    inner = _width(config, "intermediate_size", "ffn_dim") or 4 * int(config.hidden_size)
    if expert_fraction(config) == 1:
        return inner
    routed = _width(config, "moe_intermediate_size", "expert_ffn_hidden_size") or inner
    shared = _width(config, "shared_expert_intermediate_size", "shared_intermediate_size")
    shared = shared or routed * _width(config, "n_shared_experts")
    return routed * (experts_per_token(config) or 1) + shared


def _width(config: Any, *names: str) -> int:
    """The first of these fields that is there, the largest where it is one for every layer; 0 without any."""
    found = next((value for name in names if (value := getattr(config, name, None))), 0)
    return int(max(found) if isinstance(found, (list, tuple)) else found)


def estimate(scorer: PackedModel, groups: Sequence[Group]) -> int:
    """A token budget by a rough estimate, as if activations were kept."""
    device = next(scorer.model.parameters()).device
    free = free_memory(device) - KEEP_BYTES
    affordable = int(max(0, free) * SHARE) // bytes_per_token(scorer, checkpointing=False)
    largest = int(scorer.layout.costs(GroupTable.of(groups)).max())
    return max(largest, min(affordable, CEILING[device.type]))


def largest_batch(costs: IndexArray, token_budget: int) -> list[int]:
    """The largest groups that fit into one micro-batch, by their places."""
    order = np.argsort(-costs, kind="stable")
    smallest = int(costs[order[-1]])
    taken: list[int] = []
    room = token_budget
    for i, cost in zip(order.tolist(), costs[order].tolist(), strict=True):
        if taken and cost > room:
            continue
        taken.append(i)
        room -= cost
        if room < smallest:
            break
    return taken


def smaller_budget(error: MemoryFailure, tokens: int, what: str, largest: int, device: torch.device) -> int:
    """Half of ``tokens``, at least the ``largest`` group's, after ``error``; see :func:`prefopt.model.costs.halved`."""
    too_large = (
        f"{what}: one group of {largest} tokens does not fit into the device's memory; give"
        " --gradient-checkpointing, --lora or shorter sequences (--max-length, --max-new-tokens)"
    )
    return halved(error, tokens, largest, too_large, device)


def fatal_in_shards(what: str, tokens: int) -> RunError:
    """The error of ``what`` running out of memory on a rank with shards of the others' weights: it cannot repeat it."""
    return RunError(
        f"{what}: out of memory with the model in shards, where a rank cannot repeat a step by itself; start again with"
        f" --token-budget {max(1, tokens // 2)}, or with --gradient-checkpointing"
    )


def try_largest(
    differentiator: Differentiator,
    weights: MasterWeights,
    groups: Sequence[Group],
    batch_of: Callable[[Sequence[int]], Batch],
    token_budget: int,
    optimizer_state: int = 0,
) -> tuple[int, float]:
    """Run forward and backward on the largest micro-batch of ``groups``, halving the budget on out-of-memory.

    ``batch_of`` makes a batch of groups by their places. Returns the budget that works and its tokens per second. In
    lockstep (shards), running out of memory is fatal. On a GPU gradients are there before the pass, and
    ``optimizer_state`` bytes are held, since all passes but the first find both there.
    Weights and random states do not change.
    """
    scorer = differentiator.scorer
    device = next(scorer.model.parameters()).device
    scorer.train()
    costs = scorer.layout.costs(GroupTable.of(groups))
    while True:
        batch = batch_of(largest_batch(costs, token_budget))
        started, held = time.monotonic(), None
        try:
            if device.type == "cuda":
                held = torch.empty(optimizer_state, dtype=torch.uint8, device=device)
                for master in (m for m in weights.masters.values() if m.is_cuda):
                    master.grad = torch.zeros_like(master)
            with same_randomness(device):
                found = differentiator.gradients(batch, max(token_budget, int(costs.max())))
                if scorer.compiled is not None:  # the first pass was for the compiler, the second one is timed
                    weights.zero_grad()
                    started = time.monotonic()
                    found = differentiator.gradients(batch, max(token_budget, int(costs.max())))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return token_budget, sum(p.tokens for p in found.packed) / (time.monotonic() - started)
        except MEMORY_ERRORS as error:
            if differentiator.lockstep and out_of_memory(error):
                raise fatal_in_shards("the largest batch", token_budget) from error
            token_budget = smaller_budget(error, token_budget, "the largest batch", int(costs.max()), device)
        finally:
            del held
            weights.zero_grad()


class Speed:
    """Metrics of speed of a step by ``ranks`` devices; groups are called ``unit``. ``utilisation`` counts a shared
    prompt once, ``utilisation_unshared`` once for each response; both are left out where the model's FLOPs cannot be
    counted."""

    def __init__(
        self, model: torch.nn.Module, device: torch.device, dtype: torch.dtype, unit: str, ranks: int = 1
    ) -> None:
        self.unit, self.device, self.peak = unit, device, 0.0
        self._flops: FlopCount | None = None
        try:
            self.peak, self._flops = ranks * matmul_peak(device, dtype), FlopCount.of(model)
        except Exception as error:  # of any kind, from the model's configuration
            log.warning("utilisation is not measured: %s", first_line(error))

    def work(self, batches: Sequence[PackedBatch]) -> dict[str, float]:
        """What packed batches were to compute; that of several ranks adds up."""
        found: dict[str, float] = {
            "tokens": sum(b.tokens for b in batches),
            "groups": sum(len(b.groups) for b in batches),
        }
        if self._flops is not None:
            found["flops"] = sum(map(self._flops, batches))
            found["flops_unshared"] = sum(map(self._flops.unshared, batches))
        return found

    def record(self, work: Mapping[str, float], seconds: float) -> Record:
        """The metrics of a step that did ``work`` in ``seconds``."""
        tokens = int(work["tokens"])
        flops = {name: x for name, x in work.items() if name.startswith("flops")}
        return {
            "step_seconds": seconds,
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            f"{self.unit}_per_second": work["groups"] / seconds,
            **{"utilisation" + name.removeprefix("flops"): x / seconds / self.peak for name, x in flops.items()},
            "peak_memory_bytes": peak_memory(self.device),
        }


def refuse_8bit(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raise :class:`ConfigError` where an 8-bit optimiser does not work."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f'--optimizer {name} needs bitsandbytes: pip install "prefopt[quantise]"')
    if device.type != "cuda" and (name.startswith("paged") or device.type != "cpu"):
        raise ConfigError(f"--optimizer {name} needs a CUDA device, not {device.type}; try --optimizer adamw")
    if dtype == torch.float64:
        raise ConfigError(f"--optimizer {name} does not work in float64; take --optimizer adamw")


def prepare_machine(options: RunOptions, dtype: torch.dtype, device: torch.device, reporter: Reporter) -> None:
    """Set torch up for a run. Raises :class:`ConfigError` for a precision that the device lacks."""
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if slow := slow_dtype(dtype, device):
        reporter.say(slow)
    if options.offload and device.type != "cuda":
        raise ConfigError(
            f"--offload {options.offload[0]}: the {device.type} computes in host memory already; leave it out"
        )
    if options.optimizer != "adamw":
        refuse_8bit(options.optimizer, device, dtype)
    if device.type == "mps" and dtype == torch.float64:
        raise ConfigError("--dtype float64: mps has none; take --device cpu")
