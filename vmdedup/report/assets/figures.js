/* The figures of the sharing report, drawn by Plotly: for the report's file and for a page
 * that is served. Takes the report as JSON, knows no other source. Names from outside reach
 * Plotly only through `text()`, which leaves it no markup; nothing is put into the page as HTML.
 */
"use strict";

const vmdedupFigures = (() => {
  const COLOURS = {
    merged: "#2a78b8", zero: "#6fb7e3", broken: "#d1622b", unique: "#3c9d72",
    volatile: "#e0a32e", swapped: "#a07cc0", own: "#a8658c", absent: null,
  };
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
          autorange: "reversed", fixedrange: true, showgrid: false,
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

  /* Draw `figure(width)` into the element, and again when the colour scheme or the width changes. */
  function show(element, figure) {
    let drawn = 0;
    const draw = () => {
      drawn = element.clientWidth;
      const made = figure(drawn);
      Plotly.react(element, made.data, made.layout, CONFIG);
    };
    draw();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
    addEventListener("resize", () => {
      if ((element.clientWidth < NARROW) !== (drawn < NARROW)) { draw(); }
    });
  }

  return { bars, heatMap, timeLine, show, size };
})();
