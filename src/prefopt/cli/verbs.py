"""What ``prefopt`` can do: a line for every command."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from prefopt.config.collect import (
    CollectBackupConfig,
    CollectCheckConfig,
    CollectExportConfig,
    CollectImportConfig,
    CollectInviteConfig,
    CollectNewConfig,
    CollectServeConfig,
    CollectStatsConfig,
)
from prefopt.config.compare import CompareConfig
from prefopt.config.dpo import DpoConfig
from prefopt.config.ppo import PpoConfig
from prefopt.config.rlhf import RewardConfig, RlhfConfig
from prefopt.config.sample import ChatConfig, SampleConfig
from prefopt.config.sft import SftConfig
from prefopt.config.sweeps import FrontierConfig, MethodsConfig
from prefopt.config.tools import (
    CacheClearConfig,
    CacheListConfig,
    CacheVerifyConfig,
    DataCheckConfig,
    DataConvertConfig,
    DataLayoutsConfig,
    DataSplitConfig,
    DemoConfig,
    EnvConfig,
    LossesConfig,
    MergeConfig,
    PlotConfig,
    PushConfig,
    ReportConfig,
    RunsConfig,
    ScoreConfig,
)


@dataclass(frozen=True, slots=True)
class Verb:
    """One command. ``does`` is the module and function that take a ``config``, imported when they are called.

    ``document``: the options may also stand in a file.
    """

    help: str
    config: type
    does: str
    document: bool = False

    def run(self, config: Any) -> int:
        """The exit status: what the function gives where that is a number, else 0."""
        status = self.function()(config)
        return status if isinstance(status, int) else 0

    def function(self) -> Callable[[Any], Any]:
        """What ``does`` names."""
        module, name = self.does.split(":")
        return getattr(import_module(f"prefopt.{module}"), name)  # type: ignore[no-any-return]


VERBS: dict[str, Verb] = {
    "sft": Verb(
        "fine-tune a model on demonstrations, the chosen side of preferences, or raw text",
        SftConfig,
        "methods.sft:run",
        document=True,
    ),
    "dpo": Verb("align a model with preferences, by DPO or another loss", DpoConfig, "methods.dpo:run", document=True),
    "reward": Verb(
        "train a reward model on preferences: one number for a response",
        RewardConfig,
        "methods.reward:run",
        document=True,
    ),
    "ppo": Verb(
        "align a model with a reward, by PPO or RLOO, on responses that it writes itself",
        PpoConfig,
        "methods.ppo:run",
        document=True,
    ),
    "rlhf": Verb(
        "the chain: supervised fine-tuning, reward model, PPO; what is done already is skipped",
        RlhfConfig,
        "methods.rlhf:run",
        document=True,
    ),
    "frontier": Verb(
        "measure roads to a better model: reward against divergence, for DPO, PPO and others on the same data",
        FrontierConfig,
        "cli.tools:show_frontier",
        document=True,
    ),
    "methods": Verb(
        "measure what DPO and what reward model and PPO cost and give, over seeds and learning rates",
        MethodsConfig,
        "cli.tools:show_methods",
        document=True,
    ),
    "sample": Verb(
        "draw responses from a model for a file of prompts",
        SampleConfig,
        "cli.tools:sample_to_file",
        document=True,
    ),
    "chat": Verb("talk to a model in the terminal, or to two and say which is better", ChatConfig, "chat.session:chat"),
    "compare": Verb(
        "tell which of two or more models is better on some prompts, and how sure that is",
        CompareConfig,
        "cli.tools:compare_models",
    ),
    "losses": Verb(
        "list the losses that a model can be aligned with, or tell all of one",
        LossesConfig,
        "cli.tools:show_losses",
    ),
    "merge": Verb(
        "fold an adapter into its model, and check that the outputs are the same",
        MergeConfig,
        "cli.tools:merge_model",
    ),
    "push": Verb(
        "upload a finished model to the Hugging Face Hub, once you confirm", PushConfig, "cli.tools:push_model"
    ),
    "runs": Verb("list runs, tell about one, or compare several", RunsConfig, "cli.tools:list_runs"),
    "plot": Verb("draw the curves of runs", PlotConfig, "cli.tools:draw_runs"),
    "report": Verb("tell of runs in one HTML file", ReportConfig, "cli.tools:report_runs"),
    "data layouts": Verb("list the layouts of rows, or tell all of one", DataLayoutsConfig, "cli.tools:show_layouts"),
    "data check": Verb(
        "count what files hold, and name every problem by its rows; exit status 1 where there are errors",
        DataCheckConfig,
        "cli.tools:check_data",
    ),
    "data convert": Verb("write rows in another layout, or as parquet", DataConvertConfig, "data.convert:run_convert"),
    "data split": Verb("split rows by prompt into two files", DataSplitConfig, "data.convert:run_split"),
    "collect new": Verb(
        "make a study in which people compare responses: from files, or sampled from models",
        CollectNewConfig,
        "cli.collect:new_study",
        document=True,
    ),
    "collect serve": Verb("serve the page on which people vote", CollectServeConfig, "cli.collect:serve_study"),
    "collect invite": Verb("make a link for one person", CollectInviteConfig, "cli.collect:invite_person"),
    "collect stats": Verb("tell progress and agreement", CollectStatsConfig, "cli.collect:show_stats"),
    "collect export": Verb(
        "write votes as pairs, rankings or soft labels to train on",
        CollectExportConfig,
        "cli.collect:export_study",
    ),
    "collect import": Verb("add items to a study", CollectImportConfig, "cli.collect:import_items"),
    "collect check": Verb("check a study against its digests", CollectCheckConfig, "cli.collect:check_study"),
    "collect backup": Verb("copy a study, also while it is served", CollectBackupConfig, "cli.collect:backup_study"),
    "cache list": Verb(
        "list what is kept: log-probabilities of reference models, tokenised data, and samples that were compared",
        CacheListConfig,
        "cli.tools:list_cache",
    ),
    "cache verify": Verb("check it against its checksums", CacheVerifyConfig, "cli.tools:verify_cache"),
    "cache clear": Verb("remove it", CacheClearConfig, "cli.tools:clear_cache"),
    "env": Verb(
        "print versions, devices, folders and what is missing, for reports of bugs",
        EnvConfig,
        "cli.tools:show_environment",
    ),
    "score": Verb(
        "give responses numbers, by a rule, a reward model or a function of your own",
        ScoreConfig,
        "cli.tools:score_file",
    ),
    "demo": Verb("run the demonstration, offline, in a few minutes", DemoConfig, "cli.tools:show_demo"),
}
