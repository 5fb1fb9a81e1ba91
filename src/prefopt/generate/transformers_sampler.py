"""A sampler for any causal language model of transformers: batches by length, rows that leave when they end.

>>> sampler = TransformersSampler(Scorer(model))                                     # doctest: +SKIP
>>> sampler.sample([[1, 2, 3]], 4, Settings(max_new_tokens=32, stop=(2,)))            # doctest: +SKIP
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from prefopt.errors import ModelError, RunError
from prefopt.generate.decode import Decoder, WholeDecoder, decoder_of
from prefopt.generate.draw import Choice, choose, key_of
from prefopt.generate.sampler import Ids, Progress, Sample, Settings, occurrences
from prefopt.model.architectures import attention_shapes, causal_model, context_length, vocabulary_size
from prefopt.model.costs import count_generated, free_memory, out_of_memory
from prefopt.model.scorer import Scorer

log = logging.getLogger(__name__)

ROWS = {"cpu": 256, "cuda": 512, "mps": 128}
"""Samples drawn side by side at most: more gain little, as matrix products are as fast as they get."""
SHARE = 0.4
"""Of the free memory, what the cache of a batch may take."""
TILE = 2**20
"""Logits that stand in memory at once, about, and at least 64 rows of them."""
LEAVE = 0.1
"""Part of the rows that must have ended before they leave the batch: leaving copies the cache."""


@dataclass(frozen=True, slots=True)
class _Job:
    """Samples [first, first + count) of one prompt."""

    prompt: int
    first: int
    count: int


class TransformersSampler:
    """Follows :class:`prefopt.generate.sampler.Sampler`, with the model that a scorer scores with.

    ``rows`` is how many samples are drawn side by side; none: estimated from memory for every call. It is halved where
    memory ends, and stays so. ``note`` says in one line what is slow, where the model forbids the fastest way.
    """

    def __init__(self, scorer: Scorer, *, rows: int | None = None) -> None:
        self.scorer, self.rows = scorer, rows
        self.context = context_length(causal_model(scorer.model).config)
        self._kind, self.note = decoder_of(scorer)

    @property
    def way(self) -> str:
        """``slots``, ``cache`` or ``whole``: see :mod:`prefopt.generate.decode`."""
        return self._kind.name

    def sample(
        self,
        prompts: Sequence[Ids],
        num: int,
        settings: Settings,
        *,
        streams: Sequence[int] | None = None,
        progress: Progress | None = None,
    ) -> list[list[Sample]]:
        """As the protocol says. Raises :class:`ModelError` for a prompt that leaves no room for a token."""
        self._check(prompts, settings)
        streams = occurrences(prompts) if streams is None else streams
        found: list[list[Sample | None]] = [[None] * num for _ in prompts]
        rows = self.rows or self.estimate_rows(max(map(len, prompts), default=1) + settings.max_new_tokens)
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # memory runs out at once or never
        work = [_Job(i, 0, num) for i in order if num]
        while work:
            jobs, rest = self._next(work, rows, prompts, settings)
            run = _Run(self, prompts, jobs, streams, settings)
            try:
                run.complete(progress)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                if len(run.rows) == 1:
                    raise RunError(
                        "one sample does not fit into the device's memory; give a smaller --max-new-tokens, or shorter"
                        " prompts"
                    ) from error
            else:
                work = rest
                for job, k, sample in run.samples():
                    found[job.prompt][k] = sample
                continue
            rows = self._halve(run, progress)  # here, where the error no longer holds the batch in memory
        return [[sample for sample in many if sample is not None] for many in found]

    def stream(
        self, prompt: Ids, settings: Settings, *, stream: int = 0, sample: int = 0
    ) -> Generator[int, None, None]:
        """The tokens of one sample, each as soon as it is drawn, the stop token too."""
        self._check([prompt], settings)
        run = _Run(self, [prompt], [_Job(0, sample, 1)], [stream], settings)
        for _ in run.steps():
            yield int(run.ids[0, run.step - 1])

    def _check(self, prompts: Sequence[Ids], settings: Settings) -> None:
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
        self, work: Sequence[_Job], rows: int, prompts: Sequence[Ids], settings: Settings
    ) -> tuple[list[_Job], list[_Job]]:
        """What goes into the next batch, and what is left: all samples of a prompt together where they fit."""
        first = work[0]
        here = min(first.count, rows)
        jobs, room = [_Job(first.prompt, first.first, here)], rows - here
        if here < first.count:
            return jobs, [_Job(first.prompt, first.first + here, first.count - here), *work[1:]]
        side = self._side(len(prompts[first.prompt]), settings)
        for n, job in enumerate(work[1:], 1):
            if job.count > room or self._side(len(prompts[job.prompt]), settings) != side:
                return jobs, list(work[n:])
            jobs.append(job)
            room -= job.count
        return jobs, []

    def _side(self, length: int, settings: Settings) -> tuple[int, str]:
        """Prompts that differ in this may not share a batch: their length, and on which side of longrope's limit."""
        limit = self.scorer.layout.rope_limit
        side = "" if limit is None or length + settings.max_new_tokens <= limit else "long"
        if side and limit is not None and length <= limit:
            side = "across"
        return length if self._kind.same_length or side == "across" else 0, side

    def _decoder(self, jobs: Sequence[_Job], prompts: Sequence[Ids], settings: Settings) -> Decoder:
        """Across longrope's limit the frequencies of all tokens change, so that nothing can be kept."""
        across = self._side(len(prompts[jobs[0].prompt]), settings)[1] == "across"
        return (WholeDecoder if across else self._kind)(self.scorer)

    def _halve(self, run: _Run, progress: Progress | None) -> int:
        """Forget a batch that did not fit; returns how many rows to go on with, from now on."""
        total = len(run.rows)
        self.rows = total // 2
        log.warning("out of memory with %d samples at once: going on with %d", total, self.rows)
        if progress is not None:
            progress(-run.told[0], -run.told[1])
        run.forget()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return self.rows

    def estimate_rows(self, tokens: int) -> int:
        """Rows whose cache of so many tokens each takes a part of the free memory."""
        device = next(self.scorer.model.parameters()).device
        shapes = attention_shapes(causal_model(self.scorer.model).config)
        held = sum(s.key_heads * (s.key_width + s.value_width) for s in shapes)
        row = max(1, held * tokens * self.scorer.dtype.itemsize)
        affordable = int(free_memory(device) * SHARE / (2 * row))  # twice: growing and leaving copy it
        return max(1, min(ROWS[device.type], affordable))


