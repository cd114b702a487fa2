"""The clock is read off pixels as the memory has it, and its faults are counted for what they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from envs.errors import UserError
from envs.games import GameConfig
from runs.measure import clock
from runs.measure.atari import Emulator

RATE = 1 / 15


@pytest.mark.slow
def test_a_reader_reads_what_it_was_not_taught_with() -> None:
    emulator, known = Emulator("ALE/Skiing-v5", GameConfig(size="112x80", gray=False), 1), clock.CLOCKS["skiing"]
    frames, digits = [], []
    for step in range(900):
        emulator.step(step // 40 % 3)
        every = [int(digit) for byte in known.bytes for digit in divmod(int(emulator.memory[-1][byte]), 16)]
        frames.append(torch.from_numpy(emulator.frame()) / 255)
        digits.append([every[digit] for digit in known.digits])
    frame, digit = torch.stack(frames), torch.tensor(digits)
    torch.manual_seed(0)
    taught = torch.rand(len(frame)) < 0.7
    right = clock.Reader(frame[taught], digit[taught], updates=300)(frame[~taught]).argmax(-1) == digit[~taught]
    assert (right.float().mean(0) > 0.93).all(), right.float().mean(0)


def test_what_a_clock_does_is_told() -> None:
    sure, due = torch.ones(2, 301, dtype=torch.bool), torch.arange(301) * RATE
    good = clock.described(due.repeat(2, 1), sure, RATE)
    assert good == {"legible": 1.0, "fast_percent": 0.0, "stops": 0.0, "jumps": 0.0}
    assert clock.described(1.25 * due.repeat(2, 1), sure, RATE)["fast_percent"] == pytest.approx(25, abs=0.1)
    still = torch.stack([due, due.clamp(max=due[150])])
    told = clock.described(still, sure, RATE)
    assert told["stops"] == pytest.approx((256 - 150) / (2 * 256), abs=0.02) and told["jumps"] == 0
    jumping = due.repeat(2, 1)
    jumping[0, 100:] += 3
    assert clock.described(jumping, sure, RATE)["jumps"] == pytest.approx(1 / 600, abs=1e-4)
    sure[0, 100:] = False
    assert clock.described(jumping, sure, RATE)["jumps"] == 0, "what nobody can read is no jump"


def test_games_without_a_known_clock_are_told_so(tmp_path: Path) -> None:
    assert clock.clock_of("ALE/Skiing-v5").seconds[0] == 60
    with pytest.raises(UserError, match="reads those of skiing"):
        clock.clock_of("ALE/Pong-v5")
    shown = torch.arange(31).repeat(2, 1) * RATE
    assert clock.picture(shown, torch.ones_like(shown, dtype=torch.bool), RATE, "two").startswith(b"\x89PNG")
