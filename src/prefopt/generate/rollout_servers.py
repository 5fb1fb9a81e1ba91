"""A sampler on rollout servers: the weights of a policy are handed to them, and they draw its responses.

Requests are one response each, with a seed of the prompt and the response's number, so that what a server draws depends
neither on the other requests nor on the server. As one ends the next is sent, whichever prompt it belongs to
(:mod:`prefopt.core.dispatch`), so that a fast server does more.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from prefopt.core.dispatch import PAUSE, Dispatch, ServerFailed, refuse_none_left
from prefopt.errors import ConfigError, RunError, first_line
from prefopt.generate.completion import Completion, Wanted, flawed
from prefopt.generate.rollout_checks import RolloutChecks
from prefopt.generate.rollout_server import FLAG, RolloutServer
from prefopt.generate.sampler import Ids, ProgressCallback, Sample, SamplingParams, key_of, occurrences

Stale = Literal["refuse", "correct"]
COUNTED = ("responses", "retries", "stale", "incomplete", "misdirected", "duplicated", "not_loaded")
MOST_SEEN = 200_000
"""Ids of answers that are remembered of a server."""


class RolloutServers:
    """A :class:`prefopt.generate.sampler.ResponseSampler` on ``servers``, after :meth:`hand_over`.

    ``checks`` compares what they say with the policy's scorer. ``concurrency``: requests in flight at each server.
    ``context``: tokens of prompt and response at most. ``stale``: responses of other weights than those handed over are
    asked for again (``refuse``), or kept for importance weights (``correct``).
    """

    def __init__(
        self,
        servers: Sequence[RolloutServer],
        checks: RolloutChecks,
        *,
        concurrency: int,
        context: int,
        stale: Stale = "refuse",
        pause: float = PAUSE,
    ) -> None:
        self.servers, self.checks, self.concurrency, self.stale = [*servers], checks, concurrency, stale
        self.context, self.pause = context, pause
        self.version, self._folder = "", Path()
        self._counts: Counter[str] = Counter()
        self._counting = threading.Lock()

    def hand_over(self, version: str, folder: Path) -> list[tuple[str, str]]:
        """Have every server load the weights in ``folder``; also those that were lost. Returns of each its version and
        why it is lost. Raises :class:`prefopt.core.dispatch.ServersLost` where none is left, and
        :class:`ConfigError` for one that cannot load weights."""
        self.version, self._folder = version, folder
        unfit: list[ConfigError] = []

        def hand(server: RolloutServer) -> None:
            try:
                server.load(version, folder)
                server.lost = ""
            except ConfigError as error:
                unfit.append(error)
            except RunError as error:
                self.count("not_loaded")
                if self.stale == "refuse" or not server.version:
                    server.lost = first_line(error)

        threads = [threading.Thread(target=hand, args=(server,), daemon=True) for server in self.servers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if unfit:
            raise unfit[0]
        refuse_none_left(self.servers, FLAG)
        return [(server.version, server.lost) for server in self.servers]

    def adopt(self, version: str, folder: Path, states: Sequence[tuple[str, str]]) -> None:
        """Know what another process has handed over: ``states`` are what :meth:`hand_over` gave there."""
        self.version, self._folder = version, folder
        for server, (loaded, lost) in zip(self.servers, states, strict=True):
            server.version, server.lost = loaded, lost

    def metrics(self) -> dict[str, float]:
        """What happened since the last call: see docs/guide/rollouts.md."""
        with self._counting:
            counts, self._counts = self._counts, Counter()
        found = {f"rollouts/{name}": float(counts[name]) for name in COUNTED}
        return found | {"rollouts/servers_lost": float(sum(bool(server.lost) for server in self.servers))}

    def count(self, what: str) -> None:
        """Count an event for :meth:`metrics`; from any thread."""
        with self._counting:
            self._counts[what] += 1

    def sample(
        self,
        prompts: Sequence[Ids],
        num: int,
        params: SamplingParams,
        *,
        streams: Sequence[int] | None = None,
        progress: ProgressCallback | None = None,
    ) -> list[list[Sample]]:
        """See the protocol. Raises :class:`prefopt.core.dispatch.ServersLost` where no server is left, and
        :class:`RunError` where what they drew is not of the weights, or of the distribution, that was asked for."""
        assert self.version, "hand_over comes first"
        streams = occurrences(prompts) if streams is None else streams
        wanted = [
            self._wanted(prompt, stream, k, params)
            for prompt, stream in zip(prompts, streams, strict=True)
            for k in range(num)
        ]

        def told(completion: Completion | None) -> None:
            if completion is not None:
                self.count("responses")
            if progress is not None:
                progress(*((0, 0) if completion is None else (1, len(completion.ids))))

        for server in self.servers:
            if len(server.seen) > MOST_SEEN:
                server.seen.clear()
        requests = Dispatch(
            self.servers,
            len(wanted),
            lambda server, n: self._draw(server, wanted[n], params),
            flag=FLAG,
            concurrency=self.concurrency,
            pause=self.pause,
            count=self.count,
        )
        samples = self.checks(wanted, requests.run(told), params)
        return [samples[n * num : (n + 1) * num] for n in range(len(prompts))]

    def _wanted(self, prompt: Ids, stream: int, number: int, params: SamplingParams) -> Wanted:
        room = self.context - len(prompt)
        if not len(prompt) or room < 1:
            raise RunError(f"a prompt of {len(prompt)} tokens cannot be answered in a context of {self.context}")
        seed = key_of(params.seed, prompt, stream, number) & (2**63 - 1)
        return Wanted(tuple(map(int, prompt)), seed, min(room, params.max_new_tokens))

    def _draw(self, server: RolloutServer, wanted: Wanted, params: SamplingParams) -> Completion:
        loads = server.loads
        try:
            found = server.complete(wanted, params, self.version)
        except ServerFailed as error:
            if error.kind == "stale":
                self._load_again(server, loads)
            raise
        if found.fresh:
            if not server.adapter:  # an adapter keeps its name; those of a whole model may change within a response
                with server.lock:
                    if server.loads != loads:
                        raise flawed("stale", "weights were loaded while it answered")
            return found
        if self.stale == "correct":
            self.count("stale")
            return found
        self._load_again(server, loads)
        raise flawed("stale", f"it answers with weights {found.version}, and not with {self.version}")

    def _load_again(self, server: RolloutServer, loads: int) -> None:
        """Hand the weights to a server that has others, unless another thread has since it had loaded so often."""
        with server.lock:
            if server.loads != loads:
                return
            try:
                server.load(self.version, self._folder)
            except RunError as error:
                raise flawed("stale", first_line(error)) from error
