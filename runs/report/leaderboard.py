"""The command `leaderboard`: every published `fidelity`, one table of games x horizons x recipes.

Only what was measured on the same frozen episodes, from contexts of the same tier, stands in one block.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from envs.errors import UserError, nearest
from envs.settings import setting
from runs.folder.run import RESULTS

HEADING = (
    "game", "steps ahead", "recipe", "PSNR (copy)", "of what moved", "codes right (copy)",
    "of those that changed", "reward: r", "ends: nats (base rate)", "within 2 px (copy); vanished, doubled",
    "LEFT or RIGHT: KL, pixels", "tier",
)  # fmt: skip
WIDE = 160  # characters of the table
SHORT = ("steps", "recipe", "PSNR", "moved", "codes", "changed", "r", "ends", "things", "L/R", "tier")  # on a terminal


@dataclass(frozen=True)
class LeaderboardConfig:
    """What `python main.py leaderboard` takes."""

    env: str = setting("", help="one game alone, by its gymnasium id")


def entries(results: Path = RESULTS) -> list[tuple[Path, dict[str, Any]]]:
    """The published files of the suite, those of one game and tier side by side."""
    found = [(path, json.loads(path.read_text())) for path in sorted(results.glob("*.json"))]
    kept = [(path, entry) for path, entry in found if entry.get("what") == "fidelity" and "tier" in entry]
    return sorted(kept, key=lambda one: (one[1]["env"], one[1]["suite"], one[1]["tier"], one[1]["recipe"]))


def rows(found: list[tuple[Path, dict[str, Any]]]) -> list[tuple[Path, tuple[str, ...]]]:
    """A line for each model and horizon: its file, and the cells under HEADING; the best of a horizon comes first."""
    lines = []
    for path, entry in found:
        for row in entry["rows"]:
            block = (entry["env"], entry["suite"], entry["tier"], row["steps_ahead"], entry["temperature"])
            lines.append((*block, -(row.get("psnr_moved") or 0.0), path, _cells(entry, row)))
    return [(line[-2], line[-1]) for line in sorted(lines, key=lambda line: line[:-2])]


def recipe_of(entry: dict[str, Any]) -> str:
    """A result's recipe, size and variant as the tables say them."""
    return f"`{entry['recipe']}` {entry['size']}" + (f", {entry['variant']}" if "variant" in entry else "")


def _cells(entry: dict[str, Any], row: dict[str, Any]) -> tuple[str, ...]:
    name = recipe_of(entry)
    name += f", temperature {entry['temperature']:g}" if entry["temperature"] else ""
    things = [key.removesuffix("_within_2px") for key in row if key.endswith("_within_2px")]
    apart = [f"{entry['left_right_kl']:.2g}"] if "left_right_kl" in entry else ["-"]
    apart += [f"{entry['left_right_pixels']:.2g}"] if "left_right_pixels" in entry else ["-"]
    return (
        entry["env"], str(row["steps_ahead"]), name,
        _pair(row, "psnr", "psnr_still", "{:.1f}"), _pair(row, "psnr_moved", "psnr_moved_still", "{:.1f}"),
        _pair(row, "accuracy", "accuracy_still", "{:.1%}"), _one(row, "accuracy_changed", "{:.1%}"),
        _one(row, "reward_corr", "{:.2f}"), _pair(row, "cont_nats", "cont_nats_base", "{:.2g}"),
        "<br>".join(_thing(row, thing) for thing in things) or "-", ", ".join(apart), entry["tier"],
    )  # fmt: skip


def _one(row: dict[str, Any], key: str, form: str) -> str:
    return "-" if row.get(key) is None else form.format(row[key])


def _pair(row: dict[str, Any], key: str, beside: str, form: str) -> str:
    return "-" if row.get(key) is None else f"{_one(row, key, form)} ({_one(row, beside, form)})"


def _thing(row: dict[str, Any], thing: str) -> str:
    near, still, gone, twice = (f"{row[f'{thing}_{of}']:.1%}" for of in ("within_2px", "still", "vanished", "doubled"))
    return f"{thing} {near} ({still}); {gone}, {twice}"


def command(asked: LeaderboardConfig) -> None:
    """Prints the table; `docs` writes it into docs/results.md."""
    found = [(path, entry) for path, entry in entries() if asked.env in ("", entry["env"])]
    if not found:
        known = sorted({entry["env"] for _, entry in entries()})
        named = (
            f"No fidelity of {asked.env or 'any game'} is published; there are those of: {', '.join(known) or 'none'}."
        )
        raise UserError(f"{named} {nearest(asked.env, known)}".strip())
    console, lines = Console(highlight=False), rows(found)
    if console.width < WIDE:  # a row a line, to be scrolled sideways, as in less -S; names are not cut
        console = Console(highlight=False, width=WIDE)
    for env in dict.fromkeys(cells[0] for _, cells in lines):
        table = Table(title=env, box=None, pad_edge=False, collapse_padding=True)
        for name in SHORT:
            table.add_column(name, justify="left" if name == "recipe" else "right")
        for _, cells in lines:
            if cells[0] == env:
                table.add_row(*(_short(cell) for cell in cells[1:]))
        console.print(table)
    console.print("Things: within 2 px; vanished, doubled. The copy baseline: docs/results.md.")


def _short(cell: str) -> str:
    """A cell for a narrow terminal: without what stands in brackets."""
    return re.sub(r" \([^)]*\)", "", cell.replace("`", "").replace("<br>", "\n"))
