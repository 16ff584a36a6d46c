/* Asks again and again, as often as it is worth it: not while the tab is hidden, and ever more
 * rarely while nobody answers.
 */

const PERIOD_MS = 2000;
const LONGEST_MS = 30_000;
const LIMIT_MS = 10_000;

/** The JSON at an address of this server; throws when there is no good answer in time. */
export async function fetchJson(address) {
  const response = await fetch(address, { signal: AbortSignal.timeout(LIMIT_MS), credentials: "same-origin" });
  if (!response.ok) {
    const problem = await response.json().catch(() => ({}));
    throw Object.assign(new Error(problem.error || `${address}: ${response.status}`), { status: response.status });
  }
  return response.json();
}

/**
 * Calls `ask` until the page ends. `failed(error, waitMs)` is told when it throws.
 * Returns a function that has it called at once.
 */
export function poll(ask, failed) {
  let timer = 0;
  let waitMs = PERIOD_MS;
  let asking = false;
  let again = false;

  async function turn() {
    clearTimeout(timer);
    if (asking) { again = true; return; }
    asking = true;
    again = false;
    try {
      await ask();
      waitMs = PERIOD_MS;
    } catch (error) {
      waitMs = Math.min(LONGEST_MS, waitMs * 2);
      failed(error, waitMs);
    }
    asking = false;
    if (again) { turn(); } else if (!document.hidden) { timer = setTimeout(turn, waitMs); }
  }

  document.addEventListener("visibilitychange", () => {
    clearTimeout(timer);
    if (!document.hidden) { turn(); }
  });
  turn();
  return turn;
}
