"""Every option of DPO does something: one entry for each field of its configuration, with what shows it.

An option that nothing read would leave two float64 runs equal to the bit, or the trace it should leave away.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import prefopt
from data.tokenising import TEMPLATE
from prefopt.config.dpo import DpoConfig
from prefopt.core.plugins import installed_version
from prefopt.errors import ConfigError, DataError, RunError
from prefopt.model.scorer import Scorer
from prefopt.runs.samples import read_samples
from train.small import dpo, evaluations, metrics, pairs, steps, weights, write_model, write_rows

ROWS = pairs(9)
QUICK = {"dtype": "float64", "warmup": 0.3, "batch_size": 3, "max_length": 128}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a test works: a tiny model ``m``, another ``other``, data, an adapter ``lora``, and a folder for runs."""

    folder: Path

    @functools.cached_property
    def m(self) -> str:
        return write_model(self.folder / "m")

    @functools.cached_property
    def other(self) -> str:
        return write_model(self.folder / "other", seed=1)

    @functools.cached_property
    def data(self) -> str:
        return write_rows(self.folder / "data.jsonl", ROWS)

    @functools.cached_property
    def more(self) -> str:
        return write_rows(self.folder / "more.jsonl", pairs(5, seed=7))

    @functools.cached_property
    def talk(self) -> str:
        """Conversations whose answers begin with a thought."""
        rows = [
            {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                **{
                    side: [{"role": "assistant", "content": row[side], "reasoning_content": f"so {row[side][:3]}"}]
                    for side in ("chosen", "rejected")
                },
            }
            for row in ROWS
        ]
        return write_rows(self.folder / "talk.jsonl", rows)

    @functools.cached_property
    def turns(self) -> str:
        """Conversations of two answers, each with a thought."""

        def answers(text: str) -> list[dict[str, str]]:
            thought = {"role": "assistant", "reasoning_content": f"so {text[:3]}"}
            return [{**thought, "content": text[:5]}, {"role": "user", "content": "on"}, {**thought, "content": text}]

        rows = [
            {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                **{side: answers(row[side]) for side in ("chosen", "rejected")},
            }
            for row in ROWS
        ]
        return write_rows(self.folder / "turns.jsonl", rows)

    @functools.cached_property
    def judged(self) -> str:
        """Conversations whose answers have rejected alternatives."""
        rows = [
            {
                "messages": [
                    {"role": "user", "content": row["prompt"]},
                    {"role": "assistant", "content": row["chosen"], "rejected": row["rejected"]},
                ]
            }
            for row in ROWS
        ]
        return write_rows(self.folder / "judged.jsonl", rows)

    @functools.cached_property
    def forgetful(self) -> str:
        """A chat template that shows the thought of the last answer alone."""
        path = self.folder / "forgetful.jinja"
        shown = "{% if loop.last and message.reasoning_content %}({{ message.reasoning_content }}){% endif %}"
        path.write_text(TEMPLATE.replace("{{ message.content }}", shown + "{{ message.content }}"), "utf-8")
        return str(path)

    @functools.cached_property
    def template(self) -> str:
        path = self.folder / "template.jinja"
        path.write_text(TEMPLATE, "utf-8")
        return str(path)

    @functools.cached_property
    def lora(self) -> str:
        return self.run(lora=True, learning_rate=0.05)

    def run(self, **options: Any) -> str:
        """A run with options; asked for again, the one that was."""
        output = self.folder / re.sub(r"\W+", "-", json.dumps(options, sort_keys=True))[-200:]
        if not output.exists():
            dpo(**{"model": self.m, "data": self.data, "output": output, **QUICK, **options})
        return str(output)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("options"))


