"""The configuration and the command line: what is composed, and how every mistake is answered."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

import main
from agent.trainer import NonFiniteLoss
from envs.errors import UserError
from runs import config_types
from runs.cli import commands, compose
from runs.config import SIZES, Config
from runs.folder.run import Run
from runs.recipes import RECIPES, from_dict, preset


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Config, Path]]:
    """What would have been trained."""
    calls: list[tuple[Config, Path]] = []
    monkeypatch.setattr(commands, "train", lambda config, folder: calls.append((config, folder)))
    return calls


@pytest.fixture
def finished(here: Path) -> Run:
    """An existing run named "old"."""
    config = config_types.fill(preset("reverie", "toy"), {"env": "Catch-v0"})
    run = Run.create(config, here / "runs/out/old")
    run.save_checkpoint({}, 1)
    return run


# ---- mistakes ----
MISTAKES = {
    "trian": "Did you mean train?",
    "evaluatee run=old": "Did you mean evaluate?",
    "trian.prefill=3": 'Unknown key "trian.prefill". Did you mean train.prefill?',
    "train.prefil=3": 'Unknown key "train.prefil". Did you mean train.prefill?',
    "prefill=3": "Did you mean train.prefill?",
    "+nonsense_without_likeness=1": "The keys are",
    "~seed": "cannot be removed",
    "train seed": "write key=value",
    "train.prefill=many": 'train.prefill needs a whole number, not "many".',
    "steps=10.5": "steps needs a whole number, not 10.5.",
    "game.gray=3": "game.gray needs true or false, not 3.",
    "game.sticky=often": 'game.sticky needs a number or null, not "often".',
    "train=3": "train is a group of keys",
    "env=ALE/Pnog-v5": "Did you mean ALE/Pong-v5?",
    "env=pong": "Pong",
    "recipe=revery": "Did you mean reverie?",
    "size=xl": "choose one of toy, xs, s, m",
    "protocol=atari": "Did you mean atari100k?",
    "device=cudda": "Did you mean cuda?",
    "steps=0": "steps must be at least 1, not 0.",
    "threads=-1": "threads must be between 0 and 1024, not -1.",
    "threads=1000000": "threads must be between 0 and 1024",
    "seed=18446744073709551616": "seed must be between 0 and",
    "seed=" + "9" * 400: "seed must be between 0 and",
    "model.lr=nan": "model.lr must be above 0 and at most 1, not nan.",
    "policy.gamma=2": "policy.gamma must be between 0 and 1, not 2.0.",
    "policy.critic_lr=-1": "policy.critic_lr must be above 0",
    "model.classes=0": "model.classes must be between 2 and",
    "model.deter=100000000": "model.deter must be between 1 and",
    "size=toy train.burn_in=16": "train.burn_in must be below model.length, 16, not 16.",
    "episodes=0": "episodes must be at least 1",
    "game.size=1": "game.size must be between",
    "replay.recency=2": "replay.recency",
    "train.log_every=0": "train.log_every must be at least 1",
    "game.size=84x": 'height x width like 84x64, not "84x".',
    "model.dynamics=lstm": "model.dynamics must be one of gru, transformer",
    "policy.starts=-5": "policy.starts must be between 0 and",
    "recipe=iris_ac size=toy policy.starts=0": "policy.starts must be at least 1",
    "policy.lr=3": "Did you mean policy.actor_lr or policy.critic_lr?",
    "recipe=spatial info": "A command stands before all keys",
    "leaderboard env=Pong": "Did you mean ALE/Pong-v5?",
    "train.precision=bf61": "Did you mean bf16?",
    "seed=1,2": "add -m",
    "-m seed=1,x": 'seed needs a whole number, not "x".',
    "-m size=toy,gigantic": 'Unknown size "gigantic"',
    "hydra/launcher=nowhere": "hydra/launcher",
    "hydra.nothing=3": "nothing",
    "hydra.verbose={}": "hydra.verbose is true, false or a list",
    "-cd nowhere env=Catch-v0 size=toy": "--config-dir has no meaning here",
    "env=Catch-v0 -- -m": "-- has no meaning here",
    "env=Catch-v0 size=toy hydra.run.dir=" + 300 * "x": "File name too long",
    "env=Catch-v0 seed=" + 5_000 * "9": "seed needs a whole number",
    "play seed=" + 5_000 * "9": "seed needs a whole number",
    "name=a/b": 'name="a/b" is no name of a folder: hydra.run.dir=... takes any path.',
    "name=.. size=toy": "is no name of a folder",
    "name=x hydra.run.dir=y": "both say where the run lies",
    "-m name=x seed=0,1": "name= is one run's",
    "--nonsense": "nonsense",
    "info -m seed=1,2": "takes no flags",
    "info seed=1,2": "sweep",
    "run=old": "python main.py resume run=",
    "resume": "resume needs one run=NAME. The newest runs are old.",
    "resume run=odl": "Did you mean old?",
    "resume run=runs": "runs is not a run folder",
    "resume run=old steps=many": "steps needs a whole number",
    "resume run=old steps=-4": "steps must be at least 1",
    "resume run=old seed=2": "seed was fixed when the run began: only steps, episodes, device, threads",
    "evaluate run=old episodse=3": "Did you mean episodes?",
    "evaluate run=old episodes=1,2": "needs one value",
    "size=toy model.window=8": "model.window changes nothing here: it is read with model.dynamics=transformer, "
    "and model.dynamics is gru.",
    "recipe=latent_gru size=toy model.history=3": "it is read with model.dynamics=block or frames, and",
    "size=toy workers=4": "workers changes nothing here: it is for a population",
    "-m size=toy model.window=8,9": "model.window changes nothing here",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_answered_in_one_line_before_anything_is_written(
    line: str, finished: Run, trained: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path for path in Path().rglob("*"))
    capsys.readouterr()
    assert main.main(line.split()) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Traceback" not in said
    assert MISTAKES[line] in said
    assert not trained
    assert sorted(path for path in Path().rglob("*")) == before


def test_a_key_that_some_runs_of_a_sweep_read_is_accepted() -> None:
    words = ["env=Catch-v0", "size=toy", "model.dynamics=gru,transformer", "model.window=8"]
    assert {config.model.dynamics for config in compose.check(words, multirun=True)} == {"gru", "transformer"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["device=cuda", "env=Catch-v0"]) == 2
    assert "needs a GPU" in capsys.readouterr().err


def test_as_a_program_a_mistake_ends_with_code_2_and_one_line(here: Path) -> None:
    program = [sys.executable, str(Path(main.__file__)), "train.prefil=3"]
    done = subprocess.run(program, capture_output=True, text=True, cwd=here)
    assert done.returncode == 2
    assert done.stderr == 'Unknown key "train.prefil". Did you mean train.prefill?\n' and not done.stdout


# ---- what goes wrong later ----
@pytest.mark.parametrize(
    ("problem", "code", "said"),
    [
        (UserError("This checkpoint\nis another's."), 2, "This checkpoint is another's.\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "The disk is full"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/nowhere"),
            2,
            "Cannot write /nowhere: Permission denied.\n",
        ),
        (NonFiniteLoss("world_model/kl became nan."), 1, "world_model/kl became nan.\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_an_error_inside_a_run_is_one_line_too(
    problem: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(config: Config, folder: Path) -> None:
        raise problem

    monkeypatch.setattr(commands, "train", fail)
    assert main.main(["env=Catch-v0", "size=toy"]) == code
    error = capsys.readouterr().err
    assert error.startswith(said) and error.count("\n") == (1 if said else 0)


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(config: Config, folder: Path) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(commands, "train", fail)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        main.main(["env=Catch-v0", "size=toy"])


# ---- what is composed ----
def test_words_become_a_typed_configuration_and_a_run_folder(trained: list[tuple[Config, Path]], here: Path) -> None:
    words = ["env=Catch-v0", "size=toy", "seed=3", "steps=1e4", "game.sticky=null", "train.save_every=5", "device=cpu"]
    assert main.main(words) == 0
    ((config, folder),) = trained
    expected = {"env": "Catch-v0", "seed": 3, "steps": 10_000, "device": "cpu", "train": {"save_every": 5.0}}
    assert config == config_types.fill(preset("reverie", "toy"), expected)
    assert type(config.steps) is int and type(config.train.save_every) is float
    assert folder.parent == Path("runs/out") and folder.name.startswith("Catch-v0-reverie-3-")
    assert Path.cwd() == here and not list(folder.iterdir())  # no .hydra folder, no log file


def test_the_run_folder_can_be_named_and_a_slash_in_the_id_makes_no_folder(trained: list[tuple[Config, Path]]) -> None:
    assert main.main(["train", "size=toy", "hydra.run.dir=elsewhere/x"]) == 0
    assert main.main(["train", "size=toy"]) == 0
    assert main.main(["size=toy", "name=first-try"]) == 0
    assert trained[0][1] == Path("elsewhere/x")
    assert trained[1][1].parent == Path("runs/out") and trained[1][1].name.startswith("ALE-Pong-v5-reverie-0-")
    assert trained[2][1] == Path("runs/out/first-try")


@pytest.mark.parametrize(("device", "size"), [("cpu", "xs"), ("cuda", "s")])
def test_the_size_follows_the_device_unless_it_is_given(
    device: str, size: str, trained: list[tuple[Config, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compose, "choose_device", lambda name: device)
    assert main.main(["env=Catch-v0"]) == main.main(["env=Catch-v0", "size=toy"]) == 0
    assert [config.size for config, _ in trained] == [size, "toy"]
    assert trained[0][0].model == preset("reverie", size).model != trained[1][0].model


def test_a_protocol_is_a_word_and_single_keys_come_after_it(trained: list[tuple[Config, Path]]) -> None:
    assert main.main(["protocol=atari100k", "size=toy"]) == 0
    assert main.main(["game.noops=5", "protocol=atari100k", "steps=7000", "size=toy"]) == 0
    (first, _), (second, _) = trained
    assert (first.protocol, first.steps, first.game.sticky, first.game.noops) == ("atari100k", 100_000, 0.0, 30)
    assert first.replay.validation == 0 and second.game.life_loss, "every one of its steps is trained on"
    assert (second.protocol, second.steps, second.game.sticky, second.game.noops) == ("atari100k", 7000, 0.0, 5)


def test_a_sweep_is_one_run_in_a_folder_of_its_own_for_each_combination(trained: list[tuple[Config, Path]]) -> None:
    assert main.main(["-m", "env=Catch-v0,Count-v0", "size=toy,xs", "seed=0"]) == 0
    ran = [(config.env, config.size, config.model) for config, _ in trained]
    assert ran == [
        (env, size, preset("reverie", size).model) for env in ("Catch-v0", "Count-v0") for size in ("toy", "xs")
    ]
    assert len({folder for _, folder in trained}) == 4


def test_run_commands_get_the_run_with_its_changed_keys(finished: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Run] = []
    for command in ("resume", "evaluate"):
        monkeypatch.setattr(commands, command, runs.append)
    assert main.main(["resume", "run=old", "steps=5e5", "threads=2"]) == 0
    assert main.main(["evaluate", f"run={finished.folder}", "episodes=7"]) == 0
    assert runs[0].config == config_types.fill(finished.config, {"steps": 500_000, "threads": 2})
    # What was asked for counts for this time, until a checkpoint was gone on with.
    assert runs[1].config == config_types.fill(finished.config, {"episodes": 7})
    runs[0].keep_config(commands.OF_THE_MACHINE)
    assert Run.open("old").config == config_types.fill(finished.config, {"steps": 500_000})  # threads are of one day


def test_info_and_benchmark_get_a_configuration_and_make_no_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs: list[Config] = []
    for command in ("info", "benchmark"):
        monkeypatch.setattr(commands, command, configs.append)
        assert main.main([command, "size=toy", "env=Catch-v0"]) == 0
    assert configs == [config_types.fill(preset("reverie", "toy"), {"env": "Catch-v0"})] * 2
    assert not list(here.iterdir())


def test_steps_that_end_before_anything_is_learned_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["size=toy", "env=Catch-v0", "steps=100"]) == 2
    assert "steps must be at least train.prefill" in capsys.readouterr().err


def test_arguments_of_a_game_reach_it(trained: list[tuple[Config, Path]]) -> None:
    assert main.main(["size=toy", "env=ALE/Pong-v5", "game.kwargs={difficulty: 1}"]) == 0
    assert trained[0][0].game.kwargs == {"difficulty": 1}


def test_what_fails_in_a_sweep_does_not_keep_the_others_from_running(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[int] = []

    def work(config: Config, folder: Path) -> None:
        ran.append(config.seed)
        if config.seed in (1, 2):
            raise UserError(f"seed {config.seed} is unlucky")

    monkeypatch.setattr(commands, "train", work)
    assert main.main(["-m", "size=toy", "env=Catch-v0", "seed=0,1,2,3"]) == 2
    said = capsys.readouterr().err
    assert ran == [0, 1, 2, 3] and said.count("is unlucky") == 2
    assert "Of the sweep " in said and said.count("Catch-v0-reverie-") == 2


@pytest.mark.parametrize("name", ["rün", "a=b", "c[d]", "e'f", 'g"h\\', "k l", "{x", "$y", "1e3", "a:b", "(z"])
def test_a_value_that_the_grammar_cannot_read_is_text(name: str) -> None:
    """Paths have any letters; the words reach train and the other commands alike."""
    assert compose.changed(commands.ResumeConfig(), [f"run={name}"]).run in (name, str(1000.0))
    (override,) = compose.read(compose.prepared([f"hydra.run.dir={name}"]))
    assert str(override.value()).strip("'\"") in (name.strip("'\""), "1000.0")


def test_the_version_is_ours(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("dreamloop ")


def test_help_names_commands_keys_and_recipes(trained: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert not [word for word in (*main.COMMANDS, "COMMAND --help", "--cfg job") if word not in text]
    assert main.main(["train", "--help", "recipe=iris"]) == 0
    text = capsys.readouterr().out
    words = [*RECIPES, *SIZES, "env", "protocol", "steps", "model.tokenizer_lr", "name=NAME", "--cfg job"]
    assert not [word for word in words if word not in text]
    assert not trained


def test_cfg_shows_the_configuration_and_runs_nothing(trained: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--cfg", "job", "env=Catch-v0", "size=toy", "train.prefill=77"]) == 0
    text = capsys.readouterr().out
    assert "env: Catch-v0" in text and "prefill: 77" in text and "size: toy" in text
    assert not trained


# ---- typed configurations ----
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("size", SIZES)
def test_every_recipe_at_every_size_is_in_range_and_survives_json(recipe: str, size: str) -> None:
    config = preset(recipe, size)
    config.check()
    assert (config.recipe, config.size) == (recipe, size)
    assert from_dict(json.loads(json.dumps(asdict(config)))) == config


@dataclass(frozen=True)
class Inner:
    depths: tuple[int, ...] = (1, 2)
    rate: float | None = None

    def __post_init__(self) -> None:
        if self.rate is not None and self.rate > 1:
            raise ValueError("rate is at most 1")


@dataclass(frozen=True)
class Outer:
    kind: Literal["gru", "transformer"] = "gru"
    name: str = "a"
    inner: Inner = field(default_factory=Inner)


def test_filling_keeps_what_is_not_given_and_converts_only_what_loses_nothing() -> None:
    filled = config_types.fill(Outer(), {"kind": "transformer", "name": 7, "inner": {"depths": [3, 4.0, 5], "rate": 1}})
    assert filled == Outer("transformer", "7", Inner((3, 4, 5), 1.0))
    assert type(filled.inner.rate) is float and type(filled.inner.depths[1]) is int
    assert config_types.fill(filled, {"inner": {"rate": None}}) == Outer("transformer", "7", Inner((3, 4, 5), None))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"kind": "grru"}, "Did you mean gru?"),
        ({"name": None}, "name needs text, not null."),
        ({"inner": {"depths": 3}}, "inner.depths needs a list like"),
        ({"inner": {"depths": [1, "x"]}}, r"inner.depths\[1\] needs a whole number"),
        ({"inner": {"rate": True}}, "inner.rate needs a number or null, not true."),
        ({"inner": {"rate": 2}}, "inner: rate is at most 1"),
        ({"inner": {"rat": 2}}, 'Unknown key "inner.rat". Did you mean inner.rate?'),
    ],
)
def test_filling_names_what_is_wrong(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        config_types.fill(Outer(), given)


def test_a_key_within_a_group_can_be_changed_too() -> None:
    config = RECIPES["world_models"]("toy")
    changed = compose.changed(config, ["policy.real_generations=7", "steps=900"], ["steps", "policy.real_generations"])
    assert (changed.policy.real_generations, changed.steps) == (7, 900)
    assert changed.policy.generations == config.policy.generations
