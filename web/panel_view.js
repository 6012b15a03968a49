// The panel's elements. Text of any origin is only ever set as text.

export class PanelView {
  /**
   * @param {HTMLElement} root
   * @param {(key: string, values?: object) => string} t
   * @param {{start: (ranks: number) => void, stop: () => void, unload: () => void, refresh: () => void}} actions
   */
  constructor(root, t, actions) {
    this.t = t;
    this.state = element("div", "state");
    this.phase = element("div", "phase");
    this.progress = element("progress", "progress");
    this.note = element("div", "note");
    this.ranksInput = element("input", "ranks-input");
    Object.assign(this.ranksInput, { type: "number", min: 0, max: 1024, value: 0, title: t("ranks_hint") });
    this.start = button(t("start"), "start", () => actions.start(Number(this.ranksInput.value)));
    this.stop = button(t("stop"), "stop", actions.stop);
    this.unload = button(t("unload"), "unload", actions.unload);
    this.refresh = button(t("refresh"), "refresh", actions.refresh);
    this.ranks = element("tbody");
    this.models = element("ul", "models");
    this.run = element("dl", "run");
    this.error = new ErrorView(t);
    const label = element("label", "ranks-label", `${t("ranks")} `);
    label.append(this.ranksInput);
    const buttons = element("div", "buttons");
    buttons.append(label, this.start, this.stop, this.unload, this.refresh);
    root.classList.add("paralleldit-panel");
    root.replaceChildren(
      heading(t("title")),
      this.state,
      this.phase,
      this.progress,
      this.note,
      this.error.root,
      buttons,
      section(t("ranks_list"), table([t("column.rank"), t("column.device"), t("column.memory")], this.ranks)),
      section(t("models"), this.models),
      section(t("last_run"), this.run),
    );
  }

  /** @param {object} model of panel_model.js */
  update(model) {
    setText(this.state, model.state);
    this.state.dataset.state = model.stateKind;
    setText(this.phase, model.phase);
    this.progress.hidden = model.progress === null;
    this.progress.value = model.progress ?? 0;
    setText(this.note, model.note);
    this.start.disabled = this.ranksInput.disabled = !model.canStart;
    this.stop.disabled = !model.canStop;
    this.unload.disabled = !model.canUnload;
    this.ranks.replaceChildren(...model.ranks.map(rankRow));
    this.models.replaceChildren(...(model.models.length ? model.models.map(modelRow) : [element("li", "none", this.t("none"))]));
    this.run.replaceChildren(...model.run.flatMap(([name, value]) => [element("dt", "", name), element("dd", "", value)]));
    this.error.update(model.error);
  }
}

class ErrorView {
  constructor(t) {
    this.root = element("div", "error");
    this.message = element("div", "message");
    this.hint = element("div", "hint");
    this.details = element("details");
    this.log = element("pre", "log");
    this.details.append(element("summary", "", t("log")), this.log);
    this.root.append(element("strong", "", t("last_error")), this.message, this.hint, this.details);
  }

  update(error) {
    this.root.hidden = !error;
    setText(this.message, error?.message ?? "");
    setText(this.hint, error?.hint ?? "");
    setText(this.log, error?.log ?? "");
    this.details.hidden = !error?.log;
  }
}

function rankRow(rank) {
  const row = element("tr");
  const memory = element("td");
  const meter = element("meter");
  meter.value = rank.share;
  memory.append(meter, element("div", "", rank.memory));
  const device = element("td", "", rank.device);
  device.title = rank.host;
  row.append(element("td", "", String(rank.rank)), device, memory);
  return row;
}

function modelRow(model) {
  const row = element("li", "", `${model.name}: ${model.text}`);
  row.title = model.path;
  return row;
}

function section(title, ...children) {
  const found = element("section");
  found.append(element("h4", "", title), ...children);
  return found;
}

function heading(text) {
  const found = element("h3");
  found.append(element("span", "paralleldit-icon"), element("span", "", text));
  return found;
}

function table(columns, body) {
  const found = element("table");
  const head = element("thead");
  const row = element("tr");
  row.append(...columns.map((column) => element("th", "", column)));
  head.append(row);
  found.append(head, body);
  return found;
}

function button(text, name, onClick) {
  const found = element("button", name, text);
  found.type = "button";
  found.addEventListener("click", () => onClick());
  return found;
}

function element(tag, className = "", text = "") {
  const found = document.createElement(tag);
  if (className) found.className = className;
  if (text) found.textContent = text;
  return found;
}

function setText(target, text) {
  if (target.textContent !== text) target.textContent = text;
}
