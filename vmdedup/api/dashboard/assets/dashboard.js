/* The dashboard: asks the daemon how it is, and when it knows something new, shows that. */

import { byId, count, duration, element, fillFacts, fillTable, say, share, size, tableOnDemand, time, vmLink } from "./dom.js";
import { drawChart, loadCharts } from "./charts.js";
import { detailView, named } from "./detail.js";
import { eventsView } from "./events.js";
import { historyView } from "./history.js";
import { fetchJson, poll } from "./poll.js";
import { vmTable } from "./vms.js";

const MOST_BARS = 30;
const SAME_MS = 300;
const OLD_S = 30;

let state = null;
let seenMs = 0;
let listed = [];

const charts = {
  bars: drawChart("bars", (width) => {
    const some = listed.filter((vm) => vm.ram_bytes).slice(0, MOST_BARS);
    const parts = state.parts.map((part, number) => ({ ...part, bytes: some.map((vm) => vm.parts_bytes[number]) }));
    return some.length ? vmdedupFigures.bars(some.map((vm) => vm.name), parts, width) : null;
  }),
  matrix: drawChart("heat-map", (width) => (state.matrix.vms.length > 1 ? vmdedupFigures.heatMap(state.matrix, width) : null)),
  durations: drawChart("durations", () => vmdedupFigures.durations(state.gates, state.drains)),
};
const tables = [
  tableOnDemand(byId("ram-figures"), fillRam),
  tableOnDemand(byId("matrix-figures"), fillMatrix),
  tableOnDemand(byId("gate-figures"), fillDurations),
  tableOnDemand(byId("counters"), (table) => fillTable(table,
    [{ text: true }, {}, { text: true, long: true }],
    state.counters.map((each) => [each.name, each.value, { content: each.means, kind: "dim" }]))),
  tableOnDemand(byId("controls"), (table) => fillTable(table, [{ text: true }, {}],
    Object.entries(state.controls).map(([name, value]) => [name, String(value)]))),
];
const vms = vmTable((shown) => { listed = shown; showBars(); });
const detail = detailView();
const events = eventsView();
const history = historyView();

async function ask() {
  const health = await fetchJson("/v1/health");
  const knownMs = Date.now() - health.snapshot_age_ms;
  if (state === null || Math.abs(knownMs - seenMs) > SAME_MS || state.engine.engine_pid !== health.engine.engine_pid) {
    state = await fetchJson("state.json");
    seenMs = knownMs;
    show();
    await events(state.vms);
    if (detail.key !== null) { await detail.show(detail.key); }
  }
  await history();
  byId("away").hidden = true;
  document.body.classList.remove("away");
  showAge(health.snapshot_age_ms / 1000, health.history);
}

function failed(error, waitMs) {
  byId("away").hidden = false;
  document.body.classList.add("away");
  const answer = error.status ? `The daemon answers: ${error.message}.` : "The daemon does not answer.";
  const known = state === null ? "" : ` The figures are those of ${time(seenMs / 1000)}.`;
  say(byId("away-text"), `${answer}${known} Trying again every ${duration(waitMs / 1000)}.`);
  say(byId("status"), "no connection");
}

/* How old the figures are, and whether that is older than a daemon that scans would leave them. */
function showAge(ageS, kept) {
  const { engine, controls } = state;
  const scans = controls.run === 1 && !controls.pressure_threshold_percent
    && state.vms.some((vm) => vm.status === "merged" || vm.status === "scanning");
  const roundS = Math.max(controls.advisor_target_scan_time || 0, (engine.last_pass_ms || 0) / 1000);
  const isOld = scans && ageS > OLD_S + 3 * roundS;
  say(byId("status"), `as of ${time(seenMs / 1000)}${ageS > OLD_S ? `, ${duration(ageS)} ago` : ""}`);
  const words = [];
  if (isOld) {
    words.push(["bad", `These figures are ${duration(ageS)} old: the engine has not finished a pass since. vmdedup events names its work.`]);
  }
  if (controls.run === 0) { words.push(["", "Merging is off (run=0); merged pages stay merged. vmdedup set run=1 turns it on."]); }
  if (controls.run === 2) { words.push(["", "Merging is off and everything was unmerged (run=2). vmdedup set run=1 turns it on."]); }
  if (engine.libvirt && !engine.libvirt.connected) {
    words.push(["bad", `No connection to libvirt ${engine.libvirt.uri} since ${time(engine.libvirt.since_unix_s)}: ${engine.libvirt.reason || "no reason known"}. Merges are kept.`]);
  }
  words.push(...state.lacking.map((line) => ["bad", `${line[0].toUpperCase()}${line.slice(1)}.`]));
  if (kept && kept.problem) { words.push(["", `The history is kept in memory only: ${kept.problem}`]); }
  const target = byId("banners");
  const before = [...target.children].map((each) => each.textContent).join();
  if (before !== words.map(([, text]) => text).join()) {
    target.replaceChildren(...words.map(([kind, text]) => element("p", { class: `banner ${kind}` }, text)));
  }
}

