"""``prefopt export``: a model in the form that a server takes, scored before and after."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prefopt.config.export import ExportConfig
from prefopt.core.model_folder import NOT_QUANTISED, quantisation_on_record
from prefopt.data.tokenizer import Tokenizer
from prefopt.errors import ConfigError, ModelError, RunError
from prefopt.export.adapter_folder import max_rank, text_options, why_not_served, write_adapter
from prefopt.export.checks import check_export, find_converter
from prefopt.export.gguf_file import TYPES, read_gguf, round_weights, rows_of, write_gguf
from prefopt.export.gguf_tensors import GgufArchitecture, architecture_of, config_in_file, tensors_of
from prefopt.export.gguf_tokenizer import GgufVocabulary, vocabulary_of
from prefopt.export.llama_cpp import RUNTIME, LlamaCpp, convert, has_runtime
from prefopt.export.modelfile import Frames, frames_of, modelfile
from prefopt.export.reward_folder import load_reward, reload, rewards, write_reward
from prefopt.export.scores import Difference, Floats, Prompts, Scored, stored_prompts, token_logprobs
from prefopt.export.serving import (
    ExportedModel,
    gguf_commands,
    lora_commands,
    merged_commands,
    ollama_commands,
    paragraphs,
    reward_commands,
)
from prefopt.generate.model_io import SampledModel, decode, renderer_for
from prefopt.model.architectures import causal_model
from prefopt.model.load import base_and_adapter, load_config, load_model
from prefopt.model.merge import ROUNDING, load_merged, merge_adapter
from prefopt.model.precision import DTYPES, resolve_device
from prefopt.model.save import GENERATION_CONFIG
from prefopt.model.scalar import shift_of

ORDER = 1e-3
"""Nats by which log-probabilities in float32 may differ where sums are taken in another order."""
NOT_SCORED = "the file was not scored: install llama-cpp-python (pip install 'prefopt[llama-cpp]') and export again"


def run(config: ExportConfig) -> ExportedModel:
    """Export a model as ``config`` says. Raises :class:`prefopt.errors.UserError`; :class:`RunError` where the export
    does not compute what the model does: its files stay, for a look at them."""
    check_export(config)
    output = Path(config.output)
    formats = {"merged": _merged, "vllm-lora": _vllm_lora, "reward-server": _reward_server}
    done = formats.get(config.to, _gguf)(config, output, resolve_device(config.device))
    done.write(config.model)
    if wrong := [score for score in done.scored if not score.same]:
        raise RunError(
            f"{output} does not compute what {config.model} does: {wrong[0].line()}; do not serve it, and report this"
        )
    return done


def _scored(by: str, before: list[Floats], after: list[Floats], rounded: list[Floats] | None = None) -> Scored:
    """Values in float32 before and after. ``rounded``: those of the model with weights rounded to the format's type,
    from which nothing but the order of sums may part the values after."""
    found = Difference.between(before, after)
    apart = found if rounded is None else Difference.between(rounded, after)
    rounding = None if rounded is None else Difference.between(before, rounded).largest
    return Scored(by, "log-probabilities", found, ORDER, apart.largest <= ORDER, rounding, prompts=len(before))


# -- folders ---------------------------------------------------------------------------------------------------


def _merged(config: ExportConfig, output: Path, device: torch.device) -> ExportedModel:
    base, adapter = base_and_adapter(config.model, config.adapter)
    if adapter is None:
        raise ConfigError(
            f"{config.model} is a whole model already: servers take it as it is; --to gguf and others convert"
        )
    source = SampledModel(config.model, adapter=config.adapter, dtype="float32", device=config.device)
    prompts = stored_prompts(config.prompts, source.tokenizer, source.context)
    before = token_logprobs(_language_model(base, adapter, device), prompts.ids)
    assert config.dtype is not None
    dtype = DTYPES[config.dtype]
    report = merge_adapter(adapter, output, model=base if config.adapter else None, dtype=dtype, device=device)
    after = token_logprobs(_language_model(str(output), None, device), prompts.ids)
    found = Difference.between(before, after)
    allowed = max(ORDER, ROUNDING[dtype] * float(np.abs(np.concatenate(before)).mean()))
    score = Scored("transformers", "log-probabilities", found, allowed, found.mean <= allowed, prompts=len(before))
    commands = merged_commands(str(output), config.dtype)
    rounding = "the commands serve it in bfloat16, and it was scored in float32, which --dtype float32 of vLLM keeps"
    notes = [*report.lines(), *([rounding] if config.dtype == "float32" else [])]
    return ExportedModel(output, config.to, config.dtype, commands, [score], notes)


def _language_model(folder: str, adapter: str | None, device: torch.device) -> Any:
    """The model in float32, on its base as it is."""
    found: Any = load_model(folder, dtype=torch.float32, device=device, adapter=adapter, quantise=NOT_QUANTISED)
    return found.requires_grad_(False).eval()


def _vllm_lora(config: ExportConfig, output: Path, device: torch.device) -> ExportedModel:
    base, adapter = base_and_adapter(config.model, config.adapter)
    if adapter is None:
        raise ConfigError(f"{config.model} is a whole model: vLLM serves it as it is; give an adapter, or --adapter")
    if why := why_not_served(adapter, load_config(base).get_text_config()):
        raise ModelError(f"{adapter} cannot be served by vLLM beside its model: {why}; merge it (--to merged)")
    source = SampledModel(config.model, adapter=config.adapter, dtype="float32", device=config.device)
    prompts = stored_prompts(config.prompts, source.tokenizer, source.context)
    wrapped = _language_model(base, adapter, device)
    before = token_logprobs(wrapped, prompts.ids)
    rank, rewritten = write_adapter(adapter, output, wrapped)
    del wrapped
    after = token_logprobs(_language_model(base, str(output), device), prompts.ids)
    notes = paragraphs(
        [
            f"layers had ranks or alphas of their own: all have rank {rank} now, B scaled" if rewritten else None,
            _quantised_note(adapter),
            "the name of the model on the server is aligned; the model without the adapter keeps its own",
        ]
    )
    ends = (output / GENERATION_CONFIG).is_file()
    named = base if not config.adapter else config.model
    text = text_options(base, output, source.tokenizer)
    commands = lora_commands(named, str(output), max_rank(rank), ends=ends, text=text)
    return ExportedModel(output, config.to, None, commands, [_scored("transformers", before, after)], notes)


def _quantised_note(adapter: str | None) -> str | None:
    how = quantisation_on_record(adapter) if adapter is not None else None
    return f"the adapter was trained on a base quantised to {how}; this is for the base as it is" if how else None


def _reward_server(config: ExportConfig, output: Path, device: torch.device) -> ExportedModel:
    if config.adapter is not None:
        raise ConfigError(
            "--adapter is for language models: name the reward model's adapter itself, which names its base"
        )
    model, tokenizer = load_reward(config.model, device)
    prompts = stored_prompts(config.prompts, tokenizer, getattr(model.config, "max_position_embeddings", None))
    before = rewards(model.eval(), prompts.ids)
    assert config.dtype is not None
    shift = shift_of(model)
    write_reward(model, tokenizer, output, DTYPES[config.dtype])
    rounded = rewards(model, prompts.ids)
    del model
    found = _scored("transformers", before, rewards(reload(output).to(device), prompts.ids), rounded)
    score = Scored("transformers", "rewards", found.difference, ORDER, found.same, found.rounding, prompts=len(before))
    notes = paragraphs(
        [
            "the reward is the number of POST /classify or /pooling for a conversation that the chat template wrote",
            f"the mean reward was shifted in training: subtract {shift:g} from the server's number" if shift else None,
            "vLLM before 0.12 names the option that keeps the sigmoid off --override-pooler-config and activation",
            "TGI serves no sequence classifiers",
        ]
    )
    return ExportedModel(output, config.to, config.dtype, reward_commands(str(output), config.dtype), [score], notes)


# -- GGUF ------------------------------------------------------------------------------------------------------


def _gguf(config: ExportConfig, output: Path, device: torch.device) -> ExportedModel:
    assert config.dtype is not None
    converter = find_converter(config.converter)
    source = SampledModel(config.model, adapter=config.adapter, dtype="float32", device=config.device)
    prompts = stored_prompts(config.prompts, source.tokenizer, source.context)
    model = _whole_model(source, device)
    plan = _plan(model, source.tokenizer) if config.converter is None else f"--converter {config.converter} is given"
    if isinstance(plan, str) and converter is None:
        raise ModelError(f"--to {config.to}: {plan}; give --converter, llama.cpp's convert_hf_to_gguf.py")
    before = token_logprobs(model, prompts.ids)
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"model-{TYPES[config.dtype].lower()}.gguf"
    if isinstance(plan, str):
        assert converter is not None
        _convert(converter, config, source, path, device)
        notes = [f"written by {converter} ({plan})"]
    else:
        name = Path(config.adapter or config.model).name
        write_gguf(path, model, *plan, dtype=config.dtype, name=name)
        notes = list(plan[1].notes)
    round_weights(model, config.dtype)
    rounded = token_logprobs(model, prompts.ids)
    text_config = config_in_file(model.config)
    del model
    read = read_gguf(path, text_config, device)
    scored, more = _read_back(path, read, prompts, before, rounded, config.dtype, source.context)
    notes += [*more, *paragraphs([_quantised_note(source.adapter)])]
    commands = gguf_commands(str(path), source.context)
    if config.to == "ollama":
        notes += _write_modelfile(output, path, source)
        commands = ollama_commands(str(output / "Modelfile"))
    return ExportedModel(output, config.to, config.dtype, commands, scored, notes)


def _plan(model: Any, tokenizer: Tokenizer) -> tuple[GgufArchitecture, GgufVocabulary] | str:
    """What prefopt writes of a model, or why it cannot."""
    architecture = architecture_of(model.config.get_text_config())
    if isinstance(architecture, str):
        return architecture
    try:
        list(tensors_of(model, architecture))
        return architecture, vocabulary_of(tokenizer, rows_of(model, tokenizer))
    except ModelError as error:
        return str(error)


def _whole_model(source: SampledModel, device: torch.device) -> Any:
    """The causal model in float32, its adapter merged in."""
    if source.adapter is None:
        return causal_model(_language_model(source.source, None, device))
    found: Any = load_merged(source.source, source.adapter, dtype=torch.float32, device=device)
    return found.requires_grad_(False).eval()


def _convert(converter: Path, config: ExportConfig, source: SampledModel, path: Path, device: torch.device) -> None:
    """llama.cpp's converter reads folders: an adapter is merged into one first, which is removed."""
    assert config.dtype is not None
    if source.adapter is None:
        convert(converter, Path(source.source), path, config.dtype)
        return
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".merged-") as folder:
        merged = Path(folder) / "model"
        merge_adapter(source.adapter, merged, model=source.source, dtype=torch.float32, device=device)
        convert(converter, merged, path, config.dtype)


