"""The reference cache: nothing twice, nothing stale, nothing lost, the same bits whatever happens."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.fake_reference import BUDGET, SPACE, Fake, Once, committed, fill, keys_of, make_groups, sums
from prefopt.core.cache_folder import Damaged, cache_root, clear
from prefopt.data.group import Group
from prefopt.data.table import KEY
from prefopt.errors import CacheError, Interrupted, ModelError
from prefopt.reference import cache as reference
from prefopt.reference.blocks import (
    NamedGroups,
    ScoringPlan,
    block_files,
    list_spaces,
    read_sealed,
    verify,
    write_sealed,
)
from prefopt.reference.cache import ReferenceCache, ResponseScore


def test_nothing_is_scored_twice(tmp_path: Path) -> None:
    groups = make_groups(300)
    first = fill(tmp_path, groups)
    assert first.responses == 600 and all(sum(g.tokens for g in b) <= BUDGET or len(b) == 1 for b in first.batches)

    shuffled = random.Random(1).sample(groups, len(groups))
    swapped = [Group(g.prefix, g.continuations[::-1], g.row) for g in groups]
    report = ReferenceCache(SPACE, tmp_path).fill(shuffled + swapped, pytest.fail, token_budget=7)
    assert (report.scored_responses, report.reused_responses, report.forward_calls) == (0, 600, 0)

    more = [*groups[:150], *make_groups(3, seed=1), *groups[150:]]
    assert ReferenceCache(SPACE, tmp_path).missing(more) == 6
    again = fill(tmp_path, more)
    assert again.responses == 6 and again.loads == 1

    values = ReferenceCache(SPACE, tmp_path).values(shuffled)
    exact = Fake().score(shuffled)
    for g, scored in enumerate(exact):
        of_group = slice(values.starts[g], values.starts[g + 1])
        np.testing.assert_allclose(values.sums_N[of_group], [s.sum for s in scored], rtol=1e-6)
        assert values.counts_N[of_group].tolist() == [s.count for s in scored]


def test_order_of_the_data_does_not_reach_the_values(tmp_path: Path) -> None:
    groups = make_groups(60)
    fill(tmp_path / "one", groups)
    fill(tmp_path / "other", random.Random(3).sample(groups, len(groups)))
    assert sums(tmp_path / "one", groups) == sums(tmp_path / "other", groups)


def test_another_space_shares_nothing(tmp_path: Path) -> None:
    groups = make_groups(3)
    fill(tmp_path, groups)
    renamed = replace(SPACE, identity=replace(SPACE.identity, name="the same elsewhere"))
    assert ReferenceCache(renamed, tmp_path).missing(groups) == 0
    others = [
        *(replace(SPACE, identity=replace(SPACE.identity, **{f: "x"})) for f in ("weights", "config", "adapter")),
        replace(SPACE, identity=replace(SPACE.identity, quantization="x")),
        *(replace(SPACE, **{f: "x"}) for f in ("dtype", "path", "kernel", "device")),
        replace(SPACE, scorer_version=2),
    ]
    assert len({space.id for space in others} | {SPACE.id}) == 10
    assert all(ReferenceCache(space, tmp_path).missing(groups) == 6 for space in others)


def test_values_that_are_not_there_are_an_error(tmp_path: Path) -> None:
    groups = make_groups(4)
    fill(tmp_path, groups[:3])
    with pytest.raises(CacheError, match="2 of 8 values are missing"):
        sums(tmp_path, groups)


def test_token_values_are_added_and_sums_stay(tmp_path: Path) -> None:
    groups = make_groups(50)
    fill(tmp_path, groups[:30])
    before = sums(tmp_path, groups[:30])
    cache = ReferenceCache(SPACE, tmp_path)
    assert cache.missing(groups, token_values=True) == 100 and cache.missing(groups) == 40
    fake = fill(tmp_path, groups, token_values=True, token_budget=3 * BUDGET)
    assert fake.responses == 100
    assert sums(tmp_path, groups[:30]) == before
    values = ReferenceCache(SPACE, tmp_path).values(groups, token_values=True)
    assert values.token_values_M is not None
    for n, total in enumerate(values.sums_N):
        tokens = values.token_values_M[values.token_starts[n] : values.token_starts[n + 1]]
        assert len(tokens) == values.counts_N[n]
        assert float(tokens.sum(dtype=np.float64)) == pytest.approx(total, rel=1e-6)
    assert fill(tmp_path, groups, token_values=True).loads == fill(tmp_path, groups).loads == 0


def test_an_interruption_keeps_every_finished_batch_and_the_end_is_the_same(tmp_path: Path) -> None:
    groups = make_groups(60)
    fill(tmp_path / "whole", groups)
    calls = 0

    def stop() -> None:
        nonlocal calls
        calls += 1
        if calls > 5:
            raise Interrupted("stopped", signal.SIGINT)

    seen: list[tuple[int, int]] = []
    broken = Fake()
    with pytest.raises(Interrupted):
        fill(tmp_path, groups, broken, stop=stop, progress=lambda done, total, _: seen.append((done, total)))
    assert len(broken.batches) == 5 and committed(tmp_path) == set(keys_of([g for b in broken.batches for g in b]))
    assert seen[-1] == (broken.responses, 120)
    # a budget estimated a little lower must not change the plan
    rest = fill(tmp_path, random.Random(0).sample(groups, len(groups)), token_budget=BUDGET - 20)
    assert rest.responses == 120 - broken.responses
    assert sums(tmp_path, groups) == sums(tmp_path / "whole", groups)
    assert not list(ReferenceCache(SPACE, tmp_path).folder.glob("plan-*"))


def test_after_running_out_of_memory_half_the_budget_plans_anew(tmp_path: Path) -> None:
    groups = make_groups(60)

    def out_of_memory() -> None:
        if len(fake.batches) == 3:
            raise MemoryError

    fake = Fake(before=out_of_memory)
    with pytest.raises(MemoryError):
        fill(tmp_path, groups, fake)
    rest = fill(tmp_path, groups, token_budget=BUDGET // 2)
    assert all(sum(g.tokens for g in b) <= BUDGET // 2 or len(b) == 1 for b in rest.batches)
    assert rest.responses == 120 - fake.responses


def test_a_number_that_is_not_finite_is_refused_and_not_kept(tmp_path: Path) -> None:
    groups = make_groups(3)

    def score(batch: list[Group]) -> list[list[ResponseScore]]:
        results = Fake().score(batch)
        return [
            [replace(s, sum=float("nan")) if g.row == 2 else s for s in r] for g, r in zip(batch, results, strict=True)
        ]

    with pytest.raises(ModelError, match="nan for response 1 of row 2"):
        ReferenceCache(SPACE, tmp_path).fill(groups, lambda: score, token_budget=1)
    assert not committed(tmp_path) & set(keys_of(groups[1:2]))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_block_costs_only_its_responses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    monkeypatch.setattr(reference, "COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(reference, "COMMIT_SHARE", 0.0)
    groups = make_groups(40)
    fill(tmp_path, groups)
    block = block_files(ReferenceCache(SPACE, tmp_path).folder)[3]
    lost = {row.tobytes() for row in read_sealed(block, SPACE.id)["keys"]}
    data = bytearray(block.read_bytes())
    data[-3] ^= 4
    block.write_bytes({"truncated": bytes(data[:-1]), "flipped": bytes(data), "empty": b""}[damage])

    assert [file for file, _ in verify(tmp_path)] == [block]
    again = fill(tmp_path, groups)
    assert {key for batch in again.batches for key in keys_of(batch)} == lost
    assert [r.message for r in caplog.records if "is damaged" in r.message and "\n" not in r.message]
    assert block.with_name(block.name + ".damaged").exists() and not verify(tmp_path)
    assert fill(tmp_path, groups).loads == 0


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "block-000001-00.safetensors"
    write_sealed(path, {"keys": np.arange(32, dtype=np.uint8).reshape(2, 16), "sums": np.array([-1.5, -2.0])}, "space")
    good = path.read_bytes()
    read_sealed(path, "space")
    with pytest.raises(Damaged):
        read_sealed(path, "another space")
    for position in range(len(good)):
        for bit in range(8):
            bad = bytearray(good)
            bad[position] ^= 1 << bit
            with pytest.raises(Damaged):
                read_sealed(cast(Path, SimpleNamespace(read_bytes=lambda bad=bad: bytes(bad))), "space")


names = st.integers(0, 12).map(lambda n: bytes([n]) * 16)
Keys = tuple[bytes, ...]


def named(groups: Iterable[Keys]) -> NamedGroups:
    groups = list(groups)
    keys = np.frombuffer(b"".join(key for group in groups for key in group), KEY)
    return NamedGroups.of(keys, np.cumsum([0, *map(len, groups)]))


def key_array(keys: Iterable[bytes]) -> Any:
    return np.frombuffer(b"".join(sorted(keys)), KEY)


def batches_of(plan: ScoringPlan) -> list[list[Keys]]:
    data, starts = plan.groups.keys_N.tobytes(), plan.groups.starts.tolist()
    groups = [tuple(data[n * 16 : n * 16 + 16] for n in range(a, b)) for a, b in pairwise(starts)]
    bounds = plan.batch_starts.tolist()
    return [groups[a:b] for a, b in pairwise(bounds)]


def greedy(costs: dict[Keys, int], wanted: set[bytes], budget: int) -> list[list[Keys]]:
    """The plan group by group, with sets."""
    order = named(costs).names_G
    batches: list[list[Keys]] = []
    left, room = set(wanted), 0
    for i in sorted(range(len(costs)), key=lambda i: (-list(costs.values())[i], order[i])):
        keys = list(costs)[i]
        if left.isdisjoint(keys):
            continue
        left.difference_update(keys)
        if not batches or costs[keys] > room:
            batches.append([])
            room = budget
        batches[-1].append(keys)
        room -= costs[keys]
    return batches


@settings(max_examples=200, deadline=None)
@given(
    costs=st.dictionaries(st.lists(names, min_size=1, max_size=4).map(tuple), st.integers(1, 60), min_size=1),
    unknown=st.sets(names),
    done=st.sets(names),
    budget=st.integers(1, 100),
)
def test_a_plan_brings_each_wanted_response_once_and_keeps_the_budget(
    costs: dict[Keys, int], unknown: set[bytes], done: set[bytes], budget: int
) -> None:
    wanted = unknown & {key for keys in costs for key in keys}
    plan = ScoringPlan.make(named(costs), np.array(list(costs.values())), key_array(wanted), budget)
    batches = batches_of(plan)
    assert batches == greedy(costs, wanted, budget)
    assert all(sum(costs[keys] for keys in batch) <= budget or len(batch) == 1 for batch in batches)
    every = [key for batch in batches for keys in batch for key in keys]
    for still in (wanted, wanted - done):
        work = list(plan.work(key_array(still)))
        assert sorted(every[n] for _, take in work for n in take) == sorted(still)
        assert all(len(take) and plan.groups.starts[batch.start] <= take.min() for batch, take in work)
        assert all(take.max() < plan.groups.starts[batch.stop] for batch, take in work)


def test_a_damaged_plan_is_made_anew(tmp_path: Path) -> None:
    groups = make_groups(30)
    with pytest.raises(Interrupted):
        fill(tmp_path, groups, Fake(before=Once(3)))
    (path,) = ReferenceCache(SPACE, tmp_path).folder.glob("plan-*")
    path.write_bytes(path.read_bytes()[:-5])
    kept = committed(tmp_path)
    assert kept and fill(tmp_path, groups).responses == 60 - len(kept)


def test_spaces_are_listed_verified_and_cleared(tmp_path: Path) -> None:
    assert list_spaces(tmp_path) == [] and verify(tmp_path) == [] and clear(tmp_path) == 0
    groups = make_groups(20)
    fill(tmp_path, groups, token_values=True)
    fill(tmp_path, groups[:5])
    old = replace(SPACE, dtype="bfloat16")
    ReferenceCache(old, tmp_path).fill(groups[:2], Fake().make, token_budget=BUDGET)
    long_ago = time.time() - 40 * 86400
    os.utime(ReferenceCache(old, tmp_path).folder / "about.json", (long_ago, long_ago))

    recent, unused = list_spaces(tmp_path)
    assert (recent.id, recent.responses, recent.blocks) == (SPACE.id, 40, 1)
    assert (unused.id, unused.responses, unused.about["dtype"]) == (old.id, 4, "bfloat16")
    assert recent.about["model"] == "a model" and recent.bytes > 40 * 28

    about = ReferenceCache(SPACE, tmp_path).folder / "about.json"
    about.write_text("{")
    block = block_files(about.parent)[0]
    block.write_bytes(block.read_bytes()[:-1])
    assert {file for file, _ in verify(tmp_path, repair=True)} == {block, about}
    assert not verify(tmp_path) and fill(tmp_path, groups).responses == 40
    assert json.loads(about.read_text())["dtype"] == "float32"

    with pytest.raises(CacheError, match="no space 000000000000"):
        clear(tmp_path, ["000000000000"])
    assert clear(tmp_path, older_than_days=30) == unused.bytes
    assert [space.id for space in list_spaces(tmp_path)] == [SPACE.id]
    assert clear(tmp_path, [SPACE.id]) > 0 and not list_spaces(tmp_path)


def test_a_process_that_had_read_a_cleared_space_sees_what_comes_after(tmp_path: Path) -> None:
    groups = make_groups(10)
    reader = ReferenceCache(SPACE, tmp_path)
    fill(tmp_path, groups[:5])
    reader.values(groups[:5])
    clear(tmp_path)
    fill(tmp_path, groups[5:])
    assert reader.missing(groups) == 0
    assert ReferenceCache(SPACE, tmp_path).missing(groups) == 10


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("PREFOPT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_root() == tmp_path / ".cache" / "prefopt"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "prefopt"
    monkeypatch.setenv("PREFOPT_CACHE", "~/mine")
    groups = make_groups(2)
    ReferenceCache(SPACE).fill(groups, Fake().make, token_budget=BUDGET)
    assert len(committed(tmp_path / "mine")) == 4
    (tmp_path / "a file").touch()
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "a file"))
    with pytest.raises(CacheError, match="set PREFOPT_CACHE to another folder"):
        ReferenceCache(SPACE).fill(groups, Fake().make, token_budget=BUDGET)
