"""What a model foresees: models whose fidelity is known, every recipe, and the table of what is published."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from envs.controls import Controls
from envs.episode import Episode
from envs.errors import UserError
from envs.spec import Spec
from main import main
from runs import build
from runs.dreams import Loaded
from runs.measure import fidelity, rewards, suite
from runs.measure.atari import Thing
from runs.measure.fidelity import CONTEXT, HORIZONS, OF_A_THING, Part
from runs.recipes import RECIPES
from runs.report import leaderboard, publish
from tests.toys import VARIANTS, Variant, segments
from tests.trained import small
from tests.world_model.systems import Small
from world_model.dream.envs import Starts
from world_model.interface import Batch, State, Step, WorldModel
from world_model.trees import Tree

SIZE, CODES = 8, 256


class Counter:
    """Frames whose gray tells a number; each action is added to it. A model that knows this, or expects no change."""

    latent_shape = (2,)
    spec = Spec((3, SIZE, SIZE), 2, True)

    def __init__(self, *, knows: bool) -> None:
        self.knows = knows

    def encode(self, frame: Tensor) -> Tensor:
        number = (frame[:, 0, 0, 0] * 255).round().long()
        return torch.stack([number, torch.zeros_like(number)], -1)  # the second code never changes

    def start(self, frame: Tensor, action: Tensor) -> State:
        return State(self.encode(frame[:, -1]), ())

    def step(self, state: State, action: Tensor, frame: Tensor | None = None, temperature: float = 1.0) -> Step:
        latent = state.latent.clone() if frame is None else self.encode(frame)
        latent[:, 0] += action * self.knows * (frame is None)
        return Step(State(latent, ()), action.float() * self.knows, torch.full((len(action),), 0.5))

    def decode(self, state: State) -> Tensor:
        return (state.latent[:, 0] / 255).view(-1, 1, 1, 1).expand(-1, *self.spec.frame)


def find_number(frame: np.ndarray) -> list[np.ndarray]:
    """A thing that stands where the number says, in the console's pixels."""
    return [np.array([4 * frame[0, 0, 0].round(), 0.0])]


def some_part(count: int = 100) -> Part:
    length = CONTEXT + HORIZONS[-1]
    action = torch.randint(2, (count, length), generator=torch.Generator().manual_seed(0))
    number = torch.cat([torch.zeros(count, 1, dtype=torch.long), action[:, :-1].cumsum(1)], 1)
    frame = number.byte().view(count, length, 1, 1, 1).expand(-1, -1, *Counter.spec.frame)
    valid = torch.ones(count, length, dtype=torch.bool)
    valid[0, CONTEXT + 4 :] = False  # an episode that ends on the way
    has_action, terminated = valid.clone(), torch.zeros_like(valid)
    has_action[0, CONTEXT + 3] = False
    terminated[0, CONTEXT + 2] = True
    batch = Batch(frame, action, action.float(), terminated, has_action, valid)
    now = [CONTEXT - 1 + ahead for ahead in HORIZONS]
    return Part(batch, {"ball": np.stack([4.0 * number[:, now].numpy(), np.zeros((count, len(now)))], -1)})


