"""The command `fidelity`: how far ahead a world model sees, on the frozen episodes of its game (`suite.py`).

From every context of a tier the model dreams on under the real actions. After 1, 5, 10 and 50 steps its pictures and
predictions are compared with the real ones, beside the copy baseline: the last frame repeated. Every recipe is judged
by pictures, rewards, endings and, where the emulator's memory has positions, by the things in the pictures; recipes of
discrete latents by their codes as well. Writes results/fidelity.json in the run's folder, with another tier, horizon
or temperature than the usual in its name.

Shapes: S contexts, C H W picture, N tokens or variables of a frame.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from agent.batch import cut
from agent.precision import mixed_precision
from envs.episode import Episode
from envs.errors import UserError
from envs.settings import setting
from runs.dreams import Loaded, load_parts
from runs.folder.progress import duration
from runs.folder.run import keep, result_name
from runs.measure import rewards
from runs.measure.atari import HEIGHT, WIDTH, Thing, places, things
from runs.measure.rewards import correlation
from runs.measure.suite import AHEAD, CONTEXT, TIERS, Context, Suite, contexts, episodes, find_suite, game
from world_model.interface import Batch, State, WorldModel, to_unit
from world_model.noise import forked_rng
from world_model.trees import Tree

HORIZONS = (1, 5, 10, AHEAD)  # steps
PART = 64  # contexts side by side
NEAR = 2.0  # pixels of a 64x64 picture
MOVED = 0.05  # of the brightness: by how much a channel of a pixel differs that moved
SURE = 1e-6  # what a model that is certain of an ending, or of none, is taken to have left open
OF_A_THING = ("frames", "within_2px", "still", "seen", "vanished", "doubled", "real")
AT_ONCE = (
    "left_right_kl", "left_right_kl_per_code", "left_right_pixels", "upright_psnr", "mirror_psnr", "mirror_dream_psnr",
    "mirror_dream_codes",
)  # fmt: skip
TELL = 10.0  # seconds between two lines


@dataclass(frozen=True)
class FidelityConfig:
    """What `python main.py fidelity` takes."""

    run: str | None = setting(
        None, help="a run's folder or name, or a packed model; the Pong that ships when not given"
    )
    tier: str = setting("canary", choices=tuple(TIERS), help="how many contexts: 500, 6,000 or all")
    horizon: int = setting(
        AHEAD, 1, AHEAD, help="steps to dream; it is judged after 1, 5, 10 and 50 of them, and fewer take less time"
    )
    temperature: float = setting(0.0, 0, 100, help="temperature of the dream; 0 takes the most likely latents")
    device: str = setting("auto", help="auto, cpu or cuda")


class Part(NamedTuple):
    """S contexts, each with what came before and after."""

    batch: Batch  # (S, CONTEXT + AHEAD)
    place: dict[str, np.ndarray]  # of every thing after each of HORIZONS, (S, 4, 2), NaN where it is not to be seen


def measure(
    loaded: Loaded, tier: str, temperature: float, suite: Suite | None = None, console: Console | None = None,
    horizon: int = AHEAD,
) -> dict[str, Any]:  # fmt: skip
    """The result of one model after each of HORIZONS up to `horizon`.

    Raises UserError when there is no suite of its game.
    """
    suite = find_suite(loaded.config.env, loaded.config.game) if suite is None else suite
    model, chosen, began, told = loaded.agent.world_model, contexts(suite, tier), time.monotonic(), time.monotonic()
    named = things(suite.env, model.spec.frame[0])
    found: dict[int, list[dict[str, Tensor]]] = {ahead: [] for ahead in HORIZONS if ahead <= horizon}
    alone: list[dict[str, Tensor]] = []
    done = 0
    device = loaded.agent.device
    # A GPU plays and trains in bfloat16, and multiplies several times as fast in it.
    half = device.type == "cuda" and mixed_precision(device, loaded.config.train.precision)
    with forked_rng(device), torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
        torch.manual_seed(0)
        played = dict(episodes(suite, loaded.config.game))
        for part in parts(suite, loaded, chosen, named, played):
            part = part._replace(batch=part.batch.to(loaded.agent.device))
            state = begin(model, part.batch)
            for ahead, values in judge(model, state, part, temperature, named, max(found)).items():
                found[ahead].append(values)
            alone.append(at_once(model, state, part.batch, suite.about["actions"], temperature))
            done += len(part.batch.frame)
            if console is not None and time.monotonic() - told > TELL:
                told = time.monotonic()
                left = (told - began) / done * (len(chosen) - done)
                gone = f"{done:,} of {len(chosen):,} contexts, {duration(told - began)} gone"
                console.print(f"{gone}, {duration(left)} left of them" if left else gone)
        if console is not None:
            console.print(f"all contexts, {duration(time.monotonic() - began)} gone; next, rewards one step ahead")
        known = {
            "frozen": rewards.correlations(loaded, list(played.values())),
            "own": rewards.correlations(loaded, rewards.own_episodes(loaded)),
        }
    rows = [_row(ahead, _joined(values), list(named)) for ahead, values in found.items()]
    return {
        "tier": tier, "suite": suite.path.stem, "contexts": len(chosen), "temperature": temperature,
        "precision": "bf16" if half else "fp32", "seconds": round(time.monotonic() - began, 1), "rows": rows,
        "rewards": known,
    } | {name: _at_once(name, value.mean()) for name, value in _joined(alone).items()}  # fmt: skip


def parts(
    suite: Suite, loaded: Loaded, chosen: list[Context], named: dict[str, Thing], played: Mapping[int, Episode]
) -> Iterator[Part]:
    """The contexts, as many at a time as are dreamed side by side, from the suite's episodes by number."""
    config, spec = game(suite, loaded.config.game), loaded.agent.world_model.spec
    place: dict[int, dict[str, np.ndarray]] = {}  # of each thing in each episode, (n + 1, 2)
    for first in range(0, len(chosen), PART):
        some = chosen[first : first + PART]
        for number in {context.episode for context in some} - place.keys() if named else ():
            one = played[number]
            place[number] = places(suite.env, config, one.seed, one.action, one.frame)
        starts = [context.now - CONTEXT + 1 for context in some]
        batch = cut([played[context.episode] for context in some], starts, CONTEXT + AHEAD, spec=spec)
        yield Part(batch, {
            name: np.stack([_after(place[context.episode][name], context.now) for context in some]) for name in named
        })  # fmt: skip


