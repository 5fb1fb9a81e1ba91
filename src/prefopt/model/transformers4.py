"""A saved folder made readable to transformers 4 as well, beside all that transformers 5 writes.

What differs: the class of the tokenizer and its extra special tokens have other names; rotary embeddings stand in
``rope_parameters`` and no longer in fields of their own; ``torch_dtype`` is called ``dtype``.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from prefopt.core.files import output_errors, write_json
from prefopt.data.tokenizer import Tokenizer

ANY_CLASS = "PreTrainedTokenizerFast"
ONLY_NEW = {"TokenizersBackend", "PythonBackend", "SentencePieceBackend", "MistralCommonBackend"}
NEOX = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
# Where transformers 4 has a name of its own for a field, by type of model.
RENAMED: dict[str, dict[str, str]] = {
    "gpt_neox": NEOX,
    "gpt_neox_japanese": NEOX,
    "modernbert-decoder": {"rope_theta": "global_rope_theta", "rope_local_base_freq": "local_rope_theta"},
    "qwen3_moe": {"num_local_experts": "num_experts"},
    "qwen3_vl_moe_text": {"num_local_experts": "num_experts"},
}
FULL, SLIDING = "full_attention", "sliding_attention"

Json = dict[str, Any]


def write_for_older_readers(folder: Path, tokenizer: Tokenizer) -> None:
    """Add to ``config.json`` and ``tokenizer_config.json`` of ``folder``, where it has them, what transformers 4 reads.

    Transformers 5 reads the same from them as before; what it would read differently is left out. ``tokenizer`` is the
    one that was saved: its class keeps the name that the folder it came from has for it.
    """
    with output_errors(folder):
        _change(folder / "tokenizer_config.json", lambda found: _older_tokenizer(found, tokenizer))
        _change(folder / "config.json", older_config)


def _change(path: Path, change: Any) -> None:
    if not path.is_file():
        return
    found = json.loads(path.read_text("utf-8"))
    if (changed := change(found)) != found:
        write_json(path, changed)


def _older_tokenizer(found: Json, tokenizer: Tokenizer) -> Json:
    changed = dict(found)
    if found.get("tokenizer_class") in ONLY_NEW:
        changed["tokenizer_class"] = _class_before(tokenizer)
    extra = found.get("extra_special_tokens")
    if isinstance(extra, list):  # transformers 4 has a dictionary of that name, and this list under another
        changed["additional_special_tokens"] = changed.pop("extra_special_tokens")
    return changed


def _class_before(tokenizer: Tokenizer) -> str:
    """What the folder that a tokenizer was loaded from calls its class."""
    try:
        path = cached_file(tokenizer.name_or_path, "tokenizer_config.json", local_files_only=True)
        name = json.loads(Path(path).read_text("utf-8")).get("tokenizer_class") if path else None
    except (OSError, ValueError, AttributeError):  # it was made in memory, or its folder is gone
        name = None
    return name if isinstance(name, str) and name and name not in ONLY_NEW else ANY_CLASS


def older_config(found: Json) -> Json:
    """The document of a ``config.json`` with the fields of transformers 4 beside those of transformers 5."""
    now = _read(found)
    for scaling in (True, False):
        changed = _with_older(found, scaling=scaling)
        if now is not None and _holds(_read(changed), now):
            return changed
    return found


def readers(folder: Path) -> str:
    """The versions of transformers that read a folder of :func:`write_for_older_readers`, for its card."""
    path = folder / "config.json"
    found = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    if found != _with_older(found):
        return "transformers 5: these rotary embeddings cannot be written for version 4"
    return "transformers 5, and version 4 (tried with 4.57) where it knows the architecture"


def _with_older(found: Json, *, scaling: bool = True) -> Json:
    """The fields added in every configuration of a document, nested ones too; ``scaling``: ``rope_scaling`` as well."""
    changed = {k: _with_older(v, scaling=scaling) if _is_config(k, v) else v for k, v in found.items()}
    older = {"torch_dtype": found["dtype"]} if isinstance(found.get("dtype"), str) else {}
    older |= _older_rope(found, scaling=scaling)
    names = RENAMED.get(str(found.get("model_type")), {})
    older |= {name: found[name] for name in names if name in found}
    for name, value in older.items():
        changed.setdefault(names.get(name, name), value)
    return changed


def _older_rope(config: Json, *, scaling: bool) -> Json:
    """Rotary embeddings in the fields of transformers 4; where layers differ, they are about full attention."""
    rope = config.get("rope_parameters")
    wide: Any = rope.get(FULL, rope) if isinstance(rope, dict) else None
    if not isinstance(rope, dict) or not isinstance(wide, dict) or "rope_theta" not in wide:
        return {}
    older = {name: wide[name] for name in ("rope_theta", "partial_rotary_factor") if name in wide}
    narrow = rope.get(SLIDING)
    if isinstance(narrow, dict) and narrow.get("rope_theta") not in (None, wide["rope_theta"]):
        older["rope_local_base_freq"] = narrow["rope_theta"]
    if scaling and (rest := _scaling(wide, config)):
        older["rope_scaling"] = rest
    return older


def _scaling(rope: Json, config: Json) -> Json:
    """What transformers 4 calls ``rope_scaling``: empty for plain rotary embeddings."""
    kind = rope.get("rope_type", "default")
    rest = {k: v for k, v in rope.items() if k not in (FULL, SLIDING, "rope_theta", "partial_rotary_factor")}
    if kind == "longrope" and "original_max_position_embeddings" in config:  # Phi-3 takes these three and no other
        return {"type": kind, "short_factor": rope.get("short_factor"), "long_factor": rope.get("long_factor")}
    return rest if kind != "default" or rest.keys() - {"rope_type", "type"} else {}


def _is_config(name: str, value: Any) -> bool:
    return name.endswith("_config") and isinstance(value, dict)


def _read(document: Json) -> Json | None:
    """What transformers 5 makes of the document; none where it knows no such model, or warns of a field."""
    known: Any = AutoConfig
    try:
        with warnings.catch_warnings(), _unheard():
            warnings.simplefilter("error")
            config: PreTrainedConfig = known.for_model(**copy.deepcopy(document))
            found: Json = config.to_dict()
    except Exception:  # whatever a class of transformers has against it
        return None
    return found


def _holds(more: Any, less: Any) -> bool:
    """Whether all that ``less`` says is in ``more``, with the same values."""
    if isinstance(less, dict) and isinstance(more, dict):
        return all(name in more and _holds(more[name], value) for name, value in less.items())
    return bool(more == less)


@contextmanager
def _unheard() -> Iterator[None]:
    """Without what transformers logs: it said the same when the model was loaded."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
