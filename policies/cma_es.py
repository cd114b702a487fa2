"""Evolution of a linear controller by CMA-ES (Ha & Schmidhuber 2018, section 2.4 and appendix A.4; Hansen 2016).

Each generation draws P candidates from a Gaussian, plays each of them R times, in the dream or in the real game, and
moves the Gaussian towards the better ones. The algorithm itself is the package `cma`.
Shapes: P candidates, R rollouts of each, H horizon, G generations, n numbers of a controller.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from envs.settings import check, setting
from envs.spec import Spec
from policies.interface import Learner, Rollout, Trajectory, Update
from policies.linear import Linear, Population
from world_model.interface import Metric, Objective

WHERE = ("dream", "real", "both")


METRICS = {
    "fitness": Metric("mean return of a generation's candidates, less the decay", shown="fitness"),
    "fitness_best": Metric("fitness of the best candidate", shown="best"),
    "fitness_std": Metric("standard deviation of the candidates' fitness"),
    "sigma": Metric("step size of CMA-ES"),
    "generation": Metric("generations of this phase"),
}


@dataclass(frozen=True)
class EvolutionConfig:
    """The numbers of the evolution; population, rollouts, sigma and decay are the paper's for CarRacing."""

    where: str = setting(
        "both",
        choices=WHERE,
        resumable=True,
        help="dream, real, or both: in the dream each round, in the real game after the last one",
    )
    population: int = setting(64, 4, help="candidates of a generation (population size)")
    rollouts: int = setting(
        16,
        1,
        resumable=True,
        help="dreams a candidate is judged by, the same ones for all candidates of a generation",
    )
    generations: int = setting(100, 1, resumable=True, help="generations in the dream, a round")
    real_rollouts: int = setting(
        4,
        1,
        10_000,
        resumable=True,
        help="games a candidate is judged by in the real game, where they cost a hundred times as much",
    )
    real_generations: int = setting(
        0, 0, resumable=True, help="generations in the real game: a round with real, after the last round with both"
    )
    sigma: float = setting(0.1, above=0, high=1e3, help="initial standard deviation of the search distribution")
    decay: float = setting(
        0.01, 0, 1e6, help="L2 penalty: weight of the mean squared parameter, subtracted from the fitness"
    )
    diagonal: bool = setting(
        False, help="learn a diagonal covariance; past 2,000 parameters the full matrix is too slow"
    )
    horizon: int = setting(250, 1, 100_000, help="agent steps of a dream")
    temperature: float = setting(1.0, 0, 100, help="sampling temperature of the dream's latents")
    restart: bool = setting(
        True,
        help="dreams, and the real game after dreams, begin with the untrained controller; false: with the last one",
    )
    noise: float = setting(0.1, 0, 10, help="standard deviation of the noise on actions while collecting")

    @property
    def starts(self) -> int:
        """How many states dreams begin from; every candidate begins from all of them."""
        return self.rollouts

    def build(self, features: int, spec: Spec) -> Evolution:
        """The learner for a world model's features and a game's actions.

        Raises ValueError for numbers that make no evolution, and when its candidates would not fit into the memory.
        """
        check(self, "policy.")
        if self.where == "real" and not self.real_generations:
            raise ValueError("policy.real_generations must be at least 1 with policy.where=real, not 0")
        learner = Evolution(self, features, spec)
        _check_memory(self, features, learner.policy.size)
        return learner


