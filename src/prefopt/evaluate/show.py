"""What ``prefopt runs`` prints."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from prefopt.errors import RunError
from prefopt.evaluate.chart import chart
from prefopt.evaluate.runs import as_json as plain
from prefopt.evaluate.runs import columns, comparison, find_runs, list_of, summary
from prefopt.screen import json_text
from prefopt.train.diagnose import diagnose, in_words
from prefopt.train.history import History

log = logging.getLogger(__name__)

WIDTH = 72


def show_runs(folders: Sequence[str], *, as_json: bool = False) -> list[str]:
    """Lines: one output folder is told about, several are compared, any other folder has its runs listed.

    Raises :class:`RunError` as :func:`find_runs`, and where runs to compare and folders to list are mixed.
    """
    found = [find_runs(folder) for folder in folders]
    runs = [run for several, _ in found for run in several]
    if as_json:
        for line in (line for _, damaged in found for line in damaged):
            log.warning("%s", line)  # a program reads what is printed, and a person what stands beside it
        return json_text([plain(run) for run in runs]).split("\n")
    single = [Path(folder, "run.json").exists() for folder in folders]
    if len(folders) == 1 and single[0]:
        return about(runs[0])
    if all(single):
        return comparison(runs)
    if any(single):
        raise RunError(
            f"{folders[single.index(False)]} holds no run of its own, {folders[single.index(True)]} does: name output"
            " folders, which are compared, or folders of runs, which are listed"
        )
    lines: list[str] = []
    for folder, (several, damaged) in zip(folders, found, strict=True):
        lines += [f"{folder}:"] if len(folders) > 1 else []
        lines += list_of(several, Path(folder)) if several else [f"no run of prefopt below {folder}"]
        lines += damaged
    return lines


def about(run: History) -> list[str]:
    """One run: where it stands, its loss as a curve, and what its numbers say."""
    lines = columns([[f"{name}:", value] for name, value in summary(run).items()])
    curve, held_out = run.curve("loss"), run.curve("loss", held_out=True)
    title = f"loss of training batches{', and ● of held-out rows' if held_out else ''}"
    if scores := run.curve("objective/scores"):  # the loss of such a run says nothing
        curve, title = scores, "reward of the policy's samples"
    if len(curve.steps) > 1:
        lines += ["", *chart(curve, held_out, title=title, width=WIDTH)]
    if told := in_words(diagnose(run)):
        lines += ["", *told]
    return lines
