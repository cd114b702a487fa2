"""Dreams as gymnasium environments: what the checkers ask, reproducible, branching, ending when the model says so."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from gymnasium.utils.play import play
from gymnasium.vector import AutoresetMode

from envs.controls import Controls
from envs.errors import UserError
from envs.spec import Spec
from tests.toys import VARIANTS, Variant, segments
from world_model.dream.envs import SDL, DreamEnv, DreamVectorEnv, Starts, World
from world_model.interface import State, WorldModel

DISCRETE, CONTINUOUS = (
    next(variant for variant in VARIANTS if variant.discrete == discrete) for discrete in (True, False)
)


def controls(spec: Spec) -> Controls:
    """Of a made-up game; continuous actions go from 0 to 4."""
    names = tuple(f"action {i}" for i in range(spec.action_size))
    if spec.discrete:
        return Controls(names, (((), 0), (("space",), 1), (("left", "up"), 2)))
    rest = (0.0,) * spec.action_size
    return Controls(names, (((), rest), (("right",), rest)), low=rest, high=(4.0,) * spec.action_size)


def world(variant: Variant = DISCRETE, *, cont: float | None = None, starts: int = 3) -> World:
    """A toy model with random contexts; `cont` overrides what its continuation head says."""
    model = variant.agent().world_model.eval()
    if cont is not None:
        pin(model, cont)
    batch = segments(model.spec, starts + 1, 5)  # the last row is padded
    return World(model, Starts(batch.frame[:starts], batch.action[:starts, :-1]), controls(model.spec))


def pin(model: WorldModel, cont: float) -> None:
    outcome = model.outcome

    def pinned(state: State) -> tuple[torch.Tensor, torch.Tensor]:
        reward, _ = outcome(state)
        return reward, torch.full_like(reward, cont)

    model.outcome = pinned  # type: ignore[method-assign]


def trajectory(env: gymnasium.Env[Any, Any], actions: list[Any]) -> list[Any]:
    """All that the actions bring."""
    return [part for action in actions for part in env.step(action)[:4]]


def same(first: list[Any], second: list[Any]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_checkers(variant: Variant) -> None:
    """Gymnasium's own checker and Stable-Baselines3's find nothing to warn of, beyond unscaled action bounds."""
    made = world(variant, cont=1.0)
    spec = EnvSpec("ToyDream-v0", entry_point=lambda **kwargs: DreamEnv(made, horizon=50, **kwargs))
    env = gymnasium.make(spec, render_mode="rgb_array").unwrapped
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*normalized.*")
        check_env(env)
        sb3 = importlib.import_module("stable_baselines3.common.env_checker")
        sb3.check_env(env)


@pytest.mark.parametrize("variant", [DISCRETE, CONTINUOUS], ids=str)
def test_features_are_what_the_policy_sees_and_looking_changes_nothing(variant: Variant) -> None:
    made = world(variant, cont=1.0)
    drawn, plain = (DreamEnv(made, render_mode="rgb_array", obs_type=name) for name in ("features", "rgb"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*infinity|.*normalized")
        check_env(DreamEnv(made, horizon=50, obs_type="features"))
    drawn.action_space.seed(0)
    seen, picture = drawn.reset(seed=3)[0], plain.reset(seed=3)[0]
    for _ in range(3):
        shown: Any = drawn.render()
        assert np.array_equal(shown, picture) and drawn.observation_space.contains(seen)
        with torch.inference_mode():
            assert np.array_equal(made.model.features(drawn.now.state)[0].numpy(), seen)  # type: ignore[union-attr]
        action = drawn.action_space.sample()
        (seen, *brought), (picture, *other) = drawn.step(action), plain.step(action)
        assert brought == other
    rows = DreamVectorEnv(made, 2, horizon=1, autoreset_mode="SameStep", obs_type="features")
    begun = rows.reset(seed=0, options={"start": [1, 1]})[0]
    told = rows.step(np.stack([action, action]))[4]
    assert told["final_obs"][0].shape == begun[0].shape and not np.array_equal(told["final_obs"][0], begun[0])
    with pytest.raises(ValueError, match='"rgb" or "features"'):
        DreamEnv(made, obs_type="ram")


def test_a_model_without_pictures_has_dreams_of_features(monkeypatch: pytest.MonkeyPatch) -> None:
    made = world(cont=1.0)
    monkeypatch.setattr(made.model, "decode", lambda state: None)
    with pytest.raises(UserError, match="has no pictures"):
        DreamEnv(made)
    env = DreamEnv(made, obs_type="features", render_mode="rgb_array")
    env.reset(seed=0)
    assert env.step(0)[0].ndim == 1
    with pytest.raises(UserError, match="has no pictures"):
        env.render()


def test_many_starts_begin_as_each_alone_would(monkeypatch: pytest.MonkeyPatch) -> None:
    made = world(starts=7)
    monkeypatch.setattr("world_model.dream.batch.STARTS_AT_ONCE", 3)
    env = DreamEnv(made, obs_type="features")
    assert len(env._starts.observation) == 7
    with torch.inference_mode():
        frame, action = made.starts.frame[5:6].float() / 255, made.starts.action[5:6]
        alone = made.model.features(made.model.start(frame, action))[0].numpy()
    np.testing.assert_allclose(env.reset(options={"start": 5})[0], alone, atol=1e-5)
    shown = DreamEnv(made)
    assert shown.reset(options={"start": 6})[0].shape == (64, 64, 3)
    with pytest.raises(ValueError, match="another obs_type"):
        shown.set_state(env.get_state())


@pytest.mark.parametrize("variant", [DISCRETE, CONTINUOUS], ids=str)
def test_a_seed_determines_the_dream(variant: Variant) -> None:
    env = DreamEnv(world(variant, cont=0.9))
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(3)]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    runs = []
    for seed in (1, 1, 2):
        first, info = env.reset(seed=seed)
        env.done[:] = False
        brought = [first, info["start"]]
        for action in actions:
            brought += env.step(action)[:4]
            env.done[:] = False  # the draws count here, not what they end
        runs.append(brought)
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])
    assert torch.equal(before, torch.get_rng_state()), "the default generator is as it was"


def test_pictures_are_rgb_also_of_gray_models() -> None:
    spec = Spec((1, 64, 64), 4, discrete=True)
    config = DISCRETE.config
    model = config.model.build(spec).eval()
    batch = segments(spec, 3, 4)
    env = DreamEnv(World(model, Starts(batch.frame[:2], batch.action[:2, :-1]), controls(spec)))
    frame, _ = env.reset(seed=0)
    assert frame.shape == (64, 64, 3) and frame.dtype == np.uint8 and (frame == frame[..., :1]).all()


def test_dreams_start_where_asked_with_what_the_model_makes_of_the_context() -> None:
    made = world()
    env = DreamEnv(made)
    with torch.inference_mode():
        state = made.model.start(made.starts.frame.float() / 255, made.starts.action)
        shown = (made.model.picture(state) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    for start in (2, 0):
        frame, info = env.reset(options={"start": start})
        assert info["start"] == start and np.array_equal(frame, shown[start])
    assert {env.reset()[1]["start"] for _ in range(40)} == {0, 1, 2}
    with pytest.raises(ValueError, match="0 to 2"):
        env.reset(options={"start": 3})


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_branches_of_a_moment_have_the_same_future(variant: Variant) -> None:
    env = DreamEnv(world(variant, cont=1.0), horizon=9)
    env.action_space.seed(0)
    first, second = [env.action_space.sample() for _ in range(3)], [env.action_space.sample() for _ in range(3)]
    env.reset(seed=3)
    env.step(first[0])
    moment = env.get_state()
    futures = []
    for actions in (first, second, first):
        env.set_state(moment)
        futures.append([*trajectory(env, actions), env.reset()[1]["start"]])
    assert same(futures[0], futures[2]) and not same(futures[0], futures[1])
    other = DreamEnv(env.dreams.world, horizon=9)
    other.set_state(moment)
    assert same(trajectory(other, first), futures[0][:-1]), "a moment lives without the environment it is from"


def test_horizon_truncates_and_a_dream_that_is_over_must_be_reset() -> None:
    env = DreamEnv(world(cont=1.0), horizon=3)
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(0)
    env.reset(seed=0)
    ends = [env.step(0)[2:4] for _ in range(3)]
    assert ends == [(False, False), (False, False), (False, True)]
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(0)


@pytest.mark.parametrize("cont", [0.0, 0.7, 1.0])
def test_ends_are_drawn_from_the_continuation_head(cont: float) -> None:
    count = 200
    env = DreamVectorEnv(world(cont=cont), count)
    env.reset(seed=0)
    ended = env.step(np.zeros(count, np.int64))[2].mean()
    assert abs(ended - (1 - cont)) <= 4 * np.sqrt(cont * (1 - cont) / count)


def test_temperature_zero_dreams_the_same_from_every_seed() -> None:
    def dreamed(temperature: float, seed: int) -> list[Any]:
        env.temperature = temperature
        env.reset(seed=seed, options={"start": 0})
        return trajectory(env, [1] * 4)

    env = DreamEnv(world(cont=1.0))
    assert same(dreamed(0.0, 1), dreamed(0.0, 2))
    assert not same(dreamed(1.0, 1), dreamed(1.0, 2))


@pytest.mark.parametrize("wrong", [4, -1, 1.5, "left", np.array([0, 1]), float("nan"), None])
def test_no_action(wrong: Any) -> None:
    env = DreamEnv(world())
    env.reset(seed=0)
    with pytest.raises(ValueError, match="no action"):
        env.step(wrong)


def test_continuous_actions_are_the_games_own() -> None:
    made = world(CONTINUOUS)
    scaled = made.action([[0.0, 4.0], [2.0, 99.0]], 2)
    assert torch.equal(scaled, torch.tensor([[-1.0, 1.0], [0.0, 1.0]]))
    assert DreamEnv(made).get_keys_to_action()[SDL["right"],].tolist() == [2, 2]


def test_vector_rows_begin_anew_and_keep_their_final_frame() -> None:
    env = DreamVectorEnv(world(cont=0.6), 8, horizon=4, render_mode="rgb_array", autoreset_mode="SameStep")
    assert env.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    frames, info = env.reset(seed=0, options={"start": [0, 1, 2, 0, 1, 2, 0, 1]})
    assert env.observation_space.contains(frames) and info["start"].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    shown, age, seen = [frames[i] for i in range(3)], np.zeros(8, int), 0
    for _ in range(12):
        frames, reward, terminated, truncated, info = env.step(np.ones(8, np.int64))
        age += 1
        done = terminated | truncated
        assert reward.shape == info["cont"].shape == (8,) and not (terminated & truncated).any()
        assert (truncated <= (age == 4)).all() and (done >= (age == 4)).all()
        if done.any():
            assert np.array_equal(info["_final_obs"], done)
            for row in np.flatnonzero(done):
                seen += 1
                assert any(np.array_equal(frames[row], start) for start in shown)
                assert not any(np.array_equal(info["final_obs"][row], start) for start in shown)
        age[done] = 0
        assert np.array_equal(np.stack(env.render() or ()), frames)
    assert seen > 8


def test_rows_begin_anew_with_the_next_step_as_in_gymnasium() -> None:
    """Beside gymnasium's own vector of single dreams, whose ends are those of the horizon; and its wrappers take it."""
    made = world(cont=1.0)
    ours = DreamVectorEnv(made, 3, horizon=4)
    theirs = gymnasium.vector.SyncVectorEnv([lambda: DreamEnv(made, horizon=4)] * 3)
    assert ours.metadata["autoreset_mode"] is theirs.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    counted = gymnasium.wrappers.vector.RecordEpisodeStatistics(ours)
    first, _ = counted.reset(seed=0)
    theirs.reset(seed=0)
    for t in range(1, 12):
        frames, reward, terminated, truncated, info = counted.step(np.array([0, 1, 2]))
        expected = theirs.step(np.array([0, 1, 2]))
        assert np.array_equal(truncated, expected[3]) and np.array_equal(terminated, expected[2])
        assert truncated.all() == (t % 5 == 4)
        if t % 5 == 0:  # the action of that step was not played
            assert (reward == 0).all() and not (ours.time.any() or truncated.any())
        if t == 4:
            assert info["episode"]["l"].tolist() == [4, 4, 4]
    moment = ours.get_state()
    ours.step(np.zeros(3, int))
    assert moment.done is not ours.done


