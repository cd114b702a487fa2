"""`world_models`: a variational autoencoder that sees, and an LSTM with mixtures of Gaussians that remembers.

Ha & Schmidhuber 2018, "World Models", and their published program where the two differ. Here the memory also predicts
reward and continuation, so that a controller can be trained in the dream of any game; theirs did so for Doom alone.
Shapes: B batch, T time, Z latent dimensions, K mixture components, H LSTM width.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from envs.settings import setting
from envs.spec import Spec
from world_model.interface import (
    Batch,
    Losses,
    Metric,
    Objective,
    Optim,
    Stage,
    State,
    Term,
    WorldModel,
    parameters_of,
    to_unit,
)
from world_model.parts.heads import mean_where, one_hot
from world_model.parts.mixture import Mixture, split
from world_model.parts.nets import mlp
from world_model.parts.vae import ConvVAE, Discriminator, draw_latent, kl_from_normal
from world_model.trees import Tree

VISION_CLIP = 1e3  # the errors of all pixels are summed: gradients are long from the start
WON = 0.35  # nats a frame: a discriminator better than this waits for the decoder
REWARD_DECAY = 0.999  # of the running mean of squared rewards, a batch
MIN_REWARD_SQUARE = 1e-3  # rewards that are hardly there are not blown up beyond this


VISION_METRICS = {
    "pixels": Metric("squared error of a frame, summed over its pixels in [0, 1]", shown="frames"),
    "kl": Metric("KL from a unit Gaussian, nats, clipped below at 0.5 x z (free nats)"),
    "kl_nats": Metric("KL from a unit Gaussian, nats, not clipped"),
    "likeness": Metric("VAE-GAN: feature loss of the discriminator"),
    "fooling": Metric("VAE-GAN: adversarial loss of the generator"),
}
JUDGE_METRICS = {
    "real": Metric("VAE-GAN: cross-entropy of the discriminator on real frames"),
    "reconstructed": Metric("VAE-GAN: cross-entropy of the discriminator on reconstructions"),
    "invented": Metric("VAE-GAN: cross-entropy of the discriminator on frames of latents drawn from the prior"),
    "learns": Metric("share of the updates in which the discriminator had not won already, and learned"),
}
MEMORY_METRICS = {
    "nll": Metric(
        "negative log-likelihood of the next latent, nats a dimension",
        shown="nll",
        panel="NLL of the next latent, nats a dimension",
    ),
    "reward": Metric("squared error of the reward"),
    "cont": Metric("cross-entropy of the continuation head, nats a step"),
    "reward_unexplained": Metric(
        "share of the rewards' mean square that is not predicted", panel="share of the reward not predicted"
    ),
}


@dataclass(frozen=True)
class WorldModelsConfig:
    """The numbers of `world_models`; as they stand, the paper's for CarRacing."""

    vision: str = setting(
        "vae",
        choices=("vae", "vae_gan"),
        help="what makes the latents; vae_gan: frames must also fool a discriminator",
    )
    z: int = setting(32, 1, 4096, help="dimensions of a latent")
    channels: int = setting(32, 1, 1024, help="channels of the first convolution")
    hidden: int = setting(256, 1, 16_384, help="width of the LSTM")
    mixtures: int = setting(5, 1, 100, help="Gaussians of each latent dimension")
    heads: int = setting(128, 1, 16_384, help="width of the reward and continuation heads")
    features: str = setting(
        "zh",
        choices=("zh", "z"),
        help="what the controller sees: latent and memory, or the latent alone (the paper's control)",
    )
    free_nats: float = setting(
        0.5,
        0,
        1e3,
        help="free nats of each latent dimension: their sum is the lower bound of the KL loss",
    )
    vision_updates: int = setting(3000, 0, resumable=True, help="updates a round")
    vision_batch: int = setting(100, 1, 65_536, help="frames of a batch")
    vision_lr: float = setting(1e-4, above=0, high=1, help="learning rate of the vision")
    gan_weight: float = setting(
        30.0,
        0,
        1e6,
        when={"vision": "vae_gan"},
        help="weight of the adversarial loss, against the feature loss; 1 / gamma of Larsen et al.",
    )
    memory_updates: int = setting(
        3000,
        0,
        resumable=True,
        help="updates a round; 0 leaves the memory as it was initialised (a published control)",
    )
    memory_batch: int = setting(64, 1, 65_536, help="segments of a batch")
    memory_length: int = setting(64, 2, 10_000, help="frames of a segment")
    memory_lr: float = setting(1e-3, above=0, high=1, help="learning rate of the memory")

    def build(self, spec: Spec) -> WorldModels:
        """The model, for frames and actions of this kind."""
        return WorldModels(self, spec)


