"""The command `export`: a dream as a folder, or one file, that any static host shows; the model plays in the browser.

The page is that of `play` (`play/page/`), with `local.js` in the server's place; the model is a graph (`play/graph.py`)
that ONNX Runtime for the web (Microsoft, MIT licence) plays. That is fetched once, from npm's registry, and checked.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import re
import shutil
import tarfile
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from envs.controls import STANDS_FOR
from envs.episode import DAMAGE
from envs.errors import UserError
from envs.settings import setting
from play import graph, keys
from play.server import PAGE
from play.session import HOTTEST, MOST_FPS
from play.snapshot import Parts
from runs.cli.play import about, players
from runs.dreams import Loaded, load_parts
from runs.folder.files import write_atomic
from runs.measure.scores import game_of
from world_model.dream.batch import NEARLY

VERSION = "1.30.0"
ADDRESS = f"https://registry.npmjs.org/onnxruntime-web/-/onnxruntime-web-{VERSION}.tgz"
CACHE = Path.home() / ".cache" / "dreamloop" / f"onnxruntime-web-{VERSION}.tgz"
SHIPPED = Path(__file__).resolve().parents[2] / "docs" / "play"  # has the runtime too
RUNTIME = {  # file of the page: file of the package, and its checksum
    "ort.wasm.bin": (
        "dist/ort-wasm-simd-threaded.wasm",
        "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
    ),
    "ort.mjs": ("dist/ort.wasm.bundle.min.mjs", "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90"),
}
LICENCE = f"""ort.mjs and ort.wasm.bin are ONNX Runtime Web {VERSION}, https://github.com/microsoft/onnxruntime

MIT License

Copyright (c) Microsoft Corporation

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""
LACKS = ("record", "sync")  # what needs the real game, or a disk
OWN = {"dream.json", "model.bin", "starts.bin"}  # of each dream
FPS = 15.0
BROKEN: tuple[type[Exception], ...] = (tarfile.TarError, *DAMAGE)


@dataclass(frozen=True)
class ExportConfig:
    """What `python main.py export` takes."""

    run: str | None = setting(None, help="a run's folder or name, or a model that ships; Pong when not given")
    beside: tuple[str, ...] = setting((), help="further runs, whose dreams the page offers beside the first")
    out: str = setting("", help="the folder that is written; exported/ within the run's when not given")
    weights: str = setting(
        "float16",
        choices=("float32", "float16", "int8"),
        help="number format of the model's large matrices in the page",
    )
    starts: int = setting(8, 1, 32, help="real contexts that a dream can begin from")
    single: bool = setting(False, help="one HTML file that opens from disk, instead of a folder for a web server")
    runtime: str = setting("", help=f"onnxruntime-web-{VERSION}.tgz, for machines that do not reach npm's registry")


def command(asked: ExportConfig) -> Path:
    """Writes the page and says how to open it; returns its folder, or the file.

    Raises:
        UserError: no such run, a system that has no graph, packages or the runtime missing, a folder that is no export.
    """
    console = Console(highlight=False)
    torch.set_num_threads(1)
    if asked.single and asked.beside:
        raise UserError("single=true makes one file of one dream: leave out beside=.")
    places = _places([load_parts(run, "cpu") for run in (asked.run, *asked.beside)])
    first = places[""]
    folder = Path(asked.out) if asked.out else (first.run.folder if first.run else Path()) / "exported"
    _usable(folder)
    runtime = fetched(asked.runtime, console)
    files = dict(runtime)
    for place, loaded in places.items():
        round_weights(loaded.agent, asked.weights)
        made = graph.export(export_parts(loaded), asked.weights, lambda sentence: console.print(sentence))
        told, starts = _told(loaded, made, asked.starts)
        own = {"model.bin": gzip.compress(made.model, 9, mtime=0), "starts.bin": gzip.compress(starts, 9, mtime=0)}
        told["bytes"] = sum(map(len, (*own.values(), *runtime.values())))
        if len(places) > 1:
            told["hello"]["dreams"] = _titles(places)
        own["dream.json"] = json.dumps(told).encode()
        files |= {f"{place}{name}": content for name, content in own.items()}
    return _write(folder, files | {"ORT-LICENSE.txt": LICENCE.encode()}, asked.single, console)


