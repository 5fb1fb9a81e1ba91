"""One rollout server: what it can do, the weights it has, and one response of it.

Weights have a **version**, a name that is given to no other weights. A server says with every answer which version drew
it, by the first of these that it has:

- an adapter: its name, under which it was loaded, in the answer's ``model``;
- the header ``X-Weight-Version``, or ``weight_version`` in the answer or its ``metadata``;
- ``GET /weight_info``, asked behind every answer.

Adapters are loaded by ``/v1/load_lora_adapter``, each under the name of its version. Whole models are loaded in place
by ``/collective_rpc`` (``reload_weights`` with ``weights_path``), followed by ``/reset_prefix_cache``, since keys and
values in the cache are those of other weights, and by ``/update_weight_version``.
"""

from __future__ import annotations

import threading
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from prefopt.core.dispatch import ServerFailed, failures
from prefopt.core.endpoint import Endpoint, Flags, Reply, ServerRefusal, Unreachable
from prefopt.errors import ConfigError, RunError
from prefopt.generate.completion import Completion, Wanted, flawed, read_completion
from prefopt.generate.sampler import SamplingParams

FLAGS = Flags("--rollout-server", "--rollout-key", "--rollout-model")
FLAG = FLAGS.url
VERSION_HEADER = "x-weight-version"
ABSENT = ("not found", "method not allowed", "not implemented", "")
"""What servers say of a path that they do not have; of a folder or model they say more."""


@dataclass(slots=True)
class RolloutServer:
    """A server at ``endpoint`` that serves ``model``. ``adapter``: the weights of a run are an adapter on it.

    ``version``: the weights that it was told to load last, empty before any. ``lost``: why it is not asked any more;
    empty where it is. ``seen``: ids of its answers.
    """

    endpoint: Endpoint
    model: str
    adapter: bool
    timeout: float
    version: str = ""
    lost: str = ""
    echoes: bool = False
    """Whether ids of answers contain those of requests."""
    seen: set[str] = field(default_factory=set)
    loads: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def place(self) -> str:
        """Host and port."""
        return self.endpoint.place

    def connect(self, longest: int) -> None:
        """Find out whether the server can be used for sequences of ``longest`` tokens. Raises :class:`ConfigError`
        where it cannot, and :class:`RunError` where it does not answer."""
        listed = self.endpoint.models("--rollout-model")
        about = next((m for m in listed if m["id"] == self.model), None)
        if about is None:
            names = ", ".join(str(m["id"]) for m in listed)
            raise ConfigError(f"--rollout-model {self.model}: {self.endpoint.url} has {names or 'no model'}")
        room = about.get("max_model_len")
        if isinstance(room, int) and room < longest:
            raise ConfigError(
                f"{FLAG} {self.endpoint.url}: it takes {room} tokens, but prompt and response may have {longest};"
                f" start it with --max-model-len {longest}, or lower --max-new-tokens"
            )
        params, wanted, name = SamplingParams(1), Wanted((1,), 0, 1), uuid.uuid4().hex
        try:
            reply = self._ask(wanted, self.model, params, name)
            read_completion(reply.body, wanted, params)
        except ServerFailed as flaw:
            raise ConfigError(f"{FLAG} {self.endpoint.url}: {flaw}") from flaw
        self.echoes = name in str(reply.body.get("id"))
        self.seen.add(str(reply.body.get("id") or ""))
        if not self.adapter and self._version_in(reply) is None:
            self._weight_info()

    def complete(self, wanted: Wanted, params: SamplingParams, version: str) -> Completion:
        """One response. Raises :class:`ServerFailed` for an answer that cannot be used and where another attempt may
        help, and :class:`RunError` where none will."""
        asked = uuid.uuid4().hex
        reply = self._ask(wanted, self.version if self.adapter else self.model, params, asked)
        name = str(reply.body.get("id") or "")
        if (name and name in self.seen) or (self.echoes and asked not in name):
            raise flawed("duplicated", "it gives the answer to another request")
        ids, logps, finished = read_completion(reply.body, wanted, params)
        self.seen.add(name)
        found = str(reply.body.get("model")) if self.adapter else self._version_in(reply) or self._weight_info()
        return Completion(ids, logps, finished, found, self.place, fresh=found == version)

    def load(self, version: str, folder: Path) -> None:
        """Take the weights in ``folder`` from now on. Raises :class:`ConfigError` where the server cannot load any, and
        :class:`RunError` where it fails."""
        (self._load_adapter if self.adapter else self._load_model)(version, folder)
        self.version, self.loads = version, self.loads + 1

    def _load_adapter(self, version: str, folder: Path) -> None:
        before = self.version
        try:
            self.endpoint.ask(
                "load_lora_adapter", {"lora_name": version, "lora_path": str(folder)}, timeout=self.timeout
            )
        except ServerRefusal as error:
            if _is_absent(error):
                raise ConfigError(
                    f"{FLAG} {self.endpoint.url}: it loads no adapters; start vLLM with --enable-lora and"
                    " VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
                ) from error
            if "already" not in error.what:  # a name is given to one adapter alone
                raise RunError(f"{FLAG} {self.endpoint.url}: it cannot load {folder} ({error.what})") from error
        if before and before != version:
            with suppress(ServerRefusal, Unreachable):  # it may have been started again
                self.endpoint.ask("unload_lora_adapter", {"lora_name": before})

    def _load_model(self, version: str, folder: Path) -> None:
        calls: tuple[tuple[str, dict[str, object]], ...] = (
            ("collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}),
            ("reset_prefix_cache", {}),
            ("update_weight_version", {"new_version": version}),
        )
        for path, body in calls:
            try:
                self.endpoint.ask(path, body, root=True, timeout=self.timeout)
            except ServerRefusal as error:
                if not _is_absent(error):
                    raise RunError(f"{FLAG} {self.endpoint.url}: /{path} of {folder} fails ({error.what})") from error
                raise ConfigError(
                    f"{FLAG} {self.endpoint.url}: it has no /{path}, which the weights of a whole model need; start a"
                    " new vLLM with VLLM_SERVER_DEV_MODE=1, or train an adapter (--lora)"
                ) from error

    def _ask(self, wanted: Wanted, model: str, params: SamplingParams, name: str) -> Reply:
        with failures(FLAGS):
            try:
                return self.endpoint.ask("completions", wanted.request(model, params, name), timeout=self.timeout)
            except ServerRefusal as error:
                if error.status == 404 and self.adapter and model != self.model:
                    raise flawed("stale", f"it does not know adapter {model}") from error
                raise

    def _version_in(self, reply: Reply) -> str | None:
        metadata = reply.body.get("metadata")
        inner = metadata.get("weight_version") if isinstance(metadata, dict) else None
        found = reply.headers.get(VERSION_HEADER) or reply.body.get("weight_version") or inner
        return None if found is None else str(found)

    def _weight_info(self) -> str:
        try:
            return str(self.endpoint.ask("weight_info", root=True, timeout=self.timeout).body["weight_version"])
        except Unreachable as error:
            raise ServerFailed(str(error)) from error
        except (ServerRefusal, KeyError) as error:
            raise ConfigError(
                f"{FLAG} {self.endpoint.url}: it does not say which weights it has (/weight_info); start a new vLLM"
                f" with VLLM_SERVER_DEV_MODE=1, or train an adapter (--lora)"
            ) from error


def _is_absent(error: ServerRefusal) -> bool:
    return error.status in (404, 405, 501) and error.what.lower().rstrip(".") in ABSENT
