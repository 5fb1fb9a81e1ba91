"""The command line: ``prefopt COMMAND [options]``. It fills a config, and imports what the command runs only then."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from prefopt import __version__
from prefopt.cli.screen import help_of, overview, still_needed
from prefopt.cli.verbs import VERBS, verbs_below
from prefopt.cli.words import parse
from prefopt.config.methods import method_of
from prefopt.core.files import FULL, making_room
from prefopt.core.options import MissingOptions, nearest, options
from prefopt.core.plugins import imported
from prefopt.core.ranks import RANK_VARIABLES, check_ranks, ranks_in
from prefopt.core.terminal import complain, guarded_streams, tell
from prefopt.core.yaml_file import read_document, write_document
from prefopt.errors import ConfigError, ConfigErrors, Interrupted, UserError

__all__ = ["VERBS", "main", "parse", "values_of"]

HELP = ("-h", "--help")
# Errors of the disk and of names; any other OSError that gets here is a bug.
DISK = (*FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTDIR)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Exit status: 0; 1 if it found errors; 2 for a user error; 128 + signal if interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        with guarded_streams(), _warnings_on_stderr():
            return _dispatch(words)
    except ConfigErrors as error:
        return _complain(2, f"error: {error.lines[0]}", *error.lines[1:])
    except UserError as error:
        return _complain(2, f"error: {error}")
    except Interrupted as stop:
        return _complain(128 + stop.signal, str(stop))
    except KeyboardInterrupt:
        return _complain(130, "interrupted")
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno not in DISK:
            raise
        place = f"{error.filename}: " if error.filename else ""
        remedy = f"{making_room(error)}name another file or folder"
        return _complain(2, f"error: {place}{error.strerror}; {remedy}")


def _dispatch(words: list[str]) -> int:
    if not words:
        tell(overview())
        return 2
    if words[0] in ("help", *HELP):  # prefopt help dpo, prefopt help collect invite
        words = [word for word in words[1:] if word not in HELP]
        if not words:
            tell(overview())
            return 0
        words.append(HELP[1])
    if words[0] in ("-V", "--version"):
        tell(f"prefopt {__version__}")
        return 0
    name = " ".join(words[:2]) if " ".join(words[:2]) in VERBS else words[0]
    inner = verbs_below(name)
    if inner and words[1:2] in (["-h"], ["--help"]):
        tell(overview(name))
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
    if set(HELP) & set(words):
        tell(help_of(name))
        return 0
    values, file, given, printing = values_of(name, words)
    if printing:
        placeholders = {o.name: "(to be given)" for o in options(verb.config) if o.required}
        verb.config.from_dict(placeholders | values, file, given)
        tell(write_document(verb.config, values | given), end="")
        return 0
    try:
        config = verb.config.from_dict(values, file, given)
    except MissingOptions as error:
        if len(error.missing) < 2 and words:
            raise
        raise still_needed(name, error.missing) from None
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


def _complain(status: int, *lines: str) -> int:
    if any(name in os.environ for name in RANK_VARIABLES):
        from prefopt.parallel.world import speaks_for_all

        if not speaks_for_all():  # another process of the run has said why
            return status
    first, *others = lines
    complain("\n".join(["prefopt: " + " ".join(first.split()), *others]))
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
