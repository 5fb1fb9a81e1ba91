"""Which of two responses is better: what a label means, said by ``--label-means`` or by a word that says it itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prefopt.data.layouts.values import BadRow, kind
from prefopt.errors import ConfigError

MEANINGS = ("first", "second", "tie", "good", "bad")
TIERS: Mapping[str, tuple[tuple[int, ...], ...]] = {"first": ((0,), (1,)), "second": ((1,), (0,)), "tie": ((0, 1),)}
# Labels that name a side, whoever writes them. Numbers are none: 0 is the first response here and a tie there.
WORDS: Mapping[str, str] = {
    **dict.fromkeys(("first", "a", "model_a", "response_a"), "first"),
    **dict.fromkeys(("second", "b", "model_b", "response_b"), "second"),
    **dict.fromkeys(
        ("tie", "equal", "draw", "tie (bothbad)", "tie (both bad)", "tie_bothbad", "both_bad", "bothbad", "both bad"),
        "tie",
    ),
}
UNSAID = "label of unknown meaning"


def spelt(value: object) -> str:
    """A label as text, so that ``1``, ``1.0`` and ``"1"`` are one, and so are ``true`` and ``"True"``."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        text = value.strip().lower()
        try:
            return f"{float(text):g}" if text[:1].isdigit() or text[:1] in "+-." else text
        except ValueError:
            return text
    return f"{value:g}" if isinstance(value, float) else ""


def parse_means(given: Sequence[str]) -> dict[str, str]:
    """``["0=first,1=second", "2=tie"]`` as a mapping. Raises :class:`ConfigError` for what says no meaning."""
    means: dict[str, str] = {}
    for part in (part.strip() for word in given for part in word.split(",")):
        label, equals, meaning = part.rpartition("=")
        if not (equals and label.strip() and meaning.strip() in MEANINGS):
            what = f"--label-means {part!r} should be LABEL=MEANING, such as 0=first,1=second,2=tie"
            raise ConfigError(f"{what}; meanings are {', '.join(MEANINGS)}")
        if means.setdefault(spelt(label), meaning.strip()) != meaning.strip():
            raise ConfigError(f"--label-means gives {label.strip()} two meanings; leave one out")
    return means


def verdict(value: object, name: str, means: Mapping[str, str], sides: Sequence[str] = ()) -> str:
    """``first``, ``second`` or ``tie``: by ``means`` where there are any, else by :data:`WORDS` and the names of the
    two columns, ``sides``. Raises :class:`BadRow` for a label that says none of them."""
    if not isinstance(value, (str, bool, int, float)):
        raise BadRow("wrong type", f"{name} is {kind(value)}, not a label")
    label = spelt(value)
    names = means or {**WORDS, **dict(zip(map(spelt, sides), ("first", "second"), strict=False))}
    found = names.get(label, names.get({"true": "1", "false": "0"}.get(label, "")))
    if found in TIERS:
        return str(found)
    if means:
        what = f"{name} is {value!r}; the labels that are known mean {_listed(means)}"
        raise BadRow("unknown label", what)
    raise BadRow(
        UNSAID,
        f"{name} is {value!r}, and which response that prefers is not said; say it, such as "
        "--label-means 0=first,1=second,2=tie",
    )


def _listed(means: Mapping[str, str]) -> str:
    return ", ".join(f"{label}={meaning}" for label, meaning in means.items())
