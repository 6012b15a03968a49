// What the panel shows, computed from the server's status and from its events. Knows nothing of the page.

/** The status, with what an event has told since. */
export function withActivity(status, activity) {
  return status && { ...status, activity: { ...status.activity, ...activity } };
}

/** Whether the event tells of something that only a new status shows: not the many requests of one run. */
export function isNews(status, activity) {
  const known = status?.activity;
  if (!known || activity.error?.message !== known.error?.message) return true;
  return activity.phase === null ? activity.version !== known.version : !isUp(status);
}

/**
 * @param {object | null} status what GET /paralleldit/status answers
 * @param {(key: string, values?: object) => string} t
 * @param {object | null} refusal why it answers no status
 */
export function panelModel(status, t, refusal = null) {
  if (!status) return { ...EMPTY, state: t("state.unknown"), error: refusal && errorOf(refusal, "") };
  const { activity, details, remote } = status;
  const phase = activity.phase;
  const up = isUp(status);
  const state = phase?.name === "start" && !up ? "starting" : up && phase ? "busy" : status.state;
  const isIdle = phase === null || phase === undefined;
  return {
    state: [t(`state.${state.replaceAll(" ", "_")}`, { ranks: status.rank_count }), besideText(status, t)]
      .filter(Boolean)
      .join(" · "),
    stateKind: state,
    phase: phaseText(phase, t),
    progress: phase?.total > 0 ? phase.step / phase.total : null,
    ranks: up ? (details.ranks ?? []).map((rank) => rankRow(rank, t)) : [],
    models: up ? (details.models ?? []).map((model) => modelRow(model, t)) : [],
    run: [...runRows(activity.run, t), ...cacheRows(activity.evaluations, t)],
    note: details.unreachable ?? "",
    error: activity.error ? errorOf(activity.error, status.log) : null,
    canStart: !up && state !== "starting" && !remote,
    canStop: !remote && (up || state === "other version" || status.beside > 0),
    canUnload: (up || status.beside > 0) && isIdle,
    isBusy: !isIdle,
    defaultRanks: status.default_ranks,
  };
}

const EMPTY = {
  stateKind: "unknown",
  phase: "",
  progress: null,
  ranks: [],
  models: [],
  run: [],
  note: "",
  error: null,
  canStart: false,
  canStop: false,
  canUnload: false,
  isBusy: false,
  defaultRanks: 0,
};

function besideText(status, t) {
  return status.beside > 0 ? t("beside", { ranks: status.beside }) : "";
}

function isUp(status) {
  return status.state === "ready" || status.state === "remote";
}

function phaseText(phase, t) {
  if (!phase) return "";
  const name = t(`phase.${phase.name.replaceAll(" ", "_")}`);
  const steps = phase.total > 0 ? t("phase.step", { step: phase.step, total: phase.total }) : "";
  return [name, steps, phase.text].filter(Boolean).join(" · ");
}

function rankRow(rank, t) {
  const { used = 0, free = 0, total = 0 } = rank.memory ?? {};
  return {
    rank: rank.rank,
    device: rank.device ?? "",
    host: rank.host ?? "",
    memory: t("memory", { used: bytes(used), free: bytes(free) }),
    share: total > 0 ? Math.min(1, used / total) : 0,
  };
}

function modelRow(model, t) {
  const name = String(model.path).split("/").filter(Boolean).at(-1) ?? "";
  return { name, path: model.path, text: t(`kind.${model.kind}`, { size: bytes(model.bytes) }) };
}

function runRows(run, t) {
  if (!run) return [];
  const steps = Math.max(1, run.steps);
  return [
    [t("run.layout"), `${run.layout} · ${t(run.is_exact ? "run.exact" : "run.approximate")}`],
    [t("run.time"), t("run.per_step", { each: seconds(run.seconds / steps), all: seconds(run.seconds) })],
    [t("run.sent"), t("run.per_step", { each: bytes(run.sent_bytes / steps), all: bytes(run.sent_bytes) })],
  ];
}

function cacheRows(evaluations, t) {
  if (!evaluations) return [];
  const [computed, total] = evaluations;
  return [[t("run.cache"), t("run.in_full", { computed, total })]];
}

function errorOf(error, log) {
  return { message: error.message, hint: error.hint, log: error.sidecar_failed ? log : "" };
}

const UNITS = ["B", "kB", "MB", "GB", "TB"];

/** A size in decimal units, of three digits at most. */
export function bytes(size) {
  let unit = 0;
  while (size >= 999.5 && unit < UNITS.length - 1) {
    size /= 1000;
    unit += 1;
  }
  return `${size.toFixed(unit === 0 || size >= 99.5 ? 0 : 1)} ${UNITS[unit]}`;
}

export function seconds(time) {
  return time < 1 ? `${Math.round(time * 1000)} ms` : `${time.toFixed(time < 100 ? 1 : 0)} s`;
}