def test_only_rows_that_are_over_begin_anew() -> None:
    env = DreamVectorEnv(world(cont=0.5), 20)
    env.reset(seed=1)
    ended = env.step(np.zeros(20, int))[2]
    assert 0 < ended.sum() < 20
    with pytest.raises(ValueError, match="no action"):
        env.step(np.full(20, 99))
    _, reward, *_ = env.step(np.zeros(20, int))
    assert (reward[ended] == 0).all() and (env.time == np.where(ended, 0, 2)).all()


def test_who_resets_by_himself_says_which_rows() -> None:
    env = DreamVectorEnv(world(cont=1.0), 4, horizon=2, autoreset_mode=AutoresetMode.DISABLED)
    with pytest.raises(ValueError, match="at first all"):
        env.reset(options={"reset_mask": np.array([True, False, True, True])})
    env.reset(seed=0)
    env.step(np.zeros(4, int))
    before = env.reset(options={"reset_mask": np.array([True, False, True, True]), "start": 1})
    assert before[1]["start"].tolist() == [1, 1, 1] and env.time.tolist() == [0, 1, 0, 0]
    assert env.step(np.zeros(4, int))[3].tolist() == [False, True, False, False]
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(np.zeros(4, int))
    env.reset(options={"reset_mask": np.array([False, True, False, False])})
    env.step(np.zeros(4, int))
    with pytest.raises(ValueError, match="no mask"):
        env.reset(options={"reset_mask": [1, 0]})


