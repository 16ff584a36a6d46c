/* What was saved, over the time range that is chosen. */

import { byId, count, fillTable, moment, say, size, tableOnDemand } from "./dom.js";
import { drawChart } from "./charts.js";
import { fetchJson } from "./poll.js";

const MOST_POINTS = 500;
const TABLE_ROWS = 60;
const AFTER_FAILURE_MS = 10_000;

export function historyView() {
  let samples = [];
  let readAt = 0;
  let everyMs = 0;
  const charts = [
    drawChart("time-line", () => (samples.length > 1 ? vmdedupFigures.timeLine(samples) : null)),
    drawChart("breaks", () => (samples.length > 1 ? vmdedupFigures.breaks(samples) : null)),
  ];
  const table = tableOnDemand(byId("history-figures"), fill);
  for (const choice of document.querySelectorAll("[name=range]")) {
    choice.addEventListener("change", () => { readAt = 0; refresh(); });
  }

  async function refresh() {
    if (performance.now() < readAt + everyMs) { return; }
    const rangeS = Number(document.querySelector("[name=range]:checked").value);
    readAt = performance.now();
    everyMs = AFTER_FAILURE_MS;
    try {
      const read = await fetchJson(`/v1/history?since_s=${rangeS}&max_points=${MOST_POINTS}`);
      // A new point comes that often: no sooner is there something new to see.
      everyMs = Math.max(1, read.interval_s, rangeS / MOST_POINTS) * 1000;
      samples = read.samples;
      show("Less than two samples were noted in this time yet.");
    } catch (error) {
      // The disk may be slow, or full: the rest of the page does not need it.
      if (!error.status) { throw error; }
      samples = [];
      show(error.message);
    }
  }

  function show(whyNone) {
    const some = samples.length > 1;
    byId("history").hidden = false;
    byId("history-figures").hidden = !samples.length;
    byId("history-none").hidden = some;
    say(byId("history-none"), whyNone);
    byId("time-line").hidden = !some;
    byId("breaks-column").hidden = !samples.some((sample) => sample.cow_breaks !== null) || !some;
    for (const draw of charts) { draw(); }
    table();
  }

  /* The newest first; of many, every so-manieth. */
  function fill(target) {
    const step = Math.ceil(samples.length / TABLE_ROWS);
    const rows = [...samples].reverse().filter((_, number) => number % step === 0);
    fillTable(target,
      [{ title: "time", text: true }, { title: "VMs" }, { title: "held" }, { title: "saved" }, { title: "overhead" }, { title: "breaks", means: "since the engine's start" }],
      rows.map((each) => [moment(each.unix_s), count(each.vms), size(each.present_bytes), size(each.saved_bytes),
        each.overhead_bytes === null ? "-" : size(each.overhead_bytes), count(each.cow_breaks)]));
  }

  return refresh;
}

/** Shows the time line of one VM, over the same time range. */
export function vmHistoryView() {
  let samples = [];
  let shown = "";
  let readAt = 0;
  let everyMs = 0;
  const line = drawChart("vm-time-line", () => (samples.length > 1 ? vmdedupFigures.timeLine(samples) : null));
  const table = tableOnDemand(byId("vm-history-figures"), fill);

  return async function refresh(key) {
    const rangeS = Number(document.querySelector("[name=range]:checked").value);
    const wanted = `vm=${encodeURIComponent(key)}&since_s=${rangeS}`;
    if (wanted === shown && performance.now() < readAt + everyMs) { return; }
    if (wanted !== shown) { byId("vm-history").hidden = true; }
    shown = wanted;
    readAt = performance.now();
    everyMs = AFTER_FAILURE_MS;
    let found = [];
    try {
      const read = await fetchJson(`/v1/history?${wanted}&max_points=${MOST_POINTS}`);
      everyMs = Math.max(1, read.interval_s, rangeS / MOST_POINTS) * 1000;
      found = read.samples;
    } catch {
      // Whether the daemon is away, the page's other questions tell.
    }
    if (shown !== wanted) { return; }
    samples = found;
    byId("vm-history").hidden = samples.length < 2;
    line();
    table();
  };

  /* The newest first; of many, every so-manieth. */
  function fill(target) {
    const step = Math.ceil(samples.length / TABLE_ROWS);
    const rows = [...samples].reverse().filter((_, number) => number % step === 0);
    fillTable(target,
      [{ title: "time", text: true }, { title: "held" }, { title: "saved" }, { title: "merged" }, { title: "zero" }, { title: "broken" }, { title: "unique" }, { title: "gates" }],
      rows.map((each) => [moment(each.unix_s), size(each.present_bytes), size(each.saved_bytes), count(each.pages_sharing),
        count(each.zero_pages), count(each.cow_broken_pages), count(each.unique_pages), count(each.gates)]));
  }
}
