"""The recipe `latent_gru`, by size, and beside its numbers those of the Ms. Pac-Man latent GRU.

                         here (xs)                  document (and sizes s, m)
frames                   112x80 RGB                 210x160 RGB
codes                    of a pair of frames, 7x5   of a pair of frames, 7x5 of 256
                         of 256
quantiser                moving means, 0.99; rare   a VQ-VAE's
                         codes must be nearer
dynamics                 GRU of 2 x 256 over the    GRU of 2 x 512 over the places, embeddings of 64
                         places, embeddings of 64,
                         carried from frame
                         to frame; one block of
                         attention over the places
its training             16 segments of 12, of      batch 32, Adam 1e-3; a tenth of it every 30 epochs and
                         which half end with 5      single transitions there, the same rate throughout and
                         frames dreamed by itself   segments of 3 at s, m

The document's grid is written 5x7 there; frames are taller than wide, so that it has 7 rows. It has no rewards, endings
or policy, and no latent says where things stand: the picture is drawn from the last one, real or dreamed. Heads as in
`iris`, the actor-critic of `reverie` on the codes and the GRU's output.
"""

from __future__ import annotations

from dataclasses import replace

from agent.replay import ReplayConfig
from agent.trainer import TrainConfig
from envs.games import GameConfig
from policies.actor_critic import ActorCriticConfig
from runs.config import Config
from runs.recipes import recipe
from world_model.token_world import TokenWorldConfig

DOCUMENT = TokenWorldConfig(
    view="tokens", tokens_of="pair", codes=256, code_width=64, channels=64, halvings=5, quantizer="ema",
    tokenizer_updates=200, tokenizer_batch=64, tokenizer_lr=3e-4, dynamics="gru", context_frames=3, width=512, layers=2,
    rollout_steps=1, rollout_share=0.0, dropout=0.0, updates=200, batch_size=32, lr=1e-3, weight_decay=0.0,
)  # fmt: skip
FAST = replace(
    DOCUMENT, channels=16, halvings=4, contrast=True, rate=1.0, chain=4, tokenizer_updates=100, tokenizer_lr=1e-3,
    tokenizer_decay=2_000, context_frames=12, width=256, recurrent=True, place_attention=1, rollout_steps=5,
    rollout_share=0.5, updates=300, batch_size=16,
)  # fmt: skip
TOY = replace(
    FAST, codes=16, code_width=8, channels=4, halvings=3, chain=2, tokenizer_updates=20, tokenizer_batch=32,
    context_frames=6, width=32, rollout_steps=3, updates=20, batch_size=8,
)  # fmt: skip
MODELS = {"toy": TOY, "xs": FAST, "s": DOCUMENT, "m": DOCUMENT}
POLICIES = {
    "toy": ActorCriticConfig(starts=8, horizon=8, hidden=32, updates=3),
    "xs": ActorCriticConfig(starts=64, horizon=15, updates=300, epochs=4, actor_lr=5e-4, critic_lr=1e-3),
    "s": ActorCriticConfig(starts=512, horizon=15, temperature=1.0, hidden=384, updates=200),
    "m": ActorCriticConfig(starts=512, horizon=15, temperature=1.0, hidden=384, updates=200),
}
ROUNDS = TrainConfig(pretrain=0, burn_in=12, at_start=0.0, show_every=1)
SCHEDULES = {
    "toy": replace(ROUNDS, prefill=400, steps_per_round=200, burn_in=4),
    "xs": replace(ROUNDS, prefill=20_000, pretrain=1_500, steps_per_round=8_000),
    "s": replace(ROUNDS, prefill=5_000, pretrain=4_000, steps_per_round=200, show_every=10),
    "m": replace(ROUNDS, prefill=5_000, pretrain=4_000, steps_per_round=200, show_every=10),
}
SIZES = {"toy": "48x40", "xs": "112x80", "s": "210x160", "m": "210x160"}
STEPS = {"toy": 600, "xs": 100_000, "s": 100_000, "m": 100_000}


@recipe
def latent_gru(size: str) -> Config:
    """The complete configuration at a size: toy (tests), xs (two CPU cores), s and m (the document's)."""
    return Config(
        recipe="latent_gru",
        size=size,
        model=MODELS[size],
        policy=POLICIES[size],
        train=SCHEDULES[size],
        game=GameConfig(size=SIZES[size], gray=False, num_envs=8 if size in ("toy", "xs") else 1),
        replay=ReplayConfig(recency=0.25 if size == "xs" else 0.0),
        steps=STEPS[size],
    )
