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

from world_model.parts.heads import one_hot


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

    def __init__(self, codes: int, width: int, even: bool = False) -> None:
        """With `even` there is a term that is 0 where a batch uses all codes alike, against their collapse."""
        super().__init__(codes, width)
        self.terms = (*self.terms, "uneven") if even else self.terms
        nn.init.uniform_(self.weight, -1 / codes, 1 / codes)

    def nearest(self, latent: Tensor) -> Tensor:
        """The token of the nearest code: (..., D) -> (...) int64."""
        return self.distance(latent).argmin(-1)

    def distance(self, latent: Tensor) -> Tensor:
        """|z - e|^2 without |z|^2, which is the same for every code: (..., D) -> (..., V)."""
        device = latent.device.type
        with torch.autocast(device if torch.amp.is_autocast_available(device) else "cpu", enabled=False):
            codes = self.weight.float()
            return codes.square().sum(-1) - 2 * latent.float() @ codes.T

    def quantize(self, latent: Tensor) -> Quantized:
        """Latents (..., N, D), in training."""
        latent = latent.float()
        tokens = self.distance(latent).argmin(-1)
        codes = self(tokens)
        both = {
            "codebook": (codes - latent.detach()).square().mean((-2, -1)),
            "commitment": (latent - codes.detach()).square().mean((-2, -1)),
        }
        if "uneven" in self.terms:  # log V - H of the batch's mean assignment, soft so that a gradient flows
            share = (-self.distance(latent)).softmax(-1).flatten(0, -2).mean(0)
            entropy = -torch.special.xlogy(share, share).sum()
            both["uneven"] = (math.log(len(self.weight)) - entropy).expand(latent.shape[:-2])
        straight = latent + (codes - latent).detach()
        return Quantized(straight, tokens, {name: both[name] for name in self.terms})


