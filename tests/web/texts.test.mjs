import assert from "node:assert/strict";
import { test } from "node:test";
import { translator, translatorFor } from "../../web/texts.js";

const TABLES = {
  en: { paralleldit: { start: "Start", fit: { fits: "{factors} = {ranks} ranks" } } },
  zh: { paralleldit: { start: "启动" } },
};
const CASES = [
  ["en", "start", {}, "Start"],
  ["zh", "start", {}, "启动"],
  ["zh-TW", "start", {}, "启动"],
  ["zh", "fit.fits", { factors: "2 × 2", ranks: 4 }, "2 × 2 = 4 ranks"],
  ["fr", "start", {}, "Start"],
  ["en", "fit.fits", { factors: "2" }, "2 = {ranks} ranks"],
  ["en", "no.such.text", {}, "no.such.text"],
  ["en", "fit", {}, "fit"],
  ["en", "start.more", {}, "start.more"],
];
for (const [locale, key, values, text] of CASES) {
  test(`${key} in ${locale} is ${text}`, () => assert.equal(translatorFor(TABLES, locale)(key, values), text));
}

test("without any table a key is shown as it is", () => {
  assert.equal(translator()("start"), "start");
  assert.equal(translatorFor({}, "en")("start"), "start");
});

test("a value is inserted as it is", () => {
  assert.equal(translator({ a: "{x}" })("a", { x: "$& {y}" }), "$& {y}");
});
