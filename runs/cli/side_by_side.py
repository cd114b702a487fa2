"""Several runs of one machine at once, each a process with a log of its own."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

PROGRAM = Path(__file__).resolve().parents[2] / "main.py"
TELL = 60.0  # seconds between two looks at what the runs are doing
LOOK = 0.2


def run(commands: Mapping[str, Sequence[str]], at_once: int, folder: Path) -> None:
    """Runs `python main.py WORDS` for each name, `at_once` of them at a time; their output goes to folder/NAME.log.

    Says when one begins and ends and, now and then, what each is doing. One that fails does not stop the others. Ctrl-C
    and SIGTERM are passed on, once: each run saves, and all have ended before KeyboardInterrupt is raised again.
    """
    waiting, going = list(commands), dict[str, subprocess.Popen[bytes]]()
    told = time.monotonic()
    try:
        while waiting or going:
            while waiting and len(going) < at_once:
                name = waiting.pop(0)
                going[name] = _begin(commands[name], _log(folder, name))
                print(f"{name}: begun, {_log(folder, name)}", flush=True)
            time.sleep(LOOK)
            for name in [name for name, process in going.items() if process.poll() is not None]:
                code = going.pop(name).returncode
                print(f"{name}: " + ("finished" if not code else f"failed: {_last(folder, name)}"), flush=True)
            if time.monotonic() - told > TELL:
                told = time.monotonic()
                for name in going:
                    print(f"{name}: {_last(folder, name)}", flush=True)
    except KeyboardInterrupt:
        for process in going.values():
            process.terminate()
        for name, process in going.items():
            print(f"{name}: stopping", flush=True)
            process.wait()
        raise


def _begin(words: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """A process in a session of its own: what is typed here does not reach it."""
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, str(PROGRAM), *words], stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip


def _log(folder: Path, name: str) -> Path:
    return folder / f"{name}.log"


def _last(folder: Path, name: str) -> str:
    """The last line that it wrote."""
    lines = _log(folder, name).read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing said yet")
