// The pack's front end: a panel in the sidebar, and a line on Parallel Layout. Texts are in locales/*/main.json.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { addFitLine } from "./layout_node.js";
import { isNews, panelModel, withActivity } from "./panel_model.js";
import { PanelView } from "./panel_view.js";
import { settingsPage } from "./settings.js";
import { translator, translatorFor } from "./texts.js";

const EVENT = "paralleldit"; // of nodes/panel/routes.py
const LOOK_MS = 5000;
const TOAST_MS = 10_000;
const IDLE_MS = 400; // a run of many requests is idle for moments only
const TYPED_MS = 800; // an address is kept letter by letter

let t = translator();
let status = null;
let refusal = null;
let view = null;
let isAsking = false;
let isStale = false;
let idle = 0;
let looking = 0;
let typing = 0;
const fitLines = new Set();

async function loadTexts() {
  const answer = await api.fetchApi("/i18n");
  const locale = app.ui.settings.getSettingValue("Comfy.Locale") ?? "en";
  t = translatorFor(answer.ok ? await answer.json() : {}, locale);
}

function show() {
  view?.update(panelModel(status, t, refusal));
  for (const update of fitLines) update();
}

async function look() {
  if (isAsking) {
    isStale = true;
    return;
  }
  isAsking = true;
  try {
    const answer = await api.fetchApi("/paralleldit/status");
    const told = await answer.json();
    status = answer.ok ? told : null;
    refusal = answer.ok ? null : told.error;
  } catch (error) {
    status = refusal = null; // the server is away: the panel says that nothing is known
    console.warn("ParallelDiT:", error);
  } finally {
    isAsking = false;
  }
  show();
  if (isStale) {
    isStale = false;
    await look();
  }
}

async function press(action, body = {}) {
  const fault = await post(action, body).catch(String);
  if (fault) app.extensionManager.toast.add({ severity: "error", summary: t("title"), detail: fault, life: TOAST_MS });
  await look();
}

/** The server's reason why it did not do it; nothing when it did. */
async function post(action, body) {
  const answer = await api.fetchApi(`/paralleldit/${action}`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  });
  if (answer.ok) return "";
  const { message, hint } = (await answer.json()).error;
  return `${message} ${hint}`;
}

async function stop() {
  const { isBusy } = panelModel(status, t);
  const isMeant =
    !isBusy || (await app.extensionManager.dialog.confirm({ title: t("stop"), message: t("stop_busy"), type: "default" }));
  if (isMeant) await press("stop");
}

function hear({ detail }) {
  clearTimeout(idle);
  const take = () => {
    const news = isNews(status, detail);
    status = withActivity(status, detail);
    show();
    if (news) look();
  };
  if (detail.phase === null) idle = setTimeout(take, IDLE_MS);
  else take();
}

function open(root) {
  view = new PanelView(root, t, { start: (ranks) => press("start", { ranks }), stop, unload: () => press("unload"), refresh: look });
  show();
  look();
  clearInterval(looking);
  looking = setInterval(() => root.isConnected && !document.hidden && look(), LOOK_MS);
}

function close() {
  clearInterval(looking);
  view = null;
}

function settingChanged() {
  clearTimeout(typing);
  typing = setTimeout(look, TYPED_MS);
}

app.registerExtension({
  name: "ParallelDiT",

  settings: settingsPage(settingChanged),

  async init() {
    const style = document.createElement("link");
    style.rel = "stylesheet";
    style.href = new URL("./paralleldit.css", import.meta.url).href;
    document.head.append(style);
  },

  async setup() {
    await loadTexts();
    app.extensionManager.registerSidebarTab({
      id: "paralleldit",
      icon: "paralleldit-icon",
      title: "paralleldit.title",
      tooltip: "paralleldit.tooltip",
      label: "paralleldit.label",
      type: "custom",
      render: open,
      destroy: close,
    });
    api.addEventListener(EVENT, hear);
    await look();
  },

  nodeCreated(node) {
    if (node.comfyClass !== "ParallelDiTLayout") return;
    const update = addFitLine(node, () => status?.default_ranks ?? 0, () => t);
    fitLines.add(update);
    const removed = node.onRemoved;
    node.onRemoved = function (...args) {
      fitLines.delete(update);
      return removed?.apply(this, args);
    };
  },
});
