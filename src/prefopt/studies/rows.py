"""A study as a source of rows: what ``--data STUDY.db`` reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from prefopt.errors import DataError, StudyError
from prefopt.studies.export import Exported, How, export_rows
from prefopt.studies.study import Study

AS_IT_IS = How(form="soft", ties="half", all_bad="drop", provenance=False)
"""Every vote counts: each pair is weighed by its share of votes, beside the order that most people see."""


@dataclass(frozen=True, slots=True)
class StudyRows:
    """The rows of a study; the file may be served meanwhile."""

    path: Path

    def rows(self, name: str, keep_going: bool) -> Iterator[object]:
        """Rows in the canonical layout: prompt, responses, votes, tiers where there is an order, and the models."""
        return iter(self._read().rows)

    def digest(self) -> str:
        """SHA-256 of the rows: the file's own bytes change with every page that is opened."""
        digest = hashlib.sha256()
        for row in self._read().rows:
            digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
        return digest.hexdigest()

    def notes(self) -> list[str]:
        """What became of the votes, in words."""
        said = "; ".join(line for line in self._read().lines() if not line.endswith(" rows"))
        return [f"{self.path}: {said}"] if said else []

    def _read(self) -> Exported:
        try:
            with Study(self.path, read_only=True) as study:
                query = "SELECT (SELECT coalesce(max(id), 0) FROM event), (SELECT count(*) FROM item)"
                with study.reading() as connection:
                    state = tuple(connection.execute(query).fetchone())
            return _exported(self.path, study.settings.id, state)
        except StudyError as error:
            raise DataError(str(error).removeprefix(f"{self.path}: "), file=str(self.path)) from None


@lru_cache(maxsize=2)  # a run asks for notes, digest and rows one after another
def _exported(path: Path, study: str, state: tuple[int, int]) -> Exported:
    with Study(path, read_only=True) as opened:
        return export_rows(opened, AS_IT_IS)
