"""The processor of a model folder: placeholders of pictures become image tokens, and pictures become pixel values.

Both are done by the processor's own class in transformers, with Pillow as its backend, so that pixels do not depend on
what else is installed. Videos and sound are left out: a processor is made without their parts.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prefopt.core.hub import fetched
from prefopt.core.model_folder import read_object
from prefopt.core.plugins import how_to_install
from prefopt.data.pictures import BadPicture, decoded
from prefopt.data.tokenizer import Tokenizer
from prefopt.errors import ModelError, UserError, first_line
from prefopt.records import PICTURE, Picture

FILES = ("processor_config.json", "preprocessor_config.json")
"""Files with the settings of a processor; a folder with neither has none."""
_PARTS = ("image_processor", "video_processor", "feature_extractor", "audio_processor", "tokenizer")
_NOT_SETTINGS = {*_PARTS, "processor_class", "auto_map", "chat_template", "audio_tokenizer"}
_TEXT = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "text_replacement_offsets"}
_BY_TORCHVISION = {"PixtralProcessor": "pixtral"}
"""Classes of processors that transformers makes only beside torchvision, of which they use nothing here."""
REMEMBERED = 4096
"""Pictures whose image tokens are remembered."""


class PictureProcessor:
    """The processor in a model ``folder``, with the tokenizer that is in use. ``token`` is the placeholder of a picture
    in a rendered conversation, ``token_id`` the token in whose place the model puts a picture's features.

    Raises :class:`ModelError` where the folder has no processor, or one that cannot be used.
    """

    def __init__(self, folder: str, tokenizer: Tokenizer) -> None:
        self.folder = folder
        self._inner = _load(folder, tokenizer)
        self.token: str = self._inner.image_token
        own = getattr(tokenizer, "image_token_id", None)
        self.token_id = int(own if own is not None else self._inner.image_token_id)
        self._known: Callable[[Picture], tuple[str, ...]] = lru_cache(REMEMBERED)(self._replaced)

    def expansion(self, picture: Picture) -> str:
        """What stands for the picture in the text. Raises :class:`BadPicture`, :class:`ModelError`."""
        return self._known(picture)[0]

    def pixels(self, pictures: Sequence[Picture]) -> dict[str, Any]:
        """Tensors for the model by the names of its arguments, such as ``pixel_values``, of several pictures together.

        Raises :class:`DataError` where a file is gone, :class:`ModelError` where the processor refuses a picture."""
        try:
            found = self._call(pictures)
        except BadPicture as bad:
            raise ModelError(f"{bad}: the picture was readable before") from None
        return {name: value for name, value in found.items() if name not in _TEXT}

    def _replaced(self, picture: Picture) -> tuple[str, ...]:
        (offsets,) = self._call([picture])["text_replacement_offsets"]
        return tuple(found["replacement"] for found in offsets)

    def _call(self, pictures: Sequence[Picture]) -> Mapping[str, Any]:
        converts = bool(getattr(self._inner.image_processor, "do_convert_rgb", False))  # in its own way
        images = [decoded(picture, as_held=converts) for picture in pictures]
        try:
            found: Mapping[str, Any] = self._inner(
                images=images,
                text=[self.token * len(images)],
                return_tensors="pt",
                return_text_replacement_offsets=True,
                text_kwargs={"add_special_tokens": False},
            )
            return found
        except UserError:
            raise
        except Exception as error:  # of any class: sizes that it cannot take, among others
            sizes = ", ".join(picture.size for picture in pictures)
            raise BadPicture(f"the processor rejects a picture of {sizes} pixels: {first_line(error)}") from None


def parts_of(content: str) -> list[dict[str, str]]:
    """Words with places of pictures as parts, as templates of vision-language models read them."""
    pieces = re.split(f"({PICTURE})", content)
    return [{"type": "image"} if p == PICTURE else {"type": "text", "text": p} for p in pieces if p]


def processor_file(source: str, name: str) -> Path | None:
    """A file of a model folder or Hub name; None where it has none, or is a model given in Python, without a name."""
    if not source:
        return None
    path = Path(source)
    if path.is_dir():
        return path / name if (path / name).is_file() else None
    return fetched(source, name)


def has_processor(source: str) -> bool:
    """Whether a model folder or Hub name has a processor."""
    return any(processor_file(source, name) for name in FILES)


def processor_digest(source: str) -> str:
    """Digest of a processor's settings and of the libraries that its results depend on; empty without a processor."""
    found = {name: processor_file(source, name) for name in FILES}
    held = {name: read_object(path) for name, path in found.items() if path is not None}
    if not held:
        return ""
    try:
        libraries = [version("transformers"), version("pillow")]
    except ModuleNotFoundError:  # pictures are refused then
        libraries = []
    return hashlib.blake2b(json.dumps([held, libraries], sort_keys=True).encode(), digest_size=16).hexdigest()


