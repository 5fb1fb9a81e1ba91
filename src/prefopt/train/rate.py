"""The learning rate of a run: the one given, that of an earlier start, or the one suggested for its model."""

from __future__ import annotations

from dataclasses import replace

from prefopt.config.rates import AUTO, LARGE, suggested_rate
from prefopt.model.architectures import causal_model, weights_in
from prefopt.model.scorer import PackedModel
from prefopt.runs.folder import RESOLVED
from prefopt.train.run import Run

RATE = "learning_rate"


def settle_rate(run: Run, scorer: PackedModel, *, updates: int) -> None:
    """Replace ``--learning-rate auto`` of the run by a number, and say the rate beside the one suggested for the model
    of ``scorer`` in so many ``updates``. Called before the output folder is taken."""
    config = run.config
    weights = sum(weights_in(p) for p in causal_model(scorer.model).parameters())
    suggested = suggested_rate(
        config.published_rate,
        weights,
        updates=updates,
        batch=config.batch_size,
        usual_batch=type(config).batch_size,
        most=config.small_rate,
    )
    known = run.folder.record.get(RESOLVED, {}).get(RATE, {}).get("to")
    of = f"{weights / 1e6:,.3g} million weights in {updates} updates"
    if weights >= LARGE:
        of = f"{weights / 1e9:,.3g} billion weights"
    usual = f"models of billions of weights use {config.published_rate:g}"
    if known is not None:
        run.say(f"learning rate: {known:g}, as at the first start")
        set_rate(run, float(known))
    elif config.learning_rate == AUTO:
        run.say(f"learning rate: {suggested:.2g}, suggested for {of}; {usual}")
        set_rate(run, float(f"{suggested:.2g}"))
    else:
        run.say(f"learning rate: {config.learning_rate:g}; suggested for {of}: {suggested:.2g}")


def set_rate(run: Run, rate: float) -> None:
    """Train at ``rate`` from here on, and at a resume."""
    run.config = replace(run.config, learning_rate=rate)
    run.folder.resolve(RATE, rate)
