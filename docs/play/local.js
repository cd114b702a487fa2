"use strict";
// The dream without a server: what play/connection.py and play/session.py do, here in the page, with the model as a
// graph that ONNX Runtime plays. `export` writes it beside app.js, which sees no difference but the socket.

const DREAM = new URLSearchParams(location.search).get("dream") ?? ""; // one of several has a folder of its own
const PLACE = /^[\w-]+$/.test(DREAM) ? `${DREAM}/` : "";
const FILES = { model: `${PLACE}model.bin`, starts: `${PLACE}starts.bin`, told: `${PLACE}dream.json`, wasm: "ort.wasm.bin", runtime: "ort.mjs" };
const KEPT = 600, SECONDS = 10, MOST_BYTES = 96e6; // moments to rewind through: so many, for so long, of so much memory
const REST = 900; // ms that a dream that is over is shown

// ---- files: beside the page, or within it ----
function embedded(name) { return document.getElementById(`file_${name}`)?.textContent; }

async function bytes(name, heard) {
  const inside = embedded(name);
  const answer = await fetch(inside ? `data:application/octet-stream;base64,${inside}` : FILES[name]);
  if (!answer.ok) throw new Error(`${FILES[name]} is missing (${answer.status})`);
  const parts = [], reader = answer.body.getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    heard(value.length);
  }
  const blob = new Blob(parts), magic = new Uint8Array(await blob.slice(0, 2).arrayBuffer());
  if (magic[0] !== 0x1f || magic[1] !== 0x8b) return blob.arrayBuffer(); // a server has unpacked it already
  return new Response(blob.stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
}
async function runtime(heard) {
  const text = await bytes("runtime", heard);
  return import(URL.createObjectURL(new Blob([text], { type: "text/javascript" })));
}

// ---- random numbers of its own, whose state is part of a moment: the same actions then bring the same future ----
class Random {
  constructor(seed) { this.state = [0x9e3779b9 ^ seed, 0x243f6a88, 0xb7e15162, seed | 0]; for (let i = 0; i < 20; i++) this.next(); }
  next() { // sfc32
    let [a, b, c, d] = this.state;
    const t = (((a + b) | 0) + d) | 0;
    a = b ^ (b >>> 9); b = (c + (c << 3)) | 0; c = ((c << 21) | (c >>> 11)) + t | 0; d = (d + 1) | 0;
    this.state = [a, b, c, d];
    return (t >>> 8) / 16777216;
  }
  normal() { return Math.sqrt(-2 * Math.log(1 - this.next())) * Math.cos(2 * Math.PI * this.next()); }
  below(count) { return Math.floor(this.next() * count); }
}

const ARRAYS = { float32: Float32Array, int32: Int32Array, int64: BigInt64Array, bool: Uint8Array, uint8: Uint8Array };

