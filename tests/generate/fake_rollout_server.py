"""A rollout server on a port of this machine that draws from a real model, right to the bit, and fails as it is told.

It has the paths of vLLM that prefopt uses. Faults are fields of :class:`FakeRollouts`: a number counts how often they
come up, True means always.
"""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from methods import small_world as world
from prefopt.generate.sampler import SamplingParams
from prefopt.generate.transformers_sampler import TransformersSampler
from prefopt.model.load import load_model
from prefopt.model.scorer import Scorer

CPU = torch.device("cpu")


MODELS = threading.RLock()
"""One thread at a time computes, or loads weights: while they are read, torch's default dtype is another."""


def loaded(folder: str, adapter: str | None = None, dtype: torch.dtype = torch.float64) -> Scorer:
    with MODELS:
        return Scorer(load_model(folder, dtype=dtype, device=CPU, adapter=adapter).requires_grad_(False))


@dataclass
class FakeRollouts:
    """``folder``: the model. Faults:

    ``stale``: loads are acknowledged and not made, and said so; ``lying``: the same, with the new version;
    ``refuses_loads``: loads fail. ``dropped``: an answer without a response; ``cut``: a response cut short;
    ``broken``: half an answer. ``duplicated``: the last answer again; ``misdirected``: that of another prompt.
    ``wrong``: added to one log-probability; ``top_p`` and ``temperature``: drawn from, whatever was asked for, where
    ``admits`` with the log-probabilities of that distribution. ``errors``: status 500. ``dies_after``: answers before
    the server is gone. ``pause``: seconds before each answer. ``without``: paths that do not exist. ``ids``: whether
    answers have token ids.
    """

    folder: str
    stale: bool = False
    lying: bool = False
    refuses_loads: bool = False
    dropped: int = 0
    cut: int = 0
    broken: int = 0
    duplicated: int = 0
    misdirected: int = 0
    wrong: float = 0.0
    top_p: float = 1.0
    temperature: float | None = None
    admits: bool = True
    errors: int = 0
    dies_after: int | None = None
    pause: float = 0.0
    without: str = "nothing"
    ids: bool = True
    echoes: bool = True
    max_model_len: int | None = None
    dtype: torch.dtype = torch.float64
    version: str = "default"
    answered: int = 0
    in_flight: int = 0
    most_in_flight: int = 0
    loads: list[str] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    scored: list[list[int]] = field(default_factory=list)
    max_logprobs: int = 20
    tokenizer: Any = None
    url: str = ""

    def __post_init__(self) -> None:
        self.lock = threading.Lock()
        self.scorers = {"base": loaded(self.folder, dtype=self.dtype)}
        self.last: dict[str, Any] | None = None

    def fault(self, name: str) -> bool:
        """Whether a fault comes up now."""
        with self.lock:
            left = getattr(self, name)
            if left and left is not True:
                setattr(self, name, left - 1)
            return bool(left)

    # -- paths -----------------------------------------------------------------------------------------------------

    def get(self, path: str) -> tuple[int, Any]:
        if path == "/v1/models":
            about: dict[str, Any] = {"id": "base"}
            if self.max_model_len is not None:
                about["max_model_len"] = self.max_model_len
            adapters = [{"id": name, "parent": "base"} for name in self.scorers if name != "base"]
            return 200, {"data": [about, *adapters]}
        if path == "/weight_info":
            return 200, {"weight_version": self.version}
        return 404, {"detail": "Not Found"}

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/v1/completions":
            return self.complete(body)
        if path == "/v1/load_lora_adapter":
            return self.load(body["lora_name"], lambda: loaded(self.folder, body["lora_path"], self.dtype))
        if path == "/v1/unload_lora_adapter":
            self.scorers.pop(body["lora_name"], None)
            return 200, {}
        if path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            folder = body["kwargs"]["weights_path"]
            self.loads.append(folder)
            if self.refuses_loads:
                return 500, {"error": {"message": "out of memory"}}
            if not (self.stale or self.lying):
                self.scorers["base"] = loaded(folder, dtype=self.dtype)
            return 200, {"results": [None]}
        if path == "/tokenize":
            text, tokenizer = body["prompt"], self.tokenizer or world.tokenizer()
            return 200, {"tokens": tokenizer.encode(text, add_special_tokens=body["add_special_tokens"])}
        if path == "/reset_prefix_cache":
            return 200, {}
        if path == "/update_weight_version":
            self.version = self.version if self.stale else body["new_version"]
            return 200, {"success": True}
        return 404, {"detail": "Not Found"}

    def load(self, name: str, make: Any) -> tuple[int, Any]:
        self.loads.append(name)
        if self.refuses_loads:
            return 400, {"error": {"message": "no such folder"}}
        if not self.stale:
            self.scorers[name] = self.scorers["base"] if self.lying else make()
        return 200, {}

    def score(self, body: dict[str, Any]) -> tuple[int, Any]:
        """The likeliest tokens at every place of the prompt, and the prompt's own; by the class's own forward."""
        ids, many = body["prompt"], body["prompt_logprobs"]
        if many > self.max_logprobs:
            return 400, {"error": {"message": f"Requested prompt logprobs of {many}, the most is {self.max_logprobs}"}}
        with MODELS, torch.no_grad():
            scorer = self.scorers["base"]
            scorer.detach_hook()
            logp = scorer.model(torch.tensor([ids])).logits[0].log_softmax(-1)
            scorer.attach_hook()
        entries: list[dict[str, Any] | None] = [None]
        for t in range(len(ids) - 1):
            known = {*logp[t].topk(min(many, logp.shape[-1])).indices.tolist(), ids[t + 1]}
            entries.append({str(i): {"logprob": float(logp[t, i]), "decoded_token": "?"} for i in known})
        self.scored.append(ids)
        choice = {"index": 0, "text": "", "prompt_logprobs": entries, "prompt_token_ids": ids, "token_ids": [0]}
        return 200, {"id": f"cmpl-{len(self.scored)}", "model": "base", "choices": [choice]}

    def complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        if "prompt_logprobs" in body:
            return (500, {"error": {"message": "internal"}}) if self.fault("errors") else self.score(body)
        if body["model"] not in self.scorers and not (self.stale and len(self.loads)):
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        if self.fault("errors"):
            return 500, {"error": {"message": "internal"}}
        time.sleep(self.pause)
        if self.last is not None and self.fault("duplicated"):
            return 200, self.last
        ids, logps, finish = self.draw(body)
        if self.fault("cut") and len(ids) > 1:
            ids, logps, finish = ids[:-1], logps[:-1], "stop"
        prompt = [*body["prompt"][::-1], 1] if self.fault("misdirected") else body["prompt"]
        choice: dict[str, Any] = {"index": 0, "text": "", "finish_reason": finish}
        choice["logprobs"] = {"token_logprobs": logps}
        if self.ids:
            choice |= {"token_ids": ids, "prompt_token_ids": prompt}
        self.answered += 1
        name = f"cmpl-{body['request_id']}" if self.echoes else f"cmpl-{self.answered}-{id(self)}"
        model = body["model"] if body["model"] in self.scorers else "base"
        answer = {"id": name, "model": model, "choices": [] if self.fault("dropped") else [choice]}
        self.last = answer
        return 200, answer

    def draw(self, body: dict[str, Any]) -> tuple[list[int], list[float], str]:
        params = SamplingParams(
            body["max_tokens"],
            tuple(body["stop_token_ids"]),
            body["min_tokens"],
            self.temperature or body["temperature"],
            self.top_p if self.top_p < 1 else body["top_p"],
            None if body["top_k"] < 0 else body["top_k"],
            body["seed"],
        )
        with MODELS:
            scorer = self.scorers.get(body["model"], self.scorers["base"])
            ((sample,),) = TransformersSampler(scorer, rows=1).sample([body["prompt"]], 1, params)
        logps = (sample.sampling_logps if self.admits else sample.logps).tolist()
        if self.wrong:
            logps[-1] -= self.wrong
        self.requests.append(body)
        return sample.ids.tolist(), logps, "stop" if sample.finished else "length"


