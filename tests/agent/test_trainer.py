"""The one trainer: what it refuses, what it reports, how it goes on after a stop, and its precision."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from agent.precision import for_inference, lstm_in_bf16, mixed_precision
from agent.trainer import NonFiniteLoss, Trainer, masked, reduce
from world_model.interface import Batch, Losses, Objective, Optim, Term

CPU = torch.device("cpu")


class Toy:
    """A linear map that learns to be zero, with two loss terms."""

    def __init__(self, **optim: Any) -> None:
        torch.manual_seed(0)
        self.net = nn.Linear(4, 3)
        self.precisions: list[torch.dtype] = []
        scales = {"square": 1.0, "size": 0.5}
        self.objective = Objective("toy", tuple(self.net.parameters()), self.loss, scales, Optim(**optim))
        self.bad: dict[str, float] = {}

    def loss(self, x: Tensor) -> Losses:
        y = self.net(x)
        self.precisions.append(y.dtype)
        terms = {"square": y.float().square().mean(-1), "size": y.float().abs().mean(-1)}
        for name, value in self.bad.items():
            terms[name] = terms[name] * value
        return Losses({name: Term(term) for name, term in terms.items()}, {"offset": y.detach().float().mean()})

    def total(self, losses: Losses) -> Tensor:
        return reduce({name: term.value for name, term in losses.terms.items()}, self.objective.scales)

    def trainer(self, **options: Any) -> Trainer:
        return Trainer([self.objective], device=CPU, **{"precision": "fp32", **options})

    def weights(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.net.parameters()]


def data(count: int, seed: int = 0) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 5, 4, generator=rng) for _ in range(count)]


def test_a_mask_counts_for_all_that_stands_behind_it() -> None:
    """The denominator is the number of all numbers, those that are masked included."""
    valid = torch.tensor([[True, True, False]])
    zeros = torch.zeros(1, 3)
    batch = Batch(zeros, zeros, zeros, zeros, zeros, valid)
    term = masked(Term(torch.ones(1, 3, 4), "valid"), batch)
    assert term.shape == (1, 3, 4) and term.mean() == pytest.approx(2 / 3) and not term[:, 2].any()
    assert masked(Term(torch.ones(2, 2)), None).mean() == 1
    with pytest.raises(KeyError, match="somewhere"):
        masked(Term(torch.ones(1, 3), "somewhere"), batch)


def test_reduce_is_the_sum_of_scaled_means() -> None:
    terms = {"a": torch.tensor([[1.0, 3.0]]), "b": torch.tensor([[10.0, 0.0], [0.0, 0.0]])}
    assert_close(reduce(terms, {"a": 2.0, "b": 0.1}), torch.tensor(4.25))
    assert reduce({"a": torch.ones(2, 2, dtype=torch.bfloat16)}, {"a": 1.0}).dtype == torch.float32


@pytest.mark.parametrize("scales", [{"a": 1.0}, {"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 1.0, "c": 1.0}, {}])
def test_reduce_drops_nothing_silently(scales: dict[str, float]) -> None:
    terms = {"a": torch.ones(1, 1), "b": torch.ones(1, 1)}
    with pytest.raises(ValueError, match="differ"):
        reduce(terms, scales)


@pytest.mark.parametrize(("bad", "value"), [("size", math.nan), ("square", math.inf)])
def test_a_loss_that_is_not_finite_is_named(bad: str, value: float) -> None:
    toy = Toy()
    trainer, (x, *_) = toy.trainer(), data(1)
    trainer.update(toy.objective, x)
    trainer.check()
    toy.bad = {bad: value}
    trainer.update(toy.objective, x)
    toy.bad = {}
    for ask in (trainer.check, trainer.report, trainer.check):  # it is not forgotten by having been told once
        with pytest.raises(NonFiniteLoss, match=f"toy/{bad} became {value}"):
            ask()


def test_a_gradient_that_is_not_finite_is_named_too() -> None:
    toy = Toy()
    trainer = toy.trainer()
    root = Objective("toy", toy.objective.params, lambda x: Losses({"root": Term(toy.net(x).abs().mul(0).sqrt())}, {}),
                     {"root": 1.0})  # fmt: skip
    trainer.update(root, data(1)[0])  # the loss is 0, its slope is not a number
    with pytest.raises(NonFiniteLoss, match="toy/grad_norm"):
        trainer.check()


def test_a_report_averages_since_the_last_one() -> None:
    toy = Toy(lr=0.0)
    trainer, batches = toy.trainer(), data(3)
    assert trainer.report() == {}
    means = []
    for x in batches:
        losses = trainer.update(toy.objective, x)
        means.append({name: term.value.mean().item() for name, term in losses.terms.items()})
    trainer.note({"policy/return": torch.tensor(4.0)})
    trainer.note({"policy/return": torch.tensor(1.0)})
    report = trainer.report()
    assert report.keys() == {"toy/square", "toy/size", "toy/offset", "toy/grad_norm", "policy/return"}
    for name in ("square", "size"):
        assert report[f"toy/{name}"] == pytest.approx(sum(mean[name] for mean in means) / 3)
    assert report["policy/return"] == 2.5
    assert trainer.report() == {}
    trainer.update(toy.objective, batches[0])
    assert trainer.report()["toy/square"] == pytest.approx(means[0]["square"])


def test_an_update_goes_downhill_and_only_on_its_own_parameters() -> None:
    toy, other = Toy(lr=0.01, warmup=0), nn.Linear(2, 2)
    stranger = Objective("other", tuple(other.parameters()), toy.loss, {})
    trainer = Trainer([toy.objective, stranger], device=CPU, precision="fp32")
    before, (x, *_) = [p.detach().clone() for p in other.parameters()], data(1)
    losses = [toy.total(trainer.update(toy.objective, x)).item() for _ in range(50)]
    assert losses[-1] < 0.3 * losses[0]
    assert_close(list(other.parameters()), before, rtol=0, atol=0)
    assert trainer.updates == {"toy": 50, "other": 0}


class _Spy(torch.autograd.Function):
    """Notes whether autocast is on while gradients flow."""

    seen: list[bool] = []

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        _Spy.seen.append(torch.is_autocast_enabled("cpu"))
        return gradient


def test_gradients_flow_outside_of_autocast() -> None:
    """A policy improves within the autocast of its rollouts, which PyTorch advises against for the backward pass."""
    toy = Toy()
    loss = lambda x: Losses({"size": Term(_Spy.apply(toy.net(x)).abs())}, {})  # noqa: E731
    trainer = Trainer([objective := Objective("toy", toy.objective.params, loss, {"size": 1.0})],
                      device=CPU, precision="bf16")  # fmt: skip
    _Spy.seen.clear()
    with trainer.mixed():
        trainer.update(objective, data(1)[0])
    assert _Spy.seen == [False]


def test_the_learning_rate_warms_up() -> None:
    toy = Toy(lr=0.1, warmup=4)
    trainer, rates = toy.trainer(), []
    for x in data(7):
        before = toy.weights()
        trainer.update(toy.objective, x)
        rates.append(trainer.optimizers["toy"].param_groups[0]["lr"])
        step = max(float((a - b).abs().max()) for a, b in zip(toy.weights(), before, strict=True))
        assert step <= 1.5 * rates[-1]  # Adam's steps are about as large as its rate
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1, 0.1])


def test_the_learning_rate_falls_when_it_shall() -> None:
    toy = Toy(lr=0.1, warmup=2, decay=4)
    trainer, rates = toy.trainer(), []
    for x in data(8):
        trainer.update(toy.objective, x)
        rates.append(trainer.optimizers["toy"].param_groups[0]["lr"])
    assert rates == pytest.approx([0.05, 0.1, 0.1, 0.1, 0.08, 0.1 * 4 / 6, 0.1 * 4 / 7, 0.05])


def test_every_learning_rate_is_cooled() -> None:
    toy = Toy(lr=0.1, warmup=2)
    trainer, rates = toy.trainer(), []
    for x, share in zip(data(4), (1.0, 0.5, 0.25, 0.0), strict=True):
        trainer.cool(share)
        before = toy.weights()
        trainer.update(toy.objective, x)
        rates.append(trainer.optimizers["toy"].param_groups[0]["lr"])
    assert rates == pytest.approx([0.05, 0.05, 0.025, 0.0])
    assert_close(toy.weights(), before, rtol=0, atol=0)


def test_gradients_are_clipped_and_their_norm_is_reported_unclipped() -> None:
    toy = Toy(clip=0.01)
    trainer, (x, *_) = toy.trainer(), data(1)
    total = toy.total(toy.loss(x))
    norm = torch.cat([g.flatten() for g in torch.autograd.grad(total, toy.objective.params)]).norm()
    trainer.update(toy.objective, x)
    clipped = torch.cat([p.grad.flatten() for p in toy.objective.params if p.grad is not None]).norm()
    assert norm > 0.1
    assert_close(clipped, torch.tensor(0.01), rtol=1e-3, atol=0)
    assert trainer.report()["toy/grad_norm"] == pytest.approx(float(norm), rel=1e-4)


def saved(state: Any) -> Any:
    """Through a file, as a checkpoint goes."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_restored_trainer_goes_on_identically() -> None:
    batches = data(8)
    whole, first = Toy(warmup=6), Toy(warmup=6)  # stopped in the middle of the warm-up
    one, two = whole.trainer(), first.trainer()
    for x in batches:
        one.update(whole.objective, x)
    for x in batches[:3]:
        two.update(first.objective, x)
    weights, state = saved(first.net.state_dict()), saved(two.state_dict())

    second = Toy(warmup=6)
    second.net.load_state_dict(weights)
    three = second.trainer()
    three.load_state_dict(state)
    for x in batches[3:]:
        three.update(second.objective, x)
    assert_close(second.weights(), whole.weights(), rtol=0, atol=0)
    assert three.updates == one.updates == {"toy": 8}
    assert three.report() == one.report()  # averages of the report under way included


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_precision_is_what_was_asked_for(precision: str, dtype: torch.dtype) -> None:
    toy = Toy()
    trainer = toy.trainer(precision=precision)
    trainer.update(toy.objective, data(1)[0])
    assert toy.precisions == [dtype]
    assert trainer.autocast == mixed_precision(CPU, precision) == (precision == "bf16")
    assert all(p.dtype == torch.float32 and p.grad is not None for p in toy.objective.params)
    with trainer.mixed():
        assert torch.is_autocast_enabled("cpu") == (precision == "bf16")
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("native", [True, False])
def test_auto_precision_asks_the_processor(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    assert mixed_precision(CPU, "auto") == native
    assert Toy().trainer(precision="auto").autocast == native


def several(update: Callable[[Objective, Any], Losses], toy: Toy, *, outer: torch.autocast | None) -> list[Tensor]:
    """Some updates, as minibatches inside one `mixed()` or each by itself; every loss."""
    losses = []
    if outer is None:
        for x in data(4):
            losses.append(update(toy.objective, x).terms["square"].value)
        return losses
    with outer:
        return several(update, toy, outer=None)


def test_updates_inside_an_outer_autocast_see_the_new_weights() -> None:
    """Autocast keeps bfloat16 copies of weights until its outermost context ends: they must not outlive a step."""
    inside, alone = Toy(lr=0.1, warmup=0), Toy(lr=0.1, warmup=0)
    one, two = inside.trainer(precision="bf16"), alone.trainer(precision="bf16")
    assert_close(several(one.update, inside, outer=one.mixed()), several(two.update, alone, outer=None), rtol=0, atol=0)
    assert_close(inside.weights(), alone.weights(), rtol=0, atol=0)


@pytest.mark.skipif(not lstm_in_bf16(), reason="this processor has no LSTM in bfloat16")
def test_lowered_layers_say_what_autocast_would() -> None:
    torch.manual_seed(0)
    conv, lstm, linear = nn.Conv2d(3, 4, 3), nn.LSTM(5, 6), nn.Linear(7, 8)
    parts = nn.ModuleList([conv, lstm, linear])
    picture, row, flat = torch.randn(2, 3, 8, 8), torch.randn(4, 2, 5), torch.randn(3, 7)

    def said() -> list[torch.Tensor]:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            return [conv(picture), lstm(row)[0], linear(flat)]

    before = said()
    for_inference(parts, format="bf16")
    assert {part.weight.dtype for part in (conv, linear)} == {torch.bfloat16, torch.float32}
    assert lstm.weight_hh_l0.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(before, said(), strict=True))