def _read_back(
    path: Path,
    read: torch.nn.Module | str,
    prompts: Prompts,
    before: list[Floats],
    rounded: list[Floats],
    dtype: str,
    context: int | None,
) -> tuple[list[Scored], list[str]]:
    """The file's scores by transformers' reader, and by llama.cpp where it is installed, with notes."""
    scored, notes = [], []
    if isinstance(read, str):
        notes.append(f"transformers does not read this file ({read})")
    else:
        scored.append(_scored("transformers' reader of GGUF", before, token_logprobs(read, prompts.ids), rounded))
    if has_runtime():
        score, note = _by_llama_cpp(path, prompts, before, rounded, dtype, context)
        scored.append(score)
        notes += paragraphs([note])
    else:
        notes.append(
            "metadata and tokenizer were not tried: install llama-cpp-python, with which the export is scored by"
            " llama.cpp itself"
            if scored
            else NOT_SCORED
        )
    return scored, notes


def _by_llama_cpp(
    path: Path, prompts: Prompts, before: list[Floats], rounded: list[Floats], dtype: str, context: int | None
) -> tuple[Scored, str | None]:
    longest = max(map(len, prompts.ids))
    runtime = LlamaCpp(path, min(context or longest, max(longest, 64)))
    try:
        after, same = runtime.logprobs(prompts.ids), runtime.tokenised(prompts)
    finally:
        runtime.close()
    apart = Difference.between(rounded, after)
    found = Scored(
        runtime.name,
        "log-probabilities",
        Difference.between(before, after),
        RUNTIME[dtype],
        apart.mean <= RUNTIME[dtype],
        Difference.between(before, rounded).largest,
        same,
        len(before),
    )
    other = len(before) - same
    return (
        found,
        f"llama.cpp makes other tokens of {other} of {len(before)} prompts than the tokenizer" if other else None,
    )


