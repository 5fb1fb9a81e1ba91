"""The model card: README.md of a finished model, with the front matter that the Hub reads.

It names no folder of this machine: local paths are cut to their last part.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

import prefopt
from prefopt.core.files import expanded, output_errors
from prefopt.core.hub import cached
from prefopt.core.model_folder import ADAPTER_CONFIG, read_object
from prefopt.core.terminal import visible
from prefopt.model.save import transformers_versions

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
DATA_SET = re.compile(r"([\w.-]+/[\w.-]+)(,[\w=.,-]*)?")
"""A data set of the Hub, as ``--data`` names it: ``owner/name,split=train``."""
REPOSITORY = "OWNER/NAME"
"""What the examples call the model; a reader puts the folder or the repository there."""
REWARD_TAG = "reward-model"
OF_ROWS = ("held-out", "best step")
OF_BATCHES = "training"
KEPT = ("tags", "datasets", "license", "license_name", "license_link", "language")
"""Of an adapter's front matter, in that of the merged model."""
LICENCE = "other"
"""Of a model whose base states none."""


def write_card(
    folder: Path,
    *,
    model: str,
    title: str,
    tag: str,
    data: str,
    files: Sequence[str],
    settings: Mapping[str, Any],
    results: Mapping[str, Any],
    license: str,
) -> None:
    """Write README.md: front matter, how to use the model, its data, results and settings.

    ``model`` is the base: a folder, or its name on the Hub. ``data`` is a sentence, ``files`` are the names of the
    data. ``results`` are measures by name; those of held-out rows and of training batches have tables of their own.
    """
    base = base_name(model, adapter=(folder / ADAPTER_CONFIG).exists())
    named = portable(model)
    front = front_matter(folder, model=model, tag=tag, files=files)
    versions = f"prefopt {prefopt.__version__} (torch {version('torch').split('+')[0]})"
    lines = [
        *(*_yaml_block(front), ""),
        *(f"# {named}: {title}", "", f"{title} of `{named}` with {versions}.", ""),
        *("## Use", "", *how_to_use(folder, base, reward=tag == REWARD_TAG), ""),
        *("## Data", "", data, ""),
        *("## Results", "", *_results(results), ""),
        *("## Settings", "", "<details>", "<summary>All options</summary>", ""),
        *(*_table("option", {n: portable(v) for n, v in settings.items()}), "", "</details>", ""),
        *(f"Read by {transformers_versions(folder)}.", "", license, ""),
    ]
    path = folder / "README.md"
    with output_errors(path):
        path.write_text(visible("\n".join(lines)), "utf-8")  # it names files, whose names may hold anything


def front_matter(folder: Path, *, model: str, tag: str, files: Sequence[str]) -> dict[str, Any]:
    """What the Hub shows and searches by. Licence and languages are those that the card of the base states."""
    adapter = (folder / ADAPTER_CONFIG).exists()
    base, stated = base_name(model, adapter=adapter), card_of(model)
    front: dict[str, Any] = {"library_name": "peft" if adapter else "transformers"}
    front["pipeline_tag"] = "text-classification" if tag == REWARD_TAG else "text-generation"
    if base:
        front |= {"base_model": base, "base_model_relation": "adapter" if adapter else "finetune"}
    front |= {name: stated[name] for name in ("license", "license_name", "license_link") if stated.get(name)}
    if not stated.get("license"):
        front |= {"license": LICENCE, "license_name": "of-the-base-model-and-the-data"}
    if stated.get("language"):
        front["language"] = stated["language"]
    if sets := data_sets(files):
        front["datasets"] = sets
    return front | {"tags": [tag, "preference-optimization", "prefopt"], "model_name": folder.name}


def base_name(model: str, *, adapter: bool) -> str | None:
    """The name on the Hub of the model that was trained: its own, or of a local one that its card names as its base.

    An ``adapter`` fits the very weights it was trained on, so that the base of a local model is none of its own."""
    if _on_hub(model):
        return model
    stated = None if adapter else card_of(model).get("base_model")
    if isinstance(stated, list):
        stated = stated[0] if stated else None
    return stated if isinstance(stated, str) and _on_hub(stated) else None


def _on_hub(name: str) -> bool:
    return bool(HUB_NAME.fullmatch(name)) and not expanded(name).exists()


def card_of(model: str) -> dict[str, Any]:
    """The front matter of a model's card, in its folder or in the cache of the Hub; empty where there is none."""
    path = cached(model, "README.md") if _on_hub(model) else expanded(model) / "README.md"
    return read_card(path)[0] if path is not None else {}