def moves(option: str, value: Any, **company: Any) -> Callable[[Place], None]:
    """With the option the run ends with other weights than without; ``company`` is given to both."""

    def check(place: Place) -> None:
        given = {name: getattr(place, v[1:]) if str(v).startswith("@") else v for name, v in company.items()}
        chosen = getattr(place, value[1:]) if str(value).startswith("@") else value
        plain, other = weights(Path(place.run(**given))), weights(Path(place.run(**given, **{option: chosen})))
        assert plain.keys() != other.keys() or any(
            plain[n].shape != other[n].shape or not torch.equal(plain[n], other[n]) for n in plain
        )

    return check


def lora_targets(place: Place) -> None:
    assert {n.split(".")[-3] for n in weights(Path(place.run(lora=True, lora_targets=["q_proj"])))} == {"q_proj"}


def quantise(place: Place) -> None:
    if installed_version("bitsandbytes") is not None:
        moves("quantise", "nf4", lora=True, dtype="float32")(place)
        return
    with pytest.raises(ConfigError, match="--quantise nf4: bitsandbytes is not installed"):
        place.run(lora=True, quantise="nf4", dtype="float32")


def router_aux_loss_coef(place: Place) -> None:
    with pytest.raises(ConfigError, match="--router-aux-loss-coef: transformers computes no load-balancing loss"):
        place.run(router_aux_loss_coef=0.1)  # with experts: tests/train/test_balance.py


def router_z_loss_coef(place: Place) -> None:
    with pytest.raises(ConfigError, match="--router-z-loss-coef: transformers records no router logits for Llama"):
        place.run(router_z_loss_coef=0.1)  # with experts: tests/train/test_experts.py


def eval_data(place: Place) -> None:
    output = Path(place.run(eval_data=[place.more]))
    assert [line["step"] for line in evaluations(output)] == [3]
    assert weights(output).keys() == weights(Path(place.run())).keys()


def eval_every(place: Place) -> None:
    assert [line["step"] for line in evaluations(Path(place.run(eval_data=[place.more], eval_every=2)))] == [2, 3]


def eval_dtype(place: Place) -> None:
    given = {"eval_data": [place.more], "dtype": "bfloat16", "learning_rate": 1e-6}
    losses = [evaluations(Path(place.run(**given, eval_dtype=name)))[-1]["eval_loss"] for name in ("run", "float32")]
    assert losses[0] != losses[1] and all(abs(x - math.log(2)) < 0.01 for x in losses)


def compare(place: Place) -> None:
    given = {"data": place.judged, "chat_template": place.template}
    with pytest.raises(DataError, match="too few responses"):
        place.run(**given)
    assert len(steps(Path(place.run(**given, compare="steps")))) == 3


def samples(place: Place) -> None:
    """What is in them: tests/train/test_samples.py."""
    outputs = [Path(place.run(eval_data=[place.more], samples=n)) for n in (0, 2)]
    assert [len(read_samples(output)) for output in outputs] == [0, 2]


def early_stopping(place: Place) -> None:
    hopeless = {"eval_data": [place.more], "eval_every": 1, "learning_rate": 3.0, "epochs": 3}
    whole, stopped = (len(steps(Path(place.run(**hopeless, **more)))) for more in ({}, {"early_stopping": 1}))
    assert (whole, stopped < 9) == (9, True)


def on_bad_row(place: Place) -> None:
    bad = write_rows(place.folder / "bad.jsonl", [*ROWS, {"prompt": "p", "chosen": "c"}])
    with pytest.raises(DataError, match="row 10: 1 of 10 rows cannot be used"):
        place.run(data=bad)
    assert metrics(Path(place.run(data=bad, on_bad_row="skip", epochs=1.5))) == metrics(Path(place.run(epochs=1.5)))


def layout_by_name(place: Place) -> None:
    assert metrics(Path(place.run(format="preference text", beta=0.1))) == metrics(Path(place.run()))
    with pytest.raises(ConfigError, match="'preference-tex' is not a layout; did you mean preference-text"):
        place.run(format="preference-tex")
    with pytest.raises(DataError, match=r"data\.jsonl"):
        place.run(format="preference-chat")


