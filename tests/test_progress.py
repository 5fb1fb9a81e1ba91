"""What a person sees while something runs."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest

from prefopt.core import terminal
from prefopt.core.terminal import Reporter, duration, size, wrapped
from prefopt.runs.metrics import note

STEP = {
    "loss": 0.6931,
    "rewards/margins": 0.0123,
    "rewards/accuracies": 0.5,
    "log_ratios_per_token/chosen": -0.01,
    "log_ratios_per_token/rejected": -0.02,
    "grad_norm": 12.34,
    "learning_rate": 9.5e-7,
    "tokens_per_second": 12345.6,
    "pairs_per_second": 3.14,
}


class Screen:
    """A terminal of 70 columns that keeps what is written to it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, mode: str, now: list[float]) -> None:
        self.file, screen = io.StringIO(), terminal.Screen
        console = lambda **more: screen(file=self.file, force_terminal=mode == "rich", width=70, **more)  # noqa: E731
        monkeypatch.setattr(terminal, "Screen", console)
        monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
        self.reporter = Reporter(mode)

    @property
    def lines(self) -> list[str]:
        """The lines as they stood last."""
        text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.file.getvalue())
        return [line.rsplit("\r", 1)[-1].rstrip() for line in text.splitlines() if line.strip()]


def test_a_terminal_shows_every_number_below_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Screen(monkeypatch, "rich", [0.0])
    with terminal.reporter.bar("train", 40, "steps") as bar:
        bar.update(12, note(STEP))
        terminal.reporter.say("a line of its own")
    assert "a line of its own" in terminal.lines
    shown = terminal.lines[-5:]
    assert re.match(r"train ━+.* 12/40 steps", shown[0])
    assert shown[1:] == [
        "  loss 0.6931  margin +0.012  accuracy 0.50",
        "  log-ratio per token -0.010 chosen, -0.020 rejected",
        "  learning rate 9.5e-07  12,346 tokens/s  3.1 pairs/s",
        "  gradient norm 12.3",
    ]
    assert all(len(line) <= 70 for line in terminal.lines)


def test_elsewhere_a_line_every_ten_seconds_tells_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    terminal = Screen(monkeypatch, "plain", now)
    with terminal.reporter.bar("train", 40, "steps") as bar:
        for step in range(1, 41):
            now[0] += 3.0
            bar.update(step, note(STEP), first=step == 1)
    assert [re.match(r"train: (\d+)/40 steps", line)[1] for line in terminal.lines] == [  # type: ignore[index]
        "1", *map(str, range(5, 40, 4)), "40",
    ]  # fmt: skip
    assert terminal.lines[1] == (
        "train: 5/40 steps, 1 min 45 s left, loss 0.6931, margin +0.012, accuracy 0.50, log-ratio per token -0.010"
        " chosen, -0.020 rejected, learning rate 9.5e-07, 12,346 tokens/s, 3.1 pairs/s, gradient norm 12.3"
    )
    assert "left" not in terminal.lines[-1]


def test_time_left_goes_by_work_where_units_end_together(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    terminal = Screen(monkeypatch, "plain", now)
    with terminal.reporter.bar("sampling", 100, "samples") as bar:
        for done, work in ((0, 0.0), (1, 25.0), (100, 100.0)):
            bar.update(done, work=work)
            now[0] += 20.0
    assert terminal.lines == ["sampling: 1/100 samples, 1 min 00 s left", "sampling: 100/100 samples"]


@pytest.mark.parametrize("mode", ["rich", "plain", "none"])
def test_a_note_may_be_one_text_or_none(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Screen(monkeypatch, mode, [0.0])
    with terminal.reporter.bar("score", 2, "responses") as bar:
        bar.update(1, first=True)
        bar.update(2, "one text")
    assert ("one text" in "\n".join(terminal.lines)) == (mode != "none")
    assert bool(terminal.lines) == (mode != "none")


def test_a_record_without_a_metric_says_nothing_of_it() -> None:
    assert note({"loss": 2.0}) == ["loss 2.0000"]
    broken: dict[str, Any] = {"loss": 1.0, "rewards/margins": None, "log_ratios_per_token/chosen": 0.5}
    assert note(broken) == ["loss 1.0000"]


def test_parts_are_never_broken() -> None:
    assert wrapped(["aaaa", "bbbb", "", "c" * 20, "d"], 14) == ["  aaaa  bbbb", "  " + "c" * 20, "  d"]
    assert wrapped([], 10) == []


def test_times_and_sizes_in_words() -> None:
    assert [duration(s) for s in (0.4, 59.4, 200, 7500)] == ["0 s", "59 s", "3 min 20 s", "2 h 05 min"]
    assert [size(n) for n in (999, 1500, 3.14e9)] == ["999 bytes", "1.5 kB", "3.1 GB"]