@pytest.mark.parametrize(("whole", "expected"), [(True, [0, 1, -1, 0.6, 0, 0.2]), (False, None)])
def test_a_reward_that_is_nearly_whole_is_whole_where_the_games_are(whole: bool, expected: list[float] | None) -> None:
    made = replace(world(cont=1.0), whole_rewards=whole)
    told = [7.5e-8, 0.93, -0.92, 0.6, -1e-9, 0.2]
    made.model.outcome = lambda state: (torch.tensor(told), torch.ones(6))  # type: ignore[method-assign]
    env = DreamVectorEnv(made, 6)
    env.reset(seed=0)
    reward = env.step(np.zeros(6, int))[1]
    assert reward.tolist() == pytest.approx(expected or told, abs=1e-6)
    assert not whole or str(reward[4]) == "0.0", "and not -0.0"


def test_without_a_display_no_window_is_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that gymnasium's checker, which tries every mode that is offered, passes on a server."""
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    made = world(cont=1.0)
    spec = EnvSpec("ToyDream-v0", entry_point=lambda **kwargs: DreamEnv(made, horizon=50, **kwargs))
    env = gymnasium.make(spec, render_mode="rgb_array").unwrapped
    assert env.metadata["render_modes"] == ["rgb_array"]
    check_env(env)


