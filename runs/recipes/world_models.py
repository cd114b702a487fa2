"""The recipe `world_models`, by size, and beside its numbers those of Ha & Schmidhuber 2018 for CarRacing.

                         here (xs)                paper (and sizes s, m)
frames                   64x64 RGB                64x64 RGB
agent steps              4 frames each            1 frame each
experience               random, then by C        10,000 random episodes
vision                   ConvVAE, z 32            ConvVAE, z 32: 4,348,547 parameters
its loss                 squared error + KL, floor 0.5 nats a dimension
memory                   LSTM 256, 5 Gaussians    LSTM 256, 5 Gaussians: 422,368 parameters
its heads                reward, continuation     none (CarRacing)
controller               linear: 867 parameters   linear: 867 parameters
CMA-ES: population       64                       64
episodes a candidate     16 dreams, 1 track       16 tracks
first sigma, L2 decay    0.1, 0.01                0.1, 0.01
where                    dream, then real game    real game
dream's temperature      1.15                     1.15 (Doom)
rounds                   11: 10,000 steps, then   1
                         8,000 more each time

Rounds are short because a dream made of random driving alone deceives: what is evolved in it does not move in the
real game, and the next round has seen that. Each dream begins with the untrained controller, and so does the real game
after them. A candidate's fitness is the mean return of the same dreams or tracks for the whole population.

`world_models_ac` puts the actor-critic of `reverie` in the controller's place: on the same latents and memory, a round
of 750 updates, in dreams of 15 steps that are too short to deceive it for long.
"""

from __future__ import annotations

from dataclasses import replace

from agent.replay import ReplayConfig
from agent.trainer import TrainConfig
from envs.games import GameConfig
from policies.actor_critic import ActorCriticConfig
from policies.cma_es import EvolutionConfig
from runs.config import Config
from runs.recipes import recipe
from world_model.world_models import WorldModelsConfig

TOY = WorldModelsConfig(
    z=8, channels=4, hidden=32, mixtures=2, heads=16, vision_updates=20, vision_batch=32, vision_lr=1e-3,
    memory_updates=20, memory_batch=8, memory_length=8,
)  # fmt: skip
PAPER = WorldModelsConfig(vision_updates=1_000_000, memory_updates=4_000, memory_batch=100, memory_length=999)
FAST = WorldModelsConfig(vision_updates=600, vision_batch=32, vision_lr=1e-3, memory_updates=2_000)
MODELS = {"toy": TOY, "xs": FAST, "s": PAPER, "m": PAPER}
POLICIES = {
    "toy": EvolutionConfig(population=8, rollouts=4, real_rollouts=2, generations=3, horizon=8, where="dream"),
    "xs": EvolutionConfig(generations=60, temperature=1.15, where="both", real_rollouts=1, real_generations=40),
    "s": EvolutionConfig(where="real", real_rollouts=16, real_generations=1_800),
    "m": EvolutionConfig(where="real", real_rollouts=16, real_generations=1_800),
}
ROUNDS = TrainConfig(pretrain=0, burn_in=8, show_every=1)
SCHEDULES = {
    "toy": replace(ROUNDS, prefill=400, steps_per_round=200),
    "xs": replace(ROUNDS, prefill=10_000, steps_per_round=8_000, pretrain=1_000),
    "s": replace(ROUNDS, prefill=10_000_000),
    "m": replace(ROUNDS, prefill=10_000_000),
}
ACTOR_CRITICS = {
    "toy": ActorCriticConfig(starts=8, horizon=8, hidden=32, updates=3),
    "xs": ActorCriticConfig(starts=128, horizon=15, temperature=1.0, minibatches=2, updates=750),
    "s": ActorCriticConfig(starts=512, horizon=15, temperature=1.0, hidden=384, updates=2_000),
    "m": ActorCriticConfig(starts=1024, horizon=15, temperature=1.0, hidden=512, updates=4_000),
}
STEPS = {"toy": 600, "xs": 90_000, "s": 10_000_000, "m": 10_000_000}


@recipe
def world_models(size: str) -> Config:
    """The complete configuration at a size: toy (tests), xs (two CPU cores), s and m (the paper's)."""
    return Config(
        recipe="world_models",
        size=size,
        model=MODELS[size],
        policy=POLICIES[size],
        train=SCHEDULES[size],
        env="CarRacing-v3",
        game=GameConfig(size=64, gray=False, num_envs=8, action_repeat=4 if size == "xs" else None),
        replay=ReplayConfig(recency=0.0 if size in ("s", "m") else 0.5, recent_steps=20_000),
        steps=STEPS[size],
    )


@recipe
def world_models_ac(size: str) -> Config:
    """The same world model and rounds with an actor-critic instead of the evolved linear controller."""
    alike = world_models("toy" if size == "toy" else "xs")  # one round on random driving alone would not do here
    train = replace(alike.train, at_start=0.0)  # 15 steps from the start line are all alike
    return replace(alike, recipe="world_models_ac", size=size, policy=ACTOR_CRITICS[size], train=train)
