"""Merging an adapter into its model: a folder that needs no PEFT, checked to give the same outputs.

Every layer is merged in float32 and rounded once, to the dtype in which it is saved. The model is in memory once.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from prefopt.core.files import output_errors
from prefopt.core.hub import import_bitsandbytes
from prefopt.core.model_folder import (
    NOT_QUANTISED,
    base_of,
    is_adapter,
    is_own,
    quantisation_on_record,
    require_adapter,
)
from prefopt.core.shown import ShownLines
from prefopt.data.chat.ends import end_of_turn
from prefopt.data.chat.render import Renderer
from prefopt.data.tokenizer import Tokenizer, has_tokenizer, load_tokenizer
from prefopt.errors import ConfigError, ModelError, RunError
from prefopt.model.adapter import peft_warnings_off
from prefopt.model.architectures import causal_model, vocabulary_size
from prefopt.model.card import write_merged_card
from prefopt.model.checkpoint import WeightFiles, describe_untouched, origin_of
from prefopt.model.load import base_and_adapter, load_config, load_model, local_folder, quiet_loading
from prefopt.model.save import (
    add_end_tokens,
    apply_umask,
    end_tokens,
    repair_generation,
    save_weights,
    write_transformers4_fields,
)
from prefopt.model.supported import model_errors

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Relative difference of logits that rounding explains: float32 sums in another order (1e-7 a step); a bfloat16 weight
is within 2^-9 of itself, a float16 one within 2^-12, and layers add up."""
PROBES = (3, 24)
"""Random sequences whose logits are compared, and tokens of each."""


@dataclass(frozen=True, slots=True, repr=False)
class MergeReport(ShownLines):
    """Relative to the norm of the logits: ``difference`` of the merged model from the one with its adapter, ``effect``
    of the adapter. ``rounding``: how far the saved dtype moves the merged weights, relative to how far the adapter
    does. ``tensors``: number of tensors written; ``kept``: those that are in no weight of the language model. ``ends``:
    a line on end tokens that were added. ``quantised``: a line on a base that was quantised in training."""

    output: Path
    dtype: torch.dtype
    layers: int
    difference: float
    effect: float
    rounding: float
    untied: bool
    tensors: int
    kept: str | None
    ends: str | None = None
    quantised: str | None = None

    def lines(self) -> list[str]:
        """The report in lines."""
        kind = str(self.dtype).removeprefix("torch.")
        lines = [f"{self.layers} layers merged in float32, saved in {kind}"]
        if self.rounding > 0.01:
            lines.append(
                f"rounding to {kind} moves these weights {self.rounding:.2g} times as far as the adapter does; --dtype"
                " float32 keeps its change whole"
            )
        if self.untied:
            lines.append("the head shared the embedding's weights, and the adapter changes one: it has its own now")
        lines.append(
            f"logits differ from those of the model with its adapter by {self.difference:.0e} of their size; the"
            f" adapter changes them by {self.effect:.0e}"
        )
        lines += [self.quantised] if self.quantised else []
        if self.kept is not None:
            lines.append(f"kept as they are: {self.kept}")
        if self.effect == 0:
            lines.append("the adapter changes nothing: was it trained?")
        lines += [self.ends] if self.ends else []
        lines.append(
            f"written: {self.output}; loaded again, it has the same logits, and its {self.tensors} tensors have"
            " the same names"
        )
        return lines


