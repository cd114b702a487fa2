"""The recipes `iris` and `iris_ac`, by size, and beside their numbers those of Micheli et al. 2023 for Atari 100k.

                         here (xs)                  paper (and sizes s, m)
frames                   64x64 RGB                  64x64 RGB
tokens a frame           4x4 of 4,096               4x4 of 512
their quantiser          finite scalar, 8^4         gradient codebook of width 512, commitment 1
tokenizer's network      patches of 8, 64 channels, 64 channels at every resolution: 4,027,523 parameters
                         each token's 16x16 pixels
                         seen by themselves
its loss                 squares, weighted by the   L1 + LPIPS; here, where its network is no part of the
                         distance to the background program, the weighted squares of xs (perceptual=lpips)
its batch                64                         256
transformer              4 x 128, 8 frames          10 x 256, 20 frames, dropout 0.1: 8,448,005 parameters
its batch                32 x 8                     64 x 20
policy (iris)            CNN-LSTM, a quarter as     CNN-LSTM: 3,218,983 parameters
                         wide
dreams an update         64 x 15                    64 x 20
agent steps a round      8,000                      200
updates a round          300, 1,600, 60             200 of each
agent steps              120,000                    100,000

At xs the tokenizer has learned nearly all it will before the first round. While it moves, the transformer learns a
language that changes, and its dreams lose the ball; so its rate falls over time, and the transformer gets most of a
round. It must not be frozen either: a policy that learns to return the ball reaches states that random play has not
shown. Few dimensions of many levels keep the ball sooner than many of few.

`iris_ac` puts the actor-critic of `reverie` in the policy's place. It sees the codes of a frame's tokens and the
transformer's output instead of the decoded frame, so that nothing is decoded in a dream. A dream of xs takes far longer
than the gradient steps on it, so the policy passes over each four times. It learns from rewards in the game's units,
the CNN-LSTM from their signs, as published.

At xs it also has other dynamics, since dreams are what it costs: all tokens of a frame in one pass (`model.dynamics`,
see `runs/recipes/spatial.py`), and so 8x8 tokens of 512 instead of 4x4 of 4,096; 4 x 192 over 4x4 places; a round is
100 updates of the tokenizer, 400 of the transformer in batches of 32 x 9, and 320 of the policy.
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

TOY = TokenWorldConfig(
    codes=32, code_width=16, channels=8, halvings=1, blocks=1, attention=(1,), patch=16, tokenizer_updates=20,
    tokenizer_batch=32, tokenizer_lr=1e-3, context_frames=8, keep=2, width=32, layers=2, heads=2, dropout=0.0,
    updates=20, batch_size=8, lr=1e-3,
)  # fmt: skip
FAST = TokenWorldConfig(
    codes=4096, code_width=64, halvings=1, blocks=1, attention=(), patch=8, local=True, quantizer="fsq",
    levels=(8, 8, 8, 8), contrast=True,
    tokenizer_updates=300, tokenizer_batch=64, tokenizer_lr=1e-3, tokenizer_decay=2_000,
    context_frames=8, keep=4, width=128, layers=4, dropout=0.0, updates=1600, batch_size=32, lr=5e-4,
)  # fmt: skip
# Dreams are what this costs, and one pass a frame dreams 64 tokens for less than 17 passes dream 16.
FAST_BLOCK = replace(
    FAST, view="tokens", codes=512, patch=4, levels=(8, 8, 8), tokenizer_updates=100, dynamics="block",
    context_frames=9, history=4, merge=2, refine=2, stay=4.0, width=192, updates=400, lr=1e-3,
)  # fmt: skip
PAPER = TokenWorldConfig()
MODELS = {"toy": TOY, "xs": FAST, "s": PAPER, "m": PAPER}
POLICIES = {
    "toy": CnnLstmConfig(starts=8, horizon=8, channels=(4, 4, 8, 8), hidden=32, updates=3),
    "xs": CnnLstmConfig(horizon=15, channels=(16, 16, 32, 32), hidden=128, updates=60, lr=3e-4),
    "s": CnnLstmConfig(),
    "m": CnnLstmConfig(),
}
ACTOR_CRITICS = {
    "toy": ActorCriticConfig(starts=8, horizon=8, hidden=32, updates=3),
    # Dreams are dear here, so the policy takes more and larger steps on each than reverie's.
    "xs": ActorCriticConfig(starts=64, horizon=15, updates=320, epochs=4, actor_lr=5e-4, critic_lr=1e-3),
    "s": ActorCriticConfig(starts=512, horizon=15, temperature=1.0, hidden=384, updates=200),
    "m": ActorCriticConfig(starts=512, horizon=15, temperature=1.0, hidden=384, updates=200),
}
ROUNDS = TrainConfig(pretrain=0, burn_in=20, at_start=0.0, show_every=10)
SCHEDULES = {
    "toy": replace(ROUNDS, prefill=400, steps_per_round=200, burn_in=4, show_every=1),
    "xs": replace(ROUNDS, prefill=40_000, pretrain=10_000, steps_per_round=8_000, burn_in=6, show_every=1),
    "s": replace(ROUNDS, prefill=5_000, pretrain=4_000, steps_per_round=200),
    "m": replace(ROUNDS, prefill=5_000, pretrain=4_000, steps_per_round=200),
}
STEPS = {"toy": 600, "xs": 120_000, "s": 100_000, "m": 100_000}


@recipe
def iris(size: str) -> Config:
    """The complete configuration at a size: toy (tests), xs (two CPU cores), s and m (the paper's)."""
    return Config(
        recipe="iris",
        size=size,
        model=MODELS[size],
        policy=POLICIES[size],
        train=SCHEDULES[size],
        game=GameConfig(size=64, gray=False, num_envs=8 if size in ("toy", "xs") else 1),
        replay=ReplayConfig(recency=0.25 if size == "xs" else 0.0),
        steps=STEPS[size],
    )


@recipe
def iris_ac(size: str) -> Config:
    """The same world model and rounds with an actor-critic on the tokens."""
    alike = iris(size)
    model = FAST_BLOCK if size == "xs" else replace(alike.model, view="tokens")
    train = replace(alike.train, pretrain=2_000) if size == "xs" else alike.train
    return replace(alike, recipe="iris_ac", model=model, policy=ACTOR_CRITICS[size], train=train)
