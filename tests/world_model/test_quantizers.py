"""Codebooks by gradient and by moving means, and finite scalar quantisation: oracles by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from world_model.parts import quantizers
from world_model.parts.quantizers import Codebook, CodebooksApart, FiniteScalar, MovingCodebook, usage


def latents(width: int = 3) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 5, 4, width)  # (B, T, N, D)


# ---- codebooks ----
def test_a_token_is_that_of_the_nearest_code_and_its_losses_are_what_lies_between() -> None:
    torch.manual_seed(1)
    book, z = Codebook(7, 3), latents()
    tokens, codes = book.nearest(z), book(book.nearest(z))
    assert torch.equal(tokens, torch.cdist(z.flatten(0, 2), book.weight).argmin(-1).view(2, 5, 4))
    made = book.quantize(z)
    assert torch.equal(made.tokens, tokens)
    assert_close(made.codes, codes)
    between = ((z - codes) ** 2).mean((2, 3))
    assert_close(made.terms, {"codebook": between, "commitment": between})


def test_each_loss_pulls_one_side_and_the_picture_s_gradient_goes_straight_through() -> None:
    book, z = Codebook(7, 3), latents().requires_grad_()
    made = book.quantize(z)
    assert torch.autograd.grad(made.terms["codebook"].sum(), z, allow_unused=True, retain_graph=True) == (None,)
    pull = torch.autograd.grad(made.terms["commitment"].sum(), (z, book.weight), allow_unused=True, retain_graph=True)
    assert pull[0].abs().max() > 0 and pull[1] is None
    weight = torch.randn_like(z)
    straight = torch.autograd.grad((made.codes * weight).sum(), (z, book.weight), allow_unused=True)
    assert straight[1] is None
    assert_close(straight[0], weight)


def test_bfloat16_latents_are_compared_in_full_precision() -> None:
    torch.manual_seed(0)
    book, z = Codebook(64, 16), torch.randn(100, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(book.nearest(z), torch.cdist(z, book.weight).argmin(-1))
        assert book.quantize(z.view(25, 4, 16)).terms["codebook"].dtype == torch.float32


def test_moving_codes_begin_as_latents_and_end_as_their_means() -> None:
    torch.manual_seed(0)
    centres = torch.tensor([[4.0, 0.0], [-4.0, 0.0], [0.0, 4.0]])
    book = MovingCodebook(16, 2)
    assert not [p for p in book.parameters() if p.requires_grad]
    for update in range(60):
        z = centres[torch.randint(3, (50,))] + 0.01 * torch.randn(50, 2)
        book.follow(z, book.nearest(z))
        if not update:
            assert torch.cdist(book.weight, z).min(1).values.max() < 1e-5, "every code is one of the first latents"
    near = torch.cdist(book.weight, centres).min(1)
    assert near.values.max() < 0.1 and set(near.indices.tolist()) == {0, 1, 2}


def test_a_moving_mean_by_hand() -> None:
    book = MovingCodebook(2, 1)
    book.count.copy_(torch.tensor([10.0, 5.0]))
    book.total.copy_(torch.tensor([[10.0], [10.0]]))
    book.weight.copy_(torch.tensor([[1.0], [2.0]]))
    book.follow(torch.tensor([[1.5], [0.5], [3.0]]), torch.tensor([0, 0, 1]))
    assert_close(book.count, torch.tensor([0.99 * 10 + 0.01 * 2, 0.99 * 5 + 0.01 * 1]))
    assert_close(book.weight, torch.tensor([[(9.9 + 0.02) / 9.92], [(9.9 + 0.03) / 4.96]]))


def test_a_code_that_nobody_uses_begins_anew_and_the_others_stay() -> None:
    torch.manual_seed(0)
    book = MovingCodebook(3, 1)
    book.count.copy_(torch.tensor([10.0, 0.04, 10.0]))
    book.total.copy_(torch.tensor([[10.0], [-4.0], [20.0]]))
    book.weight.copy_(torch.tensor([[1.0], [-100.0], [2.0]]))
    book.follow(torch.full((20, 1), 1.4), torch.zeros(20, dtype=torch.long))
    assert book.weight[1] == pytest.approx(1.4) and book.count[1] == pytest.approx(book.ANEW)
    assert 1 < book.weight[0] < 1.4
    assert_close(book.weight[2], torch.tensor([2.0]))


def test_a_rare_code_must_be_nearer() -> None:
    book = MovingCodebook(3, 1, rate=2.0)
    book.weight.copy_(torch.tensor([[0.0], [3.0], [30.0]]))
    book.count.copy_(torch.tensor([90.0, 10.0, 0.0]))
    book.error.fill_(0.5)
    # A nat costs 1: log(90 / 10) of them are the difference of z^2 and (z - 3)^2 where both codes are as dear.
    middle = 1.5 + float(torch.tensor(9.0).log()) / 6
    z = torch.tensor([[middle - 0.1], [middle + 0.1], [1.4]])
    assert book.nearest(z).tolist() == [0, 1, 0]
    assert book.quantize(z).tokens.tolist() == [1, 1, 0], "but not in training"
    # One that nobody uses costs no more than a tenth of an even share: log(0.1 / 0.033) nats more than the second.
    middle = 16.5 + float(torch.tensor(3.0).log()) / 54
    assert book.nearest(torch.tensor([[middle - 0.01], [middle + 0.01]])).tolist() == [1, 2]


def test_the_error_of_a_code_is_a_moving_mean() -> None:
    book = MovingCodebook(2, 2)
    book.updates.fill_(1)
    book.count.fill_(5.0)
    book.weight.copy_(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
    book.total.copy_(5 * book.weight)
    book.follow(torch.tensor([[1.0, 1.0], [3.0, 2.0]]), torch.tensor([0, 1]))
    assert_close(book.error, torch.tensor(0.01 * 2.5))


def test_even_use_is_a_term_that_learns() -> None:
    torch.manual_seed(0)
    book = quantizers.build("gradient", 4, 2, (), even=True)
    with torch.no_grad():
        book.weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
    one = torch.tensor([[[5.0, 0.0]], [[5.0, 0.0]]], requires_grad=True)
    every = 5 * book.weight.detach().unsqueeze(1)
    lone, spread = book.quantize(one).terms["uneven"], book.quantize(every).terms["uneven"]
    assert lone.shape == (2,) and (lone > 1.3).all() and (spread < 0.01).all(), "log 4, and 0"
    lone.sum().backward()
    assert one.grad is not None and one.grad.abs().sum() > 0
    assert "uneven" not in quantizers.build("gradient", 4, 2, ()).quantize(every).terms


# ---- two codebooks ----
@pytest.mark.parametrize("kind", ["gradient", "ema"])
def test_codebooks_apart(kind: str) -> None:
    """The first of a row's tokens is always one of the first codes, the others never; each book learns its own."""
    torch.manual_seed(0)
    book, z = quantizers.build(kind, 7, 3, (), apart=2), latents()
    assert isinstance(book, CodebooksApart) and book.weight.shape == (7, 3)
    tokens = book.nearest(z)
    assert set(tokens[..., 0].unique().tolist()) <= {0, 1} and set(tokens[..., 1:].unique().tolist()) <= set(
        range(2, 7)
    )
    distance = torch.cdist(z, book.weight.expand(2, 5, 7, 3))
    assert torch.equal(tokens[..., 0], distance[..., 0, :2].argmin(-1))
    assert torch.equal(tokens[..., 1:], distance[..., 1:, 2:].argmin(-1) + 2)
    made = book.quantize(z)
    assert torch.equal(made.tokens, tokens)
    assert_close(made.codes, book(tokens))
    assert_close(made.terms["commitment"], (z - book(tokens)).square().mean((-2, -1)))
    before = book.weight.clone()
    book.follow(z.flatten(0, 2), tokens.flatten())
    assert torch.equal(book.weight, before) == (kind == "gradient")
    with pytest.raises(ValueError, match="some must remain"):
        quantizers.build(kind, 7, 3, (), apart=7)


