"""CMA-ES: what a candidate is worth, that the mean gets better, and that it goes on bit by bit after a stop.

Shapes: P candidates, R rollouts of each, H horizon.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from envs.spec import Spec
from policies import cma_es
from policies.cma_es import Evolution, EvolutionConfig, needed_memory, total_rewards
from policies.interface import Policy, Trajectory
from policies.linear import Population
from world_model.interface import Objective

CONTINUOUS, DISCRETE = Spec((1, 1, 1), 1, False), Spec((1, 1, 1), 3, True)
CONFIG = EvolutionConfig(population=8, rollouts=2, horizon=12, sigma=0.5)


def learner(features: int = 3, spec: Spec = CONTINUOUS, **changes: Any) -> Evolution:
    torch.manual_seed(0)
    return replace(CONFIG, **changes).build(features, spec)


def no_update(objective: Objective, data: Any) -> None:
    raise AssertionError("evolution has no gradients")


def vectors(policy: Policy) -> Tensor:
    """The candidates of a population, (P, n)."""
    assert isinstance(policy, Population)
    return torch.cat([policy.weight.flatten(1), policy.bias], 1)


def played(reward: Tensor, cont: Tensor | None = None) -> Trajectory:
    """Rewards (B, H) without anything seen."""
    return Trajectory(
        torch.zeros(len(reward), 0), torch.zeros(0), reward, torch.ones_like(reward) if cont is None else cont
    )


def bowl(policy: Policy, asked: list[Tensor] | None = None) -> Trajectory:
    """Worth most at a known vector; both rollouts of a candidate are equal. `asked` receives the candidates."""
    found = vectors(policy)
    if asked is not None:
        asked.append(found)
    loss = (found - torch.linspace(-1, 1, found.shape[1])).square().sum(1)
    return played(-loss.repeat_interleave(2).unsqueeze(1))


def steer(policy: Policy, starts: Tensor, horizon: int = 12) -> Trajectory:
    """A point that is pushed left or right should come to 0; every candidate begins from the same starts (R, 2)."""
    state = starts.repeat(policy.population_size, 1)  # place and speed
    rewards = []
    for _ in range(horizon):
        action, _ = policy.act(torch.cat([state, state.square()], 1), greedy=True)
        push = action.squeeze(1) if action.is_floating_point() else action.float() - 1
        speed = 0.8 * state[:, 1] + 0.3 * push
        state = torch.stack([state[:, 0] + speed, speed], 1)
        rewards.append(-state[:, 0].square())
    return played(torch.stack(rewards, 1))


def test_an_ending_cuts_off_what_follows() -> None:
    reward = torch.tensor([[1.0, 2.0, 4.0], [1.0, 1.0, 1.0]])
    cont = torch.tensor([[1.0, 0.0, 1.0], [0.5, 0.5, 0.0]])
    assert_close(total_rewards(played(reward, cont)), torch.tensor([3.0, 1.75]).double())


def test_fitness_is_the_mean_return_of_a_candidates_rows_less_the_decay() -> None:
    made, seen = learner(decay=0.3, rollouts=5), []
    reward, cont = torch.randn(8 * 5, 4), torch.rand(8 * 5, 4)

    def rollout(policy: Policy) -> Trajectory:
        seen.append(vectors(policy))
        return played(reward, cont)

    metrics = made.improve(rollout, no_update)
    fitness = []
    for candidate in range(8):
        returns = []
        for row in range(candidate * 5, candidate * 5 + 5):
            total, alive = 0.0, 1.0
            for t in range(4):
                total += alive * float(reward[row, t])
                alive *= float(cont[row, t])
            returns.append(total)
        fitness.append(np.mean(returns) - 0.3 * float((seen[0][candidate] ** 2).mean()))
    expected = {"fitness": np.mean(fitness), "fitness_best": max(fitness), "fitness_std": np.std(fitness)}
    for name, value in expected.items():
        assert float(metrics[name]) == pytest.approx(value, abs=1e-5), name
    assert metrics["generation"] == 1 and 0.3 < metrics["sigma"] < 0.8
    assert all(metric.shape == () and not metric.requires_grad for metric in metrics.values())
    assert made.objectives() == ()


@pytest.mark.parametrize("diagonal", [False, True])
def test_a_known_optimum_is_found(diagonal: bool) -> None:
    made = learner(diagonal=diagonal, decay=0.0)
    history = [float(made.improve(bowl, no_update)["fitness"]) for _ in range(60)]
    assert history[-1] > -1e-2 > -1 > history[0]
    assert_close(made.policy.flat(), torch.linspace(-1, 1, 4), rtol=0, atol=0.1)


def test_decay_keeps_weights_small() -> None:
    free, bound = learner(decay=0.0), learner(decay=4.0)  # of 4 numbers: each then costs its square, as its error does
    for made in (free, bound):
        for _ in range(60):
            made.improve(bowl, no_update)
    assert_close(bound.policy.flat(), free.policy.flat() / 2, rtol=0, atol=0.1)


@pytest.mark.parametrize("spec", [CONTINUOUS, DISCRETE], ids=["continuous", "discrete"])
def test_a_point_is_steered_home(spec: Spec) -> None:
    made, starts = learner(4, spec, population=16, rollouts=8), torch.randn(8, 2)
    before = float(total_rewards(steer(made.policy, starts)).mean())
    metrics = [made.improve(lambda policy: steer(policy, starts), no_update) for _ in range(40)]
    after = float(total_rewards(steer(made.policy, starts)).mean())
    assert after > 0.25 * before, "three quarters of the cost are gone"  # both are below 0
    assert metrics[-1]["fitness"] > metrics[20]["fitness"] > metrics[0]["fitness"]


def test_candidates_share_their_starts() -> None:
    """Equal controllers are worth the same, whatever the starts: rows are candidate by candidate."""
    made, starts = learner(4), torch.randn(2, 2)
    same = Population(made.policy, torch.randn(made.policy.size).expand(8, -1))
    returns = total_rewards(steer(same, starts)).view(8, 2)
    assert_close(returns, returns[:1].expand(8, -1))
    assert returns[0, 0] != returns[0, 1]
    assert CONFIG.starts == CONFIG.rollouts == 2


def noisy(policy: Policy) -> Trajectory:
    """As a dream is: drawn from the default generator."""
    return bowl(policy)._replace(cont=torch.rand(16, 1), reward=bowl(policy).reward + torch.randn(16, 1))


@pytest.mark.parametrize("done", [0, 1, 7])
@pytest.mark.parametrize("diagonal", [False, True])
def test_it_goes_on_bit_by_bit(done: int, diagonal: bool) -> None:
    made = learner(diagonal=diagonal)
    made.begin_phase("dream")
    for _ in range(done):
        made.improve(noisy, no_update)
    file = io.BytesIO()
    torch.save({"learner": made.state_dict(), "rng": torch.get_rng_state()}, file)
    file.seek(0)
    straight = [made.improve(noisy, no_update) for _ in range(5)]

    saved = torch.load(file, weights_only=True)
    again = replace(CONFIG, diagonal=diagonal).build(3, CONTINUOUS)
    again.load_state_dict(saved["learner"])
    torch.set_rng_state(saved["rng"])
    assert again.where == "dream" and again.generation == done
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed = [again.improve(noisy, no_update) for _ in range(5)]
    assert torch.equal(again.policy.flat(), made.policy.flat())
    assert resumed == straight


def test_one_that_never_began_can_be_saved_and_loaded() -> None:
    made, other = learner(), learner()
    other.load_state_dict(made.state_dict())
    torch.manual_seed(1)
    expected = made.improve(bowl, no_update)
    torch.manual_seed(1)
    assert other.improve(bowl, no_update) == expected


def test_what_cannot_be_rebuilt_begins_anew_around_its_mean_and_says_so() -> None:
    made = learner()
    for _ in range(5):
        made.improve(bowl, no_update)
    state = made.state_dict()
    state["_extra_state"]["fitness"] = -state["_extra_state"]["fitness"]
    other, centre, asked = learner(), made.policy.flat(), list[Tensor]()
    other.load_state_dict(state)
    with pytest.warns(UserWarning, match="begins anew"):
        other.improve(lambda policy: bowl(policy, asked), no_update)
    assert other.generation == 1 and other.where == "dream"
    around = asked[0].view(-1, len(centre)).mean(0)
    assert torch.dist(around, centre) < 0.5 * torch.dist(around, torch.zeros_like(centre)), "not around zero"


def test_a_rollout_that_fails_is_tried_again_with_the_same_candidates() -> None:
    made, undisturbed, seen = learner(), learner(), list[Tensor]()
    for one in (made, undisturbed):
        torch.manual_seed(1)
        one.begin_phase("dream")

    def fails(policy: Policy) -> Trajectory:
        seen.append(vectors(policy))
        raise OSError("a machine went away")

    with pytest.raises(OSError, match="went away"):
        made.improve(fails, no_update)
    assert made.generation == 0
    assert made.improve(lambda policy: bowl(policy, seen), no_update) == undisturbed.improve(bowl, no_update)
    assert torch.equal(seen[0], seen[1])
    assert made.improve(bowl, no_update) == undisturbed.improve(bowl, no_update)


def test_a_return_that_is_no_number_is_an_error() -> None:
    with pytest.raises(ArithmeticError, match="not a number"):
        learner().improve(lambda policy: played(torch.full((16, 1), torch.nan)), no_update)


def test_candidates_of_equal_worth_do_no_harm() -> None:
    made = learner()
    for _ in range(10):
        metrics = made.improve(lambda policy: played(torch.zeros(16, 1)), no_update)
    assert made.policy.flat().isfinite().all() and metrics["sigma"].isfinite()


def test_a_phase_begins_around_the_mean_with_the_first_sigma_and_other_candidates() -> None:
    made, asked = learner(restart=False), list[Tensor]()
    for _ in range(30):
        metrics = made.improve(lambda policy: bowl(policy, asked), no_update)
    assert metrics["sigma"] < 0.3
    centre = made.policy.flat()
    made.begin_phase("real")
    assert made.where == "real" and made.generation == 0
    assert torch.equal(made.policy.flat(), centre)
    made.improve(lambda policy: bowl(policy, asked), no_update)
    assert 0.2 < (asked[-1] - centre).std() < 1.0
    assert not torch.allclose(asked[-1] - centre, asked[0], atol=1e-3)


def test_only_its_own_random_numbers_are_used() -> None:
    made = learner()
    made.begin_phase("dream")
    numpys, torchs = np.random.get_state(), torch.get_rng_state()
    for _ in range(3):
        made.improve(bowl, no_update)
    assert str(np.random.get_state()) == str(numpys)
    assert torch.equal(torch.get_rng_state(), torchs)


def test_the_runs_seed_decides() -> None:
    def first(seed: int) -> Tensor:
        made = learner()
        torch.manual_seed(seed)
        made.improve(bowl, no_update)
        return made.policy.flat()

    assert torch.equal(first(1), first(1)) and not torch.equal(first(1), first(2))


@pytest.mark.parametrize(
    ("changes", "early", "last"),
    [
        ({"where": "dream", "generations": 7}, (("dream", 7),), (("dream", 7),)),
        ({"where": "real", "real_generations": 5}, (("real", 5),), (("real", 5),)),
        ({"where": "both", "generations": 7}, (("dream", 7),), (("dream", 7),)),
        ({"generations": 7, "real_generations": 5}, (("dream", 7),), (("dream", 7), ("real", 5))),
    ],
)
def test_plan(changes: dict[str, Any], early: Any, last: Any) -> None:
    made = learner(**changes)
    assert made.plan(last=False) == early and made.plan(last=True) == last


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"where": "dreams"}, 'policy.where must be one of dream, real, both, not "dreams". Did you mean dream?'),
        ({"population": 3}, "population must be at least 4, not 3"),
        ({"rollouts": 0}, "rollouts must be at least 1"),
        ({"generations": 0}, "generations must be at least 1"),
        ({"where": "real"}, "real_generations must be at least 1"),
        ({"sigma": 0.0}, "sigma must be above 0"),
        ({"decay": -0.1}, "decay must be between 0 and"),
        ({"noise": float("nan")}, "noise must be between 0 and 10, not nan"),
        ({"population": 10**8}, "100000000 candidates of 4 numbers .* GB are free; choose a smaller"),
    ],
)
def test_numbers_that_make_no_evolution_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        learner(**changes)


def test_a_matrix_too_large_is_refused_and_its_diagonal_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cma_es, "_free_memory", lambda: 8 * 10**9)
    with pytest.raises(ValueError, match="policy.diagonal=true"):
        EvolutionConfig().build(20_000, CONTINUOUS)
    assert EvolutionConfig(diagonal=True).build(20_000, CONTINUOUS).policy.size == 20_001
    monkeypatch.undo()
    free = cma_es._free_memory()
    assert free is None or free > 10**8
    assert needed_memory(EvolutionConfig(), 288, 867) < 10**8  # the paper's run fits anywhere
