# Written by docs/make_stubs.py; tests/test_stubs.py keeps it current.
"""Studies in which people compare responses.

``prefopt.collect.new``, ``invite``, ``stats`` and so on are the commands of ``prefopt collect`` as functions; the page
itself is served by ``prefopt collect serve``."""

from pathlib import Path
from prefopt.api.types import Name, Names
from prefopt.studies.summary import StudySummary
from typing import Literal

def backup(
    study: Name,
    output: Name,
) -> Path:
    """Copy a study, also while it is served; returns the copy. ``help(prefopt.collect.backup)`` lists all options."""
    ...

def check(
    study: Name,
) -> list[str]:
    """Check a study against its digests; returns a line for each damage. ``help(prefopt.collect.check)`` lists all options."""
    ...

def export(
    study: Name,
    *,
    output: Name,
    eval_output: Name | None = None,
    overwrite: bool = False,
    form: Literal['pairs', 'rankings', 'soft', 'votes'] = 'pairs',
    disagreement: Literal['majority', 'unanimous', 'every'] = 'majority',
    ties: Literal['drop', 'half', 'keep'] = 'drop',
    all_bad: Literal['drop', 'tie'] = 'drop',
    min_votes: int = 1,
    exclude: Names | None = None,
    eval_fraction: float = 0.0,
    seed: int = 0,
) -> Path:
    """Write votes as pairs, rankings or soft labels to train on; returns the file. ``help(prefopt.collect.export)`` lists all options."""
    ...

def import_(
    study: Name,
    *,
    format: Name | None = None,
    columns: Names | None = None,
    label_means: Names | None = None,
    ignore_columns: Names | None = None,
    header: Literal['first-line', 'none'] = 'first-line',
    picture_folder: Name | None = None,
    on_bad_row: Literal['refuse', 'skip'] = 'refuse',
    responses: Names | None = None,
    gold: Names | None = None,
    for_everyone: float = 0.0,
) -> Path:
    """Add items to a study; returns its file. ``help(prefopt.collect.import_)`` lists all options."""
    ...

def invite(
    study: Name,
    name: Name,
    *,
    lead: bool = False,
    days: float = 30.0,
    revoke: bool = False,
    url: Name | None = None,
) -> None:
    """Create an invitation for one annotator, and print the link. ``help(prefopt.collect.invite)`` lists all options."""
    ...

def new(
    study: Name,
    *,
    title: Name | None = None,
    instructions: Name | None = None,
    tags: Names | None = None,
    overlap: int = 1,
    gold_every: int = 10,
    format: Name | None = None,
    columns: Names | None = None,
    label_means: Names | None = None,
    ignore_columns: Names | None = None,
    header: Literal['first-line', 'none'] = 'first-line',
    picture_folder: Name | None = None,
    on_bad_row: Literal['refuse', 'skip'] = 'refuse',
    responses: Names | None = None,
    gold: Names | None = None,
    for_everyone: float = 0.0,
    prompts: Names | None = None,
    model: Names | None = None,
    num: int = 2,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    seed: int = 0,
    top_p: float = 1.0,
    dtype: Literal['auto', 'float32', 'bfloat16', 'float64'] = 'auto',
    device: Name | None = None,
    threads: int | None = None,
) -> Path:
    """Create a study in which people compare responses; returns its file. ``help(prefopt.collect.new)`` lists all options."""
    ...

def stats(
    study: Name,
) -> StudySummary:
    """Progress and agreement of a study. ``help(prefopt.collect.stats)`` lists all options."""
    ...