class MovingCodebook(Codebook):
    """Each code is the moving mean of the latents it stands for; one that stands for none begins anew at some latent.

    Nothing is in use at first, so the codes begin as latents of the first batch. Two schedules: at every update, where
    a code that stands for hardly any latent has a grace of 70 updates; or every few updates, with a look for dead codes
    now and then, which are those that stand for less than 1 % of their even share (Atari world model v2.1).

    With a `rate` a rare code must be nearer than a frequent one to be a latent's token (entropy-constrained vector
    quantisation, Chou, Lookabaugh & Gray 1989): squared distance, in units of the mean one between a latent and its
    code, plus rate x nats. What the decoder hardly needs is then not encoded, and the rest is easier to predict. Codes
    are learned without it: in Pong those of the ball, which is rare, would otherwise never come to be.
    """

    terms = ("commitment",)
    DECAY = 0.99
    DEAD, ANEW = 0.05, 0.1  # latents an update, as a moving mean: a new code has 70 updates to find some
    DEAD_SHARE = 0.01  # of the latents of an average code
    RAREST = 0.1  # of an even share: no code costs more than one that is as rare

    count: Tensor
    error: Tensor
    total: Tensor
    updates: Tensor

    def __init__(self, codes: int, width: int, follow_every: int = 1, reset_every: int = 0, rate: float = 0.0) -> None:
        super().__init__(codes, width)
        self.follow_every, self.reset_every, self.rate = follow_every, reset_every, rate
        self.weight.requires_grad_(False)
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))
        self.register_buffer("error", torch.zeros(()))  # mean squared distance of a latent from its code
        self.register_buffer("count", torch.zeros(codes))  # latents a code stands for
        self.register_buffer("total", torch.zeros(codes, width))  # and their sum

    def nearest(self, latent: Tensor) -> Tensor:
        """The token, by distance and by what a code costs: (..., D) -> (...) int64."""
        if not self.rate:
            return super().nearest(latent)
        share = (self.count / self.count.sum().clamp(min=1e-6)).clamp(min=self.RAREST / self.num_embeddings)
        return (self.distance(latent) - self.rate * self.error * share.log()).argmin(-1)

    @torch.no_grad()
    def follow(self, latent: Tensor, tokens: Tensor, real: Tensor | None = None) -> None:
        """After an update: the codes move towards the latents (M, D) float32 that have become the tokens (M,).

        Those that are not `real` (M,) bool count for nothing.
        """
        real = torch.ones_like(tokens, dtype=torch.bool) if real is None else real
        there = real.sum()
        begun, due = self.updates == 0, self.updates % self.follow_every == 0
        dead = self.count < self.DEAD
        if self.reset_every:
            rare = self.count < self.DEAD_SHARE * self.count.mean()
            dead = begun | (rare & (self.updates % self.reset_every == 0))
        dead &= there > 0
        self.updates += there > 0
        chosen = one_hot(tokens, self.num_embeddings, latent.dtype) * real.unsqueeze(-1)  # (M, V)
        weight = (1 - self.DECAY) * (due & (there > 0))
        error = (latent - self.weight[tokens]).square().sum(-1)
        self.error.lerp_((error * real).sum() / there.clamp(min=1), weight)
        self.count.lerp_(chosen.sum(0), weight)
        self.total.lerp_(chosen.T @ latent, weight)
        # The n-th of the real ones stands where as many have been counted.
        nth = (torch.rand(self.num_embeddings, device=latent.device) * there).floor()
        anew = latent[torch.searchsorted(real.cumsum(0).float(), nth, right=True).clamp(max=len(latent) - 1)]
        self.total.copy_(torch.where(dead.unsqueeze(-1), self.ANEW * anew, self.total))
        self.count.masked_fill_(dead, self.ANEW)
        self.weight.copy_(self.total / self.count.clamp(min=1e-6).unsqueeze(-1))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Checkpoints from before these were kept lack them; their schedule, and no rate, does without."""
        for name in ("updates", "error"):
            state_dict.setdefault(prefix + name, getattr(self, name))
        super()._load_from_state_dict(state_dict, prefix, *args)


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


class CodebooksApart(nn.Module):
    """The first token of each row of N is one of `first` alone, the others are of `rest`, whose tokens come after."""

    def __init__(self, first: Codebook, rest: Codebook) -> None:
        super().__init__()
        self.first, self.rest, self.terms = first, rest, first.terms

    @property
    def weight(self) -> Tensor:
        """All the codes (V, D)."""
        return torch.cat([self.first.weight, self.rest.weight])

    def forward(self, tokens: Tensor) -> Tensor:
        """The codes of tokens: (...) -> (..., D)."""
        return F.embedding(tokens, self.weight)

    def nearest(self, latent: Tensor) -> Tensor:
        """The tokens of latents: (..., N, D) -> (..., N) int64."""
        one, others = (book.nearest(part) for book, part in self._apart(latent))
        return torch.cat([one, others + self.first.num_embeddings], -1)

    def quantize(self, latent: Tensor) -> Quantized:
        """Latents (..., N, D), in training; the losses are means over both, each latent counting alike."""
        one, others = (book.quantize(part) for book, part in self._apart(latent))
        share = 1 / latent.shape[-2]
        terms = {name: one.terms[name].lerp(others.terms[name], 1 - share) for name in self.terms}
        tokens = torch.cat([one.tokens, others.tokens + self.first.num_embeddings], -1)
        return Quantized(torch.cat([one.codes, others.codes], -2), tokens, terms)

    def follow(self, latent: Tensor, tokens: Tensor, real: Tensor | None = None) -> None:
        """After an update, where the codes are moving means: as `MovingCodebook.follow`."""
        count = self.first.num_embeddings
        for book, own, offset in ((self.first, tokens < count, 0), (self.rest, tokens >= count, count)):
            if isinstance(book, MovingCodebook):
                its = (tokens - offset).clamp(0, book.num_embeddings - 1)
                book.follow(latent, its, own if real is None else own & real)

    def _apart(self, latent: Tensor) -> tuple[tuple[Codebook, Tensor], tuple[Codebook, Tensor]]:
        return (self.first, latent[..., :1, :]), (self.rest, latent[..., 1:, :])


Quantizer = Codebook | FiniteScalar | CodebooksApart


def build(
    kind: str, codes: int, width: int, levels: tuple[int, ...], *, follow_every: int = 1, reset_every: int = 0,
    even: bool = False, rate: float = 0.0, apart: int = 0,
) -> Quantizer:  # fmt: skip
    """The quantiser of that kind with V codes, `apart` of them in a codebook of the first token's own.

    Raises ValueError for an unknown kind and numbers that contradict.
    """
    if apart:
        if kind == "fsq":
            raise ValueError("fsq has no codebooks, of which one could be the first token's own")
        if apart >= codes:
            raise ValueError(f"of {codes} codes {apart} cannot be the first token's own: some must remain")
        one, others = (
            build(kind, count, width, levels, follow_every=follow_every, reset_every=reset_every, even=even, rate=rate)
            for count in (apart, codes - apart)
        )
        assert isinstance(one, Codebook) and isinstance(others, Codebook)
        return CodebooksApart(one, others)
    if kind == "fsq":
        if (count := math.prod(levels)) != codes:
            raise ValueError(f"the levels {list(levels)} make {count} codes, not {codes}")
        return FiniteScalar(levels)
    if kind == "ema":
        return MovingCodebook(codes, width, follow_every, reset_every, rate)
    if kind != "gradient":
        raise ValueError(f'quantizer is "gradient", "ema" or "fsq", got "{kind}"')
    return Codebook(codes, width, even)


@torch.no_grad()
def usage(tokens: Tensor, codes: int, real: Tensor | None = None) -> dict[str, Tensor]:
    """How a batch's tokens spread over the codes: the share in use, how many are not, entropy and perplexity.

    Of tokens (M,) those that are `real` (M,) bool.
    """
    weight = torch.ones_like(tokens, dtype=torch.float) if real is None else real.float()
    share = torch.zeros(codes, device=tokens.device).index_add_(0, tokens, weight) / weight.sum().clamp(min=1)
    used = (share > 0).float()
    entropy = -torch.special.xlogy(share, share).sum()
    return {
        "codebook_usage": used.mean(),
        "dead_codes": (1 - used).sum(),
        "code_entropy": entropy,
        "perplexity": entropy.exp(),
    }
