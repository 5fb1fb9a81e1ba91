"""Groups in columns are the groups they were made from; on disk they are the same, and damage is noticed."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.core.cache_folder import Damaged
from prefopt.data.group import Continuation, Group
from prefopt.data.table import COLUMNS, GroupTable, Part, TableBuilder, joined, keep_responses
from prefopt.data.token_cache import TableWriter, check_files, open_part, read_manifest
from prefopt.model.packing import PackLayout


@st.composite
def groups(draw: st.DrawFn) -> Group:
    k = draw(st.integers(0, 4))
    prefix = draw(st.lists(st.integers(0, 70_000), max_size=5))
    continuations = []
    for _ in range(k):
        ids = draw(st.lists(st.integers(0, 70_000), min_size=1, max_size=5))
        trained = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
        starts = sorted(draw(st.sets(st.integers(1, len(ids) - 1), max_size=2))) if len(ids) > 1 else []
        continuations.append(Continuation(np.array(ids, np.int32), np.array(trained, np.bool_), tuple(starts)))
    pairs: list[tuple[int, int]] = []
    if k > 1:
        index = st.integers(0, k - 1)
        pairs = draw(st.lists(st.tuples(index, index).filter(lambda p: p[0] != p[1]), max_size=4))
    numbers = st.floats(-10, 10)
    tier = [draw(st.integers(0, 2)) for _ in range(k)]
    tiers = tuple(tuple(i for i in range(k) if tier[i] == t) for t in sorted(set(tier)))
    return Group(
        np.array(prefix, np.int32),
        tuple(continuations),
        draw(st.integers(1, 10**7)),
        tuple(pairs),
        weights=tuple(draw(numbers) for _ in pairs) if pairs and draw(st.booleans()) else None,
        tiers=tiers if draw(st.booleans()) else (),
        scores=tuple(draw(numbers) for _ in range(k)) if k and draw(st.booleans()) else None,
        labels=tuple(draw(st.booleans()) for _ in range(k)) if k and draw(st.booleans()) else None,
    )


def plain(group: Group) -> tuple[Any, ...]:
    parts = [(c.ids.tolist(), c.trained.tolist(), c.starts) for c in group.continuations]
    said = (group.pairs, group.weights, group.tiers, group.scores, group.labels)
    return group.prefix.tolist(), parts, group.row, said


@given(st.lists(groups(), max_size=4), st.lists(groups(), max_size=3), st.randoms())
@settings(max_examples=60, deadline=None)
def test_responses_that_are_not_read_are_left_out(one: list[Group], two: list[Group], chance: Any) -> None:
    table = GroupTable([Part(GroupTable.of(many).parts[0].columns, source=s) for s, many in enumerate((one, two))])
    keep = np.array([chance.random() < 0.6 for _ in range(len(table.key_N))], np.bool_)
    fewer = keep_responses(table, keep)
    expected, at = [], 0
    for group in [*one, *two]:
        kept = [k for k in range(len(group.continuations)) if keep[at + k]]
        at += len(group.continuations)
        new = {k: n for n, k in enumerate(kept)}
        whole = [i for i, (a, b) in enumerate(group.pairs) if a in new and b in new]
        tiers = (tuple(new[k] for k in tier if k in new) for tier in group.tiers)
        expected.append(
            Group(
                group.prefix,
                tuple(group.continuations[k] for k in kept),
                group.row,
                tuple((new[a], new[b]) for a, b in (group.pairs[i] for i in whole)),
                weights=tuple(group.weights[i] for i in whole) if group.weights and whole else None,
                tiers=tuple(tier for tier in tiers if tier),
                scores=tuple(group.scores[k] for k in kept) if group.scores and kept else None,
                labels=tuple(group.labels[k] for k in kept) if group.labels and kept else None,
            )
        )
    assert [plain(g) for g in fewer] == [plain(g) for g in expected]
    assert fewer.tokens_G.tolist() == [g.tokens for g in expected]
    assert fewer.key_N.tolist() == table.key_N[keep].tolist() and fewer.source_G.tolist() == table.source_G.tolist()
    assert fewer.prompt_key_G.tolist() == table.prompt_key_G.tolist() and fewer.row_G.tolist() == table.row_G.tolist()


def check_columns(table: GroupTable, many: Sequence[Group]) -> None:
    assert [plain(g) for g in table] == [plain(g) for g in many]
    some = [g for g in many if g.continuations]
    has = table.responses_G > 0
    assert table.tokens_G.tolist() == [g.tokens for g in many]
    assert table.longest_G[has].tolist() == [g.longest for g in some]
    lengths = [[len(x) for k in range(len(g.continuations)) for x, _ in g.sequences(k)] for g in some]
    assert table.longest_G[has].tolist() == list(map(max, lengths))
    assert table.shortest_G[has].tolist() == list(map(min, lengths)) == [g.shortest for g in some]
    assert table.sequences_G.tolist() == [g.count for g in many]
    assert table.responses_G.tolist() == [len(g.continuations) for g in many]
    assert table.trained_N.tolist() == [int(c.trained.sum()) for g in many for c in g.continuations]
    assert table.key_N.tobytes() == b"".join(g.key(k) for g in many for k in range(len(g.continuations)))
    ids = [i for g in many for part in (g.prefix, *(c.ids for c in g.continuations)) for i in part.tolist()]
    assert table.max_id == max(ids, default=-1)
    for layout in (PackLayout(), PackLayout(share=False), PackLayout(rope_limit=4)):
        assert layout.costs(table)[has].tolist() == [layout.cost(g) for g in some]


@settings(max_examples=60)
@given(st.lists(st.lists(groups(), max_size=4), max_size=4))
def test_columns_hold_what_the_groups_do_in_memory_and_on_disk(
    tmp_path_factory: pytest.TempPathFactory, chunks: list[list[Group]]
) -> None:
    every = [group for chunk in chunks for group in chunk]
    check_columns(GroupTable.of(every), every)
    check_columns(GroupTable([GroupTable.of(chunk).parts[0] for chunk in chunks]), every)
    columns = [GroupTable.of(chunk).parts[0].columns for chunk in chunks]
    check_columns(GroupTable([Part(joined(columns))]), every)
    folder = tmp_path_factory.mktemp("table") / "new"
    with TableWriter(folder) as writer:
        for chunk in columns:
            writer.append(chunk)
        writer.finish({}, {})
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    part = open_part(folder, manifest, source=3)
    check_columns(GroupTable([part, part]), every + every)
    assert GroupTable([part]).source_G.tolist() == [3] * len(every)


def test_indices_are_those_of_a_list() -> None:
    many = [Group(np.array([n], np.int32), (), n, ()) for n in range(7)]
    table = GroupTable.of(many[:3]) + GroupTable.of([]) + GroupTable.of(many[3:])
    assert len(table) == 7 and [table[i].row for i in (0, 2, 3, 6, -1, -7)] == [0, 2, 3, 6, 6, 0]
    assert [g.row for g in table[1:6:2]] == [1, 3, 5] and table[np.int64(4)].row == 4
    for wrong in (7, -8):
        with pytest.raises(IndexError):
            table[wrong]
    assert GroupTable.of(table) is table and not GroupTable() and GroupTable().max_id == -1


def written(folder: Path, count: int = 40) -> Path:
    builder = TableBuilder()
    rng = np.random.default_rng(0)
    for row in range(count):
        ids = rng.integers(0, 1000, 9)
        builder.add(Group.from_sequences([(ids[:n], np.arange(n) > 3) for n in (6, 9)], row))
    with TableWriter(folder) as writer:
        writer.append(builder.columns())
        writer.finish({"about": "it"}, {"read": 40})
    return folder


def test_every_damaged_file_is_noticed(tmp_path: Path) -> None:
    folder = written(tmp_path / "t")
    manifest = read_manifest(folder)
    assert (manifest["about"], manifest["report"]) == ({"about": "it"}, {"read": 40})
    assert set(manifest["files"]) == {f"{name}.bin" for name in COLUMNS}
    for path in sorted(folder.iterdir()):
        good = path.read_bytes()
        if not good:
            continue
        flipped = bytes([*good[:-3], good[-3] ^ 1, *good[-2:]]) if len(good) > 3 else b"!" * len(good)
        for bad in (b"", good[:-1], good + b"x", flipped, None):
            path.unlink()
            if bad is not None:
                path.write_bytes(bad)
            with pytest.raises(Damaged):
                check_files(folder, read_manifest(folder))
            path.write_bytes(good)
        check_files(folder, read_manifest(folder))


def test_a_million_groups_cost_no_python_objects(tmp_path: Path) -> None:
    """Opening a table and all its columns makes as many objects for many groups as for few."""

    def objects(folder: Path) -> int:
        gc.collect()
        before = len(gc.get_objects())
        table = GroupTable([open_part(folder, read_manifest(folder))])
        held = [
            table.longest_G,
            table.key_N,
            table.truncated_G,
            table.source_G,
            PackLayout().costs(table),
            table.max_id,
        ]
        gc.collect()
        made = len(gc.get_objects()) - before
        assert len(held) == 6
        return made

    few, many = written(tmp_path / "few", 10), written(tmp_path / "many", 3000)
    objects(few)
    assert objects(many) <= objects(few) + 20
