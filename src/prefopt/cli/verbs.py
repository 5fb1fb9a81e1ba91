"""The table of commands: what each is for, its options, an example, and the function that runs it."""

from __future__ import annotations

from dataclasses import dataclass

from prefopt.config import collect, tools
from prefopt.config.compare import CompareConfig
from prefopt.config.export import ExportConfig
from prefopt.config.frontier import FrontierConfig
from prefopt.config.launch import LaunchConfig
from prefopt.config.methods import METHODS, RlhfConfig
from prefopt.config.reward_bench import RewardBenchConfig
from prefopt.config.sample import ChatConfig, SampleConfig
from prefopt.config.sweeps import MethodsConfig
from prefopt.core.options import Config, Option, option, options


@dataclass(frozen=True, slots=True)
class Verb:
    """One command. ``path``: the ``module:function`` that takes a ``config``, imported when the command runs.

    ``yaml``: options may also come from a file named by ``--config``. ``example``: words after the command.
    """

    help: str
    config: type[Config]
    path: str
    yaml: bool = False
    example: str = ""


MODEL = "--model Qwen/Qwen2.5-0.5B-Instruct"
SWEEP = f"{MODEL} --prompts prompts.jsonl --reward my_rewards:score"
ROWS: list[tuple[str, type[Config], str, str]] = [
    (
        "rlhf",
        RlhfConfig,
        "run the chain SFT, reward model, PPO; finished stages are skipped",
        f"{MODEL} --data pairs.jsonl --output runs/rlhf",
    ),
    (
        "launch",
        LaunchConfig,
        "run a training on several GPUs, or write the job that runs it on a cluster",
        f"--gpus 8 -- dpo {MODEL} --data pairs.jsonl --output runs/dpo",
    ),
    (
        "frontier",
        FrontierConfig,
        "measure reward against KL for DPO, PPO and other methods on the same data",
        f"{SWEEP} --output runs/frontier",
    ),
    (
        "methods",
        MethodsConfig,
        "compare cost and quality of DPO with those of reward model and PPO",
        f"{SWEEP} --output runs/methods",
    ),
    (
        "sample",
        SampleConfig,
        "draw responses from a model for a file of prompts",
        "--model runs/dpo --prompts prompts.txt --output samples.jsonl",
    ),
    (
        "chat",
        ChatConfig,
        "chat with a model in the terminal, or with two and vote for the better answer",
        "--model runs/dpo",
    ),
    (
        "compare",
        CompareConfig,
        "compare two or more models on prompts: win rates with intervals",
        "--a runs/dpo --b Qwen/Qwen2.5-0.5B-Instruct --prompts prompts.txt --judge length --output judged.jsonl",
    ),
    ("losses", tools.LossesConfig, "list the losses, or describe one", "simpo"),
    (
        "merge",
        tools.MergeConfig,
        "merge an adapter into its model and check that the outputs agree",
        "--adapter runs/lora --output runs/merged",
    ),
    (
        "export",
        ExportConfig,
        "write a model as servers take it (GGUF, Ollama, vLLM), scored before and after",
        "runs/dpo exported --to gguf",
    ),
    (
        "push",
        tools.PushConfig,
        "upload a finished model to the Hugging Face Hub, after confirmation",
        "runs/dpo --repo me/my-model",
    ),
    ("runs", tools.RunsConfig, "list runs, describe one, or compare two", "runs --sort accuracy"),
    ("plot", tools.PlotConfig, "plot the metrics of runs", "runs/dpo runs/ipo --output curves.png"),
    (
        "report",
        tools.ReportConfig,
        "write an HTML report of runs, comparisons and sweeps",
        "runs/dpo runs/ipo --output report.html",
    ),
    ("data layouts", tools.DataLayoutsConfig, "list the layouts of rows, or describe one", "trl-preference"),
    (
        "data check",
        tools.DataCheckConfig,
        "count rows and report every problem; exit status 1 if there are errors",
        "pairs.jsonl",
    ),
    (
        "data convert",
        tools.DataConvertConfig,
        "write rows in another layout, or as parquet",
        "pairs.jsonl pairs.parquet",
    ),
    (
        "data split",
        tools.DataSplitConfig,
        "split rows by prompt into two files",
        "pairs.jsonl train.jsonl eval.jsonl --fraction 0.1",
    ),
    (
        "collect new",
        collect.CollectNewConfig,
        "create a study in which people compare responses",
        "study.db --responses samples.jsonl",
    ),
    ("collect serve", collect.CollectServeConfig, "serve the voting page", "study.db"),
    ("collect invite", collect.CollectInviteConfig, "create an invitation link for one annotator", "study.db anna"),
    ("collect stats", collect.CollectStatsConfig, "print progress and agreement", "study.db"),
    (
        "collect export",
        collect.CollectExportConfig,
        "write votes as pairs, rankings or soft labels to train on",
        "study.db --output pairs.jsonl",
    ),
    ("collect import", collect.CollectImportConfig, "add items to a study", "study.db --responses more.jsonl"),
    ("collect check", collect.CollectCheckConfig, "check a study against its digests", "study.db"),
    ("collect backup", collect.CollectBackupConfig, "copy a study, also while it is served", "study.db copy.db"),
    ("ui", tools.UiConfig, "open a local page on a folder of runs: curves, samples, data, chat, new runs", "runs"),
    ("cache list", tools.CacheListConfig, "list cached log-probabilities, tokenised data and samples", ""),
    ("cache verify", tools.CacheVerifyConfig, "check the cache against its checksums", "--repair"),
    ("cache clear", tools.CacheClearConfig, "delete the cache, or entries of it", "--older-than 30"),
    ("env", tools.EnvConfig, "print versions, devices, folders and missing packages, for bug reports", ""),
    (
        "score",
        tools.ScoreConfig,
        "score responses by a rule, a reward model or your own function",
        "samples.jsonl --reward length --output scored.jsonl",
    ),
    (
        "reward-bench",
        RewardBenchConfig,
        "score a reward on RewardBench, RewardBench 2, RM-Bench and JudgeBench, from local files",
        "--reward runs/reward --data reward-bench",
    ),
    ("demo", tools.DemoConfig, "run the demonstration, offline, in a few minutes", ""),
    ("completion", tools.CompletionConfig, "print a script that completes commands and options in a shell", "bash"),
]
EXAMPLES = {
    "sft": f"{MODEL} --data chats.jsonl --output runs/sft",
    "distil": f"{MODEL} --teacher Qwen/Qwen2.5-7B-Instruct --data chats.jsonl --output runs/distil",
    "dpo": f"{MODEL} --data pairs.jsonl --eval-fraction 0.1 --output runs/dpo",
    "reward": f"{MODEL} --data pairs.jsonl --output runs/reward",
    "ppo": "--model runs/sft --prompts prompts.jsonl --reward runs/reward --output runs/ppo",
    "online": "--model runs/sft --prompts prompts.jsonl --reward runs/reward --output runs/online",
}
WITH_YAML = {"rlhf", "frontier", "methods", "sample", "collect new"}
PATHS = {
    "rlhf": "prefopt.methods.rlhf:run",
    "chat": "prefopt.chat.session:chat",
    "completion": "prefopt.cli.completion:completion",
    "data convert": "prefopt.data.comparisons:run_convert",
    "data split": "prefopt.data.comparisons:run_split",
}
VERBS = {m.name: Verb(m.help, m.config, m.run_path, True, EXAMPLES.get(m.name, "")) for m in METHODS.values()}
for _name, _config, _help, _example in ROWS:  # functions of cli/tools.py or cli/collect.py, named as the command is
    _module = "collect" if _name.startswith("collect ") else "tools"
    _path = PATHS.get(_name, f"prefopt.cli.{_module}:{_name.replace(' ', '_').replace('-', '_')}")
    VERBS[_name] = Verb(_help, _config, _path, _name in WITH_YAML, _example)


@dataclass(frozen=True, kw_only=True)
class _YamlOptions:
    """Options of commands whose config may come from a file."""

    config: str | None = option(
        None, "YAML file with options, names with dashes or underscores; the command line overrides it", group="config"
    )
    print_config: bool = option(False, "print all options as such a file, and stop", group="config")


def options_of(name: str) -> dict[str, Option]:
    """The options of a command by flag."""
    verb = VERBS[name]
    return {o.flag: o for kind in (verb.config, *[_YamlOptions] * verb.yaml) for o in options(kind)}


def verbs_below(name: str) -> list[str]:
    """The commands of a group such as ``data``; empty for a command."""
    return [verb for verb in VERBS if verb.startswith(f"{name} ")]
