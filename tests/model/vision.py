"""Vision-language models in miniature, with their processors: a folder for each family, from configurations alone."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

from prefopt.data.chat.render import Renderer
from prefopt.data.chat.template import Rendering
from prefopt.data.group import Group
from prefopt.data.layouts.pictures import with_pictures
from prefopt.data.pictures import of_bytes
from prefopt.data.tokenizer import load_tokenizer
from prefopt.model.load import new_tokenizer
from prefopt.records import PICTURE, Comparison, Message, Picture, Response

WORDS = "what is in this picture? a red square, a dog and two cats; the answer is 12 of 345 "
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
_SECTIONS = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
_MROPE = {**_SECTIONS, "mrope_interleaved": True}
_QWEN_PIXELS = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
_QWEN_PIXELS = {**_QWEN_PIXELS, "size": {"shortest_edge": 64, "longest_edge": 1024}}
_QWEN_TOKENS = {
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
    "image": "<|image_pad|>",
    "video": "<|video_pad|>",
}
_QWEN3_TOWER = {
    "depth": 3,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0, 1],
}
_SPLIT = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}, "do_image_splitting": True}
_SPLIT_TOKENS = {
    "image": "<image>",
    "fake": "<fake_token_around_image>",
    "global": "<global-img>",
    **{f"place{r}{c}": f"<row_{r}_col_{c}>" for r in range(1, 4) for c in range(1, 4)},
}
_IDEFICS = {"text_config": {**TEXT, "model_type": "llama"}, "vision_config": TOWER, "scale_factor": 2}

# family: (fields of the configuration, processor class, image processor, tokens, settings of the processor)
FAMILIES: dict[str, tuple[dict[str, Any], str, dict[str, Any], dict[str, str], dict[str, Any]]] = {
    "qwen2_5_vl": (
        {
            "text_config": {**TEXT, "rope_parameters": _SECTIONS},
            "vision_config": {
                **{"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4},
                **{"out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1]},
            },
        },
        "Qwen2_5_VLProcessor",
        {"image_processor_type": "Qwen2VLImageProcessor", **_QWEN_PIXELS},
        _QWEN_TOKENS,
        {},
    ),
    "qwen3_vl": (
        {"text_config": {**TEXT, "rope_parameters": _MROPE}, "vision_config": _QWEN3_TOWER},
        "Qwen3VLProcessor",
        {"image_processor_type": "Qwen2VLImageProcessor", **_QWEN_PIXELS},
        _QWEN_TOKENS,
        {},
    ),
    "llava": (
        {
            "text_config": {**TEXT, "model_type": "llama"},
            "vision_config": {**TOWER, "model_type": "clip_vision_model"},
            "vision_feature_select_strategy": "default",
        },
        "LlavaProcessor",
        {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": 16},
            "crop_size": {"height": 16, "width": 16},
        },
        {"image": "<image>"},
        {"patch_size": 4, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"},
    ),
    "gemma3": (
        {
            "text_config": {**TEXT, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
            "vision_config": {**TOWER, "vision_use_head": False},
            "mm_tokens_per_image": 4,
        },
        "Gemma3Processor",
        {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 16, "width": 16}},
        {"boi": "<start_of_image>", "eoi": "<end_of_image>", "image": "<image_soft_token>"},
        {"image_seq_length": 4},
    ),
    "smolvlm": (
        _IDEFICS,
        "SmolVLMProcessor",
        {"image_processor_type": "SmolVLMImageProcessor", **_SPLIT},
        {**_SPLIT_TOKENS, "end": "<end_of_utterance>"},
        {"image_seq_len": 4},
    ),
    "idefics3": (
        _IDEFICS,
        "Idefics3Processor",
        {"image_processor_type": "Idefics3ImageProcessor", **_SPLIT},
        {**_SPLIT_TOKENS, "end": "<end_of_utterance>"},
        {"image_seq_len": 4},
    ),
    "internvl": (
        {
            "text_config": {**TEXT, "model_type": "qwen2"},
            "vision_config": {**TOWER, "image_size": [16, 16], "patch_size": [4, 4]},
            "downsample_ratio": 0.5,
        },
        "InternVLProcessor",
        {
            "image_processor_type": "GotOcr2ImageProcessor",
            "size": {"height": 16, "width": 16},
            **{"crop_to_patches": True, "min_patches": 1, "max_patches": 4},
        },
        {
            **{"start_image": "<img>", "end_image": "</img>", "context_image": "<IMG_CONTEXT>"},
            "video": "<video>",
        },
        {"image_seq_length": 4},
    ),
    "gemma4": (
        {
            "text_config": {
                **TEXT,
                **{"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
                **{"global_head_dim": 16, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0},
                "vocab_size_per_layer_input": 400,
                "use_bidirectional_attention": "vision",
            },
            "vision_config": {**TOWER, "num_key_value_heads": 2, "head_dim": 8, "pooling_kernel_size": 2},
            "audio_config": None,
        },
        "Gemma4Processor",
        {
            "image_processor_type": "Gemma4ImageProcessor",
            "patch_size": 4,
            "max_soft_tokens": 70,
            "pooling_kernel_size": 2,
        },
        {
            **{"image": "<|image|>", "boi": "<|image>", "eoi": "<image|>", "video": "<|video|>"},
            **{"audio": "<|audio|>", "boa": "<|audio>", "eoa": "<audio|>"},
        },
        {},
    ),
    "mistral3": (
        {
            "text_config": {**TEXT, "model_type": "mistral"},
            "vision_config": {**TOWER, "model_type": "pixtral", "image_size": 32},
            "spatial_merge_size": 2,
        },
        "PixtralProcessor",
        {
            **{"image_processor_type": "PixtralImageProcessor", "size": {"longest_edge": 32}},
            "patch_size": {"height": 4, "width": 4},
        },
        {"image": "[IMG]", "image_break": "[IMG_BREAK]", "image_end": "[IMG_END]"},
        {"patch_size": 4, "spatial_merge_size": 2},
    ),
    "qwen3_5": (
        {
            "text_config": {
                **TEXT,
                "rope_parameters": {**_MROPE, "partial_rotary_factor": 1.0},
                **{"linear_num_key_heads": 2, "linear_num_value_heads": 2},
                **{"linear_key_head_dim": 8, "linear_value_head_dim": 8},
                "layer_types": ["linear_attention", "full_attention"],
            },
            "vision_config": _QWEN3_TOWER,
        },
        "Qwen3VLProcessor",
        {"image_processor_type": "Qwen2VLImageProcessor", **_QWEN_PIXELS},
        _QWEN_TOKENS,
        {},
    ),
}
FAMILY_PARAMS = [
    pytest.param(family, marks=() if family in ("qwen2_5_vl", "qwen3_vl", "llava", "gemma3") else pytest.mark.slow)
    for family in FAMILIES
]
"""The families as parameters of a test; those that are built of the parts of others are slow ones."""
PLACES = {
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "gemma3": "<start_of_image>",
    "internvl": "<IMG_CONTEXT>\n",
    "gemma4": "<|image|>",
    "mistral3": "[IMG]",
    **dict.fromkeys(("llava", "smolvlm", "idefics3"), "<image>"),
}
PLACES |= dict.fromkeys(("qwen3_vl", "qwen3_5"), PLACES["qwen2_5_vl"])


def template(place: str) -> str:
    """A ChatML template that writes ``place`` for a picture."""
    parts = (
        "{% for part in m.content %}{% if part.type == 'image' %}"
        + place.replace("\n", "{{ '\\n' }}")
        + "{% else %}{{ part.text }}{% endif %}{% endfor %}"
    )
    words = "{% if m.content is string %}{{ m.content }}{% else %}" + parts + "{% endif %}"
    turn = "{{ '<|im_start|>' + m.role + '\\n' }}" + words + "{{ '<|im_end|>\\n' }}"
    end = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    return "{% for m in messages %}" + turn + "{% endfor %}" + end


def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    """A tokenizer with the family's tokens for pictures."""
    tokens, place = FAMILIES[family][3], PLACES[family]
    made = new_tokenizer([WORDS * 10] * 3, 300)
    made.eos_token = "<|im_end|>"
    made.add_tokens(list(tokens.values()), special_tokens=True)
    extra = {f"{name}_token": text for name, text in tokens.items()}
    made.init_kwargs["extra_special_tokens"] = extra
    made._set_model_specific_special_tokens(extra)
    made.chat_template = template(place)
    return made