def _write_modelfile(output: Path, path: Path, source: SampledModel) -> list[str]:
    """Write ``Modelfile``; returns notes."""
    frames = frames_of(source.tokenizer)
    stops = source.stop_ids(renderer_for(source.tokenizer))
    words = [decode(source.tokenizer, [stop]) for stop in stops]
    ends = [word for word in words if word and len(word.splitlines()) == 1 and word == word.strip("\r\n")]
    text = modelfile(path.name, frames, ends, source.context, source.generation_config)
    (output / "Modelfile").write_text(text, "utf-8")
    left = f"end tokens left out of the Modelfile, which takes no line ends in them: {len(words) - len(ends)}"
    return [*([left] if len(ends) < len(words) else []), *_template_notes(source, frames, text)]


def _template_notes(source: SampledModel, frames: Frames | None, text: str) -> list[str]:
    """What differs between the chat template and that of the Modelfile."""
    if not source.tokenizer.chat_template:
        return ["the model has no chat template: Ollama continues text with it"]
    if "TEMPLATE" not in text:
        return [
            "the chat template cannot be written in Go's language, so the Modelfile has none: Ollama takes the one that"
            " it recognises; look with ollama show --modelfile, and write TEMPLATE yourself"
        ]
    return ["the chat template takes no system turn, and Ollama drops one"] if frames and frames.system is None else []
