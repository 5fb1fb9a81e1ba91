"""Pictures in packed rows: what a vision-language model is given beside token ids.

The features of a batch's pictures are computed once, by the class's own ``get_image_features`` in one call, whatever
the number of groups that a picture is in. They are handed to the class's forward
pass, which puts them in the place of the image tokens, in later layers too where the class does so (deepstack). All
responses to a prompt read them from the shared prefix. Positions are those of the class's own ``get_rope_index`` for
each response as a sequence of its own.
"""

from __future__ import annotations

import copy
import inspect
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from prefopt.data.chat.pictures import PictureProcessor
from prefopt.data.group import Pictures, Placed
from prefopt.data.pictures import of_bytes
from prefopt.data.tokenizer import load_tokenizer
from prefopt.errors import ModelError
from prefopt.model.architectures import body_of, takes_pictures, towers_of
from prefopt.model.kernels.blocks import Block, PictureBlocks
from prefopt.model.packing import ForwardPass
from prefopt.records import Picture

FAMILIES = frozenset(
    "gemma3 gemma4 idefics3 internvl llava mistral3 qwen2_5_vl qwen2_vl qwen3_5 qwen3_vl qwen3_vl_moe smolvlm".split()
)
"""Types of models that are given pictures: those that tests show to equal their class's own forward."""
BIDIRECTIONAL = {"gemma3": "all", "gemma4": "sliding"}
"""Types in which the image tokens of a picture see each other, and in which layers."""


def tower_names(model: PreTrainedModel) -> set[str]:
    """Names of the weights in :func:`towers_of`."""
    inside = {id(p) for tower in towers_of(model) for p in tower.parameters()}
    return {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in inside}


@dataclass(frozen=True, slots=True)
class EncodedPictures:
    """Features of different pictures: the class's ``output`` and ``grid``, the ``tokens`` that each has in it, and the
    place of each by its digest."""

    output: Any
    grid: torch.Tensor | None
    tokens: Sequence[int]
    places: Mapping[bytes, int]

    def of(self, pictures: Sequence[Placed]) -> tuple[Any, torch.Tensor | None]:
        """The output and grid of these pictures, in order; one may occur several times."""
        chosen = [self.places[p.picture.digest] for p in pictures]
        if chosen == list(range(len(self.tokens))):
            return self.output, self.grid
        starts = np.cumsum([0, *self.tokens])
        rows = torch.from_numpy(np.concatenate([np.arange(starts[i], starts[i + 1]) for i in chosen]))
        found = copy.copy(self.output)
        found.pooler_output = _selected(self.output.pooler_output, rows)
        if (deep := getattr(self.output, "deepstack_features", None)) is not None:
            found.deepstack_features = [_selected(layer, rows) for layer in deep]
        return found, None if self.grid is None else self.grid[chosen]


def _selected(features: Any, rows: torch.Tensor) -> Any:
    """Some rows of the features of image tokens: a tensor [..., H], or several that classes put end to end."""
    if isinstance(features, torch.Tensor):
        flat = features.flatten(0, -2)
        return flat[rows.to(flat.device)].reshape(-1, *features.shape[1:])
    return (_selected(torch.cat(list(features)), rows),)


