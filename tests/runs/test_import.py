"""The command `import`: a published checkpoint of IRIS becomes a run that is played, evaluated and resumed, or nothing.

The checkpoints here are small ones, with the names and the layout of the published.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import main
from envs.spec import Spec
from policies.cnn_lstm import CnnLstm, CnnLstmConfig
from runs.cli import import_checkpoint
from runs.config import Config
from runs.dreams import load_parts
from runs.folder.run import Run
from runs.recipes.iris import iris
from world_model.iris_checkpoint import published_names
from world_model.parts.gpt import GPT, GPTConfig
from world_model.parts.vq_tokenizer import VQTokenizer, VQTokenizerConfig
from world_model.token_world import TokenWorld

FULL = Path(__file__).parents[3] / "shared" / "vectors" / "iris" / "keys_full_size.json"
TOKENIZER = VQTokenizerConfig(codes=8, width=8, channels=4, halvings=3, blocks=1, attention=(1,))  # 16 pixels, 4 tokens
TRANSFORMER = GPTConfig(codes=8, tokens=4, context_frames=5, width=16, layers=1, heads=4)
PONG = "ALE/Pong-v5"


def actor_critic(actions: int, channels: tuple[int, ...] = (4, 4, 4, 8), hidden: int = 16) -> dict[str, Tensor]:
    """Noise in the shapes of the published actor-critic; what the last convolution leaves is one place."""
    sizes = (3, *channels)
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(4):
        shapes |= {f"conv{i + 1}.weight": (sizes[i + 1], sizes[i], 3, 3), f"conv{i + 1}.bias": (sizes[i + 1],)}
    shapes |= {"lstm.weight_ih": (4 * hidden, sizes[-1]), "lstm.weight_hh": (4 * hidden, hidden)}
    shapes |= {"lstm.bias_ih": (4 * hidden,), "lstm.bias_hh": (4 * hidden,)}
    for head, outputs in (("critic", 1), ("actor", actions)):
        shapes |= {f"{head}_linear.weight": (outputs, hidden), f"{head}_linear.bias": (outputs,)}
    return {f"actor_critic.{name}": torch.randn(shape) / 4 for name, shape in shapes.items()}


def published(actions: int = 6, colours: int = 3) -> dict[str, Any]:
    """A whole checkpoint for frames of 16 x 16."""
    torch.manual_seed(0)
    ours: dict[str, VQTokenizer | GPT] = {
        "tokenizer": TOKENIZER.build((colours, 16, 16)), "world_model": TRANSFORMER.build(actions),
    }  # fmt: skip
    named = {f"{part}.{key}": value for part in ours for key, value in published_names(ours[part]).items()}
    position = torch.arange(25).view(5, 5)
    at = {"observations": position[:, [0, 1, 2, 4]].flatten(), "rewards": position[:, 4], "ends": position[:, 4]}
    layout = {f"world_model.head_{head}.indices": where.clone() for head, where in at.items()}
    mask = {"world_model.transformer.blocks.0.attn.mask": torch.ones(25, 25)}
    return {**named, **layout, **mask, **actor_critic(actions)}


def short(recipe: str, size: str) -> Config:
    """The recipe's own numbers with rounds of a few updates and short episodes."""
    config = iris(size)
    return replace(
        config,
        model=replace(config.model, tokenizer_updates=2, tokenizer_batch=4, updates=2, batch_size=4),
        policy=replace(config.policy, starts=4, horizon=3, updates=2),
        train=replace(config.train, steps_per_round=8, burn_in=4, log_every=1),
        game=replace(config.game, max_steps=50, num_envs=4),  # emulators that begin take time
        threads=1,
    )


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(import_checkpoint, "preset", short)
    monkeypatch.setattr(import_checkpoint, "PLAYED", 128)


def words(**more: str) -> list[str]:
    asked = {"format": "iris", "path": "Pong.pt", "env": PONG} | more
    return ["import", *(f"{key}={value}" for key, value in asked.items())]


