"""The command `suite` and what it makes: frozen episodes of a game, on which every world model is judged.

An episode is a pure function of its seed and its actions, so a suite is a small file of these and the same for every
model, whatever the size of its frames. A third of the steps is played at random, a third by a trained policy, each
action replaced by a random one with probability 1/2, and a third by that policy as it is, its actions drawn. The middle
third stands for an early policy (runs keep no early checkpoints): it gets where random play does not, and makes its
mistakes there.

What would make another game of it is fixed by the suite and part of the file's name: the action repeat and the sticky
actions. No-ops at the start and time limits are left out. Frame size and colours are the model's; endings at lost
lives and clipped rewards too, which change what a step is said to bring and not what happens.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console

from agent.player import Player
from agent.seeds import SUITE_SEED, episode_seed
from envs.episode import DAMAGE, Episode
from envs.errors import UserError
from envs.games import PROTOCOLS, GameConfig, Games
from envs.make import make_games, timing_of
from envs.settings import setting
from runs.dreams import Loaded, load_parts
from runs.folder.files import file_name, write_atomic
from runs.folder.system import facts

SUITES = Path(__file__).parent / "suites"
KINDS = ("random", "half random", "trained")
STEPS = 6_000  # of each kind
CONTEXT, AHEAD = 20, 50  # frames that are shown, steps that are dreamed
TIERS = {"canary": 500, "fast": 6_000, "gold": None}  # contexts
HOLD = 8  # steps for which random play holds a continuous action in the mean
GRAIN = 127  # of a continuous action, which is kept as a whole number of 127ths
SPREAD = 2_654_435_761  # 2^32 / golden ratio: multiples of it, modulo 2^32, lie evenly however many are taken


@dataclass(frozen=True)
class SuiteConfig:
    """What `python main.py suite` takes."""

    run: str | None = setting(None, help="who plays: a run's folder or name, or a packed model (.safetensors)")
    env: str | None = setting(None, help="a game that nobody plays yet, instead of a run: random play alone")
    protocol: str | None = setting(
        None, choices=tuple(PROTOCOLS), help="protocol of the play; the run's when not given"
    )
    action_repeat: int | None = setting(
        None, 1, 100, help="frames of the game a step; those of the run or id when not given"
    )
    steps: int = setting(STEPS, 100, 10**6, help="steps of each kind of play")
    out: str = setting("", help="folder of the file; where fidelity looks for it when not given")


class Suite(NamedTuple):
    """E episodes of one game."""

    path: Path
    env: str
    rules: dict[str, Any]  # action_repeat and sticky
    about: dict[str, Any]  # who played, and what made the file
    seed: np.ndarray  # (E,) int64
    kind: np.ndarray  # (E,) int64, places in KINDS
    score: np.ndarray  # (E,) float64, by which a game that plays otherwise here is found out
    action: list[np.ndarray]  # of each episode (n,) int64 or (n, A) float32


class Context(NamedTuple):
    """A frame of an episode from which is dreamed, with those before it shown."""

    episode: int
    now: int  # index of the last frame that is shown


# ---- which game ----
def rules(env: str, config: GameConfig) -> dict[str, Any]:
    """What of a configuration makes another game of an id, with the id's own values filled in.

    Raises UserError for an id whose frame skip is random.
    """
    found = timing_of(env, config)
    if isinstance(repeat := found["action_repeat"], tuple):
        raise UserError(f"{env} skips {repeat[0]} to {repeat[1] - 1} frames at random: game.action_repeat=N fixes it.")
    return found


def place(env: str, of: dict[str, Any], folder: Path = SUITES) -> Path:
    """The file of a game under these rules."""
    return folder / f"{file_name(env)}-repeat{of['action_repeat']}-sticky{of['sticky']:g}.npz"


def find_suite(env: str, config: GameConfig, folder: Path = SUITES) -> Suite:
    """The suite of a run's game. Raises UserError, naming the suites of the same id, when there is none."""
    path = place(env, rules(env, config), folder)
    if path.is_file():
        return read(path)
    others = [
        other.stem for other in sorted(folder.glob(place(env, {"action_repeat": "*", "sticky": 0}).stem[:-1] + "*"))
    ]
    there = f"the suites of this id are of other rules: {', '.join(others)}" if others else "none of this id at all"
    made = f"python main.py suite run=NAME makes one, suite env={env} one of random play"
    raise UserError(f"There is no suite {path.stem}, {there}. {made}.")


