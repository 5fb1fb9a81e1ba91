"""What a group of K responses costs, its prompt encoded once, against K separate sequences: python rankings.py

A training step of the Plackett-Luce loss (forward, loss, backward) on groups of K = 2, 4 and 8 responses, scored

- shared: the prompt once, the K responses behind it, all groups of the step in one row;
- separate: K whole sequences, each a row of its own with the model's own attention, as a trainer without sharing has
  it that pads nothing either;
- separate, together: the same K sequences in one row, so that what rows of their own cost by themselves is seen apart.

The model is a random Llama, prompts and responses are random tokens of fixed lengths; both ways must give the same
loss. Rounds are taken in turn, the first warms up, medians are printed. The bar is shared / separate at K = 8 with a
prompt twice as long as a response: at most 0.45. By the body's tokens alone it would be (P + K R) / (K (P + R)) =
10 / 24 = 0.42; the head works on the same K R tokens either way. "By arithmetic" counts both, and attention. The
vocabulary is small by default, so that the head has the share of the weights (4 %) that it has in models of billions.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from prefopt.data.group import Group
from prefopt.losses.parse import parse_losses
from prefopt.model.flops import FlopCount
from prefopt.model.kernels.attention import HOOK
from prefopt.model.packing import PackedBatch, pack
from prefopt.model.scorer import Scorer
from prefopt.train.batch import Batch
from prefopt.train.columns import preference_batch
from prefopt.train.objective import PreferenceObjective

WAYS = ("shared", "separate", "separate, together")
BAR_K, BAR = 8, 0.45


def main() -> None:
    args = parsed()
    if args.threads:
        torch.set_num_threads(args.threads)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    model = llama(args).to(device, dtype)
    plain = Scorer(model, share=False)  # before the hook: it keeps the model's own attention
    scorers = [Scorer(model), plain]
    found = [row(k, args, scorers, device) for k in args.k]
    print(f"Llama of {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M weights, {args.dtype}, {device}, ", end="")
    print(f"{torch.get_num_threads()} threads; prompt {args.prompt}, responses {args.response} tokens")
    print(f"\n| K | {' | '.join(f'{way}, ms per group' for way in WAYS)} | shared / separate | by arithmetic |")
    print("| --- " * (len(WAYS) + 3) + "|")
    for r in found:
        times = " | ".join(f"{1e3 * r['seconds'][way]:.1f}" for way in WAYS)
        print(f"| {r['k']} | {times} | {r['ratio']:.3f} | {r['by_arithmetic']:.3f} |")
    for r in found:
        if r["k"] == BAR_K and args.prompt == 2 * args.response:
            print(f"\nat K = {BAR_K}: {r['ratio']:.3f}, {'within' if r['ratio'] <= BAR else 'above'} the bar of {BAR}")
    if args.json:
        Path(args.json).write_text(json.dumps({"arguments": vars(args), "rows": found}, indent=2) + "\n", "utf-8")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--k", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--response", type=int, default=128, help="tokens of a response")
    parser.add_argument("--groups", type=int, default=4, help="groups per step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=2_048)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json")
    return parser.parse_args()


def llama(args: argparse.Namespace) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.width,
        intermediate_size=5 * args.width // 2,
        num_hidden_layers=args.layers,
        num_attention_heads=max(1, args.width // 64),
        max_position_embeddings=args.prompt + args.response,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def groups(k: int, args: argparse.Namespace) -> list[Group]:
    """Random groups whose responses are ranked as they stand."""
    rng, made = np.random.default_rng(0), []
    for row in range(args.groups):
        prompt = rng.integers(3, args.vocabulary, args.prompt)
        ids = [np.concatenate([prompt, rng.integers(3, args.vocabulary, args.response)]) for _ in range(k)]
        group = Group.from_sequences([(x, np.arange(len(x)) >= args.prompt) for x in ids], row)
        made.append(replace(group, tiers=tuple((i,) for i in range(k))))
    return made


def alone(group: Group) -> list[Group]:
    """The same responses, each a group of its own."""
    return [Group.from_sequences([group.sequence(k)], group.row) for k in range(len(group.continuations))]


def row(k: int, args: argparse.Namespace, scorers: list[Scorer], device: torch.device) -> dict[str, Any]:
    """Seconds per group of each way, and what they are to one another."""
    made = groups(k, args)
    objective = PreferenceObjective(parse_losses("plackett_luce"), device=device)
    batch = preference_batch(made, "ranking")
    # Responses have one order in all three, so that the loss reads the same values.
    batches = {
        "shared": (scorers[0], pack(made, scorers[0].layout).to(device)),
        "separate": (scorers[1], pack(made, scorers[1].layout).to(device)),
        "separate, together": (
            scorers[0],
            pack([x for g in made for x in alone(g)], scorers[0].layout).to(device),
        ),
    }
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    losses: dict[str, float] = {}
    for number in range(args.rounds + 1):
        for way, (scorer, packed) in batches.items():
            taken, losses[way] = step(scorer, objective, batch, packed, way)
            if number:
                seconds[way].append(taken / args.groups)
    spread = max(losses.values()) - min(losses.values())
    assert spread < (1e-3 if args.dtype == "float32" else 1.0) * max(losses.values()), losses
    medians = {way: statistics.median(values) for way, values in seconds.items()}
    count = FlopCount.of(scorers[0].model)
    work = [count(batches[way][1]) for way in ("shared", "separate")]
    ratio = medians["shared"] / medians["separate"]
    return {
        "k": k,
        "seconds": medians,
        "ratio": ratio,
        "by_arithmetic": work[0] / work[1],
        "all": seconds,
        "loss": losses,
    }


def step(
    scorer: Scorer, objective: PreferenceObjective, batch: Batch, packed: PackedBatch, way: str
) -> tuple[float, float]:
    """Forward, loss and backward; the weights stay as they are."""
    with scorer.attention_by(None if way == "separate" else HOOK):
        started = time.perf_counter()
        found = objective(batch, objective.score(scorer, packed, batch), objective.normaliser(batch))
        found.total.backward()
        loss = float(found.total.detach())  # waits for the device
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken = time.perf_counter() - started
    scorer.model.zero_grad()
    return taken, loss


if __name__ == "__main__":
    main()
