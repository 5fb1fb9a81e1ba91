"""The Hugging Face Hub: one-line explanations of its errors, no telemetry, and no foreign code from it.

Errors are recognised by the names of their classes: several libraries raise them, and importing one takes a second.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

LOG_IN = "hf auth login"
TOKENS = "https://huggingface.co/settings/tokens"
_NETWORK = set(
    "ConnectionError TimeoutError OfflineModeIsEnabled LocalEntryNotFoundError TransportError RequestException".split()
)


def no_telemetry() -> None:
    """Switch off the library's telemetry; call it before the first request."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import constants

    constants.HF_HUB_DISABLE_TELEMETRY = True


def import_bitsandbytes() -> None:
    """Import bitsandbytes, where it is installed; call it before PEFT, which imports it, is imported.

    On some processors its import would fetch native code from the Hub and load it, where the package kernels is
    installed, and else warn that it is not. Layers of 4 bits do without (:mod:`prefopt.model.quantised`).
    """
    if "bitsandbytes" in sys.modules or importlib.util.find_spec("bitsandbytes") is None:
        return
    logger, kernels = logging.getLogger("bitsandbytes.backends.cpu.ops"), sys.modules.get("kernels")
    sys.modules["kernels"] = None  # type: ignore[assignment]  # what cannot be imported
    logger.addFilter(_is_not_of_kernels)
    try:
        with suppress(ImportError):  # told where it is needed
            importlib.import_module("bitsandbytes")
    finally:
        logger.removeFilter(_is_not_of_kernels)
        del sys.modules["kernels"]
        if kernels is not None:
            sys.modules["kernels"] = kernels


def _is_not_of_kernels(record: logging.LogRecord) -> bool:
    return "kernels-community" not in str(record.msg)


def fetched(name: str, file: str) -> Path | None:
    """The cached path of a file of a model on the Hub; None where there is none (loading reports why)."""
    no_telemetry()
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, file))
    except Exception:  # no such name, no such file, no network
        return None


def cached(name: str, file: str) -> Path | None:
    """The path of a file of a model in the Hub's cache; None where it is not there. Asks no server."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, file)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def why_not_read(error: BaseException, name: str) -> str | None:
    """Why the model or adapter ``name`` could not be read from the Hub, with the remedy; None for other errors."""
    kinds, status = _kinds(error), _status(error)
    if "GatedRepoError" in kinds:
        return f"is gated: ask for access at https://huggingface.co/{name}, then log in with: {LOG_IN}"
    if "RepositoryNotFoundError" in kinds or status == 404:
        return f"no such folder here, and none on the Hub; check the spelling (a private one needs: {LOG_IN})"
    if status in (401, 403):
        return f"the Hub denies access to it ({status}); log in with: {LOG_IN}"
    if "HFValidationError" in kinds:
        return "no such folder here, and not a valid name on the Hub; give a folder, or OWNER/NAME"
    if kinds & _NETWORK:
        return f"no such folder here, and the Hub cannot be asked{_offline()}; check the name, or download it first"
    return f"the Hub answered {status}; try again later" if status else None


def why_not_written(error: BaseException, repo: str) -> str | None:
    """Why ``repo`` could not be written, with the remedy; None for other errors."""
    kinds, status = _kinds(error), _status(error)
    if status == 401 or "LocalTokenNotFoundError" in kinds:
        return f"not logged in to the Hub (401); log in with: {LOG_IN}, or set HF_TOKEN to a token with write access"
    if status == 403:
        return f"your token has no write access there (403); make one that has at {TOKENS}, or name another --repo"
    if status == 404:
        owner = repo.partition("/")[0]
        return f"the Hub knows no {owner!r}, or your token may not see it (404); check the name before the slash"
    if "HFValidationError" in kinds:
        return "not a repository name; give OWNER/NAME, of letters, digits, dashes, dots and underscores"
    if kinds & _NETWORK:
        return f"the Hub cannot be reached{_offline()}; try again: files already sent are not sent twice"
    return f"the Hub answered {status}; try again: files already sent are not sent twice" if status else None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and its causes: uploads wrap errors."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__


def _kinds(error: BaseException) -> set[str]:
    """The names of the classes of all of them, with base classes."""
    return {kind.__name__ for one in _chain(error) for kind in type(one).__mro__}


def _status(error: BaseException) -> int | None:
    """The HTTP status in any of them."""
    found = (getattr(getattr(one, "response", None), "status_code", None) for one in _chain(error))
    return next((status for status in found if isinstance(status, int)), None)


def _offline() -> str:
    return " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0").lower() not in ("", "0", "false") else ""
