"""Adapters named in the place of models: options with the base in its place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from prefopt.config.training import ADAPTER_SHAPE, FILLED, ModelOptions
from prefopt.core.model_folder import base_of, is_adapter, quantisation_on_record
from prefopt.errors import ConfigError
from prefopt.model.load import base_and_adapter, local_folder
from prefopt.reference.identity import adapter_line

Config = TypeVar("Config")


def with_base(config: Config, say: Callable[[str], None] | None = None) -> Config:
    """Where ``model`` or ``reference`` is an adapter, move it to its own option and put its base in its place. A base
    that was quantised in the training of ``adapter`` is so again, unless ``quantise`` says otherwise.

    Raises :class:`ConfigError` where that option is set too, :class:`ModelError` where the adapter names no base.
    """
    before: Any = config
    for name, option in (("model", "adapter"), ("reference", "reference_adapter")):
        model = getattr(config, name, None)
        if model is None or not hasattr(config, option) or not is_adapter(source := local_folder(model)):
            continue
        if (other := getattr(config, option)) is not None:
            raise ConfigError(f"--{name} {model} is an adapter itself: leave {other} out, or name the model of both")
        base_and_adapter(model)  # its error names base and adapter
        changed: dict[str, Any] = {name: base_of(source), option: model}
        if isinstance(config, ModelOptions) and name == "model":
            # When defaults were filled in, a name on the Hub was not known to be an adapter's.
            changed |= {shape: None for shape in ADAPTER_SHAPE if getattr(config, shape) == FILLED.get(shape)}
        config = replace(config, **changed)  # type: ignore[type-var]
    adapter, quantise = getattr(config, "adapter", None), getattr(config, "quantise", None)
    if adapter is not None and quantise is None and (quantise := quantisation_on_record(local_folder(adapter))):
        config = replace(config, quantise=quantise)  # type: ignore[type-var]
    if say is not None and (line := adapter_line(before.model, adapter, quantise)):
        say(line)
    return config
