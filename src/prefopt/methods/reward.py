"""A reward model from preferences, from a configuration to a finished model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prefopt.config.reward import RewardConfig
from prefopt.core.files import write_json
from prefopt.core.stop import StopRequest
from prefopt.core.terminal import Reporter
from prefopt.errors import ConfigError, DataError
from prefopt.model.check import CheckReport, check_scalars
from prefopt.model.packed_model import causal_model
from prefopt.model.precision import MasterWeights
from prefopt.model.scalar import ScalarScorer, folded, response_rewards, set_shift, shift_of
from prefopt.runs.card import save_model
from prefopt.train import rows as items
from prefopt.train.objectives import RewardObjective
from prefopt.train.policy import ScalarPolicy
from prefopt.train.reliability import Reliability, draw, reliability
from prefopt.train.run import TrainingRun
from prefopt.train.trainer import Loop

ZERO_FROM = 1000
"""Prompts of the training data that the shift is measured on: its error is a thirtieth of the rewards' spread."""


@dataclass(frozen=True, slots=True)
class RewardResult:
    """What a run gives back: ``metrics`` are averages over the rows of the last epoch; of the saved weights are
    ``held_out_loss``, ``shift`` and, where rows were held out, ``reliability``."""

    output: Path
    steps: int
    metrics: dict[str, float]
    held_out_loss: float | None
    best_step: int | None
    shift: float
    reliability: Reliability | None


def run(
    config: RewardConfig,
    *,
    model: Any = None,
    tokenizer: Any = None,
    rows: Iterable[Mapping[str, object]] | None = None,
    callbacks: Sequence[Any] = (),
) -> RewardResult | None:
    """Train a reward model. ``model`` (a language model, whose layers are trained in place), ``tokenizer`` and ``rows``
    stand in for what ``config`` names.

    Returns none for a dry run. Raises :class:`prefopt.errors.UserError`, and
    :class:`prefopt.errors.Interrupted` after a stop, with everything kept.
    """
    if hasattr(model, "peft_config"):
        raise ConfigError("a reward model is made of whole weights: fold the adapter in with merge_and_unload() first")
    with StopRequest() as stop:
        given: dict[str, Any] = {"model": model, "tokenizer": tokenizer, "rows": rows, "callbacks": callbacks}
        run = _Run(config, Reporter(config.progress), stop, **given)
        loop = run.run()
        if loop is None:
            return None
        progress = loop.progress
        shift = shift_of(causal_model(run.policy.scorer.model))
        made = (run.folder.path, progress.step, run.metrics, run.held_out_loss, progress.best_step)
        return RewardResult(*made, shift, run.reliability)


class _Run(TrainingRun[ScalarScorer]):
    """One run."""

    config: RewardConfig
    policy: ScalarPolicy
    want = "pairs"
    reliability: Reliability | None = None

    def load_policy(self) -> ScalarPolicy:
        """See :class:`TrainingRun`."""
        return ScalarPolicy(self.config, self.source, self.dtype, self.device, self.given, self.tokenizer)

    def check_scores(self) -> CheckReport:
        """Responses must not end with the token that transformers takes for padding."""
        pad = causal_model(self.policy.scorer.model).config.get_text_config().pad_token_id
        table = self.data.groups
        if pad is not None and any(bool((part.columns["ids_T"] == pad).any()) for part in table.parts):
            for group in table:
                if any(int(c.ids[np.nonzero(c.trained)[0][-1]]) == pad for c in group.continuations):
                    raise DataError(f"a response ends with the pad token (id {pad}); take it away", row=group.row)
        return check_scalars(self.policy.scorer, table)

    def prepare(self) -> None:
        """Says what is trained; data that the loss cannot take are refused here, before anything is written."""
        self.objective_to_try()
        config = self.config
        parts = [f"margins of {config.margin:g} per point of score"] if config.margin is not None else []
        parts += [f"centring {config.centre:g}"] if config.centre else []
        head = "a new head" if self.policy.fresh else "its own head"
        self.reporter.say(f"loss: Bradley-Terry ({', '.join([f'pairs {config.pairs}', *parts])}), on {head}")

    def objective(self) -> RewardObjective:
        """See :class:`TrainingRun`."""
        self.reporter.say(self.policy.make_trainable())
        set_shift(causal_model(self.policy.scorer.model), 0.0)  # of what comes out; the loss centres by itself
        return self.objective_to_try()

    def objective_to_try(self) -> RewardObjective:
        """See :class:`TrainingRun`."""
        config = self.config
        return RewardObjective(
            self.data.groups, device=self.policy.device, pairs=config.pairs, margin=config.margin, centre=config.centre
        )

    def trained(self, loop: Loop) -> dict[str, Any]:
        """The shift, and what held-out pairs say."""
        scorer, data, folder = self.policy.scorer, self.data, self.folder.path
        scorer.eval()
        results: dict[str, Any] = {}
        if self.config.zero != "none":
            some = [
                data.train[i] for i in np.linspace(0, len(data.train) - 1, min(ZERO_FROM, len(data.train)), dtype=int)
            ]
            reward_N = response_rewards(scorer, data.groups, some, loop.token_budget)
            rows = items.pairs_of([data.groups[i] for i in some], "all", merge=True)
            taken = np.unique(rows.chosen) if self.config.zero == "chosen" else np.arange(len(reward_N))
            set_shift(causal_model(scorer.model), float(reward_N[taken].mean()))
            results["shift"] = scorer.shift
            which = "chosen responses" if self.config.zero == "chosen" else "responses"
            self.reporter.say(
                f"shift: {scorer.shift:+.4f}, so that {len(taken)} {which} of the training data average 0"
            )
        if data.held_out:
            reward_N = response_rewards(scorer, data.groups, data.held_out, loop.token_budget)
            found = self.reliability = reliability(reward_N, data.groups, data.held_out, self.config.pairs)
            write_json(folder / "reliability.json", found.to_dict())
            draw(found, folder / "reliability.svg")
            for line in found.lines():
                self.reporter.say(line)
            i = found.interval
            results["held-out accuracy"] = f"{found.accuracy:.3f}" + (f" ({i.low:.3f} to {i.high:.3f})" if i else "")
            results["held-out calibration error"] = found.ece
        else:
            self.reporter.say("held out: nothing, so that accuracy is not known; give --eval-fraction or --eval-data")
        return results

    def save(self) -> None:
        """The whole model, an adapter folded in: its base has neither the head nor the configuration."""
        if not self.config.lora:
            super().save()
            return
        policy, wide = self.policy, torch.promote_types(self.dtype, torch.float32)
        policy.scorer.detach_hook()
        whole = folded(policy.scorer.model, dict(policy.masters.saved()), wide).requires_grad_(True)
        save_model(self.folder.path, ScalarScorer(whole), MasterWeights(whole, wide), self.tokenizer)

    def title(self) -> tuple[str, str]:
        """See :class:`TrainingRun`."""
        return "Reward model", "reward-model"
