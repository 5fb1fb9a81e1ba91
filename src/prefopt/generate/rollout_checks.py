"""What rollout servers say of their responses is compared with the policy's own scorer.

- **Log-probabilities.** A server's must be the scorer's but for rounding: those of the distribution drawn from, or the
  model's own (vLLM's ``--logprobs-mode`` decides which of the two it reports). Other weights, another temperature and
  truncation show here, also in a single response.
- **Places.** Log-probabilities may be right while tokens are drawn from elsewhere, such as the nucleus of top-p. With
  the vocabulary in the order of falling probability, let U be the probability before the token that was drawn, plus a
  uniform fraction of its own. If tokens are drawn from the distribution, U is uniform on [0, 1], independently of all
  before. The places of all tokens of a server are compared with that by the Dvoretzky-Kiefer-Wolfowitz inequality
  (Massart 1990, "The tight constant in the Dvoretzky-Kiefer-Wolfowitz inequality"): n places deviate by more than d in
  distribution with probability of at most 2 exp(-2 n d^2).
- **Repetitions.** Two responses to one prompt that are the same, token by token, although that is next to impossible.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch

from prefopt.data.table import IndexArray
from prefopt.errors import RunError
from prefopt.generate.completion import Completion, Wanted
from prefopt.generate.rollout_server import FLAG
from prefopt.generate.sampler import ROUNDING, TOKEN_BUDGET, FloatArray, Sample, SamplingParams, group_of, masked
from prefopt.model.kernels.head import TokenScores
from prefopt.model.kernels.head_device import tiles
from prefopt.model.packing import PackedBatch, packed_batches
from prefopt.model.scorer import Scorer, ScoreRequest

IN_ONE_RESPONSE = 10.0
"""A single response may differ by so many times what the responses of a server may on average."""
BINS = 100
LEAST_BIAS, CHANCE = 0.02, 1e-9
"""Places of a server may deviate by the first, and by more where this is likelier than the second."""
UNLIKELY = -60.0
"""Log-probability in nats of responses that no two draws have in common."""


class ModelValues(NamedTuple):
    """Of M tokens: log-probabilities under the model ``logp_M``, those of the distribution drawn from ``drawn_M``, and
    ``place_M``, the place in the order of probabilities."""

    logp_M: FloatArray
    drawn_M: FloatArray
    place_M: FloatArray


class RolloutChecks:
    """Checks with ``scorer``. ``tolerance``: mean difference of a token's log-probability in nats that is rounding;
    None: that of the scorer's precision."""

    def __init__(self, scorer: Scorer, *, tolerance: float | None = None) -> None:
        self.scorer = scorer
        self.tolerance = ROUNDING.get(scorer.dtype, 0.05) if tolerance is None else tolerance
        self.places: dict[str, IndexArray] = {}
        """How often a token of each server, by its place, had one in each of :data:`BINS` bins, over the run."""

    def __call__(
        self, wanted: Sequence[Wanted], completions: Sequence[Completion], params: SamplingParams
    ) -> list[Sample]:
        """The samples. Raises :class:`RunError` where a server did not draw from the scorer's distribution.

        Of stale responses, which other weights drew, nothing can be compared; they keep what the server reported.
        """
        _refuse_repeated(wanted, completions, params)
        values = self._values(wanted, completions, params)
        raw = self._refuse_other_logprobs(completions, values, params)
        self._refuse_bias(completions, values, params)
        samples = []
        for c, own in zip(completions, values, strict=True):
            if not (c.fresh or params.pure):
                raise RunError(
                    f"{FLAG} {c.place}: it answers with weights {c.version}, whose responses can be corrected at"
                    " temperature 1, without truncation, alone"
                )
            drawn = own.drawn_M if c.place in raw and c.fresh else c.reported
            drawn = np.zeros(len(c.ids)) if params.temperature == 0 else drawn
            samples.append(Sample(c.ids, drawn, own.logp_M, c.finished))
        return samples

    def _values(
        self, wanted: Sequence[Wanted], completions: Sequence[Completion], params: SamplingParams
    ) -> list[ModelValues]:
        """By the scorer, of each response."""
        if not completions:
            return []
        groups = []
        for prompt, many in groupby(zip(wanted, completions, strict=True), key=lambda both: both[0].prompt):
            groups.append(group_of(prompt, [Sample(c.ids, c.reported, c.reported, c.finished) for _, c in many]))
        lengths = [len(c.ids) for c in completions]
        step_M = np.concatenate([np.arange(n) for n in lengths])
        fractions = [np.random.default_rng(w.seed).random(n) for w, n in zip(wanted, lengths, strict=True)]
        within_M = np.concatenate(fractions)
        device = next(self.scorer.model.parameters()).device
        parts: list[tuple[FloatArray, FloatArray, FloatArray]] = []
        done = 0
        for batch in packed_batches(groups, self.scorer.layout, TOKEN_BUDGET, device):
            here = slice(done, done + len(batch.target))
            done = here.stop
            parts += [*_values_of(self.scorer, batch, params, step_M[here], within_M[here])]
        whole = [np.concatenate(column) for column in zip(*parts, strict=True)]
        cuts = np.cumsum(lengths)[:-1]
        return [ModelValues(*values) for values in zip(*(np.split(x, cuts) for x in whole), strict=True)]

    def _refuse_other_logprobs(
        self, completions: Sequence[Completion], values: Sequence[ModelValues], params: SamplingParams
    ) -> set[str]:
        """The servers that report log-probabilities of the model, not of the distribution drawn from."""
        raw = set()
        for place in sorted({c.place for c in completions if c.fresh}):
            mine = [n for n, c in enumerate(completions) if c.fresh and c.place == place]
            both = [
                [completions[n].reported - own for n, own in zip(mine, column, strict=True)]
                for column in zip(*((values[n].drawn_M, values[n].logp_M) for n in mine), strict=True)
            ]
            drawn, model = (float(np.abs(np.concatenate(gaps)).mean()) for gaps in both)
            gaps = both[1] if model < drawn else both[0]
            if model < drawn and not params.pure:
                raw.add(place)
            self._refuse_gaps(place, gaps)
        return raw

    def _refuse_gaps(self, place: str, gaps: Sequence[FloatArray]) -> None:
        every, worst = np.concatenate(gaps), max(float(np.abs(gap).mean()) for gap in gaps)
        mean, limit = float(np.abs(every).mean()), self.tolerance
        if mean <= limit and worst <= IN_ONE_RESPONSE * limit:
            return
        signed = float(every.mean())
        kind = "higher, as with top-p, top-k or a lower temperature" if signed > 0 else "lower"
        one = "" if mean > limit else f", {worst:.2g} in one response,"
        raise RunError(
            f"{FLAG} {place}: its log-probabilities differ from the scorer's by {mean:.2g} nats per token{one} and are"
            f" {abs(signed):.2g} {kind} on average ({len(every)} tokens of {len(gaps)} responses; rounding explains"
            f" {limit:.1g}); start it with this model, in the run's --dtype and with --logprobs-mode"
            " processed_logprobs, or give --server-gap if it rounds more"
        )

    def _refuse_bias(
        self, completions: Sequence[Completion], values: Sequence[ModelValues], params: SamplingParams
    ) -> None:
        if params.temperature == 0:
            return
        for c, own in zip(completions, values, strict=True):
            if c.fresh:
                counts = self.places.setdefault(c.place, np.zeros(BINS, np.int64))
                np.add.at(counts, np.minimum((own.place_M * BINS).astype(np.int64), BINS - 1), 1)
        for place, counts in self.places.items():
            n, bias = int(counts.sum()), bias_of(counts)
            if bias > LEAST_BIAS and 2 * math.exp(-2 * n * bias**2) < CHANCE:
                raise RunError(
                    f"{FLAG} {place}: its tokens are not drawn from the distribution of their log-probabilities: their"
                    f" places in it deviate by {bias:.2g} from uniform ({n} tokens; chance explains"
                    f" {math.sqrt(math.log(2 / CHANCE) / (2 * n)):.2g}), as with top-p, top-k or a temperature that was"
                    " not asked for; start it with --generation-config vllm, without a penalty or sampler of its own"
                )


