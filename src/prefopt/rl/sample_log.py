"""Samples of every step with their scores, in ``samples.jsonl`` of the output folder: rows of the canonical layout, so
that they can be read, scored again and trained on like any preferences."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prefopt.core.files import output_errors
from prefopt.data.layouts import LAYOUTS
from prefopt.data.tokenizer import Tokenizer
from prefopt.generate.model_io import PromptSet, continuation, without_stop
from prefopt.losses.rl import per_response
from prefopt.records import Message, Response, tiers_of
from prefopt.rl.rollouts import Rollouts

SAMPLES = "samples.jsonl"


@dataclass(slots=True)
class SampleLog:
    """Appends the responses to the first ``prompts_kept`` prompts of a step to a file. ``scores`` are the reward's;
    ``components`` those of its parts, where it has several; ``kl`` is log pi - log ref, summed over the response."""

    path: Path
    prompts: PromptSet
    tokenizer: Tokenizer
    stop: Sequence[int]
    prompts_kept: int
    _begun: bool = False

    def write(self, step: int, indices: Sequence[int], rollouts: Rollouts) -> None:
        """Add the rows of ``step``, whose prompts are those at ``indices``. Rows of it and of later steps, of a start
        that was killed, are dropped."""
        if not self.prompts_kept:
            return
        if not self._begun:
            self._forget_from(step)
            self._begun = True
        rows = self._rows(step, indices, rollouts)
        with output_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def _forget_from(self, step: int) -> None:
        if not self.path.exists():
            return
        kept = []
        with output_errors(self.path):
            for line in self.path.read_text("utf-8", "replace").splitlines():
                try:
                    if json.loads(line)["step"] < step:
                        kept.append(line)
                except (ValueError, KeyError, TypeError):  # cut off by a kill: that step is made again
                    continue
            aside = self.path.with_name(f".{self.path.name}")
            aside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
            aside.replace(self.path)

    def _rows(self, step: int, indices: Sequence[int], rollouts: Rollouts) -> list[dict[str, object]]:
        kl_N = per_response(rollouts.logp_M - rollouts.ref_logp_M, rollouts.length_N)
        rows, first = [], 0
        for i, group in list(zip(indices, rollouts.groups, strict=True))[: self.prompts_kept]:
            of = slice(first, first := first + len(group.continuations))
            scores = rollouts.score_N[of].tolist()
            more: dict[str, Any] = {"step": step, "kl": [round(x, 6) for x in kl_N[of].tolist()]}
            if rollouts.part_N:
                more["components"] = {name: part_N[of].tolist() for name, part_N in rollouts.part_N.items()}
            prompt, ended, responses = self.prompts.rows[i], rollouts.finished_N[of].tolist(), []
            for c, whole in zip(group.continuations, ended, strict=True):
                text = continuation(self.tokenizer, group.prefix, without_stop(c.ids, self.stop))
                text = text if prompt.text else text.strip()
                responses.append(Response((Message("assistant", text),), cut=not whole))
            extra = {**prompt.extra, **more}
            row = replace(
                prompt,
                responses=tuple(responses),
                tiers=tiers_of(scores),
                scores=tuple(scores),
                labels=None,
                extra=extra,
            )
            rows.append(LAYOUTS["canonical"].write(replace(row, votes=None)))
        return rows
