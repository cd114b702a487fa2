"""The command `clock`: what becomes of the time that a game shows while it is dreamed.

In games whose memory holds a clock a reader of its digits is taught on real frames, by the memory, and judged on
others. Then it reads the clock of dreams: how fast it runs, how often it stands still, jumps, or shows nothing legible.
Writes results/clock.json and clock.png in the run's folder: the time that is read over the time that has passed.

Shapes: T frames of a real episode, S dreams, K digits, C H W picture, P pixels in which the clock is.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from agent.seeds import CLOCK_SEED
from envs.atari import rom
from envs.errors import UserError
from envs.settings import setting
from runs.dreams import Loaded, load_parts
from runs.folder.files import write_atomic
from runs.folder.run import keep, result_name
from runs.measure.atari import Emulator
from world_model.interface import to_unit
from world_model.noise import forked_rng

EPISODES = 4  # real ones, the last of which judges the reader
DREAMS = 16
HELD = 8  # steps for which random play holds an action
TELLING = 0.2  # share of a pixel's variance that a digit explains where the clock is
LEGIBLE = 0.5  # probability of a digit from which on it is read
WINDOW = 45  # steps: three seconds of 60 frames, 4 a step
JUMP = 1.1  # seconds by which a step is wrong that is a jump: those that are shown are whole


class Clock(NamedTuple):
    """A clock in a game's memory."""

    bytes: tuple[int, ...]  # decimal digits two a byte, the highest first
    digits: tuple[int, ...]  # which of them are read
    seconds: tuple[float, ...]  # what each of those is worth


# Tenths and hundredths change within the two frames that a picture is made of.
CLOCKS = {"skiing": Clock((104, 105, 106), (1, 2, 3), (60.0, 10.0, 1.0))}


@dataclass(frozen=True)
class ClockConfig:
    """What `python main.py clock` takes."""

    run: str | None = setting(None, required=True, help="a run's folder or name")
    steps: int = setting(1_000, 30, 10**6, help="steps of each dream")
    temperature: float | None = setting(
        None, 0, 100, help="temperature of the dream; that of the policy's training when not given"
    )
    device: str = setting("auto", help="auto, cpu or cuda")


class Reader(nn.Module):
    """Reads digits off the pixels (P,) that change with them."""

    def __init__(self, frame: Tensor, digit: Tensor, updates: int = 1_500) -> None:
        """Taught on frames (T, C, H, W) in [0, 1] whose digits (T, K) are known."""
        super().__init__()
        flat = frame.flatten(1)
        whole = flat.var(0).clamp(min=1e-6)
        told = torch.zeros_like(whole)
        for column in digit.T:
            means = torch.stack([flat[column == value].mean(0) for value in column.unique()])
            share = torch.stack([(column == value).float().mean() for value in column.unique()])
            told = torch.maximum(told, (share.unsqueeze(1) * (means - flat.mean(0)).square()).sum(0) / whole)
        self.pixels = (told > TELLING).nonzero().flatten()
        if not len(self.pixels):
            raise UserError("No pixel of this frame changes with the clock: it is too small to be read.")
        seen = flat[:, self.pixels]
        self.mean, self.spread = seen.mean(0), seen.std(0) + 1e-2
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(len(self.pixels), 64), nn.ReLU(), nn.Linear(64, 10)) for _ in digit.T
        )
        optimizer = torch.optim.AdamW(self.parameters(), lr=2e-3, weight_decay=1e-2)
        for _ in range(updates):
            chosen = torch.randint(len(frame), (128,))
            logits = self._told(seen[chosen])
            loss = sum(F.cross_entropy(logits[:, k], digit[chosen, k]) for k in range(digit.shape[1]))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[union-attr]
            optimizer.step()
        self.requires_grad_(False)

    def forward(self, frame: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, K, 10)."""
        return self._told(frame.flatten(1)[:, self.pixels])

    def _told(self, seen: Tensor) -> Tensor:
        seen = (seen - self.mean) / self.spread
        return torch.stack([head(seen) for head in self.heads], 1)


def clock_of(env: str) -> Clock:
    """Raises UserError for a game whose memory holds no known clock."""
    if (name := rom(env)) not in CLOCKS:
        raise UserError(f"No clock is known in {env}: clock reads those of {', '.join(sorted(CLOCKS))}.")
    return CLOCKS[name]


def real(loaded: Loaded, clock: Clock, seed: int) -> tuple[Tensor, Tensor]:
    """An episode of random play: frames (T, C, H, W) uint8 and the digits (T, K)."""
    emulator, rng = Emulator(loaded.config.env, loaded.config.game, seed), np.random.default_rng(seed)
    frames: list[np.ndarray] = []
    digits: list[list[int]] = []
    action = 0
    while not emulator.console.game_over():
        if len(frames) % HELD == 0:
            action = int(rng.integers(len(emulator.actions)))
        emulator.step(action)
        every = [int(digit) for byte in clock.bytes for digit in divmod(int(emulator.memory[-1][byte]), 16)]
        frames.append(emulator.frame())
        digits.append([every[digit] for digit in clock.digits])
    return torch.from_numpy(np.stack(frames)), torch.tensor(digits)


@torch.inference_mode()
def dreamed(loaded: Loaded, reader: Reader, clock: Clock, steps: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Seconds (S, steps + 1) that are read in dreams of random play, and whether all digits were legible."""
    model = loaded.agent.world_model
    state = loaded.begin(torch.randint(len(loaded.starts.frame), (DREAMS,)))
    worth, shown, sure = torch.tensor(clock.seconds), [], []
    for step in range(steps + 1):
        if step:
            if step % HELD == 1:
                taken = torch.randint(model.spec.action_size, (DREAMS,), device=loaded.agent.device)
            state = model.step(state, taken, temperature=temperature).state
        share, digit = reader(model.picture(state).cpu().float()).softmax(-1).max(-1)
        shown.append((digit * worth).sum(1))
        sure.append((share > LEGIBLE).all(1))
    return torch.stack(shown, 1), torch.stack(sure, 1)


