"""A dream as a page without a server: the graph is the model, and the page plays it."""

from __future__ import annotations

import gzip
import json
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from envs.errors import UserError
from play import graph
from play.server import PAGE
from runs.cli import export
from runs.cli.export import ExportConfig, export_parts, round_weights
from runs.dreams import load_parts
from runs.measure import page as browser
from tests import trained

PAGES = ("app.js", "local.js", "style.css")


@pytest.fixture(scope="module")
def shipped() -> Iterator[Any]:
    """The shipped page in a browser, and what went wrong in it."""
    try:
        with browser.hosted(export.SHIPPED) as url, browser.chromium() as opened:
            page = opened.new_page(viewport={"width": 1280, "height": 800})
            page.set_default_timeout(60_000)
            faults: list[str] = []
            page.on("pageerror", lambda problem: faults.append(str(problem)))
            page.goto(url)
            page.wait_for_function("play.frames > 0")
            yield page
            assert not faults, faults
    except UserError as problem:
        pytest.skip(str(problem))


def test_the_shipped_page_is_the_page_of_play() -> None:
    for name in PAGES:
        assert (export.SHIPPED / name).read_text() == (PAGE / name).read_text(), (
            "main.py export out=docs/play weights=int8 beside=kungfumaster"
        )
    size = sum(path.stat().st_size for path in export.SHIPPED.rglob("*"))
    assert size <= 13e6 and "MIT License" in (export.SHIPPED / "ORT-LICENSE.txt").read_text()


def test_it_is_played_without_a_server(shipped: Any) -> None:
    page = shipped

    def told(name: str) -> Any:
        return page.evaluate(f"play.state.{name}")

    page.wait_for_function("play.state.step > 3")
    page.keyboard.down("d")
    page.wait_for_function("play.state.action === 2")
    page.keyboard.up("d")
    page.wait_for_function("play.state.action === 0")
    page.keyboard.press("p")
    page.wait_for_function("play.state.paused")
    before = told("step")
    picture = page.evaluate("canvas_dream.toDataURL()")
    page.keyboard.press("n")
    page.wait_for_function(f"play.state.step === {before + 1}")
    after, future = page.evaluate("canvas_dream.toDataURL()"), told("value")
    page.evaluate("give('rewind', 1)")
    page.wait_for_function(f"play.state.step === {before}")
    assert page.evaluate("canvas_dream.toDataURL()") == picture != after
    page.keyboard.press("n")
    page.wait_for_function(f"play.state.step === {before + 1}")
    assert told("value") == future, "random numbers are part of the moment"
    page.keyboard.press("k")
    page.keyboard.press("r")
    page.wait_for_function("play.state.step === 0 && play.state.seed === 1")
    page.keyboard.press("l")
    page.wait_for_function(f"play.state.step === {before + 1} && play.state.seed === 0")
    page.evaluate("give('player', 'agent'); give('fps', 60); give('pause', false)")
    page.wait_for_function(f"play.state.step > {before + 20} && play.state.player === 'agent'")
    assert sum(told("probabilities")) == pytest.approx(1, abs=1e-3)


def test_a_page_of_several_dreams_lets_choose(shipped: Any) -> None:
    page = shipped
    names = page.locator("#dream a")
    assert names.all_inner_texts() == ["Pong", "Kung Fu Master"]
    assert page.locator("#dream [aria-current]").inner_text() == "Pong"
    names.nth(1).click()
    page.wait_for_function("play.state?.step > 2")
    assert page.evaluate("play.hello.name") == "ALE/KungFuMaster-v5" and page.url.endswith("/?dream=kungfumaster")
    page.goto(page.url.replace("kungfumaster", "../../etc"))
    page.wait_for_function("play.frames > 0")
    assert page.evaluate("play.hello.name") == "ALE/Pong-v5", "no folder but those of the page"
    page.goto(page.url.split("?")[0])
    page.wait_for_function("play.frames > 0")


def test_what_needs_the_real_game_is_not_shown(shipped: Any) -> None:
    for selector in ("[data-do=record]", "#sync", "#mode", "[data-about=record]"):
        assert not shipped.locator(selector).is_visible(), selector
    assert "Planner" not in shipped.locator("#player").inner_text()
    shipped.keyboard.press("m")
    shipped.keyboard.press("v")
    assert shipped.evaluate("play.state.mode") == "dream"