def _after(place: np.ndarray, now: int) -> np.ndarray:
    """The places (4, 2) after each horizon, of those of an episode."""
    padded = np.concatenate([place, np.full((AHEAD, 2), np.nan)])
    return padded[now + np.array(HORIZONS)]


@torch.inference_mode()
def begin(model: WorldModel, batch: Batch) -> State:
    """Has seen the contexts."""
    return model.start(to_unit(batch.frame[:, :CONTEXT]), batch.action[:, : CONTEXT - 1])


@torch.inference_mode()
def judge(
    model: WorldModel, state: State, part: Part, temperature: float, named: dict[str, Thing], horizon: int = AHEAD
) -> dict[int, dict[str, Tensor]]:
    """After each of HORIZONS up to `horizon`, what is known of the contexts whose episode goes on: tensors (S, ...).

    `sums` are of all contexts, up to their episode's end: what is told of the end would be missing otherwise.
    """
    batch, frame, action = part.batch, part.batch.frame, part.batch.action
    followed, last = state, to_unit(frame[:, CONTEXT - 1])
    seen, sums = codes(model, state.latent), torch.zeros(len(frame), 7, device=last.device)
    shown = {name: [thing.find(one) for one in _pixels(last)] for name, thing in named.items()}
    found = {}
    for ahead in range(1, horizon + 1):
        now = CONTEXT - 1 + ahead
        step, real = model.step(state, action[:, now - 1], temperature=temperature), to_unit(frame[:, now])
        state, followed = step.state, model.step(followed, action[:, now - 1], real).state
        told_now = _told(step.reward, step.cont, batch.reward[:, now - 1], batch.terminated[:, now - 1])
        sums += told_now * batch.has_action[:, now - 1, None]
        if ahead not in HORIZONS:
            continue
        told: dict[str, Tensor] = {}
        came, dreamed = codes(model, followed.latent), codes(model, state.latent)
        if seen is not None and came is not None and dreamed is not None:
            told |= {"right": dreamed == came, "changed": seen != came, "codes": came}
        picture, reached = model.decode(state), model.decode(followed)
        if picture is not None and reached is not None:
            told["pictures"] = _pictures(picture, reached, real, last)
            views = [_pixels(frame) for frame in (picture, reached, real)] if named else []
            for name, thing in named.items():
                place = part.place[name][:, HORIZONS.index(ahead)]
                marks = [_marks(thing, *of) for of in zip(place, shown[name], *views, strict=True)]
                told[name] = torch.tensor(marks)
        valid = batch.valid[:, now]
        found[ahead] = {name: value[valid.to(value.device)].cpu() for name, value in told.items()}
        found[ahead] |= {"sums": sums.cpu().clone(), "goes_on": valid.cpu()}
    return found


