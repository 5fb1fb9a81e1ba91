"""Folders for servers: merged models, adapters as vLLM loads them, reward models, Modelfiles."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig

import prefopt
from export.exported import family, tokenizer_folder
from prefopt.cli import main
from prefopt.config.export import ExportConfig
from prefopt.data.chat.template import ChatTemplate, Rendering
from prefopt.data.tokenizer import PLAIN_TURNS, load_tokenizer
from prefopt.errors import ConfigError, ModelError, RunError
from prefopt.export.modelfile import Frames, frames_of, modelfile
from prefopt.export.run import run
from prefopt.export.serving import ExportedModel, reward_commands
from prefopt.model.adapter import peft_warnings_off
from prefopt.records import Message


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = tokenizer_folder(tmp_path_factory.mktemp("words"))
    return family(tmp_path_factory.mktemp("llama"), "llama", words)


def adapter(folder: Path, model: Path, **options: Any) -> Path:
    """An adapter on a model, far from its start."""
    bare = AutoModelForCausalLM.from_pretrained(model)
    plain = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    with peft_warnings_off():
        wrapped = get_peft_model(bare, LoraConfig(**{**plain, **options}))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape) * 0.3)
    wrapped.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def export(model: Path | str, output: Path, to: str, **options: Any) -> ExportedModel:
    return run(ExportConfig(model=str(model), output=str(output), to=to, device="cpu", **options))


def with_adapter(model: Path, source: Path) -> Any:
    with peft_warnings_off():
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), source).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(5, 45)[None]).logits
    return found


def test_an_adapter_with_ranks_of_its_own_becomes_one_rank(llama: Path, tmp_path: Path) -> None:
    patterns = {"rank_pattern": {"down_proj": 6}, "alpha_pattern": {"q_proj": 3}}
    source = adapter(tmp_path / "lora", llama, **patterns)
    before = with_adapter(llama, source)
    done = export(source, tmp_path / "out", "vllm-lora")
    about = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (about["r"], about["rank_pattern"], about["alpha_pattern"]) == (6, {}, {})
    assert about["target_modules"] == ["down_proj", "q_proj"]
    # as vLLM computes it: W + alpha / r B A, one alpha and one r for all, by the names of the files alone
    plain = AutoModelForCausalLM.from_pretrained(llama)
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    weights = dict(plain.named_parameters())
    with torch.no_grad():
        for name in [n for n in found if n.endswith("lora_A.weight")]:
            change = found[name.replace("lora_A", "lora_B")] @ found[name] * (about["lora_alpha"] / about["r"])
            weights[name.removeprefix("base_model.model.").replace("lora_A.", "")].add_(change)
    torch.testing.assert_close(logits(plain), logits(before), rtol=1e-4, atol=1e-4)
    assert logits(AutoModelForCausalLM.from_pretrained(llama)).sub(logits(plain)).abs().max() > 0.1
    words = done.commands["vLLM"]
    assert words[:3] == ["vllm", "serve", str(llama)] and words[words.index("--max-lora-rank") + 1] == "8"
    assert done.scored[0].same and "one rank" not in "".join(done.notes) and "rank 6 now" in done.notes[0]
    text = (tmp_path / "out" / "README.md").read_text()
    assert "--enable-lora" in text and "largest difference" in text


def test_a_server_gets_the_text_that_an_adapter_was_trained_with(llama: Path, tmp_path: Path) -> None:
    """vLLM takes chat template and tokenizer from the model that it serves."""
    source, out = adapter(tmp_path / "lora", llama), tmp_path / "out"
    same = export(source, out, "vllm-lora").commands["vLLM"]
    assert "--chat-template" not in same and "--tokenizer" not in same
    shutil.rmtree(out)
    bare = Path(shutil.copytree(llama, tmp_path / "bare"))
    (bare / "chat_template.jinja").unlink()
    done = export(bare, out, "vllm-lora", adapter=str(source)).commands["vLLM"]
    named = Path(done[done.index("--chat-template") + 1])
    assert named == out / "chat_template.jinja" and "--tokenizer" not in done
    assert named.read_text("utf-8") == load_tokenizer(source).chat_template
    shutil.rmtree(out)
    words = AutoTokenizer.from_pretrained(llama)
    words.add_special_tokens({"additional_special_tokens": ["<|own|>"]})
    words.save_pretrained(source)
    other = export(source, out, "vllm-lora").commands["vLLM"]
    assert other[other.index("--tokenizer") + 1] == str(out) and "--chat-template" not in other


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "lora_only"}, "biases"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"r": 600}, "512 at most"),
    ],
)
def test_adapters_that_vllm_refuses_are_refused(options: Any, told: str, llama: Path, tmp_path: Path) -> None:
    source = adapter(tmp_path / "lora", llama, **options)
    with pytest.raises(ModelError, match=f"{told}.*--to merged"):
        export(source, tmp_path / "out", "vllm-lora")
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_merged_into_folders_and_gguf_files(llama: Path, tmp_path: Path) -> None:
    source = adapter(tmp_path / "lora", llama)
    before = logits(with_adapter(llama, source))
    done = export(source, tmp_path / "merged", "merged")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(found), before, rtol=1e-4, atol=1e-4)
    assert done.scored[0].same and done.scored[0].difference.largest < 1e-3
    assert done.commands["TGI"][0] == "text-generation-launcher" and "scored in float32" in done.notes[-1]
    card = (tmp_path / "merged" / "README.md").read_text()
    assert card.startswith("---") and "Serve it" in card
    pytest.importorskip("gguf")
    read = export(llama, tmp_path / "gguf", "gguf", adapter=str(source), dtype="float32")
    assert read.scored[0].difference.largest < 1e-3
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "gguf", gguf_file="model-f32.gguf", config=found.config)
    torch.testing.assert_close(logits(other), before, rtol=1e-3, atol=1e-3)


def test_a_reward_model_is_read_by_transformers_alone(llama: Path, tmp_path: Path) -> None:
    rows = [
        json.loads(line) for line in (Path(__file__).parents[1] / "pairs.jsonl").read_text("utf-8").splitlines()[:14]
    ]
    lora = {"lora": True, "lora_rank": 4, "learning_rate": 1e-2}
    prefopt.reward(str(llama), rows, output=str(tmp_path / "reward"), progress="none", device="cpu", **lora)
    done = export(tmp_path / "reward", tmp_path / "out", "reward-server", dtype="bfloat16")
    score = done.scored[0]
    assert done.commands["vLLM"][done.commands["vLLM"].index("--dtype") + 1] == "bfloat16"
    assert reward_commands("out", "float32")["vLLM"][-3] == "float32"  # as it was scored
    assert score.of == "rewards" and score.same and 0 < score.difference.largest <= score.rounding + 1e-3  # type: ignore[operator]
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert found.config.num_labels == 1 and found.score.weight.dtype == torch.bfloat16
    # the number of the server is the reward of prefopt score, before the shift
    prompt, answer = "Name a colour.", "Blue."
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    ids = AutoTokenizer.from_pretrained(tmp_path / "out").apply_chat_template(turns, return_dict=False)
    with torch.no_grad():
        theirs = found.float()(torch.tensor([ids])).logits.item()
    shift = getattr(found.config, "prefopt_reward_shift", 0.0) or 0.0
    (tmp_path / "row.jsonl").write_text(json.dumps({"prompt": prompt, "responses": [answer]}))
    ours = scored(tmp_path / "out", turns, tmp_path)
    assert ours == pytest.approx(theirs - shift, abs=1e-4)
    assert (f"subtract {shift:g}" in " ".join(done.notes)) == bool(shift)
    with pytest.raises(ModelError, match=r"is a language model.*serve it as it is"):
        export(llama, tmp_path / "other", "reward-server")
    with pytest.raises(ModelError, match=r"is a language model.*--to merged, vllm-lora"):
        export(adapter(tmp_path / "lora", llama), tmp_path / "other", "reward-server")


def scored(model: Path, turns: Any, folder: Path) -> float:
    from prefopt.config.tools import ScoreConfig
    from prefopt.evaluate.score import run as score

    (folder / "row.jsonl").write_text(json.dumps({"messages": turns}))
    names = {"files": [str(folder / "row.jsonl")], "output": str(folder / "scored.jsonl")}
    score(ScoreConfig(**names, reward=str(model), device="cpu", dtype="float32"))  # type: ignore[arg-type]
    found: float = json.loads((folder / "scored.jsonl").read_text())["scores"][0]
    return found


def test_mistakes_are_told_before_anything_is_loaded(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    with pytest.raises(RunError, match="exists; name a new folder"):
        export(llama, tmp_path / "full", "gguf")
    for to, told in (("merged", "a whole model already"), ("vllm-lora", "serves it as it is")):
        with pytest.raises(ConfigError, match=told):
            export(llama, tmp_path / "out", to)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"to": "merged", "dtype": "q8_0"}, "type of GGUF files"),
        ({"to": "merged", "converter": "x"}, "--converter writes GGUF"),
        ({"to": "vllm-lora", "dtype": "float32"}, "keeps its own"),
    ]
    for options, told in wrong:
        with pytest.raises(ConfigError, match=told):
            ExportConfig(model="m", output="o", **options)


# -- Modelfiles ------------------------------------------------------------------------------------------------

CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set told = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set told = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}[INST] {{ told if loop.first else '' }}{{ m.content }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
LAST_ONLY = "{{ messages[-1].content }}"


PLAIN_TEMPLATE = PLAIN_TURNS.replace("END", "'<|end|>'")  # what prefopt saves with a model that has no template


def executed(template: str, turns: list[Message]) -> str:
    """A template of Go as text, for the few actions that are written: if, range, end and values."""
    words = re.split(r"(\{\{ .*? \}\})", template)
    told = next((t.content for t in turns if t.role == "system"), "")

    def block(at: int, message: Message | None, i: int, live: bool) -> tuple[str, int]:
        parts = []
        while at < len(words):
            word = words[at]
            if word == "{{ end }}":
                return "".join(parts), at
            if word == "{{ range $i, $m := .Messages }}":
                end = at
                for n, turn in enumerate(turns):
                    text, end = block(at + 1, turn, n, live)
                    parts.append(text)
                at = end
            elif word.startswith("{{ if "):
                role = re.fullmatch(r'\{\{ if eq \$m\.Role "(\w+)" \}\}', word)
                if role:
                    holds = message is not None and message.role == role[1]
                elif word in ("{{ if not .System }}", "{{ if $i }}"):
                    holds = i > 0 if "$i" in word else not told
                else:
                    assert word == "{{ if and $.System (eq $i 1) }}", word
                    holds = bool(told) and i == 1
                text, at = block(at + 1, message, i, live and holds)
                parts.append(text if holds else "")
            elif word == "{{ $m.Content }}":
                parts.append(message.content if message else "")
            elif word == "{{ $.System }}":
                parts.append(told)
            else:
                assert "{{" not in word, word
                parts.append(word)
            at += 1
        return "".join(parts), at

    return block(0, None, 0, True)[0]


@pytest.mark.parametrize(
    ("template", "system"),
    [(CHATML, True), (LLAMA2, True), (NO_SYSTEM, False), (PLAIN_TEMPLATE, True), (LAST_ONLY, None)],
    ids=["system of its own", "system in the first turn", "no system", "gaps between turns", "no frames"],
)
def test_a_template_in_go_writes_what_the_chat_template_does(template: str, system: bool | None, llama: Path) -> None:
    tokenizer = load_tokenizer(llama)
    tokenizer.chat_template = template
    frames = frames_of(tokenizer)
    if system is None:
        assert frames is None
        return
    assert frames is not None and (frames.system is not None) == system
    go, jinja = frames.go_template(), ChatTemplate(tokenizer, Rendering())
    assert go is not None
    talk = [Message("user", "Hello {x}"), Message("assistant", "Hi.\n"), Message("user", "2 > 1?")]
    for turns in (talk[:1], talk, *([[Message("system", "Rhyme."), *talk]] if system else [])):
        assert executed(go, turns) == jinja.apply(tuple(turns), generation=True)


def test_a_modelfile_keeps_what_is_zero_and_what_it_can_quote() -> None:
    def text(**options: Any) -> str:
        return modelfile("m.gguf", None, [], None, GenerationConfig(**options))

    drawn = text(do_sample=True, temperature=0.5, top_k=0, top_p=1.0, min_p=0.0)
    assert [line.split()[1:] for line in drawn.splitlines()[1:]] == [
        ["temperature", "0.5"],
        ["top_p", "1"],
        ["top_k", "0"],
        ["min_p", "0"],
    ]
    assert text(do_sample=False).endswith("PARAMETER temperature 0\n") and "PARAMETER" not in text()
    frames = Frames("", ("<u>", "</u>"), ("<a>", "</a>"), "<a>")
    assert frames.go_template() is not None
    for ending in ('say "', '"'):
        assert replace(frames, generation=ending).go_template() is None
    assert replace(frames, gap='""', generation='"<a>').go_template() is None


def test_an_end_token_with_a_line_end_is_left_out_of_a_modelfile(llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    source = Path(shutil.copytree(llama, tmp_path / "model"))
    words = AutoTokenizer.from_pretrained(source)
    line = words("\n", add_special_tokens=False)["input_ids"][0]
    GenerationConfig(eos_token_id=[words.eos_token_id, line]).save_pretrained(source)
    done = export(source, tmp_path / "out", "ollama")
    found = [one for one in (tmp_path / "out" / "Modelfile").read_text("utf-8").splitlines() if " stop " in one]
    assert found == ['PARAMETER stop "<|end|>"']
    assert any("end tokens left out" in note and note.endswith(": 1") for note in done.notes)


def test_an_ollama_folder_has_template_and_ends(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf")
    words = ["export", str(llama), str(tmp_path / "out"), "--to", "ollama", "--device", "cpu"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "largest difference" in out and f"ollama create aligned -f {tmp_path / 'out' / 'Modelfile'}" in out
    text = (tmp_path / "out" / "Modelfile").read_text("utf-8")
    lines = text.splitlines()
    assert lines[0] == "FROM ./model-f16.gguf" and (tmp_path / "out" / "model-f16.gguf").is_file()
    assert 'PARAMETER stop "<|end|>"' in lines and "PARAMETER num_ctx 256" in lines
    assert "<|assistant|>" in text and 'TEMPLATE """' in text
    assert main(words) == 2 and "exists; name a new folder" in capsys.readouterr().err
