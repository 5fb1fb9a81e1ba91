"""Distillation from a teacher behind a URL: the loss on its likeliest tokens, its cache, and whose tokenizer it has."""

from __future__ import annotations

import math
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import prefopt
from generate.fake_rollout_server import FakeRollouts, loaded, serving
from methods import small_world as world
from methods.test_distil import KINDS
from prefopt.cli import main
from prefopt.config.distil import DistilConfig
from prefopt.core.cache_folder import cache_root
from prefopt.core.dispatch import ServersLost
from prefopt.errors import ConfigError, Interrupted, ModelError, RunError
from prefopt.reference import teacher_cache
from prefopt.reference.blocks import list_spaces, read_sealed, verify
from prefopt.reference.teacher_cache import TeacherCache
from prefopt.rl.student import StudentBatches
from prefopt.train.remote_teacher import RemoteTeacher
from train.small import steps, weights
from train.test_resume import stop_after

ROWS = [{"prompt": a + b, "completion": c} for a, b, c in ("abc", "bcd", "cde", "def", "efa", "fab", "ace")]
ALL = len(world.LETTERS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A student, a teacher, and another one."""
    place = tmp_path_factory.mktemp("remote")
    return [world.write_world(place / str(seed), seed) for seed in (0, 3, 4)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))


def distil(folders: list[str], teacher: str, output: Path, **options: Any) -> None:
    given: dict[str, Any] = {"device": "cpu", "dtype": "float64", "progress": "none", "batch_size": 7}
    prefopt.distil(folders[0], ROWS, teacher=teacher, output=output, **{**given, **options})


@torch.no_grad()
def by_hand(folders: list[str], many: int, kind: str, weight: float) -> float:
    """Plain transformers, a token and a bin after the other."""
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder).double() for folder in folders[:2])
    found = []
    for row in ROWS:
        prompt = [world.LETTERS.index(x) for x in row["prompt"]]
        whole = [*prompt, world.LETTERS.index(row["completion"]), world.STOP]
        p, q = (m(torch.tensor([whole])).logits[0].softmax(-1) for m in (student, teacher))
        for t in range(len(prompt) - 1, len(whole) - 1):
            best = q[t].topk(many).indices.tolist()
            mine, theirs = ([float(x[t, i]) for i in best] for x in (p, q))
            if many < ALL:
                mine, theirs = [*mine, 1 - sum(mine)], [*theirs, 1 - sum(theirs)]
            mixed = [weight * b + (1 - weight) * a for a, b in zip(mine, theirs, strict=True)]
            kl = lambda x, y: sum(a * math.log(a / b) for a, b in zip(x, y, strict=True))  # noqa: E731
            jsd = weight * kl(theirs, mixed) + (1 - weight) * kl(mine, mixed)
            found.append({"forward": kl(theirs, mine), "reverse": kl(mine, theirs), "jsd": jsd}[kind])
    return sum(found) / len(found)


@pytest.mark.parametrize("many", [3, ALL])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_the_bins(kind: str, many: int, folders: list[str], tmp_path: Path) -> None:
    with serving(folders[1]) as fake:
        distil(folders, fake.url, tmp_path / "out", **KINDS[kind], teacher_top_k=many, max_steps=1)
    (first,) = steps(tmp_path / "out")
    wanted = by_hand(folders, many, kind, KINDS[kind].get("jsd_weight", 0.5))
    assert first["divergence"] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.slow
def test_all_tokens_teach_what_the_teacher_in_memory_teaches(folders: list[str], tmp_path: Path) -> None:
    options: dict[str, Any] = {"epochs": 4, "batch_size": 3, "learning_rate": 1e-2, "eval_fraction": 0.3}
    with serving(folders[1]) as fake:
        distil(folders, fake.url, tmp_path / "remote", **options)
    distil(folders, folders[1], tmp_path / "memory", **options)
    one, two = steps(tmp_path / "remote"), steps(tmp_path / "memory")
    for name in ("loss", "nll", "teacher_nll"):
        assert [a[name] for a in one] == pytest.approx([b[name] for b in two], rel=1e-4)
    assert one[-1]["loss"] < one[0]["loss"]


def test_answers_are_cached_and_never_stale(folders: list[str], tmp_path: Path) -> None:
    def asked(fake: FakeRollouts, name: str, **options: Any) -> int:
        before = len(fake.scored)
        distil(folders, fake.url, tmp_path / name, max_steps=1, teacher_top_k=4, **options)
        return len(fake.scored) - before

    with serving(folders[1]) as fake:
        probes = 4
        assert asked(fake, "first") == probes + len(ROWS)
        assert asked(fake, "again", learning_rate=1e-3) == probes
        fake.scorers["base"] = loaded(folders[2])  # the server was started with other weights
        assert asked(fake, "other") == 2 * probes + len(ROWS)
        assert steps(tmp_path / "other")[0]["loss"] != steps(tmp_path / "first")[0]["loss"]
        fake.scorers["base"] = loaded(folders[1])
        assert asked(fake, "back") == probes
        assert steps(tmp_path / "back")[0]["loss"] == steps(tmp_path / "first")[0]["loss"]
        assert [(s.about["model"], s.responses) for s in list_spaces()] == [("base", len(ROWS))] * 2
        for block in (cache_root() / "reference").glob("*/block-*"):
            block.write_bytes(block.read_bytes()[:-3] + b"bad")
        assert len(verify()) == 2
        assert asked(fake, "damaged") == probes + len(ROWS)


def test_a_block_is_read_once_and_not_by_who_wrote_it(
    folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    monkeypatch.setattr(
        teacher_cache, "read_sealed", lambda path, name: read.append(path.name) or read_sealed(path, name)
    )
    with serving(folders[1]) as fake:
        for name in ("first", "second"):
            distil(folders, fake.url, tmp_path / name, max_steps=1)
            blocks = [file for file in read if file.startswith("block-")]
            assert len(blocks) == (name == "second")


def test_what_was_answered_before_a_server_is_lost_is_kept(folders: list[str], tmp_path: Path) -> None:
    with serving(folders[1]) as fake:
        score, options = fake.score, {"teacher_concurrency": 1, "max_steps": 1}

        def some(body: dict[str, Any]) -> Any:
            return score(body) if len(fake.scored) < 4 + 3 else (503, {"error": "overloaded"})

        fake.score = some  # type: ignore[method-assign]
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(TeacherCache.__init__.__kwdefaults__, "pause", 0.01)
            with pytest.raises(ServersLost, match="--teacher"):
                distil(folders, fake.url, tmp_path / "out", **options)
        fake.score, fake.errors = score, 1  # type: ignore[method-assign]
        distil(folders, fake.url, tmp_path / "out", resume=True, **options)
        assert len(fake.scored) == 4 + 3 + 4 + (len(ROWS) - 3)


def test_another_teacher_does_not_continue_a_run(folders: list[str], tmp_path: Path) -> None:
    with serving(folders[1]) as fake, pytest.MonkeyPatch.context() as patch:
        stop_after(1, patch)
        with pytest.raises(Interrupted):
            distil(folders, fake.url, tmp_path / "out", epochs=3)
        fake.scorers["base"] = loaded(folders[2])
        shutil.rmtree(cache_root())  # what counts is in the run
        with pytest.raises(RunError, match=r"the teacher at \S+ has other weights than"):
            distil(folders, fake.url, tmp_path / "out", epochs=3, resume=True)
    with serving(folders[1]) as moved:
        shutil.rmtree(cache_root())
        distil(folders, moved.url, tmp_path / "out", epochs=3, resume=True)


@pytest.mark.slow
def test_the_teacher_is_asked_about_responses_that_are_drawn(folders: list[str], tmp_path: Path) -> None:
    """Drawn in this process or by a rollout server, and again after a stop."""
    options: dict[str, Any] = {"on_policy": 0.6, "max_new_tokens": 3, "epochs": 6, "learning_rate": 1e-2}
    options |= {"divergence": "reverse", "teacher_top_k": 5, "save_every": 2}
    with serving(folders[1]) as teacher, serving(folders[0]) as rollouts:
        distil(folders, teacher.url, tmp_path / "whole", **options)
        lines = steps(tmp_path / "whole")
        assert {line["on_policy"] for line in lines} == {0.0, 1.0}
        with pytest.MonkeyPatch.context() as patch:
            stop_after(3, patch)
            with pytest.raises(Interrupted):
                distil(folders, teacher.url, tmp_path / "parts", **options)
        distil(folders, teacher.url, tmp_path / "parts", resume=True, **options)
        one, two = weights(tmp_path / "whole"), weights(tmp_path / "parts")
        assert all(torch.equal(one[name], two[name]) for name in one)
        distil(folders, teacher.url, tmp_path / "served", rollout_server=[rollouts.url], **options)
        assert [line["on_policy"] for line in steps(tmp_path / "served")] == [line["on_policy"] for line in lines]


@pytest.mark.parametrize("served", [False, True], ids=["", "served"])
def test_a_stop_while_the_teacher_is_asked_loses_nothing(served: bool, folders: list[str], tmp_path: Path) -> None:
    """Of a run that saves nothing else; what a rollout server drew is not drawn again. The resumed run is stopped there
    once more."""
    options: dict[str, Any] = {"on_policy": 1.0, "max_new_tokens": 3, "epochs": 4, "teacher_top_k": 5}
    with serving(folders[1]) as teacher, serving(folders[0]) as rollouts:
        options |= {"rollout_server": [rollouts.url]} if served else {}
        distil(folders, teacher.url, tmp_path / "whole", **options)
        ask = RemoteTeacher.ask_again
        for resume in (False, True):
            asked: list[int] = []

            def stopping(self: RemoteTeacher, groups: Any, n: int = 1 if resume else 3, asked: Any = asked) -> None:
                asked.append(1)
                if len(asked) == n:
                    signal.raise_signal(signal.SIGTERM)
                    self.run.stop.check(" while the teacher is asked")
                ask(self, groups)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(RemoteTeacher, "ask_again", stopping)
                with pytest.raises(Interrupted, match="while the teacher"):
                    distil(folders, teacher.url, tmp_path / "parts", resume=resume, **options)
            assert [p.name for p in (tmp_path / "parts" / "checkpoints").glob("step-*")] == ["step-00000002"]
        with pytest.MonkeyPatch.context() as patch:
            drawn: list[int] = []
            draw = StudentBatches._draw
            patch.setattr(StudentBatches, "_draw", lambda self, step, *a: drawn.append(step) or draw(self, step, *a))
            distil(folders, teacher.url, tmp_path / "parts", resume=True, **options)
            assert drawn == ([3] if served else [2, 3])
        if not served:  # a server draws with random numbers of its own
            one, two = weights(tmp_path / "whole"), weights(tmp_path / "parts")
            assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_dry_run_asks_about_no_data(folders: list[str], tmp_path: Path) -> None:
    with serving(folders[1]) as fake:
        distil(folders, fake.url, tmp_path / "out", dry_run=True)
        assert not fake.scored and not (tmp_path / "out").exists() and not (tmp_path / "cache" / "reference").exists()


def test_other_tokenizers_are_refused(folders: list[str], tmp_path: Path) -> None:
    other = world.tokenizer()
    other.add_tokens(["g"])
    with serving(folders[1], tokenizer=other) as fake, pytest.raises(ModelError, match="tokenizer is not the model's"):
        distil(folders, fake.url, tmp_path / "out")
    with serving(folders[1], without="tokenize") as fake:
        with pytest.raises(ConfigError, match="give --same-tokenizer"):
            distil(folders, fake.url, tmp_path / "out")
        distil(folders, fake.url, tmp_path / "out", same_tokenizer=True, max_steps=1)
    with serving(folders[1], max_logprobs=2) as fake, pytest.raises(RunError, match="a larger --max-logprobs"):
        distil(folders, fake.url, tmp_path / "few")
    with serving(world.write_world(tmp_path / "t"), without="nothing") as fake:
        score = fake.score

        def larger(body: dict[str, Any]) -> Any:
            status, answer = score(body)
            answer["choices"][0]["prompt_logprobs"][1]["99"] = {"logprob": -0.5}
            return status, answer

        fake.score = larger  # type: ignore[method-assign]
        with pytest.raises(ModelError, match="it gives token 99"):
            distil(folders, fake.url, tmp_path / "larger")


def test_options_of_a_server_are_for_one() -> None:
    given: dict[str, Any] = {"model": "m", "data": "d", "output": "o"}
    for teacher, more, line in (
        ("m2", {"teacher_top_k": 5}, "--teacher-top-k is for a teacher on a server"),
        ("m2", {"same_tokenizer": True}, "--same-tokenizer is for a teacher on a server"),
        ("http://here:1", {"teacher_adapter": "a"}, "--teacher-adapter: a server has its own"),
        ("m2", {"rollout_server": ["http://here:1"]}, "--rollout-server draws responses: give --on-policy"),
    ):
        with pytest.raises(ConfigError, match=line):
            DistilConfig(**given, teacher=teacher, **more)
    assert DistilConfig(**given, teacher="http://here:1").teacher_top_k == 20


def test_an_absent_teacher_is_said_at_once(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    words = ["distil", "--model", folders[0], "--data", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "o")]
    assert main([*words, "--teacher", "http://127.0.0.1:9"]) == 2
    assert "127.0.0.1:9/v1 cannot be reached" in capsys.readouterr().err
    assert main(["dpo", *words[1:], "--reference", "http://127.0.0.1:9"]) == 2
    assert "http://127.0.0.1:9: no such folder" in capsys.readouterr().err