def columns(place: Place) -> None:
    renamed = [{"ask": row["prompt"], "good": row["chosen"], "bad": row["rejected"]} for row in ROWS]
    data = write_rows(place.folder / "renamed.jsonl", renamed)
    with pytest.raises(DataError, match="unknown layout"):
        place.run(data=data)
    named = ["prompt=ask", "chosen=good", "rejected=bad"]
    assert metrics(Path(place.run(data=data, columns=named))) == metrics(Path(place.run()))


def label_means(place: Place) -> None:
    """Every second row has its better response second, which the labels say."""
    judged = [
        {"prompt": row["prompt"], "first": row[one], "second": row[other], "label": k % 2}
        for k, row in enumerate(ROWS)
        for one, other in [("chosen", "rejected") if k % 2 == 0 else ("rejected", "chosen")]
    ]
    data = write_rows(place.folder / "judged.jsonl", judged)
    with pytest.raises(DataError, match=r"label of unknown meaning.*--label-means 0=first,1=second,2=tie"):
        place.run(data=data)
    right = steps(Path(place.run(data=data, label_means=["0=first,1=second"])))
    wrong = steps(Path(place.run(data=data, label_means=["1=first,0=second"])))
    assert right[0]["loss"] == pytest.approx(steps(Path(place.run()))[0]["loss"]) and right[-1] != wrong[-1]


def picture_folder(place: Place) -> None:
    """It bounds the files that rows name."""
    answers = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    row = {"images": ["/a.png"], "prompt": [{"role": "user", "content": "hm"}], **answers}
    data = write_rows(place.folder / "pictured.jsonl", [row])
    with pytest.raises(DataError, match="picture outside of its folder"):
        place.run(data=data)
    with pytest.raises(DataError, match="no such file"):
        place.run(data=data, picture_folder="/")


def ignore_columns(place: Place) -> None:
    data = write_rows(place.folder / "third.jsonl", [row | {"third_response": "c"} for row in ROWS])
    with pytest.raises(DataError, match="--ignore-columns third_response"):
        place.run(data=data)
    assert metrics(Path(place.run(data=data, ignore_columns=["third_response"]))) == metrics(Path(place.run()))


def header(place: Place) -> None:
    with pytest.raises(ConfigError, match=r"--header none .*csv and .*tsv"):
        place.run(header="none")
    data = place.folder / "rows.tsv"
    data.write_text("".join(f"{row['prompt']}\t{row['chosen']}\t{row['rejected']}\n" for row in ROWS), "utf-8")
    named = ["prompt=1", "chosen=2", "rejected=3"]
    assert metrics(Path(place.run(data=str(data), header="none", columns=named))) == metrics(Path(place.run()))


def output(place: Place) -> None:
    assert {"config.json", "model.safetensors", "README.md"} <= {p.name for p in Path(place.run()).iterdir()}


def save_every(place: Place) -> None:
    assert not list(Path(place.run()).glob("checkpoints/step-*"))
    saved = sorted(p.name for p in Path(place.run(save_every=2, epochs=2)).glob("checkpoints/step-*"))
    assert saved == [f"step-{n:08d}" for n in (4, 6)]


def keep_last(place: Place) -> None:
    saved = Path(place.run(save_every=1, keep_last=1)).glob("checkpoints/step-*")
    assert [p.name for p in saved] == ["step-00000003"]


def resume(place: Place) -> None:
    folder = Path(place.run(save_every=1, seed=5))
    options = {**QUICK, "output": folder, "save_every": 1, "seed": 5, "data": place.data, "model": place.m}
    with pytest.raises(RunError, match="holds a finished run; name another folder"):
        dpo(**options)
    with pytest.raises(RunError, match=r"--resume: the run in .* is finished"):
        dpo(**options, resume=True)
    (folder / "run.json").write_text((folder / "run.json").read_text().replace('"finished"', '"started"', 1))
    with pytest.raises(RunError, match=r"unfinished run.*--resume"):
        dpo(**options)
    assert dpo(**options, resume=True).steps == 3


