"""What ranks tell one another, and what becomes of errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from parallel.ranks import Failure, on_ranks
from prefopt.core.ranks import Ranks, ranks_in
from prefopt.errors import ConfigError, DataError, Interrupted
from prefopt.parallel import arrays
from prefopt.parallel.arrays import arrays_from_first, gather_tensors
from prefopt.parallel.balance import balanced
from prefopt.parallel.gradients import grad_norm, sum_gradients
from prefopt.parallel.world import ALONE, PeerFailed, open_world, peer_errors


def _messages() -> dict[str, Any]:
    world = open_world()
    rank = world.rank
    first = world.totals({"loss": 0.1 * (rank + 1)})
    second = world.totals({"loss": 1.0, **({"only/rank2": 5.0} if rank == 2 else {})})
    return {
        "gathered": world.gather({"rank": rank}),
        "from_first": world.from_first(rank + 10),
        "most": (world.largest(rank), world.smallest(rank + 3)),
        "totals": (first, second, world.totals({})),
    }


def test_what_ranks_tell_one_another() -> None:
    found = on_ranks(3, _messages)
    assert all(result == found[0] for result in found)  # the same bits on all
    assert found[0]["gathered"] == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
    assert found[0]["from_first"] == 10
    assert found[0]["most"] == (2, 3)
    first, second, none = found[0]["totals"]
    assert first["loss"] == pytest.approx(0.6)
    assert second == {"loss": 3.0, "only/rank2": 5.0}
    assert none == {"loss": 0.0, "only/rank2": 0.0}


def _errors() -> list[str]:
    world = open_world()
    told = []

    def fail(error: Exception, here: int) -> str:
        if world.rank == here:
            raise error
        return "fine"

    for attempt in (
        lambda: world.together(lambda: fail(DataError("bad", file="a.jsonl", row=3), 1)),
        lambda: world.on_first(lambda: fail(Interrupted("stopped", 15), 0)),
        lambda: world.first_on_node(lambda: fail(RuntimeError("can't allocate memory"), 2)),
        lambda: world.first_on_node(lambda: fail(OSError(28, "No space left on device"), 0)),
        lambda: world.agree("data", "digest" if world.rank == 1 else "other"),
    ):
        try:
            told.append(str(attempt()))
        except Exception as error:
            told.append(f"{type(error).__name__}: {error}")
    told.append(world.on_first(lambda: f"from {world.rank}"))
    return told


def test_an_error_of_one_rank_is_raised_on_all() -> None:
    found = on_ranks(3, _errors)
    assert found[0] == found[1] == found[2]
    data, stopped, memory, disk, other, first = found[0]
    assert data == "DataError: a.jsonl, row 3: bad"
    assert stopped == "Interrupted: stopped"
    assert memory == "RuntimeError: can't allocate memory"
    assert disk.startswith("OSError") and "No space" in disk
    assert other.startswith("RunError: rank 1 has other data than rank 0")
    assert first == "from 0"


def _order(folder: str) -> list[str]:
    world = open_world()

    def look() -> list[str]:
        from pathlib import Path

        before = sorted(p.name for p in Path(folder).iterdir())
        (Path(folder) / f"rank{world.rank}").touch()
        return before

    return world.first_on_node(look)


def test_the_first_rank_of_a_node_goes_before_the_others(tmp_path: Any) -> None:
    first, *others = on_ranks(3, _order, str(tmp_path))
    assert first == []
    assert all("rank0" in seen for seen in others)


def _leaves(at: int) -> None:
    world = open_world()
    if world.rank == at:
        import os

        os._exit(9)
    world.barrier()


def test_a_rank_that_dies_is_told_by_the_others() -> None:
    found = on_ranks(3, _leaves, 1, failing=True)
    assert found[1] is None
    assert isinstance(found[2], Failure)
    assert found[2].kind == "PeerFailed"
    assert "--resume" in found[2].message


def _gradients(dtype: str) -> tuple[list[Any], float]:
    world = open_world()
    torch.manual_seed(world.rank)
    shapes = [(3, 4), (5,), (2, 2), (7,)]
    parameters = [torch.nn.Parameter(torch.zeros(shape, dtype=getattr(torch, dtype))) for shape in shapes]
    for i, parameter in enumerate(parameters):
        if i == 3 or (i == 1 and world.rank == 0):
            continue  # of the last no rank has a gradient, of the second one rank has none
        parameter.grad = torch.randn_like(parameter)
    sum_gradients(world, parameters)
    return [None if p.grad is None else p.grad.numpy() for p in parameters], float(grad_norm(parameters))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradients_of_whole_weights_are_summed(dtype: str) -> None:
    found = on_ranks(2, _gradients, dtype)
    wanted = [0.0, 0.0, 0.0]
    for rank in range(2):
        torch.manual_seed(rank)
        for i, shape in enumerate([(3, 4), (5,), (2, 2)]):
            if not (i == 1 and rank == 0):
                wanted[i] = wanted[i] + torch.randn(shape, dtype=getattr(torch, dtype)).numpy()
    for gradients, norm in found:
        assert gradients[3] is None
        assert all(np.array_equal(a, b) for a, b in zip(gradients, wanted, strict=False))
        assert norm == pytest.approx(np.sqrt(sum((g**2).sum() for g in wanted)), rel=1e-6)


def test_one_process_sends_nothing_and_needs_no_group() -> None:
    assert ALONE.gather(3) == [3]
    assert ALONE.first_on_node(lambda: 4) == ALONE.together(lambda: 4) == ALONE.on_first(lambda: 4) == 4
    weight = torch.nn.Parameter(torch.ones(2))
    sum_gradients(ALONE, [weight])
    assert weight.grad is None
    assert not torch.distributed.is_initialized()


def test_ranks_of_an_environment() -> None:
    launched = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert ranks_in(launched) == Ranks(5, 8, 1, 4)
    for wrong in ({"RANK": "x"}, {"RANK": "9"}, {"LOCAL_RANK": "-1"}, {"LOCAL_WORLD_SIZE": "0"}):
        with pytest.raises(ConfigError, match="torchrun"):
            ranks_in(launched | wrong)
    with pytest.raises(ConfigError, match="WORLD_SIZE"):
        ranks_in({"RANK": "0"})
    assert ranks_in({"RANK": "0", "WORLD_SIZE": "1"}).alone  # as some job managers set it


def test_an_error_of_ones_own_device_is_not_blamed_on_the_others() -> None:
    with pytest.raises(RuntimeError, match="device-side assert"), peer_errors():
        raise RuntimeError("CUDA error: device-side assert triggered")
    with pytest.raises(PeerFailed), peer_errors():
        raise RuntimeError("[../gloo/transport/tcp/pair.cc:553] Connection closed by peer")


def test_a_batch_is_dealt_by_tokens() -> None:
    random = np.random.default_rng(0)
    for ranks in (1, 2, 3, 8):
        for groups in (0, 1, 5, 64):
            costs = random.integers(1, 500, groups)
            parts = balanced(costs, ranks)
            assert sorted(np.concatenate(parts).tolist()) == list(range(groups))
            assert all((np.diff(part) > 0).all() for part in parts)
            loads = [int(costs[part].sum()) for part in parts]
            if groups:
                assert max(loads) <= max(4 / 3 * max(costs.sum() / ranks, costs.max()), costs.max())


def _arrays(piece: int) -> dict[str, Any]:
    arrays.PIECE = piece
    world = open_world()
    rank = world.rank
    mine = {} if rank == 1 else {"logp": torch.arange(7 + rank) / 3, "done": torch.tensor([rank == 2, True])}
    if rank == 2:
        mine |= {
            "only here": torch.full((2, 3), 9, dtype=torch.int64),
            "none": torch.zeros(0),
            "one": torch.tensor(2.5),
        }
    rows = np.arange(40, dtype=np.int16)[::2].reshape(4, 5)
    told = []
    for fails in (False, True):

        def made(fails: bool = fails) -> dict[str, Any]:
            assert rank == 0
            if fails:
                raise DataError("bad", file="a.jsonl", row=3)
            return {"rows": rows, "empty": np.zeros((0, 2))}

        try:
            told.append({n: (a.dtype.str, a.tolist()) for n, a in arrays_from_first(world, made).items()})
        except DataError as error:
            told.append({"error": (str(error), [])})
    return {"gathered": gather_tensors(world, mine), "first": told}


@pytest.mark.parametrize("piece", [3, 50, 2**20])
def test_arrays_arrive_as_they_were_sent_in_pieces_of_any_size(piece: int) -> None:
    one, *others = on_ranks(3, _arrays, piece)
    for found in (one, *others):
        first, second, third = found["gathered"]
        assert second == {} and list(first) == ["logp", "done"]
        assert torch.equal(first["logp"], torch.arange(7) / 3) and torch.equal(third["logp"], torch.arange(9) / 3)
        assert first["done"].tolist() == [False, True] and third["done"].tolist() == [True, True]
        assert torch.equal(third["only here"], torch.full((2, 3), 9)) and third["only here"].dtype == torch.int64
        assert third["none"].shape == (0,) and third["one"].item() == 2.5 and third["one"].ndim == 0
        rows, error = found["first"]
        assert rows == {"rows": ("<i2", np.arange(0, 40, 2).reshape(4, 5).tolist()), "empty": ("<f8", [])}
        assert "bad" in error["error"][0]
