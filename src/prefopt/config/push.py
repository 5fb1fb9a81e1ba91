"""What ``prefopt push`` reads."""

from __future__ import annotations

from dataclasses import dataclass

from prefopt.config.option import check_all, option


@dataclass(frozen=True, kw_only=True)
class PushConfig:
    """A finished folder and where it goes."""

    folder: str = option(help="folder of a finished model or adapter", group="push", positional=True)
    repo: str = option(help="repository on the Hugging Face Hub, OWNER/NAME; made where there is none", group="push")
    private: bool = option(False, "make a new repository private; refused where it is there and public", group="push")
    with_run: bool = option(
        False, "upload run.json, metrics.jsonl and config.yaml too; they name folders of this machine", group="push"
    )
    with_checkpoints: bool = option(False, "upload checkpoints too, with the optimiser's state", group="push")
    yes: bool = option(False, "do not ask before anything is sent", group="push")

    def __post_init__(self) -> None:
        check_all(self)
