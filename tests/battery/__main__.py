"""`python -m tests.battery [part ...] [key=value ...]`: what a test run has no time for, and a file of what it found.

Parts: commands, values, damages, kills, server, access; all when none is named. Keys: seed=0, scale=1 (a tenth of
everything with 0.1), axe=PATH (axe.min.js of npm's axe-core, for access), out=runs/results/robustness.json.
Ends with 1 when something was wrong.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runs.folder.files import write_json
from runs.folder.system import facts
from runs.measure import page
from tests import trained
from tests.battery import damage, kills, words
from tests.battery.report import Report

COMMANDS, VALUES, DAMAGES, KILLS = 1_000, 200, 500, 100


def parts(asked: dict[str, str], folder: Path, report: Report) -> dict[str, Callable[[], dict[str, Any]]]:
    """What each part does."""
    seed, scale = int(asked.get("seed", "0")), float(asked.get("scale", "1"))

    def count(of: int) -> int:
        return max(1, round(scale * of))

    def commands() -> dict[str, Any]:
        trained.make(folder / "runs/out/toy")
        return words.lines(count(COMMANDS), seed, report)

    return {
        "commands": commands,
        "values": lambda: words.absurd(count(VALUES), seed, report) | {"without_a_range": words.undeclared()},
        "damages": lambda: damage.measure(count(DAMAGES), seed, folder / "damaged", report, asked.get("only", "")),
        "kills": lambda: kills.measure(count(KILLS), seed, folder / "kills", report, asked.get("only", "")),
        "server": lambda: _server(report),
        "access": lambda: _access(asked.get("axe", ""), report),
    }


def _server(report: Report) -> dict[str, Any]:
    with page.victim(page.PageConfig(what="stress")) as server:
        found = page.measure_stress(server, 5.0)
    for name, right in page.ENDURED.items():
        if found[name] != right:
            report.fault("server", name, str(found[name]))
    return found


def _access(axe: str, report: Report) -> dict[str, Any]:
    found = page.measure_access(page.PageConfig(what="access", axe=axe))
    for screen, rows in found.items():
        for row in rows:
            if row["impact"] in ("serious", "critical"):
                report.fault("access", screen, json.dumps(row))
    return found


def main(given: list[str]) -> int:
    """Runs the parts in a folder that is gone afterwards, and adds them to the file of results."""
    asked = dict(word.split("=", 1) for word in given if "=" in word)
    out, report = Path(asked.get("out", "runs/results/robustness.json")).resolve(), Report()
    home, folder = os.getcwd(), Path(tempfile.mkdtemp(prefix="battery-"))
    known = parts(asked, folder, report)
    named = [word for word in given if "=" not in word] or list(known)
    if unknown := [name for name in named if name not in known]:
        print(f"Unknown part {unknown[0]}: choose of {', '.join(known)}.", file=sys.stderr)
        return 2
    told = json.loads(out.read_text()) if out.exists() else {"what": "robustness"}
    bad = 0
    os.chdir(folder)
    try:
        for name in named:
            began, before = time.monotonic(), len(report.faults)
            found = known[name]()
            faults = report.faults[before:]
            bad += len(faults)
            command = f"python -m tests.battery {' '.join([name, *(w for w in given if '=' in w and 'axe=' not in w)])}"
            facts_now = {key: value for key, value in facts().items() if key in ("commit", "machine")}
            about = facts_now | {"command": command, "minutes": round((time.monotonic() - began) / 60, 1)}
            told[name] = found | {"faults": faults} | about
            report.console.print(f"{name}: {len(faults)} faults, {found}", markup=False)
            write_json(out, told)
    finally:
        os.chdir(home)
        shutil.rmtree(folder, ignore_errors=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
