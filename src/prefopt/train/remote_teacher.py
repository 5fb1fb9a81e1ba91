"""A teacher behind a URL: its likeliest tokens as columns of batches, asked for once and cached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prefopt.config.distil import DistilConfig
from prefopt.core.cache_folder import Damaged
from prefopt.core.endpoint import Endpoint
from prefopt.core.files import output_errors, replace_file
from prefopt.core.phases import phase
from prefopt.data.group import Group
from prefopt.data.table import Array, GroupTable, IndexArray, KeyArray
from prefopt.data.tokenizer import Tokenizer
from prefopt.errors import RunError
from prefopt.model.architectures import causal_model, vocabulary_size
from prefopt.model.scorer import Scorer
from prefopt.parallel.arrays import arrays_from_first
from prefopt.reference.blocks import find_sorted, read_sealed, sealed
from prefopt.reference.in_memory import TrDpoUpdate
from prefopt.reference.teacher_cache import TeacherCache
from prefopt.reference.teacher_server import FLAG, TeacherServer
from prefopt.train.batch import Column
from prefopt.train.policy import Trained
from prefopt.train.run import Run

PROBE = "teacher.probe"
"""A file of the output folder: what the teacher said of a few sequences."""
COLUMNS = {"ids": "teacher_id_M", "logps": "teacher_logp_M", "own": "teacher_own_M"}


@dataclass(frozen=True, slots=True, eq=False)
class _Known:
    """Values of responses by their ``keys`` (sorted), n's in rows ``starts[n]`` on, of ``counts[n]`` tokens."""

    keys: KeyArray
    starts: IndexArray
    counts: IndexArray
    arrays: Mapping[str, Array]

    @classmethod
    def of(cls, groups: GroupTable, arrays: Mapping[str, Array]) -> _Known:
        counts = groups.trained_N.astype(np.int64)
        keys, first = np.unique(groups.key_N, return_index=True)
        starts = np.cumsum(counts) - counts
        return cls(keys, starts[first], counts[first], arrays)


class RemoteTeacher:
    """The teacher that ``config.teacher`` gives the URL of. ``words`` say which it is."""

    def __init__(self, run: Run, tokenizer: Tokenizer, scorer: Scorer) -> None:
        """Raises :class:`prefopt.errors.ModelError` for one with another tokenizer, :class:`ConfigError` for one that
        cannot be used, and :class:`prefopt.errors.RunError` for one that does not answer."""
        config: DistilConfig = run.config
        self.run = run
        self._known: list[_Known] = []
        assert config.teacher_top_k is not None and config.teacher_concurrency is not None
        self._concurrency, self.top_k = config.teacher_concurrency, config.teacher_top_k
        self.vocabulary = vocabulary_size(causal_model(scorer.model))

        def connect() -> tuple[str, str]:
            endpoint = Endpoint(config.teacher, key_variable=config.teacher_key, flag=FLAG, key_flag="--teacher-key")
            model = config.teacher_model or endpoint.only_model("--teacher-model")
            self.server = TeacherServer(endpoint, model, self.top_k, self.vocabulary)
            compared = self.server.check_tokenizer(tokenizer, confirmed=config.same_tokenizer)
            return f"{model} at {endpoint.place}", compared

        self.words, compared = run.world.on_first(connect)
        run.say(f"teacher: {self.words}, the likeliest {self.top_k} tokens and the rest; {compared}")
        self._cache: TeacherCache | None = None

    def recognise(self, groups: GroupTable) -> None:
        """Find what is cached of the server's present weights; ``groups`` are what it will be asked about first. Their
        answers to a probe are kept in the output folder, which is taken: a resumed run must be given them again, from
        whatever address. Raises :class:`prefopt.errors.RunError` where it is not."""

        def found() -> None:
            self._cache = TeacherCache(self.server, groups, concurrency=self._concurrency)
            path = self.run.folder.path / PROBE
            try:
                with output_errors(path):
                    if not path.exists():
                        replace_file(path, sealed(self._cache.probe, PROBE))
                    same = self._cache.same_weights(read_sealed(path, PROBE))
            except Damaged as damage:
                raise RunError(
                    f"--resume: {path} is damaged ({damage}); restore it, or remove it where the teacher is surely the"
                    " same"
                ) from None
            if not same:
                raise RunError(
                    f"--resume: the teacher at {self.server.place} has other weights than the one that"
                    f" {self.run.folder.path} was started with; restore it, or start a new run elsewhere"
                )

        self.run.world.on_first(found)

    @phase("teacher")
    def ask(self, groups: GroupTable) -> None:
        """Ask about the data, or read the cache, and say so. All ranks call this, after :meth:`recognise`."""
        self._known = [self._learned(groups, said=True)]

    def ask_again(self, groups: Sequence[Group]) -> None:
        """Ask about the responses of a step. All ranks call this."""
        self._known = [self._known[0], self._learned(GroupTable.of(groups), said=False)]

    def _learned(self, groups: GroupTable, *, said: bool) -> _Known:
        def values() -> dict[str, Array]:
            assert self._cache is not None
            if not said:
                self._cache.fill(groups, stop=self.run.stop.check)
                return self._cache.values(groups)
            if missing := self._cache.missing(groups):
                with self.run.reporter.bar("teacher", missing, "responses") as bar:
                    self._cache.fill(groups, lambda done: bar.update(done), self.run.stop.check)
            every = len(np.unique(groups.key_N))
            self.run.say(f"teacher: asked about {missing} responses, {every - missing} from the cache")
            return self._cache.values(groups)

        return _Known.of(groups, arrays_from_first(self.run.world, values))

    def columns(self, groups: Sequence[Group]) -> dict[str, Column]:
        """Columns of ``groups``, which the teacher was asked about."""
        table = GroupTable.of(groups)
        parts: dict[str, list[Array]] = {name: [] for name in COLUMNS}
        for key in table.key_N:
            known, n = self._place(key)
            rows = slice(int(known.starts[n]), int(known.starts[n] + known.counts[n]))
            for name, column in parts.items():
                column.append(known.arrays[name][rows])
        return {COLUMNS[name]: np.concatenate(column) for name, column in parts.items()}

    def _place(self, key: Any) -> tuple[_Known, int]:
        for known in self._known:
            at, found = find_sorted(np.array([key]), known.keys)
            if found[0]:
                return known, int(at[0])
        raise AssertionError("the teacher was asked about every response of a batch")

    def placeholder(self, groups: Sequence[Group]) -> dict[str, Column]:
        """Columns of the same shapes, for trials of memory and dry runs: any tokens, equally likely."""
        tokens = int(GroupTable.of(groups).trained_N.sum())
        many = min(self.top_k, self.vocabulary)
        even = np.full((tokens, many), -np.log(self.vocabulary), np.float32)
        ids = np.tile(np.arange(many, dtype=np.int32), (tokens, 1))
        return {"teacher_id_M": ids, "teacher_logp_M": even, "teacher_own_M": even[:, 0].copy()}


class RemoteTeacherPlan:
    """A :class:`prefopt.train.offline.Plan`: nothing is in memory, and all is asked for ahead."""

    movement: TrDpoUpdate | None = None

    def say_missing(self) -> None:
        """Nothing: a dry run does not ask."""

    def seconds_ahead(self, scorer: Scorer, speed: float) -> float | None:
        """None: how fast a server answers is not known."""
        return None

    def in_memory(self, policy: Trained[Any]) -> None:
        """Nothing."""
        return
