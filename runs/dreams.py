"""A trained model, ready to be played, in two lines and without the game:

    player = dreams.load("runs/out/pong")       # or dreams.load() for the model that ships
    player.dream                                # a gymnasium environment; player.act(frame) plays it

After `import runs`, `gymnasium.make("Dream-v0", run=...)` and `gymnasium.make_vec("Dream-v0", num_envs=..., run=...)`
make the same environments.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from gymnasium import error
from gymnasium.vector import AutoresetMode
from safetensors import SafetensorError
from safetensors.torch import load as tensors_of
from torch import Tensor

from agent.batch import cut
from agent.loop import CONTEXT, STARTS
from agent.player import Agent, Player
from agent.precision import Format, inference_format
from envs.controls import Controls
from envs.episode import CorruptEpisode, Episode
from envs.errors import UserError
from envs.make import make_games
from envs.pictures import as_picture, framed
from envs.spec import Spec
from runs import build
from runs.config import Config
from runs.folder.run import MODELS, Run, newest, read_json, shipped
from runs.folder.system import choose_device
from runs.recipes import from_recorded
from world_model import trees
from world_model.code_world import CodeWorld, meanings
from world_model.dream.batch import OBSERVATIONS
from world_model.dream.envs import FPS, DreamEnv, DreamVectorEnv, Starts, World, observation_space
from world_model.interface import State, to_unit
from world_model.noise import forked_rng
from world_model.token_world import TokenWorld

PRETRAINED = MODELS / "pong.safetensors"
LATEST = 16  # episodes of an older run that starts are taken from
STARTS_GIB = 4  # that starts may take


class Loaded(NamedTuple):
    """A trained model with all that a dream of it needs."""

    config: Config
    agent: Agent
    starts: Starts
    controls: Controls
    run: Run | None  # None: a packed model
    step: int  # agent steps of the real game that it was trained on
    whole_rewards: bool = False  # all rewards that the game gave were whole numbers; older runs do not tell
    aspect: float | None = None  # width by height at which its pictures are shown; None: that of their pixels

    def temperature(self, asked: float | None) -> float:
        """The one asked for, or that of the policy's training."""
        return float(self.config.policy.temperature if asked is None else asked)

    def begin(self, chosen: Tensor) -> State:
        """The states (S, ...) that the starts of these numbers (S,) lead to."""
        return self.starts.begin(self.agent.world_model, chosen)

    def with_starts(self, count: int | None, seed: int = 0) -> Loaded:
        """The same with moments drawn over all steps that the run has kept, random play included.

        They are `count`, or as many as there are, or as fit into 4 GiB with what the model remembers of each (a
        transformer with a long cache: hundreds); None: those of the checkpoint.

        Raises:
            ValueError: a count below 1.
            UserError: a packed model, which holds no episodes, or no episode that is long enough.
        """
        if count is None:
            return self
        if count < 1:
            raise ValueError(f"starts must be at least 1, not {count}")
        if self.run is None:
            raise UserError(
                f"A packed model has the {len(self.starts.frame)} starts it was packed with: name a run, or leave out "
                "starts (on a command line starts=null)."
            )
        with forked_rng(self.agent.device), torch.inference_mode():
            size = trees.size_bytes(self.begin(torch.zeros(1, dtype=torch.long))) + self.starts.frame[0].nbytes
        most = max(1, int(STARTS_GIB * 2**30 / size))
        drawn = _drawn_starts(self.agent.world_model.spec, self.run.episode_paths, min(count, most), seed)
        if drawn is None:
            folder = self.run.episodes_folder
            raise UserError(f"There is no episode in {folder} to draw starts from; starts=null takes the checkpoint's.")
        return self._replace(starts=drawn)

    def world(self, *, many: bool = False) -> World:
        """What DreamEnv and, with `many`, DreamVectorEnv take."""
        mixed = self.format(many=many) != "fp32"
        return World(self.agent.world_model, self.starts, self.controls, mixed, self.whole_rewards)

    def format(self, *, many: bool = False) -> Format:
        """The number format in which one dream or, with `many`, a batch of them is fastest."""
        precision = self.config.train.precision
        return inference_format(self.agent.world_model, self.agent.device, many=many, precision=precision)