class VisionInputs:
    """Inputs of one vision-language model for rows with pictures. Raises :class:`ModelError` for a model without a
    tower or a processor, such as a language model that was loaded without its tower."""

    def __init__(self, model: PreTrainedModel) -> None:
        name = type(model).__name__
        if not takes_pictures(model):
            raise ModelError(f"{name} takes no pictures, which some rows have: give a vision-language model")
        if model.config.model_type not in FAMILIES:
            raise ModelError(f"{name} is not given pictures yet; the families that are: {', '.join(sorted(FAMILIES))}")
        self.model = model
        self.body: Any = body_of(model)
        self.token_id, self.towers = _image_token(model), towers_of(model)
        self._encoded: EncodedPictures | None = None

    @cached_property
    def processor(self) -> PictureProcessor:
        """The processor in the model's folder."""
        source = str(self.model.name_or_path)
        return PictureProcessor(source, load_tokenizer(source))

    def arguments(self, row: ForwardPass, *, shared: bool) -> dict[str, Any]:
        """Arguments of the body's forward pass for a row with pictures; ``shared``: the row has shared prefixes."""
        assert row.host_ids is not None
        device, named = row.ids.device, inspect.signature(self.body.forward).parameters
        encoded = self._encoded or self.encode([(row.host_ids, row.pictures)], device)
        output, grid = encoded.of(row.pictures)
        images = row.host_ids == self.token_id
        found: dict[str, Any] = {"mm_encoder_outputs": {"image": output}}
        if not shared:
            types = torch.from_numpy(images.astype(np.int64))[None].to(device)
            found |= {name: types for name in ("mm_token_type_ids", "token_type_ids") if name in named}
            return found | (
                {"image_grid_thw": grid.to(device)} if "image_grid_thw" in named and grid is not None else {}
            )
        if hasattr(self.body, "get_rope_index"):
            found["position_ids"] = self._positions(row, images, grid).to(device)
        if (blocks := self._blocks(row, images)) is not None:
            found["prefix_blocks"] = blocks
        return found

    def encode(self, rows: Iterable[tuple[np.ndarray, Sequence[Placed]]], device: torch.device) -> EncodedPictures:
        """Encode the pictures of rows, each with its ids [T] on the host, in one call; a picture that occurs again is
        not encoded again. Raises :class:`ModelError` where an image token stands for none of the pictures."""
        pictures: dict[bytes, Picture] = {}
        tokens: list[int] = []
        for ids, many in rows:
            images = ids == self.token_id
            counts = [int(images[p.start : p.stop].sum()) for p in many]
            if int(images.sum()) != sum(counts):
                raise ModelError("a response holds the token in whose place a picture's features go; remove that row")
            for placed, count in zip(many, counts, strict=True):
                if placed.picture.digest not in pictures:
                    pictures[placed.picture.digest] = placed.picture
                    tokens.append(count)
        pixels = self.processor.pixels(list(pictures.values()))
        places = {digest: n for n, digest in enumerate(pictures)}
        return EncodedPictures(self.features(pixels, device), pixels.get("image_grid_thw"), tokens, places)

    @contextmanager
    def encoding(self, passes: Sequence[ForwardPass], most: Callable[[int], int] | None) -> Iterator[None]:
        """In this block :meth:`arguments` finds the features of all passes computed.

        ``most``, where all ranks must call towers together: the largest of their numbers. A rank without pictures then
        encodes one for nothing, and all passes of all ranks depend on features, so that each goes backward alike.
        """
        rows = [(row.host_ids, row.pictures) for row in passes if row.host_ids is not None and row.pictures]
        device = passes[0].ids.device
        together = most is not None and most(len(rows)) > 0
        hook = None
        try:
            if rows:
                self._encoded = self.encode(rows, device)
            if together:
                encoded = self._encoded
                output = encoded.output if encoded else self.features(self.processor.pixels([_blank()]), device)
                used = tree_leaves((output.pooler_output, getattr(output, "deepstack_features", None)))
                zero = torch.stack([0 * x.sum() for x in used if isinstance(x, torch.Tensor)]).sum()
                words: Any = self.model.get_input_embeddings()
                hook = words.register_forward_hook(lambda module, given, out: out + zero.to(out.dtype))
            yield
        finally:
            self._encoded = None
            if hook is not None:
                hook.remove()

    def of_prompts(self, ids_NL: np.ndarray, pictures: Sequence[Pictures], device: torch.device) -> dict[str, Any]:
        """Arguments of the class's own forward pass for N prompts of one length, each with its pictures, of which there
        is one at least. Positions [3, N, L], where the class counts them so, are among them."""
        images = ids_NL == self.token_id
        encoded = self.encode(zip(ids_NL, pictures, strict=True), device)
        output, grid = encoded.of([placed for many in pictures for placed in many])
        both = (inspect.signature(module.forward).parameters for module in (self.model, self.body))
        named = set.intersection(*map(set, both))
        types = torch.from_numpy(images.astype(np.int64))
        found: dict[str, Any] = {"mm_encoder_outputs": {"image": output}}
        found |= {name: types.to(device) for name in ("mm_token_type_ids", "token_type_ids") if name in named}
        if hasattr(self.body, "get_rope_index"):
            given = {"mm_token_type_ids": types, "image_grid_thw": grid}
            found["position_ids"] = self.body.get_rope_index(torch.from_numpy(ids_NL), **given)[0].to(device)
        return found

    def own_arguments(self, ids: torch.Tensor, pictures: Sequence[Picture]) -> dict[str, torch.Tensor]:
        """What the class's own forward pass is given beside ``ids`` [1, L], a whole sequence with these pictures."""
        if not pictures:
            return {}
        named = inspect.signature(self.model.forward).parameters
        types = (ids == self.token_id).long()
        found = {**self.processor.pixels(pictures), "mm_token_type_ids": types, "token_type_ids": types}
        return {name: value.to(ids.device) for name, value in found.items() if name in named}

    def features(self, pixels: dict[str, Any], device: torch.device) -> Any:
        """The features of pictures as the class's own forward pass takes them, without gradients where no weight of a
        tower trains."""
        named = inspect.signature(inspect.unwrap(type(self.body).get_image_features)).parameters
        given = {name: value.to(device) for name, value in pixels.items() if name in named}
        trains = any(p.requires_grad for tower in self.towers for p in tower.parameters())
        with nullcontext() if trains else torch.no_grad():
            return self.body.get_image_features(**given, return_dict=True)

    def _positions(self, row: ForwardPass, images: np.ndarray, grid: torch.Tensor | None) -> torch.Tensor:
        """[3, 1, T] positions of a row, each response as a sequence of its own."""
        assert row.host_ids is not None
        found = torch.empty(3, 1, len(row.host_ids), dtype=torch.long)
        for start, stop, origin, prefix in row.segments:
            where = np.concatenate([np.arange(origin, origin + prefix), np.arange(start, stop)])
            inside = [n for n, p in enumerate(row.pictures) if p.start in {*where.tolist()}]
            ids, types = (torch.from_numpy(x[where].astype(np.int64))[None] for x in (row.host_ids, images))
            some = grid[inside] if grid is not None and inside else None
            positions, _ = self.body.get_rope_index(ids, mm_token_type_ids=types, image_grid_thw=some)
            found[:, :, start:stop] = positions[:, :, prefix:]
        return found

    def _blocks(self, row: ForwardPass, images: np.ndarray) -> PictureBlocks | None:
        """The runs of image tokens that see each other."""
        layers = BIDIRECTIONAL.get(self.model.config.model_type)
        text = self.model.config.get_text_config()
        if layers is None or (layers == "sliding" and getattr(text, "use_bidirectional_attention", None) != "vision"):
            return None
        found = []
        for start, stop, origin, prefix in row.segments:
            for first, last in _runs(images[start:stop]):
                found.append(Block(start + first, start + last, start, origin, prefix))
        return PictureBlocks(tuple(found), layers == "sliding") if found else None


