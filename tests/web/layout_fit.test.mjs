import assert from "node:assert/strict";
import { test } from "node:test";
import { CHOSEN, factorsOf, GIVEN, judgeLayout } from "../../web/layout_fit.js";

const NONE = Object.fromEntries([...CHOSEN.map((name) => [name, 0]), ...GIVEN.map((name) => [name, 1])]);
const layout = (changes) => ({ ranks: 4, ...NONE, ...changes });

const CASES = [
  [{}, 2, "completed", { product: 1, ranks: 4, rest: 4 }],
  [{ ulysses_degree: 4 }, 2, "fits", { product: 4, rest: 1 }],
  [{ ulysses_degree: 2, pipefusion_degree: 2 }, 2, "fits", { product: 4 }],
  [{ ulysses_degree: 3 }, 2, "clashes", { product: 3, ranks: 4 }],
  [{ ulysses_degree: 1, ring_degree: 1, data_degree: 1 }, 2, "clashes", { rest: 0 }],
  [{ ulysses_degree: 1, ring_degree: 1, data_degree: 2 }, 2, "completed", { rest: 2 }],
  [{ ranks: 0, ulysses_degree: 2 }, 2, "fits", { ranks: 2 }],
  [{ ranks: 0, ulysses_degree: 2 }, 0, "unknown", { product: 2 }],
  [{ ranks: undefined }, 2, "unknown", {}],
  [{ ranks: 0, devices: "1, 3", ulysses_degree: 2 }, 8, "fits", { ranks: 2 }],
  [{ ranks: 0, devices: "", ulysses_degree: 2 }, 2, "fits", { ranks: 2 }],
  [{ ranks: 4, devices: "0,1", ulysses_degree: 4 }, 8, "fits", { ranks: 4 }],
  [{ ulysses_degree: undefined, ring_degree: 4 }, 2, "unknown", { product: 4 }],
  [{ tensor_degree: 2, distrifusion_degree: 2 }, 2, "fits", { product: 4 }],
];

for (const [changes, defaultRanks, verdict, numbers] of CASES) {
  test(`${JSON.stringify(changes)} on ${defaultRanks} ranks by default: ${verdict}`, () => {
    const judged = judgeLayout(layout(changes), defaultRanks);
    assert.equal(judged.verdict, verdict);
    for (const [name, number] of Object.entries(numbers)) assert.equal(judged[name], number, name);
  });
}

test("degrees of one and zero are no factors", () => {
  assert.equal(factorsOf(layout({ ulysses_degree: 2, pipefusion_degree: 3 })), "2 × 3");
  assert.equal(factorsOf(layout({})), "1");
});
