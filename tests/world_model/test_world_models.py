"""The contract of `world_model/interface.py` on every recipe: a pure state machine over independent rows.

Shapes: B batch, T time. Temperature 0 makes dreams deterministic, so that they can be compared.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.toys import VARIANTS, Variant, follow, rows, segments
from world_model import trees
from world_model.interface import State, WorldModel
from world_model.trees import Tree

B, T = 4, 9  # longer than the window of the toy transformer


class Toy(NamedTuple):
    model: WorldModel
    frame: Tensor  # (B, T, C, H, W) in [0, 1]
    action: Tensor  # (B, T) or (B, T, A)

    def state(self) -> State:
        """One that has seen three frames."""
        return self.model.start(self.frame[:, :3], self.action[:, :2])


@cache
def made(index: int) -> Toy:
    variant = VARIANTS[index]
    batch = segments(variant.spec, B, T)
    frame = segments(variant.spec, B, T, seed=1).frame / 255
    frame[-1] = batch.frame[0] / 255  # no padding here
    return Toy(variant.agent().world_model, frame, batch.action)


@pytest.fixture(params=range(len(VARIANTS)), ids=[str(variant) for variant in VARIANTS])
def toy(request: pytest.FixtureRequest) -> Toy:
    with torch.no_grad():
        return made(request.param)


@pytest.fixture(autouse=True)
def no_gradients() -> object:
    with torch.no_grad():
        yield


def shapes(tree: Tree) -> Tree:
    return [(leaf.shape, leaf.dtype) for leaf in trees.leaves(tree)]


def close(a: object, b: object) -> None:
    assert_close(a, b, rtol=1e-3, atol=1e-4)


def differ(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether anything that is known of two states does; what a policy sees alone need not tell of the past."""
    return any(not torch.allclose(one, other) for one, other in zip(a, b, strict=True))


def test_shapes_and_kinds(toy: Toy) -> None:
    model = toy.model
    latent = model.encode(toy.frame)
    assert latent.shape == (B, T, *model.latent_shape)
    assert model.encode(toy.frame[:, 0]).shape == (B, *model.latent_shape)
    assert model.decode(latent).shape == toy.frame.shape
    assert model.decode(latent[:, 0]).shape == toy.frame[:, 0].shape
    initial = model.initial(B)
    assert all(leaf.shape[0] == B for leaf in trees.leaves(initial))
    state = model.start(toy.frame[:, :1])
    for frame in (None, toy.frame[:, 1]):
        step = model.step(state, toy.action[:, 0], frame)
        assert shapes(step.state) == shapes(state), "a step changes no shape and no dtype"
        assert step.reward.shape == step.cont.shape == (B,)
        assert step.reward.is_floating_point() and step.cont.is_floating_point()
        assert model.features(step.state).shape == (B, model.feature_size)
    assert shapes(model.advance(state, toy.action[:, 0])) == shapes(initial)
    seen = model.observe(toy.frame, toy.action)
    assert [leaf.shape[:2] for leaf in trees.leaves(seen)] == [(B, T)] * len(trees.leaves(seen))
    assert shapes(rows(seen, (slice(None), 0))) == shapes(state)
    assert model.features(rows(seen, 0)).shape == (T, model.feature_size)


def test_different_frames_have_different_latents(toy: Toy) -> None:
    latent = toy.model.encode(toy.frame).flatten(2)
    same = [(latent[b, t] == latent[0, 0]).all() for b in range(B) for t in range(T) if (b, t) != (0, 0)]
    assert sum(same) <= len(same) // 2  # otherwise every test here would say little


def test_pictures_rewards_and_continuations_are_in_range(toy: Toy) -> None:
    model = copy.deepcopy(toy.model)
    for parameter in model.parameters():
        parameter.mul_(5)
    state = model.start(torch.ones_like(toy.frame[:, :1]))
    for t in range(T):
        state, reward, cont = model.step(state, toy.action[:, t])
        picture = model.decode(state.latent)
        assert picture.min() >= 0 and picture.max() <= 1
        assert reward.isfinite().all() and cont.min() >= 0 and cont.max() <= 1


