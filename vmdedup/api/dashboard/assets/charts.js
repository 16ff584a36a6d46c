/* Plotly, asked for once the figures are there; without it the tables open by themselves. */

import { byId, element } from "./dom.js";

const drawings = new Map();
let state = "wanted";

/** Load Plotly's script; null where it is not installed. */
export function loadCharts(plotly) {
  if (state !== "wanted") { return; }
  if (plotly === null) {
    withoutCharts();
    byId("no-charts").hidden = false;
    return;
  }
  state = "loading";
  for (const id of plotly.sheet_ids) { document.head.append(element("meta", { id })); }
  const script = element("script", { src: plotly.script });
  script.addEventListener("load", () => {
    state = "there";
    for (const draw of drawings.values()) { draw(); }
  });
  script.addEventListener("error", withoutCharts);
  document.head.append(script);
}

function withoutCharts() {
  state = "absent";
  document.body.classList.add("no-charts");
  for (const figures of document.querySelectorAll("details[id$='-figures']")) { figures.open = true; }
}

/** A chart in the element `id`; what is returned draws it, as soon as it can be drawn and seen. */
export function drawChart(id, figure) {
  const target = byId(id);
  let redraw = null;
  const draw = () => {
    if (state !== "there" || !target.offsetParent || !figure(target.clientWidth)) { return; }
    if (redraw) { redraw(); } else { redraw = vmdedupFigures.show(target, figure); }
  };
  drawings.set(id, draw);
  return draw;
}
