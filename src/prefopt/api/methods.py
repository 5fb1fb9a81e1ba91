"""The functions that train: ``prefopt.dpo``, ``sft``, ``distil``, ``reward``, ``ppo`` and ``online``, which
:func:`method_function` makes from the table of methods, and the chain ``rlhf``."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from inspect import Signature
from typing import TYPE_CHECKING, Any

from prefopt.api.functions import public
from prefopt.api.objects import NAME, check_tokenizer, function_name, name_of, names_or_rows, plain, refuse
from prefopt.config.judges import COMPARERS
from prefopt.config.methods import METHODS, STAGES, Method, RlhfConfig
from prefopt.core.signature import WIDTH
from prefopt.errors import ConfigError

if TYPE_CHECKING:
    from prefopt.api.types import Data, Model, Name, Tokenizer
    from prefopt.methods.rlhf import RlhfResult

RETURNS = {
    **dict.fromkeys(("sft", "distil", "dpo"), "TrainingResult | None"),
    "reward": "RewardResult | None",
    "ppo": "PpoResult | None",
    "online": "OnlineResult | None",
}
"""What each method returns; None for a dry run."""


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
        output: Name,
        tokenizer: Tokenizer | None = None,
        callbacks: Sequence[Any] = (),
        **options: Any,
    ) -> Any:
        named = isinstance(model, NAME)
        check_tokenizer(name, named, tokenizer)
        if not named:
            refuse(options, "adapter")
            if options.get("reference_adapter") and not options.get("reference"):
                raise ConfigError("reference_adapter with a model object needs the model it belongs to: give reference")
            if options.get("lora") and hasattr(model, "peft_config"):
                raise ConfigError("lora adds an adapter, but this model has one, which is trained; leave lora out")
        names, rows = names_or_rows(options.pop(method.rows, None) if data is None else data)
        functions = {"reward": options["reward"]} if callable(options.get("reward")) else {}
        values = {
            **{option: plain(value) for option, value in options.items()},
            **{option: function_name(value, COMPARERS) for option, value in functions.items()},
            "model": model if named else name_of(model),
            method.rows: names,
            "output": output,
        }
        config = method.config.from_dict(values)
        given = None if named else model
        return method.run(config, model=given, tokenizer=tokenizer, rows=rows, callbacks=callbacks, **functions)

    train.__name__ = train.__qualname__ = name
    train.__doc__ = _words(method)
    found: Any = public(method.config)(train)
    found.__signature__ = _with_objects(found.__signature__, method)
    done: Callable[..., Any] = found
    return done


def _words(method: Method) -> str:
    """The beginning of a docstring."""
    name, rows = method.name, "" if method.rows == "data" else f" (or ``{method.rows}``)"
    more = (
        ", and ``reward`` may be a function of prompts and responses (two lists of text) that gives a number for each"
    )
    sentences = [
        "``model`` is a folder, a Hub name, or a transformers model, which needs its ``tokenizer`` and is trained in"
        " place.",
        f"``data``{rows} is one or more files, or rows as such files hold them.",
        "``callbacks`` are objects with the hooks of ``prefopt.Callback``.",
        f"The options are the fields of ``{method.config.__name__}``; a mapping is taken for NAME=VALUE"
        f"{more if name in ('ppo', 'online') else ''}.",
        f"Raises ``prefopt.errors.UserError`` where ``prefopt {name}`` prints one line.",
    ]
    result = "The result prints as a table; ``result.load()`` gives the model, ``result.plot()`` the curves."
    paragraphs = [" ".join(sentences), f"{result} A dry run returns None."]
    title = f"{method.help[0].upper()}{method.help[1:]}, as ``prefopt {name}`` does."
    return "\n\n".join([title, *(textwrap.fill(text, WIDTH) for text in paragraphs)])


def _with_objects(signature: Signature, method: Method) -> Signature:
    """The signature with the types of objects that an option may have in Python, and of the result."""
    objects = {"reward": "str | list[str] | Scores"} if method.name in ("ppo", "online") else {}
    parameters = []
    for p in signature.parameters.values():
        if p.name == method.rows:
            p = p.replace(default=None, annotation="Data | None")
        parameters.append(p.replace(annotation=objects.get(p.name, p.annotation)))
    return signature.replace(parameters=parameters, return_annotation=RETURNS[method.name])


@public(RlhfConfig)
def rlhf(
    model: Name,
    data: Name | Sequence[Name],
    *,
    output: Name,
    **options: Any,
) -> RlhfResult:
    """Fine-tune, train a reward model, and optimise against it by PPO, as ``prefopt rlhf`` does.

    ``model`` and ``data`` are names; a finished stage is skipped if their contents have not changed. ``sft``,
    ``reward`` and ``ppo`` may be mappings.

    >>> import prefopt
    >>> prefopt.rlhf("my-model", "pairs.jsonl", output="aligned", ppo={"kl_target": 6.0})  # doctest: +SKIP
    """
    options = {name: plain(value) if name in STAGES else value for name, value in options.items()}
    config = RlhfConfig.from_dict({"model": model, "data": data, "output": output, **options})

    from prefopt.methods.rlhf import run

    return run(config)