@pytest.mark.parametrize("knows", [True, False])
def test_who_knows_the_game_foresees_it_and_who_expects_no_change_is_as_good_as_that(knows: bool) -> None:
    part, model = some_part(), cast(WorldModel, Counter(knows=knows))
    named = {"ball": Thing((0, 1), (0, 0), (0, 160, 0, 210), find_number)}
    found = fidelity.judge(model, fidelity.begin(model, part.batch), part, 0.0, named)
    for ahead, told in found.items():
        row = fidelity._row(ahead, told, ["ball"])
        rows = slice(1, None) if ahead > 4 else slice(None)
        moved = (part.batch.action[rows, CONTEXT - 1 : CONTEXT - 1 + ahead].sum(1) > 0).float().mean().item()
        assert row["contexts"] == (99 if ahead > 4 else 100)
        assert row["accuracy_still"] == pytest.approx(1 - moved / 2, abs=1e-4)
        assert row["accuracy"] == pytest.approx(1.0 if knows else 1 - moved / 2, abs=1e-4)
        assert row["accuracy_changed"] == float(knows)
        assert row["psnr_seen"] == 99 and row["psnr"] == (99 if knows else row["psnr_still"])
        unforeseen = row["reward_mse_mean"] / (1 - moved_share(part, ahead))
        assert row["reward_mse"] == (0 if knows else pytest.approx(unforeseen, rel=1e-3))
        assert row["reward_corr"] == (1 if knows else None)
        assert row["cont_nats"] == pytest.approx(np.log(2), abs=1e-3)
        assert row["endings"] == (ahead > 4) == (row["cont_nats_base"] > 0)  # also of the context that ends on the way
        assert (
            row["ball_within_2px"] == (1 if knows else row["ball_still"]) and row["ball_seen"] == row["ball_real"] == 1
        )
    assert fidelity._row(50, found[50], ["ball"])["ball_still"] == 0
    short = fidelity.judge(model, fidelity.begin(model, part.batch), part, 0.0, named, 5)
    assert list(short) == [1, 5] and all(short[ahead]["sums"].equal(found[ahead]["sums"]) for ahead in short)


class Teller(Counter):
    """A counter that remembers number and action: a frame that is shown tells the reward, a dream only who knows."""

    def start(self, frame: Tensor, action: Tensor) -> State:
        return self.observe(torch.zeros(len(frame), dtype=torch.long), frame[:, -1])

    def advance(self, state: State, action: Tensor) -> Tensor:
        return state.latent[:, 0] + (action << 16)

    def imagine(self, memory: Tensor, temperature: float = 1.0) -> State:
        return State((memory >> 16).unsqueeze(-1) * self.knows, memory)

    def observe(self, memory: Tensor, frame: Tensor) -> State:
        number = (frame[:, 0, 0, 0] * 255).round().long()
        return State(torch.stack([number, number - (memory & 0xFFFF)], -1), memory)

    def outcome(self, state: State) -> tuple[Tensor, Tensor]:
        return state.latent[:, -1].float(), torch.ones(len(state.latent))


@pytest.mark.parametrize("knows", [True, False])
def test_rewards_are_told_with_the_frame_and_without(knows: bool) -> None:
    action = np.random.default_rng(0).integers(2, size=200)
    frame = np.concatenate([[0], action.cumsum()]).astype(np.uint8)
    frame = np.broadcast_to(frame[:, None, None, None], (201, *Counter.spec.frame))
    ends = np.zeros(200, np.bool_)
    played = Episode(frame, action, action.astype(np.float32), ends, ends, float(action.sum()), 0)
    model = SimpleNamespace(agent=SimpleNamespace(world_model=Teller(knows=knows), device=torch.device("cpu")))
    told = rewards.correlations(cast(Loaded, model), [played])
    assert told is not None and told["seen"] == 1 and told["dreamed"] == (1 if knows else None)
    assert told["events"] == pytest.approx(384 * 20 * action.mean(), rel=0.05)
    assert rewards.correlations(cast(Loaded, model), []) is None


def moved_share(part: Part, ahead: int) -> float:
    """The share of steps that bring a reward of 1: nothing is foreseen of it by a model that always tells 0."""
    steps = slice(CONTEXT - 1, CONTEXT - 1 + ahead)
    return part.batch.action[:, steps][part.batch.has_action[:, steps]].float().mean().item()


@pytest.mark.parametrize(
    ("found", "marks"),
    [
        ([], [True, False, True, False, True, False, False]),
        ([(11.0, 10.0)], [True, True, True, True, False, False, True]),
        ([(80.0, 10.0), (10.0, 10.0)], [True, False, True, False, False, True, False]),
    ],
)
def test_things_vanish_double_and_are_near(found: list[tuple[float, float]], marks: list[bool]) -> None:
    places = [np.array(place) for place in found]
    thing = Thing((0, 1), (0, 0), (0, 160, 0, 210), lambda frame: places)
    nothing, here = np.zeros((3, 4, 4)), [np.array([10.0, 10.0])]
    assert fidelity._marks(thing, np.array([10.0, 10.0]), here, nothing, nothing, nothing) == marks
    assert fidelity._marks(thing, np.full(2, np.nan), here, nothing, nothing, nothing) == [False] * len(OF_A_THING)