def _titles(places: Mapping[str, Loaded]) -> list[dict[str, str]]:
    """What a person chooses between, and where it lies: Kung Fu Master of ALE/KungFuMaster-v5; with the recipe, too,
    where one game is dreamed by several.
    """
    games = {place: re.sub(r"(?<=[a-z])(?=[A-Z])", " ", game_of(one.config.env)) for place, one in places.items()}
    several = [game for game in games.values() if list(games.values()).count(game) > 1]
    return [
        {"name": game + f", {places[place].config.recipe}" * (game in several), "folder": place.strip("/")}
        for place, game in games.items()
    ]


def _places(every: Sequence[Loaded]) -> dict[str, Loaded]:
    """The dreams by the folder of the page in which each lies: the first in the page's own, "", others in "GAME/"."""
    found = {"": every[0]}
    for loaded in every[1:]:
        name = place = re.sub(r"[^a-z0-9_]+", "-", game_of(loaded.config.env).lower())  # as the page takes it
        number = 1
        while f"{place}/" in found:
            number += 1
            place = f"{name}-{number}"
        found[f"{place}/"] = loaded
    return found


def _usable(folder: Path) -> None:
    """Makes the folder. Raises UserError where it cannot be one, or holds what is no export."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in folder.iterdir()}
    except OSError as problem:
        raise UserError(f"{folder} cannot be made a folder: {problem.strerror}.") from problem
    if names and not names & {"dream.json", "dream.html"}:
        raise UserError(f"{folder} holds something else than an export: choose another out=FOLDER.")


def round_weights(module: nn.Module, weights: str) -> None:
    """Gives a module the weights that a graph stores: what is played there is then exactly this."""
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.from_numpy(graph.rounded(tensor.float().numpy(), weights)))


def export_parts(loaded: Loaded) -> Parts:
    """What a graph is made of."""

    def no_game() -> Any:
        raise UserError("An exported page has no real game.")

    name, world = loaded.config.env, loaded.world()
    return Parts(name, world, loaded.agent.learner, no_game, players=players(loaded), aspect=loaded.aspect)


def _told(loaded: Loaded, made: graph.Graph, count: int) -> tuple[dict[str, Any], bytes]:
    """dream.json, all that the page must know, and the file of the starts that it describes."""
    parts, controls, file = export_parts(loaded), loaded.controls, io.BytesIO()
    count = min(count, len(loaded.starts.frame))
    listed = []
    for start in range(count):
        leaves, shown = graph.begun(parts, start)
        named = {f"state{i}": leaf for i, leaf in enumerate(leaves)} | shown
        listed.append([_put(file, name, tensor) for name, tensor in named.items()])
    height, width, _ = shown["picture"].shape
    free = [key._asdict() for key in keys.free(controls) if key.command not in (*LACKS, "mode")]
    hello = {
        "about": about(loaded), "name": parts.name, "modes": ["dream"],
        "players": [player for player in parts.players if player != "planner"], "components": 0,
        "actions": list(controls.names), "discrete": controls.discrete, "starts": count,
        "game_keys": keys.spoken(controls), "pad": keys.pad(controls), "keys": free, "most_fps": MOST_FPS,
        "hottest": HOTTEST, "lacks": list(LACKS),
    }  # fmt: skip
    rest = controls.action(())
    told = {
        "hello": hello, "state": list(made.state), "numbers": made.numbers, "starts": listed,
        "discrete": controls.discrete, "actions": len(controls.names), "rest": [] if isinstance(rest, int) else rest,
        "keys": [[list(chord), action] for chord, action in controls.keys], "stands_for": STANDS_FOR,
        "temperature": loaded.temperature(None), "coldest": graph.COLDEST, "fps": FPS, "height": height, "width": width,
        "aspect": loaded.aspect, "whole_rewards": loaded.whole_rewards, "nearly": NEARLY,
    }  # fmt: skip
    return told, file.getvalue()


def _put(file: io.BytesIO, name: str, tensor: Tensor) -> dict[str, Any]:
    array = np.ascontiguousarray(tensor.numpy())
    entry = {"name": name, "type": str(array.dtype), "dims": list(array.shape), "at": file.tell()}
    file.write(array.tobytes())
    return entry


# ---- the page ----
def _write(folder: Path, files: Mapping[str, bytes], single: bool, console: Console) -> Path:
    page = {name: (PAGE / name).read_text() for name in ("index.html", "style.css", "app.js", "local.js")}
    script = '<script src="app.js"></script>'
    assert script in page["index.html"]
    if single:
        path = folder / "dream.html"
        write_atomic(path, _single(page, files, script).encode())
        console.print(f"{path} ({path.stat().st_size / 1e6:.1f} MB): open it in a browser", soft_wrap=True)
        return path
    page["index.html"] = page["index.html"].replace(script, f'<script src="local.js"></script>\n{script}')
    for name, content in ({key: text.encode() for key, text in page.items()} | dict(files)).items():
        write_atomic(folder / name, content)
    for path in folder.glob("*/dream.json"):  # of dreams that an earlier export had beside it
        if f"{path.parent.name}/dream.json" not in files and {one.name for one in path.parent.iterdir()} == OWN:
            shutil.rmtree(path.parent)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    console.print(f"{folder} ({size / 1e6:.1f} MB): put it on any host of static pages, or", soft_wrap=True)
    console.print(f"python -m http.server -d {folder}   and open http://localhost:8000", soft_wrap=True)
    return folder


def _single(page: Mapping[str, str], files: Mapping[str, bytes], script: str) -> str:
    def inline(code: str) -> str:
        return "<script>\n" + code.replace("</script", "<\\/script") + "</script>"

    names = {"model": "model.bin", "starts": "starts.bin", "wasm": "ort.wasm.bin", "runtime": "ort.mjs"}
    data = [
        f'<script type="text/plain" id="file_{key}">{base64.b64encode(files[name]).decode()}</script>'
        for key, name in names.items()
    ]
    told = files["dream.json"].decode().replace("</", "<\\/")
    data.append(f'<script type="application/json" id="file_told">{told}</script>')
    data.append(f"<!--\n{files['ORT-LICENSE.txt'].decode()}-->")
    code = "\n".join([*data, inline(page["local.js"]), inline(page["app.js"])])
    link = '<link rel="stylesheet" href="style.css">'
    assert link in page["index.html"]
    return page["index.html"].replace(link, f"<style>\n{page['style.css']}</style>").replace(script, code)


# ---- the runtime ----
def fetched(path: str, console: Console) -> dict[str, bytes]:
    """The runtime's two files as the page takes them; from `path`, the page that ships, the cache, or the registry.

    Raises UserError when it cannot be had, or is not what it should be.
    """
    if not path and all((SHIPPED / name).exists() for name in RUNTIME):
        found = {name: (SHIPPED / name).read_bytes() for name in RUNTIME}
        if all(_is_right(name, content) for name, content in found.items()):
            return found
    package = Path(path) if path else CACHE
    if not package.exists():
        if path:
            raise UserError(f"{package} is missing: runtime= names onnxruntime-web-{VERSION}.tgz.")
        console.print(f"fetching {ADDRESS}", soft_wrap=True)
        try:
            with urllib.request.urlopen(ADDRESS, timeout=60) as answer:
                write_atomic(package, answer.read())
        except OSError as problem:
            raise UserError(
                f"{ADDRESS} cannot be fetched ({problem}): fetch it elsewhere (npm pack onnxruntime-web@{VERSION}) and "
                "name it, runtime=PATH."
            ) from problem
    try:
        with tarfile.open(package) as archive:
            files = {name: archive.extractfile(f"package/{member}") for name, (member, _) in RUNTIME.items()}
            raw = {name: file.read() for name, file in files.items() if file is not None}
    except BROKEN as problem:
        raise UserError(f"{package} is no onnxruntime-web-{VERSION}.tgz: delete it and try again.") from problem
    made = {name: gzip.compress(raw[name], 9, mtime=0) if name.endswith(".bin") else raw[name] for name in RUNTIME}
    if wrong := [name for name, content in made.items() if not _is_right(name, content)]:
        raise UserError(f"{package} is not what was published ({', '.join(wrong)}): delete it and try again.")
    return made


def _is_right(name: str, content: bytes) -> bool:
    try:
        raw = gzip.decompress(content) if name.endswith(".bin") else content
    except DAMAGE:
        return False
    return hashlib.sha256(raw).hexdigest() == RUNTIME[name][1]
