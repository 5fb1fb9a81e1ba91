r"""Statistics of the rows that ``prefopt data check`` reports: lengths, length bias, duplicates, suspicious text.

>>> lengths = Lengths("characters")
>>> lengths.add(10, [30, 20], ((0, 1),))
>>> lengths.quantiles()["chosen"]["max"], lengths.bias().longer
(30, 1)

>>> list(suspicions("It\u00e2\u20ac\u2122s &quot;fine&quot;"))
['mojibake', 'HTML entities']
"""

from __future__ import annotations

import hashlib
import math
import re
from array import array
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from prefopt.core.statistics import wilson
from prefopt.data.table import Array
from prefopt.records import Comparison, Response

BINS = 12
QUANTILES = {"min": 0, "25%": 25, "50%": 50, "75%": 75, "95%": 95, "99%": 99, "max": 100}
# A length bias is worth a warning where it is this large and not chance (at 1 %).
LARGE_SHARE, LARGE_RATIO, CERTAIN = 0.1, 1.25, 2.576


@dataclass(frozen=True, slots=True)
class LengthBias:
    """Whether preferred responses are longer.

    Of pairs: the numbers of rows in which most preferred responses are ``longer``, ``shorter`` or neither (``equal``);
    ``share`` is longer / (longer + shorter). Of labels: the same numbers of pairs of a desirable and an undesirable
    response, ties counting half in ``share``. ``low`` to ``high`` is its 95 % interval, ``z`` its distance from one
    half in standard errors; ``difference`` and ``ratio`` compare the mean lengths.
    """

    longer: int
    shorter: int
    equal: int
    share: float
    low: float
    high: float
    z: float
    difference: float
    ratio: float

    @property
    def large(self) -> bool:
        """Significant at 1 %, and large: the share is outside of 40 to 60 %, or the means differ by a quarter."""
        ratio = max(self.ratio, 1 / self.ratio) if self.ratio > 0 else math.inf
        return abs(self.z) > CERTAIN and (abs(self.share - 0.5) >= LARGE_SHARE or ratio >= LARGE_RATIO)

    def describe(self, unit: str) -> str:
        interval = f"95 % interval {self.low:.1%} to {self.high:.1%}"
        means = f"{abs(self.difference):,.1f} {unit} {'longer' if self.difference >= 0 else 'shorter'} on average"
        what = f"preferred responses are longer in {self.share:.1%} of comparisons ({interval})"
        return f"{what}, {means} ({self.ratio:.2f} times the length)"