def overwrite(place: Place) -> None:
    folder = Path(place.run(seed=6))
    options = {**QUICK, "output": folder, "seed": 6, "data": place.data, "model": place.m}
    assert dpo(**options, max_steps=2, overwrite=True).steps == 2
    assert len(steps(folder)) == 2 and "overwrite: false" in (folder / "config.yaml").read_text()


def dry_run(place: Place) -> None:
    folder = place.folder / "dry"
    assert prefopt.dpo(place.m, place.data, output=folder, dry_run=True, progress="none") is None
    assert not folder.exists()


def progress(place: Place) -> None:
    for mode in ("auto", "rich", "plain", "none"):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            place.run(progress=mode)
        text = out.getvalue()
        assert ("step 1: loss 0.693147" in text) == (mode != "none")
        assert ("train: 3/3 steps" in text) == (mode in ("auto", "plain"))  # here is no terminal
        assert "train: 1/3 steps" not in text, "the first step has its line already"
        assert ("━" in text) == (mode == "rich")
        assert bool(text) == (mode != "none")


def track(place: Place) -> None:
    assert list(Path(place.run(track=["tensorboard"])).glob("tensorboard/events*"))
    assert not Path(place.run(), "tensorboard").exists()


def track_project(place: Place) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).with_name("stand_ins")))
        import trackio

        place.run(track=["trackio"], track_project="films")
        assert [run.project for run in trackio.runs.values()] == ["films"]
    del sys.modules["trackio"]  # which the patch, had it taken it away, would put back


def dtype(place: Place) -> None:
    kinds = [{t.dtype for t in weights(Path(place.run(dtype=d))).values()} for d in ("float32", "float64")]
    assert kinds == [{torch.float32}, {torch.float64}]


def device(place: Place) -> None:
    with pytest.raises(ConfigError, match="--device cuda:77"):
        place.run(device="cuda:77")


def threads(place: Place) -> None:
    asked: list[int] = []
    with pytest.MonkeyPatch.context() as patch:  # really to take two would slow everything down where there is one
        patch.setattr(torch, "set_num_threads", asked.append)
        place.run(threads=2, max_steps=1)
    assert asked == [2]


def token_budget(place: Place) -> None:
    assert passes(place, token_budget=1) > passes(place, token_budget=100_000)


def passes(place: Place, **options: Any) -> int:
    """How often the model's body runs in a run."""
    with pytest.MonkeyPatch.context() as patch:
        calls: list[int] = []
        hidden = Scorer._hidden
        patch.setattr(Scorer, "_hidden", lambda self, row: calls.append(1) or hidden(self, row))
        place.run(beta=0.2, **options)
    return len(calls)


def gradient_checkpointing(place: Place) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    def layers(**options: Any) -> int:
        with pytest.MonkeyPatch.context() as patch:
            calls: list[int] = []
            forward = LlamaMLP.forward
            patch.setattr(LlamaMLP, "forward", lambda self, x: calls.append(1) or forward(self, x))
            place.run(beta=0.4, **options)
        return len(calls)

    assert layers(gradient_checkpointing=True) > layers()


def compile_layers(place: Place) -> None:
    """``auto`` compiles on CUDA alone."""
    from prefopt.model.compiled import CompiledLayers

    def compiled_calls(**options: Any) -> int:
        with pytest.MonkeyPatch.context() as patch:
            calls: list[int] = []
            run, begin = CompiledLayers._run, Scorer.compile_layers
            patch.setattr(Scorer, "compile_layers", lambda self: begin(self, backend="eager"))
            patch.setattr(CompiledLayers, "_run", lambda *a, **k: calls.append(1) or run(*a, **k))
            place.run(beta=0.35, **options)
        return len(calls)

    assert compiled_calls(compile="on") > 0
    assert compiled_calls() == compiled_calls(compile="off") == 0


