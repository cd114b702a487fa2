"""The linear controller, and many of them at once. Shapes: P candidates, R rows of each, F features, A action size."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from envs.spec import Spec
from policies.linear import Linear, Population

DISCRETE, CONTINUOUS = Spec((3, 64, 64), 4, True), Spec((3, 64, 64), 3, False)
BOTH = pytest.mark.parametrize("spec", [DISCRETE, CONTINUOUS], ids=["discrete", "continuous"])


def made(spec: Spec, features: int = 5, noise: float = 0.1) -> Linear:
    policy = Linear(features, spec, noise)
    policy.load_flat(torch.randn(policy.size, generator=torch.Generator().manual_seed(0)))
    return policy


def views(rows: int, features: int = 5) -> torch.Tensor:
    return torch.randn(rows, features, generator=torch.Generator().manual_seed(1))


def test_the_papers_controller_has_867_numbers_and_no_gradient() -> None:
    policy = Linear(32 + 256, CONTINUOUS)
    assert policy.size == sum(p.numel() for p in policy.parameters()) == len(policy.flat()) == 867
    assert not any(p.requires_grad for p in policy.parameters())


def test_actions_are_what_the_formula_says() -> None:
    policy = Linear(2, Spec((1, 1, 1), 2, False))
    policy.load_flat(torch.tensor([1.0, 2.0, 0.5, -1.0, 0.25, -0.5]))  # W row by row, then b
    view = torch.tensor([[0.1, 0.2], [-1.0, 3.0]])
    expected = torch.tensor([[0.5 + 0.25, -0.15 - 0.5], [5.25, -3.5 - 0.5]]).tanh()
    assert_close(policy.act(view, greedy=True)[0], expected)
    assert policy.probabilities(view) is None
    choice = Linear(2, Spec((1, 1, 1), 2, True))
    choice.load_flat(policy.flat())
    actions = choice.act(torch.tensor([[0.1, 0.2], [-1.0, -3.0]]), greedy=True)[0]
    assert actions.dtype == torch.int64 and actions.tolist() == [0, 1]
    shown = choice.probabilities(view)
    assert shown is not None
    assert_close(shown[0], torch.tensor([0.75, -0.65]).softmax(0))


@BOTH
def test_flat_is_the_inverse_of_load_flat(spec: Spec) -> None:
    policy, vector = made(spec), torch.arange(float(spec.action_size * 6))
    policy.load_flat(vector)
    assert torch.equal(policy.flat(), vector)
    with pytest.raises(ValueError, match=f"{policy.size} numbers"):
        policy.load_flat(vector[1:])


def test_exploration_is_as_wide_as_the_noise() -> None:
    policy = made(CONTINUOUS, noise=0.05)
    policy.load_flat(0.2 * policy.flat())  # away from the edges, where clamping narrows the noise
    torch.manual_seed(0)
    view = views(1).expand(20_000, -1)
    strayed = policy.act(view)[0] - policy.act(view, greedy=True)[0]
    assert_close(strayed.std(0), torch.full((3,), 0.05), rtol=0.03, atol=0)
    assert_close(strayed.mean(0), torch.zeros(3), rtol=0, atol=0.002)
    wide = made(CONTINUOUS, noise=3.0).act(view)[0]
    assert wide.min() == -1 and wide.max() == 1


def test_discrete_exploration_takes_every_action_equally_often() -> None:
    policy = made(DISCRETE, noise=0.4)
    torch.manual_seed(0)
    view = views(1).expand(20_000, -1)
    best = int(policy.act(view[:1], greedy=True)[0])
    shares = policy.act(view)[0].bincount(minlength=4) / 20_000
    expected = torch.full((4,), 0.1)
    expected[best] += 0.6
    assert_close(shares, expected, rtol=0, atol=0.015)


@BOTH
@pytest.mark.parametrize("rollouts", [1, 3])
def test_a_population_acts_as_each_candidate_would(spec: Spec, rollouts: int) -> None:
    single, view = made(spec), views(4 * rollouts)
    vectors = torch.randn(4, single.size, generator=torch.Generator().manual_seed(2))
    population = Population(single, vectors)
    assert population.population_size == 4 and single.population_size == 1
    together, memory = population.act(view)
    assert memory == ()
    for candidate in range(4):
        single.load_flat(vectors[candidate])
        rows = slice(candidate * rollouts, (candidate + 1) * rollouts)
        assert_close(together[rows], single.act(view[rows], greedy=True)[0])


def test_one_candidate_is_replaced_and_no_other() -> None:
    single, view = made(CONTINUOUS), views(4)
    vectors = torch.randn(4, single.size, generator=torch.Generator().manual_seed(2))
    population = Population(single, vectors)
    before, given = population.act(view)[0], vectors.clone()
    population.replace(2, single.flat())
    after = population.act(view)[0]
    assert torch.equal(after[[0, 1, 3]], before[[0, 1, 3]])
    assert_close(after[2], single.act(view[2:3], greedy=True)[0][0])
    assert not torch.equal(after[2], before[2])
    assert torch.equal(vectors, given)  # the population has numbers of its own
    with pytest.raises(ValueError, match="cannot share 5 rows"):
        population.act(views(5))
    with pytest.raises(ValueError, match="cannot be made of 17"):
        Population(single, vectors[:, 1:])


@BOTH
def test_mixed_precision_changes_no_decision(spec: Spec) -> None:
    single, view = made(spec), views(64)
    population = Population(single, single.flat().expand(4, -1))
    expected = single.act(view, greedy=True)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(single.act(view, greedy=True)[0], expected)
        assert_close(population.act(view)[0], expected)
