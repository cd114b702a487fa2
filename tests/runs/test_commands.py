"""The table of commands: help, completion and docs come from it; a system from elsewhere; keys of older runs; doors."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path

import pytest
import torch

import dreamloop
import main
from envs import settings
from envs.errors import UserError
from runs import build
from runs.cli import commands, completion, compose, docs
from runs.cli.table import RECIPE, RUN, load
from runs.config import OLD_NAMES
from runs.config_types import keys, renamed, values
from runs.folder import system
from runs.folder.run import Run
from runs.recipes import RECIPES, from_dict, from_recorded, preset
from runs.report import curve

ROOT = Path(main.__file__).parent


# ---- the table ----
def test_every_row_names_a_function_and_a_typed_config_whose_keys_have_help() -> None:
    for name, row in main.COMMANDS.items():
        assert callable(load(row.function)), name
        if row.reads not in (RECIPE, RUN):
            config = load(row.reads)()
            assert is_dataclass(config)
            assert [key for key, _, rule in settings.walk(config) if not rule.help] == [], name


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_number_of_a_recipe_has_a_range_and_every_key_a_line_of_help(recipe: str) -> None:
    for key, value, rule in settings.walk(preset(recipe, "xs")):
        assert rule.help, key
        if isinstance(value, int | float) and not isinstance(value, bool) and key != "game.size":  # also 84x64
            assert rule.limits, key


@pytest.mark.parametrize("name", main.COMMANDS)
def test_help_of_a_command_lists_its_keys(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([name, "--help"]) == 0
    said, row = capsys.readouterr().out, main.COMMANDS[name]
    own = ["run"] if row.reads == RUN else keys(preset("reverie", "xs") if row.reads == RECIPE else load(row.reads)())
    assert not [key for key in own if not re.search(rf"^{re.escape(key)} .* ", said, re.M)]


def test_a_wrong_word_and_the_overview_do_not_wait_for_torch() -> None:
    for words, code in ((["trian"], 2), (["--help"], 0)):
        program = f"import sys, main; code = main.main({words}); assert 'torch' not in sys.modules; sys.exit(code)"
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == code, done.stderr


def test_nothing_else_reads_words_of_a_command_line() -> None:
    for path in [*ROOT.glob("*.py"), *(file for folder in ("envs", "world_model", "policies", "agent", "play", "runs")
                                       for file in ROOT.glob(f"{folder}/**/*.py"))]:  # fmt: skip
        text = path.read_text()
        assert path.name == "main.py" or "__main__" not in text, path
        read = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute) and node.attr == "argv"]
        assert path.name in ("main.py", "system.py", "train.py") or not read, (
            path
        )  # of which the last sets them for Hydra


def test_the_pages_are_what_the_command_writes() -> None:
    for page in docs.pages(main.COMMANDS):
        assert (ROOT / "docs" / page.name).read_text() == page.text, f"{page.name}: run python main.py docs"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("dreamloop fid", {"fidelity"}), ("dreamloop resume run=ca", {"catch"}), ("dreamloop recipe=rev", {"reverie"}),
        ("dreamloop policy.actor", {"policy.actor_lr="}), ("dreamloop play mod", {"mode="}),
        ("dreamloop evaluate ep", {"episodes="}),
    ],
)  # fmt: skip
def test_bash_completes_commands_keys_recipes_and_runs(line: str, expected: set[str], tmp_path: Path) -> None:
    (tmp_path / "runs/out/catch").mkdir(parents=True)
    (tmp_path / "runs/out/catch/config.json").write_text("{}")
    script = completion.script(["--shell-completion", "bash"], main.COMMANDS)
    script += f'\nCOMP_LINE="{line}"; COMP_POINT=${{#COMP_LINE}}; _dreamloop; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == expected


def test_completion_for_other_shells_names_everything_too() -> None:
    for shell in ("zsh", "fish"):
        text = completion.script([f"--shell-completion={shell}"], main.COMMANDS)
        assert not [word for word in (*main.COMMANDS, *RECIPES, "policy.actor_lr=", "runs/out/") if word not in text]
    with pytest.raises(UserError, match="bash, zsh, fish"):
        completion.script(["--shell-completion", "tcsh"], main.COMMANDS)


# ---- what is declared ----
def test_every_logged_number_is_declared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = dreamloop.train(
        "Catch-v0", size="toy", steps=2_050, episodes=1, threads=1, folder="one",
        train={"prefill": 2_034, "pretrain": 2, "log_every": 1},
    )  # fmt: skip
    logged = {key for line in Run.open(folder).metrics() for key in line} - docs.OF_EVERY_LINE.keys()
    assert logged and not logged - build.metrics(Run.open(folder).config).keys()
    assert dreamloop.evaluate(folder, episodes=2)["greedy"]["episodes"] == 2


def test_a_run_says_first_what_it_will_do_and_how_long_that_takes(tmp_path: Path) -> None:
    told = {"recipe": "reverie", "env": "ALE/Pong-v5", "protocol": "default", "size": "xs", "hours": 4.8,
            "env_steps": 500_000, "training": {"threads": 1},
            "machine": {"gpu": None, "cpu": "EPYC", "cores": 2, "bf16": False}}  # fmt: skip
    for name, other in {"b": {}, "a": {"protocol": "atari100k"}, "c": {"variant": "flat"}}.items():
        path = tmp_path / f"reverie-{name}-evaluation-sampled.json"
        path.write_text(json.dumps(told | other | ({"hours": 99} if other else {})))
    config = preset("reverie", "xs")
    said = "Learning ALE/Pong-v5 with reverie, size xs: 250,000 steps of the real game, about 2.4 hours as published, "
    assert re.match(rf"{re.escape(said)}on 1 core of EPYC; \d+ cores? here\.$", commands.announcement(config, tmp_path))
    of_another = commands.announcement(replace(config, env="ALE/Boxing-v5"), tmp_path)
    assert "about 2.4 hours as published for ALE/Pong-v5 (default), on 1 core of EPYC;" in of_another
    assert "no published run" in commands.announcement(preset("iris", "m"))
    shared = json.loads((tmp_path / "reverie-b-evaluation-sampled.json").read_text()) | {"core_hours": 2.4}
    (tmp_path / "reverie-b-evaluation-sampled.json").write_text(json.dumps(shared))
    assert "about 72 min as published" in commands.announcement(config, tmp_path), "others had the core too"


@pytest.mark.parametrize("here", [True, False])
def test_where_bfloat16_is_missing_a_run_says_that_it_takes_longer(here: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: here)
    said = commands.announcement(replace(preset("reverie", "xs"), device="cpu"))
    assert ("about three times as long" in said) is not here
    assert system.facts()["machine"]["bf16"] is (here or torch.cuda.is_available())


# ---- a system from elsewhere ----
SYSTEM = """
from dataclasses import dataclass
import torch
from torch import nn
from envs.settings import setting
from world_model.interface import Losses, Metric, Objective, Stage, State, Term, WorldModel, to_unit