class LSTM(nn.Module):
    """LSTM with one bias, the weight of an input that is always 1; memory {"h", "c"}: (B, H) each."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.cells = nn.LSTM(inputs + 1, width, bias=False, batch_first=True)
        with torch.no_grad():  # starts out remembering: the forget gate's bias is 1
            self.weights[0][:, -1] = torch.tensor([0.0, 1.0, 0.0, 0.0]).repeat_interleave(width)

    @property
    def weights(self) -> tuple[Tensor, Tensor]:
        """Of the input (4 H, I + 1) and of h (4 H, H); the gates in torch's order: input, forget, candidate, output."""
        inward, recurrent = self.cells.all_weights[0]
        return inward, recurrent

    def initial(self, batch_size: int) -> Tree:
        """Nothing seen yet: zeros."""
        zeros = self.weights[1].new_zeros(batch_size, self.width)
        return {"h": zeros, "c": zeros.clone()}

    def step(self, memory: Tree, x: Tensor) -> Tree:
        """One input (B, I) further."""
        return self._cell(memory, F.linear(self._with_one(x), self.weights[0]))

    def scan(self, x: Tensor) -> Tree:
        """(B, T, I) -> memories (B, T, H) before each input, the first of them initial."""
        projected = F.linear(self._with_one(x[:, :-1]), self.weights[0])  # all times in one matrix product
        memories = [self.initial(x.shape[0])]
        for gates in projected.unbind(1):
            memories.append(self._cell(memories[-1], gates))
        return {key: torch.stack([memory[key] for memory in memories], 1) for key in ("h", "c")}

    def outputs(self, x: Tensor) -> Tensor:
        """(B, T, I) -> h after each input (B, T, H), by the library's fused pass."""
        h: Tensor = self.cells(self._with_one(x))[0]
        return h.float()

    def _cell(self, memory: Tree, projected: Tensor) -> Tree:
        gates = projected + F.linear(memory["h"], self.weights[1])
        into, forget, candidate, out = gates.chunk(4, -1)
        c = forget.sigmoid() * memory["c"] + into.sigmoid() * candidate.tanh()
        return {"h": out.sigmoid() * c.tanh(), "c": c}

    def _with_one(self, x: Tensor) -> Tensor:
        return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], -1)


