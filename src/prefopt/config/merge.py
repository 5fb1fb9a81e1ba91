"""What ``prefopt merge`` reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prefopt.config.option import check_all, option
from prefopt.disk.adapter_folder import is_adapter
from prefopt.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """A model and the adapter that becomes part of it. ``model`` alone may be an adapter: it is then moved there."""

    adapter: str = option(
        None,
        "LoRA adapter to fold in: a folder, or a name on the Hugging Face Hub",
        group="model",
        default_text="--model, where that is an adapter",
    )
    model: str | None = option(
        None, "model that the adapter belongs to", group="model", default_text="the one that the adapter names"
    )
    output: str = option(help="folder to write the whole model to", group="output")
    dtype: Literal["float32", "bfloat16", "float16"] = option(
        "float32",
        "type of the saved weights; those of two bytes halve the folder, and round away the part of a small change"
        " that the command tells",
        group="output",
    )
    device: str | None = option(
        None, "cpu, cuda, cuda:N or mps", group="machine", default_text="cuda, then mps, where there is one, else cpu"
    )

    def __post_init__(self) -> None:
        check_all(self)
        if self.adapter is None:
            if self.model is None or not is_adapter(self.model):
                raise ConfigError("--adapter is missing: LoRA adapter to fold in, a folder or a name on the Hub")
            object.__setattr__(self, "adapter", self.model)
            object.__setattr__(self, "model", None)
