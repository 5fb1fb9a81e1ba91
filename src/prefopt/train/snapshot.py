"""What a trainer puts into a checkpoint, and takes back from one."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from prefopt.runs.metrics import Averages
from prefopt.train import checkpoint
from prefopt.train.checkpoint import Checkpoint

if TYPE_CHECKING:
    from prefopt.train.trainer import Trainer


def point_of(trainer: Trainer) -> tuple[int, int, str]:
    """Complete steps, updates made since, and what the source holds: checkpoints of the same point are equal."""
    return trainer.state.step, trainer.state.done, trainer.source.holds


def take(trainer: Trainer) -> Checkpoint:
    """The state of a run. Tensors are the trainer's own, which the next update moves; all else is a copy."""
    networks, movement, source = trainer.networks.items(), trainer.movement, trainer.source
    return Checkpoint(
        weights=checkpoint.joined({name: n.weights.saved() for name, n in networks}),
        optimizer=checkpoint.joined({name: checkpoint.optimizer_tensors(n.optimizer) for name, n in networks}),
        state={
            "step": trainer.state.step,
            "progress": asdict(trainer.state),
            **checkpoint.states_of_ranks(trainer.world),
            "losses": {name: {k: float(v) for k, v in kept.items()} for name, kept in trainer.objective.state.items()},
            "averages": trainer.averages.to_dict(),
            "source": source.state(),
            "experts": trainer.experts.state() if trainer.experts is not None else {},
        },
        reference=movement.weights.saved() if movement is not None else None,
        rollouts=source.tensors(),
    )


def restore(trainer: Trainer, saved: Checkpoint) -> str | None:
    """Put a run back to the state of a checkpoint. Returns a line where another number of processes wrote it."""
    for name, network in trainer.networks.items():
        network.weights.load(checkpoint.part_of(name, saved.weights))
        checkpoint.restore_optimizer(network.optimizer, checkpoint.part_of(name, saved.optimizer))
    line = checkpoint.restore_random(saved.state, trainer.world)
    if trainer.movement is not None and saved.reference is not None:
        trainer.movement.weights.load(saved.reference)
    for name, kept in saved.state.get("losses", {}).items():
        now = trainer.objective.state[name]
        trainer.objective.state[name] = {k: now[k].new_tensor(value) for k, value in kept.items()}
    progress: dict[str, Any] = saved.state["progress"]
    known = {f.name for f in fields(trainer.state)}
    trainer.state = type(trainer.state)(**{name: value for name, value in progress.items() if name in known})
    # Earlier versions kept the source's state in the trainer's.
    trainer.source.restore(saved.state.get("source", progress), saved.rollouts)
    trainer.averages = Averages.from_dict(saved.state.get("averages", {}))
    if trainer.experts is not None:
        trainer.experts.restore(saved.state.get("experts", {}))
    trainer.token_budget = trainer.state.token_budget
    return line
