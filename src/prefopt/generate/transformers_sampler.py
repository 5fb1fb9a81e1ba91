"""A sampler for any causal language model of transformers: prompts batched by length, finished rows refilled.

>>> sampler = TransformersSampler(Scorer(model))  # doctest: +SKIP
>>> sampler.sample([[1, 2, 3]], 4, SamplingParams(max_new_tokens=32, stop=(2,)))  # doctest: +SKIP
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch

from prefopt.data.group import pictures_in
from prefopt.errors import ModelError, first_line
from prefopt.generate.batch import Job, Queue, SampleBatch
from prefopt.generate.decode import Decoder, WholeDecoder, decoder_of
from prefopt.generate.packed_linear import FEWEST_ROWS, packed_linears
from prefopt.generate.sampler import Ids, ProgressCallback, Sample, SamplingParams, occurrences
from prefopt.generate.slots import cache_dtype
from prefopt.model.architectures import attention_shapes, causal_model, context_length, vocabulary_size
from prefopt.model.costs import MEMORY_ERRORS, free_memory, halved
from prefopt.model.scorer import Scorer

log = logging.getLogger(__name__)

MAX_ROWS = {"cpu": 256, "cuda": 512, "mps": 128}
"""Samples of a batch at most: more gain little, as matrix products are at full speed."""
CACHE_FRACTION = 0.4
"""Fraction of the free memory for the cache of a batch."""
READ_EVERY = {"cpu": 1, "cuda": 8, "mps": 8}
"""Steps between two looks of the host at what was drawn: a look waits for the device."""
TOO_LARGE = "one sample does not fit into the device's memory; give a smaller --max-new-tokens, or shorter prompts"


class TransformersSampler:
    """A :class:`prefopt.generate.sampler.ResponseSampler` with the model of a scorer.

    ``rows``: samples of a batch, None: estimated from memory at every call. It is halved for good where memory runs
    out. ``read_every``: tokens between two looks at what was drawn, None: by the device. ``note`` says in one line what
    is slow, where the model does not support the fastest decoder.
    """

    def __init__(self, scorer: Scorer, *, rows: int | None = None, read_every: int | None = None) -> None:
        self.scorer, self.rows, self.read_every = scorer, rows, read_every
        self._model = causal_model(scorer.model)
        self.context = context_length(self._model.config)
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
        queue = Queue([Job(i, 0, num) for i in order if num], lambda i: self._batch_key(len(prompts[i]), params))

        def take(prompt: int, number: int, sample: Sample) -> None:
            found[prompt][number] = sample

        packs = min(rows, num * len(prompts), params.max_new_tokens) >= FEWEST_ROWS
        with packed_linears(causal_model(self.scorer.model)) if packs else nullcontext():
            while queue:
                batch = self._batch(prompts, streams, params, queue, rows, take)
                size = len(batch.rows.living)
                try:
                    with self._sampling(batch.decoder):
                        while batch.running:
                            report(*batch.advance())
                except MEMORY_ERRORS as error:
                    self.rows = rows = halved(error, size, 1, TOO_LARGE, batch.decoder.device)
                    log.warning("out of memory with %d samples at once: going on with %d", size, rows)
                    jobs, drawn = batch.unfinished()
                    queue.give_back(jobs)
                    report(0, -drawn)
        whole = [[sample for sample in many if sample is not None] for many in found]
        assert all(len(many) == num for many in whole), "a sample was lost"
        return whole

    def stream(
        self, prompt: Ids, params: SamplingParams, *, stream: int = 0, sample: int = 0
    ) -> Generator[int, None, None]:
        """The tokens of one sample as they are drawn, the stop token included."""
        self._check([prompt], params)
        queue = Queue([Job(0, sample, 1)], lambda _: 0)
        batch = self._batch([prompt], [stream], params, queue, 1, lambda *_: None, read_every=1)
        while batch.running:
            with self._sampling(batch.decoder):  # not around the yield: the caller may compute gradients
                batch.advance()
            yield int(batch.rows.ids[0, batch.rows.drawn[0] - 1])

    def _batch(
        self,
        prompts: Sequence[Ids],
        streams: Sequence[int],
        params: SamplingParams,
        queue: Queue,
        rows: int,
        found: Callable[[int, int, Sample], None],
        read_every: int | None = None,
    ) -> SampleBatch:
        """A batch of the next jobs of a queue."""
        decoder = self.decoder_for(len(prompts[queue.next_prompt]), params)
        read_every = read_every or self.read_every or READ_EVERY[decoder.device.type]
        work = (prompts, streams, params, queue, rows)
        return SampleBatch(decoder, *work, context=self.context, read_every=read_every, found=found)

    @contextmanager
    def _sampling(self, decoder: Decoder) -> Iterator[None]:
        """What a decoder needs around its passes: its attention, no gradients, no dropout."""
        compiled = self.scorer.compiled
        settings = nullcontext() if compiled is None else compiled.settings()
        with torch.no_grad(), settings, self.scorer.attention_by(decoder.hook), _evaluating(self.scorer):
            yield

    def _check(self, prompts: Sequence[Ids], params: SamplingParams) -> None:
        if any(map(pictures_in, prompts)) and self._decoder is WholeDecoder:
            name = type(self._model).__name__
            raise ModelError(f"{name} is sampled from without a cache, which takes no pictures here")
        size = vocabulary_size(self._model)
        for n, prompt in enumerate(prompts, 1):
            if not len(prompt):
                raise ModelError(f"prompt {n} has no token; a model needs one to start from")
            if self.context is not None and len(prompt) >= self.context:
                what = f"prompt {n} has {len(prompt)} tokens and the model a context of {self.context}"
                raise ModelError(f"{what}: no room for an answer; shorten it")
            if int(max(prompt)) >= size:
                what = f"prompt {n} holds token {int(max(prompt))}, but the model's vocabulary has {size}"
                raise ModelError(f"{what}; tokenizer and model do not belong together")

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
        row = max(1, held * tokens * cache_dtype(self.scorer.dtype, device).itemsize)
        affordable = int(free_memory(device) * CACHE_FRACTION / (2 * row))  # twice: growing and compacting copy it
        return max(1, min(MAX_ROWS[device.type], affordable))


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
