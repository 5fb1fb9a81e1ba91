"""``prefopt push`` against a Hub on this machine: what is sent, what stays, and what is said where it cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hub import Hub, prefopt
from prefopt.cli import main
from prefopt.errors import ConfigError, ModelError
from prefopt.model.push import confirmed, plan_upload
from train.small import write_model

# The library's own way to send a large file.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

MODEL = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished run's folder, with everything that may lie in one."""
    folder = tmp_path / "aligned"
    write_model(folder)
    (folder / "README.md").write_text("# aligned\n")
    (folder / "run.json").write_text('{"status": "finished"}')
    (folder / "metrics.jsonl").write_text("")
    (folder / "config.yaml").write_text("beta: 0.1\n")
    (folder / ".lock").touch()
    (folder / "notes.pkl").touch()
    for name in ("weights.safetensors", "optimizer.safetensors", "state.json"):
        (folder / "checkpoints" / "step-00000001").mkdir(parents=True, exist_ok=True)
        (folder / "checkpoints" / "step-00000001" / name).write_bytes(b"x")
    return folder


def test_the_model_is_sent_and_nothing_else(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Hub().served() as hub:
        done = prefopt(hub, monkeypatch, "push", str(folder), "--repo", "me/aligned", "--yes")
    assert done.status == 0, done.err
    sent = hub.repos["me/aligned"]
    assert set(sent) == MODEL | {"README.md"} and hub.private["me/aligned"]
    assert all(sent[name] == (folder / name).read_bytes() for name in sent)
    assert "https://huggingface.co/me/aligned (private):" in done.out
    assert f"sent: {hub.url}/me/aligned/commit/abc" in done.out
    for name in (".lock", "notes.pkl", "checkpoints/", "run.json", "metrics.jsonl"):
        assert f"left out: {name} (" in done.out
    assert not any("harness" in line or "telemetry" in line for line in hub.asked), "no more is told than asked"


def test_run_and_checkpoints_are_sent_when_asked(folder: Path) -> None:
    files = plan_upload(folder, run=True, checkpoints=True).files
    assert set(files) == MODEL | {"README.md", "run.json", "metrics.jsonl", "config.yaml"} | {
        f"checkpoints/step-00000001/{name}" for name in ("weights.safetensors", "optimizer.safetensors", "state.json")
    }
    assert files["model.safetensors"] == (folder / "model.safetensors").stat().st_size


def test_without_a_yes_nothing_is_asked_of_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Hub().served() as hub:
        done = prefopt(hub, monkeypatch, "push", str(folder), "--repo", "me/aligned")
    assert done.status == 2 and "nothing was sent: give --yes" in done.err
    assert "model.safetensors" in done.out and hub.asked == []


def test_a_person_at_a_terminal_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    for answer, expected in (("y", True), ("Yes ", True), ("", False), ("no", False)):
        monkeypatch.setattr("builtins.input", lambda _, answer=answer: answer)
        assert confirmed(False) is expected
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    assert confirmed(True)
    with pytest.raises(ConfigError, match="nothing was sent"):
        confirmed(False)


def test_a_public_repository_cannot_be_made_private_by_this(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Hub(repos={"me/x": {}}, private={"me/x": False}).served() as hub:
        done = prefopt(hub, monkeypatch, "push", str(folder), "--repo", "me/x", "--yes")
        assert (
            done.status == 2
            and "give --private false" in done.err
            and "exists and is public: nothing was sent" in done.err
            and hub.repos["me/x"] == {}
        )
        assert (
            prefopt(hub, monkeypatch, "push", str(folder), "--repo", "me/x", "--private", "false", "--yes").status == 0
        )
    assert set(hub.repos["me/x"]) == MODEL | {"README.md"}


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, "not logged in to the Hub (401); log in with: hf auth login"),
        (403, "your token has no write access there (403)"),
        (404, "the Hub knows no 'me', or your token may not see it (404)"),
    ],
)
def test_what_the_hub_refuses_is_one_line_with_the_remedy(
    status: int, said: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Hub(refuse=status).served() as hub:
        token = None if status == 401 else "hf_secret"
        done = prefopt(hub, monkeypatch, "push", str(folder), "--repo", "me/aligned", "--yes", token=token)
    assert done.status == 2 and said in done.err and done.err.count("\n") == 1, done.err
    assert "hf_secret" not in done.err + done.out


def test_an_upload_that_breaks_off_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(Hub):
        def answer(self, method: str, path: str, *more: Any) -> Any:
            return (507, {}, {}) if path.startswith("/large/") else super().answer(method, path, *more)

    with Full().served() as hub:
        done = prefopt(hub, monkeypatch, "push", str(folder), "--repo", "me/aligned", "--yes")
    assert done.status == 2 and "the Hub answered 507; try again" in done.err and hub.repos["me/aligned"] == {}


def test_names_and_networks_that_do_not_work_are_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(url="http://127.0.0.1:9")  # nobody listens there
    for words, said, offline in (
        (["--repo", "a/b/c d"], "not a repository name; give OWNER/NAME", False),
        (["--repo", "me/x"], "the Hub cannot be reached; try again", False),
        (["--repo", "me/x"], "the Hub cannot be reached (HF_HUB_OFFLINE is set)", True),
    ):
        done = prefopt(hub, monkeypatch, "push", str(folder), *words, "--yes", offline=offline)
        assert done.status == 2 and said in done.err and done.err.count("\n") == 1, done.err


def test_folders_of_this_machine_are_pointed_out(folder: Path) -> None:
    (folder / "README.md").write_text(f"trained on {Path.home()}/data/pairs.jsonl\n")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/models/base"}))
    first, second = plan_upload(folder).warnings
    assert f"README.md names folders of this machine ({Path.home()})" in first
    assert "adapter_config.json names its model by a folder of this machine (/models/base)" in second
    (folder / "README.md").write_text("trained on `pairs.jsonl`")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    assert plan_upload(folder).warnings == []


def test_a_link_out_of_the_folder_stays(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text("{}")
    (folder / "extra.json").symlink_to(tmp_path / "secret.json")
    assert "extra.json" not in plan_upload(folder).files and "extra.json" in plan_upload(folder).left_out


def test_what_is_no_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        plan_upload(tmp_path / "none")
    with pytest.raises(ModelError, match="holds no finished model"):
        plan_upload(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert main(["push", str(tmp_path), "--repo", "me/x"]) == 2
    assert "holds no weights" in capsys.readouterr().err
