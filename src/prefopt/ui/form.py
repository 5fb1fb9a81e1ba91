"""A form for the options of a training, made from the table of options, and the YAML file that it writes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.config.methods import METHODS, RlhfConfig
from prefopt.core.files import expanded, replace_file
from prefopt.core.options import MissingOptions, Option, WrongValue, options
from prefopt.core.words import from_words
from prefopt.core.yaml_file import write_document
from prefopt.errors import ConfigError, ConfigErrors, UserError
from prefopt.methods.early_checks import check_before_torch
from prefopt.runs.history import History
from prefopt.runs.settings import set_options, shown

CHAIN = "rlhf"
VERBS: Mapping[str, type[Any]] = {name: method.config for name, method in METHODS.items()} | {CHAIN: RlhfConfig}
"""Commands that the form starts, and their options."""
HELPS = {name: method.help for name, method in METHODS.items()} | {CHAIN: "run the chain SFT, reward model, PPO"}
OF_THE_PAGE = ("dry_run", "resume", "overwrite", "progress")
"""Options that its buttons give."""
PATHS = (
    *("model", "adapter", "reference", "reference_adapter", "teacher", "teacher_adapter", "reward", "true_reward"),
    *("data", "eval_data", "prompts", "eval_prompts", "ptx_data", "chat_template", "judge_prompt", "rollout_folder"),
    *("study", "sft", "ppo"),
)
"""Options that may name files or folders."""
MAIN = (
    *("model", "data", "prompts", "reward", "teacher", "output", "loss", "beta", "lora", "learning_rate", "epochs"),
    *("batch_size", "max_steps", "eval_fraction", "max_length", "max_new_tokens"),
)
"""Options that come first, with those that are required; the groups of the others are folded."""


@dataclass(frozen=True, slots=True)
class Field:
    """An option on the page. ``kind`` is its control: choice, list, number or text; ``value`` is its text."""

    option: Option
    value: str
    problem: str

    @property
    def kind(self) -> str:
        kinds = self.option.kinds
        if bool in kinds or (self.option.choices and len(kinds) == 1):
            return "choice"
        if list[str] in kinds:
            return "list"
        return "text" if str in kinds or self.option.choices else "number"

    @property
    def choices(self) -> tuple[str, ...]:
        return ("true", "false") if bool in self.option.kinds else self.option.choices


@dataclass(frozen=True, slots=True)
class OptionGroup:
    """Fields of one group of options; ``open``: unfolded at first."""

    name: str
    fields: tuple[Field, ...]
    open: bool


@dataclass(frozen=True, slots=True)
class Filled:
    """What a form says: ``config`` where it is right, else ``problems`` by option, ``""`` for those of none."""

    verb: str
    values: Mapping[str, Any]
    config: Any
    problems: Mapping[str, str]


def groups_of(verb: str, texts: Mapping[str, str], problems: Mapping[str, str]) -> list[OptionGroup]:
    """The fields of a command by group, with their texts: first, in a group without a name, the main ones."""
    found: dict[str, list[Field]] = {"": []}
    for o in options(VERBS[verb]):
        if o.name not in OF_THE_PAGE:
            group = "" if o.required or o.name in MAIN else o.group
            found.setdefault(group, []).append(Field(o, texts.get(o.name, ""), problems.get(o.name, "")))
    found[""].sort(key=lambda f: (not f.option.required, MAIN.index(f.option.name) if f.option.name in MAIN else -1))
    return [
        OptionGroup(name, tuple(many), not name or any(f.value or f.problem for f in many))
        for name, many in found.items()
    ]


def filled(verb: str, texts: Mapping[str, str], base: Path) -> Filled:
    """Check what a form says as the command line would, before anything slow. An empty field is left to its default."""
    values: dict[str, Any] = {}
    problems: dict[str, str] = {}
    for o in options(VERBS[verb]):
        text = texts.get(o.name, "").strip()
        if text and o.name not in OF_THE_PAGE:
            many = [line.strip() for line in text.splitlines() if line.strip()]
            values[o.name] = from_words(o, many if list[str] in o.kinds else [text])
    config = None
    try:
        config = VERBS[verb].from_dict(values)
        _check_output(config, base)
        check_before_torch(config)
    except MissingOptions as error:
        problems |= {o.name: f"{o.flag} is missing" for o in error.missing}
    except WrongValue as error:
        problems[error.option.name] = str(error)
    except ConfigErrors as error:
        problems[""] = "\n".join(error.lines)
    except UserError as error:
        problems[_named(verb, str(error))] = str(error)
    return Filled(verb, values, None if problems else config, problems)


def _named(verb: str, message: str) -> str:
    """The option that a message begins with, if it begins with one."""
    word = message.split(maxsplit=1)[0].rstrip(":") if message else ""
    return next((o.name for o in options(VERBS[verb]) if o.flag == word), "")


def _check_output(config: Any, base: Path) -> None:
    folder, here = expanded(config.output).resolve(), base.resolve()
    if folder == here or not folder.is_relative_to(here):
        raise ConfigError(f"--output {config.output} is not below {base}, the folder of this page: name one there")


def document(found: Filled) -> str:
    """The YAML file of a form."""
    return write_document(VERBS[found.verb], found.values)


def file_of(config: Any) -> Path:
    """Where the YAML file of a run goes: beside its output folder."""
    folder = expanded(config.output)
    return folder.with_name(f"{folder.name}.yaml")


def write_file(found: Filled, *, replace: bool) -> Path:
    """Write the YAML file. Raises :class:`ConfigError` where another one is there, unless it is to be replaced."""
    path, data = file_of(found.config), document(found).encode()
    if path.exists() and path.read_bytes() != data and not replace:
        raise ConfigError(f"{path} exists and holds other options: replace it, or name another --output")
    try:
        replace_file(path, data)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); name another --output") from error
    return path


def texts_of_run(run: History) -> dict[str, str]:
    """A form with the options of a run, for another one like it: paths in full, since this server may have another
    working folder. The output folder is left open."""
    required = {o.name for o in options(VERBS[run.method]) if o.required}
    values = {n: v for n, v in run.options.items() if n in required} | set_options(run)
    if (here := run.working_folder) is not None:
        values |= {n: _in_full(values[n], here) for n in PATHS if n in values}
    return {n: as_text(v) for n, v in values.items() if v is not None and n not in ("output", *OF_THE_PAGE)}


def _in_full(value: Any, here: Path) -> Any:
    """Names of files and folders that are there, in full; others, such as those of the Hub, as they are."""
    if isinstance(value, list):
        return [_in_full(one, here) for one in value]
    if not isinstance(value, str) or not value or value.startswith("~"):
        return value
    return str(here / value) if os.path.exists(here / value) else value  # noqa: PTH110  # no error for a long text


def as_text(value: Any) -> str:
    """The value of an option as it stands in a field: a list has a line each.

    >>> as_text(["a.jsonl", "b.jsonl"]), as_text(1e-5), as_text(True)
    ('a.jsonl\\nb.jsonl', '1e-5', 'true')
    """
    many: Sequence[Any] = value if isinstance(value, list) else [value]
    return "\n".join(map(shown, many))
