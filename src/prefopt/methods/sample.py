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
from prefopt.core.shown import Shown
from prefopt.core.terminal import Bar, Reporter, StopRequest, duration
from prefopt.data.group import shortened
from prefopt.data.layouts import LAYOUTS
from prefopt.errors import ConfigError
from prefopt.generate.model_io import SampledModel, continuation, without_stop
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
from prefopt.rl.prompts import read_prompts
from prefopt.runs.folder import digest_of

COMPARED = 64
"""The largest number of samples, spread over the prompts, to compare log-probabilities of sampler and scorer on."""
BATCHES = 4
"""Batches that are sorted by length and written together. A killed run loses at most these."""
VLLM_SAMPLES = 4096
"""The same in samples for vLLM, which makes its own batches."""

Row = dict[str, Any]
SHOWN, LINE = 4, 160
"""Prompts, and samples of each, in the table of a result; characters of each."""


@dataclass(frozen=True, slots=True, repr=False)
class SampleResult(Shown):
    """``rows`` are those of the output file, if none was written.

    ``finished`` is the fraction of samples that ended by themselves, ``empty`` the number without text; ``mismatch``
    compares the log-probabilities of sampler and scorer. All three are of the samples that this run drew.
    """

    output: Path | None
    rows: list[Row]
    prompts: int
    samples: int
    tokens: int
    finished: float
    empty: int
    mismatch: LogprobMismatch | None

    def table(self) -> tuple[str, list[tuple[str, str]]]:
        """Counts, and the first samples where no file was written."""
        rows = [
            ("finished", f"{self.finished:.0%} of {self.samples} samples, {self.empty} empty"),
            ("tokens", f"{self.tokens:,}"),
        ]
        if self.output is not None:
            rows.append(("written", str(self.output)))
        for row in self.rows[:SHOWN]:
            rows.append(("", ""))
            rows += [("prompt", _one_line(row["prompt"])), *(("", _one_line(r)) for r in row["responses"][:SHOWN])]
        more = f", {SHOWN} shown" if len(self.rows) > SHOWN else ""
        return f"{self.samples} samples of {self.prompts} prompts{more}", rows


def _one_line(turns: str | list[Row]) -> str:
    """A text, or the last turn of a conversation, cut to a line."""
    text = turns if isinstance(turns, str) else str(turns[-1].get("content") or "")
    return shortened(text, LINE, flat=True)


def run(
    config: SampleConfig,
    *,
    model: Any = None,
    tokenizer: Any = None,
    rows: Iterable[Mapping[str, object]] | None = None,
) -> SampleResult:
    """Sample. ``model``, ``tokenizer`` and ``rows`` replace those of ``config``.

    Raises :class:`prefopt.errors.UserError`, and :class:`prefopt.errors.Interrupted` after a stop: the run can be
    resumed.
    """
    with StopRequest() as stop:
        if config.threads:
            torch.set_num_threads(config.threads)
        file = SampleFile(Path(config.output), config.to_dict(), resume=config.resume) if config.output else None
        source = SampledModel(
            config.model,
            adapter=config.adapter,
            quantise=config.quantise,
            device=config.device,
            dtype=config.dtype,
            given=model,
            tokenizer=tokenizer,
        )
        try:
            return _SampleRun(config, Reporter(config.progress), stop, file, source, rows).run()
        finally:
            source.release()
            if file is not None:
                file.close()


