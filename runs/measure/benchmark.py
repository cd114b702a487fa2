"""The command `benchmark`: how fast games, world model, dream and policy are on this machine, and where the time goes.

Everything is timed on the objects and methods that a real run uses: `Loop`, its `Trainer` and its `Collector`.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table
from torch.autograd import DeviceType

from agent.cuda_graphs import WARMUP
from agent.seeds import episode_seed
from envs.errors import UserError
from envs.games import Games
from envs.make import make_games
from policies.imagination import imagine
from runs import build
from runs.cli.info import count
from runs.config import Config
from runs.folder import files, system
from runs.folder.null_logger import Nowhere, Phases
from runs.folder.run import OUT
from world_model import trees
from world_model.interface import State, to_pixels

PREFILL = 2_000  # agent steps: enough to sample from; a real run's are not worth waiting for
MOST = 200  # repetitions of one measurement
OPERATORS, PROFILED = 10, 5  # listed for each kind of update, and the updates they are the mean of (1 where slow)
PHASES = ("collect", "world model", "policy")


def measure(config: Config, *, device: str, threads: int, seconds: float = 45.0, folder: Path = OUT) -> dict[str, Any]:
    """Measures for about `seconds` (and the time to start up); prints a table and writes JSON, which it returns.

    What takes longer than its share of them is done twice, of which the second counts.
    """
    if not config.train.policy:
        raise UserError("benchmark measures the policy too: leave out train.policy=false.")
    console = Console(highlight=False)
    facts = system.facts()  # of the code that runs, whatever is changed meanwhile
    began, used = time.monotonic(), time.process_time()
    games = make_games(config.env, config.game)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            found = _Measurement(config, games, device, seconds, bar).all()
    finally:
        games.close()
    cores = (time.process_time() - used) / (time.monotonic() - began)
    result = (
        {"what": "benchmark", "recipe": config.recipe, "env": config.env, "protocol": config.protocol}
        | {"size": config.size, "seed": config.seed, "device": device, "threads": threads}
        | {"compile": config.train.compile, **facts}
        # Cores this process got: clearly less than `threads` means that the machine had other work.
        | {"load_before": facts["machine"]["load"], "load_after": system.load(), "cores_used": round(cores, 2)}
        | found
    )
    path = folder / f"benchmark-{files.file_name(config.recipe)}-{config.size}-{files.file_name(device)}.json"
    files.write_json(path, result)
    for table in tables(result):
        console.print(table)
    console.print(f"load {result['load_before']} before, {result['load_after']} after, {cores:.1f} cores used")
    console.print(f"written to {path}", soft_wrap=True)
    return result


class _Measurement:
    """The parts of a benchmark, in the order in which they are done."""

    def __init__(self, config: Config, games: Games, device: str, seconds: float, bar: Bar) -> None:
        self.config, self.games, self.bar, self.seconds = config, games, bar, seconds
        self.task = bar.add_task("starting", total=9)
        quiet = replace(config.train, prefill=PREFILL, pretrain=0, show_every=10**9, save_every=1e9)
        self.cuda = torch.device(device).type == "cuda"
        self.loop = build.loop(replace(config, train=quiet), games, None, device)

    def all(self) -> dict[str, Any]:
        """Rows, phases and operators."""
        loop, horizon = self.loop, self.config.policy.horizon
        screen, nowhere = Phases(self._sync), Nowhere()
        # Both long enough for every game to end more than once: beginning a new one loads the ROM, which takes 65 ms.
        alone = self._begin("games", lambda: self._time(self._player_of_random_games(), 0.15))
        self._begin("random games first", lambda: loop.prefill(nowhere, screen))
        step = self._begin("one step", lambda: self._time(lambda: loop.collect(self.games.num_envs, screen), 0.02))
        # As many steps in one call as the games alone, unless one of them takes its time.
        each = self.games.num_envs if len(step) == 1 else self._steps
        acting = self._begin("acting", lambda: self._time(lambda: loop.collect(each, screen), 0.3))
        stages, policy = self._begin("updates", self._updates)
        states = loop.states(loop.dreams.starts or 192)
        dreams = self._begin("dreaming", lambda: self._time(lambda: self._dream(states), 0.1))
        frames = self._begin("one frame", lambda: self._time(self._dreamer(trees.rows(states, slice(1))), 0.05))
        pairs = np.sum([*stages.values(), policy], 0)
        # Of a recipe whose rounds take thousands of updates there is no loop to be seen in a minute.
        short = all(stage.updates == 1 for stage in loop.stages)
        updates = 0.25 * self.seconds / float(np.median(pairs))
        shares = self._begin("the loop", lambda: self._loop(updates) if short else {})
        operators = self._begin("operators", lambda: self._operators(1 if len(pairs) == 1 else PROFILED))
        starts, population_size = len(states.latent), getattr(self.config.policy, "population", 1)
        many, dream = f"{self.games.num_envs} games", f"{starts} x {horizon}"
        whole = f"{population_size} x {dream}" if population_size > 1 else dream
        return {
            "precision": "bf16" if loop.trainer.autocast else "fp32",
            "cuda_graphs": loop.trainer.cuda_graphs,
            "parameters": {"world_model": count(loop.agent.world_model), "policy": count(loop.agent.learner)},
            "rows": [
                row("random games", alone, "agent steps", size=many, each=self._steps),
                row("acting", acting, "agent steps", size=many, each=each),
                *(
                    row(f"{kind.name.replace('_', '-')} update", stages[kind.name], "updates",
                        size=f"{kind.batch_size} x {kind.length}")
                    for kind in loop.stages
                ),
                row("policy update", policy, "updates", size=whole),
                row("both updates" if short else "one of each", pairs, "updates"),
                row("dreaming", dreams, "dream steps", size=dream, each=starts * horizon),
                *([row("dreaming for a population", policy, "dream steps", size=whole,
                       each=population_size * starts * horizon)] if population_size > 1 else []),
                row("one frame to play", frames, "frames", size="decoded"),
            ],
            "phases": shares,
            "operators": operators,
        }  # fmt: skip

    @property
    def _steps(self) -> int:
        return 32 * self.games.num_envs

    def _begin(self, name: str, work: Callable[[], Any]) -> Any:
        self.bar.update(self.task, description=name)
        if not self.bar.console.is_terminal:  # where there is no bar
            self.bar.console.print(f"measuring: {name}", soft_wrap=True)
        done = work()
        self.bar.advance(self.task)
        return done

    def _sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def _time(self, work: Callable[[], object], share: float) -> list[float]:
        """Seconds of each call, 5 to MOST of them within this share of the whole time, after two that do not count.

        Of the second alone where that takes longer than the share. Updates are recorded first, where they are.
        """

        def once() -> float:
            self._sync()
            began = time.perf_counter()
            work()
            self._sync()
            return time.perf_counter() - began

        for _ in range(1 + WARMUP * self.loop.trainer.cuda_graphs):
            once()
        if (second := once()) > share * self.seconds:
            return [second]
        taken: list[float] = []
        while len(taken) < 5 or (len(taken) < MOST and sum(taken) < share * self.seconds):
            taken.append(once())
        return taken

    def _player_of_random_games(self) -> Callable[[], None]:
        """What plays `_steps` agent steps without an agent and without a replay."""
        games, rng, size = self.games, np.random.default_rng(self.config.seed), self.games.spec.action_size
        seeds = (episode_seed(self.config.seed, number) for number in itertools.count())
        games.reset([next(seeds) for _ in range(games.num_envs)])

        def play() -> None:
            for _ in range(self._steps // games.num_envs):
                many = rng.integers(size, size=games.num_envs)
                done = games.step(many if games.spec.discrete else rng.uniform(-1, 1, (games.num_envs, size))).done
                if done.any():
                    rows = np.flatnonzero(done).tolist()
                    games.reset([next(seeds) for _ in rows], rows)

        return play

    def _updates(self) -> tuple[dict[str, list[float]], list[float]]:
        """Seconds of an update of each stage and of the policy, one after the other as in the loop."""
        loop = self.loop
        taken: dict[str, list[float]] = {stage.name: [] for stage in loop.stages}
        encoded = {stage.name: loop.encoded(stage) for stage in loop.stages}

        def all_of_them() -> None:
            states = None
            for stage in loop.stages:
                began = time.perf_counter()
                states = loop.train_world_model(stage, encoded[stage.name])
                self._sync()
                taken[stage.name].append(time.perf_counter() - began)
            loop.train_policy(states)

        whole = np.array(self._time(all_of_them, 0.35))
        kept = {name: each[-len(whole) :] for name, each in taken.items()}
        return kept, (whole - np.sum(list(kept.values()), 0)).tolist()

    def _dream(self, states: State) -> None:
        loop = self.loop
        with loop.trainer.mixed():
            imagine(
                loop.agent.world_model, loop.agent.learner.policy, states, horizon=loop.dreams.horizon,
                temperature=loop.dreams.temperature,
            )  # fmt: skip

    @torch.inference_mode()
    def _dreamer(self, state: State) -> Callable[[], object]:
        """What a person who plays the dream waits for: one step and its picture."""
        model = self.loop.agent.world_model
        action, _ = self.loop.agent.learner.policy.act(model.features(state))

        @torch.inference_mode()
        def frame() -> np.ndarray:
            return to_pixels(model.picture(model.step(state, action).state))

        return frame

    def _loop(self, updates: float) -> dict[str, float]:
        """The real loop for so many updates: the share of its time that each phase takes."""
        count = int(min(max(updates, 5), MOST))
        screen = Phases(self._sync)
        steps = self.loop.replay.steps + count * self.loop.config.steps_per_round
        self.loop.train(steps, Nowhere(), screen)
        screen.phase("end")
        seconds = {name: screen.seconds.get(name, 0.0) for name in PHASES}
        return {name: round(spent / sum(seconds.values()), 4) for name, spent in seconds.items()}

    def _operators(self, times: int) -> dict[str, list[dict[str, Any]]]:
        loop = self.loop
        states = loop.states(loop.dreams.starts or 192)
        stages = {stage.name.replace("_", " "): (stage, loop.encoded(stage)) for stage in loop.stages}
        found = {name: self._profile(partial(loop.train_world_model, *what), times) for name, what in stages.items()}
        return found | {"policy": self._profile(lambda: loop.train_policy(states), times)}

    def _profile(self, work: Callable[[], object], times: int) -> list[dict[str, Any]]:
        """The operators that take most time themselves, without those they call: calls and ms an update."""
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes into the progress bar
        kinds = [torch.profiler.ProfilerActivity.CPU]
        kinds += [torch.profiler.ProfilerActivity.CUDA] if self.cuda else []
        with torch.profiler.profile(activities=kinds) as profile:
            for _ in range(times):
                work()
            self._sync()
        # On a GPU the kernels: what the processor does meanwhile does not count.
        kind = DeviceType.CUDA if self.cuda else DeviceType.CPU
        time_of = attrgetter("self_device_time_total" if self.cuda else "self_cpu_time_total")  # microseconds
        events = sorted((e for e in profile.key_averages() if e.device_type == kind), key=time_of, reverse=True)
        whole = sum(map(time_of, events)) or 1
        return [
            {"name": event.key, "calls": event.count / times}
            | {"ms": round(time_of(event) / 1000 / times, 3), "share": round(time_of(event) / whole, 4)}
            for event in events[:OPERATORS]
        ]


def row(name: str, seconds: Iterable[float], unit: str, *, size: str = "", each: int = 1) -> dict[str, Any]:
    """One measurement: seconds of calls that do `each` of `unit`; per second over all calls, ms a call.

    `size` says how much is done at once: games, segments x frames, or starts x steps of a dream.
    """
    taken = np.array(list(seconds))
    return {
        "name": name,
        "size": size,
        "unit": unit,
        "per_second": round(float(each * len(taken) / taken.sum()), 2),
        "ms_median": round(float(np.median(taken)) * 1000, 3),
        "ms_p95": round(float(np.quantile(taken, 0.95)) * 1000, 3),
        "each": each,
        "calls": len(taken),
    }


def tables(result: dict[str, Any]) -> list[Table]:
    """The speeds with the shares of the loop's time, and the operators that take it."""
    about = f"{result['recipe']} {result['size']} on {result['device']}, {result['threads']} torch threads"
    speeds = Table(title=f"{about}, {result['precision']}")
    for name in ("what", "a second", "of", "ms", "95 %"):
        speeds.add_column(name, justify="left" if name in ("what", "of") else "right", no_wrap=True)
    for entry in result["rows"]:
        name = f"{entry['name']}, {entry['size']}" if entry["size"] else entry["name"]
        median, p95 = f"{entry['ms_median']:.2f}", f"{entry['ms_p95']:.2f}"
        speeds.add_row(name, f"{entry['per_second']:,.1f}", entry["unit"], median, p95)
    shares = ", ".join(f"{name} {100 * part:.1f} %" for name, part in result["phases"].items())
    sizes = ", ".join(f"{name.replace('_', ' ')} {size:,}" for name, size in result["parameters"].items())
    speeds.caption = f"the loop: {shares}\nparameters: {sizes}"
    operators = Table(title="where the time goes: operators by their own time in one update")
    for name in ("update", "operator", "calls", "ms", "share"):
        operators.add_column(name, justify="left" if name in ("update", "operator") else "right")
    for kind, entries in result["operators"].items():
        for i, entry in enumerate(entries):
            numbers = (f"{entry['calls']:,.0f}", f"{entry['ms']:.2f}", f"{100 * entry['share']:.1f} %")
            operators.add_row(kind if i == 0 else "", entry["name"], *numbers, end_section=i == len(entries) - 1)
    return [speeds, operators]