def refused(capsys: pytest.CaptureFixture[str], **more: str) -> str:
    """What is said, in one line and with exit code 2, of an import that leaves nothing behind."""
    assert main.main(words(**more)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Traceback" not in said
    assert not Path("runs/out").exists() or not os.listdir("runs/out")
    return said


def test_a_published_checkpoint_becomes_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    state = published()
    torch.save(state, "Pong.pt")
    assert main.main(words(run="pong")) == 0
    assert "resume run=runs/out/pong" in capsys.readouterr().out
    assert os.listdir("runs/out") == ["pong"]
    run = Run.open("pong")
    wanted = {"size": 16, "gray": False, "sticky": 0, "noops": 30, "action_repeat": 4, "life_loss": True}
    assert {key: getattr(run.config.game, key) for key in wanted} == wanted
    assert run.meta["imported"] == {"format": "iris", "path": "Pong.pt"}

    parts = load_parts("pong", "cpu")  # as `play` does: no game, and starts for a dream
    agent, starts = parts.agent, parts.starts
    theirs = {key.removeprefix("actor_critic."): value for key, value in state.items() if "actor_critic" in key}
    ours = dict(agent.learner.named_parameters())
    assert len(theirs) == len(ours) == 16
    for name, known in import_checkpoint.ACTOR_CRITIC_NAMES.items():
        assert torch.equal(ours[name], theirs[known]), name
    assert isinstance(agent.world_model, TokenWorld)
    assert isinstance(agent.world_model.transformer, GPT)
    assert torch.equal(agent.world_model.transformer.position, state["world_model.pos_emb.weight"])
    assert torch.equal(agent.world_model.tokenizer.embedding.weight, state["tokenizer.embedding.weight"])
    assert starts.frame.shape[1:] == (9, 3, 16, 16) and len(starts.frame) > 16
    assert (
        agent.world_model.reward.seen.sum() == import_checkpoint.PLAYED
    )  # what signs are worth, the real game has told
    began = agent.world_model.start(starts.frame / 255, starts.action)
    assert agent.world_model.step(began, starts.action[:, 0]).reward.isfinite().all()

    assert main.main(["evaluate", "run=pong", "episodes=1", "threads=1", "game.max_steps=100"]) == 0
    result = json.loads(Path("runs/out/pong/results/evaluation-sampled-episodes1-max_steps100.json").read_text())
    assert result["episodes"] == 1 and -21 <= result["mean"] <= 21

    more = [f"steps={import_checkpoint.PLAYED + 16}", "episodes=1", "game.max_steps=100"]
    assert main.main(["resume", "run=pong", *more]) == 0
    again = load_parts("pong", "cpu")
    assert again.step == import_checkpoint.PLAYED + 16
    moved = [not torch.equal(a, b) for a, b in zip(agent.parameters(), again.agent.parameters(), strict=True)]
    assert all(moved)
    assert {"actor/value", "world_model/tokens"} <= set().union(*Run.open("pong").metrics())


def test_the_policy_is_that_of_the_published_program() -> None:
    """Their network written down once more, with torch's own LSTM cell."""
    torch.save(published(), "Pong.pt")
    assert main.main(words(run="pong")) == 0
    weights = {key.removeprefix("actor_critic."): value for key, value in torch.load("Pong.pt").items()}
    cell = torch.nn.LSTMCell(8, 16)
    cell.load_state_dict({name: weights[f"lstm.{name}"] for name in cell.state_dict()})
    frames, state = torch.rand(3, 5, 3, 16, 16), None
    learner = load_parts("pong", "cpu").agent.learner
    assert isinstance(learner, CnnLstm)
    hidden, memory = learner.policy.follow(frames.flatten(2), learner.policy.initial(3))
    for t in range(5):
        x = frames[:, t] * 2 - 1
        for i in range(1, 5):
            x = torch.nn.functional.conv2d(x, weights[f"conv{i}.weight"], weights[f"conv{i}.bias"], padding=1)
            x = torch.nn.functional.max_pool2d(x.relu(), 2)
        state = cell(x.flatten(1), state)
    assert state is not None
    torch.testing.assert_close((memory["h"], memory["c"]), state)
    logits = state[0] @ weights["actor_linear.weight"].T + weights["actor_linear.bias"]
    torch.testing.assert_close(learner.policy.log_probs(hidden[:, -1]), logits.log_softmax(-1))
    value = state[0] @ weights["critic_linear.weight"].T + weights["critic_linear.bias"]
    torch.testing.assert_close(learner.critic(hidden[:, -1]), value)


@pytest.mark.skipif(not FULL.is_file(), reason="the published names are not beside this repository")
def test_all_published_names_of_the_actor_critic_are_known() -> None:
    wanted = {key: value for key, value in json.loads(FULL.read_text()).items() if key.startswith("actor_critic")}
    with torch.device("meta"):
        ours = dict(CnnLstmConfig().build(3 * 64 * 64, Spec((3, 64, 64), 6, discrete=True)).named_parameters())
    known = {theirs: list(ours[name].shape) for name, theirs in import_checkpoint.ACTOR_CRITIC_NAMES.items()}
    assert {f"actor_critic.{name}": shape for name, shape in known.items()} == wanted
    assert len(known) == len(ours)


LSTM = "actor_critic.lstm."


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop(LSTM + "bias_ih"), f"it misses {LSTM}bias_ih."),
        (lambda state: [state.pop(key) for key in [*state] if "actor_critic" in key], "actor_critic.conv1.weight"),
        (lambda state: state.update({"actor_critic.conv5.bias": torch.ones(1)}), "unknown actor_critic.conv5.bias."),
        (lambda state: state.update({LSTM + "weight_ih": torch.ones(64, 9)}), "lstm.weight_ih (64x9 instead of 64x8)"),
        (lambda state: state.update({LSTM + "bias_hh": torch.full((64,), torch.inf)}), f"not finite are {LSTM}bias_hh"),
        (lambda state: state.update({LSTM + "bias_hh": torch.empty(0)}), "at least 1"),
        (lambda state: state.pop("tokenizer.embedding.weight"), "it misses tokenizer.embedding.weight"),
        (lambda state: state.update(day=date(2023, 5, 1)), "more than tensors and plain values (datetime.date)"),
    ],
)
def test_another_checkpoint_is_refused(
    change: Callable[[dict[str, Any]], Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    state = published()
    change(state)
    torch.save(state, "Pong.pt")
    assert said in refused(capsys)


def test_what_is_asked_for_wrongly_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "There is no file Pong.pt." in refused(capsys)
    torch.save(published(), "Pong.pt")
    assert 'Unknown format "dreamer": choose one of iris.' in refused(capsys, format="dreamer")
    assert "import needs format=..." in refused(capsys, format="")
    assert "import needs env=..." in refused(capsys, env="")
    assert "a game of 6 actions, and ALE/Breakout-v5 has 4" in refused(capsys, env="ALE/Breakout-v5")
    assert "Did you mean ALE/Pong-v5?" in refused(capsys, env="ALE/Pongg-v5")
    assert "is for Atari games" in refused(capsys, env="CartPole-v1")
    assert 'Unknown key "size"' in refused(capsys, size="xs")
    torch.save(published(colours=4), "Pong.pt")
    assert "frames of 4 colours, and ALE/Pong-v5 has 3" in refused(capsys)
    whole = Path("Pong.pt").read_bytes()
    Path("Pong.pt").write_bytes(whole[: len(whole) // 2])
    assert "not a complete checkpoint" in refused(capsys)


def test_a_run_that_exists_stays_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(published(), "Pong.pt")
    kept = Path("runs/out/ALE-Pong-v5-iris-imported")
    kept.mkdir(parents=True)
    assert main.main(words()) == 2
    assert f"{kept} already exists: choose another name with run=NAME." in capsys.readouterr().err
    assert not os.listdir(kept)


def test_an_import_that_is_stopped_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(published(), "Pong.pt")

    def stopped(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(import_checkpoint.Loop, "save", stopped)
    assert main.main(words()) == 130
    assert not os.listdir("runs/out")
