"""The loop: collect, train the world model, train the policy in its dream, again and again. One class.

Shapes: B segments, T indices, S states.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agent.collector import Collector
from agent.context import Context, ImaginationConfig, Logger, Screen
from agent.dream_video import Diagnostics, fixed_frames, no_diagnostics, reconstruct, show_dream
from agent.interrupt import deferred
from agent.player import Agent, Player
from agent.real_game import RealGame
from agent.replay import Replay
from agent.seeds import episode_seed
from agent.team import PeerLost, Team
from agent.trainer import TrainConfig, Trainer
from envs.episode import Episode
from envs.errors import UserError
from envs.games import GameFailed, Games
from policies.imagination import imagine
from policies.interface import Learner, Policy, Rollout, Trajectory
from world_model import trees
from world_model.interface import Batch, Metric, Stage, State, to_unit
from world_model.trees import Tree

PLACES = ("dream", "real")  # where a policy learns
STARTS, CONTEXT = 32, 9  # real contexts in a checkpoint, and the frames of each: 3.5 MB at 64x64 RGB
FEWEST = 16  # contexts drawn at least, lest all of a few happen to be where a game has ended
PART = 512  # agent steps played, or frames encoded, without asking whether to stop
NO_STARTS = "policy.starts must be at least 1: this recipe draws the states that dreams begin from."
METRICS = {  # of what the loop itself logs
    "episode/return": Metric("return of the games that ended, in the game's own units"),
    "rounds": Metric("rounds so far: play, then updates; in reverie one update of world model and policy each"),
    "real/generations": Metric("populations only: generations judged in the real game"),
    "real/episodes": Metric("populations only: games played for fitness alone"),
    "real/steps": Metric("populations only: agent steps of these games, which are not among the run's"),
    "memory_gb": Metric("peak resident memory of the process, GiB"),
}


def start_contexts(replay: Replay) -> dict[str, torch.Tensor]:
    """Contexts of real play that a dream can go on from without the game: up to STARTS of CONTEXT frames.

    frame (S, T, C, H, W) uint8 and action (S, T - 1[, A]), of one frame each, a game's first, while no episode is as
    long; empty before the first episode. The replay's own random numbers are left as they were.
    """
    if not replay.frames("train"):
        return {}
    before, replay.rng = replay.rng, np.random.default_rng(replay.steps)
    try:
        batch = replay.sample(2 * STARTS, CONTEXT)
        if not batch.has_action.all(1).any():
            batch = replay.sample(2 * STARTS, 1, first=True)
    finally:
        replay.rng = before
    usable = batch.has_action.all(1)  # no dream goes on from where a game has ended
    return {"frame": batch.frame[usable][:STARTS].clone(), "action": batch.action[usable, :-1][:STARTS].clone()}


def declared_metrics(stages: Sequence[Stage], learner: Learner) -> dict[str, Metric]:
    """What every number means that a run of these logs, by its logged name."""
    known = METRICS | {f"policy/{name}": metric for name, metric in learner.metrics.items()}
    for objective in (*(one for stage in stages for one in stage.objectives), *learner.objectives()):
        known |= {f"{objective.name}/{name}": metric for name, metric in objective.metrics.items()}
        known[f"{objective.name}/grad_norm"] = Metric("norm of the gradient before clipping")
    return known


class Loop:
    """One run in memory: everything that plays and trains, when, and how it is saved.

    A round of the loop is: play, each stage of the world model for its updates, then the policy's plan. `reverie` has
    thousands of rounds of one update each, World Models has a few rounds of thousands. A round that was stopped goes on
    where it was: `done` holds how much of each of its parts is behind us. Without a policy (`train.policy`) its plan is
    empty, and random play collects.
    """

    def __init__(
        self, agent: Agent, games: Games, replay: Replay, *, config: TrainConfig, dreams: ImaginationConfig, seed: int,
        real: RealGame | None = None, diagnostics: Diagnostics = no_diagnostics, team: Team | None = None,
    ) -> None:  # fmt: skip
        self.team = team or Team()
        self.agent, self.replay, self.config, self.dreams, self.real = agent, replay, config, dreams, real
        self.diagnostics, self.seed = diagnostics, seed
        self.collector = Collector(games, replay, Player(agent), seed=seed, bursts=config.bursts)
        self.stages = agent.world_model.stages()
        objectives = [objective for stage in self.stages for objective in stage.objectives]
        objectives += agent.learner.objectives()
        trained = {id(parameter) for objective in objectives for parameter in objective.params}
        every = [*agent.parameters(), *agent.buffers()]
        self.trainer = Trainer(
            objectives, device=agent.device, precision=config.precision, compile=config.compile, team=self.team,
            cuda_graphs=config.cuda_graphs,
            shared=[tensor for tensor in every if id(tensor) not in trained],
        )  # fmt: skip
        self.metrics = declared_metrics(self.stages, agent.learner)
        self.returns: list[float] = []  # of episodes since the last log
        self.rounds = 0  # rounds that are behind us
        self.ahead = 0  # agent steps that were played before they were due
        self.waiting = 0  # recorded agent steps that no round has taken yet; see `take`
        self.others = 0  # agent steps that the other processes of a team have played
        self.done: dict[str, int] = {}  # of the round under way
        self.posterior: State | None = None  # states that its last update passed through, if told
        self.only = ""  # the one part that is done instead of a round
        self.last = ("", 0)  # the part that was done last, and how often: more of it may be asked for later
        self.fixed = torch.zeros(0, dtype=torch.uint8)  # frames that are reconstructed over training, once chosen
        self._codes: dict[str, tuple[tuple[int, ...], dict[int, np.ndarray]]] = {}  # see `encoded`
        self._saved = 0.0

    @property
    def parts(self) -> tuple[str, ...]:
        """What a round consists of, by name."""
        places = ("dream", *(("real",) if self.real else ())) if self.config.policy else ()
        return ("collect", *(stage.name for stage in self.stages), *places)

    @property
    def long_rounds(self) -> bool:
        """Whether a round takes more than one update of a stage, and so minutes."""
        return any(stage.updates > 1 for stage in self.stages)

    @property
    def step(self) -> int:
        """How far the run is, in agent steps of all processes: what was played, and what rounds took of records."""
        return self.replay.steps - self.waiting + self.others

    def take(self, *folders: Path, human: bool = False) -> int:
        """Adds recorded episodes, with `human` those that a person played in this run; returns how many were new.

        For a policy they are known before it plays its first step. A world model alone need not play: what lies beyond
        the prefill waits until the rounds take it in the place of play.
        """
        before = self.step
        taken = self.replay.take_in(*folders) if human else self.replay.take_over(*folders)
        if not self.config.policy:
            self.waiting = self.replay.steps - max(before, min(self.config.prefill, self.replay.steps))
        return taken

    def train(self, steps: int, run: Logger, screen: Screen, only: str = "") -> None:
        """Runs until `steps` agent steps have been played or taken and what they allow has been learned.

        With `only` one part of a round is done once more instead. Ctrl-C or SIGTERM ends the update under way, saves a
        checkpoint and raises KeyboardInterrupt; so does a game that fails (GameFailed), whose open episodes are left
        out, and another process of a team that has ended (PeerLost). Raises UserError for an unknown part, or in the
        middle of another.
        """
        self.choose(only, steps)
        with deferred() as asked:

            def asked_to_stop() -> bool:
                return self.team.any(asked())

            self.team.share([*self.agent.parameters(), *self.agent.buffers()])
            context = Context(run, screen, asked_to_stop)
            self._saved = time.monotonic()
            if self.real:
                self.real.stop = asked
            if not any(self.trainer.updates.values()):
                self.save(run)  # what is killed before its first update can be gone on with too
            try:
                self.prefill(run, screen, asked_to_stop, steps)
                while not asked_to_stop() and (self.only if only else self.due(steps)):
                    self._round(steps, context)
            except GameFailed:  # what was learned until then is no worse for it
                self.collector.abandon()
                self.save(run)
                raise
            except PeerLost:  # before the gradients of the update under way were applied
                self.save(run)
                raise
            screen.phase("checkpoint")
            self.save(run)
            if asked_to_stop():
                raise KeyboardInterrupt

    @property
    def first_updates(self) -> int:
        """Updates of the first stage, which learns to see, so far."""
        return self.trainer.updates[self.stages[0].objectives[0].name]

    # ---- a round ----
    def due(self, steps: int) -> bool:
        """Whether a run of so many agent steps has something left to do."""
        return bool(self.done or not self.rounds or self.step < steps or self.only)

    def choose(self, only: str, steps: int) -> None:
        """The one part that `train` is to do once more, if any.

        A run with nothing left to do goes on with the part it ended with, if that is by now to have more updates or
        generations than it had. Raises UserError for an unknown part, or in the middle of another.
        """
        if only and only not in self.parts:
            raise UserError(f'Unknown part only="{only}": choose one of {", ".join(self.parts)}.')
        if only and self.done and only != self.only:
            raise UserError(
                f"The run was stopped within a round, at {', '.join(self.done)}: finish it first, without only=."
            )
        if only and not self._count(only):
            raise UserError(f"only={only} has nothing to do: the run asks for no updates or generations of it.")
        self.only = only or self.only
        part, done = self.last
        if done and not self.due(steps) and self._count(part) > done:
            self.only, self.done = part, {part: done}

    def _count(self, only: str) -> int:
        """How often a part is repeated in a round that is for it alone."""
        known = {stage.name: stage.updates for stage in self.stages}
        return (known | dict(self.agent.learner.plan(last=False, only=only))).get(only, 1)

    def _save_is_due(self) -> bool:
        return time.monotonic() - self._saved > self.config.save_every

    def _round(self, steps: int, context: Context) -> None:
        """One round, or what is left of one; returns early when asked to stop in the middle of a long part."""
        screen = context.screen
        screen.update(self.step, rounds=self.rounds)
        if not self.done:  # one rate for a round, also for one that was stopped and goes on
            self.trainer.cool(self._cooled(steps))
        # The first round learns from the prefill.
        each = self.team.part(self.config.steps_per_round)
        parts = -(-each // PART) if self.rounds or self.only else 0
        # What the player remembers is told by weights that many updates have left behind: after the pretraining, and
        # after every round of a system that learns in long ones. `reverie` takes one small step a round, and a
        # burn-in would cost four times as much as the acting.
        if parts and self.config.policy and not self.done and (self.long_rounds or self.rounds == 1):
            self.collector.burn_in(self.config.burn_in)

        def play() -> None:  # never more than the run was asked for, whatever a round takes
            size = min(PART, each - self.done.get("collect", 0) * PART)
            due = max(0, steps - self.step + self.ahead * self.team.size)
            left = size if self.only else min(size, self.team.part(due))
            self.collect(left, screen, at_random=not self.config.policy)

        if not self._repeat("collect", parts, play, context):
            return
        for stage in self.stages:
            screen.phase(stage.name.replace("_", " "))
            due = self.done.get(stage.name, 0) < stage.updates and self.only in ("", stage.name)
            encoded = self.encoded(stage) if due else []

            def learn(stage: Stage = stage, encoded: Sequence[np.ndarray] = encoded) -> None:
                self.posterior = self.train_world_model(stage, encoded)
                if stage is self.stages[0]:
                    self._reconstruct_early(context.run)

            if not self._repeat(stage.name, stage.updates, learn, context):
                return
        for where, count in self.agent.learner.plan(last=self.step >= steps, only=self.only):
            screen.phase("policy" if where == "dream" else f"policy in the {where} game")
            if where not in self.done and self.only in ("", where):
                self.agent.learner.begin_phase(where)
                self.done[where] = 0

            def improve(where: str = where) -> None:
                self.train_policy(self.posterior, where)

            if not self._repeat(where, count, improve, context):
                return
        self.rounds += not self.only
        self.last = list(self.done.items())[-1] if self.done else self.last
        self.done, self.only, self.posterior = {}, "", None
        self.team.share(self.trainer.shared)
        self._tell(context)

    def _cooled(self, steps: int) -> float:
        """The share of the learning rates that is left at this point of so many agent steps (`train.cooldown`).

        All of it in the first round, which may be the only one, and for a part that is done once more.
        """
        last = self.config.cooldown * steps
        return min(1.0, max(0.0, steps - self.step) / last) if last and self.rounds and not self.only else 1.0

    def _repeat(self, part: str, count: int, work: Callable[[], None], context: Context) -> bool:
        """Works until this part of the round has been done `count` times; False when asked to stop before."""
        for done in range(self.done.get(part, 0), count if self.only in ("", part) else 0):
            if count > 1 and context.asked_to_stop():
                return False
            work()
            self.done[part] = done + 1
            if count == 1:
                continue
            context.screen.update(self.step, **{part: f"{done + 1:,} of {count:,}"})
            if part == "collect":
                continue
            generation = part in PLACES and self.agent.learner.logs_each_update
            if generation or (done + 1) % self.config.log_every == 0:
                self._log(context)
            if generation or self._save_is_due():
                self.save(context.run)
        context.screen.update(self.step, **{part: None})
        return True

    def prefill(
        self, run: Logger, screen: Screen, asked_to_stop: Callable[[], bool] = lambda: False, steps: int = 2**62
    ) -> None:
        """Random play, one look at it, and the world model's first updates; goes on where a stopped run had come to.

        Episodes in progress are lost where a game fails or is no function of its seed: then a resumed run plays at
        random once more, within its `steps`, lest thousands of updates be made on the little that is left.
        """
        whole = self.config.prefill

        def missing() -> int:
            lost = self.replay.short_of(whole) if self.team.size == 1 else 0
            return max(whole - self.replay.steps - self.others, min(lost, steps - self.step))

        while (left := missing()) > 0 and not asked_to_stop():
            screen.update(self.step, random_play=f"{whole - left:,} of {whole:,}")
            self.collect(min(PART, self.team.part(left)), screen, at_random=True)
            if self._save_is_due():
                self.save(run)  # a slow game takes minutes for it
        if left > 0:
            return
        screen.update(self.step, random_play=None)
        pretrained = self.first_updates
        if not pretrained:
            batch = self.replay.sample(64, 16)
            self.agent.world_model.prepare(to_unit(batch.frame[batch.valid].to(self.agent.device)))
            self.team.share(self.trainer.shared)
        screen.phase("pretraining")
        for done in range(pretrained, self.config.pretrain):
            if asked_to_stop():
                return
            self.train_world_model()
            self._reconstruct_early(run)
            screen.update(self.step, pretraining=f"{done + 1} of {self.config.pretrain}")
            if (done + 1) % self.config.log_every == 0:
                run.log(self.step, self.trainer.report())
            if self._save_is_due():
                self.save(run)
        screen.update(self.step, pretraining=None)

    # ---- one piece of work ----
    def collect(self, steps: int, screen: Screen, *, at_random: bool = False) -> None:
        """Plays the real game, once no recorded step waits.

        All games play a step at once: what is played beyond `steps` is played ahead.
        """
        screen.phase("collect")
        taken = min(steps, self.waiting)
        self.waiting -= taken
        before, owed = self.replay.steps, steps - taken - self.ahead
        for episode in self.collector.collect(owed, at_random=at_random) if owed > 0 else ():
            self.returns.append(episode.score)
            screen.episode(episode.score, len(episode))
        self.ahead = self.replay.steps - before - owed
        self.others += (self.replay.steps - before) * (self.team.size - 1)
        screen.update(self.step)

    def train_world_model(self, stage: Stage | None = None, encoded: Sequence[np.ndarray] = ()) -> State | None:
        """One update of a stage (the first one); the posterior states (S, ...) it passed through, if it tells them."""
        stage = stage or self.stages[0]
        batch = self.replay.sample(stage.batch_size, stage.length, encoded=encoded)

        def learn(batch: Batch) -> State | None:
            return [self.trainer.update(objective, batch) for objective in stage.objectives][-1].states

        states = self.trainer.run(stage.name, learn, batch, record=self.agent.world_model.updates_are_graph_safe)
        return None if states is None else self._usable(states, batch)

    def train_policy(self, states: State | None = None, where: str = "dream") -> None:
        """One improvement, in the dream from a random choice of the states (S, ...), or in the real game."""
        if where == "real":
            if self.real is None:
                raise ValueError("this loop was built without workers for the real game")
            self._improve(self.real.rollout(self.agent, version=sum(self.trainer.updates.values())))
        else:
            model, learner = self.agent.world_model, self.agent.learner
            self.trainer.run(
                "policy", lambda begun: self._improve(self._dream(*begun)), self._dream_starts(states),
                record=model.dreams_are_graph_safe and learner.updates_are_graph_safe,
            )  # fmt: skip

    def _improve(self, rollout: Rollout) -> None:
        with self.trainer.mixed():
            metrics = self.agent.learner.improve(rollout, self.trainer.update)
        self.trainer.note({f"policy/{key}": value for key, value in metrics.items()})

    def _dream_starts(self, states: State | None) -> tuple[State, Tree]:
        """Where dreams begin, and the policy's memory there: () when it remembers nothing."""
        dreams, model, policy = self.dreams, self.agent.world_model, self.agent.learner.policy
        if states is None or policy.is_recurrent:  # what the policy remembers, only a context of its own can tell
            return self._begun(dreams.starts or (self._states_of_an_update() if model.gives_states else 0))
        told, device = len(states.latent), self.agent.device
        if not dreams.starts or dreams.starts == told:
            return states, ()
        if dreams.starts < told:
            return trees.rows(states, torch.randperm(told, device=device)[: dreams.starts]), ()
        if not self.trainer.cuda_graphs:
            return states, ()
        # Where games ended within the segments there are fewer. Some twice then: a recording is of one shape.
        again = torch.randint(told, (dreams.starts - told,), device=device)
        return trees.rows(states, torch.cat([torch.arange(told, device=device), again])), ()

    def _dream(self, states: State, known: Tree) -> Rollout:
        dreams, model = self.dreams, self.agent.world_model
        memory = known if self.agent.learner.policy.is_recurrent else None

        def rollout(policy: Policy) -> Trajectory:
            # A population's views would fill gigabytes, and it learns from returns alone.
            every, seen = states, policy.population_size == 1
            if not seen:
                every = trees.map(lambda leaf: leaf.repeat(policy.population_size, *[1] * (leaf.dim() - 1)), states)
            return imagine(
                model, policy, every, horizon=dreams.horizon, temperature=dreams.temperature, keep_views=seen,
                memory=memory,
            )  # fmt: skip

        return rollout

    # ---- where dreams begin ----
    def _states_of_an_update(self) -> int:
        """How many states an update of the world model passes through that a dream can begin from."""
        stage = self.stages[0]
        return stage.batch_size * (stage.length - self.config.burn_in)

    def states(self, count: int) -> State:
        """`count` states of real play: `train.at_start` of them first ones, the others known from what came before.

        Raises UserError when `count` is 0.
        """
        return self._begun(count)[0]

    @torch.no_grad()
    def _begun(self, count: int) -> tuple[State, Tree]:
        """`states`, and the policy's memory before each of them; () when it remembers nothing."""
        if not count:
            raise UserError(NO_STARTS)
        first, length = round(self.config.at_start * count), self.config.burn_in + 1
        parts = []
        with self.trainer.mixed():
            if first:
                parts.append(self._followed(self.replay.sample(first, 1, first=True)))
            if count > first:
                batch = self.replay.sample(max(FEWEST, count - first), length)
                # No dream goes on from where a game has ended.
                usable = batch.has_action.all(1).nonzero()[: count - first, 0]
                if len(usable):
                    known = self._followed(batch.rows(usable))
                    parts.append(trees.rows(known, torch.arange(count - first, device=self.agent.device) % len(usable)))
                else:  # all episodes are shorter than the burn-in: before their first frames there was nothing
                    parts.append(self._followed(self.replay.sample(count - first, 1, first=True)))
        return trees.concat(*parts)  # type: ignore[no-any-return]

    def _followed(self, batch: Batch) -> tuple[State, Tree]:
        """The states (B, ...) at the end of real contexts, and the policy's memory before them; see `Player.act`."""
        model, policy, batch = self.agent.world_model, self.agent.learner.policy, batch.to(self.agent.device)
        frame = to_unit(batch.frame)
        if not policy.is_recurrent:
            return model.start(frame, batch.action), ()
        state, memory = model.start(frame[:, :1]), policy.initial(len(frame))
        for t in range(1, frame.shape[1]):
            memory = policy.act(model.features(state), memory, greedy=True)[1]
            state = model.step(state, batch.action[:, t - 1], frame[:, t]).state
        return state, memory

    def _usable(self, states: State, batch: Batch) -> State:
        usable = batch.has_action.clone()  # no dream goes on from where a game has ended
        # What came before is known only of a game's beginning.
        begun = torch.zeros_like(usable[:, 0]) if batch.is_first is None else batch.is_first
        usable[~begun, : self.config.burn_in] = False
        if not usable.any():  # pieces shorter than the burn-in: what the memory knows of them is all there is
            usable = batch.has_action
        return trees.rows(states, usable)

    # ---- codes ----
    def encoded(self, stage: Stage) -> list[np.ndarray]:
        """What a stage reads instead of the frames of each episode, if it does.

        Kept by the episode's number for as long as the stages before, which train the encoder, take no further step:
        then only episodes that have grown are encoded further.
        """
        if stage.encode is None:
            return []
        before = takewhile(lambda earlier: earlier.name != stage.name, self.stages)
        version = tuple(self.trainer.updates[part.name] for earlier in before for part in earlier.objectives)
        known = self._codes.get(stage.name, ((), {}))
        codes = known[1] if known[0] == version else {}
        found: dict[int, np.ndarray] = {}
        with torch.no_grad(), self.trainer.mixed():
            for number, episode in self.replay.memory().items():
                old = codes.get(number, np.zeros(0))
                old = old if len(old) <= len(episode.frame) else old[:0]  # it was cut
                grown = len(old) < len(episode.frame)
                found[number] = self._codes_of(episode, stage.encode, old) if grown else old
        self._codes[stage.name] = version, found
        return list(found.values())

    def _codes_of(self, episode: Episode, encode: Callable[[Tensor, Tensor], Tensor], known: np.ndarray) -> np.ndarray:
        """The codes (T, ...) of all frames, of which the first are known, in parts that share one frame."""
        known = known[: len(known) // PART * PART]  # whole parts alone: a run that resumes cuts them alike, bit by bit
        made = [known] if len(known) else []
        for begin in range(len(known), len(episode.frame), PART):
            first, end = max(0, begin - 1), min(begin + PART, len(episode.frame))
            frame, action = (torch.from_numpy(part).to(self.agent.device)
                             for part in (episode.frame[first:end], episode.action[first : end - 1]))  # fmt: skip
            made.append(encode(to_unit(frame), action)[begin - first :].float().cpu().numpy())
        return np.concatenate(made)

    # ---- telling ----
    def _tell(self, context: Context) -> None:
        """After a round: numbers, pictures and a checkpoint, each when it is due."""
        if self.long_rounds or self.rounds % self.config.log_every == 0:
            self._log(context)
        if self.rounds % self.config.show_every == 0:
            context.screen.phase("pictures")
            show_dream(self.agent.world_model, self.replay, context.run, self.diagnostics, step=self.step)
            self.reconstruct(context.run)
        if self._save_is_due():
            context.screen.phase("checkpoint")
            self.save(context.run)

    def reconstruct(self, run: Logger) -> None:
        """Writes what the fixed frames look like now, chosen when this is first asked for. Leaves generators alone."""
        if not len(self.fixed):
            self.fixed = fixed_frames(self.replay, self.seed)
        frames = reconstruct(self.agent.world_model, self.fixed)
        if frames is not None:
            run.reconstructions(self.step, self.first_updates, frames)

    def _reconstruct_early(self, run: Logger) -> None:
        """After 1, 2, 4, 8, ... updates: most of what is learned to be seen is learned before the first pictures."""
        if self.first_updates.bit_count() == 1:
            self.reconstruct(run)

    def _log(self, context: Context) -> None:
        scalars = self.trainer.report()
        if self.returns:
            scalars["episode/return"] = sum(self.returns) / len(self.returns)
            self.returns = []
        scalars["rounds"] = self.rounds
        if self.real:
            scalars |= {f"real/{name}": count for name, count in self.real.state_dict().items()}
        context.run.log(self.step, scalars)
        shown = {metric.shown: scalars[key] for key, metric in self.metrics.items() if metric.shown and key in scalars}
        context.screen.update(self.step, **shown)

    # ---- saving ----
    def save(self, run: Logger) -> None:
        """Writes a checkpoint, unless a loss has become non-finite since the last log (NonFiniteLoss)."""
        self.trainer.check()
        run.save_checkpoint(self.state_dict(), self.step)
        self._saved = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """Everything the run needs to go on bit by bit."""
        return {
            "agent": self.agent.state_dict(),
            "trainer": self.trainer.state_dict(),
            "replay": self.replay.state_dict(),
            "collector": self.collector.state_dict(),
            "rounds": self.rounds,
            "done": dict(self.done),
            "posterior": None if self.posterior is None else tuple(self.posterior),
            "ahead": self.ahead,
            "waiting": self.waiting,
            "others": self.others,
            "only": self.only,
            "last": self.last,
            "real": {} if self.real is None else self.real.state_dict(),
            "returns": list(self.returns),
            "starts": start_contexts(self.replay),
            "whole_rewards": self.replay.whole_rewards,
            "fixed": self.fixed,
            "rng": torch.get_rng_state(),
            "cuda_rng": [torch.cuda.get_rng_state(device)] if (device := self.agent.device).type == "cuda" else [],
        }

    def load_state_dict(self, state: dict[str, Any], known: Path | None = None) -> None:
        """Goes back to a `state_dict`; the current episodes are played again from their seeds.

        With `known`, for a process of a team that is not its first: it has what the first one had finished, read from
        that folder, begins games of its own, and draws other random numbers.
        """
        self.agent.load_state_dict(state["agent"])
        self.trainer.load_state_dict(state["trainer"])
        if known is None:
            self.collector.load_state_dict(state["collector"], state["replay"])
        else:
            self.replay.adopt(state["replay"], known)
            been = int(state["replay"]["steps"]) + sum(self.trainer.updates.values())
            self.collector.begun = 100_000 * (1 + been)  # seeds that nobody has had
            while not self.replay.frames("train"):  # the first process had finished no episode yet
                self.collector.collect(PART, at_random=True)
            self.replay.steps = state["replay"]["steps"]
            torch.manual_seed(episode_seed(self.seed, self.collector.begun))  # numbers that nobody has had either
            self.replay.rng = np.random.default_rng(episode_seed(self.seed, self.collector.begun))
        self.rounds = int(state["rounds" if "rounds" in state else "updates"])  # as older runs call them
        self.returns = list(state["returns"])
        self.done, self.only = dict(state.get("done", {})), state.get("only", "")  # older runs have none
        self.last = tuple(state.get("last", ("", 0)))
        posterior = state.get("posterior") if known is None else None  # those of a team are the first process's
        self.posterior = posterior and State(*trees.to(posterior, self.agent.device))
        self.ahead, self.waiting, self.others = (state.get(name, 0) for name in ("ahead", "waiting", "others"))
        self.fixed = state["fixed"].cpu() if "fixed" in state else self.fixed  # older runs choose theirs now
        if self.real is not None and state.get("real"):
            self.real.load_state_dict(state["real"])
        if known is not None:
            return
        torch.set_rng_state(state["rng"].cpu())
        if state["cuda_rng"] and self.agent.device.type == "cuda":  # older runs have one of each device: the first's
            torch.cuda.set_rng_state(state["cuda_rng"][0].cpu(), self.agent.device)
