"""What a caller may give in place of names: models, rows and functions."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from prefopt.errors import ConfigError

NAME = (str, os.PathLike)


def plain(value: object) -> object:
    """A mapping as a list of NAME=VALUE; anything else as it is."""
    return [f"{name}={item}" for name, item in value.items()] or None if isinstance(value, Mapping) else value


def check_tokenizer(function: str, named: bool, tokenizer: object) -> None:
    """Raises :class:`ConfigError` for a model object without a tokenizer, and for a tokenizer of a model by name."""
    if named and tokenizer is not None:
        raise ConfigError("tokenizer goes with a model object; a model named by its folder brings its own")
    if not named and tokenizer is None:
        raise ConfigError(f"a model object needs its tokenizer: prefopt.{function}(model, tokenizer=tokenizer, ...)")


def labelled(models: Mapping[str, Any], reference: Any) -> tuple[dict[str, str], dict[str, Any]]:
    """A label for each argument that was given, and the model objects by label.

    Objects of the same name, as before and after training, have their argument in the label.
    """
    given = {name: model for name, model in {**models, "reference": reference}.items() if model is not None}
    named = {name: isinstance(model, NAME) for name, model in given.items()}
    labels = {name: os.fspath(m) if named[name] else name_of(m) for name, m in given.items()}
    alike = {name for name in labels if not named[name] and list(labels.values()).count(labels[name]) > 1}
    labels = {name: f"{label} ({name})" if name in alike else label for name, label in labels.items()}
    return labels, {labels[name]: given[name] for name in given if not named[name]}


def refuse(options: Mapping[str, Any], *names: str) -> None:
    """Options that say how a model is loaded do nothing for an object."""
    for name in names:
        if options.get(name):
            raise ConfigError(f"{name} is for a model named by its folder; this one is an object, used as it is")


def function_name(function: Any, taken: Collection[str]) -> str:
    """The name of a function in a configuration: ``name()`` where the option means another thing by ``name``, one of
    those that are ``taken``."""
    name = str(getattr(function, "__qualname__", "function given in Python"))
    return f"{name}()" if name in taken else name


def name_of(model: object) -> str:
    return str(getattr(model, "name_or_path", "")) or "model given in Python"


def names_or_rows(data: object) -> tuple[object, list[Mapping[str, object]] | None]:
    """What the config holds as ``data``, and the rows if rows were given."""
    if isinstance(data, NAME):
        return data, None
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise ConfigError("data must be names of files, or a list of rows (dicts)")
    from prefopt.data.files.hub import dataset_rows, is_dataset

    items: list[Any] = list(dataset_rows(data, "data") if is_dataset(data) else data)
    rows = [item for item in items if isinstance(item, Mapping)]
    if rows and len(rows) < len(items):
        raise ConfigError("data mixes rows and names of files: give one or the other")
    return (["rows given in Python"], rows) if rows else (items, None)
