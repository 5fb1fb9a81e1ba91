"""Models that the Hub does not give: one line that names the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from hub import Hub, prefopt
from train.small import pairs, write_rows


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("org/gated", "org/gated: is gated: ask for access at https://huggingface.co/org/gated, then log in with: hf"),
        ("org/none", "org/none: no such folder here, and none on the Hub; check the spelling"),
    ],
)
def test_what_is_gated_or_missing_names_the_remedy(
    name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(tmp_path / "d.jsonl", pairs(2))
    with Hub(gated={"org/gated"}).served() as hub:
        done = prefopt(hub, monkeypatch, "dpo", "--model", name, "--data", data, "--output", str(tmp_path / "o"))
    assert done.status == 2 and said in done.err and done.err.count("\n") == 1, done.err
    assert hub.asked and not any("harness" in line for line in hub.asked)


def test_without_a_network_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_rows(tmp_path / "d.jsonl", pairs(2))
    words = ["dpo", "--model", "org/x", "--data", data, "--output", str(tmp_path / "o")]
    done = prefopt(Hub(url="http://127.0.0.1:9"), monkeypatch, *words, offline=True)
    assert "org/x: no such folder here, and the Hub cannot be asked (HF_HUB_OFFLINE is set)" in done.err
    assert done.err.count("\n") == 1
