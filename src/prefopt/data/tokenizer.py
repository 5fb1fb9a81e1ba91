"""Load tokenizers, and what a tokenizer adds to text: leading BOS, EOS, end-of-turn tokens, a plain chat template."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from prefopt.core.files import expanded, one_below
from prefopt.core.hub import fetched
from prefopt.core.model_folder import base_of, is_adapter, read_object, vet_folder
from prefopt.errors import ModelError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    Tokenizer: TypeAlias = PreTrainedTokenizerBase
else:  # transformers takes seconds to import, and brings torch along
    Tokenizer = Any

# Characters that a tokenizer may make of one, and the most that a normal form of Unicode makes (NFKC of U+FDFA).
MAX_EXPANSION = 1000
UNICODE_EXPANSION = 18
TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")  # a token in base64 and its rank; SentencePiece's are binary
PROBE = "Once upon a time, there was a little girl"
VOCABULARIES = {"tokenizer.json", "vocab.json", "vocab.txt", "tekken.json"}
# With one of these, transformers converts no *.model.
CONVERTED = VOCABULARIES - {"tekken.json"}
# Packages that read a *.model, and their modules.
PROCESSOR_TEMPLATE = "chat_template.json"  # of older vision-language models
READERS = {
    "SentencePiece": ("sentencepiece protobuf", ("sentencepiece", "google", "google.protobuf")),
    "tiktoken": ("tiktoken", ("tiktoken",)),
}

# The prompt ends in "Assistant:" without a space: byte-level tokenizers join the space to the first word of the answer.
PLAIN_TURNS = (
    "{%- for message in messages -%}"
    "{{- message.role | capitalize + ': ' + message.content -}}"
    "{%- if message.role == 'assistant' -%}{{- END -}}{%- endif -%}"
    "{%- if not loop.last or add_generation_prompt -%}{{- '\\n\\n' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}"
)


def load_tokenizer(source: str | Path) -> Tokenizer:
    """The tokenizer of a folder or Hub name; for an adapter without one, its base model's. Foreign code is never run.

    A folder with only ``vocab.json`` and ``merges.txt`` is read as GPT-2's byte-level BPE. Raises :class:`ModelError`
    where the folder is missing or incomplete, or the tokenizer gives no character offsets.
    """
    from transformers import AutoTokenizer, GPT2Tokenizer

    if is_adapter(source) and not has_tokenizer(source):
        source = base_of(source)
    path = expanded(source)
    source = path if path.exists() else source
    here = {p.name for p in path.iterdir()} if path.is_dir() else set()
    if not path.exists() and (path.is_absolute() or str(source).startswith((".", "~")) or str(source).count("/") > 1):
        raise ModelError(f"{source}: no such folder; check the path of the model or tokenizer")
    if path.is_dir() and not any(name in VOCABULARIES or name.endswith(".model") for name in here):
        if below := one_below(path):
            raise ModelError(f"{source} holds no model of its own{below}")
        raise ModelError(f"{source}: the folder has no tokenizer (tokenizer.json); copy it there, or name one that has")
    vet_folder(path)
    models = [] if here & CONVERTED else _sentencepiece_models(path)
    file = path / "tokenizer.json" if path.exists() else fetched(str(source), "tokenizer.json")
    if file is not None:
        check_expansion(file)
    described = here & {"tokenizer.json", "tokenizer_config.json", "config.json"}
    bare = {"vocab.json", "merges.txt"} <= here and not described
    try:
        kind = GPT2Tokenizer if bare else AutoTokenizer
        tokenizer: Tokenizer = kind.from_pretrained(str(source), trust_remote_code=False)
    except Exception as error:  # tokenizers raises plain Exception for a damaged file
        raise ModelError(f"{source}: the tokenizer cannot be loaded: {first_line(error)}") from None
    if not tokenizer.is_fast:
        what = "the tokenizer gives no character offsets, so trained tokens cannot be told from the prompt"
        raise ModelError(f"{source}: {what}; convert it to tokenizer.json")
    if tokenizer.chat_template is None and (path / PROCESSOR_TEMPLATE).is_file():
        template = read_object(path / PROCESSOR_TEMPLATE).get("chat_template")
        tokenizer.chat_template = template if isinstance(template, str) else None
    for model in models:
        processor: Any = importlib.import_module("sentencepiece").SentencePieceProcessor
        pieces = processor(model_file=str(model)).encode(PROBE, out_type=str)
        if tokenizer.convert_ids_to_tokens(tokenizer(PROBE, add_special_tokens=False)["input_ids"]) != pieces:
            what = "transformers and SentencePiece read it differently, since no tokenizer_config.json names its class"
            remedy = "add one (tokenizer_class: LlamaTokenizer, say), or tokenizer.json"
            raise ModelError(f"{source}: {model.name}: {what}; {remedy}")
    return tokenizer


def _sentencepiece_models(folder: Path) -> list[Path]:
    """SentencePiece vocabularies of a folder. Raises :class:`ModelError` where a package to read one is absent."""
    found = []
    for path in sorted(folder.glob("*.model")):
        with path.open("rb") as file:
            kind = "tiktoken" if TIKTOKEN.match(file.read(200)) else "SentencePiece"
        packages, modules = READERS[kind]
        if not all(map(importlib.util.find_spec, modules)):
            what = f"{path.name} is {kind}'s, and a package to read it is not installed: pip install {packages}"
            raise ModelError(f"{folder}: {what}, or convert it to tokenizer.json")
        found += [path] if kind == "SentencePiece" else []
    return found


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a folder holds a vocabulary."""
    found = Path(folder)
    return any((found / name).is_file() for name in VOCABULARIES) or any(found.glob("*.model"))


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """The largest token id plus one: the smallest embedding that a model needs."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def eos_id(tokenizer: Tokenizer) -> int:
    """The id of EOS. Raises :class:`ModelError` without one: no answer would ever end."""
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{tokenizer.name_or_path}: the tokenizer has no EOS token; set eos_token in its config")
    return int(tokenizer.eos_token_id)


def leading_ids(tokenizer: Tokenizer) -> list[int]:
    """Token ids that the tokenizer puts before plain text: [BOS], or nothing."""
    bare = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    full = tokenizer("a", add_special_tokens=True, verbose=False)["input_ids"]
    start = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
    return [int(i) for i in full[:start]]


def end_marks(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Special tokens that may end a turn (all but BOS, unless BOS is EOS), longest first."""
    marks = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special} | set(tokenizer.all_special_tokens)
    if tokenizer.bos_token != tokenizer.eos_token:
        marks.discard(str(tokenizer.bos_token))
    return tuple(sorted(marks, key=lambda t: (-len(t), t)))


