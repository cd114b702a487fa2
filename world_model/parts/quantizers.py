"""How latents become tokens: a codebook that learns by gradient (van den Oord et al. 2017), one that follows the means
of its latents (the same paper, appendix A.1), and finite scalar quantisation (Mentzer et al. 2023), which has none.

Shapes: N tokens a frame, D width of a code, V codes, M latents.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Quantized(NamedTuple):
    """Latents (..., N, D) as codes, and what that costs."""

    codes: Tensor  # (..., N, D); a gradient passes straight through to the latents
    tokens: Tensor  # (..., N) int64
    terms: dict[str, Tensor]  # (...), a frame's losses in float32, as named by the quantiser's `terms`


class Codebook(nn.Embedding):
    """V codes that gradients pull towards their latents, and the latents towards them: the paper's.

    What is nearest is found in full precision, also in mixed precision: a token is right or wrong.
    """

    terms: tuple[str, ...] = ("codebook", "commitment")

    def __init__(self, codes: int, width: int) -> None:
        super().__init__(codes, width)
        nn.init.uniform_(self.weight, -1 / codes, 1 / codes)

    def nearest(self, latent: Tensor) -> Tensor:
        """The token of the nearest code: (..., D) -> (...) int64."""
        device = latent.device.type
        with torch.autocast(device if torch.amp.is_autocast_available(device) else "cpu", enabled=False):
            codes = self.weight.float()
            # |z - e|^2 without |z|^2, which is the same for every code
            distance = codes.square().sum(-1) - 2 * latent.float() @ codes.T
            return distance.argmin(-1)

    def quantize(self, latent: Tensor) -> Quantized:
        """Latents (..., N, D), in training."""
        latent = latent.float()
        tokens = self.nearest(latent)
        codes = self(tokens)
        both = {
            "codebook": (codes - latent.detach()).square().mean((-2, -1)),
            "commitment": (latent - codes.detach()).square().mean((-2, -1)),
        }
        straight = latent + (codes - latent).detach()
        return Quantized(straight, tokens, {name: both[name] for name in self.terms})


class MovingCodebook(Codebook):
    """Each code is the moving mean of the latents it stands for; one that stands for none begins anew at some latent.

    Nothing is in use at first, so the codes begin as latents of the first batch.
    """

    terms = ("commitment",)
    DECAY = 0.99
    DEAD, ANEW = 0.05, 0.1  # latents an update, as a moving mean: a new code has 70 updates to find some

    count: Tensor
    total: Tensor

    def __init__(self, codes: int, width: int) -> None:
        super().__init__(codes, width)
        self.weight.requires_grad_(False)
        self.register_buffer("count", torch.zeros(codes))  # latents a code stands for
        self.register_buffer("total", torch.zeros(codes, width))  # and their sum

    @torch.no_grad()
    def follow(self, latent: Tensor, tokens: Tensor) -> None:
        """After an update: the codes move towards the latents (M, D) float32 that have become the tokens (M,)."""
        dead = self.count < self.DEAD
        one_hot = F.one_hot(tokens, self.num_embeddings).to(latent.dtype)  # (M, V)
        self.count.lerp_(one_hot.sum(0), 1 - self.DECAY)
        self.total.lerp_(one_hot.T @ latent, 1 - self.DECAY)
        anew = latent[torch.randint(len(latent), (self.num_embeddings,), device=latent.device)]
        self.total.copy_(torch.where(dead.unsqueeze(-1), self.ANEW * anew, self.total))
        self.count.masked_fill_(dead, self.ANEW)
        self.weight.copy_(self.total / self.count.unsqueeze(-1))


class FiniteScalar(nn.Module):
    """Every dimension of a latent rounded to one of a few levels; a code is one combination of levels.

    As the paper's appendix A.1: squashed by tanh, levels from -1 to 1 (an even number of them without +1).
    """

    terms: tuple[str, ...] = ()
    middle: Tensor
    weight: Tensor
    strides: Tensor
    reach: Tensor
    offset: Tensor
    ROOM = 1e-3  # by so much the squash reaches past the outermost levels, so that they are reached

    def __init__(self, levels: tuple[int, ...]) -> None:
        super().__init__()
        if not levels or min(levels) < 3:
            raise ValueError(f"finite scalar quantisation needs at least 3 levels in each dimension, got {levels}")
        self.levels = levels
        steps = torch.cartesian_prod(*(torch.arange(level) for level in levels)).view(-1, len(levels))
        self.register_buffer("middle", torch.tensor([level // 2 for level in levels]), persistent=False)
        self.register_buffer("weight", (steps - self.middle) / self.middle, persistent=False)  # (V, D), all the codes
        strides = [math.prod(levels[i + 1 :]) for i in range(len(levels))]
        self.register_buffer("strides", torch.tensor(strides), persistent=False)
        reach = torch.tensor([(level - 1) * (1 + self.ROOM) / 2 for level in levels])
        offset = torch.tensor([0.0 if level % 2 else 0.5 for level in levels])
        self.register_buffer("reach", reach, persistent=False)
        self.register_buffer("offset", offset, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """The codes of tokens: (...) -> (..., D)."""
        return F.embedding(tokens, self.weight)

    def nearest(self, latent: Tensor) -> Tensor:
        """The token of a latent: (..., D) -> (...) int64."""
        steps = self._squashed(latent).round().long() + self.middle
        return (steps * self.strides).sum(-1)

    def quantize(self, latent: Tensor) -> Quantized:
        """Latents (..., N, D), in training."""
        squashed = self._squashed(latent)
        straight = squashed + (squashed.round() - squashed).detach()
        return Quantized(straight / self.middle, self.nearest(latent), {})

    def _squashed(self, latent: Tensor) -> Tensor:
        """Into the range of the levels, in steps from the middle one."""
        shift = (self.offset / self.reach).atanh()
        return (latent.float() + shift).tanh() * self.reach - self.offset


Quantizer = Codebook | FiniteScalar


def build(kind: str, codes: int, width: int, levels: tuple[int, ...]) -> Quantizer:
    """The quantiser of that kind with V codes; raises ValueError for an unknown kind and numbers that contradict."""
    if kind == "fsq":
        if (count := math.prod(levels)) != codes:
            raise ValueError(f"the levels {list(levels)} make {count} codes, not {codes}")
        return FiniteScalar(levels)
    kinds: dict[str, Any] = {"gradient": Codebook, "ema": MovingCodebook}
    if kind not in kinds:
        raise ValueError(f'quantizer is "gradient", "ema" or "fsq", got "{kind}"')
    made: Codebook = kinds[kind](codes, width)
    return made


@torch.no_grad()
def usage(tokens: Tensor, codes: int) -> dict[str, Tensor]:
    """How a batch's tokens (M,) spread over the codes: the share in use, how many are not, and the perplexity."""
    share = torch.bincount(tokens, minlength=codes).float() / max(1, tokens.numel())
    used = (share > 0).float()
    entropy = -torch.special.xlogy(share, share).sum()
    return {"codebook_usage": used.mean(), "dead_codes": (1 - used).sum(), "perplexity": entropy.exp()}