// ---- one dream ----
class Session {
  constructor(told, graph, ort, starts) {
    Object.assign(this, { told, graph, ort, starts });
    Object.assign(this, { player: "human", temperature: told.temperature, fps: told.fps, paused: false, past: [], kept: null, times: [] });
    this.begin(0, null);
  }
  begin(seed, start) {
    this.random = new Random(seed);
    start ??= this.random.below(this.starts.length);
    this.arrive({ ...this.starts[start], seed, start, step: 0, action: null, reward: 0, total: 0, cont: 1, over: false });
  }
  arrive(moment) {
    if (this.now) this.past.push(this.now);
    this.now = { ...moment, random: this.random.state };
    const size = this.now.state.reduce((sum, tensor) => sum + tensor.data.byteLength, this.now.picture.length);
    const most = Math.min(Math.max(KEPT, SECONDS * this.fps), MOST_BYTES / size);
    while (this.past.length > most) this.past.shift();
  }
  rewind(count) {
    count = Math.min(count, this.past.length);
    if (!count) return false;
    const moment = this.past[this.past.length - count];
    this.past.length -= count;
    this.back(moment);
    return true;
  }
  back(moment) { this.now = moment; this.random.state = moment.random; }
  act(held) {
    const { told } = this;
    if (this.player === "agent") return this.now.chosen;
    if (this.player === "random") return told.discrete ? this.random.below(told.actions) : told.rest.map(() => 2 * this.random.next() - 1);
    return chord(told, held);
  }
  async step(held) {
    if (this.now.over) return this.begin(this.now.seed + 1, null);
    const { told, ort, now } = this, action = this.act(held), began = performance.now();
    const out = await this.graph.run(this.feeds(action));
    this.times.push(performance.now() - began);
    if (this.times.length > 240) this.times.shift();
    const one = (name) => (out[name] ? Number(out[name].data[0]) : null);
    let reward = one("reward");
    const cont = one("cont"), whole = Math.round(reward);
    if (told.whole_rewards && Math.abs(reward - whole) < told.nearly) reward = whole + 0;
    this.arrive({
      ...now, state: told.state.map((name) => out[`${name}_next`] ?? now.state[told.state.indexOf(name)]),
      picture: out.picture.data, value: one("value"), probabilities: out.probabilities ? [...out.probabilities.data] : null,
      chosen: told.discrete ? one("chosen") : [...out.chosen.data], action, step: now.step + 1,
      reward, total: now.total + reward, cont, over: this.random.next() >= cont,
    });
  }
  feeds(action) {
    const { told, ort, random } = this, filled = (count, draw) => Float32Array.from({ length: Math.max(1, count) }, draw);
    const found = {
      action: told.discrete ? new ort.Tensor("int32", Int32Array.of(action), [1]) : new ort.Tensor("float32", Float32Array.from(action), [1, action.length]),
      temperature: new ort.Tensor("float32", Float32Array.of(Math.max(told.coldest, this.temperature)), [1]),
      uniform: new ort.Tensor("float32", filled(told.numbers.uniform ?? 0, () => random.next()), [Math.max(1, told.numbers.uniform ?? 0)]),
      normal: new ort.Tensor("float32", filled(told.numbers.normal ?? 0, () => random.normal()), [Math.max(1, told.numbers.normal ?? 0)]),
    };
    told.state.forEach((name, i) => { found[name] = this.now.state[i]; });
    return Object.fromEntries(this.graph.inputNames.map((name) => [name, found[name]]));
  }
  toDict() {
    const { now, told } = this, times = [...this.times].sort((a, b) => a - b), at = (share) => (times.length ? times[Math.floor(share * (times.length - 1))] : null);
    return {
      mode: "dream", player: this.player, paused: this.paused, recording: false, temperature: this.temperature, fps: this.fps,
      seed: now.seed, start: now.start, step: now.step, horizon: now.step, action: now.action, value: now.value,
      probabilities: now.probabilities, off: [], views: { dream: { reward: now.reward, return: now.total, cont: now.cont, over: now.over } },
      model_ms: [at(0.5), at(0.95)], back: this.past.length, kept: this.kept !== null, dropped: 0,
      pictures: [{ name: "dream", height: told.height, width: told.width, aspect: told.aspect }],
    };
  }
}

// The action of the largest chord among the keys held; as envs/controls.py says it.
function chord(told, held) {
  const known = new Set(told.keys.flatMap(([keys]) => keys));
  const meant = new Set([...held].map((key) => [key, ...(told.stands_for[key] ?? [])].find((name) => known.has(name)) ?? key));
  return told.keys.filter(([keys]) => keys.every((key) => meant.has(key))).reduce((best, entry) => (entry[0].length > best[0].length ? entry : best))[1];
}

