"""The command line: ``prefopt VERB [options]``. It fills a config, and imports a method only when its verb runs."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from prefopt import __version__
from prefopt.cli.verbs import VERBS
from prefopt.core.options import Option, check_values, checked, from_dict, nearest, options
from prefopt.core.terminal import complain, guarded_streams, tell
from prefopt.core.yaml_file import read_document, write_document
from prefopt.errors import ConfigError, Interrupted, UserError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

# What stands in the way is the disk, not the program; any other OSError that gets here is a bug.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. The exit status: 0; 1 for damage found; 2 for a user error; 128 + signal where interrupted."""
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
        return _complain(f"error: {place}{error.strerror}; free some space there, or name another folder", 2)


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
    try:
        given = parse(name, words)
    except SystemExit as stop:  # --help has printed
        return int(stop.code or 0)
    document, printing = given.pop("config", None), given.pop("print_config", False)
    values: dict[str, Any] = {}
    if document:
        values = check_values(verb.config, read_document(document), place=document)
    values |= given
    if printing:
        stand_ins = {o.name: "(to be given)" for o in options(verb.config) if o.required}
        from_dict(verb.config, stand_ins | values)
        tell(write_document(verb.config, values), end="")
        return 0
    config: Any = from_dict(verb.config, values)
    from prefopt.methods.early_checks import check_before_torch

    check_before_torch(config)
    return verb.run(config)


def parser_of(name: str) -> ArgumentParser:
    """The parser of a verb. Options that are not given are absent from what it returns: the config knows defaults."""
    from jsonargparse import ArgumentParser

    verb = VERBS[name]
    metavar = "".join(f"{_shape(o)['metavar']} " for o in options(verb.config) if o.positional)
    parser = ArgumentParser(
        prog=f"prefopt {name}",
        usage=f"prefopt {name} {metavar}[options]",
        description=verb.help,
        formatter_class=argparse.HelpFormatter,
        exit_on_error=False,
        default_env=False,
        allow_abbrev=False,
        print_config=None,
    )
    groups: dict[str, Any] = {}
    for o in options(verb.config):
        group = groups.setdefault(o.group, None) or parser.add_argument_group(o.group)
        groups[o.group] = group
        remark = "required" if o.required else f"default: {o.default_text}"
        group.add_argument(o.flag, help=f"{o.help} ({remark})".replace("%", "%%"), **_shape(o))
    if verb.yaml:
        parser.add_argument("--config", type=str, metavar="FILE", default=argparse.SUPPRESS, help=_CONFIG_HELP)
        parser.add_argument("--print-config", action="store_true", default=argparse.SUPPRESS, help=_PRINT_HELP)
    return parser


def parse(name: str, words: list[str]) -> dict[str, Any]:
    """The options given on the command line, typed. Raises ``ConfigError``, and ``SystemExit`` after ``--help``."""
    from jsonargparse import ArgumentError

    known = {o.name: o for o in options(VERBS[name].config)}
    lists = {o.flag for o in known.values() if list[str] in o.kinds}
    words = _gathered(_flagged(words, [o for o in known.values() if o.positional]), lists)
    try:
        return dict(vars(parser_of(name).parse_args(words)))
    except ArgumentError as error:
        raise _plainly(name, str(error), known) from error


_CONFIG_HELP = "read options from a YAML file, names spelt with dashes or underscores; the command line overrides it"
_PRINT_HELP = "print all options as such a file, and stop"


def _shape(o: Option) -> dict[str, Any]:
    """How a parser takes the option: its type, and how many words."""
    shape: dict[str, Any] = {"type": o.type, "default": argparse.SUPPRESS}
    if list[str] in o.kinds:
        return shape | {"type": str, "nargs": "+", "metavar": o.name.rsplit("_", 1)[-1].upper()}
    if bool in o.kinds:
        return shape | {"nargs": "?", "const": True, "metavar": "true|false"}
    if o.choices and len(o.kinds) == 1:
        return shape | {"type": Literal[o.choices]}
    number = "N" if int in o.kinds else "X" if float in o.kinds else o.name.rsplit("_", 1)[-1].upper()
    return shape | {"metavar": number}


def _flagged(words: list[str], places: Sequence[Option]) -> list[str]:
    """The same words, those before the first option behind the flags of the positional options that they fill.

    Where there are words for all of these that have no flag among the others, each but the first takes one, from the
    end; the first, which may be a list, takes the rest.
    """
    count = next((at for at, word in enumerate(words) if word.startswith("-")), len(words))
    plain, rest = words[:count], words[count:]
    given = {word.partition("=")[0] for word in rest}
    open_ = [o for o in places if o.flag not in given] or list(places[:1])
    if not plain or not open_:
        return words
    first, *others = open_ if len(plain) >= len(open_) else open_[:1]
    cut = len(plain) - len(others)
    filled = [word for o, one in zip(others, plain[cut:], strict=True) for word in (o.flag, one)]
    return [first.flag, *plain[:cut], *filled, *rest]


def _gathered(words: list[str], lists: set[str]) -> list[str]:
    """The same words, with all values of an option that takes several behind one mention of it.

    A parser would keep the last of ``--data a --data b`` without a word; any other option that comes twice is refused.
    """
    kept: list[str] = []
    values: dict[str, list[str]] = {}
    seen: set[str] = set()
    current: list[str] = kept
    for word in words:
        flag, equals, value = word.partition("=")
        if not flag.startswith("--"):
            current.append(word)
        elif flag in lists:
            current = values.setdefault(flag, [])
            current += [value] if equals else []
        elif flag in seen:
            raise ConfigError(f"{flag} is given twice; leave one out")
        else:
            seen.add(flag)
            current = kept
            kept.append(word)
    return kept + [word for flag, many in values.items() for word in (flag, *many)]


def _plainly(name: str, message: str, known: dict[str, Option]) -> ConfigError:
    """The parser's complaint in one line that says what to do."""
    flags = [o.flag for o in known.values()] + (["--config", "--print-config"] if VERBS[name].yaml else [])
    if found := re.match(r"unrecognized arguments: (\S+)", message, re.I):
        word = found[1].partition("=")[0]
        if word.startswith("-"):
            return ConfigError(f"unknown option {word!r}{nearest(word, flags) or f'; see prefopt {name} --help'}")
        return ConfigError(f"{word!r} belongs to no option: names and values follow an option, such as --model NAME")
    if found := re.match(r"argument (--\S+): expected", message):
        o = known.get(found[1][2:].replace("-", "_"))
        return ConfigError(f"{found[1]} has no value; it must be {o.expects if o else 'the name of a file'}")
    if found := re.match(r'Parser key "(\w+)":.*(?:Got|Given) value: (.*)', message, re.S):
        o = known.get(found[1])
        if o is not None:
            try:
                checked(o, found[2])
            except ConfigError as error:
                return error
    return ConfigError(" ".join(message.split()))


def _overview(verbs: list[str]) -> str:
    lines = "\n".join(f"  {name:14}{VERBS[name].help}" for name in verbs)
    return (
        "usage: prefopt COMMAND [options]\n\n"
        "Align a language model with preferences on the hardware you have.\n\n"
        f"commands:\n{lines}\n\n"
        "prefopt COMMAND --help lists its options; prefopt --version tells the version."
    )


def _complain(message: str, status: int) -> int:
    complain("prefopt: " + " ".join(message.split()))
    return status


@contextmanager
def _warnings_on_stderr() -> Iterator[None]:
    """What the package logs, as lines of the program."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("prefopt: %(message)s"))
    logger = logging.getLogger("prefopt")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
