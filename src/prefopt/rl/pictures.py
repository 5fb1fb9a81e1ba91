"""The pictures of rollouts' prompts as tensors, for checkpoints and for other ranks."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from prefopt.data.group import Group, Pictures, Placed
from prefopt.records import Picture

NAME = "pictures"


def saved_pictures(groups: Sequence[Group]) -> dict[str, torch.Tensor]:
    """The pictures of the prompts of ``groups``, as bytes [B] of JSON; nothing where there are none. A file stays a
    path with its digest."""
    if not any(group.pictures for group in groups):
        return {}
    text = json.dumps([[_plain(placed) for placed in group.pictures] for group in groups])
    return {NAME: torch.from_numpy(np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8).copy())}


def pictures_saved(saved: Mapping[str, torch.Tensor]) -> list[Pictures]:
    """The inverse of :func:`saved_pictures`: those of each group, or an empty list."""
    if NAME not in saved:
        return []
    text = saved[NAME].numpy().tobytes().decode("utf-8", "surrogateescape")
    return [tuple(map(_placed, group)) for group in json.loads(text)]


def _plain(placed: Placed) -> list[object]:
    p = placed.picture
    data = base64.b64encode(p.data).decode("ascii")
    return [p.digest.hex(), p.width, p.height, p.source, data, placed.start, placed.stop]


def _placed(found: Sequence[object]) -> Placed:
    digest, width, height, source, data, start, stop = found
    picture = Picture(bytes.fromhex(str(digest)), width, height, source, base64.b64decode(str(data)))  # type: ignore[arg-type]
    return Placed(picture, start, stop)  # type: ignore[arg-type]
