"""How fast PPO runs, where its time goes, and what each model takes: python benchmarks/ppo_throughput.py --help.

A random Llama of the size asked for is trained on its own samples by ``prefopt ppo``, with a random reward model of the
same size, from which the critic starts; and, with --trl PYTHON, by TRL 0.29 in the environment of that interpreter, on
the same models, prompts and lengths. The first step is left out: it warms up. ``bytes`` are the weights of each model,
``peak_bytes`` the most that its process held.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

PARTS = ("rollouts", "reward", "scoring", "training")


def write_model(folder: Path, hidden: int, layers: int) -> None:
    """A Llama with random weights and a tokenizer of bytes, and beside it, in ``reward``, a reward model made of it."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from prefopt.model.scalar import scalar_from

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(["<s>", "</s>", "<pad>", *alphabet])}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        num_key_value_heads=max(1, hidden // 64),
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config)
    reward = folder.with_name("reward")
    for made, where in ((model, folder), (scalar_from(model, tokenizer), reward)):
        made.save_pretrained(where)
        tokenizer.save_pretrained(where)


def prefopt_run(model: Path, output: Path, prompts: list[str], given: argparse.Namespace) -> dict[str, Any]:
    """Steps of ``prefopt ppo``: samples per second, shares of time, bytes per model."""
    import prefopt

    prefopt.ppo(
        model,
        [{"prompt": prompt} for prompt in prompts],
        reward=model.with_name("reward"),
        output=output,
        batch_size=given.batch,
        num=given.num,
        max_new_tokens=given.tokens,
        epochs=given.steps * given.batch / len(prompts),
        algorithm=given.algorithm,
        threads=given.threads,
        progress="none",
    )
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()][1:]
    whole = sum(line["step_seconds"] for line in lines)
    return {
        "samples_per_second": statistics.median(line["eps"] for line in lines),
        "tokens_per_second": sum(line["val/length"] * line["eps"] * line["step_seconds"] for line in lines) / whole,
        "share": {part: sum(line[f"seconds/{part}"] for line in lines) / whole for part in PARTS},
        "bytes": json.loads((output / "run.json").read_text())["memory"],
        "peak_bytes": lines[-1]["peak_memory_bytes"],
    }


def trl_run(python: str, model: Path, output: Path, prompts: list[str], given: argparse.Namespace) -> dict[str, Any]:
    """The same by TRL, in the interpreter's own environment."""
    asked = {
        "model": str(model),
        "reward": str(model.with_name("reward")),
        "output": str(output),
        "prompts": prompts,
        "batch": given.batch * given.num,
        "num": given.num,
        "tokens": given.tokens,
        "steps": given.steps,
        "threads": given.threads,
    }
    script = Path(__file__).with_name("trl_ppo.py")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([python, str(script), json.dumps(asked)], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"TRL in {python} failed:\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Run and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name, value in {"hidden": 512, "layers": 8, "batch": 32, "num": 1, "tokens": 64, "steps": 6}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--algorithm", choices=("ppo", "rloo"), default="ppo")
    parser.add_argument("--trl", metavar="PYTHON", help="interpreter of an environment with trl==0.29")
    given = parser.parse_args()
    prompts = [f"{i:04d}" + "x" * (given.prompt_tokens - 4) for i in range(given.batch)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model", given.hidden, given.layers)
        found = {"settings": vars(given), "prefopt": prefopt_run(folder / "model", folder / "out", prompts, given)}
        if given.trl:
            found["trl"] = trl_run(given.trl, folder / "model", folder / "trl", prompts, given)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
