"""Rows with pictures equal the class's own forward on what its own processor makes of them, one sequence per call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from model.oracle import assert_same, assert_same_gradients, gradients
from model.vision import FAMILY_PARAMS, groups_of, picture, row, rows, write_folder
from prefopt.data.chat.render import Renderer
from prefopt.data.chat.template import Rendering
from prefopt.data.group import Group
from prefopt.data.pictures import decoded
from prefopt.data.tokenizer import load_tokenizer
from prefopt.errors import ModelError
from prefopt.model.architectures import body_of, causal_model
from prefopt.model.check import CLONE_TOLERANCE, clone_difference, tiny_clone
from prefopt.model.load import load_model
from prefopt.model.memory import LiveBytes
from prefopt.model.packing import pack
from prefopt.model.scalar import ScalarScorer, load_scalar
from prefopt.model.scorer import Scorer
from prefopt.model.tower_memory import TowerMemory, different
from prefopt.records import Comparison, Picture

FLOAT64, CPU = torch.float64, torch.device("cpu")
TOLERANCE = 1e-9
LOOSE = {"qwen3_5": 1e-5}
"""Gated delta networks compute part of their state in float32, whatever their weights are in."""


@pytest.fixture(scope="module", params=FAMILY_PARAMS)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(family, tmp_path_factory.mktemp(family))


def loaded(folder: Path) -> Any:
    return load_model(str(folder), dtype=FLOAT64, device=CPU, pictures=True).eval()


def own_inputs(folder: Path, c: Comparison, k: int, ids: np.ndarray, model: Any) -> dict[str, Any]:
    """Response k as the processor of the folder gives it to the model, pictures and all; its tokens must be ours."""
    renderer = Renderer(load_tokenizer(folder), Rendering())
    (step,) = renderer._responses.render(c.prompt, [r.messages for r in c.responses], ())[k]
    turns = (*c.prompt, *c.responses[k].messages)
    images = [decoded(p) for m in turns for p in m.pictures]
    if not images:
        return {"input_ids": torch.from_numpy(ids).long()[None]}
    options = {"add_special_tokens": False}
    made = renderer.pictures._inner(images=images, text=[step.text], return_tensors="pt", text_kwargs=options)
    assert made["input_ids"][0].tolist() == ids.tolist()
    return {name: value for name, value in made.items() if name != "attention_mask"}


def oracle(model: Any, folder: Path, comparisons: Sequence[Comparison], groups: Sequence[Group]) -> torch.Tensor:
    """Token log-probabilities [M] by the class's own forward."""
    parts = []
    for c, group in zip(comparisons, groups, strict=True):
        for k in range(len(group.continuations)):
            ids, trained = group.sequence(k)
            given = own_inputs(folder, c, k, ids, model)
            logp = torch.log_softmax(model(use_cache=False, **given).logits[0], -1)
            where = torch.from_numpy(np.flatnonzero(trained))
            parts.append(logp[where - 1, given["input_ids"][0, where]])
    return torch.cat(parts)


class Calls:
    """How often the features of pictures were computed, and of how many pictures in all."""

    def __init__(self, scorer: Scorer) -> None:
        self.count = self.pictures = 0
        processor: Any = scorer.vision.processor
        read = processor.pixels

        def pixels(pictures: Sequence[Picture]) -> Any:
            self.pictures += len(pictures)
            return read(pictures)

        processor.pixels = pixels
        body: Any = scorer.vision.body
        compute = body.get_image_features

        def counted(*args: Any, **given: Any) -> Any:
            self.count += 1
            return compute(*args, **given)

        body.get_image_features = counted


def test_values_and_gradients_equal_the_class(family: str, folder: Path) -> None:
    comparisons = rows()
    groups = groups_of(folder, comparisons)
    model = loaded(folder)
    scorer = Scorer(model, pictures=True)
    calls = Calls(scorer)
    batch = pack(groups, scorer.layout)
    assert scorer.path == "shared" and len(batch.passes) == 1  # no fallback
    found = scorer(batch)
    assert (calls.count, calls.pictures) == (1, 3)  # once for all responses of all groups that a picture is in
    assert [len(g.pictures) for g in groups] == [1, 2, 0, 1]
    found_gradients = gradients(found, model)
    scorer.detach_hook()
    expected = oracle(model, folder, comparisons, groups)
    tolerance = LOOSE.get(family, TOLERANCE)
    assert_same(found, expected, tolerance)
    assert_same_gradients(found_gradients, gradients(expected, model), max(10 * tolerance, 1e-6))
    towers = [n for n, g in found_gradients.items() if "visual" in n or "vision" in n]
    assert any(found_gradients[n].abs().max() > 0 for n in towers)


def test_responses_apart_equal_those_that_share(family: str, folder: Path) -> None:
    groups = groups_of(folder, rows()[:3])
    scorer, apart = Scorer(loaded(folder)), Scorer(loaded(folder), share=False)
    with torch.no_grad():
        shared = scorer(pack(groups, scorer.layout))
        calls = Calls(apart)
        separate = apart(pack(groups, apart.layout))
    assert (calls.count, calls.pictures) == (1, 2)
    assert_same(shared, separate, LOOSE.get(family, TOLERANCE))


