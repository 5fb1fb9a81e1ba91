"""GGUF files hold the model: read back by transformers, and by llama.cpp itself where llama-cpp-python is installed."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from export.exported import FAMILIES, LLAMA_CPP, ROWS, family, tokenizer_folder
from prefopt.config.export import ExportConfig
from prefopt.data.tokenizer import load_tokenizer
from prefopt.errors import ConfigError, ModelError, RunError
from prefopt.export import gguf_tensors
from prefopt.export.gguf_tokenizer import CONTROL, NORMAL, SPLITS, UNUSED, vocabulary_of
from prefopt.export.run import run

gguf = pytest.importorskip("gguf", reason="GGUF files are written by the package gguf")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_folder(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def llama(words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family(tmp_path_factory.mktemp("llama"), "llama", words)


def export(model: Path | str, output: Path, **options: Any) -> dict[str, Any]:
    run(ExportConfig(model=str(model), output=str(output), to=options.pop("to", "gguf"), device="cpu", **options))
    found: dict[str, Any] = json.loads((output / "export.json").read_text("utf-8"))
    return found


def by_reader(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {score["by"].split()[0].rstrip("'"): score for score in found["scored"]}


QUICK = ("llama", "qwen2", "gpt2", "gemma3")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES])
def test_a_file_computes_what_its_model_does(name: str, words: Path, tmp_path: Path) -> None:
    model = family(tmp_path / "model", name, words)
    by = by_reader(export(model, tmp_path / "out", dtype="float32"))
    assert by["transformers"]["difference"]["largest"] < 1e-4 and by["transformers"]["difference"]["count"] > 1000
    if LLAMA_CPP:  # which takes GELU from a table in float16
        assert by["llama.cpp"]["difference"]["mean"] < (1e-3 if "gpt2" in name or "gemma" in name else 1e-5)
        assert by["llama.cpp"]["tokenised"] == 32


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0"])
def test_narrow_types_differ_by_their_rounding_alone(dtype: str, llama: Path, tmp_path: Path) -> None:
    found = export(llama, tmp_path / "out", dtype=dtype)
    score = by_reader(found)["transformers"]
    assert 0 < score["difference"]["largest"] <= score["rounding"] + 1e-3
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(next((tmp_path / "out").glob("*.gguf"))).tensors}
    assert kinds["blk.0.attn_q.weight"] == {"float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}[dtype]
    assert kinds["blk.0.attn_norm.weight"] == kinds["blk.0.attn_q.bias"] == "F32"
    if LLAMA_CPP:
        assert by_reader(found)["llama.cpp"]["same"]


def test_a_file_names_its_sizes_vocabulary_and_ends(llama: Path, tmp_path: Path) -> None:
    export(llama, tmp_path / "out", dtype="q8_0")
    fields = gguf.GGUFReader(tmp_path / "out" / "model-q8_0.gguf").fields
    tokenizer = AutoTokenizer.from_pretrained(llama)
    values = {name: field.contents() for name, field in fields.items()}
    assert values["general.architecture"] == "llama" and values["llama.block_count"] == 3
    assert values["llama.attention.head_count_kv"] == 2 and values["llama.rope.dimension_count"] == 24
    assert values["llama.context_length"] == 256
    tokens, kinds = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer))) and len(tokens) == ROWS
    assert kinds[tokenizer.eos_token_id] == CONTROL and kinds[300] == NORMAL and kinds[ROWS - 1] == UNUSED
    assert values["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert not values["tokenizer.ggml.add_bos_token"] and values["tokenizer.ggml.pre"] == "gpt-2"
    assert values["tokenizer.chat_template"] == tokenizer.chat_template


def test_what_is_written_wrong_is_found(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = gguf_tensors.GgufArchitecture("llama", gguf_tensors._llama)  # queries and keys not interleaved
    monkeypatch.setitem(gguf_tensors.ARCHITECTURES, "llama", plain)  # type: ignore[arg-type]
    with pytest.raises(RunError, match=r"does not compute what .* do not serve it"):
        export(llama, tmp_path / "out")
    scored = json.loads((tmp_path / "out" / "export.json").read_text())["scored"]  # it stays, for a look at it
    assert not any(score["same"] for score in scored)


def test_the_scores_of_pieces_are_those_of_sentencepiece(shared: Path, tmp_path: Path) -> None:
    source = shared / "models" / "stories260k"
    found = vocabulary_of(load_tokenizer(source), 512)
    rows = [line.split("\t") for line in (shared / "data/stories260k/tok512.vocab").read_text("utf-8").splitlines()]
    assert found.model == "llama" and found.values["add_bos_token"] and found.values["add_space_prefix"]
    assert found.scores is not None and sum(score < 0 for score in found.scores) > 100
    merged = [i for i, score in enumerate(found.scores) if score < 0]
    assert sorted(merged, key=lambda i: found.scores[i]) == sorted(merged, key=lambda i: float(rows[i][1]))  # type: ignore[index]
    by = by_reader(export(source, tmp_path / "out", dtype="float32"))
    assert by["transformers"]["difference"]["largest"] < 1e-4
    if LLAMA_CPP:
        assert by["llama.cpp"]["difference"]["mean"] < 1e-4 and by["llama.cpp"]["tokenised"] == 32


@pytest.mark.parametrize(
    ("name", "fields", "told"),
    [
        ("gemma3", {"layer_types": ["full_attention"] * 7}, "another pattern of sliding windows"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act gelu is not what llama.cpp computes"),
        ("qwen2 with yarn", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    name: str, fields: dict[str, Any], told: str, words: Path, tmp_path: Path
) -> None:
    model = family(tmp_path / "model", name, words)
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(ModelError, match=told) as refused:
        export(model, tmp_path / "out")
    assert "--converter" in str(refused.value) and not (tmp_path / "out").exists()


def test_other_tokenizers_and_numbers_too_large_are_refused(llama: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    described = json.loads((llama / "tokenizer.json").read_text("utf-8"))
    described["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Whitespace"}, described["pre_tokenizer"]],
    }
    model.save_pretrained(tmp_path / "words")
    AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path / "words")
    (tmp_path / "words" / "tokenizer.json").write_text(json.dumps(described), "utf-8")
    with pytest.raises(ModelError, match=r"no name that prefopt knows .* --converter"):
        export(tmp_path / "words", tmp_path / "out")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = 1e5
    model.save_pretrained(tmp_path / "large")
    AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path / "large")
    with pytest.raises(ModelError, match=r"ffn_down.weight .* --dtype bfloat16"):
        export(tmp_path / "large", tmp_path / "out", dtype="float16")
    assert not list((tmp_path / "out").glob("*"))


CONVERTER = """
import shutil, sys
folder, words = sys.argv[1], dict(zip(sys.argv[2::2], sys.argv[3::2]))
if words["--outtype"] == "bf16":
    sys.exit("no such type")
