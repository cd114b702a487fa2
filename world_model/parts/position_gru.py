"""A GRU over the places of a frame predicts the code each of them has next: the dynamics of the Ms. Pac-Man latent GRU.

A place's code and the action are embedded and added; two layers run over the places, row by row, and an output layer
predicts each place's next code by itself. What its author wished for besides: memory over time, where the same GRU is
carried from one frame to the next; attention over the places, without which one knows nothing of those after it; and
training on the model's own codes.
Shapes: B batch, T time, N tokens a frame, V codes, D width of the GRU, E of an embedding, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from world_model.parts.blocks import Block, after_attention, attend, to_qkv
from world_model.parts.nets import network_dtype
from world_model.parts.token_dynamics import REWARDS, PlacewiseDynamics, Predictions, begin, relu_head
from world_model.trees import Tree


@dataclass(frozen=True)
class PositionGRUConfig:
    """The document's numbers; what its author wished for is off."""

    codes: int = 256
    tokens: int = 35
    embedding: int = 64
    width: int = 512
    layers: int = 2
    recurrent: bool = False  # carried from frame to frame
    attention: int = 0  # blocks over the places, after the GRU
    heads: int = 4
    rollout_steps: int = 0  # frames in a row that are predicted from the model's own
    rollout_share: float = 0.5
    teacher_forcing: float = 0.0

    def build(self, actions: int) -> PositionGRU:
        """The GRU for a game of that many actions."""
        return PositionGRU(self, actions)


class PositionGRU(PlacewiseDynamics):
    """Memory of one that awaits a frame: as `PlacewiseDynamics` has it, h the last place's output; gru (B, L, D)."""

    def __init__(self, config: PositionGRUConfig, actions: int) -> None:
        super().__init__()
        if config.attention and config.width % config.heads:
            raise ValueError(f"a width of {config.width} cannot be shared evenly among {config.heads} heads")
        self.config, self.width, self.tokens = config, config.width, config.tokens
        self.gru_layers = (config.layers,) if config.recurrent else None
        self.embedding = nn.Embedding(config.codes, config.embedding)
        self.action = nn.Embedding(actions, config.embedding)
        self.gru = nn.GRU(config.embedding, config.width, config.layers, batch_first=True)
        self.place = nn.Parameter(0.02 * torch.randn(config.tokens, config.width)) if config.attention else None
        self.blocks = nn.ModuleList(Block(config.width) for _ in range(config.attention))
        self.norm = nn.LayerNorm(config.width)
        self.next_tokens = nn.Linear(config.width, config.codes)
        self.reward, self.end = relu_head(config.width, len(REWARDS)), relu_head(config.width, 2)
        for part in (self.blocks, self.next_tokens, self.reward, self.end):
            part.apply(begin)

    # ---- what a token world asks for ----
    @torch.no_grad()
    def advance(self, memory: Tree, tokens: Tensor, action: Tensor, pictures: Tensor | None = None) -> Tree:
        """One pass over the places."""
        gru = memory["gru"].transpose(0, 1).contiguous() if self.config.recurrent else None
        out, gru = self.gru(self._embed(tokens, action), gru)
        out = self._settled(out)
        kept = gru.transpose(0, 1).float().contiguous() if self.config.recurrent else None
        return self.awaiting(out, out[:, -1], kept)

    def held(self, past: int) -> int:
        """All of it, or the frame before alone."""
        return past if self.config.recurrent else min(past, 1)

    def predict(self, tokens: Tensor, action: Tensor, codes: Tensor, pictures: Tensor | None = None) -> Predictions:
        """See `TokenDynamics`. The first segments of the batch go on from the model's own tokens (`rolled_out`)."""
        config = self.config
        shown = self.partly_rolled_out(
            tokens, action, config.rollout_steps, config.rollout_share, config.teacher_forcing
        )
        out = self(shown, action)
        return self.predictions(out, out[:, :, -1], tokens)

    # ---- parts ----
    def forward(self, tokens: Tensor, action: Tensor) -> Tensor:
        """Whole segments (B, T, N), (B, T): what awaits the frame after each, (B, T, N, D)."""
        batch, length = action.shape
        x = self._embed(tokens.flatten(0, 1), action.flatten())  # (B T, N, E)
        if self.config.recurrent:
            out = self.gru(x.view(batch, length * self.tokens, -1))[0].reshape(batch * length, self.tokens, -1)
        else:
            out = self.gru(x)[0]
        return self._settled(out).unflatten(0, (batch, length))

    def _embed(self, tokens: Tensor, action: Tensor) -> Tensor:
        """Tokens (B, N) and what is done (B,) -> (B, N, E)."""
        return self.embedding(tokens) + self.action(action).unsqueeze(1)  # type: ignore[no-any-return]

    def _settled(self, out: Tensor) -> Tensor:
        """Outputs of the GRU (B, N, D), after what the places make of each other."""
        rows = len(out)
        if self.place is not None:
            x = (out + self.place).flatten(0, 1)
            for block in self.blocks:
                layers = block.layers(network_dtype(self.next_tokens.weight))  # type: ignore[operator]
                q, k, v = to_qkv(x, layers, rows, self.config.heads)
                x = after_attention(x, attend(q, k, v, q.new_zeros(1, 1, 1)), layers, rows)
            out = x.view(rows, self.tokens, -1)
        return self.norm(out.float())  # type: ignore[no-any-return]
