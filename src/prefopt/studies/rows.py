"""A study as a source of rows: what ``--data STUDY.db`` reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
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
        """Rows in the canonical layout: prompt, responses, votes, and tiers where there is an order."""
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
                return export_rows(study, AS_IT_IS)
        except StudyError as error:
            raise DataError(str(error).removeprefix(f"{self.path}: "), file=str(self.path)) from None