shutil.copyfile({file!r}, words["--outfile"])
"""


def test_a_converter_writes_the_file_where_it_is_named(llama: Path, tmp_path: Path) -> None:
    export(llama, tmp_path / "ours", dtype="float32")
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text(CONVERTER.format(file=str(tmp_path / "ours" / "model-f32.gguf")))
    found = export(llama, tmp_path / "theirs", dtype="float32", converter=str(script))
    assert any(str(script) in note for note in found["notes"]) and by_reader(found)["transformers"]["same"]
    with pytest.raises(RunError, match=r"status 1: no such type"):
        export(llama, tmp_path / "failed", dtype="bfloat16", converter=str(script))
    with pytest.raises(ConfigError, match="no such file"):
        export(llama, tmp_path / "failed", converter=str(tmp_path / "absent.py"))


@pytest.mark.slow
def test_a_converter_on_the_path_is_taken_for_what_prefopt_cannot_write(
    words: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(llama, tmp_path / "ours", dtype="float32")
    script = tmp_path / "bin" / "convert_hf_to_gguf.py"
    script.parent.mkdir()
    body = CONVERTER.format(file=str(tmp_path / "ours" / "model-f32.gguf"))
    script.write_text(f"#!{sys.executable}\n{body}")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    path = llama / "config.json"
    other = tmp_path / "other"
    model = AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.save_pretrained(other)
    AutoTokenizer.from_pretrained(llama).save_pretrained(other)
    (other / "config.json").write_text(json.dumps(json.loads(path.read_text()) | {"hidden_act": "gelu"}))
    monkeypatch.setenv("PATH", str(script.parent))
    with pytest.raises(RunError, match="does not compute"):  # the file is another model's, which the scores show
        export(other, tmp_path / "out", dtype="float32")
    assert np.isfinite(json.loads((tmp_path / "out" / "export.json").read_text())["scored"][0]["difference"]["mean"])


RUNTIME = """
import numpy as np, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer

