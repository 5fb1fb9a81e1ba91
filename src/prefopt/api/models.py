"""The functions that use models: sample, compare, score, merge, push, export_model and
reward_bench."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prefopt.api.functions import Command, command_function, public
from prefopt.api.objects import NAME, check_tokenizer, function_name, labelled, name_of, names_or_rows, refuse
from prefopt.config.compare import CompareConfig
from prefopt.config.export import ExportConfig
from prefopt.config.judges import LLM
from prefopt.config.reward_bench import RewardBenchConfig
from prefopt.config.sample import SampleConfig
from prefopt.config.tools import MergeConfig, PushConfig, ScoreConfig
from prefopt.core.model_folder import require_adapter
from prefopt.core.plugins import imported
from prefopt.core.terminal import tell_lines
from prefopt.errors import ConfigError
from prefopt.rewards import Reward

if TYPE_CHECKING:
    from prefopt.api.types import Data, Model, Name, Scores, Tokenizer
    from prefopt.evaluate.result import CompareResult
    from prefopt.evaluate.reward_bench import RewardBenchReport
    from prefopt.methods.sample import SampleResult
    from prefopt.model.merge import MergeReport


@public(SampleConfig, ("resume",))
def sample(
    model: Model,
    prompts: Data,
    *,
    output: Name | None = None,
    tokenizer: Tokenizer | None = None,
    **options: Any,
) -> SampleResult:
    """Draw samples for prompts, as ``prefopt sample`` does.

    ``model`` is a folder, a Hub name, or a transformers model, which needs its ``tokenizer``. ``prompts`` is one or
    more files, or rows as such files hold them: ``{"prompt": ...}``, text or a list of messages. Without ``output``
    nothing is written; the result has the rows.
    Raises ``prefopt.errors.UserError`` where ``prefopt sample`` prints one line.

    >>> import prefopt
    >>> found = prefopt.sample("my-model", [{"prompt": "2 + 2 ="}], num=4, max_new_tokens=8)  # doctest: +SKIP
    >>> found.rows[0]["responses"]  # doctest: +SKIP
    [' 4', ' 4', ' four', ' 22']
    """
    named = isinstance(model, NAME)
    check_tokenizer("sample", named, tokenizer)
    if not named:
        refuse(options, "adapter", "device", "dtype")
    if not named and options.get("engine") == "vllm":
        raise ConfigError("engine vllm loads a folder by itself: name the model by its folder")
    names, rows = names_or_rows(prompts)
    name = model if named else name_of(model)
    config = SampleConfig.from_dict({"model": name, "prompts": names, "output": output, **options})

    from prefopt.methods.sample import run

    return run(config, model=None if named else model, tokenizer=tokenizer, rows=rows)


@public(CompareConfig, ("json",))
def compare(
    a: Model | None = None,
    b: Model | None = None,
    prompts: Data | None = None,
    *,
    judge: str | Scores | None = None,
    others: Sequence[Model] = (),
    reference: Model | None = None,
    tokenizer: Tokenizer | None = None,
    **options: Any,
) -> CompareResult:
    """Compare two or more models on prompts, as ``prefopt compare`` does.

    Models are folders, Hub names, ``.jsonl`` files of samples, or transformers models, which all have ``tokenizer``.
    ``prompts`` are as for :func:`sample`. ``judge`` is a name as listed below, or a function of prompts and responses
    (two lists of text) that gives a number for each: the higher one wins. With
    ``votes`` alone, votes of people are counted. Returns a
    ``prefopt.evaluate.result.CompareResult``. Raises ``prefopt.errors.UserError`` where ``prefopt compare`` prints one
    line.

    >>> import prefopt
    >>> found = prefopt.compare("aligned", "base", "prompts.txt", judge="length", reference="base")  # doctest: +SKIP
    >>> print(found.versus[0].rate.rate)  # doctest: +SKIP
    +0.685 [+0.620, +0.748]
    """
    from prefopt.evaluate.compare import run
    from prefopt.evaluate.samples import CompareInputs

    labels, models = labelled({"a": a, "b": b, **{f"others {n}": x for n, x in enumerate(others, 1)}}, reference)
    check_tokenizer("compare", not models, tokenizer)
    compared = [name for name in labels if name != "reference"]
    if compared and all(labels[name] in models for name in compared):
        refuse(options, "device", "dtype")
    names, rows = (None, None) if prompts is None else names_or_rows(prompts)
    values = {
        "a": labels.get("a"),
        "b": labels.get("b"),
        "others": [labels[name] for name in labels if name.startswith("others")] or None,
        "reference": labels.get("reference"),
        "prompts": names,
        "judge": function_name(judge, (LLM, "gsm8k")) if callable(judge) else judge,
        **options,
    }
    config = CompareConfig.from_dict({name: value for name, value in values.items() if value is not None})
    own = Reward(str(values["judge"]), judge) if callable(judge) else None
    return run(config, CompareInputs(models, tokenizer, rows, own))


def merged(config: MergeConfig) -> MergeReport:
    """Merge the adapter of ``config``."""
    require_adapter(config.adapter)  # before torch is imported
    from prefopt.model.merge import merge_adapter
    from prefopt.model.precision import DTYPES, resolve_device

    return merge_adapter(
        config.adapter,
        config.output,
        model=config.model,
        dtype=DTYPES[config.dtype],
        device=resolve_device(config.device),
    )


def pushed(config: PushConfig) -> str | None:
    """Print what would be sent, ask, and send it; the address, or None where the answer was no."""
    from prefopt.model.push import confirmed, plan_upload, push

    planned = plan_upload(config.folder, run=config.with_run, checkpoints=config.with_checkpoints)
    tell_lines(planned.in_words(config.repo, config.private))
    return push(planned, config.repo, private=config.private) if confirmed(config.yes) else None


def _reward_bench(config: RewardBenchConfig) -> RewardBenchReport:
    from prefopt.evaluate.reward_bench import run
    from prefopt.reports.bench import write_page
    from prefopt.runs.plot import require_matplotlib

    if config.html is not None:
        require_matplotlib()
    report = run(config)
    if config.html is not None:
        write_page(report, config.html)
    return report


COMMANDS = {
    "score": Command(
        ScoreConfig,
        lambda config: imported("prefopt.evaluate.score:run")(config),
        "ScoreResult",
        "Score responses by a rule, a reward model or a function of yours, as ``prefopt score`` does.",
    ),
    "merge": Command(
        MergeConfig,
        merged,
        "MergeReport",
        "Merge an adapter into its model and check that the outputs agree, as ``prefopt merge`` does.",
    ),
    "push": Command(
        PushConfig,
        pushed,
        "str | None",
        "Upload a finished model to the Hugging Face Hub, as ``prefopt push`` does; returns its address, or None where"
        " the question was answered with no. ``yes=True`` asks none.",
    ),
    "export_model": Command(
        ExportConfig,
        lambda config: imported("prefopt.export.run:run")(config),
        "ExportedModel",
        "Write a model for a server or another runtime, as ``prefopt export`` does.",
    ),
    "reward_bench": Command(
        RewardBenchConfig,
        _reward_bench,
        "RewardBenchReport",
        "Measure a reward on published benchmarks, as ``prefopt reward-bench`` does.",
        ("json",),
    ),
}
score, merge, push, export_model, reward_bench = (
    command_function(name, __name__, command) for name, command in COMMANDS.items()
)
