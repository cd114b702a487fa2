"""Output distributions against hand computations and torch.distributions.

Shapes: G variables of K classes.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, OneHotCategorical, kl_divergence
from torch.testing import assert_close

from world_model.parts.heads import Categoricals, Mean, SignedReward, TwoHot, draw, symexp, symlog

VALUES = [0.0, 1.0, -1.0, 0.3, -0.02, 7.5, -21.0, 500.0, 1e6, -1e6, 1e-6]


def test_symlog_and_symexp_are_inverse_and_known() -> None:
    x = torch.tensor(VALUES)
    assert_close(symexp(symlog(x)), x, rtol=1e-5, atol=1e-6)
    assert_close(symlog(x), torch.tensor([math.copysign(math.log(1 + abs(v)), v) for v in VALUES]))
    assert_close(symexp(torch.tensor([2.0, -2.0])), torch.tensor([math.e**2 - 1, 1 - math.e**2]))
    assert_close(symlog(torch.tensor([-1e-6, 1e-6])), torch.tensor([-1e-6, 1e-6]), rtol=1e-3, atol=0)  # slope 1 at 0


def by_hand(value: float, count: int, bound: float, mean: str = "symlog") -> list[float]:
    """Two-hot weights with plain floats: walk along the bins and share between the two neighbours."""
    bins = [-bound + 2 * bound * i / (count - 1) for i in range(count)]
    x = min(max(math.copysign(math.log(1 + abs(value)), value), -bound), bound)
    weights = [0.0] * count
    for i in range(count - 1):
        if bins[i] <= x <= bins[i + 1]:
            low, high = bins[i : i + 2]
            if mean == "symexp":
                low, high, x = (math.copysign(math.expm1(abs(b)), b) for b in (low, high, x))
            share = (x - low) / (high - low)
            weights[i], weights[i + 1] = 1 - share, share
            break
    return weights


@pytest.mark.parametrize("mean", ["symlog", "symexp"])
@pytest.mark.parametrize(("count", "bound"), [(255, 20.0), (5, 2.0), (41, 4.0)])
def test_two_hot_is_the_hand_computation(count: int, bound: float, mean: Mean) -> None:
    twohot = TwoHot(count, bound, mean)
    weights = twohot.encode(torch.tensor(VALUES))
    assert_close(weights, torch.tensor([by_hand(v, count, bound, mean) for v in VALUES]), rtol=0, atol=2e-4)
    assert_close(weights.sum(-1), torch.ones(len(VALUES)))
    assert ((weights > 0).sum(-1) <= 2).all() and (weights >= 0).all()


def test_two_hot_is_exact_at_the_centres_of_bins() -> None:
    twohot = TwoHot(5, 2.0)
    assert twohot.bins.tolist() == [-2, -1, 0, 1, 2]
    weights = twohot.encode(symexp(twohot.bins))
    assert_close(weights, torch.eye(5), rtol=0, atol=1e-6)
    beyond = twohot.encode(torch.tensor([1e9, -1e9, float("inf")]))
    assert_close(beyond, torch.eye(5)[[4, 0, 4]])


@pytest.mark.parametrize("mean", ["symlog", "symexp"])
def test_two_hot_mean_of_a_target_is_the_target(mean: Mean) -> None:
    twohot = TwoHot(mean=mean)
    value = symexp(torch.linspace(-19.9, 19.9, 301))
    if twohot.symexp:
        twohot.note(value)
    told = twohot.mean(twohot.encode(value).log())
    assert_close(symlog(told), symlog(value), rtol=1e-5, atol=1e-5)
    assert_close(twohot.mean(torch.zeros(255)), torch.tensor(0.0), rtol=0, atol=1e-4)  # an untrained head says nothing
    assert_close(told.view(7, 43), twohot.mean(twohot.encode(value.view(7, 43)).log()))


def test_two_hot_mean_of_what_comes_half_of_the_time() -> None:
    for mean, least, most in (("symlog", 8.0, 10.0), ("symexp", 49.99, 50.01)):
        twohot, value = TwoHot(mean=mean), torch.tensor([0.0, 100.0])  # type: ignore[arg-type]
        if twohot.symexp:
            twohot.note(value)
        half = (0.5 * twohot.encode(value[:1]) + 0.5 * twohot.encode(value[1:])).log()
        assert least < float(twohot.mean(half)) < most


def test_two_hot_bins_beyond_all_targets_say_nothing() -> None:
    twohot = TwoHot(mean="symexp")
    logits = torch.full((255,), -12.0)  # each a hundred-thousandth, of which the far ones would make thousands
    logits[127], logits[-60:] = 0.0, -10.0
    twohot.note(torch.tensor([0.0, -20.0]))
    assert abs(float(twohot.mean(logits))) < 0.1
    twohot.note(torch.tensor([float("inf"), float("nan")]))
    assert twohot.reach == symlog(torch.tensor(20.0)), "a target that is no number is nothing to reach for"
    twohot.note(torch.tensor([1e6]))
    assert float(twohot.mean(logits)) > 10


def test_two_hot_loss_is_the_cross_entropy_and_teaches_the_value() -> None:
    twohot, value = TwoHot(5, 2.0), torch.tensor([0.0, 1.0])
    logits = torch.tensor([[0.1, -0.3, 0.7, 0.2, 0.0], [1.0, 0.0, 0.0, 2.0, -1.0]], requires_grad=True)
    expected = [-sum(w * p for w, p in zip(by_hand(float(v), 5, 2.0), row.log_softmax(-1), strict=True))
                for v, row in zip(value, logits, strict=True)]  # fmt: skip
    loss = twohot.loss(logits, value)
    assert_close(loss, torch.stack(expected))
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert_close(gradient, logits.softmax(-1) - twohot.encode(value))  # it rests where the prediction is the target


def test_two_hot_says_not_a_number_instead_of_crashing() -> None:
    """So that the trainer can name the term; an index out of bounds would be a bare traceback, on a GPU a dead one."""
    loss = TwoHot().loss(torch.zeros(2, 255), torch.tensor([float("nan"), 1.0]))
    assert loss[0].isnan() and loss[1].isfinite()


@pytest.mark.parametrize("count", [0, 1, 4, 254])
def test_two_hot_needs_a_middle_bin(count: int) -> None:
    with pytest.raises(ValueError, match="odd number"):
        TwoHot(count)


def raw(groups: int = 3, classes: int = 4, rows: int = 5) -> Tensor:
    return 2 * torch.randn(rows, groups * classes, generator=torch.Generator().manual_seed(0))


def test_unimix_keeps_every_class_possible() -> None:
    latents = Categoricals(3, 4, unimix=0.2)
    probabilities = latents.log_probs(50 * raw()).exp()
    assert probabilities.shape == (5, 3, 4)
    assert_close(probabilities.sum(-1), torch.ones(5, 3))
    assert_close(probabilities.min(), torch.tensor(0.2 / 4))
    assert_close(probabilities.max(), torch.tensor(0.8 + 0.2 / 4))
    sure = Categoricals(3, 4, unimix=0.0)
    assert_close(sure.log_probs(raw()), raw().view(5, 3, 4).log_softmax(-1))
    sharp = sure.log_probs(500 * raw())
    assert sure.entropy(sharp).isfinite().all() and sure.kl(sharp, sharp.flip(-1)).isfinite().all()


def test_kl_and_entropy_are_those_of_torch() -> None:
    latents = Categoricals(3, 4)
    p, q = latents.log_probs(raw()), latents.log_probs(raw().flip(0))
    first, second = (Independent(OneHotCategorical(logits=logits), 1) for logits in (p, q))
    assert_close(latents.kl(p, q), kl_divergence(first, second))
    assert_close(latents.kl(q, p), kl_divergence(second, first))
    assert not torch.allclose(latents.kl(p, q), latents.kl(q, p))
    assert_close(latents.entropy(p), first.entropy())
    assert_close(latents.kl(p, p), torch.zeros(5))


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_samples_are_as_frequent_as_they_are_likely(temperature: float) -> None:
    torch.manual_seed(0)
    latents = Categoricals(2, 5)
    log_probs = latents.log_probs(raw(2, 5, 1))
    drawn = latents.sample(log_probs.expand(40_000, 2, 5), temperature)
    assert drawn.shape == (40_000, 2, 5) and drawn.dtype == log_probs.dtype
    assert ((drawn == 0) | (drawn == 1)).all() and (drawn.sum(-1) == 1).all()
    expected = (log_probs[0] / temperature).softmax(-1)
    assert_close(drawn.mean(0), expected, rtol=0, atol=0.012)  # five standard deviations of the worst class
    both = (drawn[:, 0, 0] * drawn[:, 1, 0]).mean()
    assert_close(both, expected[0, 0] * expected[1, 0], rtol=0, atol=0.012)  # variables are independent
    again = latents.sample(log_probs.expand(40_000, 2, 5), temperature)
    assert not torch.equal(drawn, again)


def test_temperature_zero_is_the_mode() -> None:
    latents = Categoricals(3, 4)
    log_probs = latents.log_probs(raw())
    mode = latents.mode(log_probs)
    assert torch.equal(mode.argmax(-1), log_probs.argmax(-1)) and torch.equal(mode.sum(-1), torch.ones(5, 3))
    assert torch.equal(latents.sample(log_probs, 0.0), mode)
    assert torch.equal(latents.sample(log_probs, 1e-4), mode)


def test_gradients_pass_straight_through_a_sample() -> None:
    torch.manual_seed(0)
    latents, weight = Categoricals(3, 4), torch.randn(5, 3, 4)
    network = raw().requires_grad_()
    log_probs = latents.log_probs(network)
    sample = latents.sample(log_probs)
    assert ((sample == 0) | (sample == 1)).all(), "the value is the draw itself"
    (through,) = torch.autograd.grad((sample * weight).sum(), network, retain_graph=True)
    (expected,) = torch.autograd.grad((log_probs.exp() * weight).sum(), network)
    assert_close(through, expected)
    assert expected.abs().sum() > 0


def test_draw_is_categorical_and_never_out_of_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    probabilities = torch.tensor([0.0, 0.1, 0.6, 0.3, 0.0])
    index = draw(probabilities.log().expand(20_000, 5))
    assert index.dtype == torch.int64
    counts = torch.bincount(index, minlength=5) / 20_000
    assert_close(counts, Categorical(probabilities).probs, rtol=0, atol=0.02)
    assert counts[0] == counts[4] == 0
    thirds = torch.full((1000, 7), -math.log(7)) - torch.linspace(-1e-6, 1e-6, 1000).unsqueeze(-1)  # sums off by a hair
    for uniform in (0.0, 1 - 2**-24):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "rand", lambda shape, value=uniform, **_: torch.full(shape, value))
            assert set(draw(thirds).tolist()) == {0 if uniform == 0 else 6}


# ---- signs, and what they are worth ----
def test_a_reward_by_its_sign_is_told_in_the_game_s_units() -> None:
    head, logits = SignedReward(), torch.tensor([0.1, 0.3, 0.6]).log()
    assert_close(head.mean(logits), torch.tensor(0.5))  # 1 and 1 until something was seen
    head.note(torch.zeros(100))
    assert_close(head.mean(logits), torch.tensor(0.5))
    head.note(torch.tensor([5.0, 0.0, -20.0, 0.0]))
    assert_close((head.mean(logits), head.sign(logits)), (torch.tensor(-20 * 0.1 + 5 * 0.6), torch.tensor(0.5)))
    head.note(torch.tensor([2.0, 2.0]))
    assert_close(head.worth, torch.tensor([-20.0, 0.0, 3.0]))  # the plain mean of the few that were seen
    assert head.target(torch.tensor([-20.0, 0.0, 0.1])).tolist() == [0, 1, 2]


def test_rewards_of_size_1_leave_it_exactly_as_it_was() -> None:
    head = SignedReward()
    for seed in range(50):
        head.note(torch.randint(-1, 2, (97,), generator=torch.Generator().manual_seed(seed)).float())
    assert torch.equal(head.worth, SignedReward().worth)


def test_what_a_sign_is_worth_follows_an_agent_that_meets_larger_rewards() -> None:
    head = SignedReward()
    for reward in (1.0, 9.0):
        for _ in range(10):
            head.note(torch.full((SignedReward.RECENT,), reward))  # as many at once as are remembered
        assert head.worth.tolist() == [-1, 0, reward]
    head.note(torch.full((SignedReward.RECENT // 10,), 19.0))
    assert_close(head.worth[2], torch.tensor(10.0))


def test_a_checkpoint_from_before_loads_with_signs_worth_1() -> None:
    head, part = SignedReward(), torch.nn.Module()
    part.reward = head
    assert not any(part.load_state_dict({}))
    assert head.worth.tolist() == [-1, 0, 1]
    head.note(torch.tensor([4.0]))
    again = SignedReward()
    again.load_state_dict(head.state_dict())
    assert torch.equal(again.worth, head.worth) and torch.equal(again.seen, head.seen)
