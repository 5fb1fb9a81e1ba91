"""Studies for tests: made, filled, and voted on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefopt.studies.annotators import Annotator, invite
from prefopt.studies.items import Assignment, NewItem, ResponseOrigin, add_items, next_item
from prefopt.studies.study import Study, StudySettings
from prefopt.studies.votes import Vote, record


def new_item(number: int, count: int = 2, *, gold: Any = None, prompt: str | None = None) -> NewItem:
    asked = prompt if prompt is not None else f"question {number}"
    row = {
        "prompt": [{"role": "user", "content": asked}],
        "responses": [[{"role": "assistant", "content": f"answer {number}.{k}"}] for k in range(count)],
    }
    origins = [ResponseOrigin(f"model-{k}", {"temperature": 1.0, "seed": k}) for k in range(count)]
    return NewItem(row, asked.encode().ljust(16, b".")[:16], origins, gold, "prompts.jsonl", number + 1)


def new_study(path: Path, items: int = 4, count: int = 2, gold: Sequence[NewItem] = (), **settings: Any) -> Study:
    study = Study.create(path, StudySettings(**{"seed": "s", **settings}))
    add_items(study, [new_item(i, count) for i in range(items)])
    add_items(study, gold)
    return study


def people(study: Study, *names: str) -> list[Annotator]:
    return [invite(study, name)[0] for name in names]


def shown(study: Study, person: Annotator) -> Assignment:
    found = next_item(study, person)
    assert found is not None
    return found


def say(study: Study, person: Annotator, *best_first: int, strength: int | None = 2, **more: Any) -> Assignment:
    """Vote for the responses in this order on the next item; equal strength for all."""
    found = shown(study, person)
    tiers = tuple((k,) for k in best_first)
    record(study, person, found.ticket, Vote(tiers, strength if found.item.count == 2 else None, **more))
    return found