@dataclass(frozen=True)
class MeanConfig:
    lr: float = setting(1e-3, above=0, high=1, resumable=True, help="learning rate")

    def build(self, spec):
        return Mean(self, spec)

class Mean(WorldModel):
    '''The latent is a frame's mean colour, and the memory how long the episode is.'''
    def __init__(self, config, spec):
        super().__init__()
        self.config, self.spec, self.latent_shape, self.feature_size = config, spec, (spec.frame[0],), spec.frame[0] + 1
        self.next = nn.Linear(self.feature_size, spec.frame[0])
    def initial(self, batch_size):
        return {"age": self.next.weight.new_zeros(batch_size, 1)}
    def advance(self, state, action):
        return {"age": state.memory["age"] + 1}
    def imagine(self, memory, temperature=1.0):
        return State(self.next(torch.cat([memory["age"].expand(-1, self.feature_size - 1), memory["age"]], -1)), memory)
    def observe(self, memory, frame):
        return State(frame.flatten(-2).mean(-1), memory)
    def outcome(self, state):
        return state.latent[:, 0], torch.ones_like(state.latent[:, 0])
    def features(self, state):
        return torch.cat([state.latent, state.memory["age"]], -1)
    def decode(self, state):
        return None
    def stages(self):
        metrics = {"mean": Metric("squared error of the mean colour", shown="mean")}
        objective = Objective("mean", tuple(self.parameters()), self.loss, {"mean": 1.0}, metrics=metrics)
        return (Stage("mean", (objective,), 4, 4),)
    def loss(self, batch):
        latent = to_unit(batch.frame).flatten(-2).mean(-1)
        age = torch.arange(latent.shape[1]).view(1, -1, 1).expand(len(latent), -1, 1).float()
        told = self.next(torch.cat([latent, age], -1))
        error = (told[:, :-1] - latent[:, 1:]).square().mean(-1)
        return Losses({"mean": Term(nn.functional.pad(error, (1, 0)), "arrived")}, {})
