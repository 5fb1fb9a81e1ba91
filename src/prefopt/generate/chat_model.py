"""Chat models behind one protocol: a model on this machine, and one behind an OpenAI-compatible URL."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from http.client import HTTPException, HTTPResponse
from typing import Any

from prefopt.core.dispatch import ServerFailed
from prefopt.core.endpoint import URL_FLAGS, Endpoint, Flags, ServerRefusal, Unreachable, message_of, reason_of
from prefopt.data.chat.render import Renderer
from prefopt.data.layouts.messages import write_parts
from prefopt.data.tokenizer import Tokenizer
from prefopt.data.validate import Problem
from prefopt.errors import RunError
from prefopt.generate.model_io import CONTEXT_TOKENS, SampledModel, continuation
from prefopt.generate.sampler import Ids, SamplingParams
from prefopt.generate.transformers_sampler import TransformersSampler
from prefopt.records import Comparison, Message

Messages = tuple[Message, ...]
PLAIN_STOPS = ("\nUser:", "\nSystem:")
"""Text with which a model without a chat template begins a turn of the other side."""
BROKEN = "\N{REPLACEMENT CHARACTER}"
CHARACTER_TOKENS = 8
"""Tokens of one character at most; more that do not decode are shown as they are."""


class ContextLengthError(RunError):
    """The conversation exceeds the context; without its oldest messages it may fit."""


def drop_oldest(messages: Messages) -> Messages | None:
    """The conversation without its oldest question and answer; the system message stays. None for the last question."""
    system, rest = (messages[:1], messages[1:]) if messages and messages[0].role == "system" else ((), messages)
    later = next((i for i, m in enumerate(rest) if i and m.role == "user"), 0)
    return system + rest[later:] if later else None


def with_system(system: str | None, messages: Sequence[Message]) -> Messages:
    """A conversation with its system message, if any."""
    return (*((Message("system", system),) if system else ()), *messages)


class LocalChatModel:
    """A model on this machine. ``note`` says in one line what is slow; another ``attempt`` is another sample."""

    def __init__(self, model: SampledModel, renderer: Renderer, params: SamplingParams) -> None:
        self.model, self.params = model, params
        self.name = model.label
        self._renderer, self._sampler = renderer, TransformersSampler(model.scorer, rows=1)
        self.note = self._sampler.note
        plain = renderer.rendering.chat_template is None and model.tokenizer.chat_template is None
        self._stops = PLAIN_STOPS if plain else ()

    def answer(self, messages: Messages, attempt: int) -> Iterator[str]:
        """The answer without leading white space. Raises :class:`ContextLengthError` where the context has no room for
        ``max_new_tokens`` more, or for a quarter of it."""
        ids, context = self._ids(Comparison(messages, (), (), 0)), self.model.context
        if context is not None and len(ids) > self._prompt_limit(context):
            what = f"{len(ids)} tokens are too many for the model's context of {context}"
            raise ContextLengthError(f"{what}: shorten the message")
        chunks = self._stream(ids, attempt, self._stops)
        for chunk in chunks:
            if chunk.strip():
                yield chunk.lstrip()
                break
        yield from chunks

    def complete(self, text: str, attempt: int) -> Iterator[str]:
        """The continuation of a text, of which the end is read where it exceeds the context."""
        ids = self._ids(Comparison((Message("user", text),), (), (), 0, text=True))
        if self.model.context is not None:
            ids = ids[-self._prompt_limit(self.model.context) :]
        yield from self._stream(ids, attempt, ())

    def _prompt_limit(self, context: int) -> int:
        return context - min(self.params.max_new_tokens, max(1, context // 4))

    def _ids(self, prompt: Comparison) -> Ids:
        found = next(iter(self._renderer.prompts([prompt])))
        if isinstance(found, Problem):
            raise RunError(f"the chat template cannot render this: {found.what}")
        return found

    def _stream(self, ids: Ids, attempt: int, stops: Sequence[str]) -> Iterator[str]:
        text = TextStream(self.model.tokenizer, ids, stops=stops)
        tokens = self._sampler.stream(ids, self.params, sample=attempt)
        try:
            for token in tokens:
                if token in self.params.stop:
                    break
                if chunk := text.add(token):
                    yield chunk
                if text.ended:
                    break
        finally:
            tokens.close()
        if chunk := text.finish():
            yield chunk


class TextStream:
    """Text of sampled tokens: whole characters as soon as they are complete, held back while they may begin a stop.

    ``stops`` are texts that end it and are left out; ``ended``: one occurred. ``text``: everything returned so far.

    >>> stream = TextStream(tokenizer, prompt_ids, stops=("User:",))  # doctest: +SKIP
    >>> for token in sampler.stream(prompt_ids, params):  # doctest: +SKIP
    ...     print(stream.add(token), end="", flush=True)
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Ids, *, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, [s for s in stops if s]
        self._before = [int(i) for i in prompt[-CONTEXT_TOKENS:]]  # tokens whose text was returned
        self._fresh: list[int] = []
        self._held = ""
        self.text = ""
        self.ended = False

    def add(self, token: int) -> str:
        """The text to show after one more token."""
        self._fresh.append(token)
        return self._release(final=False)

    def finish(self) -> str:
        """The text that was held back, after the last token."""
        return self._release(final=True)

    def _release(self, final: bool) -> str:
        if self.ended:
            return ""
        new = continuation(self._tokenizer, self._before, self._fresh) if self._fresh else ""
        # The last character may be incomplete.
        if final or not new.endswith(BROKEN) or len(self._fresh) >= CHARACTER_TOKENS:
            self._held += new
            self._before, self._fresh = (self._before + self._fresh)[-CONTEXT_TOKENS:], []
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.ended = True
            out, self._held = self._held[: min(found)], ""
        else:
            hold = 0 if final else max((_overlap(self._held, stop) for stop in self._stops), default=0)
            cut = len(self._held) - hold
            out, self._held = self._held[:cut], self._held[cut:]
        self.text += out
        return out


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text may begin a stop."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)


