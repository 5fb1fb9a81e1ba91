"""The command line: ``prefopt COMMAND [options]``. It fills a config, and imports what the command runs only then."""

from __future__ import annotations

import errno
import logging
import math
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from prefopt import __version__
from prefopt.config import collect, tools
from prefopt.config.compare import CompareConfig
from prefopt.config.launch import LaunchConfig
from prefopt.config.methods import METHODS, RlhfConfig, method_of
from prefopt.config.sample import ChatConfig, SampleConfig
from prefopt.config.sweeps import FrontierConfig, MethodsConfig
from prefopt.core.options import Config, Option, nearest, option, options
from prefopt.core.plugins import imported
from prefopt.core.ranks import RANK_VARIABLES, check_ranks, ranks_in
from prefopt.core.terminal import complain, guarded_streams, tell
from prefopt.core.yaml_file import read_document, write_document
from prefopt.errors import ConfigError, Interrupted, UserError


@dataclass(frozen=True, slots=True)
class Verb:
    """One command. ``path``: the ``module:function`` that takes a ``config``, imported when the command runs.

    ``yaml``: options may also come from a file named by ``--config``.
    """

    help: str
    config: type[Config]
    path: str
    yaml: bool = False


ROWS: list[tuple[str, type[Config], str]] = [
    ("rlhf", RlhfConfig, "run the chain SFT, reward model, PPO; finished stages are skipped"),
    ("launch", LaunchConfig, "run a training on several GPUs, or write the job that runs it on a cluster"),
    ("frontier", FrontierConfig, "measure reward against KL for DPO, PPO and other methods on the same data"),
    ("methods", MethodsConfig, "compare cost and quality of DPO with those of reward model and PPO"),
    ("sample", SampleConfig, "draw responses from a model for a file of prompts"),
    ("chat", ChatConfig, "chat with a model in the terminal, or with two and vote for the better answer"),
    ("compare", CompareConfig, "compare two or more models on prompts: win rates with intervals"),
    ("losses", tools.LossesConfig, "list the losses, or describe one"),
    ("merge", tools.MergeConfig, "merge an adapter into its model and check that the outputs agree"),
    ("push", tools.PushConfig, "upload a finished model to the Hugging Face Hub, after confirmation"),
    ("runs", tools.RunsConfig, "list runs, describe one, or compare several"),
    ("plot", tools.PlotConfig, "plot the metrics of runs"),
    ("report", tools.ReportConfig, "write an HTML report of runs, comparisons and sweeps"),
    ("data layouts", tools.DataLayoutsConfig, "list the layouts of rows, or describe one"),
    ("data check", tools.DataCheckConfig, "count rows and report every problem; exit status 1 if there are errors"),
    ("data convert", tools.DataConvertConfig, "write rows in another layout, or as parquet"),
    ("data split", tools.DataSplitConfig, "split rows by prompt into two files"),
    ("collect new", collect.CollectNewConfig, "create a study in which people compare responses"),
    ("collect serve", collect.CollectServeConfig, "serve the voting page"),
    ("collect invite", collect.CollectInviteConfig, "create an invitation link for one annotator"),
    ("collect stats", collect.CollectStatsConfig, "print progress and agreement"),
    ("collect export", collect.CollectExportConfig, "write votes as pairs, rankings or soft labels to train on"),
    ("collect import", collect.CollectImportConfig, "add items to a study"),
    ("collect check", collect.CollectCheckConfig, "check a study against its digests"),
    ("collect backup", collect.CollectBackupConfig, "copy a study, also while it is served"),
    ("cache list", tools.CacheListConfig, "list cached log-probabilities, tokenised data and samples"),
    ("cache verify", tools.CacheVerifyConfig, "check the cache against its checksums"),
    ("cache clear", tools.CacheClearConfig, "delete the cache, or entries of it"),
    ("env", tools.EnvConfig, "print versions, devices, folders and missing packages, for bug reports"),
    ("score", tools.ScoreConfig, "score responses by a rule, a reward model or your own function"),
    ("demo", tools.DemoConfig, "run the demonstration, offline, in a few minutes"),
]
WITH_YAML = {"rlhf", "frontier", "methods", "sample", "collect new"}
PATHS = {
    "rlhf": "prefopt.methods.rlhf:run",
    "chat": "prefopt.chat.session:chat",
    "data convert": "prefopt.data.comparisons:run_convert",
    "data split": "prefopt.data.comparisons:run_split",
}
VERBS = {m.name: Verb(m.help, m.config, m.run_path, yaml=True) for m in METHODS.values()}
for _name, _config, _help in ROWS:  # functions of cli/tools.py or cli/collect.py, named as the command is
    _module = "collect" if _name.startswith("collect ") else "tools"
    _path = PATHS.get(_name, f"prefopt.cli.{_module}:{_name.replace(' ', '_')}")
    VERBS[_name] = Verb(_help, _config, _path, _name in WITH_YAML)

