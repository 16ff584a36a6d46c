/* The figures of the sharing report, drawn by Plotly: for the report's file and for the
 * dashboard. Takes the report as JSON, knows no other source. Names from outside reach
 * Plotly only through `text()`, which leaves it no markup; nothing is put into the page as HTML.
 */
"use strict";

const vmdedupFigures = (() => {
  const COLOURS = {
    merged: "#2a78b8", zero: "#6fb7e3", broken: "#d1622b", unique: "#3c9d72",
    volatile: "#e0a32e", swapped: "#a07cc0", own: "#a8658c", pending: "#a8658c",
    deferred: "#7d5a9b", absent: null,
  };
  const PAGE_BYTES = 4096;
  const NARROW = 560;
  const NUMBERS_UP_TO = 10;
  const CONFIG = { responsive: true, displaylogo: false, displayModeBar: false };
  const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

  function text(words) {
    return String(words).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  }

  function short(name, width) {
    const longest = width < NARROW ? 12 : 24;
    return name.length > longest ? name.slice(0, longest - 1) + "…" : name;
  }

  function size(bytes) {
    let power = 0;
    while (Math.abs(bytes) >= 1023.95 && power < UNITS.length - 1) {
      bytes /= 1024;
      power += 1;
    }
    return bytes.toFixed(power ? 1 : 0) + " " + UNITS[power];
  }

  function unitFor(bytes) {
    let power = 0;
    while (bytes >= 2048 && power < UNITS.length - 1) {
      bytes /= 1024;
      power += 1;
    }
    return { name: UNITS[power], bytes: 1024 ** power };
  }

  function colour(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  }

  function layout(more) {
    const ink = colour("--ink");
    const line = colour("--line");
    const axis = { gridcolor: line, linecolor: line, zerolinecolor: line, automargin: true };
    return {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: ink, family: "system-ui, sans-serif", size: 13 },
      margin: { l: 8, r: 12, t: 8, b: 8 },
      hoverlabel: { bgcolor: colour("--card"), font: { color: ink } },
      uirevision: "same",
      ...more,
      xaxis: { ...axis, ...more.xaxis },
      yaxis: { ...axis, ...more.yaxis },
    };
  }

  /* RAM of each VM in its parts; `parts` is [{name, means, bytes: [one a VM]}]. */
  function bars(names, parts, width) {
    const rows = names.map((_, row) => row);
    const largest = Math.max(1, ...rows.map((row) => parts.reduce((sum, part) => sum + part.bytes[row], 0)));
    const unit = unitFor(largest);
    return {
      data: parts.map((part) => ({
        type: "bar",
        orientation: "h",
        name: part.name,
        y: rows,
        x: part.bytes.map((bytes) => bytes / unit.bytes),
        marker: { color: COLOURS[part.name] || colour("--absent") },
        hovertext: part.bytes.map((bytes, row) => `${text(names[row])}<br>${part.name}: ${size(bytes)} (${text(part.means)})`),
        hoverinfo: "text",
      })),
      layout: layout({
        barmode: "stack",
        height: 90 + 34 * Math.max(2, names.length) + (width < NARROW ? 20 * parts.length : 0),
        legend: { orientation: "h", traceorder: "normal", y: 1.02, yanchor: "bottom", x: 0, xanchor: "left" },
        xaxis: { title: { text: unit.name }, fixedrange: true },
        yaxis: {
          tickvals: rows, ticktext: names.map((name) => text(short(name, width))),
          autorange: "reversed", fixedrange: true, showgrid: false, zeroline: false,
        },
      }),
    };
  }

  /* Distinct contents that two VMs both map. */
  function heatMap(matrix, width) {
    const rows = matrix.vms.map((_, row) => row);
    const labels = matrix.vms.map((name, row) => `${row + 1} ${text(short(name, width))}`);
    const withNumbers = rows.length <= (width < NARROW ? 5 : NUMBERS_UP_TO);
    const ticks = { tickvals: rows, ticks: "", fixedrange: true, showgrid: false };
    return {
      data: [{
        type: "heatmap",
        x: rows,
        y: rows,
        z: matrix.pages,
        colorscale: [[0, colour("--cold")], [1, colour("--hot")]],
        showscale: !withNumbers,
        colorbar: { title: { text: "pages" }, thickness: 12 },
        xgap: 2,
        ygap: 2,
        texttemplate: withNumbers ? "%{z:,}" : undefined,
        textfont: { color: colour("--ink") },
        hovertext: matrix.pages.map((line, i) => line.map((pages, j) =>
          `${text(matrix.vms[i])}<br>${text(matrix.vms[j])}<br>${pages.toLocaleString("en")} contents`)),
        hoverinfo: "text",
      }],
      layout: layout({
        height: Math.min(900, 120 + 44 * Math.max(3, rows.length)),
        xaxis: { ...ticks, ticktext: rows.map((row) => String(row + 1)), side: "top" },
        yaxis: { ...ticks, ticktext: labels, autorange: "reversed" },
      }),
    };
  }

  /* Saved memory over time; `samples` are HistorySample documents, the oldest first. */
  function timeLine(samples) {
    const times = samples.map((sample) => new Date(sample.unix_s * 1000));
    const unit = unitFor(Math.max(1, ...samples.map((sample) => sample.present_bytes)));
    const line = (name, field, stroke, fill) => ({
      type: "scatter",
      mode: "lines",
      name: name,
      x: times,
      y: samples.map((sample) => (sample[field] === null ? null : sample[field] / unit.bytes)),
      line: { color: stroke, width: 2, shape: "hv" },
      fill: fill,
      hovertext: samples.map((sample) => `${name}: ${sample[field] === null ? "-" : size(sample[field])}`),
      hoverinfo: "text+x",
    });
    return {
      data: [
        line("held without vmdedup", "present_bytes", colour("--dim")),
        line("saved", "saved_bytes", COLOURS.merged, "tozeroy"),
        line("overhead", "overhead_bytes", COLOURS.broken),
      ],
      layout: layout({
        height: 300,
        legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
        xaxis: { type: "date" },
        yaxis: { title: { text: unit.name }, rangemode: "tozero", fixedrange: true },
      }),
    };
  }

  /* Writes to merged pages, a second, between two samples of one engine. */
  function breaks(samples) {
    const rates = samples.map((sample, number) => {
      const before = samples[number - 1];
      const known = before && sample.cow_breaks !== null && before.cow_breaks !== null;
      const isOneEngine = known && sample.cow_breaks >= before.cow_breaks && sample.unix_s > before.unix_s;
      return isOneEngine ? (sample.cow_breaks - before.cow_breaks) / (sample.unix_s - before.unix_s) : null;
    });
    return {
      data: [{
        type: "scatter",
        mode: "lines",
        x: samples.map((sample) => new Date(sample.unix_s * 1000)),
        y: rates,
        line: { color: COLOURS.broken, width: 2, shape: "vh" },
        hovertext: rates.map((rate) => (rate === null ? "" : `${rate.toFixed(1)} breaks a second`)),
        hoverinfo: "text+x",
      }],
      layout: layout({
        height: 260,
        showlegend: false,
        xaxis: { type: "date", fixedrange: true },
        yaxis: { title: { text: "1/s" }, rangemode: "tozero", fixedrange: true },
      }),
    };
  }

  /* What each class of a histogram of durations holds. */
  function durationLabels(boundsS) {
    const shown = boundsS.map((bound) => (bound < 1 ? `${+(bound * 1000).toFixed(3)} ms` : `${bound} s`));
    return [...shown.map((bound) => `up to ${bound}`), `over ${shown[shown.length - 1]}`];
  }

  /* Gates and drains by how long they took; only the classes between which there are any. */
  function durations(gates, drains) {
    const given = [["gates", gates, COLOURS.merged], ["drains", drains, COLOURS.volatile]].filter(([, histogram]) => histogram);
    const used = given.flatMap(([, histogram]) => histogram.counts.flatMap((count, number) => (count ? [number] : [])));
    if (!used.length) { return null; }
    const low = Math.min(...used);
    const high = Math.max(...used) + 1;
    const labels = durationLabels(given[0][1].upper_bounds_s);
    const rows = labels.map((_, row) => row).slice(low, high);
    return {
      data: given.map(([name, histogram, fill]) => ({
        type: "bar",
        name: name,
        x: rows,
        y: histogram.counts.slice(low, high),
        marker: { color: fill },
        hovertext: rows.map((row) => `${name}, ${labels[row]}: ${histogram.counts[row].toLocaleString("en")}`),
        hoverinfo: "text",
      })),
      layout: layout({
        height: 260,
        legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
        xaxis: { tickvals: rows, ticktext: rows.map((row) => labels[row].replace(/^up to /, "≤ ").replace(/^over /, "> ")), fixedrange: true },
        yaxis: { fixedrange: true, rangemode: "tozero" },
      }),
    };
  }

  /* One VM's RAM, from all of it to what is saved; `parts` is [{name, means, pages}]. */
  function funnel(parts) {
    const some = parts.filter((part) => part.pages);
    const rows = some.map((_, row) => row);
    const ram = some.reduce((sum, part) => sum + part.pages, 0) * PAGE_BYTES;
    const unit = unitFor(ram);
    const starts = some.map((_, row) => some.slice(0, row).reduce((sum, part) => sum + part.pages, 0) * PAGE_BYTES / unit.bytes);
    return {
      data: [{
        type: "bar",
        orientation: "h",
        y: rows,
        x: some.map((part) => part.pages * PAGE_BYTES / unit.bytes),
        base: starts,
        marker: { color: some.map((part) => COLOURS[part.name] || colour("--absent")) },
        hovertext: some.map((part) => `${text(part.name)}: ${size(part.pages * PAGE_BYTES)} (${text(part.means)})`),
        hoverinfo: "text",
      }],
      layout: layout({
        height: 60 + 30 * Math.max(2, some.length),
        showlegend: false,
        bargap: 0.3,
        xaxis: { title: { text: unit.name }, fixedrange: true, range: [0, ram / unit.bytes] },
        yaxis: { tickvals: rows, ticktext: some.map((part) => text(part.name)), autorange: "reversed", fixedrange: true, showgrid: false, zeroline: false },
      }),
    };
  }

  /* Pages by the source of their content: VM, source, folder, file;
   * `vms` is [{name, sources: [{source, part, shared, unique}]}], bytes.
   */
  function sources(vms) {
    const nodes = new Map();
    const add = (path, labels, bytes, fill) => labels.forEach((label, depth) => {
      const id = JSON.stringify(path.slice(0, depth + 1));
      const isLeaf = depth === labels.length - 1;
      const node = nodes.get(id) || { id, label, parent: depth ? JSON.stringify(path.slice(0, depth)) : "", bytes: 0, fill: null };
      node.bytes += bytes;
      if (isLeaf) { node.fill = fill; }
      nodes.set(id, node);
    });
    vms.forEach((vm, row) => vm.sources.forEach(({ source, part, shared, unique }) => {
      const at = part.lastIndexOf("/");
      const folder = part.slice(0, Math.max(0, at));
      const names = [source, ...(folder ? [folder] : []), ...(part ? [part.slice(at + 1) || "other files"] : [])];
      const kinds = [["has an equal", shared, COLOURS.merged], ["unique", unique, COLOURS.unique]].filter(([, bytes]) => bytes);
      for (const [kind, bytes, fill] of kinds) {
        const below = kinds.length > 1 || !part ? [...names, kind] : names;
        add([row, ...below], [vm.name, ...below], bytes, fill);
      }
    }));
    const every = [...nodes.values()];
    return {
      data: [{
        type: "treemap",
        ids: every.map((node) => node.id),
        labels: every.map((node) => text(node.label)),
        parents: every.map((node) => node.parent),
        values: every.map((node) => node.bytes),
        branchvalues: "total",
        marker: { colors: every.map((node) => node.fill || colour("--absent")), pad: { t: 18, l: 2, r: 2, b: 2 } },
        tiling: { pad: 1 },
        text: every.map((node) => size(node.bytes)),
        textinfo: "label+text",
        hovertext: every.map((node) => `${text(node.label)}: ${size(node.bytes)}`),
        hoverinfo: "text",
      }],
      layout: layout({ height: 120 + 240 * Math.min(4, Math.max(1, vms.length)) }),
    };
  }

  /* Draw `figure(width)` into the element, and again when the colour scheme or the width changes.
   * Returns what draws it anew; nothing is drawn while it gives null, cannot be seen, or is
   * as it was: who points at it keeps what is told there.
   */
  function show(element, figure) {
    let drawn = 0;
    let before = "";
    const draw = () => {
      if (!element.clientWidth) { return; }
      const made = figure(element.clientWidth);
      if (made === null) { return; }
      drawn = element.clientWidth;
      const content = JSON.stringify(made);
      if (content === before) { return; }
      before = content;
      element.style.height = `${made.layout.height}px`;
      Plotly.react(element, made.data, made.layout, CONFIG);
      // The element has a label and its table: a screen reader is spared the drawing.
      for (const drawing of [...element.children, document.getElementById("js-plotly-tester")]) {
        if (drawing) { drawing.setAttribute("aria-hidden", "true"); }
      }
    };
    draw();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
    addEventListener("resize", () => {
      if ((element.clientWidth < NARROW) !== (drawn < NARROW)) { draw(); }
    });
    return draw;
  }

  return { bars, heatMap, sources, timeLine, breaks, durations, durationLabels, funnel, show, size };
})();