class RemoteChatModel:
    """A model behind an OpenAI-compatible URL; ``options`` go with every request (``temperature``, ``max_tokens``)."""

    def __init__(
        self,
        url: str,
        model: str | None,
        *,
        key_variable: str | None,
        options: Mapping[str, Any],
        flags: Flags = URL_FLAGS,
    ) -> None:
        """``model`` may be None where the server has one; ``key_variable`` names an environment variable. ``flags``:
        the options that gave them.

        Raises :class:`ConfigError` for an invalid URL, and :class:`RunError` where the server cannot be asked.
        """
        self._endpoint = Endpoint(url, key_variable=key_variable, flag=flags.url, key_flag=flags.key)
        self._url = self._endpoint.url
        self._options = dict(options)
        self.model = model or self._endpoint.only_model(flags.model)
        self.place = self._endpoint.place
        self.name = f"{self.model} at {self.place}"

    def answer(self, messages: Messages, attempt: int) -> Iterator[str]:
        """Raises :class:`ContextLengthError` where the server refuses the length."""
        turns = [{"role": m.role, "content": write_parts(m, urls=True) if m.pictures else m.content} for m in messages]
        yield from self._stream("chat/completions", {"messages": turns}, attempt)

    def complete(self, text: str, attempt: int) -> Iterator[str]:
        """By the older completions endpoint, which not every server has."""
        yield from self._stream("completions", {"prompt": text}, attempt)

    def _stream(self, path: str, body: Mapping[str, Any], attempt: int) -> Iterator[str]:
        options = dict(self._options)
        if "seed" in options:
            options["seed"] += attempt
        request = {"model": self.model, "stream": True, **body, **options}
        with self._open(path, json.dumps(request).encode()) as response:
            try:
                streams = response.headers.get_content_type() == "text/event-stream"
                yield from self._texts(_events(response) if streams else [json.loads(response.read())])
            except (OSError, HTTPException, ValueError) as error:
                raise Unreachable(f"{self._url}: the answer broke off ({reason_of(error)})") from error

    def _texts(self, events: Iterable[Any]) -> Iterator[str]:
        """The text of events. Reasoning that a server sends apart is put into <think> tags, as models write it."""
        thinking = False
        for event in events:
            if not isinstance(event, dict):
                continue
            if "error" in event:
                raise ServerFailed(f"{self._url}: {message_of(event)}")
            for choice in event.get("choices") or ():
                part = choice.get("delta") or choice.get("message") or choice
                thought = part.get("reasoning_content") or part.get("reasoning")
                text = part.get("content") or part.get("text")
                if isinstance(thought, str) and thought:
                    yield thought if thinking else f"<think>\n{thought}"
                    thinking = True
                if isinstance(text, str) and text:
                    yield f"\n</think>\n\n{text}" if thinking else text
                    thinking = False

    def _open(self, path: str, body: bytes | None) -> HTTPResponse:
        try:
            return self._endpoint.open(path, body)
        except ServerRefusal as error:
            if error.status == 400 and "context" in error.what and body is not None:
                raise ContextLengthError(error.what) from error
            raise


ChatModel = LocalChatModel | RemoteChatModel
"""Answers conversations and completes text, streaming chunks of text."""


def _events(response: HTTPResponse) -> Iterator[Any]:
    """The JSON of server-sent events: lines ``data: {...}``, the last of them ``data: [DONE]``. Raises ``ValueError``
    where the stream ends before the answer does."""
    ended = False
    for raw in response:
        line = raw.decode("utf-8", "replace").strip()
        if not line.startswith("data:"):
            continue  # keep-alive comments, names of events
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        event = json.loads(data)
        yield event
        choices = event.get("choices") if isinstance(event, dict) else None
        ended = ended or any(c.get("finish_reason") for c in choices or ())
    if not ended:
        raise ValueError("its end is missing")
