"""Several runs of one machine at once, each a process with a log of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

PROGRAM = Path(__file__).resolve().parents[2] / "main.py"
TELL = 60.0  # seconds between two looks at what the runs are doing
LOOK = 0.2


def run(commands: Mapping[str, Sequence[str]], at_once: int, folder: Path) -> list[int]:
    """Runs `python main.py WORDS` for each name, `at_once` of them at a time; their output goes to folder/NAME.log.

    Says when one begins and ends and, now and then, what each is doing. One that fails does not stop the others. What
    stops this process, Ctrl-C for one, ends the runs as SIGTERM does: each saves, and is waited for. Returns the exit
    codes of those that failed.
    """
    waiting, going = list(commands), dict[str, subprocess.Popen[bytes]]()
    failed: list[int] = []
    told = time.monotonic()
    hung_up = signal.signal(signal.SIGHUP, signal.getsignal(signal.SIGTERM))  # a terminal that closes
    try:
        while waiting or going:
            while waiting and len(going) < at_once:
                name = waiting.pop(0)
                going[name] = _begin(commands[name], _log(folder, name))
                print(f"{name}: begun, {_log(folder, name)}", flush=True)
            time.sleep(LOOK)
            for name in [name for name, process in going.items() if process.poll() is not None]:
                code = going.pop(name).returncode
                failed += [code] if code else []
                print(f"{name}: {_ending(code, _last(folder, name))}", flush=True)
            if time.monotonic() - told > TELL:
                told = time.monotonic()
                for name in going:
                    print(f"{name}: {_last(folder, name)}", flush=True)
    except BaseException:  # a full disk or a reader that has gone, too: nobody else would end them
        while left := [process for process in going.values() if process.poll() is None]:
            try:
                for process in left:
                    process.terminate()
                for process in left:
                    process.wait()
            except KeyboardInterrupt:  # once more: they are told once more
                continue
        raise
    finally:
        signal.signal(signal.SIGHUP, hung_up)
    return failed


def _ending(code: int, last: str) -> str:
    if not code:
        return "finished"
    return f"ended by signal {-code}, after: {last}" if code < 0 else f"failed: {last}"


def _begin(words: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """A process in a session of its own: what is typed here does not reach it."""
    with log.open("ab") as file:
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
