// Curves of runs, laid over each other: a panel for each metric, and for each kind of loss.
import { follow, make, on, say } from "/static/page.js";

const panels = document.getElementById("panels");
const WIDTH = panels && panels.parentElement.clientWidth < 560 ? 340 : 560; // so that letters stay legible on a phone
const HEIGHT = 250, LEFT = 52, RIGHT = 12, TOP = 8, BOTTOM = 26;
const axis = document.getElementById("x");
const drawn = new Map();
let names = [];

const short = (value) => {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e5 || size < 1e-3) return value.toExponential(1).replace("e+", "e");
  return String(Number(value.toPrecision(4)));
};

/** Round numbers between two values, about ``count`` of them. */
function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
  const found = [];
  for (let n = Math.ceil(low / step); n * step <= high + step * 1e-9; n++) found.push(Number((n * step).toPrecision(12)));
  return found;
}

function scales(panel) {
  const points = panel.series.flatMap((s) => [...s.points, ...s.marks]);
  let [left, right] = [Math.min(...points.map((p) => p[0])), Math.max(...points.map((p) => p[0]))];
  let [low, high] = [Math.min(...points.map((p) => p[1])), Math.max(...points.map((p) => p[1]))];
  if (panel.line !== null && panel.line >= low - (high - low) && panel.line <= high + (high - low)) {
    [low, high] = [Math.min(low, panel.line), Math.max(high, panel.line)];
  }
  const room = 0.08 * (high - low) || Math.max(Math.abs(high), 1) * 0.05;
  [low, high] = [low - room, high + room];
  if (left === right) [left, right] = [left - 1, right + 1];
  return {
    left, right, low, high,
    x: (value) => LEFT + ((value - left) / (right - left)) * (WIDTH - LEFT - RIGHT),
    y: (value) => TOP + ((high - value) / (high - low)) * (HEIGHT - TOP - BOTTOM),
  };
}

function draw(svg, panel) {
  const s = scales(panel);
  const parts = [];
  for (const value of ticks(s.low, s.high, 4)) {
    parts.push(make("line", { class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: s.y(value), y2: s.y(value) }));
    parts.push(make("text", { class: "tick-label", x: LEFT - 6, y: s.y(value) + 4, "text-anchor": "end" }, short(value)));
  }
  for (const value of ticks(s.left, s.right, 5)) {
    if (axis.value === "step" && !Number.isInteger(value)) continue;
    parts.push(make("text", { class: "tick-label", x: s.x(value), y: HEIGHT - 8, "text-anchor": "middle" }, short(value)));
  }
  if (panel.line !== null && panel.line > s.low && panel.line < s.high) {
    parts.push(make("line", { class: "even", x1: LEFT, x2: WIDTH - RIGHT, y1: s.y(panel.line), y2: s.y(panel.line) }));
    if (panel.line_name) parts.push(make("text", { class: "tick-label", x: WIDTH - RIGHT, y: s.y(panel.line) - 4, "text-anchor": "end" }, panel.line_name));
  }
  for (const series of panel.series) {
    const points = series.points.map(([x, y]) => `${s.x(x).toFixed(1)},${s.y(y).toFixed(1)}`).join(" ");
    parts.push(make("polyline", { class: `series c${series.run} ${series.side}`, points }));
    for (const [x, y] of series.marks) {
      parts.push(make("circle", { class: `held c${series.run} ${series.side}`, cx: s.x(x), cy: s.y(y), r: 4 }));
    }
  }
  parts.push(make("line", { class: "cursor", x1: -9, x2: -9, y1: TOP, y2: HEIGHT - BOTTOM }));
  svg.replaceChildren(...parts);
  return s;
}

const nearest = (points, x) => points.reduce((best, p) => (Math.abs(p[0] - x) < Math.abs(best[0] - x) ? p : best), points[0]);
const name = (series) => [names.length > 1 ? names[series.run] : "", series.side].filter(Boolean).join(" ");