class Evolution(Learner):
    """A Gaussian over linear controllers; `policy` is its mean.

    What is saved is not the Gaussian but how it came about: its beginning, the seed of its random numbers and the
    fitness of every candidate since. Asking and telling again leads to the same bits, in plain tensors.
    """

    metrics = METRICS
    logs_each_update = True

    def __init__(self, config: EvolutionConfig, features: int, spec: Spec) -> None:
        super().__init__()
        self.config = config
        self.policy: Linear = Linear(features, spec, config.noise)
        self.where = ""  # the phase under way; "" before the first
        self._start = torch.zeros(0, dtype=torch.float64)  # (n,) the mean a phase began with
        self._seed = 0
        self._fitness: list[Tensor] = []  # (P,) float64 of each generation of the phase
        self._strategy: Any = None  # built when it is first needed: who only plays has no use for it
        self._asked: list[np.ndarray] | None = None  # candidates whose fitness is not known yet

    @property
    def generation(self) -> int:
        """How many generations of this phase are done."""
        return len(self._fitness)

    def objectives(self) -> tuple[Objective, ...]:
        return ()

    def plan(self, *, last: bool, only: str = "") -> tuple[tuple[str, int], ...]:
        config = self.config
        dream, real = ("dream", config.generations), ("real", config.real_generations)
        if only in ("dream", "real"):
            return (dream,) if only == "dream" else (real,)
        if config.where == "real":
            return (real,)
        return (dream, real) if config.where == "both" and last and config.real_generations else (dream,)

    def begin_phase(self, where: str) -> None:
        """A new Gaussian around the present mean: what was learned of the old features' weights is void.

        One that was evolved in a dream may be void as well: it has found what that dream got wrong. Its weights are
        large by then, and around them the real game is flat.
        """
        if self.config.restart and "dream" in (where, self.where):
            self.policy.load_flat(torch.zeros(self.policy.size))
        self.where = where
        self._begin_around_mean()

    def _begin_around_mean(self) -> None:
        self._fitness, self._strategy, self._asked = [], None, None
        self._start = self.policy.flat().cpu().double()
        self._seed = int(torch.randint(2**62, ()))  # from the default generator, so that the run's seed decides

    @torch.no_grad()
    def improve(self, rollout: Rollout, update: Update) -> dict[str, Tensor]:
        """One generation. Fitness: the mean return of a candidate's rollouts, less the decay.

        Raises ArithmeticError when a return is not finite.
        """
        if not len(self._start):
            self.begin_phase("dream")
        strategy = self._distribution()
        # Kept until they are judged: when a rollout fails, the next attempt must be of the same candidates.
        self._asked = strategy.ask() if self._asked is None else self._asked
        candidates = torch.from_numpy(np.stack(self._asked))  # (P, n) float64
        dream = rollout(Population(self.policy, candidates))
        returns = total_rewards(dream).view(len(candidates), -1).mean(1).cpu()
        fitness = returns - self.config.decay * candidates.square().mean(1)
        if not fitness.isfinite().all():
            raise ArithmeticError("The return of a candidate became infinite or not a number.")
        self._tell(strategy, self._asked, fitness)
        self._fitness.append(fitness)
        self._asked = None
        self.policy.load_flat(torch.from_numpy(strategy.mean))
        metrics = {
            "fitness": fitness.mean(),
            "fitness_best": fitness.max(),
            "fitness_std": fitness.std(correction=0),
            "sigma": strategy.sigma,
            "generation": self.generation,
        }
        like = self.policy.weight
        return {name: torch.as_tensor(value, dtype=like.dtype, device=like.device) for name, value in metrics.items()}

    def get_extra_state(self) -> dict[str, Any]:
        """What the Gaussian can be rebuilt from; fitness is (G, P)."""
        fitness = torch.stack(self._fitness) if self._fitness else torch.zeros(0, self.config.population)
        return {"where": self.where, "start": self._start, "seed": self._seed, "fitness": fitness}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Goes back to a `get_extra_state`."""
        self.where, self._seed, self._start = state["where"], state["seed"], state["start"].cpu().clone()
        self._fitness = list(state["fitness"].cpu().double().clone())
        self._strategy, self._asked = None, None

    # ---- the package ----
    def _distribution(self) -> Any:
        """The Gaussian under way: at a phase's beginning a new one, after loading the one that was saved."""
        if self._strategy is None:
            self._strategy = self._new()
            for fitness in self._fitness:
                self._tell(self._strategy, self._strategy.ask(), fitness)
            mean = self.policy.flat().cpu().double()
            if not np.allclose(self._strategy.mean, mean, rtol=1e-5, atol=1e-3 * self._strategy.sigma):
                # Another version of the package, or another processor's eigenvectors.
                warnings.warn("The evolution cannot be rebuilt here as it was saved: it begins anew around its mean.",
                              stacklevel=2)  # fmt: skip
                self._begin_around_mean()
                self._strategy = self._new()
        return self._strategy

    def _new(self) -> Any:
        from cma import CMAEvolutionStrategy  # type: ignore[import-untyped]  # late: a third of a second

        generator = np.random.default_rng(self._seed)
        options = {
            "popsize": self.config.population,
            "CMA_diagonal": self.config.diagonal,
            "randn": lambda *shape: generator.standard_normal(shape),
            "seed": np.nan,  # leave numpy's global generator alone
            "verbose": -9,
        }
        return CMAEvolutionStrategy(self._start.numpy(), self.config.sigma, options)

    @staticmethod
    def _tell(strategy: Any, candidates: list[np.ndarray], fitness: Tensor) -> None:
        strategy.tell(candidates, (-fitness).tolist())  # the package minimises


def total_rewards(dream: Trajectory) -> Tensor:
    """The expected sum of rewards of each row, (B, H) -> (B,) float64: what follows a likely end counts less."""
    cont = dream.cont.double()
    return (dream.reward.double() * dream._replace(cont=cont).mask("alive")).sum(1)


def needed_memory(config: EvolutionConfig, features: int, size: int) -> int:
    """About how many bytes a generation takes: `size` numbers a controller, all candidates dreaming side by side."""
    rows = config.population * config.rollouts
    # A world model's step holds some 16 tensors as large as its features; reward and continuation are kept throughout.
    dreams = rows * 4 * (16 * features + 2 * config.horizon)
    candidates = config.population * size * (8 + 8 + 4)
    matrices = 0 if config.diagonal else 4 * 8 * size**2  # covariance, eigenvectors, and both once more at work
    return dreams + candidates + matrices


def _check_memory(config: EvolutionConfig, features: int, size: int) -> None:
    needed, free = needed_memory(config, features, size), _free_memory()
    if needed > free:
        dense = "" if config.diagonal else ", or policy.diagonal=true"
        raise ValueError(
            f"{config.population} candidates of {size} numbers with {config.rollouts} rollouts each need about "
            f"{needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; "
            f"choose a smaller policy.population or policy.rollouts{dense}"
        )


def _free_memory() -> int:
    """Bytes that could be had without swapping; all there are where the system does not tell."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
