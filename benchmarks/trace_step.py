"""How much of prefopt one training step enters: files and functions of a checkout's src/prefopt.

    python benchmarks/trace_step.py [CHECKOUT] [dpo|sft|reward|ppo] [--list]

Runs one step on a tiny random model with cold caches, in this process, under the standard library's profiler hook
(``sys.setprofile``, for helper threads too). Files and functions are counted once each, those of helper threads
included; what is imported without being called is not counted. Compare two checkouts with the same interpreter.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
import tempfile
import threading
from pathlib import Path
from types import FrameType
from typing import Any

COMPREHENSIONS = ("<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>")
ROWS = [{"prompt": f"question {i}: ", "chosen": f"good {i}", "rejected": f"bad {i} indeed"} for i in range(8)]


def tiny_model(folder: Path) -> str:
    """A Llama of two layers and a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*alphabet, "<end>"])}, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(alphabet) + 1, max_position_embeddings=256, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<end>").save_pretrained(folder)
    return str(folder)


def words(method: str, model: str, folder: Path) -> list[str]:
    """The command line of one step."""
    data = folder / "rows.jsonl"
    rows = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in ROWS] if method == "sft" else ROWS
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["--model", model, "--output", str(folder / "out"), "--max-steps", "1", "--batch-size", "4"]
    common += ["--dtype", "float32", "--device", "cpu", "--progress", "none"]
    if method == "ppo":
        return ["ppo", *common, "--prompts", str(data), "--reward", "length", "--max-new-tokens", "8", "--num", "2"]
    return [method, *common, "--data", str(data)]


def traced(package: str, run: Any) -> set[tuple[str, str, int]]:
    """The functions of files below ``package`` that ``run`` enters: (file, name, line)."""
    entered: set[tuple[str, str, int]] = set()

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            code = frame.f_code
            # Class bodies and modules run once at import; comprehensions belong to their function.
            function = code.co_flags & inspect.CO_OPTIMIZED and code.co_name not in COMPREHENSIONS
            if function and code.co_filename.startswith(package):
                entered.add((code.co_filename[len(package) :], code.co_qualname, code.co_firstlineno))

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    return entered


def main() -> None:
    """Trace and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkout", nargs="?", default=str(Path(__file__).resolve().parents[1]))
    parser.add_argument("method", nargs="?", default="dpo", choices=("dpo", "sft", "reward", "ppo"))
    parser.add_argument("--list", action="store_true", help="print the files with the number of functions entered")
    given = parser.parse_args()
    source = str(Path(given.checkout).resolve() / "src")
    sys.path.insert(0, source)
    with tempfile.TemporaryDirectory() as place:
        os.environ |= {"PREFOPT_CACHE": f"{place}/cache", "HF_HUB_OFFLINE": "1"}
        command = words(given.method, tiny_model(Path(place) / "model"), Path(place))
        from prefopt.cli import main as prefopt

        entered = traced(f"{source}/prefopt/", lambda: prefopt(command))
        if not (Path(place) / "out" / "metrics.jsonl").exists():
            raise SystemExit("the step did not run")
    files: dict[str, int] = {}
    for file, _, _ in entered:
        files[file] = files.get(file, 0) + 1
    if given.list:
        for file, many in sorted(files.items()):
            print(f"{many:5d} {file}")
    print(f"{given.method}: {len(files)} files, {len(entered)} functions")


if __name__ == "__main__":
    main()