def test_pixels_reach_the_answer_and_nothing_leaks(family: str, folder: Path) -> None:
    """Another picture changes the values; another response leaves those of the first as they were."""
    model = loaded(folder)
    scorer = Scorer(model)
    words, answers = "<image>what is in this picture?", ["a red square", "two cats"]
    changed = [row(words, [answers[0], "12 dogs"], picture()), row(words, answers, picture(seed=5))]
    with torch.no_grad():
        first, other, repainted = (
            scorer(pack(groups_of(folder, [c]), scorer.layout)) for c in [row(words, answers, picture()), *changed]
        )
    length = int(groups_of(folder, [changed[0]])[0].continuations[0].trained.sum())
    torch.testing.assert_close(first[:length], other[:length], rtol=0, atol=1e-12)
    assert float((first - repainted).abs().max()) > 1e-4


def test_memory_of_towers_is_counted(family: str, folder: Path) -> None:
    """From the largest picture, that of all: 15 % less (pictures padded to the largest) to 10 % more than encoding them
    takes. Gemma 4 pads each picture to the same size, so that small ones beside it are counted too high."""
    scorer = Scorer(loaded(folder), pictures=True)
    groups = groups_of(folder, rows())
    pixels = scorer.vision.processor.pixels([p.picture for p in different(groups)])
    kept = []
    for trains in (True, False):
        for tower in scorer.vision.towers:
            tower.requires_grad_(trains)
        counted = TowerMemory(scorer).of(groups)
        with LiveBytes("cpu") as live:
            output = scorer.vision.features(pixels, CPU)
            assert output is not None
            for said, found in ((counted.kept, live.live), (counted.peak, live.peak)):
                assert 0.85 * found < said < (1.8 if family == "gemma4" else 1.1) * found
        kept.append(counted.kept)
    assert kept[0] > 3 * kept[1]  # of a frozen tower features stay


@pytest.mark.parametrize("family", ["gemma3", "qwen3_5"], indirect=True)
def test_rewards_equal_the_classifiers(family: str, folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    model: Any = load_scalar(str(folder), dtype=FLOAT64, device=CPU, tokenizer=tokenizer, pictures=True)
    comparisons = rows()
    groups = groups_of(folder, comparisons)
    scorer = ScalarScorer(model, pictures=True)
    with torch.no_grad():
        found = scorer(pack(groups, scorer.layout))
        scorer.detach_hook()
        expected = []
        for c, group in zip(comparisons, groups, strict=True):
            for k in range(len(group.continuations)):
                given = own_inputs(folder, c, k, group.sequence(k)[0], model)
                expected.append(model(use_cache=False, **given).logits[0, 0])
    assert_same(found, torch.stack(expected), LOOSE.get(family, TOLERANCE))


@pytest.mark.parametrize("family", ["qwen2_5_vl"], indirect=True)
def test_a_frozen_tower_has_no_graph(family: str, folder: Path) -> None:
    model = loaded(folder)
    scorer = Scorer(model, pictures=True)
    for tower in (body_of(causal_model(model)).visual,):
        tower.requires_grad_(False)
    seen = []
    scorer.vision.body.visual.register_forward_hook(lambda *args: seen.append(torch.is_grad_enabled()))
    found = scorer(pack(groups_of(folder, rows()), scorer.layout))
    assert seen == [False] and found.requires_grad


@pytest.mark.parametrize("family", ["llava"], indirect=True)
def test_keys_see_pixels(family: str, folder: Path) -> None:
    """The keys of cached values: of a picture's bytes, and of where it stands."""
    words, answers = "<image>what is it?", ["a dog", "two cats"]
    first, other = (groups_of(folder, [row(words, answers, picture(seed=s))])[0] for s in (0, 1))
    assert first.sequence(0)[0].tolist() == other.sequence(0)[0].tolist()
    assert first.key(0) != other.key(0)
    assert replace(first, pictures=()).key(0) != first.key(0)
    assert row(words, answers, picture()).prompt_key != row(words, answers, picture(seed=1)).prompt_key


def test_a_language_model_takes_no_pictures(tmp_path: Path) -> None:
    folder = write_folder("qwen3_5", tmp_path)
    groups = groups_of(folder, rows()[:1])
    text = load_model(str(folder), dtype=FLOAT64, device=CPU)  # its language model alone
    scorer = Scorer(text)
    with pytest.raises(ModelError, match="takes no pictures"):
        scorer(pack(groups, scorer.layout))


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl", "llava", "gemma3"])
def test_the_load_check_builds_a_small_copy(kind: str) -> None:
    """Of the language model where that has a class of its own, else with a small tower; of the families' real sizes."""
    clone = tiny_clone(AutoConfig.for_model(kind))
    assert clone is not None
    assert clone_difference(clone) < CLONE_TOLERANCE