class WorldModels(WorldModel):
    """See the module's text. Latent: z (Z,), a frame's is its mean. Features: z and the LSTM's output, or z."""

    updates_are_graph_safe = dreams_are_graph_safe = True
    reward_square: Tensor  # (2,) running means of the squared reward and of 1, both from 0: their ratio is not biased

    def __init__(self, config: WorldModelsConfig, spec: Spec) -> None:
        super().__init__()
        if config.vision not in ("vae", "vae_gan"):
            raise ValueError(f'model.vision is "vae" or "vae_gan", got "{config.vision}"')
        if config.features not in ("zh", "z"):
            raise ValueError(f'model.features is "zh" or "z", got "{config.features}"')
        if min(config.z, config.channels, config.hidden, config.mixtures, config.heads) < 1:
            raise ValueError(f"sizes of world_models are at least 1, got {config}")
        self.config, self.spec = config, spec
        self.latent_shape = (config.z,)
        both = config.z + config.hidden
        self.feature_size = both if config.features == "zh" else config.z
        self.vae = ConvVAE(spec.frame, config.z, config.channels)
        self.discriminator = Discriminator(spec.frame, config.channels) if config.vision == "vae_gan" else None
        self.lstm = LSTM(config.z + spec.action_size, config.hidden)
        self.expect = nn.Linear(config.hidden, 3 * config.z * config.mixtures)
        self.reward = mlp(both, config.heads, 1, layers=1, zero=True)
        self.cont = mlp(both, config.heads, 1, layers=1)
        self.register_buffer("reward_square", torch.zeros(2))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        state_dict.setdefault(f"{prefix}reward_square", torch.zeros(2))  # checkpoints from before it lack it
        super()._load_from_state_dict(state_dict, prefix, *rest)

    # ---- the state machine ----
    def encode(self, frame: Tensor) -> Tensor:
        """The mean code of frames, which needs no memory: (..., C, H, W) -> (..., Z).

        The memory learns on draws, as the authors' does, and theirs acts on draws too. Following the game with the mean
        predicts the next latent a little better (0.825 nats a dimension against 0.832; CarRacing, 12,000 random steps,
        900 updates of the memory) and rewards no worse, and what the controller sees does not tremble.
        """
        return self.vae.encode(frame)[0]

    def observe(self, memory: Tree, frame: Tensor) -> State:
        return State(self.encode(frame), memory)

    def decode(self, state: State) -> Tensor:
        return self.vae.decode(state.latent)

    def initial(self, batch_size: int) -> Tree:
        return self.lstm.initial(batch_size)

    def advance(self, state: State, action: Tensor) -> Tree:
        known = self.lstm.step(state.memory, self.inputs(state.latent, action))
        return {**known, **({"off": state.memory["off"]} if "off" in state.memory else {})}

    def mixture(self, memory: Tree) -> Mixture:
        """What is expected of the next latent, (..., Z, K)."""
        said = split(self.expect(memory["h"]), self.config.mixtures)
        if "off" not in memory:
            return said
        left = said.log_weights.masked_fill(memory["off"].unsqueeze(-2), float("-inf"))
        return said._replace(log_weights=left.log_softmax(-1))

    @property
    def components(self) -> int:
        return self.config.mixtures

    def without(self, memory: Tree, components: Collection[int]) -> Tree:
        """Raises ValueError for one that does not exist, or when none would be left."""
        if not set(components) <= set(range(self.components)) or len(set(components)) == self.components:
            raise ValueError(f"{sorted(components)} of the {self.components} components cannot be left out")
        rest = {name: leaf for name, leaf in memory.items() if name != "off"}
        if not components:
            return rest
        off = torch.zeros(self.components, dtype=torch.bool, device=memory["h"].device)
        off[list(components)] = True
        return {**rest, "off": off.expand(len(memory["h"]), -1).contiguous()}

    def imagine(self, memory: Tree, temperature: float = 1.0) -> State:
        return State(self.mixture(memory).sample(temperature), memory)

    def prior_kl(self, memory: Tree, other: Tree) -> Tensor:
        return self.mixture(memory).kl(self.mixture(other)).sum(-1)

    def outcome(self, state: State) -> tuple[Tensor, Tensor]:
        reward, cont = self._outcome(state.memory["h"], state.latent)
        return reward, cont.sigmoid()

    def features(self, state: State) -> Tensor:
        if self.config.features == "z":
            return state.latent
        return torch.cat([state.latent, state.memory["h"]], -1)

    # ---- training ----
    def stages(self) -> tuple[Stage, ...]:
        """First what is seen, then what becomes of it: the memory learns on the finished latents."""
        config = self.config
        optim = Optim(lr=config.vision_lr, clip=VISION_CLIP)
        scales = {"pixels": 1.0, "kl": 1.0}
        vision: tuple[Objective, ...] = (
            Objective("vision", self._vision(), self._vae_loss, scales, optim, metrics=VISION_METRICS),
        )
        if self.discriminator is not None:
            scales = {"likeness": 1.0, "kl": 1.0, "fooling": config.gan_weight}
            judged = {"real": 1.0, "reconstructed": 1.0, "invented": 1.0}
            judge = tuple(self.discriminator.parameters())
            vision = (
                Objective("vision", self._vision(), self._vae_gan_loss, scales, optim, metrics=VISION_METRICS),
                Objective("discriminator", judge, self._discriminator_loss, judged, optim, metrics=JUDGE_METRICS),
            )
        parts = parameters_of([self.lstm, self.expect, self.reward, self.cont])
        memory = Objective(
            "memory", parts, self._memory_loss, {"nll": 1.0, "reward": 1.0, "cont": 1.0},
            Optim(lr=config.memory_lr, clip=1.0), after=self._note_rewards, metrics=MEMORY_METRICS,
        )  # fmt: skip
        return (
            Stage("vision", vision, config.vision_batch, 1, config.vision_updates),
            Stage("memory", (memory,), config.memory_batch, config.memory_length, config.memory_updates, self._codes),
        )

    def _vision(self) -> tuple[nn.Parameter, ...]:
        return tuple(self.vae.parameters())

    def _vae_loss(self, batch: Batch) -> Losses:
        """Squared error of all pixels in [0, 1], and the KL above its floor (the authors' `vae.py`), (B, T)."""
        target = to_unit(batch.frame)
        mean, log_var = self.vae.encode(target)
        error = (self.vae.decode(draw_latent(mean, log_var)) - target).square()
        terms = {"pixels": Term(error.sum((-3, -2, -1)), "valid")}
        return self._with_kl(terms, {}, mean, log_var, batch.valid.float())

    def _vae_gan_loss(self, batch: Batch) -> Losses:
        """Encoder and decoder of Larsen et al. 2016, algorithm 1.

        Likeness is squared error in the discriminator's features; only the decoder learns to fool it, with
        reconstructions and with frames of latents drawn from the prior. It minimises -log D, which pulls a beginner
        harder than their log(1 - D).
        """
        target, valid = to_unit(batch.frame), batch.valid.float()
        mean, log_var = self.vae.encode(target)
        z = draw_latent(mean, log_var)
        frame, again, invented = self.vae.decode(torch.stack([z, z.detach(), torch.randn_like(z)]))
        with torch.no_grad():
            real = self._judge(target)[1]
        features = self._judge(frame)[1]
        logit = self._judge(torch.stack([again, invented]))[0]
        terms = {
            "likeness": Term(0.5 * (features - real).square().sum(-1), "valid"),
            "fooling": Term(F.softplus(-logit).sum(0), "valid"),
        }
        pixels = (frame.detach() - target).square().sum((-3, -2, -1))
        return self._with_kl(terms, {"pixels": mean_where(pixels, valid)}, mean, log_var, valid)

    def _discriminator_loss(self, batch: Batch) -> Losses:
        """Binary cross-entropy on real, reconstructed and invented frames, (B, T) each; it learns until it has won."""
        assert self.discriminator is not None
        target, valid = to_unit(batch.frame), batch.valid.float()
        with torch.no_grad():
            z = draw_latent(*self.vae.encode(target))
            frames = torch.cat([target.unsqueeze(0), self.vae.decode(torch.stack([z, torch.randn_like(z)]))])
        real, reconstructed, invented = self.discriminator(frames)[0]
        terms = {
            "real": F.softplus(-real),
            "reconstructed": F.softplus(reconstructed),
            "invented": F.softplus(invented),
        }
        learns = (mean_where(torch.stack([*terms.values()]).mean(0).detach(), valid) > WON).float()
        return Losses({name: Term(_pulled(term, learns), "valid") for name, term in terms.items()}, {"learns": learns})

    def _judge(self, frame: Tensor) -> tuple[Tensor, Tensor]:
        """What the discriminator says of a frame, without a gradient to its own weights."""
        assert self.discriminator is not None
        weights = {name: weight.detach() for name, weight in self.discriminator.named_parameters()}
        judged: tuple[Tensor, Tensor] = functional_call(self.discriminator, weights, (frame,))
        return judged

    def _with_kl(
        self, terms: dict[str, Term], metrics: dict[str, Tensor], mean: Tensor, log_var: Tensor, valid: Tensor
    ) -> Losses:
        kl = kl_from_normal(mean, log_var).sum(-1)
        terms["kl"] = Term(kl.clamp(min=self.config.free_nats * self.config.z), "valid")
        return Losses(terms, metrics | {"kl_nats": mean_where(kl.detach(), valid)})

    @torch.no_grad()
    def _codes(self, frame: Tensor, action: Tensor) -> Tensor:
        """What the memory learns from: frames (T, C, H, W) -> means and log-variances (T, 2 Z)."""
        return torch.cat(self.vae.encode(frame), -1)

    def _memory_loss(self, batch: Batch) -> Losses:
        """How surprising the next latent was, in nats a dimension, and what the action brought: (B, T), at arrival.

        `batch.code` is (B, T, 2 Z) of `_codes`; latents are drawn anew each time, lest the memory learns one draw.
        """
        assert batch.code is not None
        z = draw_latent(*batch.code.float().chunk(2, -1))
        h = self.lstm.outputs(self.inputs(z, batch.action)[:, :-1])  # (B, T - 1, H): awaiting z[:, 1:]
        arrived = batch.mask("arrived")[:, 1:].float()
        reward, cont = self._outcome(h, z[:, 1:])
        square = mean_where(batch.reward[:, :-1].square(), arrived)
        noted = torch.lerp(torch.stack([square, torch.ones_like(square)]), self.reward_square, REWARD_DECAY)
        unit = (noted[0] / noted[1]).clamp(min=MIN_REWARD_SQUARE)
        # The pull, not the term, is measured in units of the reward: those of all batches lately. In a batch's own, one
        # without rewards weighs up to a thousand times as much, and of a rare reward (100, once a batch in the mean)
        # 0.00 of its mean was predicted, with four a batch 0.64; in a running unit 1.20 and 1.05, undivided 1.18 and
        # 1.02. Where rewards are dense the three predict alike: 0.76, 0.74 and 0.69 of the variance of 20 dreamed
        # steps' reward (CarRacing, 12,000 random steps, 600 updates).
        error = (_pulled(reward, 1 / unit) - batch.reward[:, :-1]).square()
        terms = {
            "nll": -self.mixture({"h": h}).log_prob(z[:, 1:]).mean(-1),
            "reward": error,
            "cont": F.binary_cross_entropy_with_logits(cont, 1.0 - batch.terminated[:, :-1].float(), reduction="none"),
        }
        unexplained = mean_where(error.detach(), arrived) / unit
        told = {name: Term(F.pad(term, (1, 0)), "arrived") for name, term in terms.items()}
        return Losses(told, {"reward_unexplained": unexplained}, learned=noted.unbind())  # of a team, the mean of each

    def _note_rewards(self, noted: tuple[Tensor, Tensor]) -> None:
        self.reward_square.copy_(torch.stack(noted))

    # ---- parts ----
    def _outcome(self, h: Tensor, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Reward in the game's units and the logit of going on, (...) each, in float32.

        The reward is plainly its mean: a score is a sum of many small random ones, which a squashed scale would bias.
        """
        both = torch.cat([h, latent], -1)
        return self.reward(both).float().squeeze(-1), self.cont(both).float().squeeze(-1)

    def inputs(self, latent: Tensor, action: Tensor) -> Tensor:
        """What the memory reads: (..., Z), (...[, A]) -> (..., Z + A)."""
        if self.spec.discrete:
            action = one_hot(action, self.spec.action_size)
        return torch.cat([latent, action.to(latent.dtype)], -1)


def _pulled(value: Tensor, factor: Tensor) -> Tensor:
    """The same value; the gradient that goes into it comes out times the factor."""
    held = value.detach()
    return held + factor * (value - held)