def merge_adapter(
    adapter: str, output: str | Path, *, model: str | None = None, dtype: torch.dtype, device: torch.device
) -> MergeReport:
    """Write ``model`` (by default the one that the adapter names) with ``adapter`` merged in, its tokenizer, chat
    template and generation config to ``output``. Raises :class:`ModelError` for adapters and models that cannot be
    merged, :class:`RunError` where ``output`` exists, or the outputs are not those of the adapter."""
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RunError(f"--output {output} exists; name a new folder")
    source = local_folder(adapter)
    require_adapter(source)
    if model is not None and is_adapter(local_folder(model)):
        raise ConfigError(f"--model {model} is an adapter itself; leave it out, or name the model of both adapters")
    base = local_folder(model) if model is not None else base_and_adapter(adapter)[0]
    loading = _loading_dtype(base, dtype)
    how = quantisation_on_record(source)
    trained = _trained_logits(base, source, how, device) if how is not None else ""
    wrapped = _load(base, source, loading, device)
    causal = causal_model(wrapped)
    probes = _probes(causal)
    expected = _logits(wrapped, probes)
    with wrapped.disable_adapter():
        without = _logits(wrapped, probes)
    untied = _untie(causal)
    layers, rounding = _merge_layers(wrapped, dtype)
    with peft_warnings_off():
        merged = wrapped.merge_and_unload().to(dtype)
    own_head = _note_own_head(merged)
    found = _logits(merged, probes)
    difference, effect = _distance(found, expected), _distance(without, expected)
    if not difference <= ROUNDING[dtype]:
        raise ModelError(
            f"{adapter}: the merged model's logits differ by {difference:.1e} of their size, of which rounding explains"
            f" {ROUNDING[dtype]:.0e}; nothing was written: serve model and adapter side by side"
        )
    tokenizer = load_tokenizer(source if has_tokenizer(source) else base)
    repair_generation(merged)
    with output_errors(output), quiet_loading():
        save_weights(output, merged, dict(merged.state_dict()), dtype)
        tokenizer.save_pretrained(output)
        write_transformers4_fields(output, tokenizer)
        apply_umask(output)
    ends = add_end_tokens(output, _ends(source, tokenizer), tokenizer, merged)
    card, kind = Path(source) / "README.md", str(dtype).removeprefix("torch.")
    base_model = model or base_of(source)
    write_merged_card(output, model=base_model, adapter=adapter, card=card if is_own(card) else None, dtype=kind)
    origin, rows = origin_of(merged), vocabulary_size(merged)
    del merged, wrapped, causal
    saved = load_model(str(output), dtype=dtype, device=device).eval()
    if not (distance := _distance(_logits(saved, probes), found)) <= ROUNDING[dtype]:  # NaN too
        raise RunError(f"{output}: the saved model differs by {distance:.1e}; do not use it, and report this")
    tensors = _check_names(output, Path(base), own_head=own_head, rows=rows)
    kept = describe_untouched(origin) if origin is not None else None
    line = _from_trained(how, trained, found, probes) if how is not None else None
    return MergeReport(output, dtype, layers, difference, effect, rounding, untied, tensors, kept, ends, line)


def _trained_logits(base: str, adapter: str, how: str, device: torch.device) -> tuple[torch.Tensor, ...] | str:
    """Logits of the quantised base with its adapter and without, on the probes; or why it cannot be loaded."""
    try:
        wrapped = _load(base, adapter, torch.float32, device, quantise=how)
    except ConfigError as error:
        return str(error)
    probes = _probes(causal_model(wrapped))
    with_adapter = _logits(wrapped, probes)
    with wrapped.disable_adapter():
        return with_adapter, _logits(wrapped, probes)


def _from_trained(how: str, trained: tuple[torch.Tensor, ...] | str, merged: torch.Tensor, probes: torch.Tensor) -> str:
    """A line on how far the merged model is from the one that was trained on a quantised base: the root mean square of
    a token's difference in log-probability."""
    begin = f"trained on a base quantised to {how}: the merged model, on the base as it is, is"
    if isinstance(trained, str):
        return f"{begin} at a distance that cannot be measured here ({trained})"
    logp = [torch.log_softmax(x[:, :-1].double(), -1).gather(-1, probes[:, 1:, None]) for x in (merged, *trained)]
    distance, effect = (float((logp[i] - logp[1]).square().mean().sqrt()) for i in (0, 2))
    far = "; serve the quantised base with its adapter where that matters" if distance > effect else ""
    return f"{begin} {distance:.2g} nats per token from that model, whose adapter moves it by {effect:.2g}{far}"


def _probes(model: PreTrainedModel) -> torch.Tensor:
    return torch.randint(vocabulary_size(model), PROBES, generator=torch.Generator().manual_seed(0))


