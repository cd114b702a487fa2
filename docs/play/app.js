"use strict";
// The page: pictures and figures that the server sends, keys that it receives. See play/connection.py for the messages.
// An exported page has no server: local.js, which stands before this file, takes its place.

const $ = (id) => document.getElementById(id);
const NAMES = { " ": "space", arrowleft: "left", arrowright: "right", arrowup: "up", arrowdown: "down", "+": "=" };
const ARROWS = { left: "←", right: "→", up: "↑", down: "↓" };
const LABELS = { dream: "Dream", real: "Real game", both: "Both", human: "You", agent: "Agent", planner: "Planner", random: "Random" };
const CAPTIONS = { real: "Real game", dream: "Dream", difference: "Difference" };
const NOTHING = "false"; // no key, and not back: what the server takes for granted
const ZOOMS = [1, 0.7, 0.45]; // of what fits
const SHARE = 0.66; // of the window's height that the pictures take
const TOUCH = matchMedia("(pointer: coarse)").matches || new URLSearchParams(location.search).has("touch");

// Read by tests and by the benchmark as well.
const play = { hello: null, state: null, frames: 0, latencies: [], connected: false };
window.play = play;

let socket, commands = new Map(), gameKeys = new Set(), zoom = 0;
const sources = { keyboard: new Set(), touch: new Set(), gamepad: new Set() };
const pressed = new Map(); // physical key -> the name it had when it went down
const sentAt = new Map(); // number of an input -> when it was made
const drawnAt = []; // times of the last frames
const trace = []; // the agent's values
let acknowledged = 0; // what to add to the frames seen: those of earlier connections do not count
let dirty = false; // there are figures to show
let hint = ""; // how to play
let input = 0, lastHeld = NOTHING, fingersBack = false, hiddenPause = false, helpPause = false;