// ---- in the place of the socket ----
class Local {
  constructor() {
    Object.assign(this, { readyState: WebSocket.OPEN, held: [], holding: false, commands: [], input: 0, wake: null });
    this.load().then(() => this.play()).catch((problem) => {
      const disk = location.protocol === "file:" && !embedded("model");
      this.say({ failed: disk ? "A page from the disk may read no files beside it: run python -m http.server here and open http://localhost:8000, or export with single=true." : `The dream cannot be loaded: ${problem.message ?? problem}.` });
    });
  }
  say(message) { this.onmessage({ data: JSON.stringify(message) }); }
  async load() {
    if (location.protocol === "file:" && !embedded("model")) throw new Error("file");
    const told = JSON.parse(embedded("told") ?? new TextDecoder().decode(await bytes("told", () => {})));
    let got = 0;
    const heard = (count) => { got += count; this.say({ loading: Math.min(1, got / told.bytes) }); };
    const [model, starts, wasm, ort] = await Promise.all([bytes("model", heard), bytes("starts", heard), bytes("wasm", heard), runtime(heard)]);
    Object.assign(ort.env.wasm, { numThreads: 1, wasmBinary: wasm }); // two threads are slower, and need a server's leave
    ort.env.logLevel = "error";
    const graph = await ort.InferenceSession.create(new Uint8Array(model), { executionProviders: ["wasm"] });
    this.session = new Session(told, graph, ort, begun(told, starts, ort));
    window.dream = this.session; // read by tests and by the benchmark
    this.hello = told.hello;
  }
  send(text) {
    const message = JSON.parse(text);
    if (message.keys) [this.held, this.holding, this.input] = [message.keys, message.back === true, message.id];
    else if (message.do) this.commands.push([message.do, message.value]);
    else return;
    this.wake?.();
  }
  async play() {
    this.say({ hello: this.hello });
    const { session } = this;
    this.post();
    for (let due = performance.now(); ;) {
      try {
        if (await this.tick()) this.post();
      } catch (problem) {
        session.paused = true;
        this.say({ error: `The dream met a fault and is paused: ${problem.message ?? problem}` });
        this.post();
      }
      if (session.now.over && !session.paused && !this.holding) await this.rest(REST);
      if (session.paused && !this.holding && !this.commands.length) {
        await this.rest(null);
        due = performance.now();
      }
      due = Math.max(due + 1000 / session.fps, performance.now());
      await until(due);
    }
  }
  rest(ms) {
    return new Promise((resolve) => {
      this.wake = resolve;
      if (ms !== null) setTimeout(resolve, ms);
    });
  }
  async tick() {
    let moved = this.commands.length > 0;
    while (this.commands.length) await this.obey(...this.commands.shift());
    this.seen = this.input;
    const { session } = this;
    if (this.holding) return session.rewind(1) || moved;
    if (session.paused) return moved;
    await session.step(this.held);
    return true;
  }
  async obey(command, value) {
    const { session } = this;
    if (command === "pause") session.paused = value ?? !session.paused;
    else if (command === "step") { session.paused = true; await session.step(this.held); }
    else if (command === "rewind") session.rewind(value ?? 1);
    else if (command === "reset") session.begin(session.now.seed + 1, value ?? null);
    else if (command === "save") session.kept = session.now;
    else if (command === "load" && session.kept) { session.past.push(session.now); session.back(session.kept); }
    else if (["player", "temperature", "fps"].includes(command)) session[command] = value;
  }
  post() {
    const head = new TextEncoder().encode(JSON.stringify({ ...this.session.toDict(), input: this.seen ?? 0 })), { picture } = this.session.now;
    const data = new Uint8Array(4 + head.length + picture.length);
    new DataView(data.buffer).setUint32(0, head.length, true);
    data.set(head, 4);
    data.set(picture, 4 + head.length);
    this.onmessage({ data: data.buffer });
  }
}

// The starts' states and pictures, one after the other in the file, as dream.json lists them.
function begun(told, file, ort) {
  return told.starts.map((entries) => {
    const found = {};
    for (const { name, type, dims, at } of entries) {
      const count = dims.reduce((a, b) => a * b, 1), data = new ARRAYS[type](file.slice(at, at + count * ARRAYS[type].BYTES_PER_ELEMENT));
      found[name] = { data, type, dims };
    }
    return {
      state: told.state.map((name) => new ort.Tensor(found[name].type, found[name].data, found[name].dims)), picture: found.picture.data,
      value: found.value ? found.value.data[0] : null, probabilities: found.probabilities ? [...found.probabilities.data] : null,
      chosen: told.discrete ? found.chosen.data[0] : [...found.chosen.data],
    };
  });
}

// Timers are late by milliseconds; the last of them are waited for message by message.
const turns = new MessageChannel(), waiting = [];
turns.port1.onmessage = () => waiting.shift()?.();
function turn() { return new Promise((resolve) => { waiting.push(resolve); turns.port2.postMessage(0); }); }
async function until(due) {
  const left = due - performance.now();
  if (left > 6) await new Promise((resolve) => setTimeout(resolve, left - 5));
  do await turn(); while (performance.now() < due);
}

window.openDream = () => new Local();
