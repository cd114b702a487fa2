"""Several processes that train one model, as torchrun starts them, over loopback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing

import main
from agent import team
from agent.trainer import Trainer
from envs.errors import UserError
from envs.spec import Spec
from runs.folder.run import Run
from tests import trained
from tests.toys import segments
from world_model.interface import Batch

HOME = Path(main.__file__).parent
UPDATES, ROWS, LENGTH = 4, 8, 6


def free_port() -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return str(taken.getsockname()[1])


def learned(crew: team.Team, part: slice) -> dict[str, torch.Tensor]:
    """What updates on this part of the same batches make of a model with a moving codebook; and mean gradients."""
    config = trained.small("Catch-v0", "iris_ac")
    config = replace(config, model=replace(config.model, quantizer="ema"))
    torch.manual_seed(3)
    model = config.model.build(Spec(config.game.frame_shape, 3, True))
    stage = model.stages()[0]
    trained_ids = {id(one) for objective in stage.objectives for one in objective.params}
    shared = [one for one in (*model.parameters(), *model.buffers()) if id(one) not in trained_ids]
    trainer = Trainer(stage.objectives, device=torch.device("cpu"), precision="fp32", team=crew, shared=shared)
    for number in range(UPDATES):
        torch.manual_seed(10 + number)
        batch: Batch = segments(model.spec, ROWS, LENGTH)
        batch = batch._replace(valid=torch.ones_like(batch.valid), has_action=torch.ones_like(batch.has_action))
        for objective in stage.objectives:
            trainer.update(objective, batch.rows(torch.arange(ROWS)[part]))
    means = {id(one): moments["exp_avg"] for optimizer in trainer.optimizers.values()
             for one, moments in optimizer.state.items()}  # fmt: skip
    gradients = {f"gradient of {name}": means[id(one)] for name, one in model.named_parameters() if id(one) in means}
    return model.state_dict() | gradients


def member(rank: int, port: str, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)
    with team.joined("cpu") as crew:
        half = ROWS // 2
        found = learned(crew, slice(rank * half, (rank + 1) * half))
        assert crew.any(rank == 1) and not crew.any(False) and crew.part(5) == 3
    torch.save(found, f"{folder}/{rank}.pt")


def test_two_processes_of_half_the_batch_are_one_of_the_whole(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(member, (free_port(), str(tmp_path)), nprocs=2)  # type: ignore[no-untyped-call]
    whole = learned(team.Team(), slice(None))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, value in whole.items():
        assert torch.equal(first[name], second[name]), name
        apart, size = (first[name] - value).abs().max(), value.abs().max()
        # Adam makes whole steps of the rounding errors where the gradient is 0, as before a norm.
        assert apart <= (1e-5 if "gradient" in name or "embedding" in name else 1e-4), name
        assert "gradient" not in name or apart <= 1e-3 * size or size < 1e-4, name
    codes = whole["tokenizer.embedding.weight"]
    assert not torch.equal(codes, learned(team.Team(), slice(0, ROWS // 2))["tokenizer.embedding.weight"]), (
        "half the batch alone leads elsewhere"
    )


def torchrun(*words: str) -> subprocess.Popen[str]:
    program = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    return subprocess.Popen([*program, str(HOME / "main.py"), *words], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, start_new_session=True)  # fmt: skip


@pytest.mark.slow
def test_a_team_trains_loses_one_and_its_run_goes_on_alone(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = ["env=Catch-v0", "size=toy", "threads=1", "train.prefill=320", "train.pretrain=4", "train.save_every=1"]
    words += ["game.size=32", "steps=200000", "episodes=2", f"hydra.run.dir={folder}", "train.show_every=100000"]
    process = torchrun(*words)
    try:
        until = time.monotonic() + 120
        while not (folder / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.2)
        time.sleep(2)
        found = subprocess.run(["pgrep", "-f", f"main.py.*{folder}"], capture_output=True, text=True).stdout.split()
        members = [pid for pid in map(int, found) if pid != process.pid]
        victim = next(pid for pid in members if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
        os.kill(victim, signal.SIGKILL)
        said, _ = process.communicate(timeout=90)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode and "Another process of the team has ended. All up to step" in said, said[-3000:]
    run = Run.open(folder)
    state = run.load_checkpoint()
    assert run.step == state["replay"]["steps"] + state["others"] and state["others"] == state["replay"]["steps"] > 100
    assert main.main(["resume", f"run={folder}", f"steps={run.step + 16}", "game.max_steps=20"]) == 0
    assert Run.open(folder).load_checkpoint()["others"] == state["others"]


def test_what_is_not_for_a_team_is_a_sentence(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from runs import build

    config = trained.small("Catch-v0", "world_models")
    games = trained.make_games("Catch-v0", config.game)
    with pytest.raises(UserError, match="torchrun is for policies that learn by gradients"):
        build.loop(config, games, None, "cpu", team.Team(0, 2))
    games.close()
    assert team.size() == 1 and team.rank() == 0
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert team.size() == 2 and team.rank() == 1
    assert main.main(["-m", "seed=0,1", "size=toy", "env=Catch-v0"]) == 2
    assert "torchrun trains one run on several processes" in capsys.readouterr().err
