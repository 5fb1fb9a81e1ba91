"""Who answers in a chat: one protocol for a model on this machine and for one behind a URL.

Answers come as server-sent events: lines ``data: {...}``, the last of them ``data: [DONE]``.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from typing import Any, Protocol

from prefopt.data.chat.render import Renderer
from prefopt.data.validate import Problem
from prefopt.errors import ConfigError, RunError
from prefopt.generate.sampled_model import SampledModel
from prefopt.generate.sampler import Ids, Settings
from prefopt.generate.text import TextStream
from prefopt.generate.transformers_sampler import TransformersSampler
from prefopt.records import Comparison, Message

Turns = tuple[Message, ...]
PLAIN_STOPS = ("\nUser:", "\nSystem:")
"""What a model without a chat template writes when it goes on for the other side."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a talker will answer: the turns that it takes in, and how many of the oldest were left out for them."""

    turns: Turns
    left_out: int = 0


class TooLong(RunError):
    """Whoever answers has no room for the conversation; without its oldest turns there may be."""


class Talker(Protocol):
    """Answers conversations, piece by piece, and continues text."""

    name: str

    def fit(self, turns: Turns) -> Asked:
        """The turns, less the oldest where all are too long. Raises :class:`prefopt.errors.RunError` where one is."""

    def answer(self, asked: Asked, attempt: int) -> Iterator[str]:
        """The answer as it comes; another ``attempt`` is another answer.

        Raises :class:`prefopt.errors.UserError`, before the first piece :class:`TooLong`.
        """

    def continued(self, text: str, attempt: int) -> Iterator[str]:
        """How a text goes on, as it comes."""


def without_oldest(asked: Asked) -> Asked | None:
    """Without the oldest question and what answers it; the system turn stays. Nothing where one question is left."""
    turns = asked.turns
    head, rest = (turns[:1], turns[1:]) if turns and turns[0].role == "system" else ((), turns)
    later = next((i for i, m in enumerate(rest) if i and m.role == "user"), 0)
    return Asked(head + rest[later:], asked.left_out + later) if later else None


