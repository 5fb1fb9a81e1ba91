"""The Python functions: one per command, with names or objects.

``prefopt.dpo``, ``sft``, ``distil``, ``reward``, ``ppo`` and ``online`` are made from the table of methods by
:func:`method_function`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from prefopt.config.compare import CompareConfig
from prefopt.config.methods import METHODS, STAGES, RlhfConfig
from prefopt.config.sample import SampleConfig
from prefopt.config.tools import ReportConfig
from prefopt.errors import ConfigError
from prefopt.rewards import Reward

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from prefopt.evaluate.result import CompareResult
    from prefopt.methods.rlhf import RlhfResult
    from prefopt.methods.sample import SampleResult

    Model: TypeAlias = str | os.PathLike[str] | PreTrainedModel
    Data: TypeAlias = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Iterable[Mapping[str, object]]
    Scores: TypeAlias = Callable[[Sequence[str], Sequence[str]], Sequence[float]]


NAME = (str, os.PathLike)


def method_function(name: str) -> Callable[..., Any]:
    """``prefopt.NAME`` for a row of :data:`prefopt.config.methods.METHODS`.

    >>> import prefopt
    >>> prefopt.dpo("my-model", "pairs.jsonl", output="aligned", beta=0.05, lora=True)  # doctest: +SKIP
    >>> prefopt.sft("my-model", [{"prompt": "2 + 2 =", "completion": " 4"}], output="tuned")  # doctest: +SKIP
    >>> found = prefopt.reward("tuned", "pairs.jsonl", output="reward", eval_fraction=0.1)  # doctest: +SKIP
    >>> print(found.reliability.interval)  # doctest: +SKIP
    +0.742 [+0.701, +0.781]
    >>> def short(prompts, responses): return [-len(r) / 100 for r in responses]
    >>> prefopt.ppo("my-model", "prompts.txt", reward=short, output="shorter", kl_target=6.0)  # doctest: +SKIP
    """
    method = METHODS[name]

    def train(
        model: Model,
        data: Data | None = None,
        *,
        output: str | os.PathLike[str],
        tokenizer: PreTrainedTokenizerBase | None = None,
        callbacks: Sequence[Any] = (),
        **options: Any,
    ) -> Any:
        named = isinstance(model, NAME)
        _check_tokenizer(name, named, tokenizer)
        if not named:
            _refuse(options, "adapter")
            if options.get("reference_adapter") and not options.get("reference"):
                raise ConfigError("reference_adapter with a model object needs the model it belongs to: give reference")
            if options.get("lora") and hasattr(model, "peft_config"):
                raise ConfigError("lora adds an adapter, but this model has one, which is trained; leave lora out")
        names, rows = _names_or_rows(options.pop(method.rows, None) if data is None else data)
        functions = {"reward": options["reward"]} if callable(options.get("reward")) else {}
        values = {
            **{option: _plain(value) for option, value in options.items()},
            **{option: _function_name(value) for option, value in functions.items()},
            "model": model if named else _name_of(model),
            method.rows: names,
            "output": output,
        }
        config = method.config.from_dict(values)
        given = None if named else model
        return method.run(config, model=given, tokenizer=tokenizer, rows=rows, callbacks=callbacks, **functions)

    train.__name__ = train.__qualname__ = name
    train.__doc__ = f"""{method.help[0].upper()}{method.help[1:]}, as ``prefopt {name}`` does.

    ``model`` is a folder, a Hub name, or a transformers model, which needs its ``tokenizer`` and is trained in place.
    ``data`` (or ``{method.rows}``) is one or more files, or rows as such files hold them. ``callbacks`` are objects
    with the hooks of ``prefopt.Callback``. ``options`` are the fields of ``{method.config.__name__}``: a mapping is
    taken for NAME=VALUE, and ``reward`` may be a function of prompts and responses (two lists of text) that returns a
    number for each. Returns what ``prefopt.methods.{name}.run`` does. Raises ``prefopt.errors.UserError`` where
    ``prefopt {name}`` prints one line.
    """
    return train


def sample(
    model: Model,
    prompts: Data,
    *,
    output: str | os.PathLike[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **options: Any,
) -> SampleResult:
    """Draw samples for prompts, as ``prefopt sample`` does.

    ``model`` is a folder, a Hub name, or a transformers model, which needs its ``tokenizer``. ``prompts`` is one or
    more files, or rows as such files hold them: ``{"prompt": ...}``, text or a list of messages. Without ``output``
    nothing is written; the result has the rows. ``options`` are the fields of ``SampleConfig``.
    Raises ``prefopt.errors.UserError`` where ``prefopt sample`` prints one line.

    >>> import prefopt
    >>> found = prefopt.sample("my-model", [{"prompt": "2 + 2 ="}], num=4, max_new_tokens=8)  # doctest: +SKIP
    >>> found.rows[0]["responses"]  # doctest: +SKIP
    [' 4', ' 4', ' four', ' 22']
    """
    named = isinstance(model, NAME)
    _check_tokenizer("sample", named, tokenizer)
    if not named:
        _refuse(options, "adapter", "device", "dtype")
    if not named and options.get("engine") == "vllm":
        raise ConfigError("engine vllm loads a folder by itself: name the model by its folder")
    names, rows = _names_or_rows(prompts)
    name = model if named else _name_of(model)
    config = SampleConfig.from_dict({"model": name, "prompts": names, "output": output, **options})

    from prefopt.methods.sample import run

    return run(config, model=None if named else model, tokenizer=tokenizer, rows=rows)


def compare(
    a: Model | None = None,
    b: Model | None = None,
    prompts: Data | None = None,
    *,
    judge: str | Scores | None = None,
    others: Sequence[Model] = (),
    reference: Model | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **options: Any,
) -> CompareResult:
    """Compare two or more models on prompts, as ``prefopt compare`` does.

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
    from prefopt.evaluate.samples import CompareInputs

    labels, models = _labelled({"a": a, "b": b, **{f"others {n}": x for n, x in enumerate(others, 1)}}, reference)
    _check_tokenizer("compare", not models, tokenizer)
    compared = [name for name in labels if name != "reference"]
    if compared and all(labels[name] in models for name in compared):
        _refuse(options, "device", "dtype")
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
    """Write an HTML report of runs and comparisons, as ``prefopt report`` does; returns its path.

    ``runs`` are output folders; ``comparisons`` are what :func:`compare` returned, or files with what
    ``prefopt compare --json`` printed.

    >>> import prefopt
    >>> found = prefopt.compare("aligned", "base", "in.txt", judge="vader", output="judged.jsonl")  # doctest: +SKIP
    >>> prefopt.report("aligned", comparisons=[found])  # doctest: +SKIP
    PosixPath('report.html')
    """
    from prefopt.sweeps.report import write_report

    folders = [runs] if isinstance(runs, NAME) else list(runs)
    files = [os.fspath(x) for x in comparisons if isinstance(x, NAME)]
    results = [x for x in comparisons if not isinstance(x, NAME)]
    if not folders and not files and not results:
        raise ConfigError("there is nothing to report: name runs, or give comparisons")
    run = [os.fspath(folder) for folder in folders] or None
    values = {"run": run, "comparisons": files or None, "title": title, "output": os.fspath(output)}
    return write_report(ReportConfig.from_dict({k: v for k, v in values.items() if v is not None}), results)


