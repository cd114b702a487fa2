"""What a person sees while a run works, and what is measured of the machine."""

from __future__ import annotations

import io
import time
from collections.abc import Callable

import pytest
import torch
from rich.console import Console

from runs.folder import system
from runs.folder.progress import Progress, duration, number


def wait_for(text: Callable[[], str], *words: str) -> str:
    end = time.monotonic() + 20
    while not all(word in text() for word in words) and time.monotonic() < end:
        time.sleep(0.02)
    missing = [word for word in words if word not in text()]
    assert not missing, f"{missing} not in {text()}"
    return text()


def test_without_a_terminal_a_line_comes_by_the_clock_even_when_nothing_is_called() -> None:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=False, width=400)
    with Progress(console, every=0.05) as progress:
        progress.start(10_000, 1_000)
        progress.phase("world model")
        progress.update(2_500, updates=12, kl=0.03125)
        progress.episode(-20.0, 900)
        progress.episode(-18.0, 900)
        text = wait_for(
            shown.getvalue,
            "world model",
            "2,500 / 10,000",
            "(25.0 %)",
            "updates 12",
            "kl 0.03125",
            "-19.0",
            "left",
        )
        lines = text.count("\n")
        wait_for(lambda: "x" * (shown.getvalue().count("\n") > lines + 1), "x")  # two further heartbeats
        progress.say("saved [1]")
    ended = shown.getvalue()
    assert "saved [1]\n" in ended and "\x1b" not in ended
    time.sleep(0.15)
    assert shown.getvalue() == ended  # nothing after the end


def test_no_time_is_left_that_is_less_than_none() -> None:
    shown = io.StringIO()
    with Progress(Console(file=shown, force_terminal=False, width=400), every=0.05) as progress:
        progress.start(100, 50)
        wait_for(shown.getvalue, "left")
        time.sleep(0.6)
        progress.update(99)
        assert progress.line().endswith(" 0 s left")
        progress.update(130)  # eight games play whole steps, and a round may follow the last one
        assert progress.line().endswith(" ? left")


def test_a_run_that_something_else_ends_has_no_share_of_its_steps() -> None:
    for terminal in (False, True):
        shown = io.StringIO()
        with Progress(Console(file=shown, force_terminal=terminal, width=400), every=0.05) as progress:
            progress.start(0, 5)
            wait_for(shown.getvalue, "5 steps", "gone")
        assert not [word for word in ("left", "%", " / ") if word in progress.line()]


def test_on_a_terminal_there_is_a_live_table() -> None:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=120)
    with Progress(console) as progress:
        progress.start(100)
        progress.phase("policy")
        progress.update(40, kl=0.5)
        progress.episode(3.0, 10)
        wait_for(shown.getvalue, "policy", "40 / 100", "kl", "mean return")
        progress.say("saved")
    assert "saved" in shown.getvalue()


def test_the_shares_of_the_phases_sum_to_one() -> None:
    progress = Progress(Console(file=io.StringIO()))
    progress.seconds = {"collect": 1.0, "world model": 3.0}
    assert progress.shares() == {"collect": 0.25, "world model": 0.75}


def test_numbers_and_durations_are_short() -> None:
    assert [number(value) for value in (12345, 0.01234567, 1.2e-5, 123456.7, 3.0, "on")] == [
        "12,345", "0.01235", "1.2e-05", "123,457", "3", "on",
    ]  # fmt: skip
    assert [duration(seconds) for seconds in (12, 600, 7500)] == ["12 s", "10 min", "2 h 05 min"]


def test_the_fewest_threads_that_are_nearly_fastest_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    speeds = {1: 10.0, 2: 19.0, 4: 20.0, 8: 7.0}
    monkeypatch.setattr(system, "cores", lambda: 8)
    monkeypatch.setattr(system, "_products_per_second", lambda seconds: speeds[torch.get_num_threads()])
    assert system.choose_threads() == 2
    speeds[2] = 5.0
    assert system.choose_threads() == 4
    assert torch.get_num_threads() == before


def test_the_measurement_of_threads_is_real_and_short() -> None:
    begin = time.monotonic()
    assert 1 <= system.choose_threads(0.1) <= system.cores()
    assert time.monotonic() - begin < 10


def test_the_bar_has_a_line_of_its_own() -> None:
    for width in (80, 120):
        console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
        progress = Progress(console)
        progress.total, progress.step = 100, 40
        progress.update(40, pretraining="3 of 30")
        console.print(progress._table())
        lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
        assert "━" in lines[0] and "phase" not in lines[0] and lines[1].startswith("phase")
        assert max(map(len, lines)) <= width


def test_a_part_of_a_round_says_how_long_it_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Progress(Console(file=io.StringIO()))
    progress.total = 1_000
    assert "? left" in progress.line()
    progress.update(10, pretraining="1 of 1,001")
    now[0] = 20.0
    progress.update(10, pretraining="101 of 1,001")
    assert "3 min left of pretraining" in progress.line()
    now[0] = 60.0
    progress._mark()
    progress.update(10, pretraining=None)
    assert "? left" in progress.line()
    now[0] = 70.0
    progress.update(20)
    assert "1.0 steps/s" in progress.line() and "16 min left" in progress.line(), "what was before does not count"