# Errors of the disk and of names; any other OSError that gets here is a bug.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DISK = (*FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTDIR)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Exit status: 0; 1 if it found errors; 2 for a user error; 128 + signal if interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        with guarded_streams(), _warnings_on_stderr():
            return _dispatch(words)
    except UserError as error:
        return _complain(f"error: {error}", 2)
    except Interrupted as stop:
        return _complain(str(stop), 128 + stop.signal)
    except KeyboardInterrupt:
        return _complain("interrupted", 130)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno not in DISK:
            raise
        place = f"{error.filename}: " if error.filename else ""
        remedy = f"{'free some space, or ' if error.errno in FULL else ''}name another file or folder"
        return _complain(f"error: {place}{error.strerror}; {remedy}", 2)


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        tell(_overview(list(VERBS)))
        return 0 if words else 2
    if words[0] == "--version":
        tell(f"prefopt {__version__}")
        return 0
    name = " ".join(words[:2]) if " ".join(words[:2]) in VERBS else words[0]
    inner = [verb for verb in VERBS if verb.startswith(f"{name} ")]
    if inner and words[1:2] in (["-h"], ["--help"]):
        tell(_overview(inner))
        return 0
    if inner:
        wanted = [verb.removeprefix(f"{name} ") for verb in inner]
        guess = nearest(words[1], wanted) if len(words) > 1 else ""
        raise ConfigError(f"prefopt {name} needs one of {', '.join(wanted)} next{guess}")
    if name not in VERBS:
        kind = "option" if name.startswith("-") else "command"
        guess = nearest(name, ["--help", "--version"] if kind == "option" else [verb.split()[0] for verb in VERBS])
        raise ConfigError(f"unknown {kind} {name!r}{guess or '; see prefopt --help'}")
    return _run(name, words[len(name.split()) :])


def _run(name: str, words: list[str]) -> int:
    verb = VERBS[name]
    if {"-h", "--help"} & set(words):
        tell(help_of(name))
        return 0
    values, file, given, printing = values_of(name, words)
    if printing:
        placeholders = {o.name: "(to be given)" for o in options(verb.config) if o.required}
        verb.config.from_dict(placeholders | values, file, given)
        tell(write_document(verb.config, values | given), end="")
        return 0
    config = verb.config.from_dict(values, file, given)
    if name not in ("env", "launch"):
        check_ranks(config, method_of(config), ranks_in())
    from prefopt.methods.early_checks import check_before_torch

    check_before_torch(config)
    status = imported(verb.path)(config)
    return status if isinstance(status, int) else 0


def values_of(name: str, words: list[str]) -> tuple[dict[str, Any], str | None, dict[str, Any], bool]:
    """The options of a command: those of its YAML file, the file, those of its words, and whether to print them."""
    given = parse(name, words)
    file, printing = given.pop("config", None), given.pop("print_config", False)
    return read_document(file) if file else {}, file, given, printing


@dataclass(frozen=True, kw_only=True)
class _YamlOptions:
    """Options of commands whose config may come from a file."""

    config: str | None = option(
        None, "YAML file with options, names with dashes or underscores; the command line overrides it", group="config"
    )
    print_config: bool = option(False, "print all options as such a file, and stop", group="config")


def options_of(name: str) -> dict[str, Option]:
    """The options of a command by flag."""
    verb = VERBS[name]
    return {o.flag: o for kind in (verb.config, *[_YamlOptions] * verb.yaml) for o in options(kind)}


def parse(name: str, words: list[str]) -> dict[str, Any]:
    """The options given on the command line, numbers and booleans converted; words behind ``--`` are values of the
    first positional option. Raises ``ConfigError``."""
    known = options_of(name)
    found: dict[str, list[str]] = {}
    if "--" in words and (places := [o.flag for o in known.values() if o.positional]):
        cut = words.index("--")
        words, found[places[0]] = words[:cut], words[cut + 1 :]
    current = ""
    for word in _with_flags(words, [o for o in known.values() if o.positional]):
        if FLAG.match(word):
            current, equals, value = word.partition("=")
            if current not in known:
                raise ConfigError(
                    f"unknown option {current!r}{nearest(current, list(known)) or f'; see prefopt {name} --help'}"
                )
            if current in found and list[str] not in known[current].kinds:
                raise ConfigError(f"{current} is given twice; leave one out")
            found.setdefault(current, []).extend([value] if equals else [])
        elif not current or (found[current] and list[str] not in known[current].kinds):
            raise ConfigError(f"{word!r} belongs to no option: names and values follow an option, such as --model NAME")
        else:
            found[current].append(word)
    return {known[flag].name: _converted(known[flag], values) for flag, values in found.items()}