def read_card(path: Path) -> tuple[dict[str, Any], str]:
    """The front matter of a card, and its text; both empty for a file that is absent or unreadable."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return {}, ""
    found = re.match(r"---\n(.*?)\n---\n", text, re.S)
    if not found:
        return {}, text
    try:
        front = yaml.safe_load(found[1])
    except yaml.YAMLError:
        front = None
    return (front if isinstance(front, dict) else {}), text[found.end() :]


def write_merged_card(folder: Path, *, model: str, adapter: str, card: Path | None, dtype: str) -> None:
    """The card of a model with an adapter merged in: what ``card``, that of the adapter, says of its training, and how
    to use the whole model."""
    stated, body = read_card(card) if card is not None else ({}, "")
    tags = [str(tag) for tag in stated.get("tags") or ["merged"]]
    front = front_matter(folder, model=model, tag=tags[0], files=())
    front |= {name: stated[name] for name in KEPT if stated.get(name)}
    body = re.sub(r"^## Use\n.*?(?=^## )|^# [^\n]*\n", "", body, flags=re.S | re.M)
    said = f"`{portable(model)}` with the adapter `{portable(adapter)}` merged in, in {dtype}, by prefopt merge."
    use = how_to_use(folder, None, reward=tags[0] == REWARD_TAG)
    lines = [*_yaml_block(front), "", f"# {folder.name}", "", said, "", "## Use", "", *use, "", body.strip()]
    path = folder / "README.md"
    with output_errors(path):
        path.write_text(visible("\n".join(lines)).rstrip() + "\n", "utf-8")


def _yaml_block(front: Mapping[str, Any]) -> list[str]:
    return ["---", yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True).rstrip(), "---"]


def data_sets(files: Iterable[str]) -> list[str]:
    """The data sets of the Hub among the names of data."""
    names = (DATA_SET.fullmatch(name) for name in files if not Path(name).exists())
    return list(dict.fromkeys(found[1] for found in names if found and not Path(found[1]).suffix[1:].isalpha()))


def portable(value: Any) -> Any:
    """A value without folders of this machine: a path that exists, or can be nothing else, by its last part."""
    if isinstance(value, list):
        return [portable(one) for one in value]
    if not isinstance(value, str) or "/" not in value or "://" in value:
        return value
    is_path = value.startswith(("/", "./", "../", "~")) or value.count("/") > 1 or Path(value).exists()
    return Path(value).name or value if is_path else value


# -- how to use it ---------------------------------------------------------------------------------------------


def how_to_use(folder: Path, base: str | None, *, reward: bool) -> list[str]:
    """Lines of Markdown: the model in transformers, and on a vLLM server."""
    adapter = (folder / ADAPTER_CONFIG).exists()
    say = [f"Put the folder of the model, or its name on the Hub, in place of `{REPOSITORY}`."]
    if reward:
        return [*say, "", *_code("python", _REWARD)]
    text = _CHAT if _has_template(folder) else _TEXT
    serve = f"vllm serve {REPOSITORY}"
    if adapter:
        rank = read_object(folder / ADAPTER_CONFIG).get("r", 16)
        serve = f"vllm serve {base or 'BASE'} --enable-lora --max-lora-rank {rank} --lora-modules aligned={REPOSITORY}"
        say.append("This is a LoRA adapter: transformers needs peft beside it.")
        if not base:
            say.append("`BASE` is the model that it was trained on, the whole of it.")
    return [*say, "", *_code("python", text), "", "On a vLLM server:", "", *_code("bash", serve)]


def _has_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").exists():
        return True
    try:
        return bool(json.loads((folder / "tokenizer_config.json").read_text("utf-8")).get("chat_template"))
    except (OSError, ValueError):
        return False


def _code(language: str, text: str) -> list[str]:
    return [f"```{language}", *text.strip().splitlines(), "```"]


_CHAT = f"""
from transformers import pipeline

generate = pipeline("text-generation", model="{REPOSITORY}")
messages = [{{"role": "user", "content": "What is a mutex?"}}]
print(generate(messages, max_new_tokens=256)[0]["generated_text"][-1]["content"])
"""
_TEXT = f"""
from transformers import pipeline

generate = pipeline("text-generation", model="{REPOSITORY}")
print(generate("Once upon a time", max_new_tokens=64)[0]["generated_text"])
"""
_REWARD = f"""
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{REPOSITORY}")
model = AutoModelForSequenceClassification.from_pretrained("{REPOSITORY}")
text = "A prompt and its response, as the chat template writes them"
with torch.no_grad():
    print(model(**tokenizer(text, return_tensors="pt")).logits[0, 0].item())
"""

# -- tables ----------------------------------------------------------------------------------------------------


def _results(results: Mapping[str, Any]) -> list[str]:
    """Tables of held-out rows, of training batches, and of the run."""
    known = {name: value for name, value in results.items() if value is not None}
    held_out = {n: v for n, v in known.items() if n.startswith(OF_ROWS)}
    training = {n: v for n, v in known.items() if n.startswith(OF_BATCHES) and n != "training time"}
    rest = {n: v for n, v in known.items() if n not in held_out and n not in training}
    lines: list[str] = []
    for title, values in (("Held-out rows", held_out), ("Training batches", training), ("The run", rest)):
        if values:
            lines += [f"### {title}", "", *_table("measure", values), ""]
        elif values is held_out and "training: loss" in known:  # not for methods that learn from their own samples
            lines += ["No row was held out, so how it does on unseen rows is not known.", ""]
    return lines[:-1]


def _table(name: str, values: Mapping[str, Any]) -> list[str]:
    rows = [f"| {key} | {_cell(value)} |" for key, value in values.items() if value is not None]
    return [f"| {name} | value |", "| --- | --- |", *rows]


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