def test_one_row_dreams_as_one_dream() -> None:
    """The vector of one and the single environment share everything, so that what is learned in one holds in both."""
    made = world(cont=1.0)
    one, many = DreamEnv(made), DreamVectorEnv(made, 1)
    first, _ = one.reset(seed=4)
    assert np.array_equal(many.reset(seed=4)[0][0], first)
    for action in (0, 3, 1):
        single, rows = one.step(action), many.step([action])
        assert np.array_equal(single[0], rows[0][0]) and single[1] == rows[1][0]


def test_vector_moments() -> None:
    env = DreamVectorEnv(world(cont=0.5), 4)
    env.reset(seed=0)
    moment = env.get_state()
    futures = []
    for _ in range(2):
        env.set_state(moment)
        futures.append([part for _ in range(4) for part in env.step(np.zeros(4, int))[:4]])
    assert same(*futures)
    with pytest.raises(ValueError, match="4 dreams"):
        DreamEnv(env.dreams.world).set_state(moment)


def test_starts_and_controls_must_fit() -> None:
    made = world()
    for starts in (
        Starts(made.starts.frame.float(), made.starts.action),
        made.starts._replace(action=made.starts.frame),
    ):
        with pytest.raises(ValueError, match="starts"):
            World(made.model, starts, made.controls)
    with pytest.raises(ValueError, match="controls"):
        World(made.model, made.starts, controls(CONTINUOUS.spec))
    for wrong in ({"horizon": 0}, {"temperature": -1.0}):
        with pytest.raises(ValueError, match="no dream"):
            DreamEnv(made, **wrong)


@pytest.fixture
def pygame() -> Iterator[Any]:
    module = importlib.import_module("pygame")
    yield module
    module.quit()


def test_window(pygame: Any) -> None:
    env = DreamEnv(world(cont=1.0), render_mode="human")
    frame, _ = env.reset(seed=0)
    surface = pygame.display.get_surface()
    assert surface.get_size() == (512, 512)
    assert surface.get_at((8 * 20 + 3, 8 * 10 + 3))[:3] == tuple(frame[10, 20])
    frame = env.step(1)[0]
    assert surface.get_at((8 * 20 + 3, 8 * 10 + 3))[:3] == tuple(frame[10, 20])
    env.close()
    assert not pygame.display.get_init()


def test_gymnasiums_player_plays_it(pygame: Any) -> None:
    """Its keys are the ones that gymnasium.utils.play understands."""
    taken: list[Any] = []

    def watch(before: Any, after: Any, action: Any, *rest: Any) -> None:
        taken.append(action)
        pygame.event.post(pygame.event.Event(pygame.KEYDOWN, key=pygame.K_SPACE))
        if len(taken) == 3:
            pygame.event.post(pygame.event.Event(pygame.QUIT))

    play(DreamEnv(world(cont=1.0), render_mode="rgb_array"), callback=watch, noop=0, fps=1000)
    assert taken[0] == 0 and taken[-1] == 1