FLAG = re.compile(r"-(?!\.?[0-9]|inf$|nan$|$)[^\s=]+(=|$)")
"""Neither negative numbers nor text that begins with a dash are flags."""


def _converted(o: Option, values: list[str]) -> Any:
    """Words of the command line as the option's type; what cannot be converted stays text, which the config refuses."""
    if not values and bool in o.kinds:
        return True
    if not values:
        raise ConfigError(f"{o.flag} has no value; it must be {o.expects}")
    if list[str] in o.kinds:
        return values
    text = values[0]
    if text == "null" and o.optional:
        return None
    if bool in o.kinds:
        return {"true": True, "false": False}.get(text, text)
    for kind in (k for k in (int, float) if k in o.kinds):
        with suppress(ValueError, OverflowError):
            if math.isfinite(number := kind(text)):
                return number
    return text


def _with_flags(words: list[str], positional: Sequence[Option]) -> list[str]:
    """The words, with flags before the values of positional options.

    If there are words for all positional options whose flags are not given, each but the first takes one, from the
    end; the first, which may be a list, takes the others.
    """
    count = next((at for at, word in enumerate(words) if FLAG.match(word)), len(words))
    plain, rest = words[:count], words[count:]
    given = {word.partition("=")[0] for word in rest}
    open_ = [o for o in positional if o.flag not in given] or list(positional[:1])
    if not plain or not open_:
        return words
    first, *others = open_ if len(plain) >= len(open_) else open_[:1]
    cut = len(plain) - len(others)
    filled = [word for o, one in zip(others, plain[cut:], strict=True) for word in (o.flag, one)]
    return [first.flag, *plain[:cut], *filled, *rest]


def help_of(name: str) -> str:
    """The help of a command: its options by group."""
    known = options_of(name).values()
    width = max(60, min(shutil.get_terminal_size().columns, 120))
    places = "".join(f"{_metavar(o)} " for o in known if o.positional)
    lines = [f"usage: prefopt {name} {places}[options]", "", *textwrap.wrap(VERBS[name].help, width)]
    for group in dict.fromkeys(o.group for o in known):
        lines += ["", f"{group}:"]
        for o in (o for o in known if o.group == group):
            left = f"  {o.flag} {_metavar(o)}"
            text = f"{o.help} ({'required' if o.required else f'default: {o.default_text}'})"
            wrapped = textwrap.wrap(text, width - 24, break_on_hyphens=False)  # an option's name stays whole
            lines += [left.ljust(24) + wrapped.pop(0)] if len(left) < 23 else [left]
            lines += [" " * 24 + line for line in wrapped]
    return "\n".join(lines)


def _metavar(o: Option) -> str:
    name = o.name.rsplit("_", 1)[-1].upper()
    if list[str] in o.kinds:
        return f"{name} [{name} ...]"
    if bool in o.kinds:
        return f"[{'|'.join(('true', 'false', *o.choices))}]"
    if o.choices and len(o.kinds) == 1:
        return "{" + ",".join(o.choices) + "}"
    return "N" if int in o.kinds else "X" if float in o.kinds else name


def _overview(verbs: list[str]) -> str:
    lines = "\n".join(f"  {name:15}{VERBS[name].help}" for name in verbs)
    return (
        "usage: prefopt COMMAND [options]\n\n"
        "Align a language model with preferences on the hardware you have.\n\n"
        f"commands:\n{lines}\n\n"
        "prefopt COMMAND --help lists its options; prefopt --version prints the version."
    )


def _complain(message: str, status: int) -> int:
    if any(name in os.environ for name in RANK_VARIABLES):
        from prefopt.parallel.world import speaks_for_all

        if not speaks_for_all():  # another process of the run has said why
            return status
    complain("prefopt: " + " ".join(message.split()))
    return status


@contextmanager
def _warnings_on_stderr() -> Iterator[None]:
    """Print what the package logs."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("prefopt: %(message)s"))
    logger = logging.getLogger("prefopt")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
