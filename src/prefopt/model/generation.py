"""``generation_config.json`` of a saved folder: which tokens end an answer, for whoever generates with it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prefopt.data.tokenizer import Tokenizer
from prefopt.disk.write import output_errors, write_json
from prefopt.model.packed import causal_model

FILE = "generation_config.json"


def add_end_tokens(folder: Path, ends: Iterable[int], tokenizer: Tokenizer, model: Any) -> str | None:
    """Put the tokens ``ends`` into ``eos_token_id`` of a saved folder, behind those that are there; what to say of it.

    An adapter's folder has no such file of its own: it is given that of ``model``, the one that was saved, for servers
    and for ``prefopt merge``. Says nothing where every token was there already.
    """
    ends, plain = tuple(ends), causal_model(model)
    if not ends or not plain.can_generate():  # a reward model writes nothing
        return None
    path = folder / FILE
    said = getattr(plain, "generation_config", None)
    with output_errors(path):
        if not path.is_file():
            if said is None:
                return None
            said.save_pretrained(folder)
        document = json.loads(path.read_text("utf-8"))
        there = ids_of(document.get("eos_token_id"))
        new = [i for i in dict.fromkeys(ends) if i not in there]
        if not new:
            return None
        document.pop("_from_model_config", None)  # under it generate() may go back to what config.json says
        write_json(path, {**document, "eos_token_id": there + new if there else new})
    names = ", ".join(map(str, tokenizer.convert_ids_to_tokens(new)))
    return f"answers end with {names}: added to eos_token_id of {FILE}"


def end_tokens(folder: str | Path) -> list[int] | None:
    """The ids that ``generation_config.json`` of a folder says; none where it has no such file, or a damaged one."""
    try:
        return ids_of(json.loads((Path(folder) / FILE).read_text("utf-8")).get("eos_token_id"))
    except Exception:  # none, or damaged in any way
        return None


def ids_of(said: Any) -> list[int]:
    """What ``eos_token_id`` holds: nothing, one id or several. What can be no token's id ends no answer either."""
    found = said if isinstance(said, (list, tuple)) else [said]
    return [i for i in found if isinstance(i, int) and not isinstance(i, bool) and i >= 0]