def codes(model: WorldModel, latent: Tensor) -> Tensor | None:
    """Latents (S, ...) as whole numbers (S, N): tokens as they are, one-hot variables by class; None for others."""
    if not latent.is_floating_point():
        return latent.flatten(1)
    return latent.argmax(-1) if len(model.latent_shape) == 2 else None


def _told(reward: Tensor, cont: Tensor, real: Tensor, ended: Tensor) -> Tensor:
    """Of one step, (S, 7): reward dreamed, real, squared error, real squared; nats of ending or not; ended; 1."""
    sure = torch.where(ended, 1 - cont.float(), cont.float()).clamp(SURE, 1 - SURE)
    return torch.stack(
        [reward, real, (reward - real).square(), real.square(), -sure.log(), ended.float(), torch.ones_like(sure)], 1
    )


def _pictures(picture: Tensor, reached: Tensor, real: Tensor, last: Tensor) -> Tensor:
    """(S, 8): of the dreamed picture, the last frame seen and the frame itself encoded and shown, the mean squared
    error and its sum over the pixels that moved; then how many those are, and which share of all.
    """
    moved = ((real - last).abs().amax(1, keepdim=True) > MOVED).expand_as(real)

    def errors(of: Tensor) -> list[Tensor]:
        square = (of.float() - real).square()
        return [square.flatten(1).mean(1), (square * moved).flatten(1).sum(1)]

    values = [*errors(picture), *errors(last), *errors(reached)]
    values += [moved.flatten(1).sum(1), moved.flatten(1).float().mean(1)]
    return torch.stack([value.float() for value in values], 1)


def _pixels(frame: Tensor) -> np.ndarray:
    return (frame.float() * 255).cpu().numpy()


def _marks(
    thing: Thing, place: np.ndarray, shown: list[np.ndarray], dreamed: np.ndarray, reached: np.ndarray, real: np.ndarray
) -> list[bool]:
    """OF_A_THING in one frame.

    It is to be seen; near its place in the dream; near it in the last frame seen; in the picture of the real frame;
    not to be found in the dream; found twice there; near its place in the real frame: whether the finder is right.
    """
    if np.isnan(place).any():
        return [False] * len(OF_A_THING)
    found = thing.find(dreamed)
    near, still, seen, true = (_near(at, place) for at in (found, shown, thing.find(reached), thing.find(real)))
    return [True, near, still, seen, not found, len(found) > 1, true]


def _near(found: list[np.ndarray], place: np.ndarray) -> bool:
    away = (found[0] - place) * 64 / np.array([WIDTH, HEIGHT]) if found else np.full(2, np.inf)
    return float(np.hypot(*away)) <= NEAR