def loaded(recipe: str, **game: Any) -> Loaded:
    """An untrained model of Catch."""
    config = small("Catch-v0", recipe)
    config = replace(config, game=replace(config.game, **game))
    agent = build.agent(config, Spec(config.game.frame_shape, 3, True))
    empty = Starts(torch.zeros(0), torch.zeros(0))
    return Loaded(config, agent, empty, Controls(("LEFT", "STAY", "RIGHT"), (), None, None), None, 0)


USUAL = ("reverie", "iris_ac", "world_models")  # one of each kind of latent


@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=[pytest.mark.slow] * (name not in USUAL)) for name in RECIPES]
)
def test_every_recipe_is_measured(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(suite.TIERS, "canary", 12)
    for name in ("SEGMENTS", "PART"):
        monkeypatch.setattr(rewards, name, 8)
    model = loaded(recipe)
    found = fidelity.measure(model, "canary", 1.0)
    assert [row["steps_ahead"] for row in found["rows"]] == [1, 5, 10, 50]
    assert found["contexts"] == 12 == found["rows"][0]["contexts"] and found["suite"] == "Catch-v0-repeat1-sticky0"
    row = found["rows"][1]
    assert 0 < row["psnr"] < 40 and row["psnr_moved_still"] < row["psnr_still"] < 40 and row["cont_nats"] > 0
    discrete = not recipe.startswith("world_models")
    assert ("accuracy" in row) == discrete == ("left_right_kl_per_code" in found) == ("mirror_dream_codes" in found)
    assert found["left_right_pixels"] >= 0 and 0 < found["mirror_psnr"] < 99 and found["left_right_kl"] >= 0
    assert found["mirror_dream_psnr"] > 0
    told = found["rewards"]["frozen"]
    assert told["events"] > 0 and {"seen", "dreamed"} <= told.keys(), "None where an untrained head tells one number"
    assert found["rewards"]["own"] is None, "no run, no games of it"
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.discrete], ids=str)
def test_what_two_actions_lead_one_to_expect_differs(variant: Variant) -> None:
    model = variant.agent().world_model.eval()
    batch = segments(variant.spec, 3, 4)
    with torch.no_grad():
        state = model.start(batch.frame[:2] / 255, batch.action[:2, :-1])
        one, other = (model.advance(state, torch.full((2,), action)) for action in (0, 1))
        torch.manual_seed(0)
        kl, none = model.prior_kl(one, other), model.prior_kl(one, one)
    assert kl is not None and none is not None and kl.shape == (2,)
    assert (kl > 1e-6).all() and none.abs().max() < 1e-5


class Shifting(Small):
    """The latent is the picture, which LEFT and RIGHT move by a pixel; and so does `drift`, whatever is done."""

    drift = 0

    def initial(self, batch_size: int) -> Tree:
        return {"frame": torch.zeros(batch_size, *self.spec.frame)}

    def observe(self, memory: Tree, frame: torch.Tensor) -> State:
        return State(frame, {"frame": frame})

    def advance(self, state: State, action: torch.Tensor) -> Tree:
        moved = [frame.roll(int(by) - 1 + self.drift, -1) for frame, by in zip(state.latent, action, strict=True)]
        return {"frame": torch.stack(moved)}

    def imagine(self, memory: Tree, temperature: float = 1.0) -> State:
        return State(memory["frame"], memory)

    def decode(self, state: State) -> torch.Tensor:
        return state.latent


def test_what_knows_left_from_right_dreams_the_mirror_image_of_a_mirrored_past() -> None:
    names = ["LEFT", "NOOP", "RIGHT"]
    assert fidelity.mirror_images(names) == [2, 1, 0] and fidelity.mirror_images(["NOOP", "UPLEFT", "LEFT"]) is None
    model = Shifting(Spec((3, 16, 16), 3, True))
    batch = segments(model.spec, 4, CONTEXT + 1).rows(torch.arange(3))  # of the fourth most is padding
    state = fidelity.begin(model, batch)
    found = fidelity.at_once(model, state, batch, names, 0.0)
    assert found["mirror_dream_psnr"].max() == 0 < found["left_right_pixels"].min(), "the error, of which dB are made"
    model.drift = 1
    assert fidelity.at_once(model, state, batch, names, 0.0)["mirror_dream_psnr"].min() > 0.01
    assert "mirror_dream_psnr" not in fidelity.at_once(model, state, batch, ["LEFT", "UPLEFT", "RIGHT"], 0.0)