"""
RECIPE_FILE = """
from mean_system import MeanConfig
from agent.trainer import TrainConfig
from envs.games import GameConfig
from policies.actor_critic import ActorCriticConfig
from runs.config import Config

def mean(size):
    return Config(recipe="mean", size=size, model=MeanConfig(), policy=ActorCriticConfig(starts=4, horizon=2, hidden=8),
                  train=TrainConfig(prefill=400, pretrain=2, burn_in=2, log_every=1), steps=560,
                  game=GameConfig(num_envs=2))
"""


def test_a_system_from_elsewhere_is_two_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mean_system.py").write_text(SYSTEM)
    (tmp_path / "mean_recipe.py").write_text(RECIPE_FILE)
    words = ["recipe=mean_recipe:mean", "env=Catch-v0", "size=toy", "threads=1", "episodes=1", "hydra.run.dir=run"]
    told = os.environ | {"PYTHONPATH": str(tmp_path)}
    program = [sys.executable, str(ROOT / "main.py"), *words]
    done = subprocess.run(program, cwd=tmp_path, env=told, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["rounds"] >= 10 and "mean/mean" in lines[-1] and "policy/return" in lines[-1]
    assert json.loads((tmp_path / "run/config.json").read_text())["recipe"] == "mean_recipe:mean"
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))  # as PYTHONPATH, without waiting for torch again
    assert main.main(["evaluate", "run=run", "episodes=2"]) == 0
    assert main.main(["resume", "run=run", "model.lr=3"]) == 2
    assert "model.lr must be above 0 and at most 1" in capsys.readouterr().err


# ---- keys of older runs ----
def test_a_run_that_an_older_program_wrote_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """config.json as commit 7774eef wrote it."""
    config = preset("iris_ac", "toy")
    told = json.loads(json.dumps(asdict(config)))
    told["policy"] |= {"passes": 3, "ratio": 0.3}
    del told["policy"]["epochs"], told["policy"]["clip_ratio"], told["replay"]["validation"]
    told["experience"] = told.pop("init_replay")
    told["model"]["steps"] = told["model"].pop("context_frames")
    run = Run.create(config, tmp_path / "old")
    (tmp_path / "old/config.json").write_text(json.dumps(told))
    opened = Run.open(tmp_path / "old")
    assert (opened.config.policy.epochs, opened.config.policy.clip_ratio) == (3, 0.3)
    assert opened.config.model.context_frames == config.model.context_frames and opened.config.init_replay == ""
    run.save_checkpoint({}, 1)  # of other epochs, which may be changed
    path = next((tmp_path / "old/checkpoints").iterdir())
    assert path.exists() and opened.load_checkpoint() == {}
    commands.opened("resume", [f"run={tmp_path / 'old'}", "policy.passes=2"])
    assert capsys.readouterr().err == "policy.passes is called policy.epochs now.\n"


def test_an_old_name_is_taken_only_where_it_means_the_new_one() -> None:
    valid = keys(preset("reverie", "toy"))
    assert renamed({"policy": {"passes": 2}, "model": {"steps": 3}}, OLD_NAMES, valid) == {
        "policy": {"epochs": 2}, "model": {"steps": 3},
    }  # fmt: skip
    with pytest.raises(UserError, match='Unknown key "model.steps"'):
        from_dict({"recipe": "reverie", "size": "toy", "model": {"steps": 3}})
    assert values(from_dict({"recipe": "reverie", "size": "toy", "policy": {"passes": 2}}))["policy.epochs"] == 2


def test_what_an_old_run_did_not_say_is_what_it_did() -> None:
    told = asdict(preset("reverie", "toy"))
    assert told["model"]["cont_from"] == "memory" and told["train"]["bursts"] > 0
    del told["model"]["cont_from"], told["model"]["dreamed_reward"], told["train"]["bursts"]
    config = from_recorded(told)
    assert (config.model.cont_from, config.model.dreamed_reward, config.train.bursts) == ("features", 0.0, 0.0)


# ---- doors ----
def test_the_module_works_beside_a_folder_called_runs(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    program = (
        f"import sys; sys.path[:] = [p for p in sys.path if p != {str(ROOT)!r}]\n"
        f"import importlib.util as u; spec = u.spec_from_file_location('dreamloop', {str(ROOT / 'dreamloop.py')!r})\n"
        "dreamloop = u.module_from_spec(spec); spec.loader.exec_module(dreamloop)\n"
        "import gymnasium; assert 'Dream-v0' in gymnasium.registry\n"
        "player = dreamloop.load(); frame, _ = player.dream.reset(seed=0); player.act(frame)\n"
        "assert dreamloop.make_dream(num_envs=2, horizon=3).reset(seed=0)[0].shape[0] == 2\n"
    )
    told = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=told, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_python_without_the_packages_is_told_in_one_sentence(tmp_path: Path) -> None:
    words = [sys.executable, "-S", "-E", str(ROOT / "main.py"), "info"]  # -S: without what is installed
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "make train installs" in done.stderr


def test_help_of_a_recipe_lists_its_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["recipe=iris", "size=m", "--help"]) == 0
    assert "model.tokenizer_updates" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["3e-4", "2026_01_01", "1.10", "true"])
def test_a_run_may_be_called_like_a_number(name: str) -> None:
    assert compose.filled("curve", curve.CurveConfig(), [f"run={name}"]).run == name
    (config,) = compose.check(compose.prepared(["env=Catch-v0", "size=toy", f"init_replay={name}"]))
    assert config.init_replay == name


def test_help_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    told = []
    for words in (["help"], ["--help"], ["help", "fidelity"], ["fidelity", "--help"]):
        assert main.main(words) == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1] and told[2] == told[3] and told[0] != told[2]


def test_values_from_python_are_read_as_they_are() -> None:
    given = {"env": "ALE/Pong-v5", "game": {"sticky": None}, "model": {"levels": (8, 4)}, "a": True, "b": 'x "y"'}
    words = [f"{key}={dreamloop._quoted(value)}" for key, value in dreamloop._flat(given)]
    assert words == ["env=ALE/Pong-v5", "game.sticky=null", "model.levels=[8,4]", "a=true", 'b="x \\"y\\""']
    arguments = {"difficulty": 1, "mode": None}
    (word,) = (f"{key}={dreamloop._quoted(value)}" for key, value in dreamloop._flat({"game": {"kwargs": arguments}}))
    (config,) = compose.check(compose.prepared(["env=ALE/Pong-v5", "size=toy", word]))
    assert config.game.kwargs == arguments


def test_a_reader_that_has_seen_enough_is_no_fault() -> None:
    work = "from runs.cli.exit_codes import guarded; import sys; sys.exit(guarded(lambda: print('line\\n' * 100_000)))"
    words = f'{sys.executable} -c "{work}" | head -1; echo ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", words], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["line", "141"] and not done.stderr
