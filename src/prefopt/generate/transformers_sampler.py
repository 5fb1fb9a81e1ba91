"""A sampler for any causal language model of transformers: prompts batched by length, finished rows removed.

>>> sampler = TransformersSampler(Scorer(model))  # doctest: +SKIP
>>> sampler.sample([[1, 2, 3]], 4, SamplingParams(max_new_tokens=32, stop=(2,)))  # doctest: +SKIP
"""

from __future__ import annotations

import logging
import math
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from prefopt.errors import ModelError, first_line
from prefopt.generate.decode import Decoder, WholeDecoder, decoder_of
from prefopt.generate.sampler import Choice, Ids, ProgressCallback, Sample, SamplingParams, choose, key_of, occurrences
from prefopt.model.architectures import attention_shapes, causal_model, context_length, vocabulary_size
from prefopt.model.costs import MEMORY_ERRORS, count_generated, free_memory, halved
from prefopt.model.scorer import Scorer

log = logging.getLogger(__name__)

MAX_ROWS = {"cpu": 256, "cuda": 512, "mps": 128}
"""Samples of a batch at most: more gain little, as matrix products are at full speed."""
CACHE_FRACTION = 0.4
"""Fraction of the free memory for the cache of a batch."""
LOGITS_AT_ONCE = 2**20
"""Logits in memory at once, about, and at least 64 rows of them."""
COMPACT_FRACTION = 0.1
"""Fraction of the rows that must have ended before they are removed, which copies the cache."""
TOO_LARGE = "one sample does not fit into the device's memory; give a smaller --max-new-tokens, or shorter prompts"


@dataclass(frozen=True, slots=True)
class _Job:
    """Samples [first, first + count) of prompt number ``prompt``."""

    prompt: int
    first: int
    count: int