@cache
def _blank() -> Picture:
    """A picture of nothing."""
    from PIL import Image

    written = io.BytesIO()
    Image.new("RGB", (64, 64)).save(written, "PNG")
    return of_bytes(written.getvalue())


def _runs(mask: np.ndarray) -> Iterator[tuple[int, int]]:
    """[first, last) of each run of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def picture_token(config: object) -> int | None:
    """The token in whose place a model puts features of pictures; None of a model that takes none."""
    found = (getattr(config, name, None) for name in ("image_token_id", "image_token_index"))
    return next((token for token in found if isinstance(token, int)), None)


def _image_token(model: PreTrainedModel) -> int:
    if (token := picture_token(model.config)) is not None:
        return token
    raise ModelError(f"{type(model).__name__}: its config.json names no image token; copy it again")


def attention_configs(model: PreTrainedModel) -> tuple[list[Any], list[Any]]:
    """All configurations that a layer of the language model may read (the model's, its text part's, and those of inner
    models), and those of towers, which have an attention of their own."""
    towers = {id(c): c for t in towers_of(model) for c in _configs(t)}
    found = {id(c): c for c in (model.config, model.config.get_text_config(), *_configs(model)) if id(c) not in towers}
    return list(found.values()), list(towers.values())


def _configs(module: torch.nn.Module) -> Iterator[Any]:
    return (m.config for m in module.modules() if isinstance(m, PreTrainedModel))


@contextmanager
def own_attention(configs: Sequence[Any]) -> Iterator[None]:
    """Keep the attention of these configurations, which setting that of a larger one would change."""
    before = [getattr(config, "_attn_implementation", None) for config in configs]
    try:
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name
