"""Past one machine, over loopback: Ray with two nodes, an address and a token, and Slurm's local stand-in.

Slow, and two of them want a launcher of Hydra's that is not among the test's packages: make test args="-m slow".
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import main

pytestmark = pytest.mark.slow
HOME = Path(main.__file__).parent
TOY = [
    "size=toy", "threads=1", "steps=96", "episodes=1", "train.prefill=64", "train.pretrain=2", "game.num_envs=2",
    "game.size=16", "train.show_every=1000", "game.max_steps=20",
]  # fmt: skip
NODES = """
import json, subprocess, sys
from ray.cluster_utils import Cluster
nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
nodes.add_node(num_cpus=1)
nodes.wait_for_nodes()
words = [word.replace("ADDRESS", nodes.address) for word in json.loads(sys.argv[1])]
code = subprocess.run(words).returncode
nodes.shutdown()
sys.exit(code)
"""
POPULATION = """
import sys, tempfile
from functools import partial
from pathlib import Path
from agent.ray_pool import Cluster
from agent.workers import Workers, weights_of
from tests import uneven
from tests.agent.test_workers import TASKS, drawn, same
folder = Path(tempfile.mkdtemp())
weights = weights_of(uneven.agent(1).world_model)
with Workers(uneven.make, 0) as here:
    expected = here.play(weights, 1, drawn(), TASKS)
with Cluster(partial(uneven.make, 3, "dies", folder), address=sys.argv[1]) as cluster:
    assert len(cluster.ray.nodes()) == 2
    same(cluster.play(weights, 1, drawn(), TASKS), expected)
assert len(list(folder.iterdir())) == 1, "one died on the way"
"""


def on_two_nodes(words: list[str], folder: Path, *, token: bool) -> None:
    """Runs a command beside a cluster of two raylets on this machine; ADDRESS is where it answers."""
    there = [str(HOME), *filter(None, [os.environ.get("PYTHONPATH", "")])]
    told = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": os.pathsep.join(there)}
    told |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "5" * 64} if token else {}
    program = [sys.executable, "-c", NODES, json.dumps([sys.executable, *words])]
    done = subprocess.run(program, cwd=folder, env=told, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


@pytest.mark.parametrize("token", [False, True])
def test_a_population_is_judged_on_two_nodes_of_which_one_loses_a_worker(token: bool, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    on_two_nodes(["-c", POPULATION, "ADDRESS"], tmp_path, token=token)


@pytest.mark.parametrize("token", [False, True])
def test_games_are_swept_over_two_nodes(token: bool, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_ray_launcher")
    words = [str(HOME / "main.py"), "atari100k", "games=Pong,Boxing", "out=all", *TOY, "hydra/launcher=ray"]
    words += ["hydra.launcher.ray.init.address=ADDRESS", "+hydra.launcher.ray.init.object_store_memory=null"]
    on_two_nodes(words, tmp_path, token=token)
    assert set(json.loads((tmp_path / "all/summary.json").read_text())["games"]) == {"Pong", "Boxing"}


def test_seeds_are_swept_by_slurms_launcher(tmp_path: Path) -> None:
    """By submitit's local executor, which runs the jobs of a sweep as Slurm would: other processes, by files."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    words = [sys.executable, str(HOME / "main.py"), "-m", "env=Catch-v0", "seed=0,1", *TOY]
    words += ["hydra/launcher=submitit_local", "hydra.sweep.dir=all", "hydra.sweep.subdir='${seed}'"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    for seed in (0, 1):
        told = json.loads((tmp_path / f"all/{seed}/results/evaluation-sampled.json").read_text())
        assert told["seed"] == seed and told["env_steps"] == 96
