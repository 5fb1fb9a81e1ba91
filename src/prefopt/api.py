"""The Python face: one function per method, with names or objects."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from prefopt.config.compare import CompareConfig
from prefopt.config.dpo import DpoConfig
from prefopt.config.ppo import PpoConfig
from prefopt.config.rlhf import RewardConfig, RlhfConfig
from prefopt.config.sample import SampleConfig
from prefopt.config.sft import SftConfig
from prefopt.config.tools import ReportConfig
from prefopt.config.training import MethodOptions
from prefopt.errors import ConfigError
from prefopt.rewards import Reward

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from prefopt.evaluate.result import CompareResult
    from prefopt.methods.ppo import PpoResult
    from prefopt.methods.reward import RewardResult
    from prefopt.methods.rlhf import RlhfResult
    from prefopt.methods.sample import SampleResult
    from prefopt.train.run import TrainingResult

Row = Mapping[str, object]
Config = TypeVar("Config", bound=MethodOptions)


def dpo(
    model: str | os.PathLike[str] | PreTrainedModel,
    data: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Iterable[Row],
    *,
    output: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    callbacks: Sequence[Any] = (),
    **options: Any,
) -> TrainingResult | None:
    """Align a model with preference pairs, as ``prefopt dpo`` does.

    ``model`` is a folder, a Hub name, or a transformers model, which then needs its ``tokenizer`` and is trained in
    place. ``data`` is one or more files, or rows as such files hold them:
    ``{"prompt": ..., "chosen": ..., "rejected": ...}``. ``callbacks`` are objects with the hooks
    of ``prefopt.Callback``. ``options`` are the fields of ``DpoConfig``; ``loss_options`` may be a mapping.
    Returns what ``prefopt.methods.dpo.run`` does. Raises ``prefopt.errors.UserError`` where ``prefopt dpo``
    prints one line.

    >>> import prefopt
    >>> prefopt.dpo("my-model", "pairs.jsonl", output="aligned", beta=0.05, lora=True)  # doctest: +SKIP
    >>> prefopt.dpo(
    ...     "my-model", "pairs.jsonl", output="aligned", loss="simpo", loss_options={"gamma": 1.0}
    ... )  # doctest: +SKIP
    """
    if isinstance(options.get("loss_options"), Mapping):
        options["loss_options"] = [f"{name}={value}" for name, value in options["loss_options"].items()] or None
    config, given = _method("dpo", DpoConfig, model, data, output, tokenizer, options)

    from prefopt.methods.dpo import run

    return run(config, **given, callbacks=callbacks)


def sft(
    model: str | os.PathLike[str] | PreTrainedModel,
    data: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Iterable[Row],
    *,
    output: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    callbacks: Sequence[Any] = (),
    **options: Any,
) -> TrainingResult | None:
    """Fine-tune a model on demonstrations, the chosen side of preferences, or raw text, as ``prefopt sft`` does.

    Arguments are those of :func:`dpo`; ``options`` are the fields of ``SftConfig``.

    >>> import prefopt
    >>> prefopt.sft("my-model", [{"prompt": "2 + 2 =", "completion": " 4"}], output="tuned")  # doctest: +SKIP
    """
    config, given = _method("sft", SftConfig, model, data, output, tokenizer, options)

    from prefopt.methods.sft import run

    return run(config, **given, callbacks=callbacks)


def reward(
    model: str | os.PathLike[str] | PreTrainedModel,
    data: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Iterable[Row],
    *,
    output: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    callbacks: Sequence[Any] = (),
    **options: Any,
) -> RewardResult | None:
    """Train a reward model on preferences, as ``prefopt reward`` does.

    Arguments are those of :func:`dpo`; ``options`` are the fields of ``RewardConfig``.

    >>> import prefopt
    >>> found = prefopt.reward("tuned", "pairs.jsonl", output="reward", eval_fraction=0.1)  # doctest: +SKIP
    >>> print(found.reliability.interval)  # doctest: +SKIP
    +0.742 [+0.701, +0.781]
    """
    config, given = _method("reward", RewardConfig, model, data, output, tokenizer, options)

    from prefopt.methods.reward import run

    return run(config, **given, callbacks=callbacks)


def ppo(
    model: str | os.PathLike[str] | PreTrainedModel,
    prompts: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Iterable[Row],
    *,
    reward: str | os.PathLike[str] | Callable[[Sequence[str], Sequence[str]], Sequence[float]],
    output: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    callbacks: Sequence[Any] = (),
    **options: Any,
) -> PpoResult | None:
    """Align a model with a reward on its own responses, as ``prefopt ppo`` does.

    ``model``, ``tokenizer`` and ``callbacks`` are as for :func:`dpo`, ``prompts`` as for :func:`sample`. ``reward`` is
    what ``--reward`` names, or a function of prompts and responses (two lists of text) that gives a number for each.
    ``options`` are the fields of ``PpoConfig``. Returns what ``prefopt.methods.ppo.run`` does. Raises
    ``prefopt.errors.UserError`` where ``prefopt ppo`` prints one line.

    >>> import prefopt
    >>> def short(prompts, responses): return [-len(r) / 100 for r in responses]
    >>> prefopt.ppo("my-model", "prompts.txt", reward=short, output="shorter", kl_target=6.0)  # doctest: +SKIP
    """
    named = _is_named("ppo", model, tokenizer)
    if not named:
        _refuse_for_objects(model, options)
    names, rows = _names_or_rows(prompts)
    own = reward if callable(reward) else None
    values = {
        "model": model if named else _name_of(model),
        "prompts": names,
        "reward": _function_name(own) if own is not None else reward,
        "output": output,
        **options,
    }
    config = PpoConfig.from_dict(values)

    from prefopt.methods.ppo import run

    given = None if named else model
    return run(config, model=given, tokenizer=tokenizer, rows=rows, reward=own, callbacks=callbacks)


def sample(
    model: str | os.PathLike[str] | PreTrainedModel,
    prompts: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Iterable[Row],
    *,
    output: str | os.PathLike[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **options: Any,
) -> SampleResult:
    """Draw samples for prompts, as ``prefopt sample`` does.

    ``model`` is a folder, a Hub name, or a transformers model, which then needs its ``tokenizer``. ``prompts`` is one
    or more files, or rows as such files hold them: ``{"prompt": ...}``, text or a list of messages. Without ``output``
    nothing is written, and the rows are in what is returned. ``options`` are the fields of ``SampleConfig``.
    Raises ``prefopt.errors.UserError`` where ``prefopt sample`` prints one line.

    >>> import prefopt
    >>> found = prefopt.sample("my-model", [{"prompt": "2 + 2 ="}], num=4, max_new_tokens=8)  # doctest: +SKIP
    >>> found.rows[0]["responses"]  # doctest: +SKIP
    [' 4', ' 4', ' four', ' 22']
    """
    named = _is_named("sample", model, tokenizer)
    for option in () if named else ("adapter", "device", "dtype"):
        if options.get(option):
            raise ConfigError(f"{option} is for a model named by its folder; this one is an object, used as it is")
    if not named and options.get("engine") == "vllm":
        raise ConfigError("engine vllm loads a folder by itself: name the model by its folder")
    names, rows = _names_or_rows(prompts)
    name = model if named else _name_of(model)
    config = SampleConfig.from_dict({"model": name, "prompts": names, "output": output, **options})

    from prefopt.methods.sample import run

    return run(config, model=None if named else model, tokenizer=tokenizer, rows=rows)


def compare(
    a: str | os.PathLike[str] | PreTrainedModel | None = None,
    b: str | os.PathLike[str] | PreTrainedModel | None = None,
    prompts: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Iterable[Row] | None = None,
    *,
    judge: str | Callable[[Sequence[str], Sequence[str]], Sequence[float]] | None = None,
    others: Sequence[str | os.PathLike[str] | PreTrainedModel] = (),
    reference: str | os.PathLike[str] | PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **options: Any,
) -> CompareResult:
    """Tell which of two or more models is better on some prompts, as ``prefopt compare`` does.

    Models are folders, Hub names, ``.jsonl`` files of samples, or transformers models, which all have ``tokenizer``.
    ``prompts`` are as for :func:`sample`. ``judge`` is what ``--judge`` names, or a function of prompts and responses
    (two lists of text) that gives a number for each: the higher one wins. ``options`` are the fields of
    ``CompareConfig``; with ``votes`` alone, votes of people are counted. Returns a
    ``prefopt.evaluate.result.CompareResult``. Raises ``prefopt.errors.UserError`` where ``prefopt compare`` prints one
    line.

    >>> import prefopt
    >>> found = prefopt.compare("aligned", "base", "prompts.txt", judge="length", reference="base")  # doctest: +SKIP
    >>> print(found.versus[0].rate.rate)  # doctest: +SKIP
    +0.685 [+0.620, +0.748]
    """
    from prefopt.evaluate.compare import run
    from prefopt.evaluate.sample_cache import CompareInputs

    labels, models = _labelled({"a": a, "b": b, **{f"others {n}": x for n, x in enumerate(others, 1)}}, reference)
    if models and tokenizer is None:
        raise ConfigError("a model object needs its tokenizer: prefopt.compare(model, ..., tokenizer=tokenizer)")
    if tokenizer is not None and not models:
        raise ConfigError("tokenizer goes with a model object; a model named by its folder brings its own")
    compared = [name for name in labels if name != "reference"]
    if compared and all(labels[name] in models for name in compared):
        _refuse_machine(options)
    names, rows = (None, None) if prompts is None else _names_or_rows(prompts)
    values = {
        "a": labels.get("a"),
        "b": labels.get("b"),
        "others": [labels[name] for name in labels if name.startswith("others")] or None,
        "reference": labels.get("reference"),
        "prompts": names,
        "judge": _function_name(judge) if callable(judge) else judge,
        **options,
    }
    config = CompareConfig.from_dict({name: value for name, value in values.items() if value is not None})
    own = Reward(str(values["judge"]), judge) if callable(judge) else None
    return run(config, CompareInputs(models, tokenizer, rows, own))


def report(
    runs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    *,
    comparisons: Sequence[str | os.PathLike[str] | CompareResult] = (),
    output: str | os.PathLike[str] = "report.html",
    title: str | None = None,
) -> Path:
    """Tell of runs and comparisons in one HTML file, as ``prefopt report`` does; returns its path.

    ``runs`` are output folders; ``comparisons`` are what :func:`compare` returned, or files with what
    ``prefopt compare --json`` printed.

    >>> import prefopt
    >>> found = prefopt.compare("aligned", "base", "in.txt", judge="vader", output="judged.jsonl")  # doctest: +SKIP
    >>> prefopt.report("aligned", comparisons=[found])  # doctest: +SKIP
    PosixPath('report.html')
    """
    from prefopt.reports.page import write_report

    folders = [runs] if isinstance(runs, (str, os.PathLike)) else list(runs)
    files = [os.fspath(x) for x in comparisons if isinstance(x, (str, os.PathLike))]
    results = [x for x in comparisons if not isinstance(x, (str, os.PathLike))]
    values = {"run": [os.fspath(folder) for folder in folders] or None, "comparisons": files or None, "title": title}
    given = {name: value for name, value in values.items() if value is not None}
    if not folders and not files and not results:
        raise ConfigError("there is nothing to report: name runs, or give comparisons")
    return write_report(ReportConfig(output=os.fspath(output), **given), results)  # type: ignore[arg-type]


def rlhf(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    output: str | os.PathLike[str],
    **options: Any,
) -> RlhfResult:
    """Fine-tune, train a reward model, and optimise against it by PPO, as ``prefopt rlhf`` does.

    ``model`` and ``data`` are names: stages are skipped where the contents of these are what they were. ``options`` are
    the fields of ``RlhfConfig``, of which ``sft``, ``reward`` and ``ppo`` may be mappings.

    >>> import prefopt
    >>> prefopt.rlhf("my-model", "pairs.jsonl", output="aligned", ppo={"kl_target": 6.0})  # doctest: +SKIP
    """
    for stage in ("sft", "reward", "ppo"):
        if isinstance(options.get(stage), Mapping):
            options[stage] = [f"{name}={value}" for name, value in options[stage].items()] or None
    config = RlhfConfig.from_dict({"model": model, "data": data, "output": output, **options})

    from prefopt.methods.rlhf import run

    return run(config)


def _method(
    function: str, kind: type[Config], model: Any, data: object, output: object, tokenizer: Any, options: dict[str, Any]
) -> tuple[Config, dict[str, Any]]:
    """The config of a method that trains, and what stands in for what it names."""
    named = _is_named(function, model, tokenizer)
    if not named:
        _refuse_for_objects(model, options)
    names, rows = _names_or_rows(data)
    config = kind.from_dict({"model": model if named else _name_of(model), "data": names, "output": output, **options})
    return config, {"model": None if named else model, "tokenizer": tokenizer, "rows": rows}


def _is_named(function: str, model: object, tokenizer: object) -> bool:
    """Whether the model is given by its name; an object needs its tokenizer."""
    named = isinstance(model, (str, os.PathLike))
    if named and tokenizer is not None:
        raise ConfigError("tokenizer goes with a model object; a model named by its folder brings its own")
    if not named and tokenizer is None:
        raise ConfigError(f"a model object needs its tokenizer: prefopt.{function}(model, tokenizer=tokenizer, ...)")
    return named


def _labelled(models: Mapping[str, Any], reference: Any) -> tuple[dict[str, str], dict[str, Any]]:
    """The name of each model that was given, by the argument it came as, and objects by these names.

    Objects of one name, as before and after training, are told apart by their arguments.
    """
    given = {name: model for name, model in {**models, "reference": reference}.items() if model is not None}
    named = {name: isinstance(model, (str, os.PathLike)) for name, model in given.items()}
    labels = {name: os.fspath(m) if named[name] else _name_of(m) for name, m in given.items()}
    alike = {name for name in labels if not named[name] and list(labels.values()).count(labels[name]) > 1}
    labels = {name: f"{label} ({name})" if name in alike else label for name, label in labels.items()}
    return labels, {labels[name]: given[name] for name in given if not named[name]}


def _function_name(function: Any) -> str:
    return str(getattr(function, "__qualname__", "function given in Python"))


def _refuse_machine(options: Mapping[str, Any]) -> None:
    """Where and how precisely an object computes is its owner's choice."""
    for name in ("device", "dtype"):
        if options.get(name):
            raise ConfigError(f"{name} is for a model named by its folder; this one is an object, used as it is")


