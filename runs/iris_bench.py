"""How fast `iris` is at the paper's size: `python -m runs.iris_bench [seconds=4] [threads=1] [precision=auto]`.

Random weights; the window is full and slides once in each measurement of a dream, as it does for as long as one dreams.
Given are the clock and the processor time of all threads, of the best repetition: beside other work on the machine only
the second means anything. The floating point operations of the products alone (but those with int8 weights, of a single
row) are counted and compared with what one large product of matrices reaches here, and the speed with IRIS's published
code on two idle cores of such a machine.
Writes runs/out/iris-speed.json.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from agent.trainer import Trainer
from envs.errors import UserError
from envs.spec import Spec
from runs import compose
from runs.machine import keep_freed_memory
from runs.run import keep
from world_model.interface import Batch, State
from world_model.iris import Iris, IrisConfig

SPEC = Spec(frame=(3, 64, 64), action_size=6, discrete=True)
SEGMENTS, FRAMES = 4, 32  # of an update of the transformer and of the tokenizer
PUBLISHED = {"dream 1": 6.2, "dream 16": 29.5, "world_model update": 23.0, "tokenizer update": 9.9}  # frames a second


@dataclass(frozen=True)
class BenchConfig:
    """What the command takes."""

    seconds: float = 4.0  # at least, of each measurement
    threads: int = 1
    precision: str = "auto"  # "auto", "bf16" or "fp32", as in training

    def check(self) -> None:
        """Raises UserError for values out of range."""
        if not (0 < self.seconds <= 600 and self.threads >= 1 and self.precision in ("auto", "bf16", "fp32")):
            raise UserError(
                "seconds must be between 0 and 600, threads at least 1, precision one of auto, bf16 and fp32."
            )


class Spent(NamedTuple):
    """Seconds of the best repetition."""

    wall: float
    cpu: float  # of all threads


def best(work: Callable[[], object], seconds: float) -> Spent:
    """Repeats for so long, and twice at least, after once to warm up."""
    work()
    taken: list[Spent] = []
    until = time.perf_counter() + seconds
    while len(taken) < 2 or time.perf_counter() < until:
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        taken.append(Spent(time.perf_counter() - wall, time.process_time() - cpu))
    walls, cpus = zip(*taken, strict=True)
    return Spent(min(walls), min(cpus))


@torch.no_grad()
def limits(seconds: float) -> dict[str, float]:
    """GFLOP a second of processor time that large products reach: of matrices and by convolution."""
    found = {}
    for kind, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        x, weight = torch.randn(1360, 1024).to(kind), torch.randn(1024, 1024).to(kind)
        picture = torch.randn(FRAMES, 64, 64, 64).to(kind).contiguous(memory_format=torch.channels_last)
        kernel = torch.randn(64, 64, 3, 3).to(kind)
        products: dict[str, Callable[[], Tensor]] = {
            "matmul": partial(F.linear, x, weight),
            "conv": partial(F.conv2d, picture, kernel, padding=1),
        }
        for product, work in products.items():
            found[f"{product} {name}"] = round(gflop(work) / best(work, seconds / 4).cpu, 1)
    return found


def gflop(work: Callable[[], object]) -> float:
    """Floating point operations of the products in it, in units of a billion."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 1e9


