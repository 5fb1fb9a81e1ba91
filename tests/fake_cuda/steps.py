"""Updates on a fake CUDA device: what they wait for, and what they copy. test_fake_cuda.py runs these."""

from __future__ import annotations

from fake_cuda.device import CUDA, fake_cuda  # isort: skip - before torch

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fake_cuda.traces import h100, scorer_of  # noqa: F401 - a fixture
from fake_cuda.traffic import Traffic
from prefopt.config.training import RunOptions
from prefopt.losses.declare import LOSSES
from prefopt.reference.in_memory import InMemoryReference, SwappedWeights
from prefopt.train.batch import Batch
from prefopt.train.columns import mismatched
from prefopt.train.objective import PreferenceObjective
from prefopt.train.optim import Network
from prefopt.train.step import InMemoryColumns
from prefopt.train.trainer import Trainer
from train.ranked import columns_for, mixed, pairs_only, terms


def trainer_of(scorer: Any, networks: Any, objective: Any, **more: Any) -> Trainer:
    nothing: Any = SimpleNamespace(auxiliary=lambda *_: None)
    return Trainer(
        scorer=scorer,
        networks={
            name: Network.of(weights, RunOptions(learning_rate=1e-5, output="none"), 10, 1e-5)
            for name, weights in networks.items()
        },
        objective=objective,
        source=nothing,
        steps=10,
        max_grad_norm=0.5,
        eval_every=None,
        early_stopping=None,
        save_every=None,
        keep_last=1,
        metrics=nothing,
        reporter=nothing,
        checkpoints=nothing,
        stop=nothing,
        token_budget=40,
        **more,
    )


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str) -> None:
    chosen = terms(f"{name}:1")
    data = (pairs_only if chosen[0].loss.kind == "pairs" else mixed)(6)
    columns = dict(columns_for(chosen)(data))
    others = None
    reference = None
    with fake_cuda():
        scorer, masters = scorer_of("llama", "full")
        compares = any(t.loss.needs_distributions for t in chosen)
        live = InMemoryReference(scorer, SwappedWeights(masters)) if compares else None
        if not compares and any(t.loss.needs_reference for t in chosen):
            columns["ref_logp_N"] = np.zeros(int(data.responses_G.sum()))
            columns["ref_logp_M"] = np.zeros(int(data.trained_N.sum()), np.float32)
        if any(t.loss.needs_mismatched for t in chosen):
            found = mismatched(data, 64)[0]
            others = Batch(list(found), {"ref_logp_N": np.zeros(int(found.responses_G.sum()))})
        batch = Batch(list(data), columns, others)
        if live is not None or others is not None:
            reference = InMemoryColumns(live, compares=compares, tokens=False)
        trainer = trainer_of(scorer, {"policy": masters}, PreferenceObjective(chosen, device=CUDA), reference=reference)
        with Traffic() as traffic:
            trainer._update(batch)
    print(name, len(traffic.waits), traffic.waits[:9], "pageable", len(traffic.pageable), "pinned", traffic.pinned)
    if name == "dpo":
        print("\n".join(traffic.pageable))
