"""A copy of a study, whole whatever is written meanwhile."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

from prefopt.errors import StudyError
from prefopt.studies.connect import check_file, connect, errors_of, put_in_place

PAGES = 4096


def backup(path: Path, output: Path) -> int:
    """Copy the study as it is at one moment, also while it is served; the bytes written.

    The copy is made aside, checked and renamed. Raises :class:`StudyError` where ``output`` exists or cannot be
    written, and for a study that is damaged.
    """
    check_file(path)
    if output.exists():
        raise StudyError(f"{output}: exists; name another file")
    aside = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        aside.unlink(missing_ok=True)
        with errors_of(output):
            source, copy = connect(path, read_only=True), sqlite3.connect(aside, isolation_level=None)
            try:
                with source:
                    source.execute("BEGIN")  # one moment for all pages, so that writers do not start it over
                    source.execute("SELECT count(*) FROM setting").fetchone()
                    source.backup(copy, pages=PAGES)
                copy.execute("PRAGMA journal_mode = DELETE")  # one file, without a log beside it
                found = copy.execute("PRAGMA quick_check").fetchone()[0]
            finally:
                copy.close()
                source.close()
        if found != "ok":
            raise StudyError(f"{path}: is damaged ({found}); go back to an earlier backup")
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
