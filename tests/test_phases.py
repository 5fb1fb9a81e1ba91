"""The time of a run, by phase."""

from __future__ import annotations

import pytest

from prefopt.core import phases
from prefopt.core.phases import PhaseClock, clocked, phase


def test_phases_exclude_those_inside_and_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(phases.time, "monotonic", lambda: now)

    @phase("samples")
    def draw(seconds: float) -> float:
        nonlocal now
        now += seconds
        return seconds

    def wait(seconds: float) -> None:
        nonlocal now
        now += seconds

    draw(5)  # no run, no clock
    with clocked() as clock:
        wait(7)
        with phase("training"):
            wait(30)
            assert draw(8) == 8 and draw(2) == 2
            with pytest.raises(ValueError), phase("evaluation"):
                wait(4)
                raise ValueError
            with clocked() as inner, phase("training"):  # a run that this one starts
                wait(1)
        with phase("checks"):
            wait(0.2)
    assert clock.seconds == {"samples": 10, "evaluation": 4, "training": 31, "checks": pytest.approx(0.2)}
    assert inner.seconds == {"training": 1}
    assert clock.total == pytest.approx(sum(clock.seconds.values()) + 7)
    assert clock.in_words() == "52 s (training 31 s, samples 10 s, evaluation 4 s, other 7 s)"


def test_a_clock_without_phases_says_the_whole() -> None:
    assert PhaseClock().in_words() == "0 s"
