"""The files of a run's rounds: every sample, score and decision, as ordinary files of preferences.

``rounds/round-0001.jsonl`` holds the prompts of the first round in the canonical layout, which ``prefopt dpo --data``
reads; ``aside/round-0001.jsonl`` those of which it could learn nothing, each with ``why``::

    {"prompt": ..., "responses": [...], "scores": [...], "votes": [[0, 1, 1.0]], "judge_scores": [...],
     "components": {"quality": [...]}, "outcomes": [[0, 1, 1.0]], "round": 1, "number": 3,
     "token_ids": [[...], ...], "logprobs": [...], "ref_logprobs": [...], "source": "prompts.jsonl",
     "source_row": 7}

``scores`` include penalties, ``judge_scores`` do not; ``components`` are what each of several rewards gave, without its
weight. ``votes`` are preferences where scores do not say them.
``outcomes`` are the comparisons of a judge, null where it gave none. Log-probabilities are sums over a response's
tokens at the temperature, under the policy that drew it and under the reference. ``number`` counts the prompts of the
round.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prefopt.core.files import output_errors, parsed, replace_file
from prefopt.data.layouts import LAYOUTS
from prefopt.data.validate import validate
from prefopt.losses.rl import per_response
from prefopt.records import Comparison, Message, Response, tiers_of
from prefopt.rl.judgement import Preference, Round
from prefopt.rl.rollouts import Rollouts

ROUNDS, ASIDE = "rounds", "aside"


class RoundFiles:
    """The files of the rounds of a run in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(
        self,
        step: int,
        rows: Sequence[Comparison],
        texts: Sequence[Sequence[str]],
        judged: Round,
        final: Round,
        votes: Sequence[Sequence[Preference]] | None,
    ) -> int:
        """Write a round, counted from 0, whose prompts are ``rows``; returns how many of them are aside.

        ``judged`` is the round as the judge left it, ``final`` with penalties; ``votes`` the preferences by group, None
        where they are those of the scores.
        """
        sums = [_sums(final.rollouts, x) for x in (final.rollouts.logp_M, final.rollouts.ref_logp_M)]
        listed: dict[str, list[bytes]] = {ROUNDS: [], ASIDE: []}
        finished, raw, scores = _split(final.rollouts, final.rollouts.finished_N), judged.scores(), final.scores()
        parts = {name: _split(judged.rollouts, part_N) for name, part_N in judged.rollouts.part_N.items()}
        for n, (row, group) in enumerate(zip(rows, final.rollouts.groups, strict=True)):
            sides = [
                Response((Message("assistant", text),), cut=not ended)
                for text, ended in zip(texts[n], finished[n], strict=True)
            ]
            c = replace(row, responses=tuple(sides), tiers=tiers_of(scores[n]), scores=tuple(scores[n]), extra={})
            if votes is not None:
                c = replace(c, votes=tuple(votes[n]) or None)
            more: dict[str, Any] = {"judge_scores": raw[n], "round": step + 1, "number": n}
            if parts:
                more["components"] = {name: values[n] for name, values in parts.items()}
            if judged.outcomes is not None:
                more["outcomes"] = [[i, k, None if math.isnan(x) else x] for i, k, x in judged.outcomes[n]]
            more["token_ids"] = [continuation.ids.tolist() for continuation in group.continuations]
            more |= {"logprobs": sums[0][n], "ref_logprobs": sums[1][n], "source": row.file, "source_row": row.row}
            problems = validate(c, "pairs")
            if isinstance(problems, list):
                more["why"] = "; ".join(dict.fromkeys(problem.what for problem in problems))
            where = ASIDE if isinstance(problems, list) else ROUNDS
            listed[where].append(json.dumps({**LAYOUTS["canonical"].write(c), **more}, ensure_ascii=False).encode())
        for name, lines in listed.items():
            path = self.path(step, name)
            with output_errors(path):
                if lines:
                    path.parent.mkdir(exist_ok=True)
                    replace_file(path, b"\n".join(lines) + b"\n")
                else:
                    path.unlink(missing_ok=True)
        return len(listed[ASIDE])

    def recorded(self, step: int, rollouts: Rollouts) -> Round | None:
        """What the judge said of these very samples before the run was killed; None where that is not on record."""
        try:
            lines = [x for name in (ROUNDS, ASIDE) for x in _lines(self.path(step, name))]
            rows = sorted(map(parsed, lines), key=lambda row: row["number"])
            drawn = [[c.ids.tolist() for c in group.continuations] for group in rollouts.groups]
            if [row["token_ids"] for row in rows] != drawn:
                return None
            found = replace(
                rollouts,
                score_N=_joined(row["judge_scores"] for row in rows),
                part_N={name: _joined(row["components"][name] for row in rows) for name in rollouts.part_N},
            )
            if "outcomes" not in rows[0]:
                return Round(found)
            return Round(found, tuple(tuple(map(_outcome, row["outcomes"])) for row in rows))
        except (OSError, ValueError, KeyError, TypeError):  # none, or damaged: it is judged again
            return None

    def path(self, step: int, name: str = ROUNDS) -> Path:
        """The file of a round, counted from 0; ``name``: ``rounds`` or ``aside``."""
        return self._folder / name / f"round-{step + 1:04}.jsonl"


def _joined(parts: Iterable[Sequence[float]]) -> torch.Tensor:
    """The values of all prompts, end to end, in float64."""
    return torch.tensor([float(x) for part in parts for x in part], dtype=torch.float64)


def _outcome(listed: Sequence[Any]) -> tuple[int, int, float]:
    i, k, x = listed
    return int(i), int(k), math.nan if x is None else float(x)


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines() if path.exists() else []


def _split(rollouts: Rollouts, x_N: torch.Tensor) -> list[list[Any]]:
    """Values of responses, by group."""
    many = np.cumsum([len(group.continuations) for group in rollouts.groups])[:-1]
    return [part.tolist() for part in np.split(x_N.numpy(), many)]


def _sums(rollouts: Rollouts, x_M: torch.Tensor) -> list[list[float]]:
    return _split(rollouts, per_response(x_M, rollouts.length_N))