class Llama:
    def __init__(self, path, **options):
        assert options["logits_all"] and options["n_gpu_layers"] == 0 and options["type_k"] == 0
        folder = Path({folder!r})
        self.model, self.words = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    def reset(self):
        self.scores = None
    def eval(self, ids):
        with torch.no_grad():
            self.scores = {scale} * self.model(torch.tensor([ids])).logits[0].numpy()
    def tokenize(self, text, add_bos, special):
        assert special
        ids = self.words(text.decode(), add_special_tokens=False)["input_ids"]
        return ids[::-1] if b"Lily" in text else ids
    def close(self):
        pass
"""


@pytest.mark.parametrize("scale", [1, 1.5], ids=["the model itself", "another model"])
def test_what_llama_cpp_computes_decides(
    scale: float, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a module in the place of llama-cpp-python, so that this is tested where it is not installed."""
    (tmp_path / "llama_cpp.py").write_text(RUNTIME.format(folder=str(llama), scale=scale))
    (tmp_path / "llama_cpp_python-9.9.dist-info").mkdir()
    (tmp_path / "llama_cpp_python-9.9.dist-info" / "METADATA").write_text("Name: llama_cpp_python\nVersion: 9.9\n")
    monkeypatch.delitem(sys.modules, "llama_cpp", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    if scale == 1:
        found = export(llama, tmp_path / "out", dtype="float32")
        assert any("other tokens of 1 of 32 prompts" in note for note in found["notes"])
    else:
        with pytest.raises(RunError, match=r"does not compute .* by llama.cpp \(llama-cpp-python 9.9\)"):
            export(llama, tmp_path / "out", dtype="float32")
    by = by_reader(json.loads((tmp_path / "out" / "export.json").read_text()))
    assert by["transformers"]["same"] and by["llama.cpp"]["same"] == (scale == 1) and by["llama.cpp"]["tokenised"] == 31
    monkeypatch.delitem(sys.modules, "llama_cpp", raising=False)


def split(pattern: str) -> dict[str, Any]:
    """A pre-tokenizer of Llama 3's kind, by its regular expression."""
    words = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [words, byte_level]}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTES]}
SPLITTERS = {name: split(pattern) for pattern, name in SPLITS.items()} | {"smollm": DIGITS}


@pytest.mark.slow
@pytest.mark.skipif(not LLAMA_CPP, reason="needs llama-cpp-python, whose tokenizers are compared")
@pytest.mark.parametrize("name", SPLITTERS)
def test_every_way_to_split_words_is_llama_cpps(name: str, llama: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(llama).save_pretrained(model)
    AutoTokenizer.from_pretrained(llama).save_pretrained(model)
    described = json.loads((model / "tokenizer.json").read_text("utf-8")) | {"pre_tokenizer": SPLITTERS[name]}
    (model / "tokenizer.json").write_text(json.dumps(described), "utf-8")
    found = export(model, tmp_path / "out")
    fields = gguf.GGUFReader(tmp_path / "out" / "model-f16.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == name and by_reader(found)["llama.cpp"]["tokenised"] == 32


@pytest.mark.slow
@pytest.mark.skipif(not LLAMA_CPP, reason="needs llama-cpp-python, whose tokenizers are compared")
def test_sentencepiece_without_a_space_in_front_is_llama_cpps(shared: Path, tmp_path: Path) -> None:
    """As Gemma has it."""
    source, model = shared / "models" / "stories260k", tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(model)
    AutoTokenizer.from_pretrained(source).save_pretrained(model)
    described = json.loads((model / "tokenizer.json").read_text("utf-8"))
    described["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    described["decoder"]["decoders"].pop()
    (model / "tokenizer.json").write_text(json.dumps(described), "utf-8")
    found = export(model, tmp_path / "out", dtype="float32")
    fields = gguf.GGUFReader(tmp_path / "out" / "model-f32.gguf").fields
    assert not fields["tokenizer.ggml.add_space_prefix"].contents()
    assert by_reader(found)["llama.cpp"]["tokenised"] == 32
