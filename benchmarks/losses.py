"""What a step costs under each kind of loss: python benchmarks/losses.py [--width 512 --layers 8 --pairs 64 --json OUT]

A loss over pairs by themselves costs one forward and one backward pass, however a global batch is cut. One that must
see the whole global batch needs one more forward pass, without gradients, where the batch does not fit at once. Two
tables:

- steps of ``prefopt.dpo`` on a random Llama, with the whole batch at once and in ``--parts`` micro-batches, against
  ``dpo`` in the same cut; the first step of each run is left out. Expected of whole-batch losses: 1 at once, about 4/3
  in parts.
- the loss functions alone, forward and backward, on vectors of ``--rows`` pairs: what they add to a step.

Rounds are taken in turn, so that a machine that slows down slows all down; the median is printed.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import prefopt
from prefopt.losses.declare import LOSSES, Loss

STEPPED = ("dpo", "sigmoid_norm", "simpo", "ipo", "bco", "aot", "aot_unpaired", "beta_dpo")
VOCABULARY = 2_048  # of the model, most of which no word has: the head's share of the work is a larger model's
WORDS = "the a river stone walks over old green bridge and finds seven quiet birds near water".split()


def rows(count: int, words: int, seed: int) -> list[dict[str, str]]:
    """Pairs of random words; a response has about half as many as its prompt."""
    draw = random.Random(seed)

    def text(n: int) -> str:
        return " ".join(draw.choices(WORDS, k=n))

    return [{"prompt": text(words), "chosen": text(words // 2), "rejected": text(words // 2)} for _ in range(count)]


def write_model(folder: Path, options: argparse.Namespace) -> None:
    """A random Llama whose tokenizer has a token for each word."""
    width, layers = options.width, options.layers
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<end>", "<unknown>", *WORDS])}, "<unknown>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", unk_token="<unknown>")
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=2 * options.words + 8,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)


def stepped(folder: Path, data: list[dict[str, str]], loss: str, budget: int, options: argparse.Namespace) -> Any:
    """Seconds of each step but the first, and the tokens of one, of a run under a loss."""
    with tempfile.TemporaryDirectory(dir=folder) as output:
        prefopt.dpo(
            str(folder / "model"),
            data,
            output=str(Path(output) / "run"),
            loss=loss,
            eval_fraction=0.0,
            batch_size=options.pairs,
            max_steps=options.steps + 1,
            epochs=options.steps + 1,
            token_budget=budget,
            device=options.device,
            progress="none",
        )
        lines = (Path(output) / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
    steps = [line for line in map(json.loads, lines) if "step_seconds" in line]
    return [s["step_seconds"] for s in steps[1:]], max(s["tokens"] for s in steps)


def step_table(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Median seconds of a step, for each loss and cut."""
    data = rows(options.pairs, options.words, seed=0)
    found: dict[str, dict[str, list[float]]] = {name: {"at once": [], "in parts": []} for name in STEPPED}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model", options)
        _, tokens = stepped(folder, data, "dpo", 10**9, options)
        budgets = {"at once": 10**9, "in parts": int(1.1 * tokens / options.parts)}
        for _ in range(options.rounds):
            for loss in STEPPED:
                for cut, budget in budgets.items():
                    found[loss][cut] += stepped(folder, data, loss, int(budget), options)[0]
    return {loss: {cut: statistics.median(times) for cut, times in cuts.items()} for loss, cuts in found.items()}


def alone(loss: Loss, count: int, device: str) -> Callable[[], None]:
    """One call of a loss on pairs and its backward pass, on vectors of this length."""
    generator = torch.Generator().manual_seed(0)

    def vector(name: str) -> torch.Tensor:
        if "length" in name:
            return torch.randint(1, 200, (count,), generator=generator).to(device)
        return (20 * torch.randn(count, generator=generator) - 200).to(device)

    tensors = {name: vector(name) for name in loss.inputs}
    leaves = [tensors[name].requires_grad_() for name in ("chosen_logp_P", "rejected_logp_P")]
    state = loss.start(device)

    def call() -> None:
        torch.autograd.grad(loss(tensors, state).numerator_R.sum(), leaves, allow_unused=True)
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    return call


def function_table(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Median microseconds of each loss on pairs, by the number of pairs."""
    found: dict[str, dict[str, float]] = {}
    for loss in LOSSES.values():
        if loss.kind != "pairs":
            continue
        for count in options.rows:
            call, times = alone(loss, count, options.device), []
            for _ in range(options.calls):
                started = time.perf_counter()
                call()
                times.append(time.perf_counter() - started)
            found.setdefault(loss.name, {})[str(count)] = 1e6 * statistics.median(times)
    return found


def show(title: str, table: dict[str, dict[str, float]], unit: str, form: str) -> None:
    """Print a table with the ratio to dpo, losses of the whole batch at its end."""
    cuts = list(table["dpo"])
    print(f"\n{title}\n\n| loss | sees | {' | '.join(f'{cut}, {unit} | of dpo' for cut in cuts)} |")
    print("| --- | --- |" + " ---: | ---: |" * len(cuts))
    for name in sorted(table, key=lambda n: (LOSSES[n].whole_batch, n != "dpo", n)):
        cells = [f"{table[name][cut]:{form}} | {table[name][cut] / table['dpo'][cut]:.2f}" for cut in cuts]
        print(f"| {name} | {'whole batch' if LOSSES[name].whole_batch else 'rows'} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=64, help="pairs of a global batch")
    parser.add_argument("--words", type=int, default=60, help="words of a prompt; responses have half as many")
    parser.add_argument("--parts", type=int, default=4, help="micro-batches of a batch that is cut")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each run")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 4096])
    parser.add_argument("--calls", type=int, default=50)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    functions = function_table(options)
    show("The functions alone, forward and backward, by the number of pairs", functions, "us", ".0f")
    steps = step_table(options)
    show(
        f"Steps of {options.pairs} pairs",
        {n: {c: 1e3 * s for c, s in x.items()} for n, x in steps.items()},
        "ms",
        ".1f",
    )
    if options.json:
        about = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
        versions = {"prefopt": prefopt.__version__, "torch": torch.__version__, "threads": torch.get_num_threads()}
        report = {"options": about, **versions, "steps": steps, "functions": functions}
        options.json.write_text(json.dumps(report, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