def test_levels_are_not_apart() -> None:
    with pytest.raises(ValueError, match="has no codebooks"):
        quantizers.build("fsq", 12, 3, (6,), apart=6)


# ---- finite scalars ----
@pytest.mark.parametrize("levels", [(3,), (8,), (8, 8, 8), (5, 4, 3), (8, 5, 5, 5)], ids=str)
def test_every_code_is_reached_and_told_by_its_token(levels: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    book, count = FiniteScalar(levels), int(torch.tensor(levels).prod())
    assert book.weight.shape == (count, len(levels)) and len(book.weight.unique(dim=0)) == count
    assert book.weight.min() == -1 and book.weight.max() <= 1
    z = 5 * torch.rand(200 * count, 1, len(levels)) - 2.5
    made = book.quantize(z)
    assert set(made.tokens.flatten().tolist()) == set(range(count))
    assert_close(made.codes, book(made.tokens))
    assert torch.equal(made.tokens, book.nearest(z)) and not made.terms
    assert torch.equal(book.nearest(torch.full((1, len(levels)), 99.0)), torch.tensor([count - 1]))
    assert torch.equal(book.nearest(torch.full((1, len(levels)), -99.0)), torch.tensor([0]))


def test_levels_by_hand() -> None:
    """Five levels: 2 tanh(z), rounded, halved. Four: shifted so that 0 stays 0, and has one level less above."""
    z = torch.tensor([[-5.0], [-0.6], [0.1], [0.6], [5.0]])
    assert_close(FiniteScalar((5,)).quantize(z).codes.flatten(), torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0]))
    assert_close(FiniteScalar((4,)).quantize(z).codes.flatten(), torch.tensor([-1.0, -0.5, 0.0, 0.5, 0.5]))


