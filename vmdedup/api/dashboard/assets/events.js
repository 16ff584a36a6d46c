/* The latest of what the daemon did and met. */

import { byId, fillTable, moment, vmLink } from "./dom.js";
import { fetchJson } from "./poll.js";

const SHOWN = 60;
const AT_A_TIME = 1000;

export function eventsView() {
  let events = [];
  let since = 0;

  return async function refresh(vms) {
    const read = await fetchJson(`/v1/events?since=${since}&limit=${AT_A_TIME}`);
    since = read.next_since;
    if (!read.events.length && events.length) { return; }
    events = [...events, ...read.events].slice(-SHOWN);
    byId("events").hidden = events.length === 0;
    const keys = new Set(vms.map((vm) => vm.key));
    const rows = [...events].reverse().map((event) => [
      moment(event.unix_s), event.kind,
      event.vm === null ? "" : keys.has(event.vm) ? vmLink(event.vm, event.vm) : event.vm,
      event.message,
    ]);
    fillTable(byId("events-table"),
      [{ title: "time", text: true }, { title: "event", text: true }, { title: "VM", text: true, name: true }, { title: "", text: true, long: true }], rows);
  };
}