def test_the_graph_is_the_model(tmp_path: Path) -> None:
    """Beside onnx's own reference, with rounded weights; the page's files hold what the graph wants."""
    evaluator = pytest.importorskip("onnx.reference")
    folder = trained.make(tmp_path / "run", groups=6, classes=8, points=2, distances=True, deter=160)
    path = export.command(ExportConfig(run=str(folder), weights="int8", starts=2))
    told = json.loads((path / "dream.json").read_text())
    import onnx

    proto = onnx.load_from_string(gzip.decompress((path / "model.bin").read_bytes()))
    kinds = {tensor.data_type for tensor in proto.graph.initializer}
    assert {onnx.TensorProto.INT8, onnx.TensorProto.FLOAT16} <= kinds, "small ones are rounded less"
    loaded = load_parts(folder, "cpu")
    round_weights(loaded.agent, "int8")
    judge, wanted = evaluator.ReferenceEvaluator(proto), {entry.name for entry in proto.graph.input}
    for feed, expected in graph.reference(export_parts(loaded), told["numbers"], 5):
        names = list(expected)
        for name, made in zip(names, judge.run(names, {k: v for k, v in feed.items() if k in wanted}), strict=True):
            apart = np.abs(made.astype(np.float32) - expected[name])
            assert apart.mean() < 1e-3 if name == "picture" else apart.max() < 1e-3, name
    assert len(told["starts"]) == 2 and told["discrete"] and told["hello"]["players"] == ["human", "agent", "random"]
    file = gzip.decompress((path / "starts.bin").read_bytes())
    entry = next(entry for entry in told["starts"][1] if entry["name"] == "picture")
    first = np.frombuffer(file, np.uint8, int(np.prod(entry["dims"])), entry["at"]).reshape(entry["dims"])
    assert np.array_equal(first, graph.begun(export_parts(loaded), 1)[1]["picture"].numpy())


def test_every_further_dream_has_a_folder_of_its_own(tmp_path: Path) -> None:
    loaded = load_parts()
    mine = loaded._replace(config=replace(loaded.config, env="my.games:Dodge-v0"))
    places = export._places([loaded, loaded, loaded, mine, mine])
    assert list(places) == ["", "pong/", "pong-2/", "my-games-dodge/", "my-games-dodge-2/"]
    assert [entry["name"] for entry in export._titles({"": loaded, "b/": places["pong/"]})] == ["Pong, reverie"] * 2
    with pytest.raises(UserError, match=r"single=true makes one file of one dream: leave out beside="):
        export.command(ExportConfig(beside=("kungfumaster",), single=True))


def test_a_system_that_is_no_graph_is_refused_and_so_is_a_foreign_folder(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    folder = trained.make(tmp_path / "run", "iris_ac")
    with pytest.raises(UserError, match="cannot be written as a graph"):
        export.command(ExportConfig(run=str(folder)))
    assert not any((folder / "exported").iterdir())
    with pytest.raises(UserError, match="cannot be made a folder"):
        export.command(ExportConfig(run=str(folder), out="/proc/x"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds something else than an export"):
        export.command(ExportConfig(run=str(folder), out=str(tmp_path / "mine")))


def test_a_page_is_measured_with_the_run_it_was_made_of(tmp_path: Path) -> None:
    run = trained.make(tmp_path / "run")
    with pytest.raises(
        UserError, match="was made of reverie xs after 500,000 steps, and run names reverie toy after 400"
    ):
        browser.measure_static(browser.PageConfig(folder=str(export.SHIPPED)), load_parts(run, "cpu"))


def test_a_runtime_that_is_another_is_refused(tmp_path: Path) -> None:
    from rich.console import Console

    console = Console(quiet=True)
    with pytest.raises(UserError, match=r"is missing: runtime= names"):
        export.fetched(str(tmp_path / "none.tgz"), console)
    (tmp_path / "torn.tgz").write_bytes(b"torn")
    with pytest.raises(UserError, match="is no onnxruntime-web"):
        export.fetched(str(tmp_path / "torn.tgz"), console)
    for member, _ in export.RUNTIME.values():
        (tmp_path / "package" / member).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "package" / member).write_bytes(b"another")
    with tarfile.open(tmp_path / "other.tgz", "w:gz") as archive:
        archive.add(tmp_path / "package", "package")
    with pytest.raises(UserError, match="is not what was published"):
        export.fetched(str(tmp_path / "other.tgz"), console)
