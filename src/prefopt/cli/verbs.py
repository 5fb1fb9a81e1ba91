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


def _tool(name: str, help: str, config: type, path: str = "", *, yaml: bool = False) -> tuple[str, Verb]:
    """A command run by the function of its name in ``cli/tools.py``, unless ``path`` names another."""
    return name, Verb(help, config, path or f"prefopt.cli.tools:{name.replace(' ', '_')}", yaml)


def _study(name: str, help: str, config: type, *, yaml: bool = False) -> tuple[str, Verb]:
    return f"collect {name}", Verb(help, config, f"prefopt.cli.collect:{name}_study", yaml)


VERBS: dict[str, Verb] = {
    **{m.name: Verb(m.help, m.config, m.run_path, yaml=True) for m in METHODS.values()},
    **dict(
        [
            _tool(
                "rlhf",
                "run the chain SFT, reward model, PPO; finished stages are skipped",
                RlhfConfig,
                "prefopt.methods.rlhf:run",
                yaml=True,
            ),
            _tool(
                "frontier",
                "measure reward against KL for DPO, PPO and other methods trained on the same data",
                FrontierConfig,
                yaml=True,
            ),
            _tool(
                "methods",
                "compare cost and quality of DPO with those of reward model and PPO, over seeds and learning rates",
                MethodsConfig,
                yaml=True,
            ),
            _tool("sample", "draw responses from a model for a file of prompts", SampleConfig, yaml=True),
            _tool(
                "chat",
                "chat with a model in the terminal, or with two and vote for the better answer",
                ChatConfig,
                "prefopt.chat.session:chat",
            ),
            _tool("compare", "compare two or more models on prompts: win rates with intervals", CompareConfig),
            _tool("losses", "list the losses, or describe one", tools.LossesConfig),
            _tool("merge", "merge an adapter into its model and check that the outputs agree", tools.MergeConfig),
            _tool("push", "upload a finished model to the Hugging Face Hub, after confirmation", tools.PushConfig),
            _tool("runs", "list runs, describe one, or compare several", tools.RunsConfig),
            _tool("plot", "plot the metrics of runs", tools.PlotConfig),
            _tool("report", "write an HTML report of runs, comparisons and sweeps", tools.ReportConfig),
            _tool("data layouts", "list the layouts of rows, or describe one", tools.DataLayoutsConfig),
            _tool(
                "data check",
                "count rows and report every problem with its rows; exit status 1 if there are errors",
                tools.DataCheckConfig,
            ),
            _tool(
                "data convert",
                "write rows in another layout, or as parquet",
                tools.DataConvertConfig,
                "prefopt.data.convert:run_convert",
            ),
            _tool(
                "data split",
                "split rows by prompt into two files",
                tools.DataSplitConfig,
                "prefopt.data.convert:run_split",
            ),
            _study(
                "new",
                "create a study in which people compare responses, from files or sampled from models",
                collect.CollectNewConfig,
                yaml=True,
            ),
            _study("serve", "serve the voting page", collect.CollectServeConfig),
            _study("invite", "create an invitation link for one annotator", collect.CollectInviteConfig),
            _study("stats", "print progress and agreement", collect.CollectStatsConfig),
            _study("export", "write votes as pairs, rankings or soft labels to train on", collect.CollectExportConfig),
            _study("import", "add items to a study", collect.CollectImportConfig),
            _study("check", "check a study against its digests", collect.CollectCheckConfig),
            _study("backup", "copy a study, also while it is served", collect.CollectBackupConfig),
            _tool(
                "cache list",
                "list what is cached: reference log-probabilities, tokenised data, and samples of compared models",
                tools.CacheListConfig,
            ),
            _tool("cache verify", "check the cache against its checksums", tools.CacheVerifyConfig),
            _tool("cache clear", "delete the cache, or entries of it", tools.CacheClearConfig),
            _tool("env", "print versions, devices, folders and missing packages, for bug reports", tools.EnvConfig),
            _tool("score", "score responses by a rule, a reward model or your own function", tools.ScoreConfig),
            _tool("demo", "run the demonstration, offline, in a few minutes", tools.DemoConfig),
        ]
    ),
}