/** Write the values at a place of the x axis, and show the place. */
function read(figure, x) {
  const { panel, scale, svg, output } = figure;
  const values = panel.series.filter((s) => s.points.length).map((s) => {
    const [, y] = nearest(s.points, x);
    return `${name(s)} ${short(y)}`.trim();
  });
  const at = nearest(panel.series.flatMap((s) => (s.points.length ? s.points : s.marks)), x)[0];
  output.textContent = say("values at", { axis: say(axis.value), x: short(at), values: values.join(", ") });
  const cursor = svg.querySelector(".cursor");
  cursor.setAttribute("x1", scale.x(at));
  cursor.setAttribute("x2", scale.x(at));
}

function begin(panel) {
  const svg = make("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" });
  const slider = make("input", { type: "range", min: 0, max: 1000, value: 1000, "aria-label": `${panel.title}: ${say("chart keys")}` });
  const output = make("output");
  const list = make("ul", { lang: "en" });
  const caption = make("figcaption", { lang: "en" }, panel.title, " ", make("small", { class: "hint" }, panel.title.toLowerCase().includes(panel.unit) ? "" : panel.unit));
  const words = make("details", {}, make("summary", {}, say("in words")), list);
  const figure = { panel, svg, slider, output, list, scale: null, element: make("figure", {}, caption, svg, slider, output, words) };
  const place = () => figure.scale.left + (slider.value / 1000) * (figure.scale.right - figure.scale.left);
  slider.addEventListener("input", () => { figure.touched = true; read(figure, place()); });
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * WIDTH;
    const share = Math.min(1, Math.max(0, (at - LEFT) / (WIDTH - LEFT - RIGHT)));
    slider.value = share * 1000;
    figure.touched = true;
    read(figure, place());
  });
  figure.place = place;
  return figure;
}

function show(data) {
  names = data.runs;
  document.getElementById("no-curves").hidden = data.panels.length > 0;
  document.getElementById("x-axis").hidden = data.panels.length === 0;
  const legend = document.getElementById("legend");
  legend.replaceChildren(...(names.length > 1 ? names.map((n, i) => make("li", {}, make("span", { class: `swatch c${i}` }), n)) : []));
  const there = new Set(data.panels.map((panel) => panel.title));
  for (const [title, figure] of drawn) if (!there.has(title)) { figure.element.remove(); drawn.delete(title); }
  data.panels.forEach((panel, place) => {
    const figure = drawn.get(panel.title) || begin(panel);
    drawn.set(panel.title, figure);
    figure.panel = panel;
    figure.scale = draw(figure.svg, panel);
    const of = [...new Set(panel.series.map((s) => names[s.run]))].join(", ");
    figure.svg.setAttribute("aria-label", say("chart of", { title: panel.title, runs: of }));
    figure.list.replaceChildren(...panel.words.map((line) => make("li", {}, line)));
    if (figure.touched) read(figure, figure.place());
    else figure.output.textContent = panel.series.some((s) => s.marks.length) ? `― ${say("training")}   ● ${say("held out")}` : "";
    if (panels.children[place] !== figure.element) panels.insertBefore(figure.element, panels.children[place] || null);
  });
}

if (panels) {
  on("curves", show);
  axis.addEventListener("change", () => {
    for (const figure of drawn.values()) figure.touched = false;
    const query = new URLSearchParams(document.body.dataset.topics);
    query.set("x", axis.value);
    document.body.dataset.topics = query;
    follow(String(query));
  });
}

/** Show the curves of these runs from now on. */
export function choose(chosen) {
  const query = new URLSearchParams(document.body.dataset.topics);
  query.delete("curve");
  for (const run of chosen) query.append("curve", run);
  document.body.dataset.topics = query;
  if (!chosen.length) show({ runs: [], panels: [] });
  follow(String(query));
}

const status = document.getElementById("run-status");
if (status) {
  on("runs", ({ rows }) => {
    const row = rows.find((r) => r.name === status.dataset.name);
    if (row) status.textContent = say(`status ${row.status}`) + (row.step === row.steps ? "" : `, ${say("step of", { step: row.step, steps: row.steps || "?" })}`);
  });
}