def plain_template(tokenizer: Tokenizer, *, add_eos: bool = True) -> str:
    r"""A Jinja chat template for a tokenizer without one: ``User: ...\n\nAssistant: ...``, EOS after each answer."""
    lead = "".join(tokenizer.convert_ids_to_tokens(leading_ids(tokenizer)))
    end = str(tokenizer.convert_ids_to_tokens(eos_id(tokenizer))) if add_eos else ""
    return f"{{{{- {lead!r} -}}}}{PLAIN_TURNS.replace('END', repr(end))}"


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Digest of everything that token ids depend on, 32 hex digits, the same in every process.

    That is ``tokenizer.json`` (without the last truncation and padding), the chat template and the settings in Python.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["truncation"] = backend["padding"] = None
    settings = {
        "class": type(tokenizer).__name__,
        "special": {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())},
        "split special": bool(tokenizer.split_special_tokens),
        "template": tokenizer.chat_template,
    }
    text = json.dumps([backend, settings], sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def check_expansion(path: Path) -> None:
    """Raise :class:`ModelError` for a tokenizer whose steps, one after another, could expand a text without bound."""
    try:
        described = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return  # reported when it is loaded
    if not isinstance(described, dict):
        return
    for part in ("normalizer", "pre_tokenizer", "decoder", "post_processor"):
        if expansion(described.get(part)) > MAX_EXPANSION:
            what = f"its {part} can make over {MAX_EXPANSION:,} characters of one"
            raise ModelError(f"{path}: {what}, which no real tokenizer does; it is not loaded")


def expansion(step: Any) -> float:
    """Characters that a step, with the steps inside it, can make of one."""
    if not isinstance(step, dict):
        return 1.0
    inner = (step.get(name) for name in ("normalizers", "pretokenizers", "decoders", "processors"))
    most: float = math.prod(expansion(one) for steps in inner if isinstance(steps, list) for one in steps)
    match step.get("type"):
        case "Replace":
            most *= _replaced(step.get("pattern"), step.get("content"))
        case "Prepend" | "Metaspace" | "WordPiece" | "BPEDecoder":
            added = (step.get(name) for name in ("prepend", "replacement", "prefix", "suffix"))
            most *= 1 + sum(len(text) for text in added if isinstance(text, str))
        case "NFD" | "NFC" | "NFKD" | "NFKC":
            most *= UNICODE_EXPANSION if most > 1 else 1
        case "Precompiled":
            most *= _mapped(step.get("precompiled_charsmap"))
        case "TemplateProcessing":
            shapes = [step.get(name) for name in ("single", "pair")]
            most *= max(1, *(len(shape) if isinstance(shape, list) else 1 for shape in shapes))
    return min(most, 1e300)


def _replaced(pattern: Any, content: Any) -> float:
    """Characters per character of a replacement; a regular expression may match between any two."""
    if not isinstance(content, str) or not isinstance(pattern, dict):
        return 1.0
    text = pattern.get("String")
    if isinstance(text, str) and text:
        return max(1.0, len(content) / len(text))
    return 1.0 + len(re.sub(r"\\.", "", content))


def _mapped(encoded: Any) -> float:
    """The longest text in a SentencePiece map: the size of a trie, the trie, then texts that end in a zero byte."""
    try:
        raw = base64.b64decode(encoded)
    except (TypeError, ValueError):
        return 1.0
    texts = raw[4 + int.from_bytes(raw[:4], "little") :].split(b"\0")
    return max(1.0, max((len(text.decode("utf-8", "replace")) for text in texts), default=1))
