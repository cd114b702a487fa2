"""`iris`: tokens by a VQ-VAE, dreamed one by one; what the contract of all world models does not ask.

Shapes: B batch, T time, N tokens a frame.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from envs.spec import Spec
from policies.imagination import imagine
from tests.iris_toys import SPEC, TOY, model, whole
from tests.tables import parts
from world_model.dream.envs import DreamEnv
from world_model.interface import State, to_unit
from world_model.parts.gpt import GPT
from world_model.parts.vq_tokenizer import VQTokenizer
from world_model.token_world import TokenWorld, TokenWorldConfig
from world_model.trees import Tree

WINDOW: dict[str, Any] = {"context_frames": 4, "keep": 1}


# ---- what it is ----
def test_the_paper_s_sizes() -> None:
    with torch.device("meta"):
        made = TokenWorldConfig().build(Spec((3, 64, 64), 6, True))
    counts = [sum(p.numel() for p in part.parameters()) for part in (made.tokenizer, made.transformer)]
    assert counts == [4_027_523, 8_448_005]
    assert made.latent_shape == (16,) and made.feature_size == 3 * 64 * 64


@pytest.mark.parametrize(
    ("height", "width", "halvings", "patch", "grid"),
    [(64, 64, 4, 1, (4, 4)), (64, 64, 3, 1, (8, 8)), (80, 112, 4, 1, (5, 7)), (168, 128, 3, 1, (21, 16)),
     (160, 80, 4, 1, (10, 5)), (80, 112, 2, 4, (5, 7)), (64, 64, 0, 16, (4, 4))],
)  # fmt: skip
def test_grids(height: int, width: int, halvings: int, patch: int, grid: tuple[int, int]) -> None:
    made = model(Spec((1, height, width), 2, True), halvings=halvings, patch=patch, attention=())
    assert made.tokenizer.grid == grid and made.latent_shape == (grid[0] * grid[1],)
    state = made.start(torch.rand(2, 1, 1, height, width))
    step = made.step(state, torch.tensor([0, 1]))
    assert step.state.latent.shape == (2, *made.latent_shape)
    shown = made.decode(step.state)
    assert shown is not None and shown.shape == (2, 1, height, width)


def test_a_patch_loses_no_pixel() -> None:
    """Every pixel reaches the tokens: the gradient of the latents is zero nowhere."""
    made = model(patch=8, halvings=0, attention=())
    frame = torch.rand(1, 3, 64, 64, requires_grad=True)
    assert isinstance(made.tokenizer, VQTokenizer)
    made.tokenizer.latent(frame).square().sum().backward()
    assert frame.grad is not None and (frame.grad.abs() > 0).float().mean() > 0.999


@torch.no_grad()
def test_locally_a_token_knows_its_own_pixels_alone() -> None:
    """A pixel of the first token's corner next to all its neighbours; not locally, the whole picture hears of it."""
    frame = torch.rand(1, 3, 64, 64)
    other = frame.clone()
    for local in (False, True):
        made = model(local=local, attention=())
        height, width = (64 // side for side in made.tokenizer.grid)
        other[..., height - 1, width - 1] = 1 - frame[..., height - 1, width - 1]
        assert isinstance(made.tokenizer, VQTokenizer)
        change = (made.tokenizer.latent(frame) - made.tokenizer.latent(other)).abs().amax((0, 2))
        assert change[0] > 1e-4 and (change[1:].max() < 1e-6) == local


@pytest.mark.parametrize(
    ("changes", "spec", "words"),
    [
        ({}, replace(SPEC, discrete=False), "actions are continuous"),
        ({"keep": 0}, SPEC, "1 to 6 can be kept, got keep=0"),
        ({"keep": 7}, SPEC, "1 to 6 can be kept, got keep=7"),
        ({"quantizer": "fsq"}, SPEC, "make 512 codes, not 32"),
        ({"heads": 5}, SPEC, "32 cannot be shared among 5 heads"),
    ],
)
def test_impossible_models(changes: dict[str, Any], spec: Spec, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(TOY, **changes).build(spec)


# ---- what it remembers ----
@torch.no_grad()
@pytest.mark.parametrize("length", range(1, 12))
def test_a_context_in_one_pass_is_the_same_as_step_by_step(length: int) -> None:
    made = model(**WINDOW)
    batch = whole(2, length)
    frame = to_unit(batch.frame)
    state = made.start(frame[:, :1])
    for t in range(1, length):
        state = made.step(state, batch.action[:, t - 1], frame[:, t]).state
    at_once = made.start(frame, batch.action)
    assert torch.equal(at_once.latent, state.latent)
    assert torch.equal(at_once.memory["position"], state.memory["position"])
    assert_close(at_once.memory["h"], state.memory["h"], rtol=0, atol=1e-5)
    action = torch.tensor([1, 2])
    assert_close(made.advance(at_once, action)["h"], made.advance(state, action)["h"], rtol=0, atol=1e-5)


@torch.no_grad()
def test_no_amnesia_when_the_window_is_full() -> None:
    """The published code forgets everything then: what follows would not depend on what was before."""
    made = model(**WINDOW, view="tokens")
    gpt = made.transformer
    assert isinstance(gpt, GPT)

    def stands(awaiting: Tree, token: Tensor) -> State:
        """As if the frame that is awaited had these tokens."""
        read, _ = gpt.append(awaiting, token[:, :-1])
        return State(token, {**read, "h": awaiting["h"]})

    def lived(ninth: int) -> tuple[list[int], State]:
        state, ages = made.start(torch.zeros(1, 1, 3, 64, 64)), []
        for t in range(10):
            token = torch.full_like(state.latent, ninth if t == 8 else 0)
            state = stands(made.advance(state, torch.zeros(1, dtype=torch.long)), token)
            ages.append(int(state.memory["position"]) // gpt.stride)
        return ages, state

    (ages, one), (_, other) = lived(1), lived(2)
    assert ages == [1, 2, 3, 2, 3, 2, 3, 2, 3, 2], "it slides before the tenth, too, and keeps the ninth"
    assert (one.memory["h"] - other.memory["h"]).abs().max() > 1e-2
    said = [gpt.next_token(state.memory["h"]) for state in (one, other)]
    assert (said[0] - said[1]).abs().max() > 1e-2


@torch.no_grad()
def test_a_dream_can_go_on_for_ever_and_rows_of_any_age_stand_together() -> None:
    made = model(**WINDOW)
    batch = whole(2, 3)
    frame = to_unit(batch.frame)
    awaiting = made.advance(made.start(frame[:, :2], batch.action), batch.action[:, 1])
    state = made.observe(made.reset_rows(awaiting, torch.tensor([True, False])), frame[:, 2])
    alone = [made.start(frame[:1, -1:]), made.start(frame[1:], batch.action[1:])]
    for t in range(15):
        action = torch.tensor([t % 4, (t + 1) % 4])
        state, reward, cont = made.step(state, action, temperature=0)
        steps = [made.step(alone[row], action[row : row + 1], temperature=0) for row in (0, 1)]
        alone = [step.state for step in steps]
        assert torch.equal(state.latent, torch.cat([one.latent for one in alone]))
        assert_close(reward, torch.cat([step.reward for step in steps]), rtol=0, atol=1e-5)
        assert_close(cont, torch.cat([step.cont for step in steps]), rtol=0, atol=1e-5)


# ---- what it says ----
@torch.no_grad()
def test_rewards_are_means_and_nothing_is_said_before_the_first_action() -> None:
    made = model()
    batch = whole(3, 2)
    state = made.start(to_unit(batch.frame[:, :1]))
    reward, cont = made.outcome(state)
    assert_close((reward, cont), (torch.zeros(3), torch.ones(3)), rtol=0, atol=0)
    step = made.step(state, batch.action[:, 0], to_unit(batch.frame[:, 1]))
    said = made.transformer(state.latent.unsqueeze(1), batch.action[:, :1])
    share = said.reward[:, 0].softmax(-1)
    assert_close(step.reward, share[:, 2] - share[:, 0], rtol=0, atol=1e-5)
    assert_close(made.reward_sign(step.state), step.reward)
    made.reward.note(torch.tensor([-20.0, 0.0, 5.0]))
    assert_close(made.outcome(step.state)[0], 5 * share[:, 2] - 20 * share[:, 0], rtol=0, atol=1e-4)
    assert_close(made.reward_sign(step.state), step.reward)
    assert_close((made.outcome(state)[0], made.reward_sign(state)), (torch.zeros(3), torch.zeros(3)), rtol=0, atol=0)
    assert_close(step.cont, said.end[:, 0].softmax(-1)[:, 0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_what_a_policy_sees() -> None:
    batch = whole(2, 3)
    made = model()
    state = made.start(to_unit(batch.frame), batch.action)
    assert_close(made.features(state).view(2, 3, 64, 64), made.decode(state))
    made = model(view="tokens")
    state = made.start(to_unit(batch.frame), batch.action)
    seen = made.features(state)
    assert seen.shape == (2, made.feature_size) == (2, 4 * TOY.code_width + TOY.width)
    assert_close(seen[:, : TOY.code_width], made.tokenizer.embedding(state.latent[:, 0]))
    assert_close(seen[:, -TOY.width :], state.memory["h"])


@pytest.mark.parametrize(("recipe", "signs"), [("iris", True), ("iris_ac", False)])
def test_the_published_policy_learns_from_signs_and_all_others_in_the_game_s_units(recipe: str, signs: bool) -> None:
    made = parts(recipe=recipe)
    model, policy = made.world.model, made.learner.policy
    assert isinstance(model, TokenWorld)
    with torch.no_grad():
        dict(model.named_parameters())["transformer.reward.2.bias"][0] += 20  # a punishment at every step
    model.reward.note(torch.tensor([-20.0]))
    state = model.start(to_unit(made.world.starts.frame), made.world.starts.action)
    dream = imagine(model, policy, state, horizon=3)
    assert_close(dream.reward, torch.full((3, 3), -1.0 if signs else -20.0))
    env = DreamEnv(made.world)
    env.reset(seed=0)
    assert env.step(0)[1] == pytest.approx(-20)