function show() {
  const attached = state.vms.filter((vm) => vm.ram_bytes);
  const saved = `${size(state.saved_bytes)} saved`;
  document.title = `vmdedup: ${saved}`;
  byId("lead").replaceChildren(...(attached.length ? [element("strong", {}, saved),
    ` of ${size(state.present_bytes)} held by ${count(attached.length)} VM${attached.length === 1 ? "" : "s"} (${share(state.saved_bytes, state.present_bytes)})`]
    : [state.vms.length ? "No VM can be merged: see why below" : "Nothing is merged: no VM is known"]));
  fillFacts(byId("facts"), state.facts.map((fact) => [fact.name, fact.value]));
  byId("empty").hidden = state.vms.length > 0;
  for (const id of ["vms", "notes"]) { byId(id).hidden = state.vms.length === 0; }
  for (const id of ["ram", "gates"]) { byId(id).hidden = attached.length === 0; }
  vms.update(state.vms);
  showMatrix();
  showGates();
  showNotes();
  showContents();
  showAbout();
  for (const draw of tables) { draw(); }
  loadCharts(state.charts);
}

function showBars() {
  const some = listed.filter((vm) => vm.ram_bytes);
  const limit = byId("bars-limit");
  limit.hidden = some.length <= MOST_BARS;
  say(limit, `${MOST_BARS} of ${count(some.length)} VMs: the first of the table above. Filter or sort it to see others.`);
  byId("bars").hidden = some.length === 0;
  charts.bars();
}

function fillRam(table) {
  const rows = state.vms.filter((vm) => vm.ram_bytes);
  fillTable(table,
    [{ title: "VM", text: true, name: true }, ...state.parts.map((part) => ({ title: part.name, means: part.means })), { title: "RAM" }],
    rows.map((vm) => [vmLink(vm.key, vm.name), ...vm.parts_bytes.map(size), size(vm.ram_bytes)]));
}

function showMatrix() {
  const { vms: names } = state.matrix;
  byId("matrix").hidden = names.length < 2;
  say(byId("matrix-limit"), names.length < state.matrix_of_vms
    ? ` These are the ${names.length} of ${count(state.matrix_of_vms)} VMs that share most; a VM's own page names its partners.` : "");
  charts.matrix();
}

function fillMatrix(table) {
  const { vms: names, pages } = state.matrix;
  fillTable(table, [{ title: "VM", text: true, name: true }, ...names.map((name, number) => ({ title: String(number + 1), means: name }))],
    names.map((name, number) => [`${number + 1} ${name}`, ...pages[number].map(count)]));
}

function showGates() {
  const breakers = state.vms.filter((vm) => vm.cow_breaks).sort((one, other) => other.cow_breaks - one.cow_breaks);
  const of = (histogram) => (histogram ? count(histogram.counts.reduce((sum, each) => sum + each, 0)) : "-");
  const facts = [["gates", of(state.gates)], ["drains", of(state.drains)], ["breaks", count(state.cow_breaks)]];
  if (breakers.length) { facts.push(["most breaks", `${breakers[0].name}: ${count(breakers[0].cow_breaks)}`]); }
  fillFacts(byId("gate-facts"), facts);
  charts.durations();
}

function fillDurations(table) {
  const { gates, drains } = state;
  const labels = gates ? vmdedupFigures.durationLabels(gates.upper_bounds_s) : [];
  fillTable(table, [{ title: "took", text: true }, { title: "gates" }, { title: "drains" }],
    labels.map((label, number) => [label, count(gates.counts[number]), drains ? count(drains.counts[number]) : "-"]));
}

function showNotes() {
  byId("notes").hidden = state.notes.length === 0;
  fillTable(byId("notes-table"), [{ title: "VM", text: true, name: true }, { title: "", text: true }, { title: "why", text: true, long: true }],
    state.notes.map((note) => [vmLink(note.key, note.name), { content: note.kind, kind: note.status }, note.text]));
}

function showContents() {
  byId("contents").hidden = state.contents.length === 0;
  fillTable(byId("contents-table"),
    [{ title: "content", text: true, long: true }, { title: "guest pages" }, { title: "size" }, { title: "pages it takes" }, { title: "VMs" }],
    state.contents.map((each) => [each.what || "not known", count(each.pages), size(each.pages * 4096), count(each.store_pages), count(each.vms)]));
}

function showAbout() {
  const { engine } = state;
  const pass = engine.last_pass_ms === null ? "none yet" : `${(engine.last_pass_ms / 1000).toFixed(1)} s`;
  say(byId("about"), `vmdedup ${state.version}, engine ${engine.engine_pid}, up since ${new Date(engine.started_unix_s * 1000).toLocaleString()}, `
    + `${count(engine.passes)} passes (last: ${pass}), ${engine.cpu_s.toFixed(1)} s of CPU.`);
}

/* The address may also name a place of the page, for who skips to it. */
async function follow() {
  if (location.hash && !location.hash.startsWith("#vm=")) { return; }
  const key = named();
  vms.choose(key);
  try {
    if (await detail.show(key) && key !== null) { detail.focus(); }
  } catch {
    pollNow();
  }
}

function closeDetail() {
  const key = detail.key;
  window.history.pushState(null, "", location.pathname);
  follow();
  if (key !== null) { vms.focus(key); }
}

addEventListener("hashchange", follow);
addEventListener("click", (event) => {
  // A link to where we are changes no address.
  const link = event.target.closest("a[data-key]");
  if (link && link.hash === location.hash) { detail.focus(); }
});
byId("close-detail").addEventListener("click", closeDetail);
byId("detail").addEventListener("keydown", (event) => { if (event.key === "Escape") { closeDetail(); } });
const pollNow = poll(ask, failed);
byId("retry").addEventListener("click", pollNow);
follow();
