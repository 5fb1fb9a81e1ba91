"""Orders and labels of pairs: what is one order with ties, and what is not."""

from __future__ import annotations

from itertools import combinations, permutations, product

from hypothesis import given
from hypothesis import strategies as st

from prefopt.data.comparisons import parse_comparisons
from prefopt.data.layouts.rankings import from_pair_labels
from prefopt.records import Comparison


def test_labels_of_pairs_are_an_order_where_any_order_has_these_labels() -> None:
    """Against every possible assignment of ranks: 75 orders with ties for four responses, of 729 sets of labels."""
    for count in (0, 1, 2, 3, 4):
        orders = {}
        for ranks in product(range(count or 1), repeat=count):
            pairs = combinations(range(count), 2)
            labels = tuple(0 if ranks[i] == ranks[j] else 1 if ranks[i] < ranks[j] else 2 for i, j in pairs)
            orders[labels] = tuple(tuple(k for k in range(count) if ranks[k] == r) for r in sorted(set(ranks)))
        assert len(orders) == [1, 1, 3, 13, 75][count]
        for labels in product(range(3), repeat=count * (count - 1) // 2):
            tiers, votes = from_pair_labels(labels, count)
            if labels in orders:
                assert (tiers, votes) == (orders[labels], None)
            else:
                assert tiers == () and votes is not None
                pairs = zip(combinations(range(count), 2), labels, strict=True)
                assert {(a, b) for a, b, _ in votes} == {(i, j) if x == 1 else (j, i) for (i, j), x in pairs if x}


def one(**columns: object) -> Comparison:
    (found,) = parse_comparisons([{"prompt": "q", "responses": ["a", "b", "c", "d"], **columns}], "f").comparisons
    return found


def test_orders_are_best_first_and_counted_from_0() -> None:
    assert one(order=[2, 0, 3, 1]).tiers == one(ranking=[2, 0, 3, 1]).tiers == ((2,), (0,), (3,), (1,))
    best = one(order=[2, 0], top_k=2)
    assert best.tiers == ((2,), (0,), (1, 3))
    assert best.pairs == ((2, 0), (2, 1), (2, 3), (0, 1), (0, 3))
    assert one(tiers=[[2, 0], [1], [3]]).tiers == ((2, 0), (1,), (3,))
    assert one(scores=[1, 5, 1, 9]).tiers == ((3,), (1,), (0, 2))
    assert one(scores=[1, 5, 1, 9], tiers=[[0], [1], [2], [3]]).scores == (1.0, 5.0, 1.0, 9.0)
    assert one(labels=[True, False, True, True]).tiers == ()
    assert one(pairs=[[1, 0], [0, 2, 2.5]]).votes == ((1, 0, 1.0), (0, 2, 2.5))


@given(st.permutations(range(4)), st.integers(1, 4))
def test_every_order_is_read_as_it_was_meant(order: list[int], best: int) -> None:
    position = {k: place for place, k in enumerate(order)}
    expected = {(a, b) for a, b in permutations(range(4), 2) if position[a] < position[b]}
    assert set(one(order=order).pairs) == expected
    few = one(order=order[:best], top_k=best)
    assert set(few.pairs) == {(a, b) for a, b in expected if position[a] < best}