class _SampleRun:
    """Prompts, sampling settings, and counts of what was drawn."""

    def __init__(
        self,
        config: SampleConfig,
        reporter: Reporter,
        stop: StopRequest,
        file: SampleFile | None,
        model: SampledModel,
        rows: Iterable[Mapping[str, object]] | None,
    ) -> None:
        if config.engine == "vllm" and model.quantise is not None:
            raise ConfigError(
                "--engine vllm loads the base as it is, and this adapter was trained on one in"
                f" {model.quantise}: add --quantise none, or leave --engine out"
            )
        self.config, self.reporter, self.stop, self.file, self.model = config, reporter, stop, file, model
        self.rows: list[Row] = []
        self.samples = self.tokens = self.ended = self.empty = 0
        self.compared: dict[int, list[Sample]] = {}
        self.reward: RewardScorer | None = None
        self.drawn = config.num * (config.best_of or 1)  # for each prompt
        for line in (model.note, slow_dtype(model.dtype, model.device)):
            if line:
                reporter.say(line)
        self.prompts, stop_ids = read_prompts(config, model, rows, reporter)
        self.settings = SamplingParams(
            config.max_new_tokens,
            stop_ids,
            config.min_new_tokens,
            config.temperature,
            config.top_p,
            config.top_k,
            config.seed,
            model.never_drawn,
        )
        self.longest = max(map(len, self.prompts.ids)) + config.max_new_tokens
        names = ", ".join(map(str, model.tokenizer.convert_ids_to_tokens(list(stop_ids))))
        reporter.say(f"samples end at {names or 'no token: the tokenizer names none'}")
        context, most = model.context, config.max_new_tokens
        if context and (short := sum(len(ids) + most > context for ids in self.prompts.ids)):
            what = f"leave room for fewer than {most} tokens in the model's context of {context}"
            reporter.say(f"prompts: {short} of {len(self.prompts.ids)} {what}")

    def run(self) -> SampleResult:
        """Draw, write and compare."""
        mismatch = self._sample()
        finished = self.ended / self.samples if self.samples else 0.0
        path = self.file.path if self.file else None
        counts = (len(self.prompts.rows), self.samples, self.tokens, finished, self.empty)
        return SampleResult(path, self.rows, *counts, mismatch)

    def _sample(self) -> LogprobMismatch | None:
        places = [PromptOrigin(c.file, c.row) for c in self.prompts.rows]
        if self.file is not None:
            self.file.same("model", self.model.identity().digest, "the model")
            self.file.same("prompts", digest_of(self.prompts.ids), "the prompts")
            self.file.same("stop", list(self.settings.stop), "what ends an answer")
        if self.file is not None and self.file.finished:
            self._say_notes()
            self.reporter.say(f"{self.file.path} is finished: nothing is left to sample")
            return None
        if self.config.reward is not None:
            self.reward = self._reward()
        with self._sampler() as (sampler, window):
            if self.file is not None:
                self.file.open(places)
                self._say_notes()
            done = self.file.done if self.file else 0
            if done:
                self.reporter.say(f"resumed: {done} of {len(places)} prompts are done")
            started = time.monotonic()
            self._draw(sampler, window, done)
            seconds = time.monotonic() - started
        return self._finish(seconds)

    def _say_notes(self) -> None:
        for note in self.file.notes if self.file else ():
            self.reporter.say(note)

    def _reward(self) -> RewardScorer:
        assert self.config.reward is not None and self.config.best_of is not None
        model = self.model
        reward = load_reward_scorer(
            self.config.reward,
            model.tokenizer,
            self.settings.stop,
            dtype=model.dtype,
            device=model.device,
            attention="auto",
            longest=self.longest,
            pictures=model.pictures,
        )
        self.reporter.say(
            f"best of {self.config.best_of}, by {reward.words}: at most"
            f" {best_of_n_kl(self.config.best_of):.2f} nats from the model's own samples"
        )
        return reward

    @contextmanager
    def _sampler(self) -> Iterator[tuple[ResponseSampler, int]]:
        """The sampler, and the number of prompts per call; a resumed run has the same, and so the same batches."""
        model, record = self.model, self.file.record if self.file else {}
        dtype = str(model.dtype).removeprefix("torch.")
        if self.config.engine == "vllm":
            if model.pictures:
                raise ConfigError("--engine vllm is not given pictures, which some prompts have; leave --engine out")
            from prefopt.generate.vllm import VllmSampler

            if model.context is None:
                raise ConfigError("--engine vllm needs a model with a known context length; leave --engine out")
            with VllmSampler(model.source, adapter=model.adapter, dtype=dtype, context=model.context) as fast:
                yield fast, max(1, VLLM_SAMPLES // self.drawn)
            return
        sampler = TransformersSampler(model.scorer)
        sampler.rows = record.setdefault("rows", self.config.batch_size or sampler.estimate_rows(self.longest))
        self.reporter.say(f"sampling: at most {sampler.rows} at once ({sampler.decoder_name}, {dtype}, {model.device})")
        if sampler.note:
            self.reporter.say(f"sampling: {sampler.note}")
        yield sampler, max(1, BATCHES * sampler.rows // self.drawn)

    def _draw(self, sampler: ResponseSampler, window: int, done: int) -> None:
        """Draw and write ``window`` prompts at a time, from the first that is not ``done``."""
        prompts = self.prompts
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
                rows = [self._row(i, found[i - start], scores[i - start]) for i in fresh]
                self.compared |= {i: found[i - start][:each] for i in fresh if i % stride == 0}
                if self.file is not None:
                    self.file.write(rows)
                else:
                    self.rows += rows
                tell.restart((part[-1] + 1) * self.drawn)

    def _row(self, i: int, samples: Sequence[Sample], scores: Sequence[float]) -> Row:
        """A row of the output: the canonical layout with additional columns."""
        prompt, ids, tokenizer = self.prompts.rows[i], self.prompts.ids[i], self.model.tokenizer
        responses = []
        for sample in samples:
            text = continuation(tokenizer, ids, without_stop(sample.ids, self.settings.stop))
            # Chat templates add white space around answers; the text of a base model is not changed.
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

    def _finish(self, seconds: float) -> LogprobMismatch | None:
        say, prompts = self.reporter.say, self.prompts
        mismatch = None
        if self.samples:
            say(
                f"{self.samples} samples, {self.tokens:,} tokens in {duration(seconds)}"
                f" ({self.tokens / max(seconds, 1e-9):,.0f} per second), {self.tokens / self.samples:.1f} each;"
                f" {self.ended / self.samples:.0%} ended by themselves, {self.empty} empty"
            )
        if self.compared:
            scorer = self.model.scorer
            mismatch = compare_logprobs(scorer, [prompts.ids[i] for i in self.compared], list(self.compared.values()))
            say(mismatch.words(scorer.dtype))
        if self.file is not None:
            gaps = None if mismatch is None else asdict(mismatch)
            self.file.finish({"prompts": len(prompts.rows), "sampler_scorer_difference": gaps})
            say(
                f"written: {self.file.path} ({len(prompts.rows)} prompts with {self.config.num}"
                f" sample{'s' * (self.config.num > 1)} each)"
            )
        return mismatch


class _Progress:
    """Updates a progress bar from a sampler's reports. Raises after a stop request."""

    def __init__(self, bar: Bar, stop: StopRequest, done: int, most: int) -> None:
        self._bar, self._stop, self._done = bar, stop, done
        self._before, self._most = done, most
        self._tokens, self._started = 0, time.monotonic()

    def __call__(self, ended: int, drawn: int) -> None:
        self._stop.check()
        self._done += ended
        self._tokens += drawn
        per_second = self._tokens / max(time.monotonic() - self._started, 1e-9)
        # Most samples of a batch end together, so that their number is a poor estimate of the remaining time.
        work = max(self._done, self._before + self._tokens / self._most)
        self._bar.update(max(0, self._done), f"{per_second:,.0f} tokens/s", work=work)

    def restart(self, done: int) -> None:
        """Set the number of finished samples, after a window that was partly done before."""
        self._done = done
