"""An episode's seed comes from the run's seed, its purpose and its number.

Nothing is judged on what was trained on: what is played for another purpose than collecting begins at another seed.
"""

from __future__ import annotations

import numpy as np

# Added to the run's seed:
EVALUATION_SEED = 10_000_000
TRACK_SEED = 40_000_000  # of the games that judge a population
# The same for all runs:
SUITE_SEED = 20_000_000
CLOCK_SEED = 30_000_000


def episode_seed(seed: int, number: int) -> int:
    """The seed of the `number`-th episode, in [0, 2**31)."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0]) & 0x7FFFFFFF


def evaluation_seed(seed: int, number: int) -> int:
    """The seed of the `number`-th episode by which a run is judged, which it never learns from."""
    return episode_seed(seed + EVALUATION_SEED, number)