def largest_bias(places: Sequence[Mapping[str, IndexArray]]) -> float:
    """The largest deviation of a server, from the ``places`` of several processes; 0 before any."""
    names = sorted({name for counts in places for name in counts})
    every = [np.sum([counts[name] for counts in places if name in counts], axis=0) for name in names]
    return max(map(bias_of, every), default=0.0)


def bias_of(counts: IndexArray) -> float:
    """Largest difference of the distribution of places, from counts in bins of equal width, from the uniform one."""
    share = np.cumsum(counts) / counts.sum()
    return float(np.abs(share - np.arange(1, len(counts) + 1) / len(counts)).max())


@torch.no_grad()
def _values_of(
    scorer: Scorer, batch: PackedBatch, params: SamplingParams, step_M: IndexArray, within_M: FloatArray
) -> Iterator[tuple[FloatArray, FloatArray, FloatArray]]:
    """:class:`ModelValues` of a packed batch, by tiles of its tokens. ``step_M``: tokens before each in its response;
    ``within_M``: uniform numbers."""
    found = scorer(batch, ScoreRequest(distributions=True))
    assert isinstance(found, TokenScores) and found.distributions is not None
    device = batch.target.device
    for rows in tiles(len(batch.target), found.distributions.vocabulary, device):
        z, y = found.distributions.logits(rows), batch.target[rows, None]
        logp = z.log_softmax(-1)
        step = torch.from_numpy(step_M[rows]).to(device)
        drawn = masked(z, params, step).log_softmax(-1) if params.temperature else logp
        mine = drawn.gather(-1, y)
        ids = torch.arange(drawn.shape[-1], device=device)
        before = drawn.exp().masked_fill_((drawn < mine) | ((drawn == mine) & (ids >= y)), 0).sum(-1)
        within = torch.from_numpy(within_M[rows]).to(device, drawn.dtype)
        place = (before + within * mine[:, 0].exp()).clamp_(0, 1)
        # By rounding a token may lie outside of top-k or top-p here: its log-probability is then that without.
        mine = torch.where(mine.isinf(), (z / (params.temperature or 1)).log_softmax(-1).gather(-1, y), mine)
        yield _numpy(logp.gather(-1, y)[:, 0]), _numpy(mine[:, 0]), _numpy(place)


def _numpy(x: torch.Tensor) -> FloatArray:
    return x.cpu().double().numpy()


def _refuse_repeated(wanted: Sequence[Wanted], completions: Sequence[Completion], params: SamplingParams) -> None:
    if params.temperature == 0:
        return
    known: set[tuple[tuple[int, ...], bytes]] = set()
    for w, c in zip(wanted, completions, strict=True):
        key = (w.prompt, c.ids.tobytes())
        if key in known and float(c.reported.sum()) < UNLIKELY:
            raise RunError(
                f"{FLAG} {c.place}: it gave the same {len(c.ids)} tokens for different seeds, which two"
                f" independent draws do not share (log-probability {c.reported.sum():.0f}); does a proxy cache"
                " its answers?"
            )
        known.add(key)
