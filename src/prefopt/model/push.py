"""Uploading a finished model to the Hugging Face Hub: listed first, sent after confirmation, nothing but the model."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.core.files import MARKS, expanded, one_below
from prefopt.core.hub import no_telemetry, why_not_written
from prefopt.core.model_folder import ADAPTER_CONFIG, read_object
from prefopt.core.terminal import size
from prefopt.errors import ConfigError, ModelError, RunError

MODEL_FILES = (".safetensors", ".json", ".jinja", ".txt", ".model", ".md", ".gguf")
MODEL_NAMES = ("LICENSE", "LICENCE", "NOTICE")
RUN_FILES = ("run.json", "metrics.jsonl", "config.yaml")
_TEXT = (".json", ".md", ".yaml", ".jsonl", ".txt")


@dataclass(frozen=True, slots=True)
class UploadPlan:
    """Files to send with their sizes, and those left out with the reason; names are relative to ``folder``."""

    folder: Path
    files: dict[str, int]
    left_out: dict[str, str]
    warnings: list[str]

    def in_words(self, repo: str, private: bool) -> list[str]:
        """Lines to show before anything is sent."""
        width = max(map(len, self.files))
        lines = [f"{self.folder} to https://huggingface.co/{repo} ({'private' if private else 'public'}):"]
        lines += [f"  {name:{width}}  {size(count):>9}" for name, count in self.files.items()]
        lines.append(f"  {len(self.files)} files, {size(sum(self.files.values()))}")
        lines += [f"left out: {name} ({why})" for name, why in self.left_out.items()]
        return lines + [f"note: {warning}" for warning in self.warnings]


def plan_upload(folder: str | Path, *, run: bool = False, checkpoints: bool = False) -> UploadPlan:
    """The files of ``folder`` to send. Raises :class:`ModelError` where it holds no finished model."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder")
    if not any((folder / mark).is_file() for mark in MARKS):
        remedy = one_below(folder) or "; name one that does"
        raise ModelError(f"{folder} holds no finished model (no {', no '.join(MARKS)}){remedy}")
    if not list(folder.glob("*.safetensors")):
        raise ModelError(f"{folder} holds no weights (*.safetensors); finish the run that writes into it")
    files: dict[str, int] = {}
    left_out: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        if why := _why_not(path, run=run, checkpoints=checkpoints):
            left_out[path.name + "/" * path.is_dir()] = why
        else:
            inside = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
            files |= {str(p.relative_to(folder)): p.stat().st_size for p in inside}
    return UploadPlan(folder, files, left_out, _warnings(folder, files))


def push(planned: UploadPlan, repo: str, *, private: bool = True) -> str:
    """Send the planned files without confirmation; returns the address of the commit. Raises :class:`RunError` for
    errors of the Hub or the network, and where a repository that should be private is public."""
    no_telemetry()
    import huggingface_hub

    hub: Any = huggingface_hub
    if not sys.stderr.isatty():
        hub.utils.disable_progress_bars()
    api = hub.HfApi()
    try:
        name = api.create_repo(repo, private=private, exist_ok=True).repo_id
        if private and not api.repo_info(name).private:
            raise RunError(
                f"--repo {repo} exists and is public: nothing was sent. Make it private on its page, name another, or"
                " give --private false to send it there"
            )
        commit = api.upload_folder(
            repo_id=name,
            folder_path=str(planned.folder),
            allow_patterns=list(planned.files),
            commit_message=f"Upload {planned.folder.resolve().name} with prefopt",
        )
    except Exception as error:
        if (why := why_not_written(error, repo)) is None:
            raise
        raise RunError(f"--repo {repo}: {why}") from error
    return str(commit.commit_url)


def confirmed(yes: bool) -> bool:
    """Whether the user confirms. Raises :class:`ConfigError` where standard input is no terminal."""
    if yes:
        return True
    if not sys.stdin.isatty():
        raise ConfigError("nothing was sent: give --yes to send this without being asked")
    return input("Send it? [y/N] ").strip().lower() in ("y", "yes")


def _why_not(path: Path, *, run: bool, checkpoints: bool) -> str | None:
    """Why a file or folder is left out; None where it is sent."""
    if path.name.startswith("."):
        return "hidden"
    if path.is_symlink() and not path.resolve().is_relative_to(path.parent.resolve()):
        return "a link out of the folder"
    if path.name in RUN_FILES:
        return None if run else "the record of the run; --with-run sends it"
    if path.name == "checkpoints" or path.stem == "optimizer":
        return None if checkpoints else "for resuming; --with-checkpoints sends it"
    if path.is_dir() or not (path.suffix in MODEL_FILES or path.stem in MODEL_NAMES):
        return "no part of a model"
    return None


def _warnings(folder: Path, files: dict[str, int]) -> list[str]:
    """Contents that should perhaps not be public, or that others cannot use."""
    found = []
    personal = re.compile(rf"{re.escape(str(Path.home()))}(?=/)|/(?:home|Users)/[\w.-]+")
    for name in files:
        path = folder / name
        if path.suffix not in _TEXT or files[name] >= 5_000_000:
            continue
        if seen := personal.search(path.read_text("utf-8", errors="replace")):
            found.append(f"{name} names folders of this machine ({seen[0]}); whoever may read the repository sees them")
    base = str(read_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or "")
    if base and (base.startswith((".", "/", "~")) or expanded(base).exists()):
        found.append(
            f"{ADAPTER_CONFIG} names its model by a folder of this machine ({base}): put its name on the Hub"
            " there, or merge the adapter first (prefopt merge)"
        )
    return found