def game(suite: Suite, config: GameConfig) -> GameConfig:
    """The suite's game as a model sees it."""
    return replace(config, **suite.rules, noops=None, max_steps=None, num_envs=1)


# ---- which contexts ----
def contexts(suite: Suite, tier: str) -> list[Context]:
    """Those of a tier, in the order of the episodes; the file alone decides.

    As many as there are of each kind of play and, with discrete actions, of each action that is taken next; where one
    runs out the others fill up.
    """
    every = [Context(i, t) for i, taken in enumerate(suite.action) for t in range(CONTEXT - 1, len(taken))]
    if not every:
        raise UserError(f"{suite.path.name} has no episode of more than {CONTEXT} steps: there is nothing to measure.")
    count = TIERS[tier]
    if count is None or count >= len(every):
        return every
    groups: dict[tuple[int, int], list[int]] = {}
    for number, (i, t) in enumerate(every):
        action = suite.action[i][t]
        group = int(suite.kind[i]), int(action) if action.ndim == 0 else 0
        groups.setdefault(group, []).append(number)
    ranked = [
        (rank, group, number)
        for group, numbers in groups.items()
        for rank, number in enumerate(sorted(numbers, key=lambda number: number * SPREAD % 2**32))
    ]
    return [every[number] for number in sorted(number for _, _, number in sorted(ranked)[:count])]