def test_a_gradient_passes_the_rounding_and_fades_at_the_ends() -> None:
    z = torch.tensor([[[0.2], [9.0]]], requires_grad=True)
    FiniteScalar((5,)).quantize(z).codes.sum().backward()
    assert z.grad is not None
    middle, end = z.grad.flatten().tolist()
    assert middle == pytest.approx((1 - torch.tensor(0.2).tanh().item() ** 2) * 2.002 / 2, rel=1e-4)
    assert 0 <= end < 1e-5


# ---- both ----
def test_usage_by_hand() -> None:
    told = usage(torch.tensor([0, 0, 1, 1]), 8)
    assert_close(told["perplexity"], torch.tensor(2.0))
    assert (told["codebook_usage"], told["dead_codes"]) == (0.25, 6)
    assert usage(torch.arange(8), 8)["perplexity"] == pytest.approx(8)


@pytest.mark.parametrize(
    ("kind", "codes", "levels", "words"),
    [
        ("fsq", 500, (8, 8, 8), r"\[8, 8, 8\] make 512 codes, not 500"),
        ("fsq", 16, (8, 2), "at least 3 levels"),
        ("fsq", 1, (), "at least 3 levels"),
        ("vq", 8, (8,), '"gradient", "ema" or "fsq", got "vq"'),
    ],
)
def test_impossible_quantisers(kind: str, codes: int, levels: tuple[int, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        quantizers.build(kind, codes, 4, levels)


def test_a_schedule_of_moving_means() -> None:
    """Every few updates the codes follow; dead ones are looked for now and then, among those hardly ever used."""
    torch.manual_seed(0)
    book = MovingCodebook(4, 2, follow_every=10, reset_every=500)
    places = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]])

    def follow(latent: Tensor) -> None:
        book.follow(latent, book.nearest(latent))

    follow(places.repeat(8, 1))
    began = book.weight.clone()
    assert all((places == code).all(1).any() for code in began), "codes begin as latents"
    moved = began + 0.1
    for _ in range(9):
        book.follow(moved, torch.arange(4))
        assert torch.equal(book.weight, began)
    book.follow(moved, torch.arange(4))
    assert not torch.equal(book.weight, began)
    alive, many = torch.arange(3).repeat(100), moved[:3].repeat(100, 1)
    while int(book.updates) % 500:
        book.follow(many, alive)
    known = book.weight.clone()
    book.follow(many, alive)
    assert (book.weight[:3] - known[:3]).abs().max() < 0.01, "those in use stay"
    assert ((book.weight[3] - moved[:3]).abs().sum(1) < 1e-5).any(), "the dead one begins anew at some latent"
