"""llama.cpp where the user has it: its converter, which knows more architectures, and its runtime, which scores."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefopt.errors import RunError
from prefopt.export.scores import Floats, Prompts, picked

_OUTTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "q8_0": "q8_0"}
RUNTIME = {"float32": 0.01, "float16": 0.03, "bfloat16": 0.1, "q8_0": 0.1}
"""Mean difference in nats per token that llama.cpp's kernels explain beyond rounding of the weights: it rounds
activations to the type of the weights too, and looks GELU up in a table in float16."""
F32 = 0
"""ggml's number of the type float32, for keys and values."""


def convert(converter: Path, folder: Path, output: Path, dtype: str) -> None:
    """Let llama.cpp's converter write ``folder`` to ``output``. Raises :class:`RunError` where it fails."""
    words = [str(converter), str(folder), "--outfile", str(output), "--outtype", _OUTTYPES[dtype]]
    if converter.suffix == ".py" or not os.access(converter, os.X_OK):
        words = [sys.executable, *words]
    ended = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if ended.returncode or not output.is_file():
        last = (ended.stderr.strip() or ended.stdout.strip() or "it says nothing").splitlines()[-1][:200]
        raise RunError(f"--converter {converter} ended with status {ended.returncode}: {last}")


def has_runtime() -> bool:
    """Whether llama-cpp-python is installed."""
    return importlib.util.find_spec("llama_cpp") is not None


class LlamaCpp:
    """A GGUF file in llama.cpp, on the CPU, keys and values in float32. ``name``: with the version."""

    def __init__(self, path: Path, context: int) -> None:
        """Raises :class:`RunError` where llama.cpp does not load the file."""
        import llama_cpp

        self.name = f"llama.cpp (llama-cpp-python {importlib.metadata.version('llama_cpp_python')})"
        threads = int(os.environ.get("OMP_NUM_THREADS", "0")) or os.cpu_count() or 1
        wide: dict[str, Any] = {"type_k": F32, "type_v": F32, "logits_all": True, "n_threads": threads}
        try:
            self._model: Any = llama_cpp.Llama(
                str(path),
                n_ctx=context,
                n_batch=context,
                n_gpu_layers=0,
                n_threads_batch=threads,
                verbose=False,
                **wide,
            )
        except ValueError as error:
            raise RunError(f"{path}: llama.cpp does not load it ({error}); do not use it, and report this") from None

    def logprobs(self, ids: Sequence[Sequence[int]]) -> list[Floats]:
        """Log-probability of every token but the first of each sequence."""
        found = []
        for row in ids:
            self._model.reset()
            self._model.eval(list(row))
            found.append(picked(self._model.scores[: len(row) - 1], row))
        return found

    def tokenised(self, prompts: Prompts) -> int:
        """Prompts of which llama.cpp makes the same tokens."""
        made = (
            self._model.tokenize(text.encode(), add_bos=not prompts.chat, special=prompts.chat)
            for text in prompts.texts
        )
        return sum(list(found)[: len(ids)] == ids for found, ids in zip(made, prompts.ids, strict=True))

    def close(self) -> None:
        """Free the model."""
        self._model.close()