class LocalTalker:
    """A model on this machine."""

    def __init__(self, model: SampledModel, renderer: Renderer, settings: Settings) -> None:
        self.model, self.settings = model, settings
        self.name = model.label
        self._renderer, self._sampler = renderer, TransformersSampler(model.scorer, rows=1)
        plain = renderer.rendering.chat_template is None and model.tokenizer.chat_template is None
        self._stops = PLAIN_STOPS if plain else ()

    @property
    def note(self) -> str | None:
        """What is slow, in one line."""
        return self._sampler.note

    def fit(self, turns: Turns) -> Asked:
        """Room is left for an answer: as many tokens as it may have, or a quarter of the context."""
        asked: Asked | None = Asked(turns)
        while asked is not None:
            ids = self._ids(Comparison(asked.turns, (), (), 0))
            if self.model.context is None or len(ids) <= self._room(self.model.context):
                return asked
            asked = without_oldest(asked)
        raise RunError(
            f"this message alone has {len(ids)} tokens, and the model's context is {self.model.context}: shorten it"
        )

    def answer(self, asked: Asked, attempt: int) -> Iterator[str]:
        """Without the white space that the template puts before it."""
        started = False
        for piece in self._pieces(self._ids(Comparison(asked.turns, (), (), 0)), attempt, self._stops):
            piece = piece if started else piece.lstrip()
            started = started or bool(piece)
            if piece:
                yield piece

    def continued(self, text: str, attempt: int) -> Iterator[str]:
        """The end of a text that is too long for the context is continued."""
        ids = self._ids(Comparison((Message("user", text),), (), (), 0, text=True))
        if self.model.context is not None:
            ids = ids[-self._room(self.model.context) :]
        yield from self._pieces(ids, attempt, ())

    def _room(self, context: int) -> int:
        return context - min(self.settings.max_new_tokens, max(1, context // 4))

    def _ids(self, prompt: Comparison) -> Ids:
        found = next(iter(self._renderer.prompts([prompt])))
        if isinstance(found, Problem):
            raise RunError(f"the model cannot be asked this: {found.what}")
        return found

    def _pieces(self, ids: Ids, attempt: int, stops: Sequence[str]) -> Iterator[str]:
        text = TextStream(self.model.tokenizer, ids, stops=stops)
        tokens = self._sampler.stream(ids, self.settings, sample=attempt)
        try:
            for token in tokens:
                if token in self.settings.stop:
                    break
                if piece := text.add(token):
                    yield piece
                if text.ended:
                    break
        finally:
            tokens.close()
        if piece := text.finish():
            yield piece


def system_and(system: str | None, turns: Sequence[Message]) -> Turns:
    """A conversation with its system turn, where there is one."""
    head = (Message("system", system),) if system else ()
    return (*head, *turns)


SECONDS = 300.0
"""Of silence, after which a server counts as gone."""


class RemoteTalker:
    """A model behind a URL. ``options`` are sent along with every request (``temperature``, ``max_tokens``, ...)."""

    def __init__(self, url: str, model: str | None, *, key_variable: str | None, options: Mapping[str, Any]) -> None:
        """``model`` may be left out where the server has one; ``key_variable`` names an environment variable.

        Raises :class:`ConfigError` for what is no URL, and :class:`RunError` where the server cannot be asked.
        """
        self._base = _base(url)
        self._headers = {"Content-Type": "application/json", "Accept": "text/event-stream, application/json"}
        if key_variable is not None:
            if not (key := os.environ.get(key_variable)):
                raise ConfigError(f"--url-key {key_variable}: there is no such environment variable, or it is empty")
            self._headers["Authorization"] = f"Bearer {key}"
        self._options = dict(options)
        self._model = model or self._only_model()
        self.name = f"{self._model} at {urllib.parse.urlsplit(self._base).netloc}"

    def fit(self, turns: Turns) -> Asked:
        """The server knows its context, not we: see :meth:`answer`."""
        return Asked(turns)

    def answer(self, asked: Asked, attempt: int) -> Iterator[str]:
        """Raises :class:`TooLong` where the server says so."""
        messages = [{"role": m.role, "content": m.content} for m in asked.turns]
        yield from self._streamed("chat/completions", {"messages": messages}, attempt)

    def continued(self, text: str, attempt: int) -> Iterator[str]:
        """By the older interface for text, which not every server has."""
        yield from self._streamed("completions", {"prompt": text}, attempt)

    def _streamed(self, path: str, body: Mapping[str, Any], attempt: int) -> Iterator[str]:
        options = dict(self._options)
        if "seed" in options:
            options["seed"] += attempt
        request = {"model": self._model, "stream": True, **body, **options}
        with self._open(path, json.dumps(request).encode()) as response:
            try:
                streams = response.headers.get_content_type() == "text/event-stream"
                yield from self._texts(_events(response) if streams else [json.loads(response.read())])
            except (OSError, HTTPException, ValueError) as error:
                raise RunError(f"{self._base}: the answer broke off ({_reason(error)})") from error

    def _texts(self, events: Iterable[Any]) -> Iterator[str]:
        """What events add to the answer. Reasoning, which some servers keep apart, is shown as models write it."""
        thinking = False
        for event in events:
            if not isinstance(event, dict):
                continue
            if "error" in event:
                raise RunError(f"{self._base}: {_message(event)}")
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

    def _only_model(self) -> str:
        """The model of a server that has one."""
        with self._open("models", None) as response:
            try:
                names = [str(m["id"]) for m in json.loads(response.read())["data"]]
            except (ValueError, KeyError, TypeError) as error:
                raise RunError(f"{self._base}: it does not list its models; name one with --url-model") from error
        if len(names) != 1:
            raise ConfigError(f"--url-model is missing: {self._base} has {', '.join(names) or 'no model'}")
        return names[0]

    def _open(self, path: str, body: bytes | None) -> HTTPResponse:
        request = urllib.request.Request(f"{self._base}/{path}", data=body, headers=self._headers)
        try:
            response: HTTPResponse = urllib.request.urlopen(request, timeout=SECONDS)
        except urllib.error.HTTPError as error:
            what = _message(_json(error.read()))
            if error.code == 400 and "context" in what and body is not None:
                raise TooLong(what) from error
            raise RunError(f"{self._base}: the server answers {error.code} ({what or error.reason})") from error
        except (OSError, HTTPException) as error:
            raise RunError(f"{self._base} cannot be reached ({_reason(error)}); is the server running?") from error
        return response


def _base(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(f"--url {url} should begin with http:// or https://, such as http://localhost:8000/v1")
    path = parts.path.rstrip("/")
    for ending in ("/chat/completions", "/completions"):
        path = path.removesuffix(ending)
    return f"{parts.scheme}://{parts.netloc}{path or '/v1'}"


def _events(response: HTTPResponse) -> Iterator[Any]:
    """The JSON of every event up to the last. Raises ``ValueError`` where the stream ends before the answer does."""
    ended = False
    for raw in response:
        line = raw.decode("utf-8", "replace").strip()
        if not line.startswith("data:"):
            continue  # comments that keep the line alive, names of events
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        event = json.loads(data)
        yield event
        choices = event.get("choices") if isinstance(event, dict) else None
        ended = ended or any(c.get("finish_reason") for c in choices or ())
    if not ended:
        raise ValueError("its end is missing")


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return data.decode("utf-8", "replace")


def _message(answer: Any) -> str:
    """What a server says went wrong, in one line."""
    found = answer
    for name in ("error", "message", "detail"):
        if isinstance(found, dict) and name in found:
            found = found[name]
    return " ".join(str(found or "").split())[:300]


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", None) or error
    return getattr(reason, "strerror", None) or " ".join(str(reason).split()) or type(error).__name__
