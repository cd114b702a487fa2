"""`kill -9` at random moments of small runs of every recipe, from the first second on, workers included.

A run that is killed again and again must end like one that never was: the same weights, bit by bit, and no file or
process beside it.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import main
from runs.folder import checkpoint
from runs.recipes import RECIPES
from tests.battery.report import Report

TOY = [
    "env=Catch-v0", "size=toy", "threads=1", "steps=480", "train.prefill=320", "train.pretrain=8", "train.save_every=1",
    "episodes=2", "game.max_steps=20", "train.show_every=1000",
]  # fmt: skip
WORKERS = {"world_models": ["workers=2"]}
PATIENCE = 600  # seconds for a run to end
LEFT = ("*.tmp", "*.tmp.mp4", ".recorded-*", ".weights-*", ".importing-*")


def measure(count: int, seed: int, folder: Path, report: Report, only: str = "") -> dict[str, Any]:
    """`count` kills, shared among the recipes."""
    recipes = [recipe for recipe in RECIPES if only in ("", recipe)]
    rng, told, place = random.Random(seed), dict[str, Any](), tempfile.gettempdir()
    known = set(os.listdir(place))
    for number, recipe in enumerate(report.track(recipes, "kills")):
        kills = count // len(recipes) + (number < count % len(recipes))
        told[recipe] = _recipe(recipe, kills, rng, folder / recipe, report)
    beside = [name for name in set(os.listdir(place)) - known if "weights" in name or "recorded" in name]
    if beside:
        report.fault("left behind", place, ", ".join(beside))
    return told


def _recipe(recipe: str, kills: int, rng: random.Random, folder: Path, report: Report) -> dict[str, Any]:
    folder.mkdir(parents=True)
    whole, killed = folder / "whole", folder / "killed"
    began = time.monotonic()
    if (done := _start(recipe, whole)).wait(PATIENCE):
        report.fault("no reference", recipe, done.stderr.read() if done.stderr else "")
        return {}
    lasts = time.monotonic() - began
    moments, begun_again = list[float](), 0
    while len(moments) < kills:
        process = _start(recipe, killed)
        after = rng.uniform(0.0, 0.8 * lasts)
        try:
            process.wait(after)
            if process.returncode:
                report.fault("run lost", f"{recipe} after {len(moments)} kills", _said(process))
                return {"kills": len(moments)}
            shutil.rmtree(killed)  # it has ended: another one is killed
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            moments.append(round(after, 1))
            begun_again += not any((killed / "checkpoints").glob("*.pt"))
        _orphans(killed, report)
    last = _start(recipe, killed)
    if last.wait(PATIENCE):
        report.fault("run lost", f"{recipe} after {len(moments)} kills", _said(last))
        return {"kills": len(moments)}
    if wrong := _unlike(whole, killed):
        report.fault("another run", f"{recipe} after {len(moments)} kills", wrong)
    left = sorted({str(path.relative_to(folder)) for pattern in LEFT for path in folder.rglob(pattern)})
    if left:
        report.fault("left behind", recipe, ", ".join(left))
    return {"kills": len(moments), "seconds_of_a_run": round(lasts, 1), "before_the_first_checkpoint": begun_again}


def _start(recipe: str, folder: Path) -> subprocess.Popen[str]:
    """The run begun, or gone on with where it has a checkpoint."""
    resumable = any((folder / "checkpoints").glob("*.pt"))
    words = ["resume", f"run={folder}"] if resumable else [f"recipe={recipe}", *TOY, f"hydra.run.dir={folder}"]
    words += [] if resumable else WORKERS.get(recipe, [])
    program = [sys.executable, str(Path(main.__file__)), *words]
    return subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _said(process: subprocess.Popen[str]) -> str:
    return process.stderr.read() if process.stderr else ""


def _orphans(folder: Path, report: Report) -> None:
    """Processes that still work for the run; a worker is given a moment to notice."""
    for _ in range(50):
        alive = subprocess.run(["pgrep", "-f", f"{folder}( |$)"], capture_output=True, text=True).stdout.split()
        if not alive:
            return
        time.sleep(0.1)
    report.fault("left behind", folder, f"processes {', '.join(alive)}")


def _unlike(whole: Path, killed: Path) -> str:
    first, second = (checkpoint.load(folder / "checkpoints")[0] for folder in (whole, killed))
    if first["step"] != second["step"]:
        return f"it ended at step {second['step']} and not {first['step']}"
    ours, theirs = (entry["state"]["agent"] for entry in (first, second))
    other = [name for name, value in ours.items() if torch.is_tensor(value) and not torch.equal(value, theirs[name])]
    return f"{len(other)} tensors differ, {other[:3]}" if other else ""
