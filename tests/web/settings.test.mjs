import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { settingsPage } from "../../web/settings.js";

const read = (language) =>
  JSON.parse(readFileSync(new URL(`../../locales/${language}/settings.json`, import.meta.url), "utf8"));
const main = (language) =>
  JSON.parse(readFileSync(new URL(`../../locales/${language}/main.json`, import.meta.url), "utf8"));
const key = (id) => id.replaceAll(".", "_"); // as ComfyUI looks a translation up

test("each setting has a page, a group, a value to begin with, and its place in the order", () => {
  const all = settingsPage(() => {});
  for (const each of all) {
    assert.match(each.id, /^ParallelDiT\.[A-Z]\w+$/);
    assert.deepEqual([each.category[0], each.category[2]], ["ParallelDiT", each.name]);
    assert.equal(typeof each.defaultValue, each.type === "number" ? "number" : "string");
  }
  const order = all.map((each) => each.sortOrder);
  assert.deepEqual(order, order.toSorted((a, b) => b - a));
  assert.equal(new Set(order).size, all.length);
});

test("a change is told", () => {
  let told = 0;
  for (const each of settingsPage(() => (told += 1))) each.onChange();
  assert.equal(told, 4);
});

test("English and Chinese name the settings that there are, and their groups", () => {
  const all = settingsPage(() => {});
  const own = Object.fromEntries(all.map(({ id, name, tooltip }) => [key(id), { name, tooltip }]));
  assert.deepEqual(read("en"), own);
  assert.deepEqual(Object.keys(read("zh")), Object.keys(own));
  for (const language of ["en", "zh"])
    assert.deepEqual(Object.keys(main(language).settingsCategories), [...new Set(all.map((each) => each.category[1]))]);
});
