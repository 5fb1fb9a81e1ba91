"""The chain of SFT, reward model and PPO: run, skipped where nothing changed, gone on with where it was stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from transformers import AutoModelForCausalLM

import prefopt
from prefopt.cli import main
from prefopt.config.methods import RlhfConfig
from prefopt.config.ppo import PpoConfig
from prefopt.config.reward import RewardConfig
from prefopt.config.sft import SftConfig
from prefopt.errors import ConfigError, DataError, Interrupted, RunError
from prefopt.methods import rlhf
from train.small import pairs, weights, write_model, write_rows
from train.test_resume import stop_after

# peft asks an old name of transformers; here it is called directly.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

STAGES = ("sft", "reward", "ppo")
TEMPLATE = (
    "{%- for message in messages -%}{{- message.content + ' </s>' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- ' ' -}}{%- endif -%}"
)
CHANGES: dict[str, Callable[[str], str]] = {
    "e.jsonl": lambda text: text.replace('"chosen": "', '"chosen": "a '),
    "t.jinja": lambda text: text.replace("' </s>'", "'  </s>'"),
    "dataset_info.json": lambda text: text.replace("mine", "yours"),
    "p.jsonl": lambda text: text.partition("\n")[2],
    "k.jsonl": lambda text: text.partition("\n")[2],
    "other/config.json": lambda text: text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'),
}
NO_FILES = set(
    "format columns label_means ignore_columns picture_folder template_variables data_weights lora_targets output track"
    " track_project"
    " adapter device offload judge_url judge_model judge_key judge_pattern"
    " rollout_server rollout_model rollout_key rollout_folder".split()
)


def config(place: Path, **changes: Any) -> RlhfConfig:
    if not (place / "m").exists():
        write_model(place / "m")
        write_rows(place / "d.jsonl", pairs(8))
    few = ["batch_size=4", "learning_rate=1e-3"]
    values: dict[str, Any] = {
        "model": str(place / "m"),
        "data": [str(place / "d.jsonl")],
        "output": str(place / "out"),
        "device": "cpu",
        "dtype": "float32",
        "progress": "none",
        "max_length": 64,
        "max_new_tokens": 6,
        "sft": few,
        "reward": few,
        "ppo": [*few, "max_kl=1e6"],
    }
    return RlhfConfig(**{**values, **changes})


@pytest.mark.parametrize("lora", [False, True])
def test_the_chain_runs_once_and_is_skipped_where_nothing_changed(lora: bool, tmp_path: Path) -> None:
    result = rlhf.run(config(tmp_path, lora=lora))
    assert (result.output, result.done, result.skipped) == (tmp_path / "out/ppo", STAGES, ())
    told = {name: json.loads((tmp_path / f"out/{name}/run.json").read_text()) for name in STAGES}
    start = str(tmp_path / "out" / ("tuned" if lora else "sft"))
    assert [told[name]["options"]["model"] for name in STAGES] == [str(tmp_path / "m"), start, start]
    assert told["ppo"]["options"]["reward"] == str(tmp_path / "out/reward")
    before = weights(result.output)
    again = rlhf.run(config(tmp_path, lora=lora))
    assert (again.done, again.skipped) == ((), STAGES)
    assert all(torch.equal(before[n], w) for n, w in weights(again.output).items())
    if not lora:
        AutoModelForCausalLM.from_pretrained(again.output)


def test_a_stage_that_was_stopped_goes_on_and_those_before_it_are_left_alone(tmp_path: Path) -> None:
    whole = rlhf.run(config(tmp_path, output=str(tmp_path / "whole")))
    with pytest.MonkeyPatch.context() as patch:
        stop_after(2, patch)
        with pytest.raises(Interrupted):
            rlhf.run(config(tmp_path))  # in its first stage
    result = rlhf.run(config(tmp_path))
    assert result.done == STAGES
    one, other = weights(result.output), weights(whole.output)
    assert all(torch.equal(one[n], other[n]) for n in one)


def test_what_changed_is_seen_by_contents_and_nothing_is_overwritten(tmp_path: Path) -> None:
    rlhf.run(config(tmp_path))
    # The same bytes elsewhere in time are no change.
    (tmp_path / "d.jsonl").write_text((tmp_path / "d.jsonl").read_text())
    assert rlhf.run(config(tmp_path)).skipped == STAGES
    # Options of the last stage concern that one alone.
    with pytest.raises(RunError, match=r"out/ppo is of a chain with other options"):
        rlhf.run(config(tmp_path, max_new_tokens=5))
    shutil.rmtree(tmp_path / "out/ppo")
    changed = rlhf.run(config(tmp_path, max_new_tokens=5))
    assert (changed.skipped, changed.done) == (("sft", "reward"), ("ppo",))
    write_rows(tmp_path / "d.jsonl", pairs(8, seed=1))
    with pytest.raises(RunError, match=r"out/sft .*options, model or data"):
        rlhf.run(config(tmp_path, max_new_tokens=5))


def test_every_file_that_an_option_names_is_seen_to_change(tmp_path: Path) -> None:
    stages = {"e.jsonl": "sft", "t.jinja": "sft", "dataset_info.json": "sft", "p.jsonl": "ppo", "k.jsonl": "ppo"}
    stages["other/config.json"] = "ppo"
    write_rows(tmp_path / "e.jsonl", pairs(2, seed=3))
    write_rows(tmp_path / "p.jsonl", [{"prompt": row["prompt"]} for row in pairs(4)])
    write_rows(tmp_path / "k.jsonl", [{"text": row["chosen"]} for row in pairs(2)])
    registry = {"mine": {"file_name": "e.jsonl", "ranking": True, "columns": {"prompt": "prompt"}}}
    registry["mine"]["columns"] |= {"chosen": "chosen", "rejected": "rejected"}  # type: ignore[operator]
    (tmp_path / "dataset_info.json").write_text(json.dumps(registry))
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    write_model(tmp_path / "other", seed=1)
    few = ["batch_size=4", "max_steps=1"]
    given = {
        "chat_template": str(tmp_path / "t.jinja"),
        "prompts": [str(tmp_path / "p.jsonl")],
        "eval_fraction": 0.0,
        "sft": [*few, f"eval_data=['{tmp_path / 'e.jsonl'}']"],
        "reward": few,
        "ppo": [*few, "max_kl=1e6", f"reference={tmp_path / 'other'}", f"ptx_data=['{tmp_path / 'k.jsonl'}']"],
    }
    rlhf.run(config(tmp_path, **given))
    for name, stage in stages.items():
        before = (tmp_path / name).read_text()
        (tmp_path / name).write_text(CHANGES[name](before))
        with pytest.raises(RunError, match=rf"out/{stage} .*options, model or data"):
            rlhf.run(config(tmp_path, **given))
        (tmp_path / name).write_text(before)
    assert rlhf.run(config(tmp_path, **given)).skipped == STAGES
    # Where they lie says nothing of what they hold.
    there = tmp_path / "elsewhere"
    there.mkdir()
    for name in ("m", "other", *(p.name for p in tmp_path.glob("*.json*")), "t.jinja"):
        (tmp_path / name).rename(there / name)
    moved = json.loads(json.dumps(given).replace(f"{tmp_path}/", f"{there}/"))
    moved |= {"model": str(there / "m"), "data": [str(there / "d.jsonl")]}
    assert rlhf.run(config(tmp_path, **moved)).skipped == STAGES
    # What it is to them does.
    swapped = [*moved["ppo"][:-1], moved["ppo"][-1].replace("k.jsonl", "p.jsonl")]
    with pytest.raises(RunError, match=r"out/ppo .*options, model or data"):
        rlhf.run(config(tmp_path, **{**moved, "prompts": [str(there / "k.jsonl")], "ppo": swapped}))


def test_prompts_that_ppo_cannot_answer_are_told_before_anything_is_trained(tmp_path: Path) -> None:
    long = {"prompt": "k" * 1000}
    write_rows(tmp_path / "p.jsonl", [*({"prompt": row["prompt"]} for row in pairs(4)), long])
    few = ["batch_size=4", "max_steps=1"]
    given = {"prompts": [str(tmp_path / "p.jsonl")], "sft": few, "reward": few, "ppo": few}
    with pytest.raises(DataError, match=r"p\.jsonl, row 5: 1 of 5 rows cannot be used: prompt too long: 1"):
        rlhf.run(config(tmp_path, **given))
    assert not (tmp_path / "out/sft").exists()
    assert rlhf.run(config(tmp_path, **given, on_bad_row="skip")).done == STAGES


def test_too_few_steps_of_ppo_are_told_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(rlhf.Reporter, "say", lambda self, line: said.append(line) if self.mode == "plain" else None)
    monkeypatch.setattr(rlhf._Chain, "_stage", lambda self, name: said.append(name))
    rlhf.run(config(tmp_path, progress="plain"))
    assert said[0].startswith("ppo: 2 steps of PPO, from 8 prompts, will change little") and said[1:4] == list(STAGES)
    rlhf.run(config(tmp_path, progress="plain", ppo=["batch_size=4", "epochs=8"]))
    assert said.count(said[0]) == 1


def test_a_registry_that_cannot_be_read_is_of_no_matter_where_the_layout_is_named(tmp_path: Path) -> None:
    few = ["batch_size=4", "max_steps=1"]
    given = {"format": "preference-text", "sft": few, "reward": few, "ppo": few}
    (tmp_path / "dataset_info.json").write_text('{"d.jsonl": ')
    rlhf.run(config(tmp_path, **given))
    assert rlhf.run(config(tmp_path, **given)).skipped == STAGES


def test_options_that_may_name_files_are_looked_into_or_known_to_name_none() -> None:
    """An option that is added some day must say which it is."""
    named = {*rlhf.MODELS, *rlhf.DATA, *rlhf.FILES, *rlhf.REWARDS}
    text = (str, str | None, list[str], list[str] | None)
    for stage in (SftConfig, RewardConfig, PpoConfig):
        assert {name for name, hint in get_type_hints(stage).items() if hint in text} <= named | NO_FILES


def test_a_finished_folder_that_was_touched_is_not_built_on(tmp_path: Path) -> None:
    rlhf.run(config(tmp_path))
    file = tmp_path / "out/sft/config.json"
    file.write_text(file.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    with pytest.raises(RunError, match=r"out/sft was changed since it was finished"):
        rlhf.run(config(tmp_path))


def test_a_mistake_in_any_stage_is_told_before_the_first_begins(tmp_path: Path) -> None:
    for changes, said in [
        ({"ppo": ["clipp=0.2"]}, "--ppo: unknown option 'clipp'; did you mean clip"),
        ({"reward": ["centre=-1"]}, "--reward: centre is -1; it must be a number of at least 0"),
        ({"sft": ["model=x"]}, "--sft model: the chain sets it"),
        ({"sft": ["from_scratch=true"]}, "--sft from_scratch: the chain sets it"),
        ({"ppo": ["reward=vader"]}, "--ppo reward: the chain sets it"),
        ({"sft": ["epochs"]}, "should be NAME=VALUE"),
        ({"sft": ["epochs=1", "epochs=2"]}, "gives epochs twice"),
    ]:
        with pytest.raises(ConfigError) as error:
            config(tmp_path, **changes)
        assert said in str(error.value)
    assert not (tmp_path / "out").exists()


def test_options_of_stages_are_read_as_yaml_would_and_from_python_as_they_are(tmp_path: Path) -> None:
    given = config(tmp_path, ppo=["whiten_rewards=true", "learning-rate=2e-6", "critic=head", "num=3"])
    ppo = given.stage("ppo")
    assert isinstance(ppo, PpoConfig)
    assert (ppo.whiten_rewards, ppo.learning_rate, ppo.critic, ppo.num) == (True, 2e-6, "head", 3)
    assert (ppo.max_new_tokens, ppo.prompts) == (6, [str(tmp_path / "d.jsonl")])
    other = config(tmp_path, prompts=["p.txt"], format="preference-text", eval_fraction=0.2, seed=5, lora=True)
    stages = [other.stage(name) for name in ("sft", "reward", "ppo")]
    assert [getattr(s, "format", None) for s in stages] == ["preference-text", "preference-text", None]
    assert [s.seed for s in stages] == [5, 5, 5]
    assert [s.lora for s in stages] == [True, True, True]
    assert [getattr(s, "eval_fraction", None) for s in stages] == [0.2, 0.2, None]
    assert stages[2].prompts == ["p.txt"]
    with pytest.raises(ConfigError, match="--ppo: unknown option 'kl_targets'"):
        prefopt.rlhf(tmp_path / "m", tmp_path / "d.jsonl", output=tmp_path / "o", ppo={"kl_targets": 6.0})


def test_the_same_from_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config(tmp_path)
    file = tmp_path / "rlhf.yaml"
    file.write_text(
        f"model: {tmp_path / 'm'}\ndata: {tmp_path / 'd.jsonl'}\noutput: {tmp_path / 'out'}\ndevice: cpu\n"
        "dtype: float32\nmax-length: 64\nmax-new-tokens: 6\nsft: [batch_size=4, max_steps=1]\n"
        "reward: [batch_size=4, max_steps=1]\nppo: [batch_size=4, max_steps=1, max_kl=1e6]\nprogress: plain\n"
    )
    assert main(["rlhf", "--config", str(file)]) == 0
    assert main(["rlhf", "--config", str(file)]) == 0
    assert "ppo: done already" in "".join(capsys.readouterr())
