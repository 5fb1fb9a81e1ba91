"""Options that decide how conversations become tokens, as plain values for worker processes and cache keys.

>>> Rendering(max_length=512, variables={"enable_thinking": False}).reasoning
'keep'
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from prefopt.config.data import RenderOptions
from prefopt.core.options import nearest
from prefopt.data.chat import sandbox
from prefopt.data.chat.truncate import check_max_length
from prefopt.errors import ConfigError

# Template variables that rendering itself sets.
FILLED_IN = (
    *("messages", "tools", "add_generation_prompt", "continue_final_message"),
    *("bos_token", "eos_token", "pad_token", "unk_token"),
)
_PYTHON_SPELLING = {"True": True, "False": False, "None": None}


@dataclass(frozen=True)
class Rendering:
    """Everything beside the tokenizer and the rows that determines the tokens. Plain and picklable.

    ``max_length`` bounds prompt and response together. ``add_eos`` ends answers with EOS where the template does not.
    ``chat_template`` is the source of a template to use instead of the tokenizer's; ``variables`` are passed to either.
    ``reasoning``: whether reasoning blocks of the assistant are kept or stripped. ``train_on``: the answers, or every
    token. ``windows``: a text without a prompt that is too long becomes several groups of about equal length; other
    rows are truncated. ``date`` is shown by templates that ask for today's: one for all processes of a run.
    """

    max_length: int | None = None
    add_eos: bool = True
    chat_template: str | None = None
    variables: Mapping[str, object] = field(default_factory=dict, hash=False)
    reasoning: Literal["keep", "strip"] = "keep"
    train_on: Literal["responses", "all"] = "responses"
    windows: bool = False
    date: str = field(default_factory=lambda: datetime.date.today().isoformat())

    def __post_init__(self) -> None:
        """Raise :class:`ConfigError` for a length under 2 and for variables that are not plain values."""
        check_max_length(self.max_length)
        try:
            json.dumps(dict(self.variables), allow_nan=False)
            datetime.date.fromisoformat(self.date)
        except (TypeError, ValueError) as error:
            what = f"rendering takes plain values, as in JSON, and a date such as 2026-11-23: {error}"
            raise ConfigError(what) from None

    @classmethod
    def from_options(cls, options: RenderOptions, max_length: int | None = None, **more: Any) -> Rendering:
        """The options of a run, with the file of ``--chat-template`` read; ``more`` are further fields.

        Raises :class:`ConfigError` for a template that cannot be read or is not Jinja, and for variables that are not
        NAME=VALUE. Whether the template reads them is checked by :class:`ChatTemplate`.
        """
        template = None if options.chat_template is None else read_template(options.chat_template)
        variables = parse_variables(options.template_variables or ())
        return cls(max_length, True, template, variables, options.reasoning, **more)


def read_template(path: str) -> str:
    """The text of a chat template: a Jinja file, or the ``chat_template`` of a ``tokenizer_config.json``.

    Raises :class:`ConfigError` in one line for a file that cannot be read and for a syntax error, with its line.
    """
    name = f"--chat-template {path}"
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: is not UTF-8 (byte {error.start + 1}); save it as UTF-8") from None
    except OSError as error:
        what = "is a folder; name the file in it" if Path(path).is_dir() else f"{error.strerror}; check the path"
        raise ConfigError(f"{name}: {what}") from None
    if path.endswith(".json"):
        text = _from_tokenizer_config(name, text)
    if not text.strip():
        raise ConfigError(f"{name}: is empty; it should hold a Jinja template")
    if reason := sandbox.syntax_error(text):
        raise ConfigError(f"{name}: is not a valid Jinja template: {reason}")
    return text


def _from_tokenizer_config(name: str, text: str) -> str:
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name}: is not JSON: {error}") from None
    template = config.get("chat_template") if isinstance(config, dict) else None
    if not isinstance(template, str):
        raise ConfigError(f"{name}: holds no text chat_template, as a tokenizer_config.json does; give a Jinja file")
    return template


def parse_variables(given: Sequence[str]) -> dict[str, object]:
    """NAME=VALUE as a dict; a value is read as JSON if it is JSON, else as text. ``True``, ``False``, ``None`` too.

    >>> parse_variables(["enable_thinking=false", "date_string=26 Jul 2024"])
    {'enable_thinking': False, 'date_string': '26 Jul 2024'}

    Raises :class:`ConfigError` for an entry without a name, a name given twice, and names that rendering sets.
    """
    variables: dict[str, object] = {}
    for item in given:
        name, equals, value = item.partition("=")
        name = name.strip()
        if not equals or not name.isidentifier():
            raise ConfigError(f"--template-variables {item!r} should be NAME=VALUE, such as enable_thinking=false")
        if name in variables:
            raise ConfigError(f"--template-variables gives {name} twice; leave one out")
        variables[name] = _value(value.strip())
    check_names(variables)
    return variables


def check_names(variables: Mapping[str, object]) -> None:
    """Raise :class:`ConfigError` for a variable that rendering itself sets."""
    if name := next((name for name in variables if name in FILLED_IN), None):
        raise ConfigError(f"--template-variables: {name} is filled in by prefopt; leave it out")


def check_mentioned(variables: Mapping[str, object], mentioned: Sequence[str] | frozenset[str]) -> None:
    """Raise :class:`ConfigError` for a variable that the template never reads; ``mentioned`` are those it does."""
    known = sorted(set(mentioned) - set(FILLED_IN))
    for name in variables:
        if name not in mentioned:
            rest = nearest(name, known) or (f"; it reads {', '.join(known)}" if known else "; it reads none")
            raise ConfigError(f"--template-variables: the chat template never reads {name}{rest}")


def _value(text: str) -> object:
    if text in _PYTHON_SPELLING:
        return _PYTHON_SPELLING[text]

    def refuse(constant: str) -> object:  # NaN and Infinity, which JSON lacks
        raise ValueError(constant)

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return text
