"""What a person calls from Python. The parts themselves stay in their packages: envs, world_model, policies, agent.

    import dreamloop

    folder = dreamloop.train(env="Catch-v0", recipe="reverie", size="toy", steps=24_000)
    dreamloop.evaluate(folder, episodes=20)["sampled"]["mean"]
    player = dreamloop.load(folder)                 # without a run: the Pong that ships
    observation, info = player.dream.reset()        # a gymnasium environment
    action = player.act(observation)
    many = dreamloop.make_dream(folder, num_envs=16, horizon=256)
    dream = dreamloop.make_sb3_dream(folder, num_envs=64, horizon=32, obs_type="features", starts=1024)
    agent = PPO("MlpPolicy", dream, n_steps=128, batch_size=256).learn(1_000_000)  # of Stable-Baselines3
    game = dreamloop.make_game(folder, obs_type="features")             # the real game, to see what it has learned

Importing it makes "Dream-v0" known to gymnasium: `gymnasium.make("Dream-v0", run=...)` and
`gymnasium.make_vec("Dream-v0", num_envs=16, run=...)` are what `make_dream` returns.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Where this file lies the packages lie too. A folder named `runs` without Python files in it, as TensorBoard makes
# them, would otherwise be taken for ours by an editable install that hooks into the import instead of the path.
_HERE = Path(__file__).resolve().parent
if str(_HERE) not in sys.path:
    sys.path.append(str(_HERE))

for _name in ("agent", "envs", "play", "policies", "runs", "world_model"):
    _found = find_spec(_name)
    if _found is None or Path(_found.origin or "/").resolve().parent.parent != _HERE:
        raise ImportError(
            f'dreamloop has a package "{_name}", and Python finds {_found and _found.origin or "none"} in its place: '
            "rename that, or start Python in another folder."
        )

import runs  # noqa: E402, F401  registers "Dream-v0"
from envs.errors import UserError  # noqa: E402

if TYPE_CHECKING:
    from gymnasium.vector import AutoresetMode
    from stable_baselines3.common.vec_env import VecEnv

    from runs.dreams import DreamPlayer, GameEnv
    from world_model.dream.envs import DreamEnv, DreamVectorEnv

__all__ = ["UserError", "evaluate", "load", "main", "make_dream", "make_game", "make_sb3_dream", "train"]


def load(run: str | Path | None = None, *, greedy: bool = False) -> DreamPlayer:
    """The agent of a run and its dream: a folder, a name under runs/out/, or "pong" (the default) or "kungfumaster",
    which ship.

    Raises:
        UserError: no such run, or none with a checkpoint that can be read.
    """
    from runs import dreams

    return dreams.load(run, greedy=greedy)


def make_dream(
    run: str | Path | None = None, num_envs: int | None = None, *, horizon: int | None = None,
    temperature: float | None = None, render_mode: str | None = None, autoreset_mode: AutoresetMode | str = "NextStep",
    obs_type: str = "rgb", starts: int | None = None,
) -> DreamEnv | DreamVectorEnv:  # fmt: skip
    """The dream of a run as a gymnasium environment, or with `num_envs` as a vector environment of so many.

    A dream ends where the model says so, or is cut after `horizon` steps; `temperature` is that of the policy's
    training when not given. `autoreset_mode`, of a vector environment, is gymnasium's: NextStep (the default) or
    SameStep, as Stable-Baselines3 wants it. Observations are pictures (H, W, 3) uint8, or with obs_type="features" what
    the run's own policy sees, (F,) float32; `load(run).follow` makes the same of real frames. `starts`: dreams begin
    from up to so many moments of real play, drawn over all steps that the run has kept, instead of the few in its
    checkpoint (32); as many as fit into 4 GiB.

    Raises:
        UserError: no such run; starts of a packed model, or of a run without episodes.
        ValueError: an obs_type, horizon, temperature or number of starts that there is not.
    """
    from runs import dreams

    how: Any = {"horizon": horizon, "temperature": temperature, "render_mode": render_mode}
    how |= {"obs_type": obs_type, "starts": starts}
    if num_envs is None:
        return dreams.make_env(run, **how)
    return dreams.make_vector(num_envs, run, autoreset_mode=autoreset_mode, **how)


def make_game(run: str | Path | None = None, *, obs_type: str = "rgb", render_mode: str | None = None) -> GameEnv:
    """The real game of a run as a gymnasium environment, exactly as the run plays it, with the spaces of its dream.

    What an agent that learned in the dream is measured in. Rewards are in the game's units and an episode is a whole
    game, whatever the run clips or ends at a lost life. With obs_type="features" the run's world model follows the
    game, and observations are what it makes of the frames, (F,) float32.

    Raises:
        UserError: no such run, or the game is not installed.
        ValueError: an obs_type or render_mode that there is not.
    """
    from runs import dreams

    return dreams.make_game(run, obs_type=obs_type, render_mode=render_mode)


def make_sb3_dream(
    run: str | Path | None = None, num_envs: int = 16, *, horizon: int | None = 32, temperature: float | None = None,
    stack: int | None = None, obs_type: str = "rgb", starts: int | None = None,
) -> VecEnv:  # fmt: skip
    """`num_envs` dreams as a VecEnv of Stable-Baselines3 (`pip install -e ".[sb3]"`): monitored, `stack` deep.

    Observations are (H, W, 3 x stack) uint8, for "CnnPolicy", 4 deep when not given, because one frame does not show
    where a ball flies; with obs_type="features", whose memory holds that, (F x stack,) float32 for "MlpPolicy", 1 deep.
    Dreams are short, because what is learned in long ones transfers worse (docs/playing.md). The other keys are those
    of `make_dream`.
    """
    from runs.measure.sb3 import monitored

    dreams: Any = make_dream(run, num_envs, horizon=horizon, temperature=temperature, autoreset_mode="SameStep",
                             obs_type=obs_type, starts=starts)  # fmt: skip
    if stack is None:
        stack = 4 if obs_type == "rgb" else 1
    return monitored(dreams, stack)


def train(
    env: str = "ALE/Pong-v5", recipe: str = "reverie", *, name: str = "", folder: str | Path | None = None, **keys: Any
) -> Path:  # fmt: skip
    """Trains a new run and evaluates it; returns its folder: `folder`, or runs/out/`name`, or one that it names itself.

    `keys` are those of the command line: `size="xs"`, `steps=100_000`, `train={"prefill": 2_000}`.

    Raises:
        UserError: an unknown key, recipe or environment, a value of a wrong type or out of range, or name and folder.
    """
    from runs.cli import commands, compose

    if name and folder:
        raise UserError("name= and folder= both say where the run lies: leave out one.")
    words = compose.prepared([f"{key}={_quoted(value)}" for key, value in _flat({"env": env, "recipe": recipe} | keys)])
    (config,) = compose.check(compose.with_size(words))
    place = compose.folder_of(name) if name else compose.new_folder(config)
    return commands.train(config, Path(folder) if folder else place)


def evaluate(run: str | Path, episodes: int = 100, **keys: Any) -> dict[str, dict[str, Any]]:
    """Plays whole episodes of the real game; returns what results/ holds then, by policy: "sampled" and "greedy".

    `keys` may be seed, device and threads.
    """
    from runs.cli import commands

    words = [f"{key}={_quoted(value)}" for key, value in _flat({"episodes": episodes} | keys)]
    return commands.evaluate(*commands.opened("evaluate", [f"run={run}", *words]))


def main() -> int:
    """The console script `dreamloop`: the same command line as `python main.py`."""
    from main import main as command_line

    return command_line()


def _flat(keys: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested keys by their dotted names."""
    found: list[tuple[str, Any]] = []
    for key, value in keys.items():
        whole = prefix + key == "game.kwargs" or not isinstance(value, Mapping)  # those are the game's own words
        found += [(prefix + key, value)] if whole else _flat(value, f"{prefix}{key}.")
    return found


def _quoted(value: Any) -> str:
    """A value as the command line reads it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_quoted, value)) + "]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}: {_quoted(one)}" for key, one in value.items()) + "}"
    if isinstance(value, int | float):
        return str(value)
    if re.fullmatch(r"[\w/.:-]+", str(value)):
        return str(value)
    return '"' + str(value).replace("\\", "\\\\").replace('"', '\\"') + '"'
