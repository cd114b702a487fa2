"""The recipe `reverie`, by size, and beside its numbers those of DreamerV3 (Hafner et al. 2023) and STORM.

                      here (xs)     DreamerV3 (2023)         STORM
frames                64x64 RGB     64x64 RGB                64x64 RGB
variables x classes   24 x 32       32 x 32                  32 x 32
memory                GRU 512       GRU 512                  transformer 2 x 512
posterior from        frame         frame and memory         frame
pixel likelihood      sigma 0.15,   sigma 0.71               sigma 0.71
                      foreground x
KL: prior, encoder    1, 0.3        0.5, 0.1 (2024: 1, 0.1)  0.5, 0.1
batch                 12 x 24       16 x 64                  16 x 64
dream                 192 x 12      1024 x 15                1024 x 16
its temperature       0.5           1                        1
entropy, of scaled A  1e-3          3e-4                     3e-4
gamma, lambda         0.985, 0.95   0.997, 0.95              0.985, 0.95
agent steps a round   12            1                        1
"""

from __future__ import annotations

from dataclasses import replace

from agent.replay import ReplayConfig
from agent.trainer import TrainConfig
from envs.games import GameConfig
from policies.actor_critic import ActorCriticConfig
from runs.config import Config
from runs.recipes import recipe
from world_model.reverie import ReverieConfig

MODELS = {
    "toy": ReverieConfig(  # without points, which take longer than a test may
        groups=8, classes=8, points=0, deter=64, hidden=64, channels=16, batch_size=8, length=16, lr=2e-3
    ),
    "xs": ReverieConfig(),
    "s": ReverieConfig(groups=32, deter=768, hidden=384, channels=96, batch_size=16, length=32),
    "m": ReverieConfig(groups=32, deter=1024, hidden=640, channels=128, batch_size=16, length=64),
}
POLICIES = {
    "toy": ActorCriticConfig(starts=64, horizon=10, hidden=64, actor_lr=5e-4, critic_lr=1e-3),
    "xs": ActorCriticConfig(),
    "s": ActorCriticConfig(starts=384, horizon=15, hidden=384),
    "m": ActorCriticConfig(starts=1024, horizon=15, hidden=512),
}
TRAIN = TrainConfig(steps_per_round=12, bursts=0.05)


@recipe
def reverie(size: str) -> Config:
    """The complete configuration at a size: toy (tests), xs (two CPU cores), s, m (GPU)."""
    return Config(
        recipe="reverie",
        size=size,
        model=MODELS[size],
        policy=POLICIES[size],
        train=TRAIN if size != "toy" else replace(TRAIN, prefill=2_000, pretrain=300),
        game=GameConfig(size=64, gray=False, num_envs=8),
        replay=ReplayConfig(recency=0.25),  # a quarter of the segments from what the present policy meets
        steps=250_000,
    )
