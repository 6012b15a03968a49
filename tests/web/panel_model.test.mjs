import assert from "node:assert/strict";
import { test } from "node:test";
import { bytes, isNews, panelModel, seconds, withActivity } from "../../web/panel_model.js";

const t = (key, values) => (values ? `${key} ${JSON.stringify(values)}` : key);
const QUIET = { version: 1, phase: null, run: null, memory_used: [], memory_free: [], error: null };
const DETAILS = {
  ranks: [{ rank: 0, host: "node", device: "cuda:0", memory: { used: 6e9, free: 18e9, total: 24e9 } }],
  models: [{ kind: "model", path: "/models/flux.safetensors", bytes: 12e9 }],
};
const status = (changes = {}, activity = {}) => ({
  state: "ready",
  remote: false,
  rank_count: 4,
  default_ranks: 4,
  beside: 0,
  log: "",
  details: DETAILS,
  activity: { ...QUIET, ...activity },
  ...changes,
});
const sampling = { phase: { name: "sample", step: 3, total: 12, text: "" } };
const starting = { phase: { name: "start", step: 0, total: 0, text: "1 of 4 ranks are up" } };

const STATES = [
  ["of which nothing is known", null, "unknown", []],
  ["stopped", status({ state: "stopped" }), "stopped", ["canStart"]],
  ["ready", status(), "ready", ["canStop", "canUnload"]],
  ["busy", status({}, sampling), "busy", ["canStop"]],
  ["being started by a prompt", status({ state: "stopped" }, starting), "starting", []],
  ["starting", status({ state: "starting" }), "starting", []],
  ["failed", status({ state: "failed" }), "failed", ["canStart"]],
  ["remote", status({ state: "remote", remote: true }), "remote", ["canUnload"]],
  ["remote and busy", status({ state: "remote", remote: true }, sampling), "busy", []],
  ["of another version", status({ state: "other version" }), "other version", ["canStart", "canStop"]],
];
for (const [what, given, kind, pressable] of STATES) {
  test(`a sidecar ${what}: its state, and the buttons that can be pressed`, () => {
    const model = panelModel(given, t);
    assert.equal(model.stateKind, kind);
    assert.deepEqual(["canStart", "canStop", "canUnload"].filter((button) => model[button]), pressable);
  });
}

test("ranks of the VAE alone are shown beside the others, and can be stopped and emptied without them", () => {
  assert.equal(panelModel(status({ beside: 1 }), t).state, 'state.ready {"ranks":4} · beside {"ranks":1}');
  const model = panelModel(status({ state: "stopped", beside: 1 }), t);
  assert.deepEqual([model.canStart, model.canStop, model.canUnload], [true, true, true]);
});

test("ranks are shown with device, memory and the share that is used", () => {
  const [rank] = panelModel(status(), t).ranks;
  assert.deepEqual(rank, {
    rank: 0,
    device: "cuda:0",
    host: "node",
    memory: 'memory {"used":"6.0 GB","free":"18.0 GB"}',
    share: 0.25,
  });
});

test("what is left of a sidecar that has ended is not shown as its state", () => {
  const model = panelModel(status({ state: "failed" }), t);
  assert.deepEqual([model.ranks, model.models], [[], []]);
});

test("a server that refuses the page is heard", () => {
  const refusal = { message: "x.example is no name of this server.", hint: "Name it." };
  const model = panelModel(null, t, refusal);
  assert.deepEqual([model.state, model.error], ["state.unknown", { ...refusal, log: "" }]);
  assert.equal(panelModel(null, t).error, null);
});

test("a run tells its step, and what its layout costs per step", () => {
  const run = { layout: "ulysses4", is_exact: true, ranks: 4, seconds: 6, steps: 12, sent_bytes: 240e6 };
  const model = panelModel(status({}, { ...sampling, run }), t);
  assert.equal(model.progress, 0.25);
  assert.match(model.phase, /phase\.sample.*"step":3,"total":12/);
  assert.deepEqual(model.run, [
    ["run.layout", "ulysses4 · run.exact"],
    ["run.time", 'run.per_step {"each":"500 ms","all":"6.0 s"}'],
    ["run.sent", 'run.per_step {"each":"20.0 MB","all":"240 MB"}'],
  ]);
});

test("a run with a step cache tells how many evaluations were computed in full", () => {
  const { run } = panelModel(status({}, { evaluations: [12, 28] }), t);
  assert.deepEqual(run, [["run.cache", 'run.in_full {"computed":12,"total":28}']]);
});

test("the log is shown with an error of the sidecar, and not with a user's", () => {
  const error = { message: "Rank 1 died.", hint: "See the log.", sidecar_failed: true };
  const log = "Traceback";
  assert.deepEqual(panelModel(status({ log }, { error }), t).error, { message: "Rank 1 died.", hint: "See the log.", log });
  assert.equal(panelModel(status({ log }, { error: { ...error, sidecar_failed: false } }), t).error.log, "");
  assert.equal(panelModel(status({ log }), t).error, null);
});

const NEWS = [
  ["a step", { ...QUIET, ...sampling }, false],
  ["the end of a run", { ...QUIET, version: 2 }, true],
  ["the next of many requests of a run", { ...QUIET, ...sampling, version: 2 }, false],
  ["an error", { ...QUIET, error: { message: "No.", hint: "", sidecar_failed: false } }, true],
];
for (const [what, activity, expected] of NEWS) {
  test(`${what} ${expected ? "needs" : "needs no"} new status`, () => assert.equal(isNews(status(), activity), expected));
}
test("a phase of a sidecar that was not running needs new status", () => {
  assert.equal(isNews(status({ state: "stopped" }), { ...QUIET, ...sampling }), true);
});

test("an event changes the activity and leaves the rest", () => {
  const changed = withActivity(status(), { ...QUIET, ...sampling });
  assert.equal(changed.activity.phase.step, 3);
  assert.equal(changed.details, DETAILS);
  assert.equal(withActivity(null, QUIET), null);
});

const SIZES = [[0, "0 B"], [999, "999 B"], [1500, "1.5 kB"], [99_960, "100 kB"], [999_600, "1.0 MB"], [12e9, "12.0 GB"], [5e15, "5000 TB"]];
for (const [size, text] of SIZES) test(`${size} bytes are ${text}`, () => assert.equal(bytes(size), text));
const TIMES = [[0.0421, "42 ms"], [1, "1.0 s"], [123.4, "123 s"]];
for (const [time, text] of TIMES) test(`${time} seconds are ${text}`, () => assert.equal(seconds(time), text));
