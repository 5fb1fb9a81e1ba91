"""What functions take: names or objects."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Name: TypeAlias = str | PathLike[str]
    """A file, a folder, or a name on the Hub."""
    Names: TypeAlias = Name | Sequence[Name] | Mapping[str, object]
    """One name or several; a mapping is taken for NAME=VALUE."""
    Model: TypeAlias = Name | PreTrainedModel
    Tokenizer: TypeAlias = PreTrainedTokenizerBase
    Data: TypeAlias = Name | Sequence[Name] | Iterable[Mapping[str, object]]
    """Names of files, or rows as such files hold them."""
    Scores: TypeAlias = Callable[[Sequence[str], Sequence[str]], Sequence[float]]
    """A function of prompts and responses that gives a number for each."""
