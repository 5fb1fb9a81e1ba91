"""A copy of a study, whole whatever is written meanwhile, and whether a study is what was written."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

from prefopt.disk.write import aside_of
from prefopt.errors import StudyError
from prefopt.studies.connect import check_file, connect, errors_of, own_file, put_in_place
from prefopt.studies.schema import check_version
from prefopt.studies.seal import problems

PAGES = 4096


def backup(path: Path, output: Path) -> int:
    """Copy the study as it is at one moment, also while it is served; the bytes written.

    The copy is made aside, checked and renamed. Raises :class:`StudyError` where ``output`` exists or cannot be
    written, and for a study that is damaged.
    """
    check_file(path)
    if output.exists():
        raise StudyError(f"{output}: exists; name another file")
    aside = aside_of(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        aside.unlink(missing_ok=True)
        own_file(aside)
        with errors_of(path):
            source, copy = connect(path, read_only=True), sqlite3.connect(aside, isolation_level=None)
            try:
                with source:
                    source.execute("BEGIN")  # one moment for all pages, so that writers do not start it over
                    source.execute("SELECT count(*) FROM setting").fetchone()
                    source.backup(copy, pages=PAGES)
                copy.execute("PRAGMA journal_mode = DELETE")  # one file, without a log beside it
                copy.row_factory = sqlite3.Row
                found = list(problems(copy))
            finally:
                copy.close()
                source.close()
        if found:
            raise StudyError(
                f"{path}: is damaged ({found[0]}); prefopt collect check {path} lists all of it; go back to an earlier"
                " backup"
            )
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        put_in_place(aside, output)
        return output.stat().st_size
    except FileExistsError:
        raise StudyError(f"{output}: exists; name another file") from None
    except OSError as error:
        raise StudyError(f"{output}: cannot be written ({error.strerror}); make room or name another file") from error
    finally:
        aside.unlink(missing_ok=True)


def check_study_file(path: Path) -> list[str]:
    """All that is wrong with a study, a line each; one that is served is checked as it is at one moment.

    Raises :class:`StudyError` for what is no study at all.
    """
    check_file(path)
    try:
        with errors_of(path):
            connection = connect(path, read_only=True)
            try:
                connection.execute("BEGIN")
                check_version(connection, str(path))
                return list(problems(connection))
            finally:
                connection.close()
    except StudyError as error:
        return [str(error).removeprefix(f"{path}: ")]