// ---- the connection ----
function connect() {
  if (window.openDream) {
    socket = window.openDream();
    socket.onmessage = ({ data }) => (typeof data === "string" ? hear(JSON.parse(data)) : see(data));
    return;
  }
  const path = location.pathname.replace(/[^/]*$/, "play");
  socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}${path}`);
  socket.binaryType = "arraybuffer";
  socket.onmessage = ({ data }) => (typeof data === "string" ? hear(JSON.parse(data)) : see(data));
  socket.onclose = () => {
    play.connected = false;
    $("note").textContent = "Not connected: the server has ended, or this tab was told to wait. Trying again.";
    setTimeout(connect, 1500);
  };
}
function send(message) {
  if (socket.readyState === WebSocket.OPEN) socket.send(JSON.stringify(message));
}
function give(command, value) { send({ do: command, value }); }

function hear(message) {
  if (message.hello) greet(message.hello);
  if (message.loading !== undefined && !play.hello) $("note").textContent = `Loading the dream: ${Math.round(100 * message.loading)} %`;
  if (message.failed) $("note").textContent = message.failed;
  if (message.error) toast(message.error, { bad: true });
  if (message.said) toast(message.said, { link: message.link });
}

function greet(hello) {
  play.hello = hello;
  play.connected = true;
  acknowledged = -play.frames;
  lastHeld = NOTHING;
  commands = new Map(hello.keys.map(({ key, command }) => [key, command]));
  gameKeys = new Set(hello.pad);
  for (const { keys } of hello.game_keys) gameKeys.add(keys);
  document.title = `${hello.name}, dreamloop`;
  $("name").textContent = hello.name;
  $("about").textContent = Object.entries(hello.about).map(([key, value]) => `${key} ${value}`).join(" · ");
  dreams(hello.dreams ?? []);
  choice($("mode"), "mode", hello.modes);
  choice($("player"), "player", hello.players);
  $("mode").parentElement.hidden = hello.modes.length < 2;
  for (const name of hello.lacks ?? []) for (const part of document.querySelectorAll(`[data-do=${name}], [data-about=${name}]`)) part.hidden = true;
  $("components").hidden = !hello.components;
  choice($("component"), "component", Array.from({ length: hello.components }, (_, i) => i + 1));
  list($("game_keys"), hello.game_keys.map(({ keys, words }) => [keys, words]));
  list($("play_keys"), hello.keys.map(({ key, words }) => [key, words]));
  $("temperature").max = hello.hottest;
  $("probabilities").replaceChildren();
  for (const button of document.querySelectorAll("#transport button")) {
    button.querySelector("kbd")?.remove();
    const key = hello.keys.find(({ key }) => key === button.dataset.key);
    if (key && !TOUCH) button.append(Object.assign(document.createElement("kbd"), { textContent: key.key === "backspace" ? "⌫" : key.key }));
  }
  pads(hello.pad);
  hint = `Play with ${hello.pad.map((key) => ARROWS[key] ?? key).join(" ")}; h lists every key`;
  $("note").textContent = "";
}

function choice(place, command, words) {
  place.replaceChildren(...words.map((word) => {
    const button = Object.assign(document.createElement("button"), { textContent: LABELS[word] ?? word, type: "button" });
    button.dataset.value = word;
    button.onclick = () => give(command, word);
    return button;
  }));
}
// Of a page that holds several dreams; another is another address, which can be kept and sent.
function dreams(found) {
  const here = new URLSearchParams(location.search).get("dream") ?? "";
  $("dreams").hidden = found.length < 2;
  $("dream").replaceChildren(...found.map(({ name, folder }) => {
    const link = Object.assign(document.createElement("a"), { textContent: name, href: folder ? `?dream=${folder}` : location.pathname });
    if (folder === here) link.setAttribute("aria-current", "page");
    return link;
  }));
}
function list(place, pairs) {
  place.replaceChildren(...pairs.flatMap(([key, words]) => {
    const term = document.createElement("dt");
    term.append(Object.assign(document.createElement("kbd"), { textContent: key }));
    return [term, Object.assign(document.createElement("dd"), { textContent: words })];
  }));
}

// ---- pictures ----
function see(data) {
  const size = new DataView(data).getUint32(0, true);
  const state = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, size)));
  let at = 4 + size;
  panels(state.pictures.map(({ name }) => name));
  for (const picture of state.pictures) {
    const bytes = picture.width * picture.height * 3;
    paint($(`canvas_${picture.name}`), new Uint8Array(data, at, bytes), picture);
    at += bytes;
  }
  play.state = state;
  play.frames += 1;
  send({ ack: play.frames + acknowledged });
  const now = performance.now();
  drawnAt.push(now);
  while (drawnAt[0] < now - 2000) drawnAt.shift();
  for (const [id, at] of sentAt) {
    if (id > state.input) continue;
    sentAt.delete(id);
    requestAnimationFrame(() => {
      play.latencies.push(performance.now() - at);
      if (play.latencies.length > 2000) play.latencies.shift();
    });
  }
  dirty = true;
}
function panels(names) {
  const place = $("panels"), shown = names.join();
  if (place.dataset.shown === shown) return;
  place.dataset.shown = shown;
  place.replaceChildren(...names.map((name) => {
    const figure = document.createElement("figure");
    figure.id = `figure_${name}`;
    figure.innerHTML = `<canvas id="canvas_${name}" role="img" aria-label="${CAPTIONS[name]}"></canvas><figcaption><b>${CAPTIONS[name]}</b><span></span></figcaption>`;
    return figure;
  }));
}
function paint(canvas, rgb, { width, height, aspect }) {
  const own = canvas.own;
  if (!own || own.width !== width || own.height !== height || own.told !== aspect) {
    canvas.own = { width, height, told: aspect, aspect: aspect ?? width / height };
    canvas.image = new ImageData(width, height);
    canvas.image.data.fill(255);
    fit();
  }
  const rgba = canvas.image.data;
  for (let i = 0, j = 0; i < rgb.length; i += 3, j += 4) {
    rgba[j] = rgb[i]; rgba[j + 1] = rgb[i + 1]; rgba[j + 2] = rgb[i + 2];
  }
  put(canvas);
}
function put(canvas) {
  const { image, own, width, height } = canvas, brush = canvas.getContext("2d", { alpha: false });
  if (width === own.width && height === own.height) return brush.putImageData(image, 0, 0);
  canvas.raw ??= document.createElement("canvas");
  Object.assign(canvas.raw, { width: own.width, height: own.height });
  canvas.raw.getContext("2d", { alpha: false }).putImageData(image, 0, 0);
  brush.imageSmoothingEnabled = false;
  brush.drawImage(canvas.raw, 0, 0, canvas.width, canvas.height);
}

// All pictures are shown at one size: whole multiples of the dream's, in the screen's own pixels, so that all of its
// pixels are alike; how many times as wide is what comes nearest to the game's own shape, which need not be that of its
// pixels. A picture that this does not divide is enlarged to the next whole multiple and shrunk smoothly from there.
function fit() {
  const place = $("panels"), canvases = [...place.querySelectorAll("canvas")].filter((canvas) => canvas.own);
  if (!canvases.length) return;
  const shape = getComputedStyle(place), count = place.children.length;
  const dots = devicePixelRatio, full = Boolean(document.fullscreenElement), flat = TOUCH && innerHeight < 500;
  const around = parseFloat(shape.paddingLeft) + parseFloat(shape.paddingRight) + parseFloat(shape.columnGap || 0) * (count - 1);
  const wide = ((place.clientWidth - around) / count) * dots, high = innerHeight * (full || flat ? 0.8 : SHARE) * dots;
  const { width, height, aspect } = canvases.at(-1).own;
  const tall = Math.min(high, wide / aspect) * (full || flat ? 1 : ZOOMS[zoom]);
  let down = Math.floor(tall / height), across = Math.min(Math.round((down * height * aspect) / width), Math.floor(wide / width));
  if (!down || !across) [down, across] = [tall / height, (tall * aspect) / width]; // too large: it shrinks as it must
  const box = { width: Math.round(across * width), height: Math.round(down * height) };
  for (const canvas of canvases) {
    const { own, style } = canvas, sharp = box.width % own.width === 0 && box.height % own.height === 0;
    const times = (side) => (sharp || box[side] < own[side] ? 1 : Math.ceil(box[side] / own[side]));
    Object.assign(canvas, { width: own.width * times("width"), height: own.height * times("height") });
    Object.assign(style, { width: `${box.width / dots}px`, height: `${box.height / dots}px`, imageRendering: sharp ? "pixelated" : "auto" });
    put(canvas);
  }
}
addEventListener("resize", fit);
document.addEventListener("fullscreenchange", fit);

// ---- figures: not more often than the screen can show, nor than anybody can read ----
let figuresAt = 0;
function refresh(now) {
  requestAnimationFrame(refresh);
  gamepads();
  if (!dirty || now - figuresAt < 150) return;
  dirty = false;
  figuresAt = now;
  const { state } = play;
  for (const [name, side] of Object.entries(state.views)) {
    const figure = $(`figure_${name}`);
    figure.classList.toggle("over", side.over);
    figure.querySelector("span").textContent = side.over ? "over" : `return ${fixed(side.return, 1)}`;
  }
  for (const key of ["mode", "player"]) {
    for (const button of $(key).children) {
      button.classList.toggle("on", button.dataset.value === state[key]);
      button.setAttribute("aria-pressed", button.dataset.value === state[key]);
    }
  }
  for (const button of $("component").children) {
    const on = !state.off.includes(button.dataset.value);
    button.classList.toggle("on", on);
    button.setAttribute("aria-pressed", on);
  }
  const pause = document.querySelector("[data-do=pause]");
  pause.classList.toggle("on", state.paused);
  pause.querySelector("span").textContent = state.paused ? "Go on" : "Pause";
  const record = document.querySelector("[data-do=record]");
  record.classList.toggle("on", state.recording);
  record.querySelector("span").textContent = state.recording ? "Stop" : "Record";
  document.querySelector("[data-do=load]").disabled = !state.kept;
  document.querySelector("[data-do=rewind]").disabled = !state.back;
  $("sync").hidden = state.mode !== "both";
  slide("temperature", state.temperature, state.temperature.toFixed(2));
  slide("fps", toSlider(state.fps), Math.round(state.fps));
  $("note").textContent = note(state);
  figures(state);
  estimate(state);
}
function note(state) {
  if (state.recording && state.mode === "dream") return "Recording a video";
  if (state.recording) return state.player === "human" ? "Recording: video, and your play as an episode to learn from" : "Recording a video";
  if (state.paused) return "Paused";
  if (state.player !== "human") return `${LABELS[state.player]} plays; c gives you the game`;
  return TOUCH ? "" : hint;
}
function figures(state) {
  const side = state.views.real ?? state.views.dream, dream = state.views.dream ?? state.views.real;
  const seconds = drawnAt.length > 1 ? (drawnAt.at(-1) - drawnAt[0]) / 1000 : 0;
  const sorted = [...play.latencies.slice(-50)].sort((a, b) => a - b);
  const rows = [
    ["frames a second", seconds ? ((drawnAt.length - 1) / seconds).toFixed(1) : "-"],
    ["model, median", ms(state.model_ms[0])], ["model, 95th percentile", ms(state.model_ms[1])],
    ["key to picture", sorted.length ? ms(sorted[sorted.length >> 1]) : "-"],
    ["reward", fixed(side.reward, 2)], ["return", fixed(side.return, 1)],
    ["continuation", dream.cont === null ? "-" : `${(100 * dream.cont).toFixed(1)} %`],
    ["dreamed since real", state.views.dream ? `${state.horizon} steps` : "-"],
    ["step", state.step], ["start", state.start === null ? "the game's" : `${state.start + 1} of ${play.hello.starts}`],
    ["seed", state.seed], ["frames dropped", state.dropped],
  ];
  const place = $("figures");
  if (!place.children.length) {
    place.append(...rows.map(([name]) => {
      const cell = document.createElement("div");
      cell.append(Object.assign(document.createElement("dt"), { textContent: name }), document.createElement("dd"));
      return cell;
    }));
  }
  rows.forEach(([, value], i) => { place.children[i].lastChild.textContent = value; });
}
function estimate(state) {
  $("value").textContent = fixed(state.value, 2);
  trace.push(state.value ?? 0);
  if (trace.length > 160) trace.shift();
  draw($("trace"), trace);
  const place = $("probabilities"), names = play.hello.actions;
  const values = state.probabilities ?? (Array.isArray(state.action) ? state.action.map((value) => (value + 1) / 2) : []);
  if (place.children.length !== 3 * values.length) {
    place.replaceChildren(...values.flatMap((_, i) => [
      Object.assign(document.createElement("span"), { textContent: names[i].toLowerCase() }), document.createElement("i"), document.createElement("em"),
    ]));
  }
  values.forEach((value, i) => {
    place.children[3 * i].classList.toggle("taken", state.action === i);
    place.children[3 * i + 1].style.setProperty("--p", (value ?? 0).toFixed(3));
    place.children[3 * i + 2].textContent = state.probabilities ? `${Math.round(100 * value)} %` : fixed(state.action[i], 2);
  });
}
function draw(canvas, values) {
  const brush = canvas.getContext("2d"), { width, height } = canvas;
  const low = Math.min(...values, 0), high = Math.max(...values, low + 0.5);
  brush.clearRect(0, 0, width, height);
  brush.beginPath();
  values.forEach((value, i) => brush.lineTo((i / 159) * width, height - 4 - ((value - low) / (high - low)) * (height - 8)));
  brush.strokeStyle = getComputedStyle(canvas).getPropertyValue("--accent");
  brush.lineWidth = 2;
  brush.stroke();
}
function fixed(value, digits) { return value === null || value === undefined ? "-" : value.toFixed(digits).replace(/^-(0(\.0*)?)$/, "$1"); }
function ms(value) { return value === null || value === undefined ? "-" : `${value.toFixed(1)} ms`; }

// ---- sliders: the frame rate's is logarithmic ----
function toSlider(fps) { return (100 * Math.log(fps)) / Math.log(play.hello.most_fps); }
function fromSlider(at) { return Math.round(Math.exp((at / 100) * Math.log(play.hello.most_fps))); }
function slide(id, at, words) {
  if (document.activeElement !== $(id)) $(id).value = at;
  $(`${id}_now`).textContent = words;
}
$("temperature").oninput = (event) => give("temperature", Number(event.target.value));
$("fps").oninput = (event) => give("fps", fromSlider(Number(event.target.value)));
for (const id of ["temperature", "fps"]) $(id).onchange = (event) => event.target.blur();

// ---- commands ----
function next(words, now) { return words[(words.indexOf(now) + 1) % words.length]; }
function command(name) {
  const { state, hello } = play;
  if (!state) return;
  if (name === "mode" || name === "player") give(name, next(hello[`${name}s`], state[name]));
  else if (name === "warmer" || name === "cooler") give("temperature", Math.min(hello.hottest, Math.max(0, Math.round(20 * state.temperature + (name === "warmer" ? 2 : -2)) / 20)));
  else if (name === "faster" || name === "slower") give("fps", Math.min(hello.most_fps, Math.max(1, Math.round(state.fps * (name === "faster" ? 1.25 : 0.8)) + (name === "faster" ? 1 : -1))));
  else if (name === "zoom") { zoom = (zoom + 1) % ZOOMS.length; fit(); }
  else if (name === "fullscreen") document.fullscreenElement ? document.exitFullscreen() : $("stage").requestFullscreen?.();
  else if (name === "help") $("keys").open ? $("keys").close() : help();
  else if (name !== "rewind") give(name);
}
function help() { // the game waits while somebody reads
  helpPause = !play.state.paused;
  if (helpPause) give("pause", true);
  $("keys").showModal();
}
$("keys").onclose = () => {
  if (helpPause) give("pause", false);
  helpPause = false;
};
$("keys").onclick = ({ target, clientX, clientY }) => { // beside it
  const box = $("keys").getBoundingClientRect();
  if (target === $("keys") && (clientX < box.left || clientX > box.right || clientY < box.top || clientY > box.bottom)) $("keys").close();
};
for (const button of document.querySelectorAll("[data-do], [data-client]")) {
  const name = button.dataset.do ?? button.dataset.client;
  if (name === "rewind") {
    const hold = (on) => { fingersBack = on; tell(); };
    button.onpointerdown = (event) => { button.setPointerCapture(event.pointerId); hold(true); };
    button.onpointerup = button.onpointercancel = () => hold(false);
    button.onkeydown = ({ key }) => { if (key === "Enter" || key === " ") give("rewind", 5); };
  } else {
    button.onclick = (event) => { command(name); if (event.detail) button.blur(); };
  }
}

// ---- what is held ----
function tell() {
  const held = new Set([...sources.keyboard, ...sources.touch, ...sources.gamepad]);
  const back = fingersBack || held.has("backspace");
  const keys = [...held].filter((key) => gameKeys.has(key)).sort();
  const text = keys.join() + back;
  if (text === lastHeld) return;
  lastHeld = text;
  input += 1;
  sentAt.set(input, performance.now());
  if (sentAt.size > 100) sentAt.delete(sentAt.keys().next().value);
  send({ keys, back, id: input });
}
function release() {
  for (const source of Object.values(sources)) source.clear();
  pressed.clear();
  fingersBack = false;
  tell();
}
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !play.hello) return;
  const lower = event.key.toLowerCase(), key = NAMES[lower] ?? lower;
  // A slider keeps its arrows and a button what presses it; Tab is always the reader's.
  const focused = document.activeElement, own = focused?.matches("input") ? ["left", "right", "up", "down"] : focused?.matches("button:focus-visible") ? ["space", "enter"] : [];
  if (key === "tab" || own.includes(key)) return;
  if ($("keys").open && key !== "h") return;
  if (gameKeys.has(key) || commands.get(key) === "rewind") {
    event.preventDefault();
    if (event.repeat) return;
    pressed.set(event.code, key);
    sources.keyboard.add(key);
    tell();
  } else if (commands.has(key)) {
    event.preventDefault();
    if (!event.repeat || ["step", "warmer", "cooler", "faster", "slower"].includes(commands.get(key))) command(commands.get(key));
  }
});
addEventListener("keyup", (event) => {
  sources.keyboard.delete(pressed.get(event.code));
  pressed.delete(event.code);
  tell();
});
addEventListener("blur", release);
document.addEventListener("visibilitychange", () => {
  release();
  if (document.hidden && play.state && !play.state.paused) {
    hiddenPause = true;
    give("pause", true);
  } else if (!document.hidden && hiddenPause) {
    hiddenPause = false;
    give("pause", false);
  }
});

// ---- touch ----
function pads(keys) {
  document.body.classList.toggle("touch", TOUCH);
  const cross = document.createElement("div"), others = document.createElement("div");
  cross.className = "cross";
  others.className = "others";
  const places = { up: "1 / 2", left: "2 / 1", right: "2 / 3", down: "3 / 2" };
  for (const key of keys) {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: ARROWS[key] ?? (key === "space" ? "Fire" : key) });
    if (key === "space") button.className = "fire";
    if (places[key]) button.style.gridArea = places[key];
    button.onpointerdown = (event) => { event.preventDefault(); button.setPointerCapture(event.pointerId); sources.touch.add(key); button.classList.add("on"); tell(); };
    button.onpointerup = button.onpointercancel = () => { sources.touch.delete(key); button.classList.remove("on"); tell(); };
    button.oncontextmenu = (event) => event.preventDefault();
    (places[key] ? cross : others).append(button);
  }
  $("pad").replaceChildren(cross, others);
  if (TOUCH) $("panels").after($("pad")); // in reach of the thumbs, right under the game
}

// ---- gamepad ----
const buttonsBefore = new Map();
function gamepads() {
  const held = new Set();
  for (const pad of navigator.getGamepads?.() ?? []) {
    if (!pad) continue;
    const [x = 0, y = 0] = pad.axes, down = (i) => pad.buttons[i]?.pressed;
    if (x < -0.4 || down(14)) held.add("left");
    if (x > 0.4 || down(15)) held.add("right");
    if (y < -0.4 || down(12)) held.add("up");
    if (y > 0.4 || down(13)) held.add("down");
    if (down(0)) held.add("space");
    if (down(4) || down(5)) held.add("backspace");
    if (down(9) && !buttonsBefore.get(pad.index)) command("pause");
    buttonsBefore.set(pad.index, down(9));
  }
  sources.gamepad = held;
  tell();
}

let toastTimer;
function toast(words, { bad = false, link = null } = {}) {
  const place = $("toast");
  place.textContent = words;
  if (link) place.append(Object.assign(document.createElement("a"), { href: link, textContent: "open", target: "_blank" }));
  place.className = bad ? "shown bad" : "shown";
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => place.classList.remove("shown"), link ? 12000 : 6000);
}

connect();
requestAnimationFrame(refresh);
