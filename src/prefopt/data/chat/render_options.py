"""How conversations become tokens, as plain values: what a worker process is handed and a cache key is made of.

>>> Rendering(max_length=512, variables={"enable_thinking": False}).reasoning
'keep'
>>> Rendering(max_length=512).digest() == Rendering(max_length=256).digest()
False
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from prefopt.config.data import RenderOptions
from prefopt.core.options import nearest
from prefopt.data.chat import sandbox
from prefopt.data.chat.truncate import check_max_length
from prefopt.errors import ConfigError

FILLED_IN = (
    "messages",
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "bos_token",
    "eos_token",
    "pad_token",
    "unk_token",
)
_PYTHON_SPELLING = {"True": True, "False": False, "None": None}


@dataclass(frozen=True)
class Rendering:
    """Everything beside the tokenizer and the rows that decides on tokens. Plain and picklable.

    ``max_length`` bounds prompt and response together. ``add_eos`` ends answers with EOS where no template does.
    ``chat_template`` is the text of a template to use instead of the tokenizer's, ``variables`` are given to either.
    ``train_on``: the answers, or every token. ``windows``: a text without a prompt that is too long becomes several
    groups, of lengths as equal as can be, where other rows are truncated.
    ``reasoning`` says whether reasoning blocks of the assistant are kept or stripped. ``date`` is what templates show
    that ask for today's: one for all processes of a run.
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
            raise ConfigError(
                f"rendering takes plain values, as JSON has them, and a date as 2026-11-23: {error}"
            ) from None

    @classmethod
    def from_options(cls, options: RenderOptions, max_length: int | None = None, **more: Any) -> Rendering:
        """What the options say, with ``--chat-template`` read; ``max_length`` is what the run decided on.

        ``more`` are further fields.

        Raises :class:`ConfigError` for a template that cannot be read or is no Jinja, and for variables that are not
        NAME=VALUE. Whether the template reads them is checked where it is known, in :class:`ChatTemplate`.
        """
        template = None if options.chat_template is None else read_template(options.chat_template)
        variables = parse_variables(options.template_variables or ())
        return cls(max_length, True, template, variables, options.reasoning, **more)

    def digest(self) -> str:
        """16 bytes in hexadecimal that name these values, the same in every process.

        The date is left out: whether it counts depends on the template.
        :meth:`prefopt.data.chat.render.Renderer.digest` covers that too, and the tokenizer with its template.
        """
        values = {name: value for name, value in asdict(self).items() if name != "date"}
        text = json.dumps(values, sort_keys=True, ensure_ascii=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def read_template(path: str) -> str:
    """The text of a chat template: a Jinja file, or the ``chat_template`` of a ``tokenizer_config.json``.

    Raises :class:`ConfigError` in one line for a file that cannot be read and for a syntax error, with its line.
    """
    name = f"--chat-template {path}"
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: is not UTF-8 (byte {error.start + 1}); save it as UTF-8") from None
    except FileNotFoundError:
        raise ConfigError(f"{name}: no such file; check the path") from None
    except OSError as error:
        what = "is a folder; name the file in it" if Path(path).is_dir() else f"cannot be read: {error.strerror}"
        raise ConfigError(f"{name}: {what}") from None
    if path.endswith(".json"):
        text = _from_tokenizer_config(name, text)
    if not text.strip():
        raise ConfigError(f"{name}: is empty; it should hold a Jinja template")
    if reason := sandbox.syntax_error(text):
        raise ConfigError(f"{name}: is no Jinja template: {reason}")
    return text


def _from_tokenizer_config(name: str, text: str) -> str:
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{name}: is not JSON at line {error.lineno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name}: is not readable as JSON: {error}") from None
    template = config.get("chat_template") if isinstance(config, dict) else None
    if not isinstance(template, str):
        raise ConfigError(f"{name}: holds no text chat_template, as a tokenizer_config.json does; give a Jinja file")
    return template


def parse_variables(given: Sequence[str]) -> dict[str, object]:
    """NAME=VALUE as a dict; a value is JSON where it is JSON, else text. ``True`` and ``False`` count as JSON.

    >>> parse_variables(["enable_thinking=false", "date_string=26 Jul 2024"])
    {'enable_thinking': False, 'date_string': '26 Jul 2024'}

    Raises :class:`ConfigError` for what has no name, a name given twice, and names that rendering itself fills in.
    """
    variables: dict[str, object] = {}
    for item in given:
        name, equals, value = item.partition("=")
        name = name.strip()
        if not equals or not name.isidentifier():
            raise ConfigError(f"--template-variables {item!r} should be NAME=VALUE, such as enable_thinking=false")
        if name in variables:
            raise ConfigError(f"--template-variables gives {name} twice")
        variables[name] = _value(value.strip())
    check_names(variables)
    return variables


def check_names(variables: Mapping[str, object]) -> None:
    """Raise :class:`ConfigError` for a variable that rendering fills in by itself."""
    if name := next((name for name in variables if name in FILLED_IN), None):
        raise ConfigError(f"--template-variables: {name} is filled in by prefopt and cannot be given")


def check_mentioned(variables: Mapping[str, object], mentioned: Sequence[str] | frozenset[str]) -> None:
    """Raise :class:`ConfigError` for a variable that no template reads; ``mentioned`` are those it does read."""
    known = sorted(set(mentioned) - set(FILLED_IN))
    for name in variables:
        if name not in mentioned:
            rest = f"; it reads {', '.join(known)}" if known else "; it reads none"
            raise ConfigError(
                f"--template-variables: the chat template never reads {name}{nearest(name, known) or rest}"
            )


def _value(text: str) -> object:
    if text in _PYTHON_SPELLING:
        return _PYTHON_SPELLING[text]

    def no_number(name: str) -> object:
        raise ValueError(name)

    try:
        return json.loads(text, parse_constant=no_number)
    except (ValueError, RecursionError):
        return text
