"""What an action makes of the last frames, as codes: neural Atari's action-to-latent model, the dynamics of
`latent_action`.

A few convolutions read the last `context` frames, the action joins them at every place, and each place predicts its
code. With no context the action alone does. Its author's wish for memory is `recurrent`: a GRU over the frames' means
and the actions, beside the code.
Shapes: B batch, T time, C H W picture, N tokens a frame, P places, V codes, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from world_model.parts.nets import FIRST, ChannelNorm, padded, shrinking, shrunk
from world_model.parts.token_dynamics import REWARDS, PlacewiseDynamics, Predictions, begin, relu_head
from world_model.trees import Tree


@dataclass(frozen=True)
class FrameDynamicsConfig:
    """What it is built from."""

    frame: tuple[int, int, int] = (3, 112, 80)
    codes: int = 256
    tokens: int = 35  # as many as there are places, or any number that all of them predict together
    context: int = 2  # frames that it reads; 0: the action alone
    halvings: int = 4
    width: int = 128
    blocks: int = 2  # residual ones, after the action
    recurrent: bool = False

    def build(self, actions: int) -> FrameDynamics:
        """The dynamics for a game of that many actions."""
        return FrameDynamics(self, actions)


class FrameDynamics(PlacewiseDynamics):
    """Memory of one that awaits a frame: as `PlacewiseDynamics` has it; gru (B, D)."""

    def __init__(self, config: FrameDynamicsConfig, actions: int) -> None:
        super().__init__()
        if config.halvings < 1 or config.width < 4:
            raise ValueError("dynamics that read frames need halvings of at least 1 and a width of at least 4")
        self.config, self.width, self.tokens, self.context = config, config.width, config.tokens, config.context
        self.gru_layers = () if config.recurrent else None
        width, times = config.width, 2**config.halvings
        self.padded = padded(*config.frame[1:], times)
        self.places = (self.padded[0] // times, self.padded[1] // times)
        count = self.places[0] * self.places[1]
        self.action = nn.Embedding(actions, width)
        self.place = nn.Parameter(0.02 * torch.randn(width, *self.places))
        self.stem = _stem(config) if config.context else None
        self.gru = nn.GRU(2 * width, width, batch_first=True) if config.recurrent else None
        self.film = nn.Linear(width, 2 * width)
        self.blocks = nn.ModuleList(_Residual(width) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(width)
        self.pool = nn.Linear(count * width, width)
        # Where places and tokens are not the same, all places together predict each token.
        self.spread = nn.Linear(width, config.tokens * width) if config.tokens != count else None
        self.next_tokens = nn.Linear(width, config.codes)
        self.reward, self.end = relu_head(width, len(REWARDS)), relu_head(width, 2)
        for part in (self.next_tokens, self.reward, self.end):
            part.apply(begin)

    # ---- what a token world asks for ----
    @torch.no_grad()
    def advance(self, memory: Tree, tokens: Tensor, action: Tensor, pictures: Tensor | None = None) -> Tree:
        """The frames before, (B, context, C, H, W), the last of which is the present one."""
        known = memory["gru"].unsqueeze(0) if self.gru is not None else None
        one = None if pictures is None else pictures.unsqueeze(1)
        out, h, gru = self._told(one, action.unsqueeze(1), known)
        return self.awaiting(out[:, 0], h[:, 0], None if gru is None else gru[0])

    def held(self, past: int) -> int:
        """All of it, or the last action alone, whose pictures are given."""
        return past if self.config.recurrent else min(past, 1)

    def predict(self, tokens: Tensor, action: Tensor, codes: Tensor, pictures: Tensor | None = None) -> Predictions:
        """See `TokenDynamics`; pictures (B, T, context, C, H, W)."""
        out, h, _ = self._told(pictures, action, None)
        return self.predictions(out, h, tokens)

    # ---- parts ----
    def _told(
        self, pictures: Tensor | None, action: Tensor, gru: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(B, T, context, C, H, W), (B, T), (1, B, D) -> out (B, T, N, D), h (B, T, D), and the GRU after the last."""
        batch, length = action.shape
        act = self.action(action)  # (B, T, D)
        x = self.place.expand(batch * length, -1, -1, -1)
        if self.stem is not None:
            assert pictures is not None
            x = x + self.stem(shrunk(pictures.flatten(0, 1).flatten(1, 2), self.padded))
        doing = act
        if self.gru is not None:
            memory, gru = self.gru(torch.cat([x.mean((-2, -1)).unflatten(0, (batch, length)), act], -1), gru)
            doing = act + memory
        scale, shift = self.film(doing.flatten(0, 1)).view(batch * length, -1, 1, 1).chunk(2, 1)
        x = x * (1 + scale) + shift
        for block in self.blocks:
            x = block(x)
        places = self.norm(x.flatten(2).transpose(1, 2).float())  # (B T, P, D)
        h = self.pool(places.flatten(1)).float()
        out = places if self.spread is None else self.spread(F.silu(h)).view(len(h), self.tokens, -1).float()
        gru = None if gru is None else gru.float()
        return out.unflatten(0, (batch, length)), h.unflatten(0, (batch, length)), gru


class _Residual(nn.Module):
    """x + conv(silu(norm(x))), twice, 3 x 3."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            ChannelNorm(width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
            ChannelNorm(width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)  # type: ignore[no-any-return]


def _stem(config: FrameDynamicsConfig) -> nn.Sequential:
    """From half the size down to the places, a quarter of the width to the whole."""
    widths = [config.width // 4 * min(2**level, 4) for level in range(config.halvings)]
    return shrinking(config.context * config.frame[0] * FIRST**2, [*widths[:-1], config.width])
