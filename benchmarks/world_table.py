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
- ``--labels 10000 3200`` trains DPO, tuned, on these numbers of labels instead of ``--tuned``; ``exact`` stands for
  every pair of different responses with its probability. What prefopt.runs.diagnose says of each is printed: it does
  not know the optimum.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
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
from prefopt.runs.diagnose import diagnose
from prefopt.runs.history import read_history

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


def row_of(first: int, second: int, share: float) -> dict[str, Any]:
    """A pair as a row, the first response better with probability ``share``."""
    texts = ["".join(world.LETTERS[i] for i in world.RESPONSES[y]) for y in (first, second)]
    votes = [vote for vote in ([0, 1, share], [1, 0, 1 - share]) if vote[2] > 0]
    # The end is written out, as a token like the others: a response that is nothing else is not taken for an empty one.
    return {"prompt": world.PROMPT, "responses": texts, "finish": ["length", "length"], "votes": votes}


def labelled(ref: Any, labels: int | None, seed: int) -> list[dict[str, Any]]:
    """Pairs of samples of the reference, each with one drawn label; None: every pair with its probability."""
    prefer = theory.bradley_terry(world.REWARD)
    if labels is None:
        firsts, seconds = np.triu_indices(len(ref), 1)
        return [row_of(i, j, float(prefer[i, j])) for i, j in zip(firsts.tolist(), seconds.tolist(), strict=True)]
    draw = np.random.Generator(np.random.PCG64(seed))
    p = np.exp(ref) / np.exp(ref).sum()
    rows = []
    while len(rows) < labels:
        i, j = draw.choice(len(ref), 2, p=p).tolist()
        if i != j:
            rows.append(row_of(i, j, float(draw.random() < prefer[i, j])))
    return rows


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
        best = theory.optimal_logp(ref, world.REWARD, BETA)
        least, most = (float(theory.objective(x, ref, world.REWARD, BETA)) for x in (ref, best))
        print(f"reference: {theory.total_variation(ref, best):.3f} from the optimum, J from {least:.4f} to {most:.4f}")
        earned, nats = float(theory.expected(best, world.REWARD)), float(theory.kl(best, ref))
        print(f"reward {float(theory.expected(ref, world.REWARD)):.3f}, at the optimum {earned:.3f} at {nats:.3f} nats")
        rows = []
        named = [f"dpo:{n}" for n in asked.labels] if asked.labels else asked.methods
        for method in named:
            for kind in ["tuned"] if asked.labels else asked.kinds:
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
                if asked.labels:
                    for finding in diagnose(read_history(Path(output))):
                        print(f"    {'look: ' * finding.look}{finding.text}")
        if asked.json:
            asked.json.write_text(json.dumps(rows, indent=1))


def train(start: str, output: str, method: str, kind: str, ref: Any, asked: argparse.Namespace, seed: int) -> None:
    """One run of the table."""
    method, _, labels = method.partition(":")
    options: dict[str, Any] = {}
    samples = asked.tuned if kind == "tuned" else asked.samples
    if method == "online":
        if kind == "published":
            given = OnlineConfig(model="m", prompts=["p"], reward="length", output="o", loss=labels)
            options["learning_rate"] = given.published_rate
        online(start, output, labels, samples, seed, **options | asked.options)
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
    many = None if labels == "exact" else int(labels) if labels else samples // 2
    rows = labelled(ref, many, seed)
    if labels:  # held out: as many more labels again as a tenth
        more = labelled(ref, max(200, (many or 10_000) // 10), seed + 1000)
        Path(f"{output}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in more), "utf-8")
        options["eval_data"] = [f"{output}.jsonl"]
    paired(start, output, rows, seed, **options)


if __name__ == "__main__":
    main()
