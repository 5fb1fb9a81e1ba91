"""A run whose ``--model`` is an adapter's folder: the same as with its base and ``--adapter``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from prefopt.config.model import ADAPTER_SHAPE, FILLED, ModelOptions
from prefopt.disk.adapter_folder import base_of, is_adapter
from prefopt.errors import ConfigError
from prefopt.model.load import base_and_adapter, local_folder
from prefopt.model.named import adapter_line

Config = TypeVar("Config")


def with_base(config: Config, say: Callable[[str], None] | None = None) -> Config:
    """The config with an adapter that ``model`` or ``reference`` names in its own option, and the base in its place.

    ``say`` is told where ``model`` is one.

    Raises :class:`ConfigError` where an adapter is named beside, :class:`ModelError` where one names no base.
    """
    if say is not None and (line := adapter_line(getattr(config, "model"))):  # noqa: B009 - of any config
        say(line)
    for name, option in (("model", "adapter"), ("reference", "reference_adapter")):
        model = getattr(config, name, None)
        if model is None or not hasattr(config, option) or not is_adapter(source := local_folder(model)):
            continue
        if (other := getattr(config, option)) is not None:
            raise ConfigError(f"--{name} {model} is an adapter itself: leave {other} out, or name the model of both")
        base_and_adapter(model)  # a base that is not there is told together with its adapter
        changed: dict[str, Any] = {name: base_of(source), option: model}
        if isinstance(config, ModelOptions) and name == "model":
            # A name on the Hub is not known for an adapter's when defaults are filled in.
            changed |= {shape: None for shape in ADAPTER_SHAPE if getattr(config, shape) == FILLED.get(shape)}
        config = replace(config, **changed)  # type: ignore[type-var]
    return config
