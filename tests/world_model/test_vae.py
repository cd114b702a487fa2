"""The autoencoder and its discriminator: the paper's sizes, oracles for the maths, and that they learn."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from world_model.parts.vae import ConvVAE, Discriminator, draw_latent, kl_from_normal

RGB, GRAY = (3, 64, 64), (1, 64, 64)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def pictures(number: int, seed: int = 0) -> torch.Tensor:
    """A white square on black, somewhere: (N, 1, 64, 64)."""
    rng = torch.Generator().manual_seed(seed)
    frame = torch.zeros(number, *GRAY)
    for n, (row, column) in enumerate(torch.randint(0, 40, (number, 2), generator=rng).tolist()):
        frame[n, 0, row : row + 24, column : column + 24] = 1
    return frame


def test_it_is_the_paper_s_net() -> None:
    vae = ConvVAE(RGB, 32)
    assert count(vae) == 4_348_547
    assert [layer.out_channels for layer in vae.convs if isinstance(layer, nn.Conv2d)] == [32, 64, 128, 256]
    deconvs = [layer for layer in vae.deconvs if isinstance(layer, nn.ConvTranspose2d)]
    assert [(layer.out_channels, layer.kernel_size[0]) for layer in deconvs] == [(128, 5), (64, 5), (32, 6), (3, 6)]
    assert count(ConvVAE(GRAY, 8, channels=4)) < 80_000


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
@pytest.mark.parametrize("frame", [RGB, GRAY])
def test_shapes_and_range(frame: tuple[int, int, int], lead: tuple[int, ...]) -> None:
    vae, judge = ConvVAE(frame, 5, channels=4), Discriminator(frame, channels=4)
    picture = torch.rand(*lead, *frame)
    mean, log_var = vae.encode(picture)
    assert mean.shape == log_var.shape == (*lead, 5)
    shown = vae.decode(50 * mean)
    assert shown.shape == picture.shape and shown.min() >= 0 and shown.max() <= 1
    logit, features = judge(picture)
    assert logit.shape == lead and features.shape == (*lead, 16 * 6 * 6)


@pytest.mark.parametrize(
    ("frame", "places"), [((3, 32, 48), 2 * 2), ((3, 84, 64), 4 * 2), ((1, 112, 80), 5 * 3), ((3, 210, 160), 12 * 8)]
)
def test_frames_of_any_size(frame: tuple[int, int, int], places: int) -> None:
    """The encoder ends in the places that it also takes from a frame as large as the decoder draws."""
    vae, judge, picture = ConvVAE(frame, 5, channels=4), Discriminator(frame, channels=4), torch.rand(2, *frame)
    assert vae.mean.in_features == judge.logit.in_features == 32 * places
    shown = vae.decode(vae.encode(picture)[0])
    assert shown.shape == picture.shape and judge(picture)[0].shape == (2,)
    changed = picture.clone()
    changed[..., -4:, -4:] = 0
    assert (vae.encode(changed)[0] != vae.encode(picture)[0]).any(), "sees the corner"


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_the_first_deconvolution_is_one(layout: torch.memory_format) -> None:
    vae = ConvVAE(RGB, 8, channels=4).to(memory_format=layout)  # type: ignore[call-overload]
    first = vae.deconvs[0]
    assert isinstance(first, nn.ConvTranspose2d)
    x = torch.randn(7, 128)
    exact = F.conv_transpose2d(x[:, :, None, None], first.weight, first.bias, stride=2)
    assert_close(first(x), exact)


def test_every_frame_is_seen_alone() -> None:
    vae, judge, frame = ConvVAE(RGB, 8, channels=4), Discriminator(RGB, channels=4), torch.rand(4, *RGB)
    assert_close(vae.encode(frame)[0][2], vae.encode(frame[2])[0])
    assert_close(judge(frame)[1][2], judge(frame[2])[1])
    assert_close(vae.decode(vae.encode(frame)[0])[2], vae.decode(vae.encode(frame[2])[0]))


def test_a_beginner_already_tells_frames_and_latents_apart() -> None:
    """With the library's own initial weights the differences are a hundred times smaller, and dark games stay black."""
    torch.manual_seed(0)
    vae = ConvVAE(RGB, 32)
    with torch.no_grad():
        assert (
            vae.encode(torch.rand(16, 3, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3))[0].std(0).mean() > 0.1
        )
        assert vae.decode(torch.randn(16, 32)).std(0).mean() > 0.1


def test_the_kl_is_the_library_s() -> None:
    mean, log_var = torch.randn(4, 6), torch.randn(4, 6)
    exact = kl_divergence(Normal(mean, (0.5 * log_var).exp()), Normal(0.0, 1.0))
    assert_close(kl_from_normal(mean, log_var), exact)
    assert not kl_from_normal(torch.zeros(3), torch.zeros(3)).any()


def test_latents_are_drawn_around_their_mean() -> None:
    mean, log_var = torch.tensor([-1.0, 2.0]), torch.tensor([-2.0, 1.0]).requires_grad_()
    drawn = draw_latent(mean.expand(50_000, 2), log_var.expand(50_000, 2))
    assert_close(drawn.mean(0), mean, rtol=0, atol=0.03)
    assert_close(drawn.std(0), (0.5 * log_var).exp(), rtol=0.02, atol=0)
    (gradient,) = torch.autograd.grad(drawn.square().sum(), log_var)
    assert gradient.all()


def test_mixed_precision_returns_full() -> None:
    vae, judge, frame = ConvVAE(RGB, 8, channels=4), Discriminator(RGB, channels=4), torch.rand(2, *RGB)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        known = [*vae.encode(frame), vae.decode(torch.randn(2, 8)), *judge(frame)]
    assert {tensor.dtype for tensor in known} == {torch.float32}


def test_it_learns_where_a_square_is() -> None:
    torch.manual_seed(0)
    vae, frame = ConvVAE(GRAY, 4, channels=8), pictures(16)
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3)
    for _ in range(150):
        mean, log_var = vae.encode(frame)
        error = (vae.decode(draw_latent(mean, log_var)) - frame).square().flatten(1).sum(1)
        optimizer.zero_grad()
        (error + kl_from_normal(mean, log_var).sum(-1)).mean().backward()
        optimizer.step()
    with torch.no_grad():
        error = (vae.decode(vae.encode(frame)[0]) - frame).square().mean()
    assert error < 0.6 * (frame - frame.mean(0)).square().mean(), "better than the mean picture"


def test_a_discriminator_learns_what_is_real() -> None:
    torch.manual_seed(0)
    judge, real, fake = Discriminator(GRAY, channels=4), pictures(32), torch.rand(32, *GRAY)
    optimizer = torch.optim.Adam(judge.parameters(), lr=1e-3)
    for _ in range(40):
        optimizer.zero_grad()
        (F.softplus(-judge(real)[0]) + F.softplus(judge(fake)[0])).mean().backward()
        optimizer.step()
    assert (judge(pictures(8, seed=1))[0] > 0).all() and (judge(torch.rand(8, *GRAY))[0] < 0).all()