def optimizer(place: Place) -> None:
    """Moments of larger matrices in 8 bits move the weights a little differently; tests/train/test_memory.py."""
    with pytest.raises(ConfigError, match="--optimizer paged-adamw-8bit needs"):
        place.run(optimizer="paged-adamw-8bit", dtype="float32")


def offload(place: Place) -> None:
    """Bits, and what stays on the device: tests/train/test_memory.py and tests/model/test_offload.py."""
    with pytest.raises(ConfigError, match="--offload optimizer: the cpu computes in host memory"):
        place.run(offload=["optimizer"])


def attention(place: Place) -> None:
    kernels = []
    with pytest.MonkeyPatch.context() as patch:
        hidden = Scorer._hidden
        patch.setattr(Scorer, "_hidden", lambda self, row: kernels.append(self.kernel) or hidden(self, row))
        place.run(beta=0.3, attention="loop")
    assert "loop" in kernels and "flash-cpu" not in kernels  # and once the model's own, to compare with


def deterministic(place: Place) -> None:
    try:
        place.run(deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def shard(place: Place) -> None:
    """One process refuses it; what it does in several is shown in tests/parallel."""
    with pytest.raises(ConfigError, match=r"--shard full .*prefopt launch"):
        place.run(shard="full")


def seed(place: Place) -> None:
    moves("seed", 1)(place)  # the order
    # An adapter's first matrices have no gradient while the second ones are zero: after a step they are as they began.
    adapters = [
        weights(Path(place.run(lora=True, shuffle=False, max_steps=1, learning_rate=1e-3 * rate, seed=n)))
        for n, rate in ((0, 1), (0, 2), (1, 1))
    ]
    for name in adapters[0]:
        if "lora_A" in name:
            assert torch.equal(adapters[0][name], adapters[1][name])
            assert not torch.equal(adapters[0][name], adapters[2][name])


def vision(place: Place) -> None:
    """Of rows without pictures any but the default is refused; tests/train/test_pictures.py trains towers."""
    for value, more in (("full", {}), ("lora", {"lora": True})):
        with pytest.raises(ConfigError, match="no row has a picture"):
            place.run(vision=value, **more)


def pairs_option(place: Place) -> None:
    """Of three responses, all pairs or the best against the worst."""
    rows = [
        {"prompt": f"p{i}", "responses": [f"{r['chosen']}a", r["rejected"], f"k{r['chosen']}"], "scores": [2, 1, 0]}
        for i, r in enumerate(ROWS)
    ]
    data = write_rows(place.folder / "ranked.jsonl", rows)
    moves("pairs", "best-worst", data=data)(place)
    assert steps(Path(place.run(data=data)))[0]["loss"] == pytest.approx(math.log(2))


def measured(option: str, value: Any) -> Callable[[Place], None]:
    """With the option the KL is measured at other steps, or on other samples; tests/methods/test_kl_guard.py."""

    def check(place: Place) -> None:
        given = {"max_kl": 1e9, "kl_every": 2, "kl_samples": 8, "max_new_tokens": 4, "learning_rate": 1e-2}
        found = [
            [(line["step"], line["objective/kl"]) for line in steps(Path(place.run(**more))) if "objective/kl" in line]
            for more in (given, {**given, option: value})
        ]
        assert found[0] and found[1] and found[0] != found[1]

    return check


def max_kl(place: Place) -> None:
    with pytest.raises(RunError, match="more than --max-kl 1e-09"):
        place.run(max_kl=1e-9, learning_rate=1e-2, max_new_tokens=8, kl_every=1)


SHOWN: dict[str, Callable[[Place], None]] = {
    "model": moves("model", "@other"),
    "router_aux_loss_coef": router_aux_loss_coef,
    "router_z_loss_coef": router_z_loss_coef,
    "reference": moves("reference", "@other"),
    "adapter": moves("adapter", "@lora"),
    "reference_adapter": moves("reference_adapter", "@lora", lora=True),
    "data": moves("data", "@more"),
    "eval_data": eval_data,
    "eval_fraction": moves("eval_fraction", 0.3),
    "on_bad_row": on_bad_row,
    "data_weights": moves("data_weights", ["2"]),
    "format": layout_by_name,
    "columns": columns,
    "label_means": label_means,
    "ignore_columns": ignore_columns,
    "header": header,
    "picture_folder": picture_folder,
    "chat_template": moves("chat_template", "@template", data="@talk"),
    "template_variables": moves("template_variables", ["shout=true"], data="@talk", chat_template="@template"),
    "max_length": moves("max_length", 12),
    "shuffle": moves("shuffle", False),
    "reasoning": moves("reasoning", "strip", data="@talk", chat_template="@template"),
    "earlier_turns": moves("earlier_turns", "as-shown", data="@turns", chat_template="@forgetful"),
    "compare": compare,
    "beta": moves("beta", 0.5),
    "label_smoothing": moves("label_smoothing", 0.3),
    "loss": moves("loss", "dpo:1.0,nll:0.2"),
    "loss_options": moves("loss_options", ["nll.average=tokens"], loss="dpo,nll"),
    "divergence": moves("divergence", "js"),
    "divergence_alpha": moves("divergence_alpha", 0.2, divergence="alpha"),
    "weighting": moves("weighting", "wpo"),
    "ref_model_sync_steps": moves("ref_model_sync_steps", 1),
    "ref_model_mixup_alpha": moves("ref_model_mixup_alpha", 0.2, ref_model_sync_steps=1),
    "pairs": pairs_option,
    "lora": moves("lora", True),
    "lora_rank": moves("lora_rank", 3, lora=True),
    "lora_alpha": moves("lora_alpha", 5, lora=True),
    "lora_dropout": moves("lora_dropout", 0.2, lora=True),
    "lora_targets": lora_targets,
    "vision": vision,
    "quantise": quantise,
    "epochs": moves("epochs", 2.0),
    "max_steps": moves("max_steps", 2),
    "batch_size": moves("batch_size", 4),
    "learning_rate": moves("learning_rate", 2e-3),
    "find_learning_rate": moves("find_learning_rate", True, eval_fraction=0.3),
    "max_kl": max_kl,
    "kl_every": measured("kl_every", 1),
    "kl_samples": measured("kl_samples", 16),
    "max_new_tokens": measured("max_new_tokens", 2),
    "schedule": moves("schedule", "constant"),
    "warmup": moves("warmup", 0.0),
    "weight_decay": moves("weight_decay", 0.1),
    "adam_beta1": moves("adam_beta1", 0.5),
    "adam_beta2": moves("adam_beta2", 0.5),
    "adam_epsilon": moves("adam_epsilon", 1e-3),
    "max_grad_norm": moves("max_grad_norm", 0.01),
    "eval_every": eval_every,
    "eval_dtype": eval_dtype,
    "samples": samples,
    "early_stopping": early_stopping,
    "output": output,
    "save_every": save_every,
    "keep_last": keep_last,
    "resume": resume,
    "overwrite": overwrite,
    "dry_run": dry_run,
    "progress": progress,
    "track": track,
    "track_project": track_project,
    "dtype": dtype,
    "device": device,
    "threads": threads,
    "token_budget": token_budget,
    "gradient_checkpointing": gradient_checkpointing,
    "optimizer": optimizer,
    "offload": offload,
    "attention": attention,
    "compile": compile_layers,
    "seed": seed,
    "shard": shard,
    "deterministic": deterministic,
}


def test_no_option_is_left_out() -> None:
    assert set(SHOWN) == {field.name for field in dataclasses.fields(DpoConfig)}


@pytest.mark.parametrize("option", SHOWN)
def test_the_option_does_something(option: str, place: Place) -> None:
    SHOWN[option](place)