class TransformersSampler:
    """A :class:`prefopt.generate.sampler.ResponseSampler` with the model of a scorer.

    ``rows``: samples of a batch, None: estimated from memory at every call. It is halved for good where memory runs
    out. ``note`` says in one line what is slow, where the model does not support the fastest decoder.
    """

    def __init__(self, scorer: Scorer, *, rows: int | None = None) -> None:
        self.scorer, self.rows = scorer, rows
        self.context = context_length(causal_model(scorer.model).config)
        self._decoder, self.note = decoder_of(scorer)
        self.decoder_name = self._decoder.name

    def sample(
        self,
        prompts: Sequence[Ids],
        num: int,
        params: SamplingParams,
        *,
        streams: Sequence[int] | None = None,
        progress: ProgressCallback | None = None,
    ) -> list[list[Sample]]:
        """See the protocol. Raises :class:`ModelError` for a prompt that leaves no room for a token, and
        :class:`prefopt.errors.RunError` where one sample does not fit into memory."""
        self._check(prompts, params)
        streams = occurrences(prompts) if streams is None else streams
        found: list[list[Sample | None]] = [[None] * num for _ in prompts]
        report = progress or (lambda ended, drawn: None)
        rows = self.rows or self.estimate_rows(max(map(len, prompts), default=1) + params.max_new_tokens)
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # longest first: memory runs out early
        work = [_Job(i, 0, num) for i in order if num]
        while work:
            jobs, rest = self._next(work, rows, prompts, params)
            batch = _Batch(self, prompts, jobs, streams, params)
            all_ended = all_drawn = 0
            try:
                for ended, drawn in batch.steps():
                    all_ended, all_drawn = all_ended + ended, all_drawn + drawn
                    report(ended, drawn)
            except MEMORY_ERRORS as error:
                total = len(batch.rows)
                self.rows = rows = halved(error, total, 1, TOO_LARGE, batch.decoder.device)
                log.warning("out of memory with %d samples at once: going on with %d", total, rows)
                report(-all_ended, -all_drawn)
                continue
            work = rest
            for job, k, sample in batch.samples():
                found[job.prompt][k] = sample
        return [[sample for sample in many if sample is not None] for many in found]

    def stream(
        self, prompt: Ids, params: SamplingParams, *, stream: int = 0, sample: int = 0
    ) -> Generator[int, None, None]:
        """The tokens of one sample as they are drawn, the stop token included."""
        self._check([prompt], params)
        batch = _Batch(self, [prompt], [_Job(0, sample, 1)], [stream], params)
        for _ in batch.steps():
            yield int(batch.ids[0, batch.step - 1])

    def _check(self, prompts: Sequence[Ids], params: SamplingParams) -> None:
        size = vocabulary_size(causal_model(self.scorer.model))
        for n, prompt in enumerate(prompts, 1):
            if not len(prompt):
                raise ModelError(f"prompt {n} has no token; a model needs one to start from")
            if self.context is not None and len(prompt) >= self.context:
                what = f"prompt {n} has {len(prompt)} tokens and the model a context of {self.context}"
                raise ModelError(f"{what}: no room for an answer; shorten it")
            if int(max(prompt)) >= size:
                what = f"prompt {n} holds token {int(max(prompt))}, but the model's vocabulary has {size}"
                raise ModelError(f"{what}; tokenizer and model do not belong together")

    def _next(
        self, work: Sequence[_Job], rows: int, prompts: Sequence[Ids], params: SamplingParams
    ) -> tuple[list[_Job], list[_Job]]:
        """The jobs of the next batch, and those left: all samples of a prompt together where they fit."""
        first = work[0]
        here = min(first.count, rows)
        jobs, room = [_Job(first.prompt, first.first, here)], rows - here
        if here < first.count:
            return jobs, [_Job(first.prompt, first.first + here, first.count - here), *work[1:]]
        key = self._batch_key(len(prompts[first.prompt]), params)
        for n, job in enumerate(work[1:], 1):
            if job.count > room or self._batch_key(len(prompts[job.prompt]), params) != key:
                return jobs, list(work[n:])
            jobs.append(job)
            room -= job.count
        return jobs, []

    def _batch_key(self, length: int, params: SamplingParams) -> tuple[int, str]:
        """What prompts of a batch have in common: their length where the decoder needs that, and the side of longrope's
        limit that prompt and sample lie on."""
        limit = self.scorer.layout.rope_limit or math.inf
        side = "long" if length > limit else "across" if length + params.max_new_tokens > limit else "short"
        return length if self._decoder.same_length or side == "across" else 0, side

    def decoder_for(self, length: int, params: SamplingParams) -> Decoder:
        """A decoder for prompts of this length. Across longrope's limit the frequencies of all tokens change, so that
        no cache can be kept."""
        across = self._batch_key(length, params)[1] == "across"
        return (WholeDecoder if across else self._decoder)(self.scorer)

    def estimate_rows(self, tokens: int) -> int:
        """Rows of so many tokens each whose cache fits into :data:`CACHE_FRACTION` of the free memory."""
        device = next(self.scorer.model.parameters()).device
        try:
            shapes = attention_shapes(causal_model(self.scorer.model).config)
        except Exception as error:  # of any kind, from the model's configuration
            log.warning("samples are not counted by their memory: %s", first_line(error))
            return MAX_ROWS[device.type]
        held = sum(s.key_heads * (s.key_width + s.value_width) for s in shapes)
        row = max(1, held * tokens * self.scorer.dtype.itemsize)
        affordable = int(free_memory(device) * CACHE_FRACTION / (2 * row))  # twice: growing and compacting copy it
        return max(1, min(MAX_ROWS[device.type], affordable))


