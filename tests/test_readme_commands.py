"""Every command of README and tour does what it says, on a tiny model and a few rows in place of its names."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest

from prefopt.cli import main
from runs_of_all import LABELLED, RANKED
from test_docs import ROOT, SHELL, blocks, commands
from train.small import pairs, write_model, write_rows

pytest.importorskip("vaderSentiment", reason="the README's judge is an extra: prefopt[demo]")
pytest.importorskip("matplotlib", reason="plot and report draw with it: prefopt[plot]")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

QUICK = {
    **{verb: ["--max-length", "64", "--batch-size", "4"] for verb in ("dpo", "sft", "distil", "reward")},
    "ppo": ["--max-new-tokens", "4", "--batch-size", "4", "--max-kl", "1e6"],
    "online": ["--max-new-tokens", "4", "--batch-size", "4"],
    "rlhf": ["--max-new-tokens", "4", "--max-length", "64", *("--ppo", "batch_size=4", "max_kl=1e6")],
    **{verb: ["--max-new-tokens", "4"] for verb in ("sample", "compare")},
}
"""Options that make a command short, in addition to those of the page."""
ELSEWHERE = {"collect serve": "waits for people", "ui": "as well", "frontier": "hours", "methods": "hours"}
"""Commands that tests of their own run."""


def test_every_command_of_readme_and_tour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = write_model(tmp_path / "MODEL")
    for name, rows in (("PAIRS", pairs(24)), ("RANKINGS", RANKED), ("LABELS", LABELLED)):
        write_rows(Path(f"{name}.jsonl"), rows)
    write_rows(
        Path("CHATS.jsonl"),
        [{"messages": [{"role": "user", "content": "k"}, {"role": "assistant", "content": "a"}]}] * 8,
    )
    write_rows(Path("PROMPTS.jsonl"), [{"prompt": f"k{i}: "} for i in range(8)])
    Path("PROMPTS.txt").write_text("k1: \nm2: \n")
    Path("runs").mkdir()
    assert Path(model).is_dir()

    done = []
    for block in [*blocks(ROOT / "README.md"), *blocks(ROOT / "docs/tour.md")]:
        for words in commands(block.text) if block.language in SHELL else ():
            if not words or Path(words[0]).name != "prefopt":
                continue
            verb = " ".join(words[1:3]) if words[1] in ("data", "collect") else words[1]
            if verb in ELSEWHERE:
                continue
            line, _, into = " ".join(words[1:]).partition(" > ")
            shutil.rmtree("OUTPUT", ignore_errors=True)  # one name for many
            if verb not in ("dpo", "launch"):
                kept = Path("adapter" if verb == "merge" else "whole")
                shutil.copytree(kept, "OUTPUT") if kept.exists() else None
            monkeypatch.setattr("sys.stdin", io.StringIO("/exit\n"))
            status = main([*line.split(), *QUICK.get(verb, [])])
            out, err = capsys.readouterr()
            if "--data STUDY.db" in line:
                assert status == 2 and "holds no rows" in err, "nobody has voted"
                continue
            assert status == 0, (block.place, line, err)
            if verb == "dpo" and "--dry-run" not in line:
                shutil.copytree("OUTPUT", "adapter" if "--lora" in line else "whole", dirs_exist_ok=True)
            if into:
                Path(into).write_text(out)
            done.append(verb)
    assert {"dpo", "data check", "losses", "collect new", "runs", "plot", "sample", "chat", "merge"} <= set(done)
    assert {"compare", "report", "sft", "distil", "reward", "ppo", "online", "rlhf"} <= set(done)
