"""From the fields of a form to a vote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prefopt.studies.items import Tiers
from prefopt.studies.votes import RefusedVote, Vote, on_page

Form = Mapping[str, Sequence[str]]
REASONS = ("unclear", "outside", "broken", "offensive")
LONGEST_FIELD = 20_000


def one(form: Form, name: str) -> str:
    """The value of a field, or nothing. Raises :class:`RefusedVote` where it is there twice."""
    values = form.get(name, ())
    if len(values) > 1:
        raise RefusedVote(f"the form has {name} twice")
    return values[0][:LONGEST_FIELD] if values else ""


def read_ballot(form: Form, shown: Sequence[int], tags: Sequence[str]) -> Vote:
    """What a form says of the responses ``shown`` [K]. Raises :class:`RefusedVote`.

    ``choice`` is ``a1`` to ``a3`` or ``b1`` to ``b3`` (of two the first or the second is better, by how much), ``tie``,
    ``bad``, ``skip`` (with a ``reason``), or ``rank`` with a rank for each place in ``rank0``, ``rank1``, ...
    """
    choice, count = one(form, "choice"), len(shown)
    rationale = one(form, "rationale").replace("\r\n", "\n").strip()
    given = tuple(dict.fromkeys(form.get("tag", ())))
    if not set(given) <= set(tags):
        raise RefusedVote("the form has a tag that the study does not know")
    more = {"rationale": rationale, "tags": given}
    if choice == "skip":
        reason = one(form, "reason")
        if reason not in REASONS:
            raise RefusedVote("a skipped item needs its reason")
        return Vote(skipped=reason, **more)  # type: ignore[arg-type]
    if choice == "bad":
        return Vote(all_bad=True, **more)  # type: ignore[arg-type]
    if choice == "tie":
        return Vote(on_page(shown, (tuple(range(count)),)), **more)  # type: ignore[arg-type]
    if choice == "rank":
        return Vote(on_page(shown, _ranks(form, count)), **more)  # type: ignore[arg-type]
    if count == 2 and len(choice) == 2 and choice[0] in "ab" and choice[1] in "123":
        best = "ab".index(choice[0])
        return Vote(on_page(shown, ((best,), (1 - best,))), int(choice[1]), **more)  # type: ignore[arg-type]
    raise RefusedVote("choose one of the answers")


def _ranks(form: Form, count: int) -> Tiers:
    """Tiers of places from their ranks; places without a rank are left out."""
    by_rank: dict[int, list[int]] = {}
    for place in range(count):
        text = one(form, f"rank{place}")
        if not text:
            continue
        if not (len(text) == 1 and text in "123456789" and int(text) <= count):
            raise RefusedVote(f"a rank is a number from 1 to {count}")
        by_rank.setdefault(int(text), []).append(place)
    if sum(map(len, by_rank.values())) < 2:
        raise RefusedVote("rank at least two responses")
    return tuple(tuple(by_rank[rank]) for rank in sorted(by_rank))
