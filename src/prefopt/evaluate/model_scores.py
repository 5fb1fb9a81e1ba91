"""Numbers that models give to responses: a reward model's, and the reward that a preference-trained model implies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from prefopt.config.score import ScoreConfig
from prefopt.data.group import Group
from prefopt.data.packer import pack, split
from prefopt.data.problem import Problem
from prefopt.data.render import Renderer
from prefopt.data.rendering import Rendering
from prefopt.data.tokenizer import Tokenizer, load_tokenizer
from prefopt.data.truncate import sequence_limit
from prefopt.errors import DataError, ModelError
from prefopt.model.load import base_and_adapter, load_config, load_model, local_folder, resolve_device, resolve_dtype
from prefopt.model.named import tokenizer_of_name
from prefopt.model.packed import PackedModel
from prefopt.model.precision import computing_in
from prefopt.model.scalar import ScalarScorer, has_scalar_head, load_scalar, response_rewards
from prefopt.model.scorer import Scorer, response_sums
from prefopt.model.sharing import context_length
from prefopt.records import Comparison

TOKENS = {"cpu": 2048, "cuda": 32768, "mps": 4096}
"""Tokens at once, for each kind of device: no activations are kept."""

Floats = npt.NDArray[np.float64]
Numbers = Callable[[Sequence[Group]], Floats]


class ModelScores:
    """Scores [K] of each row's responses; ``truncated`` counts the rows that were too long for the model.

    ``words`` says what gives the numbers.
    """

    def __init__(self, words: str, numbers: Numbers, renderer: Renderer) -> None:
        self.words, self._numbers, self._renderer = words, numbers, renderer
        self.truncated = 0

    def __call__(self, rows: Sequence[Comparison]) -> list[tuple[float, ...]]:
        """One tuple for each row. Raises :class:`DataError` for a row that cannot be shown to the model."""
        # What is preferred does not matter here; two responses that are the same get the same number.
        bare = [replace(c, tiers=(), scores=None, labels=None, votes=None) for c in rows]
        groups = []
        for c, rendered in zip(rows, self._renderer.render_all(bare), strict=True):
            if isinstance(rendered, Problem):
                raise DataError(f"{rendered.kind}: {rendered.what}", file=c.file or None, row=c.row)
            self.truncated += bool(rendered.prompt_cut or any(rendered.responses_cut))
            groups.append(rendered.group)
        found = iter(self._numbers(groups).tolist())
        scores = [tuple(next(found) for _ in group.continuations) for group in groups]
        for c, several in zip(rows, scores, strict=True):
            if not np.isfinite(several).all():
                raise ModelError(f"row {c.row}: {self.words} gave {several}; try --dtype float32, or check its weights")
        return scores


def reward_model_scores(config: ScoreConfig) -> ModelScores:
    """Those of the reward model that ``--reward`` names.

    Raises :class:`ModelError` where it is none, or has another number of labels.
    """
    source, device, dtype = _place(config, config.reward)
    if not has_scalar_head(source):
        raise ModelError(
            f"--reward {config.reward} is a language model, which gives no score: prefopt reward makes one that does,"
            " and --reward implicit takes its log-probabilities"
        )
    tokenizer = load_tokenizer(source)
    model = load_scalar(source, dtype=dtype, device=device, tokenizer=tokenizer).requires_grad_(False)
    scorer = ScalarScorer(computing_in(model, dtype)).eval()

    def numbers(groups: Sequence[Group]) -> Floats:
        return response_rewards(scorer, groups, range(len(groups)), TOKENS[device.type])

    return ModelScores(f"the reward model {config.reward}", numbers, _renderer(config, tokenizer, source))


def implicit_scores(config: ScoreConfig) -> ModelScores:
    """beta log(pi(y|x) / ref(y|x)), Rafailov et al. 2023, equation 5 less its term of the prompt alone.

    Raises :class:`ModelError` where the two models do not read the same tokens.
    """
    assert config.model is not None and config.beta is not None
    _, device, dtype = _place(config, config.model)
    source, adapter = base_and_adapter(config.model, config.adapter)
    reference = config.reference or (config.model if config.adapter is not None else source)
    other = local_folder(reference)
    tokenizer = tokenizer_of_name(config.model, config.adapter)
    if load_tokenizer(other).get_vocab() != tokenizer.get_vocab():
        raise ModelError(
            f"--reference {reference} has another tokenizer than --model {config.model}: their tokens differ"
        )
    pair = [
        Scorer(load_model(folder, dtype=dtype, device=device, adapter=a).requires_grad_(False)).eval()
        for folder, a in ((source, adapter), (other, None))
    ]
    beta = config.beta

    def numbers(groups: Sequence[Group]) -> Floats:
        policy, ref = (_log_probabilities(scorer, groups, device) for scorer in pair)
        return beta * (policy - ref)

    words = f"{beta:g} log({config.adapter or config.model} / {reference})"
    return ModelScores(words, numbers, _renderer(config, tokenizer, source, other))


@torch.no_grad()
def _log_probabilities(scorer: PackedModel, groups: Sequence[Group], device: torch.device) -> Floats:
    costs = [scorer.layout.cost(g) for g in groups]
    parts = []
    for part in split(range(len(groups)), costs, TOKENS[device.type]):
        batch = pack([groups[i] for i in part], scorer.layout).to(device)
        parts.append(response_sums(scorer(batch), batch).double().cpu().numpy())
    return np.concatenate(parts)


def _place(config: ScoreConfig, name: str) -> tuple[str, torch.device, torch.dtype]:
    if config.threads:
        torch.set_num_threads(config.threads)
    device = resolve_device(config.device)
    return local_folder(name), device, resolve_dtype(config.dtype, device)


def _renderer(config: ScoreConfig, tokenizer: Tokenizer, *sources: str) -> Renderer:
    contexts: list[Any] = [context_length(load_config(source)) for source in sources]
    limit = min(sequence_limit(config.max_length, c) for c in contexts)
    return Renderer(tokenizer, Rendering.from_options(config, limit))
