"""The command `probe`: what the codes of frame pairs hold (`latent_gru`, `latent_action`).

On the frozen episodes of the game (`suite.py`), of which those of each kind of play are split 3:1:1 into train,
validation and test:

accuracy       tokens right after 1, 2, 3, 5, 10 and 20 dreamed steps under the real actions, on episodes that the run
               learned from, on those that it held out (`replay.validation`) and on the frozen ones, beside the copy
               baseline
action         a linear probe that reads the action off the code, beside a network that reads it off the two frames and
               was trained on every action (an inverse model), and beside the most frequent action
exchange       how much worse the fourth picture in a row is with codes of other moments (Bruce et al. 2024, "Genie")
leak           bits by which the code predicts where each thing goes, beyond where it was and what was done; an estimate
               from below, and below 0 where few transitions teach it
transplant     in how many of other moments the code of a move moves the player the same way; beside it, in how many it
               would if the code only stored the player's position
score          how often the pixels that only a reward changes do so in a dream without one

Writes results/probe.json in the run's folder. Shapes: M transitions, N tokens, D width of a code, S dreams.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from agent.batch import cut
from envs.episode import Episode
from envs.errors import UserError
from envs.settings import setting
from runs.dreams import Loaded, load_parts
from runs.folder.run import keep, result_name
from runs.measure.atari import places as places_of
from runs.measure.atari import things
from runs.measure.fidelity import begin, perplexity, psnr
from runs.measure.rewards import own_episodes
from runs.measure.suite import CONTEXT, Suite, episodes, find_suite, game
from world_model.interface import Batch, to_unit
from world_model.noise import forked_rng
from world_model.token_world import TokenWorld

AHEAD = (1, 2, 3, 5, 10, 20)  # steps
PART, CONTEXTS = 64, 256  # side by side, and in all
LEAST = 2.0  # console pixels that a thing has moved
HISTORY = 4  # frames before each transition that are kept
CHAIN = 4  # frames drawn in a row
DREAMS, STEPS = 32, 200  # of the score
CHANGED = 0.15  # of the brightness
SCORE = 0.1  # of the rewards, with which a pixel of the score changes
DIRECTIONS = 32  # of codes, from which a leak is read
TEACHING, INVERSE = 3_000, 800  # updates of a probe, and of the inverse model
DIFFERENCE = 4.0  # by how much more the inverse model sees of what changed
PLAYERS = ("paddle", "white")  # what games call the thing that is played
TEACHES, CHOOSES, JUDGES = 0, 1, 2  # what an episode is for
ROLES = (TEACHES, TEACHES, TEACHES, CHOOSES, JUDGES)


@dataclass(frozen=True)
class ProbeConfig:
    """What `python main.py probe` takes."""

    run: str | None = setting(None, required=True, help="a run's folder or name")
    steps: int = setting(8_000, 500, 10**6, help="transitions of the frozen episodes, at most")
    device: str = setting("auto", help="auto, cpu or cuda")


class Transitions(NamedTuple):
    """M of them in order, from several episodes."""

    episode: Tensor  # (M,) whose
    before: Tensor  # (M, HISTORY, C, H, W) uint8, newest last
    frame: Tensor  # (M, C, H, W) uint8, what followed
    action: Tensor  # (M,) between them
    reward: Tensor  # (M,)
    code: Tensor  # (M, N)
    place: dict[str, Tensor]  # of each thing before, at the frame and one earlier: (M, 3, 2), NaN where not to be seen


@torch.inference_mode()
def gather(loaded: Loaded, suite: Suite, played: Sequence[tuple[int, Episode]], most: int) -> Transitions:
    """The transitions of the suite's episodes, by number, as many of each as there is room for."""
    model, config = loaded.agent.world_model, loaded.config.game
    assert isinstance(model, TokenWorld)
    named, parts, each = things(suite.env, model.spec.frame[0]), [], max(1, most // len(suite.seed))
    for number, episode in played:
        end = min(len(episode), each)
        frame = torch.from_numpy(episode.frame[: end + 1])
        place = {}
        if named:
            seed, taken = episode.seed, episode.action[:end]
            place = places_of(suite.env, game(suite, config), seed, taken, episode.frame[: end + 1])
        at = {name: torch.from_numpy(place[name]).float() for name in named}
        ages = torch.arange(1 - HISTORY, 1)
        before = frame[(torch.arange(end).unsqueeze(1) + ages).clamp(min=0)]
        unit = to_unit(frame.to(loaded.agent.device))
        code = torch.cat([model.encode(unit[t + 1 : t + 1 + PART], unit[t : t + PART][: end - t])
                          for t in range(0, end, PART)]).cpu()  # fmt: skip
        older = {name: torch.cat([one[:1], one[:-1]]) for name, one in at.items()}
        parts.append(Transitions(
            torch.full((end,), number), before, frame[1:], torch.from_numpy(episode.action[:end]),
            torch.from_numpy(episode.reward[:end]), code,
            {name: torch.stack([at[name][:-1], at[name][1:], older[name][:-1]], 1) for name in named},
        ))  # fmt: skip
    whole = {
        name: torch.cat([getattr(part, name) for part in parts]) for name in Transitions._fields if name != "place"
    }
    return Transitions(**whole, place={name: torch.cat([part.place[name] for part in parts]) for name in named})


# ---- accuracy ----
@torch.inference_mode()
def open_loop(loaded: Loaded, found: Sequence[Episode]) -> dict[int, dict[str, float]]:
    """By steps ahead: share of the tokens that are right, of those that differ from the last seen, and the latter's."""
    model, rng = loaded.agent.world_model, np.random.default_rng(0)
    long = [one for one in found if len(one) > CONTEXT + max(AHEAD)]
    sums = {ahead: torch.zeros(4) for ahead in AHEAD}
    for _ in range(0, CONTEXTS if long else 0, PART):
        chosen = [long[int(rng.integers(len(long)))] for _ in range(PART)]
        starts = [int(rng.integers(len(one) - CONTEXT - max(AHEAD))) for one in chosen]
        batch = cut(chosen, starts, CONTEXT + max(AHEAD), spec=model.spec).to(loaded.agent.device)
        for ahead, (right, moved) in _dreamt(loaded, batch).items():
            sums[ahead] += torch.stack([right.sum(), (right * moved).sum(), moved.sum(), torch.tensor(right.numel())])
    return {
        ahead: {
            "accuracy": round(float(right / count), 4), "accuracy_changed": round(float(changed / moved), 4),
            "still": round(float(1 - moved / count), 4),
        }
        for ahead, (right, changed, moved, count) in sums.items() if count and moved
    }  # fmt: skip


def _dreamt(loaded: Loaded, batch: Batch) -> dict[int, tuple[Tensor, Tensor]]:
    model = loaded.agent.world_model
    state = followed = begin(model, batch)
    seen, told = state.latent, {}
    for ahead in range(1, max(AHEAD) + 1):
        now = CONTEXT - 1 + ahead
        state = model.step(state, batch.action[:, now - 1], temperature=0).state
        followed = model.step(followed, batch.action[:, now - 1], to_unit(batch.frame[:, now])).state
        if ahead in AHEAD:
            told[ahead] = ((state.latent == followed.latent).float().cpu(), (followed.latent != seen).float().cpu())
    return told


# ---- action ----
def roles(kind: np.ndarray) -> Tensor:
    """What each of E episodes is for, by its kind of play (E,): of every five of a kind one chooses and one judges."""
    place = [int((kind[:number] == kind[number]).sum()) for number in range(len(kind))]
    return torch.tensor([ROLES[at % len(ROLES)] for at in place])


def taught(
    network: nn.Module, given: Tensor, target: Tensor, role: Tensor, *, updates: int, size: int, lr: float
) -> nn.Module:
    """A classifier of `given` (M, ...), taught on the rows whose `role` (M,) is TEACHES.

    Those that are to choose say when it was best: with thousands of numbers a code is soon learned by heart.
    """
    rows, generator = (role == TEACHES).nonzero().flatten(), torch.Generator().manual_seed(0)
    best, weights = float("inf"), copy.deepcopy(network.state_dict())
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=1e-2)
    for update in range(updates):
        chosen = rows[torch.randint(len(rows), (size,), generator=generator)]
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - update / updates)
        loss = F.cross_entropy(network(given[chosen]), target[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (update + 1) % (updates // 10) == 0 and (bits := judge(network, given, target, role == CHOOSES)[1]) < best:
            best, weights = bits, copy.deepcopy(network.state_dict())
    network.load_state_dict(weights)
    return network


@torch.no_grad()
def judge(network: nn.Module, given: Tensor, target: Tensor, rows: Tensor) -> tuple[float, float]:
    """Share of these rows (M,) bool which are right, and their surprise in bits."""
    logits = torch.cat([network(part) for part in given[rows].split(256)])
    right = (logits.argmax(-1) == target[rows]).float().mean()
    return float(right), float(F.cross_entropy(logits, target[rows])) / float(np.log(2))


def standardised(loaded: Loaded, data: Transitions) -> Tensor:
    """The codes' numbers (M, N D), each with mean 0 and spread 1."""
    model = loaded.agent.world_model
    assert isinstance(model, TokenWorld)
    code = model.tokenizer.embedding(data.code.to(loaded.agent.device)).flatten(1).float().cpu().detach()
    return (code - code.mean(0)) / (code.std(0) + 1e-3)


class Inverse(nn.Module):
    """Two frames -> the action between them."""

    def __init__(self, frame: tuple[int, int, int], actions: int) -> None:
        super().__init__()
        channels = [3 * frame[0], 32, 64, 64, 64]
        parts: list[nn.Module] = []
        for narrow, wide in zip(channels, channels[1:], strict=False):
            parts += [nn.Conv2d(narrow, wide, 4, 2, 1), nn.ReLU()]
        places = (frame[1] >> 4) * (frame[2] >> 4)
        self.layers = nn.Sequential(
            *parts, nn.Flatten(), nn.Linear(64 * places, 256), nn.ReLU(), nn.Linear(256, actions)
        )

    def forward(self, pair: Tensor) -> Tensor:
        before, after = (pair.float() / 127.5 - 1).chunk(2, 1)
        # What moved is a few pixels in thousands that stand still.
        return self.layers(torch.cat([before, after, DIFFERENCE * (after - before)], 1))  # type: ignore[no-any-return]


def actions_told(loaded: Loaded, data: Transitions, role: Tensor) -> dict[str, float]:
    """Accuracy of the linear probe, of the inverse model, and of the most frequent action.

    Where the action has a code of its own the probe reads that, and another one the rest, which should not tell it.
    """
    model, code = loaded.agent.world_model, standardised(loaded, data)
    assert isinstance(model, TokenWorld)
    count, width, found = model.spec.action_size, model.tokenizer.width, {}
    parts = {"linear_probe": code}
    if model.config.action_codes:
        parts = {"linear_probe": code[:, :width], "linear_probe_of_the_rest": code[:, width:]}
    for name, part in parts.items():
        torch.manual_seed(0)
        probe = taught(nn.Linear(part.shape[1], count), part, data.action, role, updates=TEACHING, size=256, lr=1e-3)
        found[name] = round(judge(probe, part, data.action, role == JUDGES)[0], 4)
    pair = torch.cat([data.before[:, -1], data.frame], 1)
    inverse = taught(Inverse(model.spec.frame, count), pair, data.action, role, updates=INVERSE, size=64, lr=1e-3)
    often = int(data.action[role != JUDGES].bincount(minlength=count).argmax())
    return found | {
        "inverse_model": round(judge(inverse, pair, data.action, role == JUDGES)[0], 4),
        "most_frequent": round(float((data.action[role == JUDGES] == often).float().mean()), 4),
    }


# ---- what a code does ----
@torch.inference_mode()
def exchanged(loaded: Loaded, data: Transitions) -> dict[str, float]:
    """PSNR of the fourth picture in a row, drawn with its own codes and with those of other moments."""
    model = loaded.agent.world_model
    assert isinstance(model, TokenWorld)
    ends = [t for t in range(0, len(data.action) - CHAIN, CHAIN) if data.episode[t] == data.episode[t + CHAIN - 1]]
    chosen = torch.tensor(ends)[torch.randperm(len(ends), generator=torch.Generator().manual_seed(0))[:CONTEXTS]]
    others = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(1))]
    errors = {"own": 0.0, "other": 0.0}
    for rows, strange in zip(chosen.split(PART), others.split(PART), strict=True):
        real = to_unit(data.frame[rows + CHAIN - 1])
        for name, source in (("own", rows), ("other", strange)):
            seen = to_unit(data.before[rows]).to(loaded.agent.device)
            for k in range(CHAIN):
                picture = model.drawn(data.code[source + k].to(loaded.agent.device), seen)
                seen = torch.cat([seen[:, 1:], picture.unsqueeze(1)], 1)
            errors[name] += float((picture.cpu() - real).square().mean((1, 2, 3)).sum())
    own, other = (psnr(torch.tensor(errors[name] / len(chosen))) for name in ("own", "other"))
    return {"psnr_own": own, "psnr_other": other, "delta_psnr": round(own - other, 2)}


def leaks(loaded: Loaded, data: Transitions, role: Tensor) -> dict[str, float]:
    """Bits that the code tells of where each thing goes, beyond where it was, how it moved, and the action.

    The way of one step is told as one of 9 x 9 cells of 2 console pixels, by a small network with and without the code.
    """
    model, code, found = loaded.agent.world_model, standardised(loaded, data), {}
    # Of thousands of numbers, those directions in which codes differ most: a network would learn all by heart.
    known = role != JUDGES
    directions = torch.pca_lowrank(code[known], min(DIRECTIONS, *code.shape), center=False)[2]
    code = code @ directions
    code = code / (code[known].std(0) + 1e-6)
    action = F.one_hot(data.action, model.spec.action_size).float()
    for name, place in data.place.items():
        seen = ~place.isnan().flatten(1).any(1)
        if min(int((seen & (role == part)).sum()) for part in ROLES) < 100:
            continue
        now, then, older = place[seen].unbind(1)
        cell = ((then - now) / 2).round().clamp(-4, 4).long() + 4
        target = cell[:, 0] * 9 + cell[:, 1]
        without = torch.cat([now / 100 - 1, (now - older) / 8, action[seen]], 1)
        bits = []
        for given in (without, torch.cat([without, code[seen]], 1)):
            torch.manual_seed(0)
            network = nn.Sequential(nn.Linear(given.shape[1], 128), nn.ReLU(), nn.Linear(128, 81))
            network = taught(network, given, target, role[seen], updates=TEACHING, size=256, lr=2e-3)  # type: ignore[assignment]
            bits.append(judge(network, given, target, role[seen] == JUDGES)[1])
        found[name] = round(bits[0] - bits[1], 3)
    return found


@torch.inference_mode()
def transplanted(loaded: Loaded, suite: Suite, data: Transitions) -> dict[str, float]:
    """The code of a move of the player, drawn on frames of other moments: in how many it moves the same way there.

    Where the player has room to move that way, judged by where the finder sees him before and after. `by_place`: the
    same share of a code that draws him where he stood in the picture that it is from. Codes of a grid may well do so.
    """
    model = loaded.agent.world_model
    assert isinstance(model, TokenWorld)
    named = things(suite.env, model.spec.frame[0])
    name = next((name for name in PLAYERS if name in named), None)
    if name is None:
        return {}
    place, thing = data.place[name], named[name]
    way = place[:, 1] - place[:, 0]
    axis = int(way.nan_to_num().abs().sum(0).argmax())
    moves = ((way[:, axis].abs() >= LEAST) & ~place.isnan().flatten(1).any(1)).nonzero().flatten()
    still = ((way.abs().amax(1) < 1) & ~place.isnan().flatten(1).any(1)).nonzero().flatten()
    if len(moves) < 20 or len(still) < 20:
        return {}
    rng = torch.Generator().manual_seed(0)
    donors = moves[torch.randint(len(moves), (CONTEXTS,), generator=rng)]
    hosts = still[torch.randint(len(still), (CONTEXTS,), generator=rng)]
    seen = place[~place.isnan().flatten(1).any(1)][..., axis]
    there = place[hosts, 0, axis] + way[donors, axis]
    room = (there >= seen.min()) & (there <= seen.max())
    donors, hosts = donors[room], hosts[room]
    right = by_place = count = 0
    for donor, host in zip(donors.split(PART), hosts.split(PART), strict=True):
        picture = model.drawn(
            data.code[donor].to(loaded.agent.device), to_unit(data.before[host].to(loaded.agent.device))
        )
        drawn = zip(picture.cpu(), data.before[host, -1], way[donor, axis], place[donor, 1, axis], strict=True)
        for shown, before, step, stood in drawn:
            was, now = thing.find(before.numpy()), thing.find((shown * 255).numpy())
            if not was:
                continue
            count += 1
            right += bool(now) and bool(np.sign(now[0][axis] - was[0][axis]) == np.sign(float(step)))
            by_place += bool(np.sign(float(stood) - was[0][axis]) == np.sign(float(step)))
    if not count:
        return {}
    return {
        "transplant": round(right / count, 4), "transplant_by_place": round(by_place / count, 4), "transplants": count,
    }  # fmt: skip


@torch.inference_mode()
def score_changes(loaded: Loaded, data: Transitions) -> dict[str, float]:
    """In dreams of random play, steps that change a pixel of the score without a reward, and rewards that change none.

    With a reward is in the same step or in the next, in which some games draw the score. Of the score are the pixels
    that change with at least a tenth of the real rewards and with at most two in a thousand of the other steps. Shares
    of all steps and of all rewards, and of the real game's (`_real`); {} where there are no such pixels.
    """
    parts = zip(data.frame.split(512), data.before[:, -1].split(512), strict=True)
    steps = [(now.int() - before.int()).abs().amax(1) > 255 * CHANGED for now, before in parts]
    change = torch.cat(steps).float()  # (M, H, W)
    paid = (data.reward != 0)[:-1] & (data.episode[1:] == data.episode[:-1])  # whose next step is known
    if int(paid.sum()) < 5:
        return {}
    other = ~F.pad(data.reward != 0, (1, 0))[:-1] & (data.reward == 0)
    with_it = torch.maximum(change[:-1][paid], change[1:][paid]).mean(0)
    mask = (with_it >= SCORE) & (change[other].mean(0) <= 2e-3)
    if not mask.any():
        return {}
    model = loaded.agent.world_model
    count = len(loaded.starts.frame)
    state = loaded.begin(torch.randint(count, (DREAMS,), generator=torch.Generator().manual_seed(0)))
    picture, moved, got = model.picture(state), [], []
    with forked_rng(loaded.agent.device):
        torch.manual_seed(0)
        for _ in range(STEPS):
            taken = torch.randint(model.spec.action_size, (DREAMS,), device=loaded.agent.device)
            step = model.step(state, taken, temperature=loaded.temperature(None))
            state, before, picture = step.state, picture, model.picture(step.state)
            got.append(model.reward_sign(step.state).abs().cpu() > 0.5)
            moved.append(((picture - before).abs().amax(1) > CHANGED)[:, mask.to(picture.device)].any(1).cpu())
    changed, rewards = torch.stack(moved), torch.stack(got)  # (STEPS, DREAMS)
    late = F.pad(rewards, (0, 0, 1, 0))[:-1]
    false, silent = changed & ~rewards & ~late, rewards[:-1] & ~changed[:-1] & ~changed[1:]
    return {
        "score_pixels": int(mask.sum()), "changed_without_reward": round(float(false.float().mean()), 5),
        "changed_without_reward_real": round(float(change[other][:, mask].any(1).float().mean()), 5),
        "rewards": int(rewards.sum()),
        "rewards_without_change": round(int(silent.sum()) / max(int(rewards[:-1].sum()), 1), 4),
    }  # fmt: skip


def measure(loaded: Loaded, suite: Suite, steps: int, console: Console) -> dict[str, Any]:
    """All of it, of one model."""
    began = time.monotonic()

    def tell(what: str) -> None:
        console.print(f"{time.monotonic() - began:4.0f} s  {what}")

    tell("plays the frozen episodes")
    played = list(episodes(suite, loaded.config.game))
    data = gather(loaded, suite, played, steps)
    role = roles(suite.kind)[data.episode]
    judging = int((role == JUDGES).sum())
    if not judging:
        raise UserError(f"{suite.path.stem} has no kind of play of 5 episodes, a fifth of which could judge.")
    result: dict[str, Any] = {"suite": suite.path.stem, "transitions": len(data.action), "judging": judging}
    result |= {"perplexity": round(perplexity(data.code), 2), "codes_used": len(data.code.unique())}
    tell("dreams")
    frozen = open_loop(loaded, [episode for _, episode in played])
    judged = {"frozen": frozen, "trained": open_loop(loaded, own_episodes(loaded)),
              "held_out": open_loop(loaded, own_episodes(loaded, held=True))}  # fmt: skip
    result["ahead"] = [
        {"steps_ahead": ahead} | {f"{whose}_{key}": value for whose, found in judged.items()
                                  for key, value in found.get(ahead, {}).items()}
        for ahead in frozen
    ]  # fmt: skip
    tell("reads actions")
    result |= actions_told(loaded, data, role)
    tell("exchanges codes")
    result |= exchanged(loaded, data)
    result["leak_bits"] = leaks(loaded, data, role)
    result |= transplanted(loaded, suite, data)
    tell("watches the score")
    return result | score_changes(loaded, data) | {"seconds": round(time.monotonic() - began, 1)}


def command(asked: ProbeConfig) -> dict[str, Any]:
    """Measures a run, prints what was found and returns it."""
    loaded, console = load_parts(asked.run, asked.device), Console(highlight=False)
    if not isinstance(loaded.agent.world_model, TokenWorld) or not loaded.agent.world_model.pairs:
        raise UserError(f"{asked.run} has no codes of frame pairs: probe judges latent_gru and latent_action.")
    suite = find_suite(loaded.config.env, loaded.config.game)
    found = measure(loaded, suite, asked.steps, console)
    path = keep(loaded.run, result_name("probe", asked, "steps"), {"what": "probe"} | found, loaded.config.env)
    table = Table(title=f"{loaded.config.recipe} on {loaded.config.env}, step {loaded.step:,}")
    for name in ("what", "value"):
        table.add_column(name, justify="left" if name == "what" else "right")
    for name, value in found.items():
        if name != "ahead" and not isinstance(value, dict):
            table.add_row(name.replace("_", " "), str(value))
    for name, value in found["leak_bits"].items():
        table.add_row(f"leak of the {name}, bits", str(value))
    for row in found["ahead"]:
        shown = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in row.items() if name != "steps_ahead")
        table.add_row(f"{row['steps_ahead']} ahead", shown)
    console.print(table)
    console.print(f"written to {path}", soft_wrap=True)
    return found
