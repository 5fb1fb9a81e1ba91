"""JSON that this program wrote, read back: whatever happened to the file since is told in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from prefopt.errors import RunError, UserError

Made = TypeVar("Made")


def parsed(text: bytes) -> Any:
    """Raises ``ValueError`` for whatever is no JSON in UTF-8, or is nested too deep to be read."""
    try:
        return json.loads(text.decode("utf-8"))
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    except ValueError:
        raise ValueError("it is not JSON") from None
    except (RecursionError, MemoryError):
        raise ValueError("it is nested too deep") from None


def read_json(path: Path, make: Callable[[Any], Made], remedy: str) -> Made:
    """What ``make`` makes of the JSON in a file; ``make`` may fail in any way on what is not as it was written.

    Raises :class:`RunError` where the file cannot be read, or ``make`` failed: with ``remedy``, what to do then. What
    ``make`` says to a person itself is let through.
    """
    try:
        return make(parsed(path.read_bytes()))
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}); restore it, or {remedy}") from None
    except UserError:
        raise
    except Exception as error:
        told = " ".join(f"{error}".split())[:100]
        why = told if isinstance(error, (ValueError, TypeError)) else "it is not what was written there"
        raise RunError(
            f"{path} cannot be read ({why}): damaged, or of another version; restore it, or {remedy}"
        ) from None


def printable(value: Any) -> Any:
    """The same with what no file and no terminal takes in its texts replaced: halves of surrogate pairs."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [printable(x) for x in value]
    return {printable(n): printable(x) for n, x in value.items()} if isinstance(value, dict) else value
