// A line under the inputs of Parallel Layout: the product of its degrees against the ranks.

import { factorsOf, judgeLayout } from "./layout_fit.js";

const NAME = "paralleldit_fit";
const HEIGHT = 22;

/** Adds the line to a new Parallel Layout node; `ranks()` and `t()` tell the default ranks and the words. */
export function addFitLine(node, ranks, t) {
  const line = document.createElement("div");
  line.className = "paralleldit-fit";
  const widget = node.addDOMWidget(NAME, NAME, line, {
    serialize: false,
    margin: 0, // by default as wide as to leave nothing of so low a line
    getValue: () => "",
    setValue: () => {},
    getMinHeight: () => HEIGHT,
    getMaxHeight: () => HEIGHT,
  });
  widget.serialize = false;
  const update = () => {
    const values = valuesOf(node);
    const judged = judgeLayout(values, ranks());
    const numbers = { ...judged, factors: factorsOf(values) };
    line.dataset.verdict = judged.verdict;
    line.textContent = t()(`fit.${judged.verdict}`, numbers);
  };
  for (const each of node.widgets) after(each, "callback", update);
  after(node, "onConfigure", update);
  after(node, "onConnectionsChange", update);
  update();
  return update;
}

/** The values of the node's inputs; those that another node gives are undefined. */
export function valuesOf(node) {
  const linked = new Set((node.inputs ?? []).filter((input) => input.link != null).map((input) => input.name));
  const own = node.widgets.filter((widget) => widget.name !== NAME && !linked.has(widget.name));
  return Object.fromEntries(own.map((widget) => [widget.name, widget.value]));
}

function after(object, name, action) {
  const before = object[name];
  object[name] = function (...args) {
    const result = before?.apply(this, args);
    action();
    return result;
  };
}
