"""What PPO, RLOO, DPO and online losses reach in a world that can be listed: benchmarks/world_table.py [--seeds 3]

The world of the tests (tests/methods/small_world.py): eight tokens, responses of at most three, a reward for each, and
so the optimum pi* = ref exp(r / beta) / Z in closed form. Told is the fraction of the gain that can be had,
(J(pi) - J(ref)) / (J(pi*) - J(ref)), the total variation from pi*, the expected reward, and the KL from the reference,
over seeds that draw other samples.

- ``defaults``: no options but beta and what makes ``--samples`` samples in all. ``published``: the same at the learning
  rate that is published for models of billions of weights. ``tuned``: the options of ``TUNED``, and ``--tuned``
  samples.
- PPO and RLOO draw their samples from the policy. DPO learns from pairs of samples of the reference, each pair with one
  label that is drawn by Bradley-Terry: as many samples in all, so half as many labels.
- ``online:LOSS`` (``--methods online:dpo online:grpo``) is prefopt online: its samples are the policy's, its labels the
  order of their rewards. With hard labels, and with k3 in the loss, the limit is another one than pi*
  (docs/guide/online.md): the total variation says how far from pi* a run ended, not how near its limit.
- ``--labels exact 3000000 10000 3200`` trains DPO alone, on these numbers of labels of pairs that the reference draws
  (``exact``: all pairs, with their probabilities). All have the same steps, each on all labels at once, and the same
  held-out labels, so only the number of labels differs. What prefopt.runs.diagnose says of each is printed: it does not
  know the optimum.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import prefopt
from prefopt import theory
from prefopt.config.dpo import LEARNING_RATE as DPO_RATE
from prefopt.config.online import OnlineConfig
from prefopt.config.ppo import LEARNING_RATE as PPO_RATE
from prefopt.model.load import load_model
from prefopt.model.scorer import Scorer
from prefopt.runs.diagnose import diagnose, held_out_accuracy
from prefopt.runs.history import read_history
from prefopt.train import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from methods import small_world as world

BETA = 0.5
MACHINE: dict[str, Any] = {"device": "cpu", "dtype": "float32", "threads": 1, "progress": "none", "beta": BETA}
BATCH = {"ppo": 64, "rloo": 16}
"""Prompts of a step: 64 responses at the default number of them."""
TUNED: dict[str, dict[str, Any]] = {
    "ppo": {"gae_lambda": 1.0, "value_clip": 10.0, "critic_learning_rate": 5e-3, "learning_rate": 2e-3},
    "rloo": {"learning_rate": 3e-3},
    "dpo": {"learning_rate": 1e-4, "batch_size": 64, "epochs": 2.0},
}
TUNED["ppo"] |= {"whiten_advantages": False}

LABELLED: dict[str, Any] = {"learning_rate": 3e-3, "epochs": 150.0, "batch_size": 1, "eval_every": 10}
LABELLED |= {"save_every": 150, "token_budget": 1536}
"""Of ``--labels``: 150 steps, each on all labels at once."""
HELD_OUT = 500
"""Held-out labels, of pairs that the reference draws."""


def logp_of(folder: str) -> Any:
    """Log-probability [Y] of every response under a model, float64."""
    scorer = Scorer(load_model(folder, dtype=torch.float64, device=torch.device("cpu")))
    with torch.no_grad():
        return world.distribution(scorer).numpy()


def sampled(start: str, output: str, algorithm: str, samples: int, seed: int, **options: Any) -> None:
    """A run of PPO or RLOO with so many samples."""
    num = options.pop("num", {"ppo": 1, "rloo": 4}[algorithm])
    batch = options.pop("batch_size", BATCH[algorithm])
    steps = max(1, samples // (num * batch))
    prompts = [{"prompt": world.PROMPT}] * batch
    options |= {"num": num, "batch_size": batch, "epochs": float(steps), "max_new_tokens": world.LONGEST}
    options |= {"keep_samples": 0, "token_budget": 8192}
    prefopt.ppo(
        start, prompts, reward=world.reward, output=output, algorithm=algorithm, seed=seed, **MACHINE, **options
    )


def online(start: str, output: str, loss: str, samples: int, seed: int, **options: Any) -> None:
    """A run of prefopt online with so many samples, 64 a round."""
    config = OnlineConfig(model="m", prompts=["p"], reward="length", output="o", loss=loss)
    batch = 64 // config.num
    more: dict[str, Any] = {"batch_size": batch, "epochs": float(max(1, samples // (config.num * batch)))}
    more |= {"max_new_tokens": world.LONGEST, "token_budget": 8192}
    prompts = [{"prompt": world.PROMPT}] * batch
    given = {**MACHINE, **more, **options}
    prefopt.online(start, prompts, reward=world.reward, output=output, loss=loss, seed=seed, **given)


def paired(start: str, output: str, rows: Sequence[dict[str, Any]], seed: int, **options: Any) -> None:
    """A run of DPO."""
    prefopt.dpo(start, rows, output=output, seed=seed, **MACHINE, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=6400)
    parser.add_argument("--tuned", type=int, default=30720)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=["ppo", "rloo", "dpo"])
    parser.add_argument("--kinds", nargs="+", default=["published", "defaults", "tuned"])
    parser.add_argument("--labels", nargs="+", help="numbers of labels for DPO, or exact")
    parser.add_argument("--options", type=json.loads, default={}, help="JSON of further options, to try some")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        start = world.write_world(Path(folder) / "m")
        ref = logp_of(start)
        if asked.labels:
            rows = [told(start, folder, labels, ref, seeds) for labels, seeds in runs_of(asked.labels, asked.seeds)]
            if asked.json:
                asked.json.write_text(json.dumps(rows, indent=1))
            return
        best = theory.optimal_logp(ref, world.REWARD, BETA)
        least, most = (float(theory.objective(x, ref, world.REWARD, BETA)) for x in (ref, best))
        print(f"reference: {theory.total_variation(ref, best):.3f} from the optimum, J from {least:.4f} to {most:.4f}")
        earned, nats = float(theory.expected(best, world.REWARD)), float(theory.kl(best, ref))
        print(f"reward {float(theory.expected(ref, world.REWARD)):.3f}, at the optimum {earned:.3f} at {nats:.3f} nats")
        rows = []
        for method in asked.methods:
            for kind in asked.kinds:
                if method.startswith("online:") and kind == "tuned":
                    parser.error("--methods online:LOSS has no tuned options here; give --kinds defaults published")
                found = []
                for seed in range(asked.seeds):
                    output = f"{folder}/{method}-{kind}-{seed}".replace(":", "-")
                    train(start, output, method, kind, ref, asked, seed)
                    logp = logp_of(output)
                    gain = (float(theory.objective(logp, ref, world.REWARD, BETA)) - least) / (most - least)
                    reward, kl = float(theory.expected(logp, world.REWARD)), float(theory.kl(logp, ref))
                    found.append((gain, float(theory.total_variation(logp, best)), reward, kl))
                gains, far, earned, nats = (list(column) for column in zip(*found, strict=True))
                rows.append(
                    {
                        "method": method,
                        "kind": kind,
                        "gains": gains,
                        "total_variation": far,
                        "reward": earned,
                        "kl": nats,
                    }
                )
                print(
                    f"| {method} | {kind} | {statistics.fmean(gains):.1%} ({min(gains):.1%} to {max(gains):.1%})"
                    f" | {statistics.fmean(far):.3f} ({max(far):.3f} at most)"
                    f" | {statistics.fmean(earned):.3f} | {statistics.fmean(nats):.3f} |",
                    flush=True,
                )
        if asked.json:
            asked.json.write_text(json.dumps(rows, indent=1))


def train(start: str, output: str, method: str, kind: str, ref: Any, asked: argparse.Namespace, seed: int) -> None:
    """One run of the table."""
    method, _, loss = method.partition(":")
    options: dict[str, Any] = {}
    samples = asked.tuned if kind == "tuned" else asked.samples
    if method == "online":
        if kind == "published":
            given = OnlineConfig(model="m", prompts=["p"], reward="length", output="o", loss=loss)
            options["learning_rate"] = given.published_rate
        online(start, output, loss, samples, seed, **options | asked.options)
        return
    if kind == "published":
        options["learning_rate"] = (DPO_RATE if method == "dpo" else PPO_RATE)[False]
    if kind == "tuned":
        options |= TUNED[method]
        if method != "dpo":
            options |= {"num": 256, "batch_size": 1}
    options |= asked.options
    if method != "dpo":
        sampled(start, output, method, samples, seed, **options)
        return
    paired(start, output, world.pairs(ref, samples // 2, seed), seed, **options)


# -- DPO by its labels -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reached:
    """A policy against the optimum: total variation, fractions of the objective and of the reward to be gained, and KL
    from the reference, nats."""

    total_variation: float
    gain: float
    reward: float
    kl: float


def reached(logp: Any, ref: Any) -> Reached:
    best = theory.optimal_logp(ref, world.REWARD, BETA)
    least, most, here = (float(theory.objective(x, ref, world.REWARD, BETA)) for x in (ref, best, logp))
    low, high, mean = (float((np.exp(x) * world.REWARD).sum()) for x in (ref, best, logp))
    kl = float((np.exp(logp) * (logp - ref)).sum())
    far = float(theory.total_variation(logp, best))
    return Reached(far, (here - least) / (most - least), (mean - low) / (high - low), kl)


def runs_of(labels: Sequence[str], seeds: int) -> list[tuple[int | None, int]]:
    """Numbers of labels with the runs of each; exact ones leave nothing to draw."""
    return [(None, 1) if text == "exact" else (int(text), seeds) for text in labels]


def at_end(start: str, output: str) -> Any:
    """Log-probability [Y] under the last weights of a run, which saved those of its lowest held-out loss."""
    model = load_model(start, dtype=torch.float64, device=torch.device("cpu"))
    weights = checkpoint.at(Path(output) / "checkpoints", int(LABELLED["save_every"])).weights
    model.load_state_dict(dict(checkpoint.part_of("policy", weights)))
    with torch.no_grad():
        return world.distribution(Scorer(model)).numpy()


def told(start: str, folder: str, labels: int | None, ref: Any, seeds: int) -> dict[str, Any]:
    """Train on so many labels with each seed, and print what was reached and what the run says of itself."""
    runs = []
    for seed in range(seeds):
        output = f"{folder}/{labels}-{seed}"
        held_out = Path(f"{output}.jsonl")
        held_out.write_text("".join(json.dumps(row) + "\n" for row in world.pairs(ref, HELD_OUT, seed + 1000)), "utf-8")
        paired(start, output, [world.labelled(ref, labels, seed)], seed, eval_data=[str(held_out)], **LABELLED)
        history = read_history(Path(output))
        accuracy = held_out_accuracy(history)
        policies = {"saved": logp_of(output), "end": at_end(start, output)}
        runs.append({name: asdict(reached(logp, ref)) for name, logp in policies.items()})
        runs[-1] |= {"accuracy": accuracy and accuracy.share, "accuracy at end": _last_accuracy(history)}
        runs[-1]["findings"] = [f"{'look: ' * found.look}{found.text}" for found in diagnose(history)]
    name = "exact" if labels is None else f"{labels:,}"
    for which, accuracy in (("saved", "accuracy"), ("end", "accuracy at end")):
        cells = [_range([run[which][key] for run in runs]) for key in ("total_variation", "gain", "reward", "kl")]
        print(f"| {name} | {which} | {' | '.join(cells)} | {_range([run[accuracy] for run in runs])} |", flush=True)
    print(*(f"    {text}" for text in runs[0]["findings"]), sep="\n", flush=True)
    return {"labels": name, "runs": runs}


def _last_accuracy(history: Any) -> float:
    return float(history.curve("rewards/accuracies", held_out=True).values[-1])


def _range(values: Sequence[float]) -> str:
    few = len(values) == 1
    return f"{values[0]:.3f}" if few else f"{statistics.fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    main()
