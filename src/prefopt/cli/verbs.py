"""The commands of ``prefopt``: a row each. Training methods come from :data:`prefopt.config.methods.METHODS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from prefopt.config import collect, tools
from prefopt.config.compare import CompareConfig
from prefopt.config.methods import METHODS, load_function
from prefopt.config.rlhf import RlhfConfig
from prefopt.config.sample import ChatConfig, SampleConfig
from prefopt.config.sweeps import FrontierConfig, MethodsConfig


@dataclass(frozen=True, slots=True)
class Verb:
    """One command. ``path`` is the ``module:function`` that takes a ``config``, imported when the command runs.

    ``yaml``: options may also come from a file named by ``--config``.
    """

    help: str
    config: type
    path: str
    yaml: bool = False

    def function(self) -> Callable[[Any], Any]:
        """Import and return what ``path`` names."""
        return load_function(self.path)

    def run(self, config: Any) -> int:
        """Run the command. Returns its exit status: what the function returns if that is an integer, else 0."""
        status = self.function()(config)
        return status if isinstance(status, int) else 0


ROWS: list[tuple[str, type, str]] = [
    ("rlhf", RlhfConfig, "run the chain SFT, reward model, PPO; finished stages are skipped"),
    ("frontier", FrontierConfig, "measure reward against KL for DPO, PPO and other methods on the same data"),
    ("methods", MethodsConfig, "compare cost and quality of DPO with those of reward model and PPO"),
    ("sample", SampleConfig, "draw responses from a model for a file of prompts"),
    ("chat", ChatConfig, "chat with a model in the terminal, or with two and vote for the better answer"),
    ("compare", CompareConfig, "compare two or more models on prompts: win rates with intervals"),
    ("losses", tools.LossesConfig, "list the losses, or describe one"),
    ("merge", tools.MergeConfig, "merge an adapter into its model and check that the outputs agree"),
    ("push", tools.PushConfig, "upload a finished model to the Hugging Face Hub, after confirmation"),
    ("runs", tools.RunsConfig, "list runs, describe one, or compare several"),
    ("plot", tools.PlotConfig, "plot the metrics of runs"),
    ("report", tools.ReportConfig, "write an HTML report of runs, comparisons and sweeps"),
    ("data layouts", tools.DataLayoutsConfig, "list the layouts of rows, or describe one"),
    ("data check", tools.DataCheckConfig, "count rows and report every problem; exit status 1 if there are errors"),
    ("data convert", tools.DataConvertConfig, "write rows in another layout, or as parquet"),
    ("data split", tools.DataSplitConfig, "split rows by prompt into two files"),
    ("collect new", collect.CollectNewConfig, "create a study in which people compare responses"),
    ("collect serve", collect.CollectServeConfig, "serve the voting page"),
    ("collect invite", collect.CollectInviteConfig, "create an invitation link for one annotator"),
    ("collect stats", collect.CollectStatsConfig, "print progress and agreement"),
    ("collect export", collect.CollectExportConfig, "write votes as pairs, rankings or soft labels to train on"),
    ("collect import", collect.CollectImportConfig, "add items to a study"),
    ("collect check", collect.CollectCheckConfig, "check a study against its digests"),
    ("collect backup", collect.CollectBackupConfig, "copy a study, also while it is served"),
    ("cache list", tools.CacheListConfig, "list cached log-probabilities, tokenised data and samples"),
    ("cache verify", tools.CacheVerifyConfig, "check the cache against its checksums"),
    ("cache clear", tools.CacheClearConfig, "delete the cache, or entries of it"),
    ("env", tools.EnvConfig, "print versions, devices, folders and missing packages, for bug reports"),
    ("score", tools.ScoreConfig, "score responses by a rule, a reward model or your own function"),
    ("demo", tools.DemoConfig, "run the demonstration, offline, in a few minutes"),
]
WITH_YAML = {"rlhf", "frontier", "methods", "sample", "collect new"}
PATHS = {
    "rlhf": "prefopt.methods.rlhf:run",
    "chat": "prefopt.chat.session:chat",
    "data convert": "prefopt.data.comparisons:run_convert",
    "data split": "prefopt.data.comparisons:run_split",
}
"""Commands that are not functions of ``cli/tools.py`` or ``cli/collect.py``, named as they are."""


def _path(name: str) -> str:
    module = "collect" if name.startswith("collect ") else "tools"
    return PATHS.get(name, f"prefopt.cli.{module}:{name.replace(' ', '_')}")


VERBS: dict[str, Verb] = {
    **{m.name: Verb(m.help, m.config, m.run_path, yaml=True) for m in METHODS.values()},
    **{name: Verb(help, config, _path(name), name in WITH_YAML) for name, config, help in ROWS},
}
