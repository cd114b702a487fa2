"""The recipe `spatial`, by size, and beside its numbers those of the Atari world model v2.1.

                         here (xs)                  document (and sizes s, m)        the author's later code
frames                   84x64 RGB                  84x64 RGB
tokens a frame           21x16 of 64                21x16 of 32                      of 64
their quantiser          moving means, 0.99,        moving means, 0.99, every 10     commitment 0.1
                         each update                updates; a look for dead codes
                                                    every 500
tokenizer's network      16-32-64 channels; each    64-128-256 channels, 2 residual  edge loss 0.05
                         token's 4x4 pixels seen by blocks, tanh: 5.9 M parameters
                         themselves, as distances
                         from the background
transformer              4 x 192 over 7x6 places    10 x 256 over 21x16 places,
                         of 3x3 tokens; frames see  everything sees everything,
                         those before; 2 passes     dropout 0.1: 8.3 M parameters
                         settle the tokens
rollouts                 5 steps on half of the     5 steps on half of the batches   ratio 0.3
                         segments
teacher forcing          0.1                        0.1                              0.75
weights of tokens        1 + 2 motion + 2 events    1 + 2 motion + 2 events          persistence 2,
                         + 1 persistence, at most 6 + 1 persistence, at most 6       focal 3
                                                    medians
its batch, rate          16 x 9, 1e-3               8, AdamW 5e-4, clip 1

The document has no rewards, endings or policy: heads as in `iris`, and the actor-critic of `reverie` on the codes and
the output at the action. A frame of 336 tokens is expensive to dream, so the policy passes over each dream four times.
"""

from __future__ import annotations

from dataclasses import replace

from agent.replay import ReplayConfig
from agent.trainer import TrainConfig
from envs.games import GameConfig
from policies.actor_critic import ActorCriticConfig
from policies.cnn_lstm import CnnLstmConfig
from runs.config import Config
from runs.recipes import recipe
from world_model.token_world import TokenWorldConfig

DOCUMENT = TokenWorldConfig(
    view="tokens", layout="hires", codes=32, code_width=256, channels=64, halvings=2, blocks=2, attention=(),
    quantizer="ema", follow_every=10, reset_every=500, tokenizer_updates=200, tokenizer_batch=64, tokenizer_lr=3e-4,
    dynamics="block", block_attention="whole", context_frames=9, keep=4, history=4, width=256, layers=10, heads=8,
    dropout=0.1, updates=200, batch_size=8, lr=5e-4, clip=1.0,
)  # fmt: skip
FAST = replace(
    DOCUMENT, codes=64, code_width=8, channels=16, blocks=1, follow_every=1, reset_every=0, contrast=True, local=True,
    tokenizer_updates=50, tokenizer_lr=1e-3, tokenizer_decay=2_000, block_attention="cached", merge=3, refine=2,
    stay=4.0, width=192, layers=4, heads=4, dropout=0.0, updates=900, batch_size=16, lr=1e-3,
)  # fmt: skip
TOY = replace(
    FAST, codes=16, code_width=8, channels=4, blocks=1, tokenizer_updates=20, tokenizer_batch=32, context_frames=8,
    history=3, rollout_steps=3, width=32, layers=2, heads=2, refine=1, updates=20, batch_size=8, lr=1e-3,
)  # fmt: skip
# The codes of a frame are 86,016 numbers at this size: the policy sees the decoded frame instead, as IRIS's does.
MODELS = {"toy": TOY, "xs": FAST, "s": replace(DOCUMENT, view="frame"), "m": replace(DOCUMENT, view="frame")}
POLICIES = {
    "toy": ActorCriticConfig(starts=8, horizon=8, hidden=32, updates=3),
    "xs": ActorCriticConfig(starts=64, horizon=15, updates=40, epochs=4, actor_lr=5e-4, critic_lr=1e-3),
    "s": CnnLstmConfig(),
    "m": CnnLstmConfig(),
}
ROUNDS = TrainConfig(pretrain=0, burn_in=6, at_start=0.0, show_every=1)
SCHEDULES = {
    "toy": replace(ROUNDS, prefill=400, steps_per_round=200, burn_in=4),
    "xs": replace(ROUNDS, prefill=20_000, pretrain=600, steps_per_round=10_000),
    "s": replace(ROUNDS, prefill=5_000, pretrain=4_000, steps_per_round=200, show_every=10),
    "m": replace(ROUNDS, prefill=5_000, pretrain=4_000, steps_per_round=200, show_every=10),
}
STEPS = {"toy": 600, "xs": 100_000, "s": 100_000, "m": 100_000}


@recipe
def spatial(size: str) -> Config:
    """The complete configuration at a size: toy (tests), xs (two CPU cores), s and m (the document's)."""
    return Config(
        recipe="spatial",
        size=size,
        model=MODELS[size],
        policy=POLICIES[size],
        train=SCHEDULES[size],
        game=GameConfig(
            size="48x36" if size == "toy" else "84x64", gray=False, num_envs=8 if size in ("toy", "xs") else 1
        ),
        replay=ReplayConfig(recency=0.25 if size == "xs" else 0.0),
        steps=STEPS[size],
    )