class DreamPlayer:
    """The agent of a run, which plays one game or dream at a time, and a dream to play in.

    Of a world model that was trained alone it plays at random.

    Attributes:
        dream: the dream of the run, a gymnasium environment; made when first asked for.
    """

    def __init__(self, parts: Loaded, *, greedy: bool = False) -> None:
        self.parts, self.greedy = parts, greedy
        self._world = parts.world()
        self._dream: DreamEnv | None = None
        self.reset()

    @property
    def dream(self) -> DreamEnv:
        if self._dream is None:
            self._dream = DreamEnv(self._world, temperature=self.parts.temperature(None))
        return self._dream

    def reset(self) -> None:
        """Forgets what was seen: the next frame begins an episode."""
        self._player, self._is_first, self._followed = Player(self.parts.agent, greedy=self.greedy), True, False

    def act(self, frame: np.ndarray) -> Any:
        """A frame of the game or the dream -> the action as the environment takes it.

        A picture of any size is made the model's, as those of its real games were: (H, W, 3), (H, W) or channels first,
        uint8 or floats in [0, 1]. Whoever plays the real game here repeats an action as often as the agent did.

        Raises:
            ValueError: no picture, or within an episode that `follow` has begun.
        """
        spec, picture = self.parts.agent.world_model.spec, self._picture(frame)
        if self._followed:
            raise ValueError("this episode is followed for somebody else's agent: reset before the player acts itself")
        action = self._player.act(picture, np.array([self._is_first]))[0]
        self._is_first = False
        return self.parts.controls.native(int(action) if spec.discrete else tuple(action.tolist()))

    def follow(self, frame: np.ndarray, action: Any = None) -> np.ndarray:
        """A frame of the game -> (F,) float32, as a dream with `obs_type="features"` shows its states.

        With it an agent that learned on those plays the real game. `action` is the one that led to this frame, as the
        environment takes it; None: the frame is the first of an episode.

        Raises:
            ValueError: no picture, no action of this game, or one before the first frame.
        """
        picture = self._picture(frame)
        if action is None:
            self.reset()
        elif self._is_first:
            raise ValueError("no action leads to the first frame of an episode: follow(frame) begins one")
        else:
            self._player.took(self._world.action(np.asarray(action)[None], 1).numpy())
        features = self._player.follow(picture, np.array([self._is_first]))
        self._is_first, self._followed = False, True
        return features[0].float().cpu().numpy().copy()

    def _picture(self, frame: np.ndarray) -> np.ndarray:
        """(1, C, H, W) uint8 as the model sees it."""
        spec, picture = self.parts.agent.world_model.spec, np.asarray(frame)
        if picture.dtype != np.uint8 or picture.shape != spec.frame:
            shown = as_picture(picture)
            if shown is None:
                raise ValueError(f"a frame is a picture, as uint8 (H, W, 3), and not {picture.dtype} {picture.shape}")
            picture = framed(shown, (spec.frame[1], spec.frame[2]), gray=spec.frame[0] == 1)
        return np.ascontiguousarray(picture)[None]


