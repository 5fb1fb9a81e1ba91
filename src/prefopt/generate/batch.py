"""Samples drawn side by side: a row of the decoder for each, and the next prompt in place of those that have ended.

The host looks at drawn tokens every few steps (``read_every``), so that a GPU seldom waits for it; a row that ended
since draws tokens for nothing, which are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from prefopt.errors import ModelError
from prefopt.generate.decode import Decoder, SlotDecoder
from prefopt.generate.sampler import Choice, Ids, Sample, SamplingParams, choose, key_of
from prefopt.model.architectures import vocabulary_size
from prefopt.model.costs import count_generated

LOGITS_AT_ONCE = 2**20
"""Logits in memory at once, about, and at least 64 rows of them."""
COMPACT_FRACTION = 0.1
"""Fraction of the rows that must have ended before they are removed, which copies the cache."""
REFILL_FRACTION = 1 / 8
"""Fraction of the rows that must have ended before prompts take their place, which is a pass through the model."""
CUT_FRACTION = 1 / 4
"""Free rows, as a fraction of all, from which some samples of a prompt start before the others; less wait, so that a
prompt is encoded once."""


@dataclass(frozen=True, slots=True)
class Job:
    """Samples [first, first + count) of prompt number ``prompt``."""

    prompt: int
    first: int
    count: int


class Queue:
    """Jobs that wait. ``kind`` of a prompt: only prompts of one kind share a batch.

    >>> queue = Queue([Job(0, 0, 3), Job(1, 0, 3)], lambda prompt: 0)
    >>> queue.take(4, 8), queue.take(2, 8)
    ([Job(prompt=0, first=0, count=3)], [Job(prompt=1, first=0, count=2)])
    """

    def __init__(self, jobs: Iterable[Job], kind: Callable[[int], Hashable]) -> None:
        self._jobs, self._kind = list(jobs), kind

    def __bool__(self) -> bool:
        return bool(self._jobs)

    def kind(self) -> Hashable:
        """The kind of the next job; None where none is left."""
        return self._kind(self._jobs[0].prompt) if self._jobs else None

    @property
    def next_prompt(self) -> int:
        """The prompt of the next job."""
        return self._jobs[0].prompt

    def give_back(self, jobs: Sequence[Job]) -> None:
        """Jobs to do next."""
        self._jobs[:0] = jobs

    def take(self, room: int, rows: int) -> list[Job]:
        """The next jobs of one kind for ``room`` of ``rows`` rows: the samples of a prompt together where they fit."""
        taken: list[Job] = []
        kind = self.kind()
        while room and self._jobs and self.kind() == kind:
            job = self._jobs[0]
            if job.count > room and room < CUT_FRACTION * rows:
                break
            here = min(job.count, room)
            taken.append(Job(job.prompt, job.first, here))
            rest = [Job(job.prompt, job.first + here, job.count - here)] if here < job.count else []
            self._jobs[:1] = rest
            room -= here
        return taken


_HOST = ("prompt", "number", "room", "living", "drawn", "ids", "logps")


@dataclass(slots=True, eq=False)
class _Rows:
    """The samples of R rows: arrays on the host, tensors on the device."""

    prompt: np.ndarray
    number: np.ndarray
    room: np.ndarray
    """Tokens at most."""
    living: np.ndarray
    drawn: np.ndarray
    """Tokens so far."""
    ids: np.ndarray
    logps: np.ndarray
    """Under the distribution drawn from, and under the model, [R, 2, tokens]."""
    key_R: torch.Tensor
    step_R: torch.Tensor

    def select(self, index: np.ndarray) -> _Rows:
        """Some of the rows."""
        at = torch.from_numpy(index).to(self.key_R.device)
        host = {name: getattr(self, name)[index] for name in _HOST}
        return _Rows(**host, key_R=self.key_R[at], step_R=self.step_R[at])

    def replace(self, index: np.ndarray, other: _Rows) -> None:
        """Put ``other`` rows in the place of these: all, or where the device's memory runs out none that counts as
        living."""
        at = torch.from_numpy(index).to(self.key_R.device)
        self.key_R[at], self.step_R[at] = other.key_R, other.step_R
        for name in _HOST:
            getattr(self, name)[index] = getattr(other, name)


class SampleBatch:
    """Samples from their prompts to their last tokens, at most ``rows`` side by side.

    ``context``: tokens of prompt and sample at most. Call :meth:`advance` until ``running`` is false; ``found`` gets
    every sample as it ends.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompts: Sequence[Ids],
        streams: Sequence[int],
        params: SamplingParams,
        queue: Queue,
        rows: int,
        *,
        context: int | None,
        read_every: int,
        found: Callable[[int, int, Sample], None],
    ) -> None:
        self.decoder, self.params, self.queue, self.read_every, self._found = decoder, params, queue, read_every, found
        self._prompts, self._streams, self._context = prompts, streams, context
        self._kind = queue.kind()
        self._jobs = queue.take(rows, rows)
        self.rows = self._new_rows(self._jobs)
        self._token_R: torch.Tensor | None = None
        self._height = max(64, LOGITS_AT_ONCE // vocabulary_size(decoder.model))

    @property
    def running(self) -> bool:
        """Whether samples are being drawn."""
        return bool(self.rows.living.any())

    def _new_rows(self, jobs: Sequence[Job]) -> _Rows:
        """Rows for the samples of jobs."""
        prompt = np.repeat([job.prompt for job in jobs], [job.count for job in jobs])
        number = np.concatenate([np.arange(job.first, job.first + job.count) for job in jobs])
        n, most = len(prompt), self.params.max_new_tokens
        room = np.full(n, most)
        if self._context is not None:
            room = np.minimum(room, self._context - np.array([len(self._prompts[i]) for i in prompt]))
        pairs = zip(prompt.tolist(), number.tolist(), strict=True)
        keys = [key_of(self.params.seed, self._prompts[i], self._streams[i], k) for i, k in pairs]
        return _Rows(
            *(prompt, number, room, np.ones(n, np.bool_), np.zeros(n, np.int64)),
            ids=np.zeros((n, most), np.int32),
            logps=np.zeros((n, 2, most), np.float64),
            key_R=torch.tensor(keys, device=self.decoder.device),
            step_R=torch.zeros(n, dtype=torch.int64, device=self.decoder.device),
        )

    def advance(self) -> tuple[int, int]:
        """Draw a token for every row, or ``read_every``; returns how many samples ended and how many tokens they got.

        Raises :class:`ModelError` where logits are not numbers.
        """
        living = self.rows.living
        steps = min(self.read_every, int((self.rows.room - self.rows.drawn)[living].min()))
        drawn = []
        for n in range(steps):
            hidden = self._hidden(refill=n == 0)
            drawn.append(self._draw(hidden))
            self._token_R = drawn[-1].token_n
        tokens, *logps = (torch.stack(column).cpu().numpy() for column in zip(*drawn, strict=True))
        return self._record(tokens, np.stack(logps, -1))

    def _hidden(self, *, refill: bool) -> torch.Tensor:
        """The decoder's rows for the next logits."""
        if self._token_R is not None:
            if refill:
                self._compact()
            hidden = self.decoder.step(self._token_R)
            return self._refill(hidden) if refill else hidden
        hidden = self.decoder.start([self._prompts[job.prompt] for job in self._jobs])
        if len(self.rows.living) == len(self._jobs):
            return hidden
        index = torch.repeat_interleave(torch.tensor([job.count for job in self._jobs]))
        self.decoder.keep(index)
        return hidden[index.to(hidden.device)]

    def _refills(self) -> bool:
        """Whether prompts wait that may join this batch."""
        return isinstance(self.decoder, SlotDecoder) and bool(self.queue) and self.queue.kind() == self._kind

    def _compact(self) -> None:
        """Remove rows that have ended where nothing takes their place, and enough of them."""
        living, ended = self.rows.living, int((~self.rows.living).sum())
        if self._refills() or ended < max(1, COMPACT_FRACTION * len(living)):
            return
        index = np.nonzero(living)[0]
        self.rows = self.rows.select(index)
        assert self._token_R is not None
        kept = torch.from_numpy(index)
        self.decoder.keep(kept)
        self._token_R = self._token_R[kept.to(self._token_R.device)]

    def _refill(self, hidden: torch.Tensor) -> torch.Tensor:
        """Start waiting samples in rows that have ended. The rows of ``hidden`` with theirs."""
        free, size = np.nonzero(~self.rows.living)[0], len(self.rows.living)
        if len(free) < max(1, REFILL_FRACTION * size) or not self._refills():
            return hidden
        jobs = self.queue.take(len(free), size)
        if not jobs:
            return hidden
        try:
            return self._start_in(free, jobs, hidden)
        except BaseException:  # such as no memory: the caller starts another batch with what is in the queue
            self.queue.give_back(jobs)
            raise

    def _start_in(self, free: np.ndarray, jobs: Sequence[Job], hidden: torch.Tensor) -> torch.Tensor:
        """Start ``jobs`` in ``free`` rows; ``hidden`` with theirs. They are among the rows only once nothing fails."""
        assert isinstance(self.decoder, SlotDecoder)
        size = len(self.rows.living)
        # Rows stand in the order in which they began, so that short sequences attend apart from long ones.
        order = np.argsort(~self.rows.living, kind="stable")
        self.rows = self.rows.select(order)
        kept = torch.from_numpy(order)
        self.decoder.keep(kept)
        hidden = hidden[kept.to(hidden.device)]
        ends = np.cumsum([job.count for job in jobs])
        free = np.arange(size - len(free), size)[: ends[-1]]
        taken = [part.tolist() for part in np.split(free, ends[:-1])]
        fresh = self.decoder.join([self._prompts[job.prompt] for job in jobs], taken)
        owner = torch.repeat_interleave(torch.tensor([job.count for job in jobs])).to(hidden.device)
        hidden = hidden.index_copy(0, torch.from_numpy(free).to(hidden.device), fresh[owner])
        self.rows.replace(free, self._new_rows(jobs))
        return hidden

    def _draw(self, hidden: torch.Tensor) -> Choice:
        """The next token of each row."""
        parts: list[Choice] = []
        for start in range(0, len(hidden), self._height):
            rows = slice(start, start + self._height)
            z = self.decoder.logits(hidden[rows])
            parts.append(choose(z, self.params, self.rows.key_R[rows], self.rows.step_R[rows]))
        self.rows.step_R += 1
        return parts[0] if len(parts) == 1 else Choice(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _record(self, tokens: np.ndarray, logps: np.ndarray) -> tuple[int, int]:
        """Take drawn tokens [steps, R] with their log-probabilities [steps, R, 2]; hand over what has ended."""
        rows, total, over = self.rows, 0, []
        stops = np.isin(tokens, self.params.stop)
        for token, logp, stop in zip(tokens, logps, stops, strict=True):
            at = np.nonzero(rows.living)[0]
            if not np.isfinite(logp[at]).all():
                raise ModelError("the model's logits are not finite; try --dtype float32, or check its weights")
            rows.ids[at, rows.drawn[at]] = token[at]
            rows.logps[at, :, rows.drawn[at]] = logp[at]
            rows.drawn[at] += 1
            total += len(at)
            ended = at[stop[at] | (rows.drawn[at] >= rows.room[at])]
            rows.living[ended] = False
            over.append(ended)
            for row in ended:
                self._found(int(rows.prompt[row]), int(rows.number[row]), self._sample(row, finished=bool(stop[row])))
        gone = np.concatenate(over)
        if len(gone) and isinstance(self.decoder, SlotDecoder):
            self.decoder.retire(gone)
        count_generated(total)
        return len(gone), total

    def _sample(self, row: int, *, finished: bool) -> Sample:
        n = int(self.rows.drawn[row])
        sampling, model = self.rows.logps[row, :, :n].copy()
        return Sample(self.rows.ids[row, :n].copy(), sampling, model, finished)

    def unfinished(self) -> tuple[list[Job], int]:
        """The samples that have not ended, as jobs, and how many tokens they have got."""
        at = np.nonzero(self.rows.living)[0]
        jobs: list[Job] = []
        for prompt, number in zip(self.rows.prompt[at].tolist(), self.rows.number[at].tolist(), strict=True):
            last = jobs[-1] if jobs else None
            if last is not None and last.prompt == prompt and last.first + last.count == number:
                jobs[-1] = Job(prompt, last.first, last.count + 1)
            else:
                jobs.append(Job(prompt, number, 1))
        return jobs, int(self.rows.drawn[at].sum())