def described(seconds: Tensor, legible: Tensor, rate: float) -> dict[str, float | None]:
    """Of clocks (S, steps + 1) that should advance by `rate` seconds a step, what is legible of them alone.

    fast_percent: how much faster windows of WINDOW steps run than they should, on average, but for those that jump;
    stops: share of the windows in which it does not advance; jumps: share of steps that are wrong by more than JUMP.
    """
    both = legible[:, WINDOW:] & legible[:, :-WINDOW]
    windows = (seconds[:, WINDOW:] - seconds[:, :-WINDOW])[both]
    steps = seconds.diff(dim=1)[legible[:, 1:] & legible[:, :-1]]
    due = WINDOW * rate
    kept = windows[(windows - due).abs() < 10]  # not across what jumped
    return {
        "legible": round(float(legible.float().mean()), 4),
        "fast_percent": round(100 * (float(kept.mean()) / due - 1), 2) if len(kept) else None,
        "stops": round(float((windows.abs() < 0.5).float().mean()), 4) if len(windows) else None,
        "jumps": round(float(((steps - rate).abs() > JUMP).float().mean()), 4) if len(steps) else None,
    }


def measure(loaded: Loaded, asked: ClockConfig, console: Console) -> tuple[dict[str, Any], Tensor, Tensor, float]:
    """The figures; the seconds that were read, whether they were legible, and the rate they should have."""
    clock, began = clock_of(loaded.config.env), time.monotonic()
    with forked_rng(loaded.agent.device):
        torch.manual_seed(0)
        played = [real(loaded, clock, CLOCK_SEED + number) for number in range(EPISODES)]
        console.print(f"{sum(len(frame) for frame, _ in played):,} real frames, {time.monotonic() - began:.0f} s")
        taught = [torch.cat(part) for part in zip(*played[:-1], strict=True)]
        reader = Reader(to_unit(taught[0]), taught[1])
        frame, digit = played[-1]
        logits = torch.cat([reader(to_unit(part)) for part in frame.split(512)])
        right = (logits.argmax(-1) == digit).float().mean(0)
        worth = torch.tensor(clock.seconds)
        rates = [(digit[-1] * worth).sum() - (digit[0] * worth).sum() for _, digit in played]
        rate = float(sum(rates)) / sum(len(digit) - 1 for _, digit in played)
        shown = (logits.argmax(-1) * worth).sum(1).unsqueeze(0)
        sure = (logits.softmax(-1).amax(-1) > LEGIBLE).all(1).unsqueeze(0)
        console.print(f"reads {', '.join(f'{float(share):.1%}' for share in right)} of the digits of another episode")
        seconds, legible = dreamed(loaded, reader, clock, asked.steps, loaded.temperature(asked.temperature))
    found = {
        "steps": asked.steps, "dreams": DREAMS, "temperature": loaded.temperature(asked.temperature),
        "seconds_a_step": round(rate, 5), "reader_right": [round(float(share), 4) for share in right],
        "real": described(shown, sure, rate), "dream": described(seconds, legible, rate),
        "first_100_steps": described(seconds[:, :101], legible[:, :101], rate),
        "still_legible_at_the_end": round(float(legible[:, -WINDOW:].float().mean()), 4),
        "measured_in_seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip
    return found, seconds, legible, rate


def picture(seconds: Tensor, legible: Tensor, rate: float, title: str) -> bytes:
    """A PNG: the time that each dream shows since its start, where it is legible, beside the time that has passed."""
    from matplotlib.figure import Figure  # late: half a second that most commands do not need

    figure = Figure(figsize=(7, 4), dpi=130, layout="constrained")
    axes, passed = figure.add_subplot(), rate * np.arange(seconds.shape[1])
    for read, sure in zip(seconds, legible, strict=True):
        known = sure.nonzero().flatten()
        if len(known):
            since = (read - read[known[0]]).numpy()
            axes.plot(passed, np.where(sure.numpy(), since, np.nan), lw=0.8, alpha=0.7)
    axes.plot(passed, passed, color="black", lw=1.5, label="as it should")
    axes.set(xlabel="seconds passed", ylabel="seconds shown", title=title, ylim=(-passed[-1], 2 * passed[-1]))
    axes.legend(frameon=False)
    content = BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def command(asked: ClockConfig) -> dict[str, Any]:
    """Measures a run, prints what was found and returns it."""
    loaded, console = load_parts(asked.run, asked.device), Console(highlight=False)
    if loaded.agent.world_model.spec.frame[0] != 3:
        raise UserError(f"{asked.run} sees gray frames: its clock is read in colour ones (game.gray=false).")
    found, seconds, legible, rate = measure(loaded, asked, console)
    name = result_name("clock", asked, "steps", "temperature")
    path = keep(loaded.run, name, {"what": "clock"} | found, loaded.config.env)
    title = f"{loaded.config.recipe} on {loaded.config.env}: the clock of {DREAMS} dreams"
    drawn = picture(seconds, legible, rate, title)
    write_atomic(path.with_suffix(".png"), drawn)
    table = Table(title=title)
    for name in ("clock", *found["real"]):
        table.add_column(name.replace("_", " "), justify="left" if name == "clock" else "right")
    for name in ("real", "dream", "first_100_steps"):
        table.add_row(name.replace("_", " "), *(str(value) for value in found[name].values()))
    console.print(table)
    console.print(f"written to {path} and {path.with_suffix('.png').name}", soft_wrap=True)
    return found
