"""What a model's name stands for, where the name may be an adapter's: tokenizer, identity, and a line that says so."""

from __future__ import annotations

from prefopt.data.tokenizer import Tokenizer, has_tokenizer, load_tokenizer
from prefopt.disk.adapter_folder import base_of, is_adapter
from prefopt.model.identity import Identity, identity_of_folder
from prefopt.model.load import base_and_adapter, local_folder


def adapter_line(name: str) -> str | None:
    """What to say of a model's name that is an adapter's."""
    source = local_folder(name)
    return f"{name} is an adapter on {base_of(source)}: both are loaded" if is_adapter(source) else None


def identity_of_name(name: str, adapter: str | None = None) -> Identity:
    """The identity of a model by its name, with ``adapter`` on it where one is named, or where it is one itself."""
    base, own = base_and_adapter(name, adapter)
    return identity_of_folder(base, adapter=own)


def tokenizer_of_name(name: str, adapter: str | None = None) -> Tokenizer:
    """The tokenizer of an adapter where its folder has one, which may have more tokens; else that of its model."""
    base, own = base_and_adapter(name, adapter)
    return load_tokenizer(own if own is not None and has_tokenizer(own) else base)