def test_tokens_are_compared_as_they_are_and_one_hot_variables_by_their_class() -> None:
    tokens = torch.tensor([[3, 1], [0, 2]])
    model = cast(WorldModel, Counter(knows=True))
    found = fidelity.codes(model, tokens)
    assert found is not None and torch.equal(found, tokens)
    assert fidelity.codes(model, torch.zeros(2, 2)) is None
    model.latent_shape = (2, CODES)
    found = fidelity.codes(model, torch.nn.functional.one_hot(tokens, CODES).float())
    assert found is not None and torch.equal(found, tokens)


def test_perplexity_is_how_many_codes_are_in_even_use() -> None:
    assert fidelity.perplexity(torch.arange(12).view(3, 4) % 4 + 7) == pytest.approx(4)
    assert fidelity.perplexity(torch.full((2, 5), 3)) == pytest.approx(1)
    assert fidelity.perplexity(torch.tensor([0, 0, 0, 1])) == pytest.approx(1.7548, abs=1e-3)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["run=x", "steps=3"], "steps"), (["run=x", "temperature=warm"], "temperature"), (["run=nobody"], "nobody"),
        (["tier=silver"], "canary, fast, gold"),
    ],
)  # fmt: skip
def test_wrong_words_are_one_sentence(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fidelity", *words]) == 2
    said = capsys.readouterr().err
    assert sentence in said


# ---- the leaderboard ----
def published(folder: Path, recipe: str, psnr: float, **more: Any) -> None:
    row = {"steps_ahead": 1, "psnr": psnr, "psnr_still": 20.0, "psnr_moved": psnr, "psnr_moved_still": 9.0}
    row |= {"reward_corr": None, "cont_nats": 0.1, "cont_nats_base": 0.2} | more
    entry = {"what": "fidelity", "recipe": recipe, "env": "Catch-v0", "size": "toy", "suite": "c", "tier": "canary"}
    entry["temperature"] = 0.0  # type: ignore[assignment]
    (folder / f"{recipe}-Catch-v0-fidelity.json").write_text(json.dumps(entry | {"rows": [row]}))


def test_the_leaderboard_has_a_row_for_each_model_and_horizon_the_best_first(tmp_path: Path) -> None:
    ball = {"ball_within_2px": 0.9, "ball_still": 0.1, "ball_vanished": 0.05, "ball_doubled": 0.0}
    published(tmp_path, "one", 25.0)
    published(tmp_path, "two", 30.0, accuracy=0.8, accuracy_still=0.7, accuracy_changed=0.6, **ball)
    lines = leaderboard.rows(leaderboard.entries(tmp_path))
    assert [path.name[:3] for path, _ in lines] == ["two", "one"]
    cells = dict(zip(leaderboard.HEADING, lines[0][1], strict=True))
    assert cells["PSNR (copy)"] == "30.0 (20.0)" and cells["codes right (copy)"] == "80.0% (70.0%)"
    assert cells["within 2 px (copy); vanished, doubled"] == "ball 90.0% (10.0%); 5.0%, 0.0%"
    assert dict(zip(leaderboard.HEADING, lines[1][1], strict=True))["codes right (copy)"] == "-"
    assert "| 30.0 (20.0) |" in publish.tables(tmp_path) and "before the suite" not in publish.tables(tmp_path)


def test_only_published_games_are_on_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="No fidelity of Nowhere-v0"):
        leaderboard.command(leaderboard.LeaderboardConfig(env="Nowhere-v0"))
    leaderboard.command(leaderboard.LeaderboardConfig(env="ALE/Pong-v5"))
    said = capsys.readouterr().out
    assert "ALE/Pong-v5" in said and "ball" in said and "Boxing" not in said
