"""The recipe `latent_action`, by size, and beside its numbers those of the neural Atari project.

                         here (xs)                  its author's (and sizes s, m)
frames                   112x80 RGB                 210x160 RGB
codes                    of a pair of frames, 7x5   of a pair of frames, 7x5 of 256 of width 128
                         of 256
encoder                  both frames as one picture both as one picture, or stems and 4 layers of attention
                                                    (`model.pair_encoder=cvivit`)
quantiser                moving means, 0.99         by gradient with an entropy weight of 0.1, or moving means
                                                    (`model.quantizer=gradient model.even_scale=0.1`)
decoder                  on the last frame, four    on the last frame
                         in a row on its own
action to latent         convolutions over the last the action and the last two frames
                         two frames, the action at
                         every place

His project has no rewards, endings or policy: heads as in `iris`, the actor-critic of `reverie` on the codes and the
dynamics' output. Few codes for a whole transition (`model.codes=6 model.positions=1`) are actions: see docs.
"""

from __future__ import annotations

from dataclasses import replace

from runs.config import Config
from runs.recipes import latent_gru as alike
from runs.recipes import recipe

AUTHOR = replace(
    alike.DOCUMENT, code_width=128, dynamics="frames", history=2, width=128, layers=2, context_frames=4
)  # fmt: skip
FAST = replace(
    alike.FAST, code_width=128, dynamics="frames", history=2, width=96, layers=2, context_frames=7, recurrent=False,
    rollout_steps=4, batch_size=24,
)  # fmt: skip
TOY = replace(
    alike.TOY, dynamics="frames", history=2, width=32, layers=1, context_frames=4, recurrent=False,
    rollout_steps=2,
)  # fmt: skip
MODELS = {"toy": TOY, "xs": FAST, "s": AUTHOR, "m": AUTHOR}


@recipe
def latent_action(size: str) -> Config:
    """The complete configuration at a size: toy (tests), xs (two CPU cores), s and m (the author's)."""
    same = alike.latent_gru(size)
    return replace(same, recipe="latent_action", model=MODELS[size], train=replace(same.train, burn_in=4))