@torch.inference_mode()
def at_once(model: WorldModel, state: State, batch: Batch, actions: list[str], temperature: float) -> dict[str, Tensor]:
    """What hangs on the action, and on left and right in the picture, (S,) each; no dream needs to go on for it.

    `left_right_kl`: nats between what is expected after LEFT and after RIGHT, where it can be computed, and
    `left_right_kl_per_code` its share of each code; `left_right_pixels`: how far the two pictures are apart on average,
    of 255, dreamed with the same random numbers. `mirror_psnr`: error of a mirrored frame that is seen for the first
    time, once it is shown and mirrored back; `upright_psnr`: the same without the mirror. `mirror_dream_psnr`:
    difference between the next picture and the one that is dreamed where all that came before is mirrored and LEFT is
    RIGHT, mirrored back; `mirror_dream_codes`: share of the codes that are the same once both pictures are encoded.
    """
    found: dict[str, Tensor] = {}
    if model.spec.discrete and {"LEFT", "RIGHT"} <= set(actions):
        after = [
            model.advance(state, torch.full_like(batch.action[:, 0], actions.index(way))) for way in ("LEFT", "RIGHT")
        ]
        kl = model.prior_kl(*after)
        if kl is not None:
            found["left_right_kl"] = kl
            variables = codes(model, state.latent)
            found |= {} if variables is None else {"left_right_kl_per_code": kl / variables.shape[1]}
        left, right = _next_pictures(model, after, temperature)
        if left is not None and right is not None:
            found["left_right_pixels"] = (left - right).abs().flatten(1).mean(1) * 255
        if (images := mirror_images(actions)) is not None:
            found |= _mirrored(model, state, batch, images, temperature)
    two = to_unit(batch.frame[:, CONTEXT - 2 : CONTEXT])  # a pair where one is encoded; else the frame alone
    now, upright, mirrored = two[:, 1:], model.reconstruct(two), model.reconstruct(two.flip(-1))
    if upright is not None and mirrored is not None:
        pairs = (("upright_psnr", upright), ("mirror_psnr", mirrored.flip(-1)))
        found |= {name: (shown - now[:, 0]).square().flatten(1).mean(1) for name, shown in pairs}
    return {name: value.float().cpu() for name, value in found.items()}


def mirror_images(actions: list[str]) -> list[int] | None:
    """Which action is each one's mirror image, by their names; None where one has none."""
    swapped = [name.replace("LEFT", "<").replace("RIGHT", "LEFT").replace("<", "RIGHT") for name in actions]
    return [actions.index(name) for name in swapped] if set(swapped) <= set(actions) else None


def _next_pictures(model: WorldModel, memories: list[Tree], temperature: float) -> list[Tensor | None]:
    """What is dreamed next from each memory, with the same random numbers."""
    pictures, seed = [], int(torch.randint(2**31, (1,)))
    for memory in memories:
        torch.manual_seed(seed)
        pictures.append(model.decode(model.imagine(memory, temperature)))
    return pictures


def _mirrored(
    model: WorldModel, state: State, batch: Batch, images: list[int], temperature: float
) -> dict[str, Tensor]:
    """See `at_once`; images: each action's mirror image. Nothing where there is no picture."""
    swapped = torch.tensor(images, device=batch.action.device)[batch.action]
    past = batch._replace(frame=batch.frame.flip(-1), action=swapped)
    both = ((state, batch.action), (begin(model, past), swapped))
    after = [model.advance(begun, action[:, CONTEXT - 1]) for begun, action in both]
    upright, mirrored = _next_pictures(model, after, temperature)
    if upright is None or mirrored is None:
        return {}
    back = mirrored.flip(-1)
    found = {"mirror_dream_psnr": (upright - back).square().flatten(1).mean(1)}
    one, other = (codes(model, model.start(picture.unsqueeze(1)).latent) for picture in (upright, back))
    return found if one is None or other is None else found | {"mirror_dream_codes": (one == other).float().mean(1)}


# ---- the figures ----
def _joined(values: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([one[name] for one in values]) for name in values[0]}


