"""Supervised fine-tuning, from a configuration to a finished model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from prefopt.config.sft import SftConfig
from prefopt.data.comparisons import open_comparisons, parse_comparisons
from prefopt.data.files.sources import find_sources
from prefopt.data.validate import Problem, convert
from prefopt.errors import ConfigError
from prefopt.model.check import check_scoring
from prefopt.model.load import new_model, new_tokenizer
from prefopt.train.data import DataBatches, load_data
from prefopt.train.objectives import LikelihoodObjective
from prefopt.train.offline import OfflineRun
from prefopt.train.policy import Policy
from prefopt.train.result import TrainingResult
from prefopt.train.run import open_run, read_model


def run(
    config: SftConfig,
    *,
    model: Any = None,
    tokenizer: Any = None,
    rows: Iterable[Mapping[str, object]] | None = None,
    callbacks: Sequence[Any] = (),
) -> TrainingResult | None:
    """Fine-tune. ``model``, ``tokenizer`` and ``rows`` replace those of ``config``; a model is trained in place.

    Returns None for a dry run. Raises :class:`prefopt.errors.UserError`, and :class:`prefopt.errors.Interrupted` after
    a stop: the run can be resumed.
    """
    if model is not None and config.from_scratch:
        raise ConfigError("from_scratch builds a model from its configuration: name a folder, or leave it out")
    rows = list(rows) if rows is not None else None  # read twice if a tokenizer is trained
    with open_run(config, model=model, callbacks=callbacks) as run:
        config, say = run.config, run.say
        if tokenizer is None and config.train_tokenizer is not None:
            size = config.train_tokenizer
            tokenizer = run.world.on_first(lambda: new_tokenizer(_texts(config, rows), size))
            say(f"tokenizer: {len(tokenizer)} tokens, made from the data")
        start = read_model(run, tokenizer)
        # Texts without a prompt are cut into windows instead of being truncated.
        options: dict[str, Any] = {"kind": "demonstrations", "train_on": config.train_on, "windows": True}
        data = run.world.first_on_node(lambda: load_data(config, start, rows, run.reporter, run.stop, **options))
        given, pictures = model, data.groups.has_pictures
        if config.from_scratch:
            fitted = config.train_tokenizer is not None
            given = new_model(start.source, start.tokenizer, seed=config.seed, fitted=fitted).to(run.device)
        policy = run.loading(Policy(config, start.source, run.dtype, run.device, given, run.world, pictures=pictures))
        offline = OfflineRun(run=run, start=start, data=data, policy=policy)
        offline.check(check_scoring)
        tokens = int(data.groups.trained_N[: int(data.source.groups.responses_G.sum())].sum())
        mean = "token" if config.average == "tokens" else "response"
        say(f"loss: negative log-likelihood, mean over every {mean}; {tokens:,} tokens to learn")
        objective = LikelihoodObjective(config.average, device=policy.device)
        source = DataBatches(data, offline.sampler)
        if config.dry_run:
            offline.preview(objective, source)
            return None
        offline.take_folder()
        say(policy.make_trainable(run.world))
        trainer = offline.fit(objective, source)
        title = "Training from scratch" if config.from_scratch else "Supervised fine-tuning"
        return offline.finish(trainer, title=title, tag="sft")


def _texts(config: SftConfig, rows: Sequence[Mapping[str, object]] | None) -> Iterator[str]:
    """The text of all messages, to train a tokenizer on."""
    layout: dict[str, Any] = {"format": config.format, "columns": config.column_words}
    if rows is not None:
        readings = [parse_comparisons(rows, "data", **layout)]
    else:
        readings = [open_comparisons(source, **layout) for source in find_sources(config.data)]
    for reading in readings:
        for row in reading:
            wanted = row if isinstance(row, Problem) else convert(row, "demonstrations")
            if not isinstance(wanted, Problem):  # refused or skipped when the data are rendered
                turns = [*wanted.prompt, *(m for r in wanted.responses for m in r.messages)]
                yield from (m.content for m in turns if m.content)
