"""The sampler of a policy in training: in this process, or on rollout servers that get its weights."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from prefopt.core.endpoint import Endpoint
from prefopt.core.files import output_errors, remove_folder
from prefopt.data.tokenizer import Tokenizer
from prefopt.generate.rollout_checks import RolloutChecks, largest_bias
from prefopt.generate.rollout_server import FLAG, RolloutServer
from prefopt.generate.rollout_servers import RolloutServers, Stale
from prefopt.generate.sampler import Sample
from prefopt.generate.transformers_sampler import TransformersSampler
from prefopt.model.architectures import causal_model, context_length
from prefopt.train.policy import Policy
from prefopt.train.run import Run

WEIGHTS = "rollout-weights"


class LocalSampler(TransformersSampler):
    """In this process, where weights need not be handed over."""

    remote = False

    def refresh(self, step: int) -> None:
        """Nothing: the model that draws is the one that trains."""

    def metrics(self) -> dict[str, float]:
        """None."""
        return {}

    def close(self) -> None:
        """Nothing."""


class ServedSampler:
    """On the rollout servers of a run's options; a :class:`prefopt.generate.sampler.ResponseSampler`.

    Responses that were drawn are not drawn again by the same seed: a server's kernels may round otherwise. Who draws
    with it keeps them in its checkpoints.
    """

    remote = True

    def __init__(self, run: Run, policy: Policy, tokenizer: Tokenizer, *, longest: int, stale: Stale) -> None:
        self.run, self.policy, self.tokenizer, self.longest = run, policy, tokenizer, longest
        self._stale, self._token = stale, run.world.from_first(uuid.uuid4().hex[:12])
        self._servers: RolloutServers | None = None
        base = Path(run.config.rollout_folder) if run.config.rollout_folder else run.folder.path / WEIGHTS
        self._base, self._held = base.expanduser().absolute(), 0
        if not run.config.resume:
            self._connect()

    def _connect(self) -> RolloutServers:
        """The servers, once. Raises :class:`prefopt.errors.ConfigError` for one that cannot be used, and
        :class:`prefopt.errors.RunError` for one that does not answer."""
        if self._servers is None:
            config, policy = self.run.config, self.policy
            model: Any = policy.scorer.model
            adapter = causal_model(model) is not model
            servers = []

            def connect() -> None:
                for url in config.rollout_server:
                    endpoint = Endpoint(url, key_variable=config.rollout_key, flag=FLAG, key_flag="--rollout-key")
                    name = config.rollout_model or endpoint.only_model("--rollout-model")
                    server = RolloutServer(endpoint, name, adapter, config.server_timeout)
                    server.connect(self.longest)
                    servers.append(server)

            self.run.world.together(connect)
            self._servers = RolloutServers(
                servers,
                RolloutChecks(policy.apart, tolerance=config.server_gap),
                concurrency=config.server_concurrency,
                context=min(self.longest, context_length(causal_model(model).config) or self.longest),
                stale=self._stale,
            )
            what = "an adapter" if adapter else "the whole model"
            self.run.say(
                f"sampling: {len(servers)} rollout server{'s' * (len(servers) > 1)}, sent {what} every step through"
                f" {self._base}"
            )
        return self._servers

    def refresh(self, step: int) -> None:
        """Hand the present weights to the servers, under the name of ``step``. All ranks call this.

        Raises :class:`prefopt.core.dispatch.ServersLost` where none is left.
        """
        servers, world = self._connect(), self.run.world
        version = f"prefopt-{self._token}-{step}-{self._held}"  # a step may be drawn again with other weights
        folder = self._base / version
        if world.first and not self._held:
            self._remove()  # what an earlier start of this run left
            with output_errors(self._base):
                self._base.mkdir(parents=True, exist_ok=True)
            self.run.folder.remember(rollout_weights=self._token)
        self.policy.save(folder, self.tokenizer, writes=world.first)
        states = world.on_first(lambda: servers.hand_over(version, folder))
        if not world.first:
            servers.adopt(version, folder, states)
        self._held += 1
        if world.first:
            self._remove(but=folder)

    def _remove(self, but: Path | None = None) -> None:
        """Remove weights of this run, of all its starts."""
        with output_errors(self._base):
            for token in {self._token, self.run.folder.record.get("rollout_weights", self._token)}:
                for old in self._base.glob(f"prefopt-{token}-*"):
                    if old != but:
                        remove_folder(old)

    def sample(self, *args: Any, **kwargs: Any) -> list[list[Sample]]:
        """See :class:`RolloutServers`."""
        return self._connect().sample(*args, **kwargs)

    def metrics(self) -> dict[str, float]:
        """What happened at the servers since the last call, of all ranks: all of them call this."""
        servers = self._servers
        if servers is None:  # a resumed step, of which the checkpoint has the responses
            return {}
        mine, world = servers.metrics(), self.run.world
        totals = world.totals(mine)
        record = {name: totals[name] for name in mine}
        record["rollouts/servers_lost"] /= world.size
        return record | {"rollouts/bias": largest_bias(world.gather(servers.checks.places))}

    def close(self) -> None:
        """Remove the weights that were handed over. The last ones stay loaded in the servers."""
        if self.run.world.first:
            self._remove()
            if self.run.config.rollout_folder is None:
                with output_errors(self._base):
                    remove_folder(self._base)


PolicySampler = LocalSampler | ServedSampler


def policy_sampler(
    run: Run, policy: Policy, tokenizer: Tokenizer, *, longest: int, stale: Stale = "refuse"
) -> PolicySampler:
    """The sampler of the run's ``policy``, which is trainable already: on the servers of ``--rollout-server``, or in
    this process.

    ``longest``: tokens of prompt and response at most. Call ``refresh`` on all ranks before samples are drawn with new
    weights, ``metrics`` after, and ``close`` at the end; ``sample`` within ``policy.apart.gathered()``. What a
    ``remote`` sampler drew belongs into the checkpoint.

    Raises :class:`prefopt.errors.ConfigError` for a server that cannot be used, and :class:`prefopt.errors.RunError`
    for one that does not answer.
    """
    if run.config.rollout_server is not None:
        return ServedSampler(run, policy, tokenizer, longest=longest, stale=stale)
    scorer, record = policy.apart, run.folder.record
    with scorer.gathered():
        sampler = LocalSampler(scorer)
        # Logits depend on the number of rows by rounding: a resumed run draws as many at a time.
        rows = known if isinstance(known := record.get("rows"), int) else None  # its name in earlier versions
        sampler.rows = record.get("sampled_at_once") or rows or sampler.estimate_rows(longest)
    run.folder.remember(sampled_at_once=sampler.rows)
    return sampler
