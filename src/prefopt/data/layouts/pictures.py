"""Pictures in rows: a column ``images`` with their places in the messages, and pictures inside of messages.

The place of a picture is a part ``{"type": "image"}`` (TRL) or ``<image>`` in the words (LLaMA-Factory). Where messages
have no places, the pictures come before the words of the first user turn, as in TRL.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace

from prefopt.data.layouts.values import BadRow
from prefopt.data.pictures import BAD_PICTURE, BadPicture, PictureByAddress, PictureFolder, PictureOutside, read_picture
from prefopt.records import PICTURE, Comparison, Message, Picture

TAG = "<image>"
WAITING = Picture(b"", 0, 0)
"""In the place of a picture that is in the row's column."""
_HOLDERS = ("image", "image_url", "url", "path", "base64", "bytes", "value", "source")


def picture_of_part(part: Mapping[str, object], name: str, folder: PictureFolder | None) -> Picture:
    """The picture of a part of a message: HF's and TRL's ``image``, OpenAI's ``image_url``, Anthropic's ``source``;
    :data:`WAITING` where the part only marks its place. Raises :class:`BadRow`."""
    held = next((part[key] for key in _HOLDERS if part.get(key)), None)
    if held is None:
        return WAITING
    if isinstance(held, dict) and isinstance(held.get("data"), str):
        held = {"bytes": held["data"]}
    elif held is part.get("base64"):
        held = {"bytes": held}
    return _read(held, name, folder)


def pictures_of_column(value: object, folder: PictureFolder | None) -> list[Picture]:
    """The pictures of a row's column: one, or a list, which in a table of text is JSON. Raises :class:`BadRow`."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            raise BadRow(BAD_PICTURE, "images is text that begins as a list and is not JSON") from None
    items = value if isinstance(value, (list, tuple)) else [value]
    return [_read(item, "images", folder) for item in items]


def _read(value: object, name: str, folder: PictureFolder | None) -> Picture:
    try:
        return read_picture(value, folder)
    except BadPicture as bad:
        kinds = {PictureByAddress: "picture by address", PictureOutside: "picture outside of its folder"}
        kind = kinds.get(type(bad), BAD_PICTURE)
        raise BadRow(kind, f"{name}: {bad}", (bad.source,) if bad.source else ()) from None


def with_pictures(c: Comparison, given: list[Picture]) -> Comparison:
    """The comparison with the pictures of its column in their places. Raises :class:`BadRow` where their numbers
    differ, or the row is plain text."""
    turns = [*c.prompt, *(m for r in c.responses for m in r.messages)]
    waiting = sum(m.pictures.count(WAITING) for m in turns)
    if not (given or waiting):
        return c
    if c.text:
        raise BadRow(BAD_PICTURE, "has images beside plain text; give the prompt as messages")
    tags = sum(m.content.count(TAG) for m in turns)
    if waiting:
        count, what = waiting, "parts of type image without a picture of their own"
        change = _filled
    elif tags:
        count, what = tags, f"places {TAG} in its messages"
        change = _at_tags
    else:
        return _at_first_question(c, given)
    if count != len(given):
        raise BadRow(BAD_PICTURE, f"has {len(given)} images and {count} {what}")
    left = iter(given)
    prompt = tuple(change(m, left) for m in c.prompt)
    responses = tuple(replace(r, messages=tuple(change(m, left) for m in r.messages)) for r in c.responses)
    return replace(c, prompt=prompt, responses=responses)


def _filled(m: Message, left: Iterator[Picture]) -> Message:
    if WAITING not in m.pictures:
        return m
    return replace(m, pictures=tuple(next(left) if p is WAITING else p for p in m.pictures))


def _at_tags(m: Message, left: Iterator[Picture]) -> Message:
    if not (count := m.content.count(TAG)):
        return m
    if m.pictures or PICTURE in m.content:
        raise BadRow(BAD_PICTURE, f"a message has both {TAG} and pictures of its own, or the character U+FFFC")
    found = tuple(next(left) for _ in range(count))
    return replace(m, content=m.content.replace(TAG, PICTURE), pictures=found)


def _at_first_question(c: Comparison, given: list[Picture]) -> Comparison:
    at = next((i for i, m in enumerate(c.prompt) if m.role == "user"), None)
    if at is None:
        raise BadRow(BAD_PICTURE, "has images and no user turn to put them into")
    first = c.prompt[at]
    changed = replace(first, content=PICTURE * len(given) + first.content, pictures=(*given, *first.pictures))
    return replace(c, prompt=(*c.prompt[:at], changed, *c.prompt[at + 1 :]))


def checked(m: Message) -> Message:
    """The message, whose content must have one place for each picture. Raises :class:`BadRow`."""
    if m.pictures and m.content.count(PICTURE) != len(m.pictures):
        raise BadRow(BAD_PICTURE, "a message with pictures has the character U+FFFC in its words; remove it")
    return m