def same_processor(source: str, other: str, name: str) -> None:
    """Raise :class:`ModelError` unless the folder ``source``, of what ``name`` gave, turns pictures into the tokens and
    pixels of ``other``: tokens are handed on from the one model to the other."""
    found = [processor_digest(folder) for folder in (source, other)]
    if not found[0] or found[0] != found[1]:
        what = "reads pictures in another way than the model" if found[0] else "has no processor of pictures"
        raise ModelError(f"{name} {what}; take a model of the same family, with the same {FILES[1]}")


def token_of_pictures(source: str) -> int | None:
    """The token in whose place a model puts features of pictures, by its ``config.json``."""
    path = processor_file(source, "config.json")
    config = read_object(path) if path is not None else {}
    found = next((config[name] for name in ("image_token_id", "image_token_index") if name in config), None)
    return found if isinstance(found, int) else None


def _load(folder: str, tokenizer: Tokenizer) -> Any:
    if not has_processor(folder):
        raise ModelError(
            f"{folder or 'this model'} has no processor ({FILES[1]}), so it takes no pictures: give a vision-language"
            " model, or rows without pictures"
        )
    try:
        import PIL  # noqa: F401  (whether it is installed)
    except ImportError:
        raise ModelError(f"pictures need Pillow: {how_to_install('pictures')}") from None
    from transformers import AutoImageProcessor

    settings: dict[str, Any] = {}
    for name in reversed(FILES):
        if path := processor_file(folder, name):
            settings |= read_object(path)
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.ERROR)  # of the backend, which is chosen here
    try:
        kind = _class_of(folder, settings, tokenizer)
        image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
        still = type(kind.__name__, (_Still, kind), {})
        named = json_settings(folder)
        made = still(image_processor=image_processor, tokenizer=tokenizer, **_none_for(kind), **named)
    except UserError:
        raise
    except Exception as error:  # of any class: it depends on the folder
        raise ModelError(f"{folder}: its processor cannot be used ({first_line(error)})") from None
    finally:
        logger.setLevel(before)
    if not isinstance(getattr(made, "image_token", None), str):
        raise ModelError(f"{folder}: {kind.__name__} has no placeholder for pictures that prefopt knows")
    return made


class _Still:
    """A processor whose parts for videos and sound may be absent: they ask for packages that pictures do without."""

    def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
        check: Any = super()
        return None if argument is None else check.check_argument_for_proper_class(name, argument)


def _none_for(kind: Any) -> dict[str, None]:
    return {part: None for part in kind.get_attributes() if part not in ("image_processor", "tokenizer")}


def json_settings(folder: str) -> dict[str, Any]:
    """Arguments of a processor's class in ``processor_config.json``."""
    path = processor_file(folder, FILES[0])
    found = read_object(path) if path is not None else {}
    return {name: value for name, value in found.items() if name not in _NOT_SETTINGS}


def _by_pillow(name: str) -> Any:
    """A class of :data:`_BY_TORCHVISION` without torchvision: its module asks that of an image processor for a function
    on sizes, which Pillow's has too and takes the place of while the class is imported."""
    family = f"transformers.models.{_BY_TORCHVISION[name]}"
    wanted = f"{family}.image_processing_{_BY_TORCHVISION[name]}"
    instead = import_module(f"{family}.image_processing_pil_{_BY_TORCHVISION[name]}")
    sys.modules[wanted] = instead
    try:
        return getattr(import_module(f"{family}.processing_{_BY_TORCHVISION[name]}"), name)
    finally:
        del sys.modules[wanted]


def _class_of(folder: str, settings: Mapping[str, Any], tokenizer: Tokenizer) -> Any:
    """The processor's class of transformers, by the folder's settings, tokenizer or model type."""
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    config = processor_file(folder, "config.json")
    model_type = str(read_object(config).get("model_type")) if config is not None else ""
    named = [settings.get("processor_class"), tokenizer.init_kwargs.get("processor_class")]
    for name in [*named, PROCESSOR_MAPPING_NAMES.get(model_type)]:
        name = name[0] if isinstance(name, tuple) else name
        if isinstance(name, str) and name.endswith("Processor") and hasattr(transformers, name):
            found = getattr(transformers, name)
            return _by_pillow(name) if getattr(found, "is_dummy", False) and name in _BY_TORCHVISION else found
    raise ModelError(f"{folder}: no class of transformers is named for its processor; copy {FILES[1]} again")
