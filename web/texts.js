// The panel's own words, in the language that ComfyUI is set to.

/** A function from a key such as a.b, and values for the {names} in its text; a key that no table has is shown. */
export function translator(...tables) {
  return (key, values = {}) => {
    const text = tables.map((table) => find(table, key)).find((found) => typeof found === "string") ?? key;
    return text.replace(/\{(\w+)\}/g, (place, name) => values[name] ?? place);
  };
}

/** From what the host's /i18n route answers. */
export function translatorFor(translations, locale) {
  const table = (language) => translations[language]?.paralleldit ?? {};
  return translator(table(locale), table(locale.split("-")[0]), table("en"));
}

function find(table, key) {
  return key.split(".").reduce((place, name) => place?.[name], table);
}
