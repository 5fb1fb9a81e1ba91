"""What methods that draw responses read of rollout servers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from prefopt.core.endpoint import base_url
from prefopt.core.options import Config, beside, option
from prefopt.errors import ConfigError

CONCURRENCY, SECONDS = 32, 600.0
IMPORTANCE_CAP = 2.0


@dataclass(frozen=True, kw_only=True)
class RolloutOptions(Config):
    """Servers that draw the responses of the policy, in the place of this process."""

    rollout_server: list[str] | None = option(
        None,
        "URLs of vLLM servers of this model, such as http://localhost:8000, that sample the responses; they are"
        " sent the weights of every step",
        group="rollout servers",
        default_text="this process samples",
    )
    rollout_model: str | None = option(
        None, "name of the model on the servers", needs="rollout_server", default_text="the servers' only model"
    )
    rollout_key: str | None = option(
        None,
        "environment variable with the servers' key",
        needs="rollout_server",
        default_text="no key is sent",
    )
    rollout_folder: str | None = option(
        None,
        "folder for the weights sent to the servers, which must see it under the same path",
        needs="rollout_server",
        default_text="rollout-weights in the output folder",
    )
    server_concurrency: int | None = beside(
        "rollout_server", CONCURRENCY, "concurrent requests to each server", at_least=1
    )
    server_timeout: float | None = beside(
        "rollout_server",
        SECONDS,
        "seconds until a request for responses, or to load weights, counts as failed",
        above=0,
    )
    server_gap: float | None = option(
        None,
        "largest mean difference, in nats per token, between log-probabilities of server and scorer that counts"
        " as rounding; a server in bfloat16 needs about 0.05",
        needs="rollout_server",
        default_text="0.05 with --dtype bfloat16, 0.0001 with float32",
        above=0,
    )

    def check(self) -> None:
        urls = [base_url(url, "--rollout-server") for url in self.rollout_server or ()]
        if self.rollout_server is not None and not urls:
            raise ConfigError("--rollout-server is empty: name a server, or leave it out")
        if len(set(urls)) < len(urls):
            raise ConfigError("--rollout-server names a server twice: raise --server-concurrency instead")


@dataclass(frozen=True, kw_only=True)
class StaleOptions(RolloutOptions):
    """What becomes of responses that older weights drew, where advantages can be weighted."""

    stale: Literal["refuse", "correct"] = option(
        "refuse",
        "responses that a rollout server drew with older weights: refuse, they are drawn again; correct, they are kept,"
        " and truncated importance weights multiply all advantages",
        group="rollout servers",
    )
    importance_cap: float | None = option(
        help="importance weights are truncated at this",
        computed=lambda c: IMPORTANCE_CAP if c.stale == "correct" else None,
        default_text=f"{IMPORTANCE_CAP:g}, with --stale correct",
        at_least=1,
    )

    def check(self) -> None:
        config: Any = self
        if self.stale == "correct" and self.rollout_server is None:
            raise ConfigError("--stale does nothing without --rollout-server: add it, or leave --stale out")
        if self.stale == "correct" and config.temperature != 1:
            raise ConfigError(
                f"--stale correct needs the log-probabilities of older weights at --temperature {config.temperature:g},"
                " which servers report at 1 alone: leave one of them out"
            )
        if self.importance_cap is not None and self.stale == "refuse":
            raise ConfigError("--importance-cap truncates the weights of --stale correct: leave one of them out")
