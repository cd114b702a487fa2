"""What this machine is and how many threads serve it best: the facts that stand beside every published number."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch

from agent.precision import mixed_precision
from envs.errors import UserError, nearest
from world_model.threads import torch_threads

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "dreamloop", "torch", "numpy", "gymnasium", "ale-py", "opencv-python", "opencv-python-headless", "hydra-core",
    "stable-baselines3",
)  # fmt: skip
DEVICES = ("auto", "cpu", "cuda")


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def facts() -> dict[str, Any]:
    """Versions, commit, processor, cores, load and command line of this process, as plain JSON values.

    `bf16`: whether the GPU, or without one the processor, has native bfloat16, on which speed depends most.
    """
    versions = {name: version for name in PACKAGES if (version := _version(name))}
    return {
        "versions": {"python": platform.python_version()} | versions,
        "commit": commit(),
        "machine": {
            "system": platform.platform(),
            "cpu": _cpu_model(),
            "cores": cores(),
            "bf16": mixed_precision(torch.device(choose_device("auto"))),
            "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
            "load": load(),
        },
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
    }


def load() -> list[float]:
    """How many processes wanted a core in the last 1, 5 and 15 minutes."""
    return [round(load, 2) for load in os.getloadavg()]


def clock() -> str:
    """The date and time of day, with the time zone."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


@cache
def commit() -> str | None:
    """The git commit of the code, with "-dirty" when tracked files were changed; None outside a repository.

    As it was when this process first asked: what it has imported stays what it is, whatever is checked out meanwhile.
    """
    head = _git("rev-parse", "HEAD")
    if not head:
        return None
    return head + ("-dirty" if _git("status", "--porcelain", "--untracked-files=no") else "")


def memory_gb() -> float:
    """The most memory this process has had resident so far, in GiB."""
    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def choose_threads(seconds: float = 0.8) -> int:
    """The number of torch threads with the fastest matrix product right now.

    Measured and not derived from the core count: two threads beside another busy process can be slower than one.
    Leaves torch's own setting as it was.
    """
    counts = sorted({1, cores(), *(2**power for power in range(1, 6) if 2**power < cores())})
    if len(counts) == 1:
        return 1
    speeds = {}
    for count in counts:
        with torch_threads(count):
            speeds[count] = _products_per_second(seconds / len(counts))
    best = max(speeds.values())
    # The smallest count that is nearly the fastest: a few percent are not worth a whole core.
    return next(count for count in counts if speeds[count] >= 0.9 * best)


def choose_device(name: str) -> str:
    """The torch device of this name; "auto" is the first GPU when there is one.

    Raises:
        UserError: an unknown device, or a GPU that is not there.
    """
    kind = name.split(":")[0]
    if kind not in DEVICES:
        hint = nearest(name, DEVICES)
        raise UserError(f'Unknown device "{name}": choose one of {", ".join(DEVICES)}. {hint}'.strip())
    available = torch.cuda.is_available()
    if kind == "cuda" and not available:
        raise UserError(f"device={name} needs a GPU that torch can use, and there is none: choose device=cpu.")
    return ("cuda" if available else "cpu") if kind == "auto" else name


def _products_per_second(seconds: float) -> float:
    matrix = torch.ones(384, 384)
    for _ in range(3):  # starts the threads
        matrix @ matrix
    begin = time.perf_counter()
    count = 0
    while (now := time.perf_counter()) - begin < seconds * 0.9:
        matrix @ matrix
        count += 1
    return count / (now - begin)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _git(*words: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory for the next tensor instead of giving it back to the system.

    A training step frees and takes tens of megabytes; handing them back costs a page fault for each 4 kB, which took
    a third of a world-model update here. That includes blocks of more than 32 MB, which would else come from the system
    and go back to it each time: IRIS has them (half of an update with 4,096 codes). Elsewhere than on glibc nothing is
    changed.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 1 << 30)