def write_folder(family: str, folder: Path, *, seed: int = 0) -> Path:
    """A model folder of the family: weights in float32, tokenizer and processor."""
    fields, processor, pixels, tokens, settings = FAMILIES[family]
    tokenizer = tokenizer_of(family)
    names = {"image": tokens.get("image", tokens.get("context_image"))}
    names |= {name: tokens[name] for name in ("video", "vision_start", "vision_end") if name in tokens}
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(text) for name, text in names.items()}
    fields = {**fields, **ids}
    ends = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    text = {**fields["text_config"], **ends, "vocab_size": len(tokenizer)}
    config: Any = AutoConfig.for_model(family, **{**fields, "text_config": text, **ends})
    config.tie_word_embeddings = False
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({**pixels, "processor_class": processor}))
    (folder / "processor_config.json").write_text(json.dumps({**settings, "processor_class": processor}))
    return folder


@cache
def picture(width: int = 20, height: int = 12, seed: int = 0) -> Picture:
    """A picture of noise."""
    rng = np.random.default_rng(seed)
    written = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(written, "PNG")
    return of_bytes(written.getvalue())


def row(words: str, answers: Sequence[str], *pictures: Picture, number: int = 1) -> Comparison:
    """A question with ``<image>`` for each picture, and responses, best first."""
    prompt = (Message("user", words),)
    sides = tuple(Response((Message("assistant", text),)) for text in answers)
    tiers = tuple((k,) for k in range(len(sides)))
    return with_pictures(Comparison(prompt, sides, tiers, number), list(pictures))


def rows() -> list[Comparison]:
    """Groups with one, two and no pictures, of different sizes, and one with pictures in later turns of a response."""
    first, second, third = picture(), picture(33, 40, 1), picture(16, 16, 2)
    later = Comparison(
        (Message("user", f"{PICTURE}what is it?", pictures=(third,)),),
        (
            Response(
                (
                    Message("assistant", "a dog"),
                    Message("user", f"and {PICTURE}?", pictures=(first,)),
                    Message("assistant", "two cats"),
                )
            ),
            Response((Message("assistant", "a red square"),)),
        ),
        ((0,), (1,)),
        4,
    )
    return [
        row("<image>what is in this picture?", ["a red square", "two cats and a dog", "12"], first, number=1),
        row("is <image> the same as <image>?", ["the answer", "a dog"], second, first, number=2),
        row("what is 12?", ["the answer is 345", "a dog"], number=3),
        later,
    ]


def groups_of(folder: Path, comparisons: Sequence[Comparison]) -> list[Group]:
    """The rows, rendered by the folder's tokenizer and processor."""
    renderer = Renderer(load_tokenizer(folder), Rendering())
    return [renderer.render(c).group for c in comparisons]
