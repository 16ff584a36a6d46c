/* One VM in full, named by the address: #vm=NAME. */

import { byId, count, element, fillFacts, fillTable, say, share, size, vmLink } from "./dom.js";
import { drawChart } from "./charts.js";
import { vmHistoryView } from "./history.js";
import { fetchJson } from "./poll.js";

const PAGE_BYTES = 4096;
const PREFIX = "#vm=";

/** The VM that the address names, or null. */
export function named() {
  if (!location.hash.startsWith(PREFIX)) { return null; }
  try {
    return decodeURIComponent(location.hash.slice(PREFIX.length)) || null;
  } catch {
    return null;
  }
}

export function detailView() {
  const section = byId("detail");
  let shown = null;
  let detail = null;
  const past = vmHistoryView();
  const funnel = drawChart("funnel", () => (detail ? vmdedupFigures.funnel(detail.funnel) : null));

  /** Read and show the VM `key`, or nothing (null). True when another one is shown than before. */
  async function show(key) {
    const isNew = key !== shown;
    shown = key;
    if (key === null) {
      section.hidden = true;
      return isNew;
    }
    let found = null;
    try {
      found = await fetchJson("vm.json?vm=" + encodeURIComponent(key));
    } catch (error) {
      if (error.status !== 404) { throw error; }
    }
    if (shown !== key) { return false; }
    detail = found;
    section.hidden = false;
    byId("detail-none").hidden = found !== null;
    byId("detail-content").hidden = found === null;
    say(byId("detail-title"), found === null ? key : found.report.name);
    if (found !== null) { fill(found); }
    past(key);
    return isNew;
  }

  function fill({ report, funnel: parts, partners, backends, findings, qemu_version: qemu, qmp }) {
    fillFacts(byId("detail-facts"), facts(report, qemu));
    const notes = [[report.reason, ["failed", "refused", "gone"].includes(report.status) ? "bad" : ""], [report.hint, ""]];
    byId("detail-notes").replaceChildren(...notes.filter(([text]) => text).map(([text, kind]) =>
      element("p", { class: `banner ${kind}` }, text)));
    const ramPages = parts.reduce((sum, part) => sum + part.pages, 0);
    fillTable(byId("funnel-table"),
      [{ title: "part", text: true }, { title: "pages" }, { title: "size" }, { title: "share" }, { title: "", text: true, long: true }],
      parts.map((part) => [part.name, count(part.pages), size(part.pages * PAGE_BYTES), share(part.pages, ramPages), { content: part.means, kind: "dim" }]));
    funnel();
    fillOr(byId("partners"), "No other VM maps one of its contents.", [{ title: "VM", text: true, name: true }, { title: "contents" }],
      partners.map((each) => [vmLink(each.key, each.name), count(each.pages)]));
    fillOr(byId("backends"), "None is known.", [{ title: "backend", text: true, name: true }, { title: "kind", text: true }, { title: "size" }, { title: "", text: true, long: true }],
      backends.map((each) => [each.id, `${each.kind}, share=${each.share ? "on" : "off"}`, size(each.size_bytes),
        each.mergeable ? { content: "mergeable", kind: "merged" } : { content: each.reason || "not mergeable", kind: "dim" }]));
    fillOr(byId("findings"), "", [{ title: "hazard", text: true }, { title: "answer", text: true }, { title: "", text: true, long: true }],
      findings.map((each) => [each.key, each.verdict, each.reason]));
    byId("funnel").setAttribute("aria-label", `RAM of ${report.name} in parts; the table below has the figures`);
    byId("detail-facts").title = qmp || "";
  }

  return {
    show,
    /** Lead the reader there. */
    focus() {
      byId("detail-title").focus({ preventScroll: true });
      section.scrollIntoView({ block: "start" });
    },
    get key() { return shown; },
  };
}

function facts(report, qemu) {
  const known = [
    ["status", report.status],
    ["saved", `${size(report.saved_bytes)} (${share(report.saved_bytes, report.present_bytes)})`],
    ["given back by cold pages", report.cold_pages ? `${size(report.cold_bytes_saved)}, ${report.cold_refaults_per_s.toFixed(1)}/s come back soon` : "-"],
    ["cold pages", count(report.cold_pages)],
    ["held without vmdedup", size(report.present_bytes)],
    ["RAM", size(report.ram_bytes)],
    ["broken by writes", count(report.cow_broken_pages)],
    ["breaks", count(report.cow_breaks)],
    ["huge pages", count(report.huge_pages)],
    ["huge pages split", count(report.huge_pages_split)],
    ["pages kept in huge pages", count(report.pages_kept_in_huge)],
    ["VMAs", count(report.vmas)],
    ["gates", count(report.gates)],
    ["paused", report.stops === null ? "-" : `${count(report.stops)} times`],
    ["trust domain", report.trust_domain || "-"],
    ["pid", report.pid === null ? "-" : String(report.pid)],
    ["QEMU", qemu || "-"],
  ];
  return report.uuid ? [...known, ["libvirt UUID", report.uuid]] : known;
}

function fillOr(target, otherwise, columns, rows) {
  if (!rows.length) {
    target.replaceChildren(...(otherwise ? [element("p", { class: "dim" }, otherwise)] : []));
    return;
  }
  let table = target.querySelector("table");
  if (!table) {
    table = element("table");
    target.replaceChildren(element("div", { class: "scroll", tabindex: "0" }, table));
  }
  fillTable(table, columns, rows);
}
