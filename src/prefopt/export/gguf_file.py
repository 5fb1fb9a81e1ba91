"""GGUF files: written tensor by tensor, and read back by transformers.

Matrices are stored in the type asked for, vectors and positions in float32, as llama.cpp's own converter does it.
"""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from prefopt.core.files import aside_of, output_errors
from prefopt.data.tokenizer import Tokenizer
from prefopt.errors import ModelError, first_line
from prefopt.export.gguf_tensors import GgufArchitecture, tensors_of
from prefopt.export.gguf_tokenizer import GgufVocabulary
from prefopt.model.architectures import transformers_log_level, vocabulary_size
from prefopt.model.load import quiet_loading

TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
"""GGUF's names of the types of matrices."""
_FILE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 32, "q8_0": 7}
BLOCK = 32
"""Weights that share a scale in q8_0; rows that are no multiple of it are stored in float16."""
_POSITIONS = ("position_embd.weight", "rope_freqs.weight")

Stored = npt.NDArray[Any]


def write_gguf(
    path: Path,
    model: Any,
    architecture: GgufArchitecture,
    vocabulary: GgufVocabulary,
    *,
    dtype: str,
    name: str,
) -> None:
    """Write a causal model in float32 to ``path``, which appears whole or not at all.

    ``model`` is one of :data:`prefopt.export.gguf_tensors.ARCHITECTURES`. Raises :class:`ModelError` for weights that
    the architecture has no place for, or that are too large for ``dtype``.
    """
    import gguf

    config = model.config.get_text_config()
    added = dict(architecture.added(config))
    tensors = [*tensors_of(model, architecture)]
    writer: Any = gguf.GGUFWriter(None, architecture.name)
    _add_metadata(writer, architecture, config, dtype, name)
    _add_vocabulary(writer, vocabulary)
    for target, array in added.items():
        writer.add_tensor_info(target, array.shape, array.dtype, array.nbytes)
    for target, weight, ours in tensors:
        shape = architecture.convert(config, ours, np.zeros(weight.shape, np.float32)).shape
        writer.add_tensor_info(target, *_layout(target, shape, dtype))
    aside = aside_of(path)
    with output_errors(path):
        try:
            writer.write_header_to_file(aside)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for array in added.values():
                writer.write_tensor_data(array)
            for target, weight, ours in tensors:  # one after the other: of a large model only one is in memory twice
                value = architecture.convert(config, ours, _numbers(weight))
                writer.write_tensor_data(_stored(target, value, dtype))
            writer.close()
            aside.replace(path)
        finally:
            writer.close()
            aside.unlink(missing_ok=True)


def _numbers(weight: torch.Tensor) -> npt.NDArray[np.float32]:
    found: npt.NDArray[np.float32] = weight.float().cpu().numpy()
    return found


def _add_metadata(writer: Any, architecture: GgufArchitecture, config: Any, dtype: str, name: str) -> None:
    import gguf

    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(_FILE_TYPES[dtype])
    if dtype == "q8_0":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in architecture.metadata(config).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"{architecture.name}.{key}", value)


def _add_vocabulary(writer: Any, vocabulary: GgufVocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    for key, value in vocabulary.values.items():
        add = {int: writer.add_uint32, bool: writer.add_bool, str: writer.add_string}[type(value)]
        add(f"tokenizer.ggml.{key}", value)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def _type_of(target: str, shape: Sequence[int], dtype: str) -> str:
    """The type that a tensor is stored in where matrices are in ``dtype``."""
    if len(shape) < 2 or target in _POSITIONS:
        return "float32"
    return "float16" if dtype == "q8_0" and shape[-1] % BLOCK else dtype


def _layout(target: str, shape: tuple[int, ...], dtype: str) -> tuple[tuple[int, ...], Any, int, Any]:
    """Shape, numpy type, bytes and GGUF type of a stored tensor; blocks are bytes to numpy."""
    import gguf

    kind = gguf.GGMLQuantizationType[TYPES[_type_of(target, shape, dtype)]]
    if kind.name in ("F32", "F16"):
        plain = np.dtype(np.float32 if kind.name == "F32" else np.float16)
        return shape, plain, math.prod(shape) * plain.itemsize, None
    in_bytes = gguf.quants.quant_shape_to_byte_shape(shape, kind)
    return in_bytes, np.dtype(np.uint8), math.prod(in_bytes), kind


def _stored(target: str, value: npt.NDArray[np.float32], dtype: str) -> Stored:
    """A tensor as it is stored."""
    import gguf

    dtype = _type_of(target, value.shape, dtype)
    if dtype == "float16" and np.abs(value).max(initial=0.0) > np.finfo(np.float16).max:
        raise ModelError(f"{target} has weights beyond float16's largest number: give --dtype bfloat16 or float32")
    found: Stored = gguf.quants.quantize(np.ascontiguousarray(value), gguf.GGMLQuantizationType[TYPES[dtype]])
    return found


@torch.no_grad()
def round_weights(model: torch.nn.Module, dtype: str) -> None:
    """Round the matrices of ``model`` in place as :func:`write_gguf` stores them."""
    import gguf

    transposed = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    for name, weight in model.named_parameters():
        if weight.ndim < 2 or name.endswith(("wpe.weight", "embed_positions.weight")) or dtype == "float32":
            continue
        rows = _numbers(weight.T if name in transposed else weight)
        kind = gguf.GGMLQuantizationType[TYPES[_type_of(name, rows.shape, dtype)]]
        plain = gguf.quants.dequantize(_stored(name, rows, dtype), kind)
        found = torch.from_numpy(np.ascontiguousarray(plain)).view(rows.shape)
        weight.copy_(found.T if name in transposed else found)


def read_gguf(path: Path, config: Any, device: torch.device) -> torch.nn.Module | str:
    """The model in a GGUF file as transformers reads it, in float32, or why it cannot read it. Sizes are those
    of ``config``: transformers does not take all of them from the file."""
    kind: Any = AutoModelForCausalLM
    try:
        with quiet_loading(), transformers_log_level(logging.CRITICAL), redirect_stderr(io.StringIO()):  # its bar
            model: torch.nn.Module = kind.from_pretrained(
                str(path.parent), gguf_file=path.name, config=config, dtype=torch.float32
            )
    except Exception as error:  # of any class: architectures that its reader does not know
        return first_line(error)
    return model.to(device).eval()


def rows_of(model: Any, tokenizer: Tokenizer) -> int:
    """Rows of the embedding. Raises :class:`ModelError` where the tokenizer has more tokens."""
    rows = vocabulary_size(model)
    if len(tokenizer) > rows:
        raise ModelError(f"the tokenizer has {len(tokenizer)} tokens, and the model's embedding {rows} rows")
    return int(rows)
