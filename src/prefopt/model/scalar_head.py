"""Trained scalar heads in model folders, told from the weights: what a folder is does not hang on the class it names.

Trainers write reward models and value functions under classes and names of their own: ``score`` (transformers' sequence
classifiers), ``value_head`` (OpenRLHF), ``v_head.summary`` (TRL; LLaMA-Factory puts it into a file of its own).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from prefopt.errors import ModelError
from prefopt.model.checkpoint import Checkpoint, Stored, headers

_BESIDE = "value_head.safetensors"
NAMES = re.compile(r"^(score|value_head|v_head|reward_head|regression_head|regression_layer|rm_head)\.")


@dataclass(frozen=True, slots=True)
class ScalarHead:
    """The tensors [by name] of a head in a folder that is not transformers' own model of it."""

    folder: Path
    tensors: dict[str, Stored]

    @property
    def weight(self) -> str:
        """The name of its weight, or of the first of several."""
        return next((n for n in self.tensors if n.endswith("weight")), next(iter(self.tensors)))

    @property
    def beside_a_language_model(self) -> bool:
        """Whether such a head is put beside the head of a language model, and not in its place."""
        return self.weight.startswith("v_head.")

    def read(self, width: int) -> tuple[torch.Tensor, float]:
        """Its weight [1, width] and its bias. Raises :class:`ModelError` where it is another kind of head."""
        bias = self.weight.removesuffix("weight") + "bias"
        shapes = {name: stored.shape for name, stored in self.tensors.items()}
        rest = [name for name in shapes if name not in (self.weight, bias)]
        wrong = self.weight if shapes[self.weight] != (1, width) else bias
        if rest or wrong == self.weight or math.prod(shapes.get(bias, ())) != 1:
            what = f"{rest[0]} beside {self.weight}" if rest else f"{wrong} {list(shapes[wrong])}"
            raise ModelError(
                f"{self.folder}: its scalar head is not linear from {width} numbers to one ({what}); take a reward"
                " model with a head of that shape, or remove those tensors to begin with a new one"
            )
        return self._tensor(self.weight), float(self._tensor(bias)) if bias in shapes else 0.0

    def _tensor(self, name: str) -> torch.Tensor:
        with safe_open(self.tensors[name].file, framework="pt") as file:
            found: torch.Tensor = file.get_tensor(name)
        return found


def scalar_head(folder: str | Path) -> ScalarHead | None:
    """The scalar head in the folder of a model, or beside an adapter; none in one without, or whose weights cannot be
    read (loading says why). Raises :class:`ModelError` where a file of the head alone cannot be."""
    try:
        tensors = dict(Checkpoint.read(folder).tensors)
    except ModelError:
        tensors = {}
    tensors |= _beside(Path(folder) / _BESIDE)
    found = {name: stored for name, stored in tensors.items() if NAMES.match(name)}
    return ScalarHead(Path(folder), found) if found else None


def _beside(file: Path) -> dict[str, Stored]:
    if not file.is_file():
        return {}
    try:
        return headers(file)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{file}: this scalar head cannot be read ({error}); copy it again, or remove it to begin with a new one"
        ) from error
