"""Sampling from a config to a finished file: prompts in, K samples of each out."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from prefopt.config.sample import SampleConfig
from prefopt.core.terminal import Bar, Reporter, StopRequest, duration
from prefopt.data.chat.render_options import parse_variables, read_template
from prefopt.data.layouts import LAYOUTS
from prefopt.errors import ConfigError
from prefopt.generate.model_io import PromptSet, SampledModel, continuation, read_prompt_set, renderer_for, without_stop
from prefopt.generate.rewards import RewardScorer, best_of, best_of_n_kl, load_reward_scorer
from prefopt.generate.sample_file import PromptOrigin, SampleFile
from prefopt.generate.sampler import (
    LogprobMismatch,
    ResponseSampler,
    Sample,
    SamplingParams,
    compare_logprobs,
    occurrences,
)
from prefopt.generate.transformers_sampler import TransformersSampler
from prefopt.model.precision import slow_dtype
from prefopt.records import Message, Response
from prefopt.runs.folder import digest_of

COMPARED = 64
"""Samples at most, spread over the prompts, that are scored again to compare the log-probabilities."""
BATCHES = 4
"""Batches that are sorted by length and written together: what a kill may cost."""
VLLM_SAMPLES = 4096
"""The same for vLLM, which makes its own batches."""

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class SampleResult:
    """What a run gives back. ``rows`` are what was drawn, as an output file would hold it, where there is no file.

    ``finished`` is the part of samples that ended by themselves, ``empty`` how many said nothing; both count what this
    run drew, and so does ``mismatch``, which compares the sampler with the scorer.
    """

    output: Path | None
    rows: list[Row]
    prompts: int
    samples: int
    tokens: int
    finished: float
    empty: int
    mismatch: LogprobMismatch | None


def run(
    config: SampleConfig,
    *,
    model: Any = None,
    tokenizer: Any = None,
    rows: Iterable[Mapping[str, object]] | None = None,
) -> SampleResult:
    """Sample. ``model``, ``tokenizer`` and ``rows`` stand in for what ``config`` names.

    Raises :class:`prefopt.errors.UserError`, and :class:`prefopt.errors.Interrupted` after a stop, with what was
    written kept.
    """
    with StopRequest() as stop:
        return _Run(config, Reporter(config.progress), stop).run(model, tokenizer, rows)


class _Run:
    """One run, stage by stage."""

    def __init__(self, config: SampleConfig, reporter: Reporter, stop: StopRequest) -> None:
        self.config, self.reporter, self.stop = config, reporter, stop
        options = config.to_dict()
        self.file = SampleFile(Path(config.output), options, resume=config.resume) if config.output else None
        self.rows: list[Row] = []
        self.samples = self.tokens = self.ended = self.empty = 0
        self.compared: dict[int, list[Sample]] = {}
        self.reward: RewardScorer | None = None
        self.drawn = config.num * (config.best_of or 1)  # for each prompt

    def run(self, given: Any, tokenizer: Any, rows: Iterable[Mapping[str, object]] | None) -> SampleResult:
        config = self.config
        if config.threads:
            torch.set_num_threads(config.threads)
        model = SampledModel(
            config.model,
            adapter=config.adapter,
            device=config.device,
            dtype=config.dtype,
            given=given,
            tokenizer=tokenizer,
        )
        for line in (model.note, slow_dtype(model.dtype, model.device)):
            if line:
                self.reporter.say(line)
        try:
            prompts = self._prompts(model, rows)
            mismatch = self._sample(model, prompts)
        finally:
            model.release()
            if self.file is not None:
                self.file.close()
        part = self.ended / self.samples if self.samples else 0.0
        path = self.file.path if self.file else None
        counts = (len(prompts.rows), self.samples, self.tokens, part, self.empty)
        return SampleResult(path, self.rows, *counts, mismatch)

    def _prompts(self, model: SampledModel, rows: Iterable[Mapping[str, object]] | None) -> PromptSet:
        config = self.config
        template = read_template(config.chat_template) if config.chat_template else None
        renderer = renderer_for(model.tokenizer, template, parse_variables(config.template_variables or ()))
        prompts = read_prompt_set(
            config.prompts,
            renderer,
            rows=rows,
            context=model.context,
            lines=config.lines,
            on_bad_row=config.on_bad_row,
            format=config.format,
            columns=config.column_words,
        )
        for line in prompts.summary():
            self.reporter.say(f"prompts: {line}")
        self.settings = SamplingParams(
            config.max_new_tokens,
            model.stop_ids(renderer),
            config.min_new_tokens,
            config.temperature,
            config.top_p,
            config.top_k,
            config.seed,
        )
        names = ", ".join(map(str, model.tokenizer.convert_ids_to_tokens(list(self.settings.stop))))
        self.reporter.say(f"samples end at {names or 'no token, for the tokenizer names none'}")
        self._say_room(prompts, model.context)
        return prompts

    def _say_room(self, prompts: PromptSet, context: int | None) -> None:
        if context is None:
            return
        short = sum(len(ids) + self.config.max_new_tokens > context for ids in prompts.ids)
        if short:
            what = f"leave room for fewer than {self.config.max_new_tokens} tokens in the model's context of {context}"
            self.reporter.say(f"prompts: {short} of {len(prompts.ids)} {what}")

    # -- sampling ----------------------------------------------------------------------------------------------

    def _sample(self, model: SampledModel, prompts: PromptSet) -> LogprobMismatch | None:
        places = [PromptOrigin(c.file, c.row) for c in prompts.rows]
        if self.file is not None:
            self.file.same("model", model.identity().digest, "the model")
            self.file.same("prompts", digest_of(prompts.ids), "the prompts")
            self.file.same("stop", list(self.settings.stop), "what ends an answer")
        if self.file is not None and self.file.finished:
            self._say_notes()
            self.reporter.say(f"{self.file.path} is finished: nothing is left to sample")
            return None
        if self.config.reward is not None:
            self.reward = self._reward(model, prompts)
        with self._sampler(model, prompts) as (sampler, window):
            if self.file is not None:
                self.file.open(places)
                self._say_notes()
            done = self.file.done if self.file else 0
            if done:
                self.reporter.say(f"resumed: {done} of {len(places)} prompts are done")
            started = time.monotonic()
            self._windows(sampler, model, prompts, window, done)
            seconds = time.monotonic() - started
        return self._finish(model, prompts, seconds)

    def _say_notes(self) -> None:
        for note in self.file.notes if self.file else ():
            self.reporter.say(note)

    def _reward(self, model: SampledModel, prompts: PromptSet) -> RewardScorer:
        assert self.config.reward is not None and self.config.best_of is not None
        reward = load_reward_scorer(
            self.config.reward,
            model.tokenizer,
            self.settings.stop,
            dtype=model.dtype,
            device=model.device,
            attention="auto",
            longest=max(map(len, prompts.ids)) + self.config.max_new_tokens,
        )
        self.reporter.say(
            f"best of {self.config.best_of}, by {reward.words}: at most"
            f" {best_of_n_kl(self.config.best_of):.2f} nats from the model's own samples"
        )
        return reward

    @contextmanager
    def _sampler(self, model: SampledModel, prompts: PromptSet) -> Iterator[tuple[ResponseSampler, int]]:
        """The sampler, and how many prompts go through it at once: the same at a resume, so that the batches are."""
        record = self.file.record if self.file else {}
        if self.config.engine == "vllm":
            from prefopt.generate.vllm import VllmSampler

            if model.context is None:
                raise ConfigError("--engine vllm needs a model that says how long its context is; leave --engine out")
            dtype = str(model.dtype).removeprefix("torch.")
            with VllmSampler(model.source, adapter=model.adapter, dtype=dtype, context=model.context) as fast:
                yield fast, max(1, VLLM_SAMPLES // self.drawn)
            return
        sampler = TransformersSampler(model.scorer)
        longest = max(map(len, prompts.ids)) + self.config.max_new_tokens
        sampler.rows = record.setdefault("rows", self.config.batch_size or sampler.estimate_rows(longest))
        dtype = str(model.dtype).removeprefix("torch.")
        self.reporter.say(f"sampling: {sampler.rows} side by side ({sampler.decoder_name}, {dtype}, {model.device})")
        if sampler.note:
            self.reporter.say(f"sampling: {sampler.note}")
        yield sampler, max(1, BATCHES * sampler.rows // self.drawn)

    def _windows(
        self, sampler: ResponseSampler, model: SampledModel, prompts: PromptSet, window: int, done: int
    ) -> None:
        streams = occurrences(prompts.ids)
        stride = -(-len(prompts.ids) // COMPARED)
        each = max(1, COMPARED // len(prompts.ids))
        with self.reporter.bar("sampling", len(prompts.ids) * self.drawn, "samples") as bar:
            tell = _Progress(bar, self.stop, done * self.drawn, self.config.max_new_tokens)
            for start in range(done // window * window, len(prompts.ids), window):
                part = range(start, min(start + window, len(prompts.ids)))
                found = sampler.sample(
                    [prompts.ids[i] for i in part],
                    self.drawn,
                    self.settings,
                    streams=[streams[i] for i in part],
                    progress=tell,
                )
                scores: list[list[float]] = [[] for _ in part]
                if self.reward is not None:
                    asked, ids = [prompts.rows[i] for i in part], [prompts.ids[i] for i in part]
                    kept = best_of(self.config.best_of or 1, self.reward, asked, ids, found)
                    found, scores = [samples for samples, _ in kept], [score for _, score in kept]
                fresh = [i for i in part if i >= done]
                rows = [self._row(model, prompts, i, found[i - start], scores[i - start]) for i in fresh]
                self.compared |= {i: found[i - start][:each] for i in fresh if i % stride == 0}
                if self.file is not None:
                    self.file.write(rows)
                else:
                    self.rows += rows
                tell.restart((part[-1] + 1) * self.drawn)

    def _row(
        self, model: SampledModel, prompts: PromptSet, i: int, samples: Sequence[Sample], scores: Sequence[float]
    ) -> Row:
        """A row of the output, in the canonical layout with columns of its own."""
        prompt = prompts.rows[i]
        responses = []
        for sample in samples:
            text = continuation(model.tokenizer, prompts.ids[i], without_stop(sample.ids, self.settings.stop))
            # Templates put white space around answers as they like; the text of a base model is left as it is.
            text = text if prompt.text else text.strip()
            responses.append(Response((Message("assistant", text),), cut=not sample.finished))
            self.samples += 1
            self.tokens += sample.tokens
            self.ended += sample.finished
            self.empty += not text.strip()
        columns = {
            "logprobs": [round(s.logp, 6) for s in samples],
            "sampling_logprobs": [round(s.sampling_logp, 6) for s in samples],
            "tokens": [s.tokens for s in samples],
            "token_ids": [s.ids.tolist() for s in samples],
            "source": prompt.file,
            "source_row": prompt.row,
        }
        if scores:
            columns["rewards"] = list(scores)
        whole = replace(prompt, responses=tuple(responses), extra={**prompt.extra, **columns})
        return LAYOUTS["canonical"].write(whole) | {"finish": [s.finish for s in samples]}

    def _finish(self, model: SampledModel, prompts: PromptSet, seconds: float) -> LogprobMismatch | None:
        say = self.reporter.say
        mismatch = None
        if self.samples:
            say(
                f"{self.samples} samples, {self.tokens:,} tokens in {duration(seconds)}"
                f" ({self.tokens / max(seconds, 1e-9):,.0f} per second), {self.tokens / self.samples:.1f} each;"
                f" {self.ended / self.samples:.0%} ended by themselves, {self.empty} empty"
            )
        if self.compared:
            scorer = model.scorer
            mismatch = compare_logprobs(scorer, [prompts.ids[i] for i in self.compared], list(self.compared.values()))
            say(mismatch.words(scorer.dtype))
        if self.file is not None:
            gaps = None if mismatch is None else asdict(mismatch)
            self.file.finish({"prompts": len(prompts.rows), "sampler_scorer_difference": gaps})
            say(f"written: {self.file.path} ({len(prompts.rows)} prompts with {self.config.num} samples each)")
        return mismatch


class _Progress:
    """Tells a bar what a sampler did, and stops it when a person asks."""

    def __init__(self, bar: Bar, stop: StopRequest, done: int, most: int) -> None:
        self._bar, self._stop, self._done = bar, stop, done
        self._before, self._most = done, most
        self._tokens, self._started = 0, time.monotonic()

    def __call__(self, ended: int, drawn: int) -> None:
        self._stop.check()
        self._done += ended
        self._tokens += drawn
        per_second = self._tokens / max(time.monotonic() - self._started, 1e-9)
        # Samples of a batch end together, most of them, so that their number says little of the time that is left.
        work = max(self._done, self._before + self._tokens / self._most)
        self._bar.update(max(0, self._done), f"{per_second:,.0f} tokens/s", work=work)

    def restart(self, done: int) -> None:
        """Put the count right after a window, of which a part may have been done before."""
        self._done = done