@contextmanager
def serving(folder: str, **options: Any) -> Iterator[FakeRollouts]:
    """The server, running."""
    state = FakeRollouts(folder, **options)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            self._answer(*self._known(lambda: state.get(self.path)))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            draws = self.path.endswith("completions")
            if draws and state.dies_after is not None and state.answered >= state.dies_after:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            with state.lock:
                state.in_flight += draws
                state.most_in_flight = max(state.most_in_flight, state.in_flight)
            try:
                status, answer = self._known(lambda: state.post(self.path, body))
            finally:
                with state.lock:
                    state.in_flight -= draws
            self._answer(status, answer, half=draws and status == 200 and state.fault("broken"))

        def _known(self, answer: Any) -> tuple[int, Any]:
            absent = re.search(state.without, self.path)
            found: tuple[int, Any] = (404, {"detail": "Not Found"}) if absent else answer()
            return found

        def _answer(self, status: int, value: Any, half: bool = False) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            with suppress(OSError):  # whoever asked has left
                self.wfile.write(data[: len(data) // 2] if half else data)
            self.close_connection = half

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def servers(folder: str, number: int = 1, **options: Any) -> Iterator[list[FakeRollouts]]:
    """Several of them, running."""
    with ExitStack() as stack:
        yield [stack.enter_context(serving(folder, **options)) for _ in range(number)]