def load_merged(base: str, adapter: str, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The causal model in folder ``base`` with an adapter merged in, in memory. ``dtype`` should hold what the adapter
    changes: float32. Raises :class:`ModelError` as :func:`merge_adapter`."""
    wrapped = _load(base, adapter, dtype, device)
    _untie(causal_model(wrapped))
    with peft_warnings_off():
        merged: PreTrainedModel = wrapped.merge_and_unload()
    _note_own_head(merged)
    return merged


def _loading_dtype(base: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype to load the model in: wide enough for its files and for the output."""
    config: Any = load_config(base)
    if getattr(config, "quantization_config", None):
        raise ModelError(
            f"--model {base} is quantised: the adapter's change is smaller than its rounding and would be lost; give"
            " the model it was quantised from, or serve model and adapter side by side"
        )
    stored = config.get_text_config().dtype or config.dtype
    return torch.promote_types(stored if isinstance(stored, torch.dtype) else torch.float32, dtype)


def _load(base: str, adapter: str, dtype: torch.dtype, device: torch.device, *, quantise: str = NOT_QUANTISED) -> Any:
    """The model with the adapter on it; missing weights of the adapter are an error."""
    import_bitsandbytes()
    from peft import PeftConfig

    with model_errors(adapter):
        config: Any = PeftConfig.from_pretrained(adapter)
    if config.is_prompt_learning:
        raise ModelError(f"--adapter {adapter} is of the kind {config.peft_type.value}, which cannot be merged")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")
            wrapped: Any = load_model(base, dtype=dtype, device=device, adapter=adapter, quantise=quantise)
    except UserWarning as error:
        missing = " ".join(str(error).split())[:200]
        raise ModelError(f"--adapter {adapter} lacks weights for this model: {missing}") from error
    return wrapped.eval()


@torch.no_grad()
def _logits(model: Any, probes: torch.Tensor) -> torch.Tensor:
    """Float32 logits on the CPU, one sequence at a time."""
    device = next(model.parameters()).device
    return torch.cat([model(input_ids=row[None].to(device)).logits.float().cpu() for row in probes])


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Norm of the difference, relative to ``other``."""
    return float((one - other).norm() / other.norm())


def _untie(model: Any) -> bool:
    """Give the head its own weights where it is tied to the embedding and an adapter changes one of the two."""
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    if outputs is None:
        return False
    plain = [layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer for layer in (inputs, outputs)]
    if plain == [inputs, outputs] or plain[0].weight is not plain[1].weight:
        return False
    plain[1].weight = torch.nn.Parameter(plain[1].weight.detach().clone(), requires_grad=False)
    return True


def _note_own_head(model: Any) -> bool:
    """Whether the head has its own weights; if so, note it in the configuration."""
    outputs = model.get_output_embeddings()
    if outputs is None or outputs.weight is model.get_input_embeddings().weight:
        return False
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
    return True


@torch.no_grad()
def _merge_layers(wrapped: Any, dtype: torch.dtype) -> tuple[int, float]:
    """Merge each layer in float32, back in its loaded dtype; returns their number and the relative rounding error."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in wrapped.modules() if isinstance(module, BaseTunerLayer)]
    rounded = changed = 0.0
    for layer in layers:
        base: Any = layer.get_base_layer()
        types = {name: value.dtype for name, value in base.named_parameters()}
        base.float()
        before = {name: value.clone() for name, value in base.named_parameters()}
        with peft_warnings_off():
            layer.merge(safe_merge=True)
        for name, value in base.named_parameters():
            rounded += float((value.to(dtype).float() - value).norm() ** 2)
            changed += float((value - before[name]).norm() ** 2)
            value.data = value.data.to(types[name])
    return len(layers), math.sqrt(rounded / changed) if changed else 0.0


def _ends(adapter: str, tokenizer: Tokenizer) -> Sequence[int]:
    """End tokens of an adapter: those of its folder, else of the chat template."""
    ends = end_tokens(adapter)
    if ends is None and tokenizer.chat_template:
        ends = [i for i in [end_of_turn(Renderer(tokenizer))] if i is not None]
    return ends or ()


def _check_names(output: Path, base: Path, *, own_head: bool, rows: int) -> int:
    """Number of tensors written. Raises :class:`RunError` where names or shapes differ from the model's, except a head
    that now has its own weights, and embeddings that the adapter's tokenizer made grow to ``rows``."""
    found, expected = ({n: t.shape for n, t in WeightFiles.read(f).tensors.items()} for f in (output, base))
    for name, shape in expected.items():
        if len(shape) == 2 and shape[0] < rows and found.get(name) == (rows, shape[1]):
            expected[name] = (rows, shape[1])
    wrong = sorted(n for n in {*found, *expected} if found.get(n) != expected.get(n))
    if any(n in expected for n in wrong) or len(wrong) > own_head:
        raise RunError(
            f"{output}: {len(wrong)} tensors are not as in {base}, the first is {wrong[0]}; do not use it,"
            " and report this"
        )
    return len(found)