class GameEnv(gymnasium.Env[np.ndarray, Any]):
    """The real game of a run as that run plays it, with the spaces of its dream: frame skip, sticky actions, no-ops.

    For whoever learned in the dream. Rewards are in the game's units, neither clipped nor cut at a lost life: an
    episode is a whole game. Observations are pictures (H, W, 3) uint8 as the model sees them, or with
    `obs_type="features"` (F,) float32, what the world model makes of them (`DreamPlayer.follow`).

    Raises:
        UserError: the game is not installed, or cannot be made.
        ValueError: an obs_type or render_mode that there is not.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": FPS}

    def __init__(self, parts: Loaded, *, obs_type: str = "rgb", render_mode: str | None = None) -> None:
        if obs_type not in OBSERVATIONS:
            raise ValueError(f'obs_type is "rgb" or "features", not "{obs_type}"')
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f'render_mode is "rgb_array" or None, not "{render_mode}"')
        self.obs_type, self.render_mode, self._world = obs_type, render_mode, parts.world()
        self.games = make_games(parts.config.env, parts.config.game, 1)
        self._player = DreamPlayer(parts) if obs_type == "features" else None
        self.action_space = self._world.action_space
        self.observation_space = observation_space(parts.agent.world_model, obs_type)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begins a game. A seed determines it and all that follow without a seed of their own."""
        super().reset(seed=seed)
        frames = self.games.reset([int(self.np_random.integers(2**31))])
        return self._seen(frames[0], None), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """One action further. Raises ValueError for what is no action, ResetNeeded when the game is over."""
        taken = self._world.action(np.asarray(action)[None], 1).numpy()
        if self.games.done[0]:
            raise error.ResetNeeded("the game is over or has not begun: reset it first")
        brought = self.games.step(taken)
        truncated = bool(brought.truncated[0])
        over = bool(brought.done[0]) and not truncated
        return self._seen(brought.frame[0], action), float(brought.score[0]), over, truncated, {}

    def render(self) -> np.ndarray | None:  # type: ignore[override]
        """The game's own picture, (H, W, 3) uint8, with render_mode="rgb_array"."""
        return self.games.render(0) if self.render_mode == "rgb_array" else None

    def close(self) -> None:
        """Ends the game's own code."""
        self.games.close()

    def _seen(self, frame: np.ndarray, action: Any) -> np.ndarray:
        """A frame (C, H, W) as it is shown, the caller's own; action: the one that led there, None at the start."""
        if self._player is not None:
            return self._player.follow(frame, action)
        return np.repeat(frame.transpose(1, 2, 0), 3 // len(frame), axis=2)


def load(run: str | Path | None = None, *, greedy: bool = False) -> DreamPlayer:
    """The agent of a run and its dream; the model that ships without a run. Raises UserError as `load_parts` does."""
    return DreamPlayer(load_parts(run), greedy=greedy)


def make_game(run: str | Path | None = None, *, obs_type: str = "rgb", render_mode: str | None = None) -> GameEnv:
    """The real game of a run; see `dreamloop.make_game`."""
    return GameEnv(load_parts(run), obs_type=obs_type, render_mode=render_mode)


def make_env(
    run: str | Path | None = None, *, horizon: int | None = None, temperature: float | None = None,
    render_mode: str | None = None, obs_type: str = "rgb", starts: int | None = None,
) -> DreamEnv:  # fmt: skip
    """`gymnasium.make("Dream-v0")`, with the keys of `dreamloop.make_dream`."""
    parts = load_parts(run).with_starts(starts)
    return DreamEnv(
        parts.world(),
        horizon=horizon,
        temperature=parts.temperature(temperature),
        render_mode=render_mode,
        obs_type=obs_type,
    )


def make_vector(
    num_envs: int, run: str | Path | None = None, *, horizon: int | None = None, temperature: float | None = None,
    render_mode: str | None = None, autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
    obs_type: str = "rgb", starts: int | None = None,
) -> DreamVectorEnv:  # fmt: skip
    """`gymnasium.make_vec("Dream-v0", num_envs=...)`; a row that is over begins anew as `DreamVectorEnv` says."""
    parts = load_parts(run).with_starts(starts)
    return DreamVectorEnv(
        parts.world(many=True),
        num_envs,
        horizon=horizon,
        temperature=parts.temperature(temperature),
        render_mode=render_mode,
        autoreset_mode=autoreset_mode,
        obs_type=obs_type,
    )


def load_parts(run: str | Path | None = None, device: str = "auto") -> Loaded:
    """The newest checkpoint of a run (a folder or a name), or a packed model.

    That is a file (.safetensors), the name of one that ships where no run has it ("kungfumaster"), or None: Pong.

    Leaves torch's default generators as they were.

    Raises:
        UserError: no such run or packed model, no readable checkpoint, an unknown recipe, or an older run whose game
            has to be asked for its controls and is not installed.
    """
    device = choose_device(device)
    with forked_rng(device):  # building a model seeds it
        path = packed_path(run)
        loaded = _from_run(Run.open(run or ""), device) if path is None else _from_packed(path, device)
    loaded.agent.eval().requires_grad_(False)
    return loaded


def packed_path(run: str | Path | None) -> Path | None:
    """The packed model that is meant; None for a run."""
    if run is None or Path(run).suffix == PRETRAINED.suffix:
        return PRETRAINED if run is None else Path(run)
    return shipped(run)


def by_codes(loaded: Loaded) -> Loaded:
    """The same world, played by the codes of its transitions instead of actions; without a policy or a real game.

    A code is named by the action that most often stood behind it in the starts, and how often.

    Raises:
        UserError: a world whose transitions are not told by one code each, nor have a code of the action's own.
    """
    world = loaded.agent.world_model
    if not isinstance(world, TokenWorld) or not world.played_codes:
        raise UserError("actions=codes needs a run of latent_action whose transitions are one code each, trained with "
                        "model.positions=1 (and few codes, as model.codes=6), or whose actions have codes of their own "
                        "(model.action_codes=6).")  # fmt: skip
    frame, action = (part.to(loaded.agent.device) for part in loaded.starts)
    counts = meanings(world, to_unit(frame), action)
    best, used = counts.argmax(1), counts.sum(1)
    names = tuple(
        f"code {code + 1}: {loaded.controls.names[int(best[code])]} {float(counts[code].max() / used[code]):.0%}"
        if used[code] else f"code {code + 1}: never"
        for code in range(len(counts))
    )  # fmt: skip
    keys: dict[tuple[str, ...], int] = {(): int(used.argmax())}
    keys |= {(str(code + 1),): code for code in range(min(9, len(names)))}
    made = CodeWorld(world, best)
    agent = Agent(made, build.no_policy(made.spec)).to(loaded.agent.device).eval()
    config = replace(loaded.config, train=replace(loaded.config.train, policy=False))
    return loaded._replace(agent=agent, controls=Controls(names, tuple(keys.items())), config=config)


def _from_run(run: Run, device: str) -> Loaded:
    state = run.load_checkpoint("cpu")
    spec, controls = _game(run)
    agent = build.agent(run.config, spec, device)
    with run.understood():
        _fill(agent, state["agent"], run.folder)
        kept = state.get("starts") or {}
        starts = Starts(kept["frame"], kept["action"]) if len(kept.get("frame", ())) else None
        whole = bool(state.get("whole_rewards"))
    if starts is None:  # of an older run
        starts = _drawn_starts(spec, run.episode_paths[-LATEST:], STARTS)
    if starts is None:
        raise UserError(
            f"{run.folder} has no start for a dream, neither in its checkpoint nor in {run.episodes_folder}."
        )
    return Loaded(run.config, agent, starts, controls, run, run.step, whole, _aspect(run.meta))


def _game(run: Run) -> tuple[Spec, Controls]:
    """As meta.json tells them; a run from before it did asks the game itself."""
    if "spec" in run.meta and "controls" in run.meta:
        return _described(run.meta, run.folder / "meta.json")
    games = make_games(run.config.env, run.config.game, 1)
    try:
        return games.spec, Controls.of(games)
    finally:
        games.close()


def _described(values: Mapping[str, Any], path: Path) -> tuple[Spec, Controls]:
    try:
        spec = values["spec"]
        channels, height, width = spec["frame"]
        sizes = (channels, height, width, spec["action_size"])
        if not all(type(size) is int and 0 < size <= 10_000 for size in sizes) or type(spec["discrete"]) is not bool:
            raise ValueError("sizes that no game has")
        controls = Controls.from_dict(values["controls"])
        return Spec((channels, height, width), spec["action_size"], spec["discrete"]), controls
    except (LookupError, TypeError, ValueError) as problem:
        raise UserError(
            f"{path} does not tell the game's frames and controls as this program writes them."
        ) from problem


def _fill(agent: Agent, weights: Mapping[str, torch.Tensor], source: Path) -> None:
    # A packed model holds tensors alone; whatever else a learner keeps begins anew.
    others = {name: value for name, value in agent.state_dict().items() if not isinstance(value, torch.Tensor)}
    try:
        agent.load_state_dict(others | dict(weights))
    except RuntimeError as problem:  # torch's own text lists every tensor
        raise UserError(f"The weights in {source} are of another model than its configuration describes.") from problem


def usable_episodes(paths: Iterable[Path], spec: Spec) -> Iterator[Episode]:
    """Those that are whole and fit the game, read one by one."""
    for path in paths:
        try:
            episode = Episode.load(path)
        except CorruptEpisode:
            continue
        if not episode.problem(spec):
            yield episode


def _drawn_starts(spec: Spec, paths: Sequence[Path], count: int, seed: int = 0, length: int = CONTEXT) -> Starts | None:
    """Up to `count` contexts, drawn without repetition over all steps of these episodes.

    Of one frame each, a game's first, where no episode is longer.
    """
    rng = np.random.default_rng(seed)
    kept: list[tuple[float, Tensor, Tensor]] = []
    for episode in usable_episodes(paths, spec):
        moments = max(0, len(episode) - length + 1) if length > 1 else 1
        lots = rng.random(moments)  # the `count` lowest of all are kept
        chosen = [at for at in np.argsort(lots)[:count] if len(kept) < count or lots[at] < kept[-1][0]]
        if chosen:
            batch = cut([episode] * len(chosen), chosen, length, spec=spec)
            kept += zip(lots[chosen].tolist(), map(torch.clone, batch.frame), batch.action[:, :-1], strict=True)
            kept = sorted(kept, key=lambda one: one[0])[:count]
    if not kept:
        return _drawn_starts(spec, paths, count, seed, length=1) if length > 1 else None
    return Starts(torch.stack([frame for _, frame, _ in kept]), torch.stack([action for *_, action in kept]))


def _from_packed(path: Path, device: str) -> Loaded:
    """What `runs.folder.pretrained` wrote: tensors in one file, everything else as JSON beside it."""
    about = path.with_suffix(".json")
    if not path.is_file() or not about.is_file():
        missing = path if not path.is_file() else about
        raise UserError(f"There is no packed model: {missing} is missing. Name a run, run=FOLDER. {newest()}".strip())
    try:
        told, content = read_json(about), path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if told.get("sha256", digest) != digest:  # those that were packed before have none
            raise ValueError("another checksum")
        tensors = tensors_of(content)
        starts = Starts(tensors.pop("starts.frame"), tensors.pop("starts.action"))
        config, step = from_recorded(told["config"]), int(told["step"])
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, OverflowError) as problem:
        reason = problem if isinstance(problem, UserError) else "it is damaged, or was not packed by this program"
        raise UserError(f"The packed model {path} cannot be used: {str(reason).rstrip('.')}.") from problem
    spec, controls = _described(told, about)
    agent = build.agent(config, spec, device)
    _fill(agent, tensors, path)
    return Loaded(config, agent, starts, controls, None, step, told.get("whole_rewards") is True, _aspect(told))


def _aspect(told: Mapping[str, Any]) -> float | None:
    found = told.get("aspect")  # older runs do not tell
    return float(found) if isinstance(found, int | float) and 0.1 <= found <= 10 else None
