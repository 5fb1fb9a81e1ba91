"""Places of pictures: in rendered texts, and in the tokens of a sequence."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from prefopt.data.chat.encoding import Encoded, RenderedText
from prefopt.data.chat.pictures import PictureProcessor
from prefopt.data.group import BoolArray, Pictures, Placed
from prefopt.data.pictures import BadPicture
from prefopt.records import Comparison, Picture


def pictures_of(c: Comparison, texts: int) -> list[tuple[Picture, ...]]:
    """The pictures in each text of a row: those of the prompt, then its response's. A prompt alone is one text."""
    prompt = tuple(p for m in c.prompt for p in m.pictures)
    own = [tuple(p for m in r.messages for p in m.pictures) for r in c.responses]
    return [(*prompt, *found) for found in own] if len(own) == texts else [prompt] * texts


def placed_in(text: RenderedText, tokens: Encoded, pictures: Sequence[Picture]) -> Pictures:
    """The tokens that stand for each picture of a text."""
    runs = [np.flatnonzero(tokens.covers([run])) for run in text.pictures]
    return tuple(Placed(p, int(run[0]), int(run[-1]) + 1) for p, run in zip(pictures, runs, strict=bool(runs)))


def whole_pictures(pictures: Pictures, length: int) -> Pictures:
    """The pictures of a sequence of which the first ``length`` tokens are left. Raises ``ValueError`` for a cut one."""
    if any(p.start < length < p.stop for p in pictures):
        raise ValueError("a picture of the response does not fit into --max-length")
    return tuple(p for p in pictures if p.stop <= length)


def all_but(length: int, pictures: Pictures) -> BoolArray:
    """A mask [L] of all tokens but those that stand for pictures."""
    mask = np.ones(length, np.bool_)
    for p in pictures:
        mask[p.start : p.stop] = False
    return mask


def expanded(rendered: RenderedText, pictures: Sequence[Picture], processor: PictureProcessor) -> RenderedText:
    """The text with what stands for each of its pictures in the place of its placeholder.

    Raises :class:`BadPicture` where the placeholders are not as many as the pictures, or in an answer.
    """
    places = [m.start() for m in re.finditer(re.escape(processor.token), rendered.text)]
    if len(places) != len(pictures):
        raise BadPicture(
            f"the chat template shows {len(places)} pictures ({processor.token}) of {len(pictures)}; pictures belong in"
            f" messages, and {processor.token} not in their words"
        )
    if any(start <= at < end for at in places for start, end in rendered.spans):
        raise BadPicture("a picture in an answer; no supported model writes pictures")
    pieces, runs, moves, last, length = [], [], [], 0, 0
    for at, picture in zip(places, pictures, strict=True):
        whole = processor.expansion(picture)
        pieces += [rendered.text[last:at], whole]
        length += at - last
        runs.append((length, length + len(whole)))
        length += len(whole)
        last = at + len(processor.token)
        moves.append((at, length - last))
    pieces.append(rendered.text[last:])

    def moved(place: int) -> int:
        return place + next((by for at, by in reversed(moves) if at < place), 0)

    spans = tuple((moved(start), moved(end)) for start, end in rendered.spans)
    return replace(rendered, text="".join(pieces), spans=spans, shared=moved(rendered.shared), pictures=tuple(runs))