def rlhf(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    output: str | os.PathLike[str],
    **options: Any,
) -> RlhfResult:
    """Fine-tune, train a reward model, and optimise against it by PPO, as ``prefopt rlhf`` does.

    ``model`` and ``data`` are names; a finished stage is skipped if their contents have not changed. ``options`` are
    the fields of ``RlhfConfig``, of which ``sft``, ``reward`` and ``ppo`` may be mappings.

    >>> import prefopt
    >>> prefopt.rlhf("my-model", "pairs.jsonl", output="aligned", ppo={"kl_target": 6.0})  # doctest: +SKIP
    """
    options = {name: _plain(value) if name in STAGES else value for name, value in options.items()}
    config = RlhfConfig.from_dict({"model": model, "data": data, "output": output, **options})

    from prefopt.methods.rlhf import run

    return run(config)


def _plain(value: object) -> object:
    """A mapping as a list of NAME=VALUE; anything else as it is."""
    return [f"{name}={item}" for name, item in value.items()] or None if isinstance(value, Mapping) else value


def _check_tokenizer(function: str, named: bool, tokenizer: object) -> None:
    if named and tokenizer is not None:
        raise ConfigError("tokenizer goes with a model object; a model named by its folder brings its own")
    if not named and tokenizer is None:
        raise ConfigError(f"a model object needs its tokenizer: prefopt.{function}(model, tokenizer=tokenizer, ...)")


def _labelled(models: Mapping[str, Any], reference: Any) -> tuple[dict[str, str], dict[str, Any]]:
    """A label for each argument that was given, and the model objects by label.

    Objects of the same name, as before and after training, have their argument in the label.
    """
    given = {name: model for name, model in {**models, "reference": reference}.items() if model is not None}
    named = {name: isinstance(model, NAME) for name, model in given.items()}
    labels = {name: os.fspath(m) if named[name] else _name_of(m) for name, m in given.items()}
    alike = {name for name in labels if not named[name] and list(labels.values()).count(labels[name]) > 1}
    labels = {name: f"{label} ({name})" if name in alike else label for name, label in labels.items()}
    return labels, {labels[name]: given[name] for name in given if not named[name]}


def _refuse(options: Mapping[str, Any], *names: str) -> None:
    """Options that say how a model is loaded do nothing for an object."""
    for name in names:
        if options.get(name):
            raise ConfigError(f"{name} is for a model named by its folder; this one is an object, used as it is")


def _function_name(function: Any) -> str:
    return str(getattr(function, "__qualname__", "function given in Python"))


def _name_of(model: object) -> str:
    return str(getattr(model, "name_or_path", "")) or "model given in Python"


def _names_or_rows(data: object) -> tuple[object, list[Mapping[str, object]] | None]:
    """What the config holds as ``data``, and the rows if rows were given."""
    if isinstance(data, NAME):
        return data, None
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise ConfigError("data must be names of files, or a list of rows (dicts)")
    from prefopt.data.files.hub import dataset_rows, is_dataset

    items: list[Any] = list(dataset_rows(data, "data") if is_dataset(data) else data)
    rows = [item for item in items if isinstance(item, Mapping)]
    if rows and len(rows) < len(items):
        raise ConfigError("data mixes rows and names of files: give one or the other")
    return (["rows given in Python"], rows) if rows else (items, None)


OTHERS: tuple[Callable[..., Any], ...] = (compare, report, rlhf, sample)
FUNCTIONS = {name: method_function(name) for name in METHODS} | {f.__name__: f for f in OTHERS}
"""What ``prefopt.NAME`` may be."""
globals().update(FUNCTIONS)
