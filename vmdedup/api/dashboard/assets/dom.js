/* Elements and words. Everything from outside becomes text: nothing here parses HTML. */

export const byId = (id) => document.getElementById(id);

/** An element with properties (`class`, `dataset` and attributes by name) and children. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined) { continue; }
    if (name === "on") {
      for (const [event, act] of Object.entries(value)) { made.addEventListener(event, act); }
    } else {
      made.setAttribute(name, value);
    }
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

/** Set the text of an element, if it is another one: a reader may stand there. */
export function say(target, words) {
  if (target.textContent !== words) { target.textContent = words; }
}

export const size = (bytes) => vmdedupFigures.size(bytes);
export const count = (number) => (number === null ? "-" : number.toLocaleString("en"));
export const share = (part, whole) => (whole ? (100 * part / whole).toFixed(1) + "%" : "-");
export const time = (unixS) => new Date(unixS * 1000).toLocaleTimeString();
export const moment = (unixS) => new Date(unixS * 1000).toLocaleString();

export function duration(seconds) {
  const units = [[86400, "d"], [3600, "h"], [60, "min"]];
  for (const [unit, name] of units) {
    if (seconds >= 2 * unit) { return `${Math.round(seconds / unit)} ${name}`; }
  }
  return `${Math.max(0, Math.round(seconds))} s`;
}

/** A link to a VM's detail. */
export function vmLink(key, name) {
  return element("a", { href: vmAddress(key), "data-key": key }, name);
}

export const vmAddress = (key) => "#vm=" + encodeURIComponent(key);

/** Fill a list of facts, [name, value] each. */
export function fillFacts(target, facts) {
  const rows = facts.map(([name, value]) =>
    element("div", {}, element("dt", {}, name), element("dd", {}, value)));
  target.replaceChildren(...rows);
}

/**
 * A table's head and rows. A column is {title, text, long, name, means}; a cell is a string, an
 * element, or {content, kind} with a class of its own.
 */
export function fillTable(table, columns, rows) {
  const kinds = columns.map((column) =>
    ["text", "long", "name"].filter((kind) => column[kind]).join(" "));
  const cell = (content, number) => (content !== null && content.content !== undefined
    ? element("td", { class: `${kinds[number]} ${content.kind}` }, content.content)
    : element("td", { class: kinds[number] }, content));
  const head = columns.some((column) => column.title) ? [element("thead", {}, element("tr", {},
    ...columns.map((column, number) =>
      element("th", { class: kinds[number], scope: "col", title: column.means }, column.title || ""))))] : [];
  const body = element("tbody", {}, ...rows.map((row) => element("tr", {}, ...row.map(cell))));
  replaceKeepingFocus(table, [...head, body]);
}

/** Put these into an element; who stood on a VM's link stands on the new one. */
export function replaceKeepingFocus(target, children) {
  const held = target.contains(document.activeElement) ? document.activeElement.dataset.key : undefined;
  target.replaceChildren(...children);
  if (held !== undefined) {
    const again = [...target.querySelectorAll("[data-key]")].find((each) => each.dataset.key === held);
    if (again) { again.focus({ preventScroll: true }); }
  }
}

/** A table inside `details`, made when it is open. */
export function tableOnDemand(details, fill) {
  const table = element("table");
  details.querySelector(".scroll").append(table);
  const draw = () => { if (details.open) { fill(table); } };
  details.addEventListener("toggle", draw);
  return draw;
}
