"""A teacher behind a URL: at every token of a sequence, the likeliest next tokens with their log-probabilities.

vLLM's ``prompt_logprobs`` of ``/v1/completions``, with token ids in; what comes back is by token id, too. Nothing here
needs torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from prefopt.core.dispatch import ServerFailed, failures
from prefopt.core.endpoint import Endpoint, Flags, ServerRefusal
from prefopt.data.tokenizer import Tokenizer
from prefopt.errors import ConfigError, ModelError

FLAGS = Flags("--teacher", "--teacher-key", "--teacher-model")
FLAG = FLAGS.url
TIMEOUT = 600.0
MOST_MASS = 1 + 1e-3
"""What probabilities may add up to, with the rounding of their logarithms."""
PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "  def f(x):\n\treturn x**2 + 3.14159  # π\n\n",
    "Grüße aus Zürich; 東京は晴れ。 Привет! 1234567890 \N{ROCKET}",
    '{"a": [1, null], "b": "\\n"}\r\n<|user|></s>',
)
PROBED = 64
"""Tokens of the vocabulary, evenly spread, whose texts are tokenised by both."""


@dataclass(frozen=True, slots=True, eq=False)
class TopLogprobs:
    """Of L - 1 tokens of a sequence of L, all but the first: the K likeliest ``ids`` [L - 1, K] (int32) before it, most
    likely first, with their log-probabilities ``logps`` (float32), and ``own`` [L - 1], that of the token itself."""

    ids: npt.NDArray[np.int32]
    logps: npt.NDArray[np.float32]
    own: npt.NDArray[np.float32]


@dataclass(slots=True)
class TeacherServer:
    """A server at ``endpoint`` that serves ``model``; ``top_k`` tokens are asked for. ``lost``: why it is not asked any
    more; empty where it is."""

    endpoint: Endpoint
    model: str
    top_k: int
    vocabulary: int
    timeout: float = TIMEOUT
    lost: str = field(default="")

    @property
    def place(self) -> str:
        """Host and port."""
        return self.endpoint.place

    def top_logprobs(self, sequence: Sequence[int]) -> TopLogprobs:
        """Of a sequence of token ids, at least two. Raises :class:`ServerFailed` where another attempt may help, and
        :class:`RunError` where none will."""
        body = {
            "model": self.model,
            "prompt": [*map(int, sequence)],
            "max_tokens": 1,  # vLLM draws at least one
            "temperature": 0.0,
            "prompt_logprobs": self.top_k,
            "return_token_ids": True,
            "add_special_tokens": False,
            "stream": False,
        }
        with failures(FLAGS, _remedy):
            answer = self.endpoint.ask("completions", body, timeout=self.timeout).body
        return self._read(answer, body["prompt"])

    def _read(self, answer: Any, sequence: Any) -> TopLogprobs:
        choices = answer.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
        found = choice.get("prompt_logprobs")
        if not isinstance(found, list):
            raise ServerFailed("its answer has no prompt_logprobs by token id, as vLLM's have")
        if choice.get("prompt_token_ids") != sequence or len(found) != len(sequence):
            raise ServerFailed("the answer to another sequence")
        many = min(self.top_k, self.vocabulary)
        ids, logps, own = [], [], []
        for token, entry in zip(sequence[1:], found[1:], strict=True):
            try:
                known = {int(i): float(value["logprob"]) for i, value in entry.items()}
            except (AttributeError, KeyError, TypeError, ValueError):
                raise ServerFailed("log-probabilities that are not by token id") from None
            best = sorted(known, key=lambda i: (-known[i], i))[:many]
            if token not in known or len(best) < many:
                raise ServerFailed(f"{len(known)} log-probabilities of a token where {many} were asked for")
            if not all(math.isfinite(x) and x <= 1e-3 for x in known.values()):
                raise ServerFailed("values that are not log-probabilities")
            if max(known) >= self.vocabulary:
                raise ModelError(
                    f"{FLAG} {self.endpoint.url}: it gives token {max(known)}, but the model's vocabulary has"
                    f" {self.vocabulary}; take a teacher with the same tokenizer"
                )
            ids.append(best)
            logps.append([known[i] for i in best])
            own.append(known[token])
        if logps and max(math.fsum(map(math.exp, row)) for row in logps) > MOST_MASS:
            raise ServerFailed("probabilities that add up to more than 1")
        return TopLogprobs(np.array(ids, np.int32), np.array(logps, np.float32), np.array(own, np.float32))

    def check_tokenizer(self, tokenizer: Tokenizer, *, confirmed: bool) -> str:
        """Compare the server's tokenizer with the model's by the token ids of a few texts, among them those of
        :data:`PROBED` tokens spread over the vocabulary. Returns a line that says so. ``confirmed``: by
        ``--same-tokenizer``, where the server cannot be asked. Raises :class:`ModelError` where they differ."""
        spread = np.linspace(0, len(tokenizer) - 1, PROBED).astype(int).tolist()
        texts = [*PROBES, " ".join(tokenizer.decode([i]) for i in spread)]
        for text in texts:
            own = tokenizer.encode(text, add_special_tokens=False)
            try:
                request = {"model": self.model, "prompt": text, "add_special_tokens": False}
                theirs = self.endpoint.ask("tokenize", request, root=True, timeout=self.timeout).body["tokens"]
            except (ServerRefusal, KeyError) as error:
                if confirmed:
                    return "its tokenizer was not compared (--same-tokenizer)"
                raise ConfigError(
                    f"{FLAG} {self.endpoint.url}: it does not tokenise (/tokenize), so its tokenizer cannot be"
                    " compared with the model's; give --same-tokenizer if you know that they are the same"
                ) from error
            if theirs != own:
                raise ModelError(
                    f"{FLAG} {self.endpoint.url}: its tokenizer is not the model's: {text[:40]!r} has {len(theirs)}"
                    f" tokens there and {len(own)} here, or others; give a teacher with the same tokenizer"
                )
        return f"its tokenizer gives the same tokens for {len(texts)} texts"


def _remedy(what: str) -> str:
    if "logprobs" in what:
        return "; start vLLM with a larger --max-logprobs, or lower --teacher-top-k"
    return "; lower --max-length" if "context" in what or "length" in what else ""
