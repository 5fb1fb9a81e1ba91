"""What ``prefopt export`` reads.

>>> ExportConfig(model="runs/dpo", output="aligned", to="gguf").dtype
'float16'
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prefopt.core.options import Config, flag, option
from prefopt.errors import ConfigError

Format = Literal["merged", "gguf", "vllm-lora", "reward-server", "ollama"]
Dtype = Literal["float32", "bfloat16", "float16", "q8_0"]
GGUF = ("gguf", "ollama")
"""Formats whose weights are in a GGUF file."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Config):
    """A model, and the form in which a server takes it. Construction raises ``ConfigError``."""

    model: str = option(
        help="model or adapter to export: a folder, or a name on the Hugging Face Hub", group="model", positional=True
    )
    adapter: str | None = option(None, "LoRA adapter on the model; it is merged, but for --to vllm-lora")
    output: str = option(help="folder for the export, which must be new or empty", group="output", positional=True)
    to: Format = option(
        help="merged: a folder without an adapter, for every server; gguf: a file for llama.cpp; ollama: that file with"
        " a Modelfile; vllm-lora: the adapter as vLLM loads it beside its model; reward-server: a reward model as vLLM"
        " serves it"
    )
    dtype: Dtype | None = option(
        help="type of the matrices' weights; q8_0 (8 bits and a scale for every 32) is for GGUF",
        computed=lambda c: None if c.to == "vllm-lora" else "float16" if c.to in GGUF else "float32",
        default_text="float16 in GGUF, float32 in folders; an adapter keeps its own",
    )
    converter: str | None = option(
        None,
        "llama.cpp's convert_hf_to_gguf.py, a path, to write the GGUF file",
        default_text="where prefopt cannot write the architecture: the one on PATH",
    )
    prompts: list[str] | None = option(
        None,
        "files of prompts to compare log-probabilities on, before and after: lines of text, or rows in any layout; the"
        " first 32 are taken",
        default_text="32 texts that ship with prefopt",
    )
    device: str | None = option(
        None, "cpu, cuda, cuda:N or mps", group="machine", default_text="the first available of cuda, mps and cpu"
    )

    def check(self) -> None:
        if self.to not in GGUF:
            if self.converter is not None:
                raise ConfigError(f"--converter writes GGUF files, which --to {self.to} does not: leave it out")
            if self.dtype == "q8_0":
                raise ConfigError(f"--dtype q8_0 is a type of GGUF files, which --to {self.to} does not write")
        if self.to == "vllm-lora" and self.dtype is not None:
            raise ConfigError(f"{flag('dtype')} is read for whole models; an adapter keeps its own: leave it out")