# ---- the file ----
def read(path: Path) -> Suite:
    """The suite in a file. Raises UserError for one that is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:  # each part whole: its checksum is compared at its end
            names = ("about", "seed", "kind", "score", "length", "action")
            parts = {name: np.load(BytesIO(archive.read(f"{name}.npy")), allow_pickle=False) for name in names}
        about, action = json.loads(str(parts["about"])), parts["action"]
        action = action.astype(np.int64) if action.ndim == 1 else action.astype(np.float32) / GRAIN
        taken = np.split(action, np.cumsum(parts["length"])[:-1])
        return Suite(path, about["env"], about["rules"], about, parts["seed"], parts["kind"], parts["score"], taken)
    except DAMAGE as problem:
        raise UserError(f"The suite {path} is damaged ({type(problem).__name__}): fetch or make it again.") from problem


def write(suite: Suite) -> None:
    """Writes the file, whole or not at all."""
    action = np.concatenate(suite.action)
    packed = action.astype(np.uint8) if action.ndim == 1 else np.round(action * GRAIN).astype(np.int8)
    content, length = BytesIO(), np.array([len(taken) for taken in suite.action])
    np.savez_compressed(
        content, about=np.array(json.dumps(suite.about)), seed=suite.seed, kind=suite.kind, score=suite.score,
        length=length, action=packed,
    )  # fmt: skip
    write_atomic(suite.path, content.getvalue())


# ---- playing ----
Acting = Callable[[np.ndarray, bool], np.ndarray]  # a frame (C, H, W) and whether it is the first -> an action


def record(games: Games, acting: dict[int, Acting], steps: int) -> list[tuple[int, Episode]]:
    """`steps` steps of one copy of the game by each player, in whole episodes but for the last: (kind, episode)."""
    found: list[tuple[int, Episode]] = []
    for kind, act in acting.items():
        left = steps
        while left:
            seed = episode_seed(SUITE_SEED, len(found))
            frame, done, score, taken = games.reset([seed])[0], False, 0.0, list[np.ndarray]()
            while left and not done:
                action = act(frame, not taken)
                brought = games.step(action[None])
                frame, done, score = brought.frame[0], bool(brought.done[0]), score + float(brought.score[0])
                taken.append(action)
                left -= 1
            nothing = np.zeros(0)
            found.append((kind, Episode(nothing, np.stack(taken), nothing, nothing, nothing, score, seed)))
    return found


def at_random(games: Games) -> Acting:
    """Uniform over the choices; continuous actions are held for a while, or a car would never leave its place."""
    rng, spec, held = np.random.default_rng(SUITE_SEED), games.spec, np.zeros(games.spec.action_size, np.float32)

    def act(frame: np.ndarray, is_first: bool) -> np.ndarray:
        if spec.discrete:
            return np.array(rng.integers(spec.action_size))
        again = rng.random(spec.action_size) < 1 / HOLD
        held[again] = rng.integers(-GRAIN, GRAIN + 1, int(again.sum())).astype(np.float32) / GRAIN
        return held.copy()

    return act


def trained(loaded: Loaded, other: Acting | None = None) -> Acting:
    """The policy with its actions drawn; with `other`, whose action a coin puts in place of its own."""
    player, discrete = Player(loaded.agent), loaded.agent.world_model.spec.discrete
    coin = np.random.default_rng(SUITE_SEED + 1)

    def act(frame: np.ndarray, is_first: bool) -> np.ndarray:
        action = player.act(frame[None], np.array([is_first]))[0]
        if not discrete:  # to what the file keeps
            action = np.round(np.clip(action, -1, 1) * GRAIN).astype(np.float32) / GRAIN
        if other is not None and coin.random() < 0.5:
            action = other(frame, is_first)
        player.took(np.array([action]))
        return np.array(action)

    return act


def episodes(suite: Suite, config: GameConfig, numbers: Sequence[int] | None = None) -> Iterator[tuple[int, Episode]]:
    """Plays episodes of the suite again, one after the other, as a model with such a configuration sees them.

    `numbers`: which ones, all when None.

    Raises UserError where the game does not play as it did for whoever made the file.
    """
    games = make_games(suite.env, game(suite, config))
    try:
        for number in range(len(suite.seed)) if numbers is None else numbers:
            seed, taken, score = int(suite.seed[number]), suite.action[number], float(suite.score[number])
            try:
                (trace,) = games.restore([seed], [taken])
                reached = float(trace.score.sum(dtype=np.float64))
            except ValueError:
                reached = np.nan
            if not abs(reached - score) <= 1e-3 * max(1.0, abs(score)):
                raise UserError(
                    f"{suite.env} does not play here as it did for {suite.path.name} (an episode's score is "
                    f"{reached:g} and was {score:g}, with {suite.about['versions']}): nothing could be compared."
                )
            yield number, Episode(trace.frame, taken, trace.reward, trace.terminated, trace.truncated, reached, seed)
    finally:
        games.close()


def make(asked: SuiteConfig) -> Suite:
    """Plays and writes a suite."""
    if (asked.run is None) == (asked.env is None):
        raise UserError("Name who plays, run=NAME, or a game that is played at random alone, env=ID.")
    loaded = None if asked.run is None else load_parts(asked.run, "cpu")
    if loaded is not None and not loaded.config.train.policy:
        raise UserError(f"{asked.run} has no policy: env={loaded.config.env} makes a suite of random play alone.")
    env, config = (asked.env or "", GameConfig()) if loaded is None else (loaded.config.env, loaded.config.game)
    if asked.protocol is not None:
        config = replace(config, **{"sticky": None} | PROTOCOLS[asked.protocol])
    if asked.action_repeat is not None:
        config = replace(config, action_repeat=asked.action_repeat)
    of = rules(env, config)
    path = place(env, of, Path(asked.out) if asked.out else SUITES)
    if path.exists():
        raise UserError(f"{path} is there already, and results were measured on it: choose another out= or delete it.")
    games = make_games(env, replace(config, **of, noops=None, max_steps=None), 1)
    torch.manual_seed(SUITE_SEED)
    players, who = {0: at_random(games)}, None
    if loaded is not None:
        players |= {1: trained(loaded, at_random(games)), 2: trained(loaded)}
        who = {"run": asked.run, "recipe": loaded.config.recipe, "step": loaded.step}
    try:
        found = record(games, players, asked.steps)
    finally:
        games.close()
    about = {"env": env, "rules": of, "trained": who, "actions": list(games.action_names)} | facts()
    kind, played = np.array([kind for kind, _ in found]), [episode for _, episode in found]
    suite = Suite(
        path, env, of, about, np.array([one.seed for one in played]), kind,
        np.array([one.score for one in played]), [one.action for one in played],
    )  # fmt: skip
    write(suite)
    return suite


def command(asked: SuiteConfig) -> None:
    """Makes a suite and says what is in it."""
    suite, console = make(asked), Console(highlight=False)
    for kind in np.unique(suite.kind):
        of = suite.kind == kind
        steps = sum(len(taken) for taken, mine in zip(suite.action, of, strict=True) if mine)
        console.print(f"{KINDS[kind]}: {steps:,} steps, {of.sum()} episodes, mean score {suite.score[of].mean():.1f}")
    console.print(f"{suite.path} ({suite.path.stat().st_size / 1000:.0f} kB)", soft_wrap=True)
