"""Weights without contents: a model before each of several processes has read the part of it that it will hold.

A placeholder has the shape and the dtype of a weight and the memory of one number, NaN, so that whatever computes with
it by mistake shows. Its parameter carries its :class:`Contents`. Weights of a single row (norms, biases, scalar heads)
are never placeholders: they are small, and code that copies or changes them needs no case of its own.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from prefopt.model.checkpoint import ModelOrigin, StoredTensor, WeightFiles, trace_origin
from prefopt.model.supported import model_errors

FromFirst = Callable[[Callable[[], PreTrainedModel], Callable[[], PreTrainedModel]], PreTrainedModel]
"""Gives the model that the first function loads, called on the first of several processes; the others get
placeholders. The second one gives the same model on the meta device."""
CHUNK = 4096
"""Rows that are compared at once."""


@dataclass(frozen=True, slots=True)
class Contents:
    """Where the contents of a parameter are: in the tensor ``name`` of a file, or, where ``stored`` is None, in the
    memory of the first process. Rows that the parameter has beyond those are zero."""

    name: str
    stored: StoredTensor | None


@dataclass(frozen=True, slots=True)
class Unread:
    """A weight whose ``contents`` are still to be read; ``held`` by the first process where they are in no file."""

    contents: Contents
    held: torch.Tensor | None


def placeholder(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of this shape without contents, on the CPU."""
    value = float("nan") if dtype.is_floating_point else 0
    return torch.full((), value, dtype=dtype).expand(tuple(shape))


def is_placeholder(tensor: torch.Tensor) -> bool:
    """Whether a tensor has no contents."""
    return tensor.numel() > 1 and not any(tensor.stride())


def deferred(shape: Sequence[int]) -> bool:
    """Whether a weight of this shape is to be a placeholder."""
    return len(shape) > 1 and shape[0] > 1


