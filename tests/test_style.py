"""The code itself: imports point left, functions stay readable, what is imported is declared."""

from __future__ import annotations

import ast
import configparser
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Each imports only from those before it; play stands beside agent.
ORDER = {"envs": 0, "world_model": 1, "policies": 2, "agent": 3, "play": 3, "runs": 4, "main": 5}
ORDER |= {"dreamloop": 6, "tests": 7}
DISTRIBUTIONS = {"cv2": "opencv-python", "PIL": "pillow", "hydra": "hydra-core", "Box2D": "gymnasium"}
DISTRIBUTIONS |= {"pygame": "pygame-ce"}
FILES = sorted(path for folder in ORDER for path in [*ROOT.glob(f"{folder}/**/*.py"), *ROOT.glob(f"{folder}.py")])
SOURCES = [path for path in FILES if "out" not in path.relative_to(ROOT).parts]
MAX_FUNCTION = 60


def imports(tree: ast.AST) -> Iterator[str]:
    """The full name of every module that is imported anywhere, inside functions and type checks too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


def wrong_way(folder: str, tree: ast.AST) -> list[str]:
    """The imports that a module of `folder` must not have."""
    wrong = []
    for name in imports(tree):
        target = name.split(".")[0]
        if target in ORDER and target != folder and ORDER[target] >= ORDER[folder]:
            wrong.append(name)
    return wrong


def folder_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def test_sources_are_found() -> None:
    assert {"envs", "agent", "tests"} <= {folder_of(path) for path in SOURCES}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_module(path: Path) -> None:
    """Imports point left; functions are short enough to read."""
    text = path.read_text()
    tree = ast.parse(text)
    assert not wrong_way(folder_of(path), tree)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert not [node.name for node in functions if (node.end_lineno or 0) - node.lineno >= MAX_FUNCTION]


@pytest.mark.parametrize(
    ("folder", "line", "wrong"),
    [
        ("envs", "import agent.replay", True),
        ("agent", "def f():\n    from runs import config", True),
        ("agent", "import play", True),
        ("policies", "from world_model import interface", False),
        ("runs", "import agent, envs.spec, torch", False),
    ],
)
def test_the_rule_itself(folder: str, line: str, wrong: bool) -> None:
    assert bool(wrong_way(folder, ast.parse(line))) == wrong


def test_every_import_is_declared() -> None:
    """A package that only happens to be installed, as somebody else's dependency, may be gone tomorrow."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    declared = {re.split(r"[^\w.-]", line)[0] for line in "\n".join(lines).split()}
    used = {name.split(".")[0] for path in SOURCES for name in imports(ast.parse(path.read_text()))}
    used -= {*ORDER, *sys.stdlib_module_names}
    assert {DISTRIBUTIONS.get(name, name.replace("_", "-")) for name in used} <= declared
