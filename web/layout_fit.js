// Whether the degrees of a Parallel Layout can be completed to the number of ranks: the rule of nodes/layout.py.

export const CHOSEN = ["ulysses_degree", "ring_degree", "cfg_degree", "data_degree"]; // 0: chosen at the run
export const GIVEN = ["tensor_degree", "distrifusion_degree", "pipefusion_degree"]; // 1: none
const LARGEST = { cfg_degree: 2 };

/**
 * @param {Record<string, number | string>} values the node's inputs by name; what another node gives is undefined
 * @param {number} defaultRanks ranks where `ranks` is 0 and no devices are named; 0 when that is not known
 * @returns {{verdict: "fits" | "completed" | "clashes" | "unknown", product: number, ranks: number, rest: number}}
 *   "completed": the degrees that are 0 are chosen so that they multiply to `rest`
 */
export function judgeLayout(values, defaultRanks) {
  const degrees = [...CHOSEN, ...GIVEN];
  const named = (values.devices ?? "").split(",").filter((name) => name.trim()).length;
  const ranks = values.ranks === undefined ? 0 : values.ranks || named || defaultRanks;
  const product = degrees.reduce((product, name) => product * (values[name] || 1), 1);
  const rest = ranks / product;
  const isKnown = ranks > 0 && degrees.every((name) => values[name] !== undefined);
  if (!isKnown) return { verdict: "unknown", product, ranks, rest: 0 };
  const open = CHOSEN.filter((name) => values[name] === 0);
  const most = open.reduce((most, name) => most * (LARGEST[name] ?? ranks), 1);
  const isTooLarge = degrees.some((name) => values[name] > (LARGEST[name] ?? Infinity));
  if (!Number.isInteger(rest) || rest > most || isTooLarge) return { verdict: "clashes", product, ranks, rest: 0 };
  return { verdict: rest === 1 ? "fits" : "completed", product, ranks, rest };
}

/** The degrees that divide the work, as in "2 × 2". */
export function factorsOf(values) {
  const factors = [...CHOSEN, ...GIVEN].map((name) => values[name]).filter((degree) => degree > 1);
  return factors.join(" × ") || "1";
}