def _row(ahead: int, told: dict[str, Tensor], named: list[str]) -> dict[str, Any]:
    """One horizon's figures; None where there is nothing to tell."""
    sums = told["sums"].double()
    row: dict[str, Any] = {"steps_ahead": ahead, "contexts": int(told["goes_on"].sum())}
    if not row["contexts"]:
        return row
    if "pictures" in told:
        error, moved, still, still_moved, seen, _, count, share = told["pictures"].double().unbind(1)
        pixels = float(count.sum())
        row |= {
            "mse": float(f"{error.mean():.4g}"), "psnr": psnr(error.mean()), "psnr_still": psnr(still.mean()),
            "psnr_seen": psnr(seen.mean()), "moved": round(float(share.mean()), 4),
            "psnr_moved": psnr(moved.sum() / max(pixels, 1)) if pixels else None,
            "psnr_moved_still": psnr(still_moved.sum() / max(pixels, 1)) if pixels else None,
        }  # fmt: skip
    if "right" in told:
        right, changed = told["right"].float(), told["changed"].float()
        row |= {
            "accuracy": round(float(right.mean()), 4), "accuracy_still": round(float((1 - changed).mean()), 4),
            "accuracy_changed": round(float((right * changed).sum() / changed.sum().clamp(min=1)), 4),
            "changed": round(float(changed.mean()), 4), "perplexity": round(perplexity(told["codes"]), 2),
        }  # fmt: skip
    total = sums.sum(0)
    steps = total[6]
    ended = float(total[5] / steps)
    base = sum(-share * np.log(share) for share in (ended, 1 - ended) if 0 < share < 1)
    row |= {
        "reward_mse": float(f"{total[2] / steps:.4g}"),
        "reward_mse_mean": float(f"{total[3] / steps - (total[1] / steps) ** 2:.4g}"),
        "reward_corr": correlation(sums[:, 0], sums[:, 1]),  # of what the windows brought in all
        "cont_nats": float(f"{total[4] / steps:.4g}"), "cont_nats_base": float(f"{base:.4g}"), "endings": int(total[5]),
    }  # fmt: skip
    for name in named:
        if name in told:
            marks = told[name].float().sum(0).tolist()
            if not marks[0]:
                continue  # nowhere to be seen so far ahead: no share of nothing
            values = [int(marks[0]), *(round(mark / marks[0], 4) for mark in marks[1:])]
            row |= {f"{name}_{of}": value for of, value in zip(OF_A_THING, values, strict=True)}
    return row


def _at_once(name: str, value: Tensor) -> float:
    return psnr(value) if name.endswith("_psnr") else float(f"{float(value):.4g}")


def psnr(error: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error of pixels in [0, 1]; at most 99."""
    return round(min(99.0, -10 * float(np.log10(max(float(error), 1e-12)))), 2)


def perplexity(codes: Tensor) -> float:
    """exp of the entropy of how often each whole number is used: (...)."""
    share = codes.flatten().unique(return_counts=True)[1].double() / codes.numel()
    return float((-(share * share.log()).sum()).exp()) if codes.numel() else 1.0


def _name(asked: FidelityConfig) -> str:
    tier = "" if asked.tier == FidelityConfig().tier else f"-{asked.tier}"
    return result_name("fidelity" + tier, asked, "horizon", "temperature")


def command(asked: FidelityConfig) -> dict[str, Any]:
    """Measures a run, prints what was found and returns it."""
    loaded, console = load_parts(asked.run, asked.device), Console(highlight=False)
    suite = find_suite(loaded.config.env, loaded.config.game)
    if list(suite.about["actions"]) != list(loaded.controls.names):
        raise UserError(
            f"The actions of {suite.path.stem} are not those of this run: {', '.join(loaded.controls.names)}."
        )
    about = {} if loaded.run is not None else {
        key: getattr(loaded.config, key) for key in ("recipe", "env", "protocol", "size", "seed")
    } | {"env_steps": loaded.step, "packed": True}  # fmt: skip
    found = measure(loaded, asked.tier, asked.temperature, suite, console, asked.horizon)
    path = keep(loaded.run, _name(asked), about | found | {"what": "fidelity"}, loaded.config.env)
    title = f"{loaded.config.recipe} on {loaded.config.env}, step {loaded.step:,}, {found['contexts']:,} contexts"
    table = Table(title=title)
    table.add_column("steps ahead")
    for row in found["rows"]:
        table.add_column(str(row["steps_ahead"]), justify="right")
    for name in found["rows"][0]:
        if name != "steps_ahead":
            table.add_row(name.replace("_", " "), *(str(row.get(name, "-")) for row in found["rows"]))
    console.print(table)
    for name in AT_ONCE:
        if name in found:
            console.print(f"{name.replace('_', ' ')} {found[name]:g}")
    for whose, told in found["rewards"].items():
        if told is not None:
            about_it = ", ".join(f"{name} {value}" for name, value in told.items())
            console.print(f"rewards one step ahead, {whose} games: {about_it}")
    console.print(f"written to {path}", soft_wrap=True)
    return found
