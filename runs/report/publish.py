"""The command `publish` copies a run's results into runs/results/; `docs` makes tables of the files there.

A variant has a name of its own beside the recipe's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from envs.errors import UserError
from envs.settings import setting
from runs.folder.files import file_name, write_atomic, write_json
from runs.folder.ppo import open_run
from runs.folder.run import RESULTS, Run, trained_on
from runs.report import leaderboard
from runs.report.leaderboard import recipe_of

# Over other episodes: evaluation-sampled-episodes20.json. A planner takes hours for a hundred, so its few are no trial.
TRIAL = re.compile(r"evaluation-(?!planner)\w+-.*\.json")
# Of each the newest one is published.
PICTURES = ("dream", "actions", "codebook", "mixture", "latents", "temperatures", "components")


def publish(run: Run, results: Path = RESULTS, variant: str = "", overwrite: bool = False) -> list[Path]:
    """Copies results/*.json and its pictures as <recipe>-<env>-[<protocol>-][seed<n>-][<variant>-]<what>.

    Protocol and seed stand in a name when they are not the usual ones. Evaluations over other episodes than the run's
    own stay in its folder, but for a planner's; so do results of an earlier step than its newest, which are named.
    With `overwrite` the results of another run of these names are deleted. Returns the new files.

    Raises UserError for a variant that is no word, when the run has no results, and without `overwrite` when another
    run's have these names.
    """
    if variant and not re.fullmatch(r"[\w.+-]+", variant):
        raise UserError(f'variant="{variant}" is no part of a file name: letters, digits, "_", ".", "+" and "-".')
    config = run.config
    words = [file_name(config.recipe), file_name(config.env)]
    words += [config.protocol] * (config.protocol != "default") + [f"seed{config.seed}"] * bool(config.seed)
    prefix = "-".join([*words, *filter(None, [variant]), ""])
    found = [path for path in sorted((run.folder / "results").glob("*.*")) if not TRIAL.match(path.name)]
    if not found:
        raise UserError(f"{run.folder} has no results yet: python main.py evaluate {run.argument}")
    found = _of_the_newest_step(found)
    for pattern in ("curve*.png", "reconstructions.png"):
        found += sorted((run.folder / "pictures").glob(pattern))
    for name in PICTURES:
        found += sorted((run.folder / "pictures").glob(f"{name}-*.png"))[-1:]
    results.mkdir(parents=True, exist_ok=True)
    copies = {results / (prefix + _name(path)): path for path in found}
    others = _of_another_run(run, results, prefix, variant, copies)
    if others and not overwrite:
        raise UserError(
            f"{others[0]} is the result of another run: give this one a variant=NAME, or replace that one with "
            "overwrite=true."
        )
    for path in others:
        path.unlink()
        path.with_suffix(".png").unlink(missing_ok=True)
    for copy, path in copies.items():
        if copy.suffix == ".json":
            write_json(copy, json.loads(path.read_text()) | ({"variant": variant} if variant else {}))
        else:
            write_atomic(copy, path.read_bytes())
    return list(copies)


def _of_the_newest_step(found: Sequence[Path]) -> list[Path]:
    """The results without those of an earlier checkpoint than the newest that was measured, and their pictures."""
    steps = {path.stem: json.loads(path.read_text()).get("env_steps", 0) for path in found if path.suffix == ".json"}
    newest = max(steps.values(), default=0)
    old = {name: step for name, step in steps.items() if 0 < step < newest}
    for name, step in old.items():
        print(f"{name}.json is left out: it is of step {step:,}, and the run is at {newest:,}. Measure it again.")
    return [path for path in found if path.stem not in old]


def _of_another_run(run: Run, results: Path, prefix: str, variant: str, copies: Container[Path]) -> list[Path]:
    """The published results with this prefix that another run has made; those of its variants have longer ones.

    A file that no run has made, of a speed or a page, is one only if it would be overwritten.
    """
    found = []
    for path in sorted(results.glob(f"{prefix}*.json")):
        told = json.loads(path.read_text())
        known = told.get("training", {}).get("started")
        same = told.get("variant", "") == variant and told.get("protocol", "default") == run.config.protocol
        same = same and told.get("seed", 0) == run.config.seed and ("training" in told or path in copies)
        if same and known != run.meta.get("started"):
            found.append(path)
    return found


def _name(path: Path) -> str:
    """Of the published copy: pictures lose their step."""
    return path.name if path.suffix == ".json" else re.sub(r"-\d+$", "", path.stem) + path.suffix


def tables(results: Path = RESULTS) -> str:
    """The page of results: a row for each evaluation and each benchmark, as Markdown."""
    entries = [(path, json.loads(path.read_text())) for path in sorted(results.glob("*.json"))]

    def rows(what: str, make: Callable[[Path, dict[str, Any]], list[Sequence[str]]]) -> list[Sequence[str]]:
        kind = [(path, entry) for path, entry in entries if ("score" if "mean" in entry else entry.get("what")) == what]
        return [row for path, entry in kind for row in make(path, entry)]

    scores = (
        "game", "recipe", "policy", "mean", "std", "median", "episodes", "steps of the run", "hours of the run", "on",
    )  # fmt: skip
    balls = ("Pong's ball", "within 2 px", "within 1 px", "frames")
    ahead = (
        "on its own agent's games (before the suite)", "steps ahead", "codes right", "copy",
        "of those that changed", "ball within 2 px", "contexts",
    )  # fmt: skip
    pages = ("browser", "limit", "frames/s", "key to picture, median", "95 %", "model", "threads", "load")
    speeds = ("speed", "world-model update", "policy update", "both", "dreaming", "games", "acting", "threads", "load")
    costs = (
        "IRIS at full size", "frames/s", "published code", "times", "processor time a frame", "GFLOP a frame",
        "of the matmul limit", "threads", "load",
    )  # fmt: skip
    probes = (
        "codes of frame pairs", "codes used", "action by a linear probe on the code", "by an inverse model",
        "other codes' picture", "a transplanted code moves the player alike (by position alone)",
    )  # fmt: skip
    clocks = ("clock", "steps of each dream", "fast or slow", "stands still", "jumps", "legible", "the real one")
    formats = ("beside float32", "probability that moves", "KL", "same most likely token")
    leaders = leaderboard.rows(leaderboard.entries(results))
    sections: list[tuple[tuple[str, ...], list[Sequence[str]]]] = [
        (scores, rows("score", _score)),
        (balls, rows("objects", _objects)),
        (leaderboard.HEADING, [(*cells, _link(path)) for path, cells in leaders]),
        (ahead, rows("fidelity", _fidelity)),
        (probes, rows("probe", _probe)),
        (clocks, rows("clock", _clock)),
        (pages, rows("page", _page)),
        (speeds, rows("benchmark", _speed)),
        (costs, rows("iris-speed", _cost)),
        (formats, rows("precision", _format)),
        (("CarRacing", "game steps a core second", "times gymnasium"), rows("car-racing", _car)),
    ]
    return "\n\n".join(markdown((*heading, "file"), lines) for heading, lines in sections if lines)


def _score(path: Path, entry: dict[str, Any]) -> list[Sequence[str]]:
    machine = trained_on(entry)
    threads = entry.get("training", {}).get("threads") or machine["cores"]
    place = machine["gpu"] or f"{machine['cpu']}, {threads} thread{'s'[: threads > 1]}"
    steps = f"{entry['env_steps']:,}"
    if judged := entry.get("judged_in_real_game", {}).get("steps"):
        steps += f" and {judged:,} of evolution"
    return [(
        _game(entry), recipe_of(entry), entry["policy"], f"**{entry['mean']:.2f}**",
        f"{entry['std']:.2f}", f"{entry['median']:.1f}", str(entry["episodes"]), steps,
        f"{entry['hours']:.2f}", place, _link(path),
    )]  # fmt: skip


def _game(entry: dict[str, Any]) -> str:
    """With the protocol where it is not the id's own."""
    protocol = entry.get("protocol", "default")
    return str(entry["env"]) + (f", {protocol}" if protocol != "default" else "")


def _probe(path: Path, entry: dict[str, Any]) -> list[Sequence[str]]:
    moved = f"{entry['transplant']:.1%}" if "transplant" in entry else "-"
    moved += f" ({entry['transplant_by_place']:.1%})" if "transplant_by_place" in entry else ""
    told = (f"{entry[key]:.1%}" for key in ("linear_probe", "inverse_model"))
    name = f"{entry['env']}, {recipe_of(entry)}"
    return [(name, str(entry["codes_used"]), *told, f"{-entry['delta_psnr']:.1f} dB", moved, _link(path))]


def _clock(path: Path, entry: dict[str, Any]) -> list[Sequence[str]]:
    dream, real = entry["dream"], entry["real"]
    shares = ("-" if dream[key] is None else f"{dream[key]:.1%}" for key in ("stops", "jumps", "legible"))
    fast = "-" if dream["fast_percent"] is None else f"{dream['fast_percent']:+.0f} %"  # it was never legible
    name = f"{entry['env']}, {recipe_of(entry)}"
    return [(name, f"{entry['steps']:,}", fast, *shares, f"{real['fast_percent']:+.1f} %", _link(path))]


def _objects(path: Path, entry: dict[str, Any]) -> list[Sequence[str]]:
    shares = f"{entry['within_2px']:.1%}", f"{entry['within_1px']:.1%}"
    return [(f"{entry['env']}, {recipe_of(entry)}", *shares, str(entry["frames"]), _link(path))]


def _fidelity(path: Path, entry: dict[str, Any]) -> list[Sequence[str]]:
    return [
        (
            f"{entry['env']}, {recipe_of(entry)}", str(row["steps_ahead"]), f"{row['accuracy']:.1%}",
            f"{row['accuracy_still']:.1%}", f"{row['accuracy_changed']:.1%}",
            f"{row['ball_within_2px']:.1%}" if "ball_within_2px" in row else "-", str(row["contexts"]), _link(path),
        )
        for row in entry["rows"]
        if "tier" not in entry  # those of the suite are on the leaderboard
    ]  # fmt: skip


def _format(path: Path, entry: dict[str, Any]) -> list[Sequence[str]]:
    return [
        (
            f"{recipe_of(entry)}, {row['format']}", f"{row['total_variation']:.2%}", f"{row['kl_nats']:.1e} nats",
            f"{row['same_most_likely']:.1%}", _link(path),
        )
        for row in entry["rows"]
    ]  # fmt: skip


def _cost(path: Path, entry: dict[str, Any]) -> list[Sequence[str]]:
    return [
        (
            f"{row['name']}, {entry['precision']}", f"{row['frames_per_second']:g}",
            f"{row['published_per_second']:g}" if "published_per_second" in row else "",
            f"{row['times_published']:.1f}" if "times_published" in row else "",
            f"{row['cpu_ms_a_frame']:g} ms", f"{row['gflop_a_frame']:g}", f"{row['share_of_matmul']:.1%}",
            str(entry["threads"]), str(entry["load_before"][0]), _link(path),
        )
        for row in entry["rows"]
    ]  # fmt: skip


def _speed(path: Path, entry: dict[str, Any]) -> list[Sequence[str]]:
    rows = {row["name"]: row for row in entry["rows"]}
    stages = [name for name in rows if name.endswith(" update") and name != "policy update"]
    times = {name: f"{rows[name]['ms_median']:.0f} ms" for name in (*stages, "policy update")}
    model = ", ".join(times[name] if len(stages) == 1 else f"{name}: {times[name]}" for name in stages)
    whole = next((f"{rows[name]['ms_median']:.0f} ms" for name in ("both updates", "one of each") if name in rows), "")
    names = (
        "dreaming for a population" if "dreaming for a population" in rows else "dreaming",
        "random games",
        "acting",
    )
    rates = [f"{rows[name]['per_second']:,.0f} steps/s" for name in names]
    title = f"`{entry['recipe']}` {entry['size']}, {entry['device']}"
    return [(
        title, model, times["policy update"], whole, *rates, str(entry["threads"]), str(entry["load_before"][0]),
        _link(path),
    )]  # fmt: skip


def _car(path: Path, entry: dict[str, Any]) -> list[Sequence[str]]:
    return [
        (row["way"], f"{row['steps_per_cpu_second']:,.0f}", f"{row['times_gymnasium']:.2f}", _link(path))
        for row in entry["rows"]
    ]


def _page(path: Path, entry: dict[str, Any]) -> list[Sequence[str]]:
    return [
        (
            f"{entry['env']}, {recipe_of(entry)}, {row['mode']}", f"{row['limit']:g}",
            f"{row['frames_per_second']:.0f}",
            f"{row['input_to_picture_median_ms']:.0f} ms", f"{row['input_to_picture_p95_ms']:.0f} ms",
            f"{row['model_median_ms']:.1f} ms", str(entry["threads"]), str(entry["load_before"][0]), _link(path),
        )
        for row in entry["rows"]
    ]  # fmt: skip


def _link(path: Path) -> str:
    return f"[{path.stem}](../runs/results/{path.name})"


def markdown(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as Markdown."""
    lines = [heading, ["---"] * len(heading), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


@dataclass(frozen=True)
class PublishConfig:
    """What `python main.py publish` takes."""

    run: str = setting("", required=True, help="a run's folder or name")
    variant: str = setting("", help="a name of its own beside the recipe's, for a run with other settings")
    overwrite: bool = setting(False, help="replace published results of another run that have the same names")


def command(asked: PublishConfig) -> None:
    """Publishes the run."""
    for path in publish(open_run(asked.run), variant=asked.variant, overwrite=asked.overwrite):
        print(path)
    print("python main.py docs writes the tables anew.")
