"""The words of a command line as options."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from prefopt.cli.verbs import options_of
from prefopt.core.options import Option, unknown_options
from prefopt.core.words import from_words
from prefopt.errors import ConfigError

FLAG = re.compile(r"-(?!\.?[0-9]|inf$|nan$|$)[^\s=]+(=|$)")
"""Neither negative numbers nor text that begins with a dash are flags."""


def parse(name: str, words: list[str]) -> dict[str, Any]:
    """The options given on the command line, numbers and booleans converted. Underscores in a flag count as dashes.

    Words that no option takes are values of the positional options, wherever they stand; words behind ``--`` are
    values of the first. Raises ``ConfigError``."""
    known = options_of(name)
    positional = [o for o in known.values() if o.positional]
    found: dict[str, list[str]] = {}
    behind: list[str] = []
    if "--" in words and positional:
        cut = words.index("--")
        words, behind = words[:cut], words[cut + 1 :]
    unknown: list[str] = []
    loose: list[str] = []
    taker: Option | None = None  # the option that takes the next word
    skipped = False  # whether that word belongs to an unknown option
    for word in words:
        if FLAG.match(word):
            flag, equals, value = word.partition("=")
            taker, skipped = known.get(flag) or known.get(f"--{flag[2:].replace('_', '-')}"), False
            if taker is None:
                unknown.append(flag)
                skipped = not equals
                continue
            several = list[str] in taker.kinds
            if taker.flag in found and not several:
                raise ConfigError(f"{taker.flag} is given twice; leave one out")
            found.setdefault(taker.flag, []).extend([value] if equals else [])
            if equals and not several:
                taker = None
        elif taker is not None and not (_is_switch(taker) and positional and word not in ("true", "false", "null")):
            found[taker.flag].append(word)
            taker = taker if list[str] in taker.kinds else None
        elif not skipped:
            loose.append(word)
    if unknown:
        raise unknown_options(list(dict.fromkeys(unknown)), list(known), f"see prefopt {name} --help")
    given = {*found, positional[0].flag} if behind else {*found}
    places = [o for o in positional if o.flag not in given] or positional[:1]
    for placed in (_placed(loose, places), _placed(behind, positional[:1])):
        for flag, values in placed.items():
            if flag in found and list[str] not in known[flag].kinds:
                raise ConfigError(f"{flag} is given twice; leave one out")
            found.setdefault(flag, []).extend(values)
    return {known[flag].name: from_words(known[flag], values) for flag, values in found.items()}


def _is_switch(o: Option) -> bool:
    return bool in o.kinds


def _placed(words: Sequence[str], places: Sequence[Option]) -> dict[str, list[str]]:
    """Words by the flags of positional options. If there is a word for each, all but the first option take one, from
    the end; the first, which may be a list, takes the others."""
    if not words:
        return {}
    taken = [*places] if len(words) >= len(places) else [*places[:1]]
    cut = len(words) - len(taken[1:])
    most = len(words) if taken and list[str] in taken[0].kinds else min(1, len(taken))
    if cut > most:
        word = words[most]
        raise ConfigError(f"{word!r} has no option before it: write each value after its option, such as --model NAME")
    others = {o.flag: [word] for o, word in zip(taken[1:], words[cut:], strict=True)}
    return {taken[0].flag: list(words[:cut])} | others
