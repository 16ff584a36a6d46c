/* The table of VMs: sorted, filtered, and kept in place while its figures change. */

import { byId, count, element, say, share, size, vmLink } from "./dom.js";

const SVG = "http://www.w3.org/2000/svg";

/* A rare column is shown only while some VM has such pages. */
const COLUMNS = [
  { title: "VM", of: (vm) => vm.name, text: true },
  { title: "status", of: (vm) => vm.status, text: true },
  { title: "saved", of: (vm) => vm.saved_bytes, show: size },
  { title: "of held", of: (vm) => (vm.present_bytes ? vm.saved_bytes / vm.present_bytes : -1), means: "saved share of the memory that the VM would hold without vmdedup" },
  { title: "held", of: (vm) => vm.present_bytes, show: size, means: "memory that the VM would hold without vmdedup" },
  { title: "RAM", of: (vm) => vm.ram_bytes, show: size },
  { title: "merged", of: (vm) => vm.merged_pages, show: count, means: "pages that share a store page" },
  { title: "zero", of: (vm) => vm.zero_pages, show: count, means: "pages on the zero page" },
  { title: "broken", of: (vm) => vm.cow_broken_pages, show: count, means: "merged pages that the guest has written since" },
  { title: "breaks", of: (vm) => vm.cow_breaks, show: count, means: "writes to merged pages since it was attached" },
  { title: "waiting", rare: true, of: (vm) => vm.deferred_pages, show: count, means: "mergeable pages that wait for VMAs" },
  { title: "huge", rare: true, of: (vm) => vm.huge_pages, show: count, means: "huge pages of 2 MiB that back its RAM" },
  { title: "kept", rare: true, of: (vm) => vm.pages_kept_in_huge, show: count, means: "mergeable pages in huge pages that are not worth splitting" },
  { title: "cold", rare: true, of: (vm) => vm.cold_pages, show: count, means: "cold pages that vmdedup paged out and that are still out" },
  { title: "VMAs", of: (vm) => vm.vmas, show: count, means: "memory mappings of the QEMU process" },
  { title: "domain", of: (vm) => vm.trust_domain || "", text: true, means: "trust domain: its VMs may share" },
];
const SHARE = 3;

/** `changed` is called when who is shown, or their order, changes. */
export function vmTable(changed) {
  const table = byId("vm-table");
  const body = table.tBodies[0];
  const rows = new Map();
  let vms = [];
  let sorted = { column: 2, up: false };
  let chosen = null;
  let absent = [];

  const heads = COLUMNS.map((column, number) => element("th",
    { scope: "col", class: column.text ? "text" : null },
    element("button", { type: "button", title: column.means, on: { click: () => sortBy(number) } }, column.title)));
  table.tHead.append(element("tr", {}, ...heads));
  byId("filter").addEventListener("input", draw);

  function sortBy(number) {
    sorted = { column: number, up: sorted.column === number ? !sorted.up : Boolean(COLUMNS[number].text) };
    draw();
  }

  function shown() {
    const words = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    const has = (vm) => {
      const text = `${vm.name} ${vm.status} ${vm.trust_domain || ""} ${vm.pid || ""}`.toLowerCase();
      return words.every((word) => text.includes(word));
    };
    const of = COLUMNS[sorted.column].of;
    const collate = new Intl.Collator("en", { numeric: true }).compare;
    const order = (one, other) => {
      const [a, b] = [of(one), of(other)];
      const by = typeof a === "string" ? collate(a, b) : (a ?? -1) - (b ?? -1);
      return (sorted.up ? by : -by) || collate(one.name, other.name);
    };
    return vms.filter(has).sort(order);
  }

  function draw() {
    absent = COLUMNS.map((column) => Boolean(column.rare) && !vms.some(column.of));
    heads.forEach((head, number) => {
      head.hidden = absent[number];
      if (number === sorted.column) {
        head.setAttribute("aria-sort", sorted.up ? "ascending" : "descending");
      } else {
        head.removeAttribute("aria-sort");
      }
    });
    const wanted = shown();
    const lines = wanted.map((vm) => {
      const row = rows.get(vm.key) || newRow(vm);
      rows.set(vm.key, row);
      fill(row, vm);
      return row;
    });
    if (lines.length !== body.rows.length || lines.some((row, number) => body.rows[number] !== row)) {
      const held = body.contains(document.activeElement) ? document.activeElement : null;
      body.replaceChildren(...lines);
      if (held && held.isConnected) { held.focus({ preventScroll: true }); }
    }
    say(byId("filtered"), wanted.length === vms.length ? "" : `${count(wanted.length)} of ${count(vms.length)}`);
    changed(wanted);
  }

  function newRow(vm) {
    const cells = COLUMNS.map((column) => element("td", { class: column.text ? "text" : null }));
    cells[0].className = "text name";
    cells[0].append(vmLink(vm.key, vm.name));
    cells[SHARE].append(document.createTextNode(""), " ", meter());
    return element("tr", {}, ...cells);
  }

  function fill(row, vm) {
    COLUMNS.forEach((column, number) => {
      const cell = row.cells[number];
      cell.hidden = absent[number];
      if (number === SHARE) {
        cell.firstChild.data = share(vm.saved_bytes, vm.present_bytes);
        const part = vm.present_bytes ? vm.saved_bytes / vm.present_bytes : 0;
        cell.querySelector("rect").setAttribute("width", String(100 * part));
      } else if (number > 0) {
        const value = column.of(vm);
        say(cell, column.show ? column.show(value) : value || "-");
      }
    });
    row.cells[1].className = `text ${vm.status}`;
    row.classList.toggle("chosen", vm.key === chosen);
    if (vm.key === chosen) {
      row.cells[0].firstChild.setAttribute("aria-current", "true");
    } else {
      row.cells[0].firstChild.removeAttribute("aria-current");
    }
  }

  return {
    update(newVms) {
      vms = newVms;
      const known = new Set(vms.map((vm) => vm.key));
      for (const key of rows.keys()) { if (!known.has(key)) { rows.delete(key); } }
      draw();
    },
    choose(key) {
      chosen = key;
      draw();
    },
    /** Stand on a VM's link, if it is shown. */
    focus(key) {
      const row = rows.get(key);
      const link = row && row.isConnected ? row.cells[0].firstChild : byId("vms-title");
      link.focus();
    },
  };
}

/* A picture, since the page's policy allows no style on an element. */
function meter() {
  const picture = document.createElementNS(SVG, "svg");
  const bar = document.createElementNS(SVG, "rect");
  for (const [name, value] of Object.entries({ viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true", class: "meter" })) {
    picture.setAttribute(name, value);
  }
  bar.setAttribute("height", "10");
  picture.append(bar);
  return picture;
}