class Lengths:
    """Lengths of the usable rows, 4 bytes each; of tokens also what truncation and shared prefixes change.

    ``encoded`` and ``separate`` are the tokens with shared prefixes encoded once, and once per response.
    """

    def __init__(self, unit: Literal["tokens", "characters"]) -> None:
        self.unit = unit
        self.prompt, self.response, self.whole = array("i"), array("i"), array("i")
        self.chosen, self.rejected, self.signs = array("i"), array("i"), array("b")
        self.difference, self.labelled = 0.0, False
        self.encoded, self.separate, self.truncated = 0, 0, 0

    def add(
        self,
        prompt: int,
        responses: Sequence[int],
        pairs: Sequence[tuple[int, int]] = (),
        labels: Sequence[bool] | None = None,
    ) -> None:
        """One row: the lengths of its prompt and of its responses, and its pairs (better, worse) or labels."""
        self.prompt.append(prompt)
        self.response.extend(responses)
        self.whole.extend(prompt + n for n in responses)
        if pairs:
            worse = {b for _, b in pairs}
            self.chosen.extend(responses[k] for k in sorted({a for a, _ in pairs} - worse))
            self.rejected.extend(responses[k] for k in sorted(worse))
            differences = [responses[a] - responses[b] for a, b in pairs]
            sign = sum((d > 0) - (d < 0) for d in differences)
            self.signs.append((sign > 0) - (sign < 0))
            self.difference += sum(differences) / len(pairs)
        elif labels is not None:
            self.labelled = True
            for n, good in zip(responses, labels, strict=True):
                (self.chosen if good else self.rejected).append(n)

    def add_columns(self, c: Mapping[str, Array]) -> None:
        """Tokenized groups (:data:`prefopt.data.table.COLUMNS`), with their lengths before truncation.

        A prompt ends where the first response of its group begins to be trained.
        """
        prefix_G = (c["prefix_G"] + c["prompt_cut_G"]).astype(np.int64)
        whole_N = np.repeat(prefix_G, c["responses_G"]) + c["length_N"] + c["cut_N"]
        counts = (c[name] for name in ("responses_G", "tokens_G", "pairs_G"))
        first_N, first_T, first_P = (np.append(0, np.cumsum(many, dtype=np.int64)) for many in counts)
        trained = np.flatnonzero(c["trained_T"])
        for g in range(len(c["row_G"])):
            prompt, responses = int(prefix_G[g]), slice(int(first_N[g]), int(first_N[g + 1]))
            self.truncated += bool(c["prompt_cut_G"][g] > 0 or c["cut_N"][responses].any())
            if responses.start == responses.stop:
                self.add(prompt, [])
                continue
            begin = int(first_T[g] + c["prefix_G"][g])
            prompt += int(trained[np.searchsorted(trained, begin)]) - begin
            pairs = [(int(a), int(b)) for a, b in c["pair_P"][int(first_P[g]) : int(first_P[g + 1])]]
            labels = c["label_N"][responses].tolist()
            known = [x == 1 for x in labels] if labels[0] >= 0 else None
            self.add(prompt, [int(n) - prompt for n in whole_N[responses]], pairs, known)
        self.separate += int(whole_N.sum())
        self.encoded += int(c["tokens_G"].sum() + c["prompt_cut_G"].sum() + c["cut_N"].sum())

    def quantiles(self) -> dict[str, dict[str, float]]:
        """Minimum, maximum, mean and quantiles of each kind of length; kinds without any are left out."""
        found = {}
        for name in ("prompt", "response", "chosen", "rejected", "whole"):
            values = np.asarray(getattr(self, name))
            if len(values):
                at = np.percentile(values, list(QUANTILES.values()), method="inverted_cdf")
                found[name] = dict(zip(QUANTILES, map(int, at), strict=True)) | {"mean": float(values.mean())}
        return found

    def histogram(self) -> list[dict[str, int | None]]:
        """Counts of whole sequences by length; the last bin has no end and holds about the longest 1 %."""
        values = np.asarray(self.whole or self.prompt)
        if not len(values):
            return []
        least = max((int(np.percentile(values, 99)) + 1) / BINS, 1)
        power = 10 ** math.floor(math.log10(least))
        step = next(factor * power for factor in (1, 2, 4, 5, 8, 10) if factor * power >= least)
        counts = np.trim_zeros(np.bincount(np.minimum(values // step, BINS)), "b")
        last = BINS * step
        return [
            {"from": at, "to": at + step - 1 if at < last else None, "count": int(count)}
            for at, count in zip(range(0, last + 1, step), counts, strict=False)
        ]

    def longer_than(self, limits: Sequence[int]) -> dict[int, int]:
        values = np.asarray(self.whole or self.prompt)
        return {limit: int((values > limit).sum()) for limit in limits}

    def bias(self) -> LengthBias | None:
        """Preferred compared with other responses; None where either is missing."""
        if not self.chosen or not self.rejected:
            return None
        chosen, rejected = np.asarray(self.chosen), np.asarray(self.rejected)
        mean, other = float(chosen.mean()), float(rejected.mean())
        ratio = mean / other if other else math.inf
        if self.of_labels:
            return _bias_of_labels(chosen, rejected, mean - other, ratio)
        longer, shorter = self.signs.count(1), self.signs.count(-1)
        n, rows = longer + shorter, len(self.signs)
        share = longer / n if n else 0.5
        z = (longer - shorter) / math.sqrt(n) if n else 0.0
        return LengthBias(longer, shorter, rows - n, share, *wilson(share, n), z, self.difference / rows, ratio)

    @property
    def of_labels(self) -> bool:
        """Whether ``chosen`` and ``rejected`` are desirable and undesirable responses, not sides of pairs."""
        return self.labelled and not self.signs

    def to_dict(self) -> dict[str, object]:
        bias = self.bias()
        bias_values = None if bias is None else asdict(bias) | {"large": bias.large}
        lengths = {"quantiles": self.quantiles(), "histogram": self.histogram()}
        return {"unit": self.unit, **lengths, "length_bias": bias_values}


def _bias_of_labels(good: Array, bad: Array, difference: float, ratio: float) -> LengthBias:
    """Mann and Whitney's comparison of two sets of lengths, with the normal approximation."""
    values, counts = np.unique(bad, return_counts=True)
    below = np.concatenate([[0], np.cumsum(counts)])
    at, beyond = np.searchsorted(values, good), np.searchsorted(values, good, side="right")
    longer, not_shorter = int(below[at].sum()), int(below[beyond].sum())
    n, m = len(good), len(bad)
    share = (longer + not_shorter) / 2 / (n * m)
    error = math.sqrt((n + m + 1) / (12 * n * m))
    low, high = max(0.0, share - 1.96 * error), min(1.0, share + 1.96 * error)
    shorter, equal = n * m - not_shorter, not_shorter - longer
    return LengthBias(longer, shorter, equal, share, low, high, (share - 0.5) / error, difference, ratio)


Found = list[tuple[int, int]]
"""(place of a row, place of the row that it repeats or contradicts); places count rows in the order they were added."""
_NOTHING = bytes(8)


class Duplicates:
    """Finds duplicates and contradictions by 8-byte hashes, so that a million rows fit in memory.

    In 3 of 100 million files of a million rows, two different rows share a hash by chance.
    """

    def __init__(self) -> None:
        self.source, self.row = array("i"), array("q")
        self._prompts, self._rows = array("Q"), array("Q")
        self._claims, self._claim_places = array("Q"), array("q")

    def add(self, c: Comparison, source: int) -> None:
        """Add a row; ``source`` is the number of its file."""
        prompt = c.prompt_key
        names = list(map(_response_key, c.responses))
        self._prompts.append(int.from_bytes(prompt[:8], "little"))
        self._rows.append(_hash(prompt, *sorted(_preference_key(c, k) + names[k] for k in range(len(names)))))
        for better, worse in _claims(c, names):
            # The last bit says which of the two is better.
            self._claims.append(_hash(prompt, *sorted((better, worse))) & ~1 | (better < worse))
            self._claim_places.append(len(self.row))
        self.source.append(source)
        self.row.append(c.row)

    @property
    def prompts(self) -> npt.NDArray[np.uint64]:
        """[rows] a hash of each row's prompt."""
        return np.asarray(self._prompts)

    def duplicates(self) -> Found:
        """Rows with the prompt, the responses and the preference of an earlier row."""
        rows = np.asarray(self._rows)
        return [(place, first) for place, first in _first_places(rows, rows) if place != first]

    def contradictions(self) -> Found:
        """Rows that prefer one response to another where another row of the same prompt prefers them the other way.

        A label claims that a response is better, or worse, than nothing.
        """
        claims = np.asarray(self._claims)
        found: dict[int, int] = {}
        for at, other in _first_places(claims ^ np.uint64(1), claims):
            row, opposite = self._claim_places[at], self._claim_places[other]
            found[row] = min(found.get(row, opposite), opposite)
        return sorted(found.items())

    def prompts_of(self, other: Duplicates) -> Found:
        """Rows of this whose prompt ``other`` has too, each with its first place there."""
        return _first_places(self.prompts, other.prompts)


def _first_places(keys: npt.NDArray[np.uint64], among: npt.NDArray[np.uint64]) -> Found:
    """(place in ``keys``, first place of the same key in ``among``) of the keys that occur there."""
    known, first = np.unique(among, return_index=True)
    if not len(known):
        return []
    at = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    places = np.flatnonzero(known[at] == keys)
    return list(zip(places.tolist(), first[at[places]].tolist(), strict=True))


def _claims(c: Comparison, names: Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """(better, worse) by name, each pair once, where the votes for it outweigh those against it."""
    weights = [vote[2] for vote in c.votes] if c.votes is not None else [1.0] * len(c.pairs)
    claims: dict[tuple[bytes, bytes], float] = defaultdict(float)
    for (best, worst), weight in zip(c.pairs, weights, strict=True):
        claims[names[best], names[worst]] += weight
    for name, good in zip(names, c.labels or (), strict=bool(c.labels)):
        claims[(name, _NOTHING) if good else (_NOTHING, name)] += 1.0
    for (better, worse), weight in claims.items():
        if better != worse and weight > claims.get((worse, better), 0.0):
            yield better, worse


def _preference_key(c: Comparison, k: int) -> bytes:
    """The tier of response k, its label, how often it wins and loses."""
    tier = next((t for t, tier in enumerate(c.tiers) if k in tier), -1)
    label = -1 if c.labels is None else int(c.labels[k])
    votes = c.votes or ()
    counts = sum(best == k for best, *_ in votes), sum(worse == k for _, worse, _ in votes)
    return repr((tier, label, *counts)).encode()


def _response_key(response: Response) -> bytes:
    parts = [part for m in response.messages for part in (m.role, m.content.strip(), m.reasoning or "")]
    parts += [part for m in response.messages for call in m.tool_calls for part in (call.name, call.arguments)]
    return _hash(*(part.encode("utf-8", "surrogatepass") for part in parts)).to_bytes(8, "little")


def _hash(*parts: bytes) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return int.from_bytes(digest.digest(), "little")


# How the UTF-8 bytes 0x80 to 0xBF look when read as Windows-1252 or Latin-1.
_TAIL = "\u0080-\u00bf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ"
_MOJIBAKE = (
    f"Ã[{_TAIL}]|Â[\u00a0-\u00bf]|â[€\u0080\u0082„†‡ˆ‰Š‹Œž™][{_TAIL}]"
    f"|ð[Ÿ\u009f][{_TAIL}]|(?:[ÐÑ][{_TAIL}]){{2}}|ï»¿|ï¿½"
)
# Joiners are left alone: emoji and several scripts need them.
_INVISIBLE = (
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u00ad\u180e\u200b\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff"
    "\ue000-\uf8ff\U000f0000-\U0010ffff]"
)
_MARKS = (
    r"<\|[a-z_]{2,24}\|>|<｜[^｜<>]{2,24}｜>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<bos>|<eos>"
    r"|^#{2,3} ?(?:Response|Instruction|Input|Human|Assistant):|^</?s>|</?s>$"
)
CODE = ("```", "</")  # beside these, HTML is intended
BESIDE, LONGEST = 10, 20  # characters of a text that are shown beside a match, and of the match

SUSPICIONS = {
    "replacement character": ("U+FFFD replaces bytes that could not be decoded", "\ufffd"),
    "mojibake": ("UTF-8 that was decoded as another encoding, such as \u00c3\u00a9 for \u00e9", _MOJIBAKE),
    "invisible characters": ("control, zero-width, bidirectional or private-use characters", _INVISIBLE),
    "HTML entities": (
        "HTML that was not decoded, such as &quot; or <br>",
        r"&(?:amp|lt|gt|quot|nbsp|apos|mdash|rsquo|#\d{2,6}|#x[0-9a-fA-F]{2,6});|<br ?/?>",
    ),
    "escaped line ends": (
        "\\n or \\u0000 written out, and no line end in the text",
        r"(?s)\\n(?![a-z]).*\\n(?![a-z])|\\u[0-9a-fA-F]{4}.*\\u[0-9a-fA-F]{4}",
    ),
    "template text": ("marks of a chat template written out, such as <|im_end|> or ### Response:", f"(?m){_MARKS}"),
    "turns inside a response": (
        "a line of a response begins with Human:, User: or Assistant:",
        r"(?m)^(?:Human|User|Assistant): ?\S",
    ),
}
"""Every kind of suspicious text: what it means, and its pattern."""
_PATTERNS = {kind: re.compile(pattern) for kind, (_, pattern) in SUSPICIONS.items()}


def suspicions(text: str, *, response: bool = False) -> dict[str, str]:
    """The kinds of suspicious text found, each with its first place; turns are looked for in a ``response`` only."""
    ruled_out = {
        "replacement character": text.isascii(),
        "mojibake": text.isascii(),
        "invisible characters": text.isprintable(),
        "HTML entities": any(mark in text for mark in CODE),
        "escaped line ends": "\n" in text,
        "turns inside a response": not response,
    }
    found = {}
    for kind, pattern in _PATTERNS.items():
        if not ruled_out.get(kind) and (match := pattern.search(text)):
            start, end = max(match.start() - BESIDE, 0), min(match.end(), match.start() + LONGEST) + BESIDE
            found[kind] = ascii(text[start:end]) if not match[0].isprintable() else repr(text[start:end])
    return found


def row_suspicions(c: Comparison) -> dict[str, str]:
    """The kinds that any text of a row has, each with a place, in the order of :data:`SUSPICIONS`."""
    found: dict[str, str] = {}
    for k, turns in enumerate((c.prompt, *(r.messages for r in c.responses))):
        for m in turns:
            for text in filter(None, (m.content, m.reasoning)):
                found = suspicions(text, response=k > 0 and m.role == "assistant" and text is m.content) | found
    return {kind: found[kind] for kind in SUSPICIONS if kind in found}
