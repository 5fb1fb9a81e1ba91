// The table of runs: it follows them, and can be sorted, filtered, and ticked for curves, a report or a chat.
import { make, on, say } from "/static/page.js";
import { choose } from "/static/curves.js";

const MOST = 7;
const table = document.getElementById("runs"), head = table.tHead.rows[0], body = table.tBodies[0];
const filter = document.getElementById("filter"), status = document.getElementById("status"), sorter = document.getElementById("sort");
const address = new URLSearchParams(location.search);
let rows = [], chosen = address.getAll("run").slice(0, MOST), sort = { key: "started", up: false };
const lines = new Map();

const text = (key) => (row) => row[key] || "-";
const number = (key, words) => ({ cell: (row) => row[words], value: (row) => row[key], num: true });

function columns() {
  const found = [
    { key: "name", title: say("name of run"), cell: (r) => make("a", { href: `/run?${new URLSearchParams({ name: r.name })}`, dir: "auto" }, r.name), value: (r) => r.name },
    { key: "method", title: say("method"), cell: text("method"), value: (r) => r.method },
    { key: "status", title: say("status"), cell: progress, value: (r) => r.status },
    { key: "started", title: say("started"), cell: text("started"), value: (r) => r.started },
    { key: "took", title: say("took"), ...number("seconds", "took") },
  ];
  if (rows.some((r) => r.accuracy !== null)) found.push({ key: "accuracy", title: say("held-out accuracy"), ...number("accuracy", "held_out") });
  // A column for each kind: losses of different kinds are no numbers to compare.
  for (const kind of [...new Set(rows.filter((r) => r.loss !== null).map((r) => r.kind))]) {
    const own = (r) => r.kind === kind && r.loss !== null;
    found.push({ key: `loss ${kind}`, title: say("loss of kind", { kind }), cell: (r) => (own(r) ? r.loss_words : "-"), value: (r) => (own(r) ? r.loss : null), num: true });
  }
  if (rows.some((r) => r.reward !== null)) found.push({ key: "reward", title: say("reward"), ...number("reward", "reward_words") });
  if (rows.some((r) => r.options !== "-")) found.push({ key: "options", title: say("options set"), cell: text("options"), value: (r) => r.options, free: true });
  found.push({ key: "data", title: say("data"), cell: text("data"), value: (r) => r.data, free: true });
  return found;
}

function progress(row) {
  const word = make("span", { class: `status-${row.status}` }, say(`status ${row.status}`));
  if (row.step === row.steps) return word;
  const share = row.steps ? row.step / row.steps : 0;
  const fill = make("span");
  fill.style.width = `${100 * share}%`;
  return make("span", {}, word, " ", say("step of", { step: row.step, steps: row.steps || "?" }), make("span", { class: "bar", "aria-hidden": "true" }, fill));
}

function titles(all) {
  const wanted = JSON.stringify([all.map((c) => c.title), sort]);
  if (head.dataset.shown === wanted) return;
  const held = document.activeElement?.dataset?.key;
  head.dataset.shown = wanted;
  head.replaceChildren(make("td"), ...all.map((c) => {
    const button = make("button", { type: "button", "data-key": c.key }, c.title);
    button.addEventListener("click", () => { sort = { key: c.key, up: sort.key === c.key ? !sort.up : true }; show(); });
    const state = sort.key === c.key ? (sort.up ? "ascending" : "descending") : null;
    return make("th", { scope: "col", class: c.num ? "num" : null, "aria-sort": state }, button);
  }));
  if (held) [...head.querySelectorAll("button")].find((b) => b.dataset.key === held)?.focus();
  sorter.replaceChildren(...all.map((c) => make("option", { value: c.key, selected: c.key === sort.key }, c.title)));
}

function line(row, all) {
  const wanted = JSON.stringify([row, all.map((c) => c.title)]);
  let found = lines.get(row.name);
  if (!found) {
    const tick = make("input", { type: "checkbox", name: "run", value: row.name, "aria-label": say("chosen", { name: row.name }) });
    tick.checked = chosen.includes(row.name);
    tick.addEventListener("change", () => pick(tick));
    found = { element: make("tr", {}, make("td", {}, tick)), tick };
    lines.set(row.name, found);
  }
  if (found.shown !== wanted) {
    found.shown = wanted;
    const focused = found.element.contains(document.activeElement) && document.activeElement !== found.tick;
    const cells = all.map((c, place) => {
      const cell = c.cell(row), empty = cell === "-" ? " void" : "";
      return make(place ? "td" : "th", { scope: place ? null : "row", class: `${c.num ? "num" : ""}${c.free ? "free" : ""}${empty}`, "data-head": c.title }, cell);
    });
    while (found.element.children.length > 1) found.element.lastChild.remove();
    found.element.append(...cells);
    if (focused) found.element.querySelector("a").focus();
  }
  return found.element;
}

function pick(tick) {
  if (tick.checked && chosen.length >= MOST) {
    tick.checked = false;
    document.getElementById("count").textContent = say("most curves", { count: MOST });
    return;
  }
  chosen = tick.checked ? [...chosen, tick.value] : chosen.filter((name) => name !== tick.value);
  const query = new URLSearchParams(chosen.map((name) => ["run", name]));
  history.replaceState(null, "", chosen.length ? `/?${query}` : "/");
  buttons();
  choose(chosen);
}

function buttons() {
  document.getElementById("to-report").disabled = !chosen.length;
  document.getElementById("to-chat").disabled = !chosen.length || chosen.length > 2;
}

function matches(row) {
  const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  const whole = [row.name, row.method, row.kind, row.status, row.data, row.options].join(" ").toLowerCase();
  return words.every((word) => whole.includes(word)) && (!status.value || row.status === status.value);
}

function order(all) {
  const column = all.find((c) => c.key === sort.key) || all[0];
  const compare = (a, b) => (a === b ? 0 : typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true }));
  return rows.filter(matches).sort((one, other) => {
    const [a, b] = [column.value(one), column.value(other)];
    if (a === null || b === null) return (a === null) - (b === null);
    return sort.up ? compare(a, b) : compare(b, a);
  });
}

function show() {
  const all = columns(), wanted = order(all);
  titles(all);
  const kept = new Set(rows.map((row) => row.name));
  for (const name of lines.keys()) if (!kept.has(name)) lines.delete(name);
  const elements = wanted.map((row) => line(row, all));
  if (elements.length !== body.children.length || elements.some((element, n) => body.children[n] !== element)) {
    const held = document.activeElement;
    body.replaceChildren(...elements);
    if (held && body.contains(held)) held.focus();
  }
  document.getElementById("empty").hidden = rows.length > 0;
  document.getElementById("count").textContent = say("count of runs", { shown: wanted.length, all: rows.length });
}

on("runs", (data) => {
  rows = data.rows;
  const states = [...new Set(rows.map((row) => row.status))].sort(), before = status.value;
  const options = states.map((state) => make("option", { value: state }, say(`status ${state}`)));
  status.replaceChildren(status.options[0], ...options);
  status.value = states.includes(before) ? before : "";
  document.getElementById("damaged").replaceChildren(...data.damaged.map((text) => make("li", {}, text)));
  show();
});
filter.addEventListener("input", show);
status.addEventListener("change", show);
sorter.addEventListener("change", () => { sort = { key: sorter.value, up: true }; show(); });
document.getElementById("chosen").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && event.target.type === "checkbox") event.preventDefault();
});
document.getElementById("to-chat").addEventListener("click", () => {
  location.assign(`/chat?${new URLSearchParams(chosen.map((name) => ["run", name]))}`);
});
buttons();
if (chosen.length) choose(chosen);