def test_verbs_leave_their_input_and_the_module_alone(toy: Toy) -> None:
    model, action, frame = toy.model, toy.action[:, 3].clone(), toy.frame.clone()
    state = toy.state()
    given = (state, action, frame, toy.action)
    before, attributes = copy.deepcopy(given), set(vars(model))
    weights = copy.deepcopy(model.state_dict())
    buffers = [buffer.clone() for buffer in model.buffers()]
    model.encode(frame)
    model.decode(state.latent)
    model.features(state)
    model.outcome(state)
    model.sample(state.memory, 0.5)
    model.advance(state, action)
    model.step(state, action)
    model.step(state, action, frame[:, 0])
    model.observe(frame, toy.action)
    model.start(frame, toy.action)
    model.reset_rows(state, torch.tensor([True, False] * (B // 2)))
    assert_close(given, before, rtol=0, atol=0)
    assert_close(model.state_dict(), weights, rtol=0, atol=0)
    assert_close(list(model.buffers()), buffers, rtol=0, atol=0)
    assert set(vars(model)) == attributes


def test_two_interleaved_dreams_do_not_meet(toy: Toy) -> None:
    model = toy.model
    first, second = model.start(toy.frame[:, :1]), toy.state()
    alone = follow(model, first, toy.action), follow(model, second, toy.action.flip(0))
    lived: tuple[list[Tensor], list[Tensor]] = ([], [])
    for t in range(T):
        first, *one = model.step(first, toy.action[:, t], temperature=0)
        second, *two = model.step(second, toy.action.flip(0)[:, t], temperature=0)
        lived[0].extend([first.latent, model.features(first), *one])
        lived[1].extend([second.latent, model.features(second), *two])
    assert_close((alone[0][5:], alone[1][5:]), lived, rtol=0, atol=0)


def test_the_same_seed_dreams_the_same(toy: Toy) -> None:
    dreams = []
    for seed in (3, 3):
        torch.manual_seed(seed)
        state, seen = toy.state(), []
        for t in range(T):
            state, *_ = toy.model.step(state, toy.action[:, t])
            seen.append(state.latent)
        dreams.append(seen)
    assert_close(dreams[0], dreams[1], rtol=0, atol=0)


def test_permuted_rows_give_permuted_results(toy: Toy) -> None:
    model, order = toy.model, torch.tensor([2, 0, 3, 1])
    state = toy.state()
    close(rows(state, order), model.start(toy.frame[order, :3], toy.action[order, :2]))
    close(rows(model.observe(toy.frame, toy.action), order), model.observe(toy.frame[order], toy.action[order]))
    dream = follow(model, state, toy.action)
    close([known[order] for known in dream], follow(model, rows(state, order), toy.action[order]))


def test_rows_can_be_picked_and_repeated(toy: Toy) -> None:
    state, pick = toy.state(), torch.tensor([1, 1, 1, 3, 0, 1])
    dream = follow(toy.model, state, toy.action)
    close([known[pick] for known in dream], follow(toy.model, rows(state, pick), toy.action[pick]))
    close([known[2:3] for known in dream], follow(toy.model, rows(state, slice(2, 3)), toy.action[2:3]))


def test_a_reset_row_has_seen_nothing_and_the_others_go_on(toy: Toy) -> None:
    model, mask = toy.model, torch.tensor([False, True, True, False])
    state = model.start(toy.frame[:, : T - 1], toy.action[:, : T - 2])
    reset = model.reset_rows(state, mask)
    assert_close(reset.latent, state.latent, rtol=0, atol=0)
    went_on = follow(model, state, toy.action)
    fresh = follow(model, State(state.latent, model.initial(B)), toy.action)
    after = follow(model, reset, toy.action)
    close([known[mask] for known in after], [known[mask] for known in fresh])
    close([known[~mask] for known in after], [known[~mask] for known in went_on])
    assert differ([known[mask] for known in fresh], [known[mask] for known in went_on]), "memory matters"


def test_a_step_with_a_frame_stands_in_that_frame(toy: Toy) -> None:
    model, state = toy.model, toy.state()
    step = model.step(state, toy.action[:, 2], toy.frame[:, 3])
    close(step.state.latent, model.encode(toy.frame[:, 3]))
    both = step.state.memory, model.step(state, toy.action[:, 2]).state.memory  # what awaited the frame
    close(*(model.recall(model.condense(memory)) for memory in both))
    close(step.state.memory, model.advance(state, toy.action[:, 2]))
    close((step.reward, step.cont), model.outcome(step.state))


def test_start_on_one_frame_is_a_reset_and_on_more_is_stepping(toy: Toy) -> None:
    model = toy.model
    state = model.start(toy.frame[:, :1])
    close(state, State(model.encode(toy.frame[:, 0]), model.initial(B)))
    close(model.start(toy.frame[:, :1], toy.action), state)
    for t in range(1, T):
        state = model.step(state, toy.action[:, t - 1], toy.frame[:, t]).state
    close(model.start(toy.frame, toy.action[:, :-1]), state)
    close(model.start(toy.frame, toy.action), state)
    with pytest.raises(ValueError, match="actions"):
        model.start(toy.frame)


def test_one_parallel_pass_equals_stepping(toy: Toy) -> None:
    model = toy.model
    seen = model.observe(toy.frame, toy.action)
    state = model.start(toy.frame[:, :1])
    for t in range(T):
        if t:
            state = model.step(state, toy.action[:, t - 1], toy.frame[:, t]).state
        close(follow(model, rows(seen, (slice(None), t)), toy.action), follow(model, state, toy.action))
    every = trees.map(lambda leaf: leaf.flatten(0, 1), seen)  # all moments side by side, as imagination takes them
    actions = toy.action[:, :3].repeat_interleave(T, 0)
    together = follow(model, every, actions)
    close([known[T - 1 :: T] for known in together], follow(model, state, toy.action[:, :3]))


def test_states_know_nothing_of_the_future(toy: Toy) -> None:
    model, now = toy.model, 4
    seen = model.observe(toy.frame, toy.action)
    frame, action = toy.frame.clone(), toy.action.clone()
    frame[:, now + 1 :] = 1 - frame[:, now + 1 :]
    action[:, now:] = action[:, now:].flip(0)
    other = model.observe(frame, action)
    for t in range(now + 1):
        at = (slice(None), t)
        close(follow(model, rows(seen, at), toy.action), follow(model, rows(other, at), toy.action))
    after = (slice(None), now + 1)
    assert not torch.allclose(model.features(rows(seen, after)), model.features(rows(other, after)))


def test_memory_keeps_frames_and_actions(toy: Toy) -> None:
    model = toy.model
    known = follow(model, toy.state(), toy.action[:, 3:5])
    frame, action = toy.frame.clone(), toy.action.clone()
    frame[:, 1] = 1 - frame[:, 1]
    assert differ(follow(model, model.start(frame[:, :3], toy.action[:, :2]), toy.action[:, 3:5]), known)
    action[:, 1] = (action[:, 1] + 1) % 4 if action.dim() == 2 else -action[:, 1]
    assert differ(follow(model, model.start(toy.frame[:, :3], action[:, :2]), toy.action[:, 3:5]), known)


def test_a_model_runs_where_its_weights_are_and_never_asks_the_host(toy: Toy) -> None:
    """On "meta" nothing has a value: a tensor made on another device, an `.item()` or a numpy call would raise."""
    model = copy.deepcopy(toy.model).to("meta")
    frame, action = toy.frame.to("meta"), toy.action.to("meta")
    state = model.start(frame, action)
    every = rows(model.observe(frame, action), (slice(None), -1))
    assert shapes(every) == shapes(state)
    state = trees.rows(every, torch.arange(B, device="meta"))
    state = model.reset_rows(state, torch.ones(B, dtype=torch.bool, device="meta"))
    step = model.step(state, action[:, 0], temperature=0.7)
    known = [*trees.leaves(step), model.decode(step.state.latent)]
    assert all(tensor.device.type == "meta" for tensor in known)


def test_saved_weights_dream_the_same(toy: Toy, request: pytest.FixtureRequest, tmp_path: object) -> None:
    variant: Variant = VARIANTS[request.node.callspec.params["toy"]]
    path = f"{tmp_path}/weights"
    torch.save(toy.model.state_dict(), path)
    other = replace(variant.config, seed=5).model.build(variant.spec)
    dreams = []
    for model in (toy.model, other):
        model.load_state_dict(torch.load(path, weights_only=True))
        torch.manual_seed(0)
        state, seen = model.start(toy.frame, toy.action), []
        for t in range(3):
            step = model.step(state, toy.action[:, t])
            state = step.state
            seen.append((step, model.decode(state.latent), model.features(state)))
        dreams.append(seen)
    assert_close(dreams[0], dreams[1], rtol=0, atol=0)


def test_bfloat16_changes_no_dtype_and_little_else(toy: Toy) -> None:
    model, action = toy.model, toy.action
    state = toy.state()
    exact = model.step(state, action[:, 2], toy.frame[:, 3])
    seen = model.observe(toy.frame, action)
    picture = model.decode(state.latent)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model.step(state, action[:, 2], toy.frame[:, 3])
        dreamed = model.step(mixed.state, action[:, 3])
        assert shapes(mixed) == shapes(exact) == shapes(dreamed)
        assert shapes(model.observe(toy.frame, action)) == shapes(seen)
        assert shapes(model.start(toy.frame, action)) == shapes(state)
        latent, shown = model.encode(toy.frame), model.decode(state.latent)
    assert shown.dtype == picture.dtype == torch.float32
    assert (shown - picture).abs().mean() < 0.01
    assert torch.isclose(latent, seen.latent, atol=0.1).float().mean() > 0.95  # a choice between equals may differ
    assert_close(mixed.state.memory, exact.state.memory, rtol=0.05, atol=0.05)
    assert_close((mixed.reward, mixed.cont), (exact.reward, exact.cont), rtol=0.1, atol=0.05)