class _Run:
    """One batch from its prompts to its last token. Row n of the arrays is ``rows[n]``: a job, and which sample."""

    def __init__(
        self,
        sampler: TransformersSampler,
        prompts: Sequence[Ids],
        jobs: Sequence[_Job],
        streams: Sequence[int],
        settings: Settings,
    ) -> None:
        self.scorer, self.settings, self.jobs = sampler.scorer, settings, jobs
        self.prompts = [prompts[job.prompt] for job in jobs]
        self.decoder = sampler._decoder(jobs, prompts, settings)
        self.rows = [(job, job.first + k) for job in jobs for k in range(job.count)]
        keys = [key_of(settings.seed, prompts[job.prompt], streams[job.prompt], k) for job, k in self.rows]
        self.keys = torch.tensor(keys, device=self.decoder.device)
        room = [settings.max_new_tokens] * len(self.rows)
        if sampler.context is not None:
            room = [
                min(r, sampler.context - len(prompts[job.prompt])) for r, (job, _) in zip(room, self.rows, strict=True)
            ]
        self.room = np.array(room)
        n, steps = len(self.rows), int(self.room.max())
        self.ids = np.zeros((n, steps), np.int32)
        self.logps = np.zeros((2, n, steps), np.float64)
        self.length = np.zeros(n, np.int64)
        self.finished = np.zeros(n, np.bool_)
        self.step = 0
        self.told = (0, 0)
        self.held = np.arange(n)  # the rows in the batch; some of them may have ended
        self.living = np.ones(n, np.bool_)

    def complete(self, progress: Progress | None) -> None:
        """Draw everything; ``told`` keeps what ``progress`` was told in all."""
        for ended, drawn in self.steps():
            self.told = (self.told[0] + ended, self.told[1] + drawn)
            if progress is not None:
                progress(ended, drawn)

    def samples(self) -> Iterator[tuple[_Job, int, Sample]]:
        """Every row's sample, with its job and its number."""
        for n, (job, k) in enumerate(self.rows):
            length = int(self.length[n])
            arrays = (self.ids[n, :length].copy(), self.logps[0, n, :length].copy(), self.logps[1, n, :length].copy())
            yield job, k, Sample(*arrays, bool(self.finished[n]))

    def forget(self) -> None:
        """Let the cache go."""
        del self.decoder

    def steps(self) -> Iterator[tuple[int, int]]:
        """Draw a token for every row that lives, until none does; yields how many ended and how many were drawn."""
        while self.living.any():
            # Not around the yield: who takes a token may have a gradient of its own to compute.
            with torch.no_grad(), self.scorer.attention_by(self.decoder.hook), _evaluating(self.scorer):
                token_n = self._draw(self._advance())
            before = int(self.living.sum())
            self.living &= ~self._ended()
            if self.living.any() and (~self.living).sum() >= max(1, LEAVE * len(self.held)):
                index = torch.from_numpy(np.nonzero(self.living)[0]).to(self.decoder.device)
                self.decoder.keep(index)
                self.held, token_n, self.living = self.held[self.living], token_n[index], self.living[self.living]
            self.token_n = token_n
            yield before - int(self.living.sum()), before

    def _advance(self) -> torch.Tensor:
        """What the next logits are made of, for every held row."""
        if self.step:
            return self.decoder.step(self.token_n)
        hidden = self.decoder.start(self.prompts)
        if len(self.rows) == len(self.jobs):
            return hidden
        index = torch.repeat_interleave(torch.tensor([job.count for job in self.jobs])).to(hidden.device)
        self.decoder.keep(index)
        return hidden[index]

    def _draw(self, hidden: torch.Tensor) -> torch.Tensor:
        """The next token of each held row, noted for those that live."""
        keys = self.keys[torch.from_numpy(self.held).to(self.keys.device)]
        height = max(64, TILE // vocabulary_size(self.decoder.model))
        parts: list[Choice] = []
        for start in range(0, len(self.held), height):
            rows = slice(start, start + height)
            parts.append(choose(self.decoder.logits(hidden[rows]), self.settings, keys[rows], self.step))
        token_n = torch.cat([p.token_n for p in parts])
        noted = self.held[self.living]
        self.ids[noted, self.step] = token_n.cpu().numpy()[self.living]
        for which, name in enumerate(("sampling_logp_n", "logp_n")):
            logp = torch.cat([getattr(p, name) for p in parts]).cpu().numpy()[self.living]
            if not np.isfinite(logp).all():
                raise ModelError("the model's logits are not finite; try --dtype float32, or check its weights")
            self.logps[which, noted, self.step] = logp
        self.length[noted] += 1
        count_generated(len(noted))
        self.step += 1
        return token_n

    def _ended(self) -> np.ndarray:
        """Which of the held rows have had their last token."""
        stopped = np.isin(self.ids[self.held, self.step - 1], self.settings.stop) & self.living
        self.finished[self.held] |= stopped
        ended: np.ndarray = stopped | (self.step >= self.room[self.held])
        return ended


@contextmanager
def _evaluating(scorer: Scorer) -> Iterator[None]:
    """Dropout off for a while."""
    training = scorer.model.training
    if training:
        scorer.model.eval()
    try:
        yield
    finally:
        if training:
            scorer.model.train()