class Speeds:
    """The parts of `iris` as a run uses them, each as a name and the frames that one call of it handles."""

    def __init__(self, config: IrisConfig, spec: Spec, precision: str) -> None:
        self.model = Iris(config, spec)
        self.stages = self.model.stages()
        objectives = [objective for stage in self.stages for objective in stage.objectives]
        self.trainer = Trainer(objectives, device=torch.device("cpu"), precision=precision)

    def all(self) -> Iterator[tuple[str, int, Callable[[], object]]]:
        """Name, frames of a call, the call."""
        self.model.eval()
        for rows in (1, 16):
            yield from self._parts(rows)
        self.model.train()
        for stage, rows in zip(self.stages, (FRAMES, SEGMENTS), strict=True):
            (objective,) = stage.objectives
            batch = self._batch(rows, stage.length, tokens=stage.encode is not None)
            yield f"{objective.name} update", rows * stage.length, partial(self.trainer.update, objective, batch)

    @torch.no_grad()
    def _parts(self, rows: int) -> Iterator[tuple[str, int, Callable[[], object]]]:
        model, config = self.model, self.model.config
        frames = torch.rand(rows, config.steps, *model.spec.frame)
        action = torch.zeros(rows, config.steps, dtype=torch.long)
        frame, begun = frames[:, 0], self._mixed(lambda: model.start(frames, action))
        awaiting = self._mixed(lambda: model.advance(begun, action[:, 0]))  # the memory is full: this slides it
        period = config.steps - config.keep  # frames from one slide to the next

        def dream(real: bool = False) -> None:
            state: State = begun
            for _ in range(period):
                state = model.step(state, action[:, 0]).state
                model.decode(state.latent)
                if real:
                    model.encode(frame)

        half = self._mixed(lambda: model.start(frames[:, : period + 1], action))
        parts: dict[str, tuple[int, Callable[[], object]]] = {
            "encode": (1, lambda: model.encode(frame)),
            "decode": (1, lambda: model.decode(begun.latent)),
            "advance": (1, lambda: model.advance(half, action[:, 0])),
            "sample": (1, lambda: model.sample(awaiting)),
            "dream": (period, dream),
        }
        if rows == 1:
            parts["play"] = (period, lambda: dream(real=True))
        for name, (frames_each, work) in parts.items():
            yield f"{name} {rows}", rows * frames_each, partial(self._mixed, work)

    @torch.no_grad()
    def _mixed(self, work: Callable[[], Any]) -> Any:
        with self.trainer.mixed():
            return work()

    def _batch(self, rows: int, length: int, *, tokens: bool) -> Batch:
        model = self.model
        frame = torch.randint(256, (rows, length, *model.spec.frame), dtype=torch.uint8)
        if tokens:
            frame = torch.randint(model.config.codes, (rows, length, *model.latent_shape))
        zeros, ones = torch.zeros(rows, length), torch.ones(rows, length, dtype=torch.bool)
        action = torch.randint(model.spec.action_size, (rows, length))
        return Batch(frame, action, zeros, ~ones, ones, ones)


def measure(asked: BenchConfig, config: IrisConfig, spec: Spec) -> dict[str, Any]:
    """Limits and rows: frames a second of the clock and of processor time, and the share of the limit reached."""
    torch.manual_seed(0)
    found = limits(asked.seconds)
    speeds = Speeds(config, spec, asked.precision)
    kind = "bf16" if speeds.trainer.autocast else "fp32"
    rows = []
    for name, frames, work in speeds.all():
        spent, work_gflop = best(work, asked.seconds), gflop(work)
        row: dict[str, Any] = {
            "name": name,
            "frames_a_call": frames,
            "ms_a_frame": round(1e3 * spent.wall / frames, 2),
            "cpu_ms_a_frame": round(1e3 * spent.cpu / frames, 2),
            "frames_per_second": round(frames / spent.wall, 1),
            "frames_per_cpu_second": round(frames / spent.cpu, 1),
            "gflop_a_frame": round(work_gflop / frames, 3),
            "gflop_per_cpu_second": round(work_gflop / spent.cpu, 1),
            "share_of_matmul": round(work_gflop / spent.cpu / found[f"matmul {kind}"], 3),
        }
        if name in PUBLISHED:
            row |= {"published_per_second": PUBLISHED[name]}
            row |= {"times_published": round(row["frames_per_second"] / PUBLISHED[name], 2)}
        rows.append(row)
    told = {"published": "IRIS's published code, 2 threads on two idle cores of such a machine"}
    return {"precision": kind, "gflop_per_cpu_second": found} | told | {"rows": rows}


def main(words: Sequence[str]) -> None:
    """Measures, prints and writes."""
    asked = compose.changed(BenchConfig(), words)
    torch.set_num_threads(asked.threads)
    keep_freed_memory()
    before = os.getloadavg()
    found: dict[str, Any] = {"threads": asked.threads, "load_before": [round(load, 2) for load in before]}
    found |= measure(asked, IrisConfig(), SPEC)
    path = keep(None, "iris-speed", found)
    limit = ", ".join(f"{name} {value:.0f}" for name, value in found["gflop_per_cpu_second"].items())
    table = Table(title=f"iris, the paper's size, {found['precision']}, {asked.threads} torch threads")
    table.caption = f"GFLOP a second of processor time at most: {limit}"
    for heading in ("", "frames/s", "frames/CPU s", "CPU ms", "GFLOP", "of matmul", "published frames/s"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=not heading)
    for row in found["rows"]:
        columns = ("frames_per_second", "frames_per_cpu_second", "cpu_ms_a_frame", "gflop_a_frame", "share_of_matmul")
        numbers = [str(row[column]) for column in columns]
        table.add_row(row["name"], *numbers, str(row.get("published_per_second", "")))
    console = Console(highlight=False)
    console.print(table)
    console.print(f"written to {path}", soft_wrap=True)


if __name__ == "__main__":
    from runs.guard import guarded

    sys.exit(guarded(lambda: main(sys.argv[1:])))
