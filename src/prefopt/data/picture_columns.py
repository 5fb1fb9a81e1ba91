"""Columns of the pictures of groups: digests, sizes and places, and the paths or bytes of their files."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from prefopt.data.group import Group


def picture_columns(group: Group) -> dict[str, list[Any]]:
    """The columns _I and _B of a group."""
    found = [*group.pictures, *(p for c in group.continuations for p in c.pictures)]
    paths = [os.fsencode(p.picture.source) for p in found]
    held = [path or p.picture.data for path, p in zip(paths, found, strict=True)]
    return {
        "digest_I": [p.picture.digest for p in found],
        "size_I": [(p.picture.width, p.picture.height) for p in found],
        "place_I": [(p.start, p.stop) for p in found],
        "path_I": [len(path) for path in paths],
        "held_I": [len(data) for data in held],
        "held_B": [np.frombuffer(data, np.uint8) for data in held],
    }
