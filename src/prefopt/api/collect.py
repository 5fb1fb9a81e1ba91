"""``prefopt.collect.new``, ``invite``, ``stats`` and so on: the commands of ``prefopt collect`` as functions. The page
itself is served by ``prefopt collect serve``, a command that does not end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.api.functions import Command, command_function
from prefopt.config import collect
from prefopt.core.plugins import imported

if TYPE_CHECKING:
    from prefopt.studies.summary import StudySummary


def _printed(name: str, result: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The command, which prints what it did; then a result from its config."""

    def run(config: Any) -> Any:
        imported(f"prefopt.cli.collect:collect_{name}")(config)
        return result(config)

    return run


def _study(config: Any) -> Path:
    return Path(config.study)


def _output(config: Any) -> Path:
    return Path(config.output)


def _stats(config: collect.CollectStatsConfig) -> StudySummary:
    from prefopt.studies.study import Study
    from prefopt.studies.summary import summarise

    with Study(Path(config.study)) as study:
        return summarise(study)


def _check(config: collect.CollectCheckConfig) -> list[str]:
    from prefopt.studies.study import check_study_file

    return check_study_file(Path(config.study))


COMMANDS = {
    "new": Command(
        collect.CollectNewConfig,
        _printed("new", _study),
        "Path",
        "Create a study in which people compare responses; returns its file.",
    ),
    "import_": Command(
        collect.CollectImportConfig, _printed("import", _study), "Path", "Add items to a study; returns its file."
    ),
    "invite": Command(
        collect.CollectInviteConfig,
        _printed("invite", lambda config: None),
        "None",
        "Create an invitation for one annotator, and print the link.",
    ),
    "stats": Command(
        collect.CollectStatsConfig, _stats, "StudySummary", "Progress and agreement of a study.", ("json",)
    ),
    "export": Command(
        collect.CollectExportConfig,
        _printed("export", _output),
        "Path",
        "Write votes as pairs, rankings or soft labels to train on; returns the file.",
    ),
    "check": Command(
        collect.CollectCheckConfig,
        _check,
        "list[str]",
        "Check a study against its digests; returns a line for each damage.",
    ),
    "backup": Command(
        collect.CollectBackupConfig,
        _printed("backup", _output),
        "Path",
        "Copy a study, also while it is served; returns the copy.",
    ),
}
FUNCTIONS = {name: command_function(name, __name__, command) for name, command in COMMANDS.items()}
globals().update(FUNCTIONS)