def _name_of(model: object) -> str:
    return str(getattr(model, "name_or_path", "")) or "model given in Python"


def _refuse_for_objects(model: Any, options: Mapping[str, Any]) -> None:
    """Options that say how a model is loaded do nothing to one that is there already."""
    remedies = {
        "adapter": "put the adapter on it with PEFT",
    }
    for name, remedy in remedies.items():
        if options.get(name):
            raise ConfigError(f"{name} is for a model named by its folder; this one is an object: {remedy}")
    if options.get("reference_adapter") and not options.get("reference"):
        raise ConfigError("reference_adapter with a model object needs the model it belongs to: give reference")
    if options.get("lora") and hasattr(model, "peft_config"):
        raise ConfigError("lora adds a new adapter, but this model has one already, which is trained: leave lora out")


def _names_or_rows(data: object) -> tuple[object, list[Row] | None]:
    """What the config keeps as ``data``, and the rows where rows were given and not names of files."""
    if isinstance(data, (str, os.PathLike)):
        return data, None
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise ConfigError("data must be names of files, or a list of rows (dicts)")
    from prefopt.data.files.hub import dataset_rows, is_dataset

    items: list[Any] = list(dataset_rows(data, "data") if is_dataset(data) else data)
    rows = [item for item in items if isinstance(item, Mapping)]
    if rows and len(rows) < len(items):
        raise ConfigError("data mixes rows and names of files: give one or the other")
    return (["rows given in Python"], rows) if rows else (items, None)