def cast_to(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``tensor.to(dtype)``; of a placeholder, another one."""
    return placeholder(tensor.shape, dtype) if is_placeholder(tensor) else tensor.to(dtype)


def contents_of(parameter: torch.Tensor) -> Contents | None:
    """Where the contents of a parameter are; None where it has them."""
    return cast(Contents | None, getattr(parameter, "prefopt_contents", None))


def set_contents(parameter: Any, contents: Contents) -> None:
    """Record where the contents of a parameter are."""
    parameter.prefopt_contents = contents


def empty(parameter: torch.nn.Parameter, contents: Contents) -> None:
    """Make a placeholder of a parameter."""
    parameter.data = placeholder(parameter.shape, parameter.dtype)
    set_contents(parameter, contents)


def make_room(parameter: Any) -> None:
    """Make a parameter an ordinary one, for contents that are in none of the places that were recorded."""
    if contents_of(parameter) is not None:
        parameter.data = torch.zeros(parameter.shape, dtype=parameter.dtype)
        parameter.prefopt_contents = None


def without_contents(model: torch.nn.Module) -> bytes:
    """A model, pickled, with placeholders for its weights; ``model`` stays as it is, with weights that are recorded as
    those of the first process. The bytes are for other processes of the same run alone."""
    for name, parameter in model.named_parameters():
        if deferred(parameter.shape):
            set_contents(parameter, Contents(name, None))
    data = io.BytesIO()
    _Pickler(data).dump(model)
    return data.getvalue()


class _Pickler(pickle.Pickler):
    def reducer_override(self, found: Any) -> Any:
        if isinstance(found, torch.nn.Parameter) and (contents := contents_of(found)) is not None:
            return _unpickled, (tuple(found.shape), found.dtype, found.requires_grad, contents)
        return NotImplemented


def _unpickled(
    shape: tuple[int, ...], dtype: torch.dtype, requires_grad: bool, contents: Contents
) -> torch.nn.Parameter:
    made = torch.nn.Parameter(placeholder(shape, dtype), requires_grad=requires_grad)
    set_contents(made, contents)
    return made


def take_unread(model: torch.nn.Module) -> dict[str, Unread]:
    """Move weights whose contents are still to be read to the meta device. Returns where they are, by name."""
    made: dict[int, torch.nn.Parameter] = {}
    found = {}
    for name, parameter in model.named_parameters():
        if (contents := contents_of(parameter)) is not None:
            held = None if is_placeholder(parameter) else parameter.data
            found[name] = Unread(contents, held)
            meta = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            made[id(parameter)] = torch.nn.Parameter(meta, requires_grad=parameter.requires_grad)
    for module in model.modules():
        for field, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(parameter) in made:
                setattr(module, field, made[id(parameter)])
    return found


def on_meta(kind: Any, name: str, config: PreTrainedConfig) -> PreTrainedModel:
    """The model that the auto class ``kind`` makes of a configuration, on the meta device."""
    with torch.random.fork_rng(devices=[]), model_errors(name), torch.device("meta"):
        return cast(PreTrainedModel, kind.from_config(copy.deepcopy(config), trust_remote_code=False))


def skeleton(load: Callable[[], PreTrainedModel], made: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """A :data:`FromFirst` that loads nothing: for sizes alone."""
    return made()


def must_be_whole(kind: Any, folder: str, config: PreTrainedConfig) -> bool:
    """Whether a class reads weights that are in no single tensor of the folder: it fuses or splits them, or has files
    of its own."""
    made = on_meta(kind, folder, config)
    files_of_its_own = any((Path(folder) / name).exists() for name in getattr(type(config), "extra_files", ()))
    return files_of_its_own or bool(_origin_on_meta(made, WeightFiles.read(folder), config).converted)


def _origin_on_meta(made: Any, files: WeightFiles, config: Any) -> ModelOrigin:
    from transformers.conversion_mapping import get_model_conversion_mapping

    made._weight_conversions = get_model_conversion_mapping(made)
    return trace_origin(made, files, config)


def load_placeholders(
    kind: Any, folder: str, *, config: PreTrainedConfig, dtype: torch.dtype, **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """What ``kind.from_pretrained(folder, ...)`` gives, with its information on weights that are missing or unlike the
    model's, but with placeholders for all large weights. Buffers are made, and small weights read, by transformers."""
    files = WeightFiles.read(folder)
    made: Any = on_meta(kind, folder, config)
    origin = _origin_on_meta(made, files, config)
    untouched = set(origin.untouched)
    places = {new: Contents(old, files.tensors[old]) for old, new in origin.renamed.items() if old not in untouched}
    for target, source in dict(made.all_tied_weights_keys or {}).items():
        # transformers ties them where the files hold the same twice, which it could not see here.
        if target in places and source in places and _same(places[target], places[source], dtype):
            del places[target]
    state = {
        c.name: placeholder(c.stored.shape, dtype) if deferred(c.stored.shape) else c.stored.read(c.name)
        for c in places.values()
        if c.stored is not None
    }
    inner = config if type(made.config) is type(config) else config.get_text_config()
    model, info = type(made).from_pretrained(None, config=inner, dtype=dtype, state_dict=state, **options)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in places and deferred(parameter.shape):
            empty(parameter, places[name])
    for name, buffer in list(model.named_buffers()):
        stored = places[name].stored if name in places else None
        if stored is not None and deferred(buffer.shape):
            owner, _, field = name.rpartition(".")
            setattr(model.get_submodule(owner), field, stored.read(places[name].name).to(buffer.dtype))
    if model.can_generate():
        hub = dict.fromkeys(["cache_dir", "proxies", "token", "revision"])
        local = {"force_download": False, "local_files_only": True, "subfolder": "", "trust_remote_code": False}
        model.adjust_generation_fn(None, True, False, folder, **hub, **local)
    return model, info


def _same(one: Contents, other: Contents, dtype: torch.dtype) -> bool:
    """Whether two weights have the same contents in ``dtype``; a few rows of them are in memory."""
    assert one.stored is not None and other.stored is not None
    if one.stored.shape != other.stored.shape:
        return False
    rows = (slice(start, start + CHUNK) for start in range(0, one.stored.shape[0], CHUNK))
    return all(
        torch.equal(one.stored.read(one.name, part).to(dtype), other.stored.read(other.name, part).to(dtype))
        for part in rows
    )


def carry_contents(before: torch.Tensor, after: Any) -> None:
    """Record that ``after``, which has more rows, has the contents of ``before``, if that is to be read yet."""
    if (contents := contents_of(before)) is not None:
        if is_placeholder(before):
            empty(after, contents)
        set_contents(after, contents)
