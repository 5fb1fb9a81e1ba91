"""The commands that serve an export, and the README and JSON beside it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import prefopt
from prefopt.core.files import output_errors, write_json
from prefopt.core.shown import ShownLines
from prefopt.core.terminal import visible
from prefopt.export.scores import Scored

REPORT = "export.json"
README = "README.md"


@dataclass(frozen=True, repr=False)
class ExportedModel(ShownLines):
    """What an export wrote. ``files``: weights and what belongs to them. ``commands``: how each server is started, by
    its name. ``notes``: what differs from the model that was trained, or must be known to serve it."""

    output: Path
    to: str
    dtype: str | None
    commands: dict[str, list[str]]
    scored: list[Scored] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The lines that ``prefopt export`` prints."""
        lines = [score.line() for score in self.scored]
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"{server}: {shlex.join(words)}" for server, words in self.commands.items()]
        return [*lines, f"written: {self.output}"]

    def write(self, model: str) -> None:
        """Write ``README.md`` (below a model card, where there is one) and ``export.json``."""
        body = [f"## Serve it ({self.to})", ""]
        for server, words in self.commands.items():
            body += [f"With {server}:", "", "```bash", shlex.join(words), "```", ""]
        body += [f"- {note}." for note in self.notes] + [""] * bool(self.notes)
        body += ["## Is it the same model?", ""]
        body += [f"- {score.line()}." for score in self.scored] or ["- It was not scored."]
        path = self.output / README
        with output_errors(path):
            head = path.read_text("utf-8").rstrip() if path.is_file() else f"# {self.output.resolve().name}"
            said = f"ExportedModel from `{Path(model).name}` by prefopt {prefopt.__version__}."
            path.write_text(visible("\n".join([head, "", said, "", *body])).rstrip() + "\n", "utf-8")
        write_json(self.output / REPORT, self.to_dict(model))

    def to_dict(self, model: str) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {
            "model": model,
            "to": self.to,
            "dtype": self.dtype,
            "prefopt": prefopt.__version__,
            "scored": [score.to_dict() for score in self.scored],
            "commands": self.commands,
            "notes": self.notes,
        }


def merged_commands(folder: str, dtype: str) -> dict[str, list[str]]:
    """vLLM and TGI for a whole model; one in float32 is served in bfloat16, as models of its size are."""
    served = "bfloat16" if dtype == "float32" else dtype
    return {
        "vLLM": ["vllm", "serve", folder, "--served-model-name", "aligned", "--dtype", served],
        "TGI": ["text-generation-launcher", "--model-id", folder, "--dtype", served],
    }


def lora_commands(base: str, folder: str, rank: int, *, ends: bool, text: Sequence[str] = ()) -> dict[str, list[str]]:
    """vLLM for an adapter on its model. ``ends``: the folder's generation config has the end tokens of answers;
    ``text``: options that name its own chat template or tokenizer."""
    words = ["vllm", "serve", base, "--enable-lora", "--lora-modules", f"aligned={folder}"]
    words += ["--max-lora-rank", str(rank), *text]
    return {"vLLM": [*words, *(["--generation-config", folder] if ends else [])]}


def reward_commands(folder: str, dtype: str) -> dict[str, list[str]]:
    """vLLM for a sequence classifier, without the sigmoid that it puts on one label."""
    raw = ["--pooler-config", '{"use_activation": false}']
    return {
        "vLLM": [
            "vllm",
            "serve",
            folder,
            "--runner",
            "pooling",
            "--served-model-name",
            "reward",
            "--dtype",
            dtype,
            *raw,
        ]
    }


def gguf_commands(file: str, context: int | None) -> dict[str, list[str]]:
    """llama.cpp for a GGUF file."""
    size = ["--ctx-size", str(context)] if context else []
    return {"llama.cpp": ["llama-server", "--model", file, *size, "--jinja", "--port", "8080"]}


def ollama_commands(modelfile: str) -> dict[str, list[str]]:
    """Ollama for a Modelfile."""
    return {"Ollama": ["ollama", "create", "aligned", "-f", modelfile]}


def paragraphs(notes: Sequence[str | None]) -> list[str]:
    """The notes that there are."""
    return [note for note in notes if note]