class _Batch:
    """One batch from its prompts to its last token. Row n of the arrays is ``rows[n]``: a job, and which sample."""

    def __init__(
        self,
        sampler: TransformersSampler,
        prompts: Sequence[Ids],
        jobs: Sequence[_Job],
        streams: Sequence[int],
        params: SamplingParams,
    ) -> None:
        self.scorer, self.params, self.jobs = sampler.scorer, params, jobs
        self.prompts = [prompts[job.prompt] for job in jobs]
        self.decoder = sampler.decoder_for(len(self.prompts[0]), params)
        self.rows = [(job, job.first + k) for job in jobs for k in range(job.count)]
        keys = [key_of(params.seed, prompts[job.prompt], streams[job.prompt], k) for job, k in self.rows]
        self.keys = torch.tensor(keys, device=self.decoder.device)
        lengths = np.array([len(prompts[job.prompt]) for job, _ in self.rows])
        room = params.max_new_tokens if sampler.context is None else sampler.context - lengths
        self.room = np.minimum(np.full(len(self.rows), params.max_new_tokens), room)
        n, steps = len(self.rows), int(self.room.max())
        self.ids = np.zeros((n, steps), np.int32)
        self.logps = np.zeros((2, n, steps), np.float64)
        self.length = np.zeros(n, np.int64)
        self.finished = np.zeros(n, np.bool_)
        self.step = 0
        self.held = np.arange(n)  # rows in the decoder; some of them may have ended
        self.living = np.ones(n, np.bool_)

    def samples(self) -> Iterator[tuple[_Job, int, Sample]]:
        """Every row's sample, with its job and its number."""
        for n, (job, k) in enumerate(self.rows):
            length = int(self.length[n])
            arrays = (self.ids[n, :length].copy(), self.logps[0, n, :length].copy(), self.logps[1, n, :length].copy())
            yield job, k, Sample(*arrays, bool(self.finished[n]))

    def steps(self) -> Iterator[tuple[int, int]]:
        """Draw a token for every living row until none lives; yields how many ended and how many were drawn."""
        while self.living.any():
            # Not around the yield: the caller may compute gradients.
            with torch.no_grad(), self.scorer.attention_by(self.decoder.hook), _evaluating(self.scorer):
                token_n = self._draw_step(self._advance())
            before = int(self.living.sum())
            stopped = np.isin(self.ids[self.held, self.step - 1], self.params.stop) & self.living
            self.finished[self.held] |= stopped
            self.living &= ~(stopped | (self.step >= self.room[self.held]))
            if self.living.any() and (~self.living).sum() >= max(1, COMPACT_FRACTION * len(self.held)):
                index = torch.from_numpy(np.nonzero(self.living)[0]).to(self.decoder.device)
                self.decoder.keep(index)
                self.held, token_n, self.living = self.held[self.living], token_n[index], self.living[self.living]
            self.token_n = token_n
            yield before - int(self.living.sum()), before

    def _advance(self) -> torch.Tensor:
        """The decoder's rows for the next logits."""
        if self.step:
            return self.decoder.step(self.token_n)
        hidden = self.decoder.start(self.prompts)
        if len(self.rows) == len(self.jobs):
            return hidden
        index = torch.repeat_interleave(torch.tensor([job.count for job in self.jobs])).to(hidden.device)
        self.decoder.keep(index)
        return hidden[index]

    def _draw_step(self, hidden: torch.Tensor) -> torch.Tensor:
        """The next token of each held row, recorded for the living ones."""
        keys = self.keys[torch.from_numpy(self.held).to(self.keys.device)]
        height = max(64, LOGITS_AT_ONCE // vocabulary_size(self.decoder.model))
        parts: list[Choice] = []
        for start in range(0, len(self.held), height):
            rows = slice(start, start + height)
            parts.append(choose(self.decoder.logits(hidden[rows]), self.params, keys[rows], self.step))
        token_n, *logps = (torch.cat(column) for column in zip(*parts, strict=True))
        living = self.held[self.living]
        self.ids[living, self.step] = token_n.cpu().numpy()[self.living]
        self.logps[:, living, self.step] = torch.stack(logps).cpu().numpy()[:, self.living]
        if not np.isfinite(self.logps[:, living, self.step]).all():
            raise ModelError("the model's logits are not finite; try --dtype float32, or check its weights")
        self.length[living] += 1
        count_generated(len(living))
        self.step += 1
        return token_n


@contextmanager
def _evaluating(scorer: Scorer) -> Iterator[None]:
    """Turn dropout off."""
    training = scorer.model.training
    if training:  # both calls visit every module
        scorer.model.eval()
    try:
        yield
    finally:
        if training:
            scorer.model.train()
