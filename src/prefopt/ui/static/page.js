// What all scripts share: texts in the language of the page, elements, and its one stream of events.
const found = document.getElementById("words");
const words = found ? JSON.parse(found.textContent) : {};
const handlers = new Map();
let topics = document.body.dataset.topics, source = null;

/** A text of the page, its {names} filled in. */
export const say = (name, values = {}) => words[name].replace(/{(\w+)}/g, (_, key) => values[key]);

/** An element with attributes and children; strings become text, never markup. */
export function make(tag, attributes = {}, ...children) {
  const namespace = ["svg", "path", "line", "circle", "text", "g", "polyline"].includes(tag);
  const element = namespace ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

/** Call ``handler`` with the values of every event of a name; "open" is a new connection, which tells all again. */
export function on(name, handler) {
  handlers.set(name, [...(handlers.get(name) || []), handler]);
  if (source && name !== "open") listen(name);
}

/** Follow other topics from now on. */
export function follow(query) {
  if (query === topics && source) return;
  topics = query;
  close();
  open();
}

/** Send a form from a script. Resolves to the problem, or to nothing. */
export async function post(path, fields = {}) {
  const body = new URLSearchParams({ token: document.body.dataset.token, ...fields });
  const answer = await fetch(path, { method: "POST", body, credentials: "same-origin" });
  if (!answer.headers.get("content-type").startsWith("application/json")) return `${answer.status} ${answer.statusText}`;
  return (await answer.json()).problem;
}

const tell = (name, values) => (handlers.get(name) || []).forEach((handler) => handler(values));
const heard = new Set();

function listen(name) {
  if (heard.has(name)) return;
  heard.add(name);
  source.addEventListener(name, (event) => tell(name, JSON.parse(event.data)));
}

function open() {
  if (source || !topics || document.hidden) return;
  source = new EventSource(`/events?${topics}`);
  heard.clear();
  source.addEventListener("open", () => { document.getElementById("lost").hidden = true; tell("open"); });
  source.addEventListener("error", () => { document.getElementById("lost").hidden = false; });
  for (const name of handlers.keys()) if (name !== "open") listen(name);
}

function close() {
  if (source) source.close();
  source = null;
}

// A browser opens few connections to one server: pages that nobody looks at give theirs back.
document.addEventListener("visibilitychange", () => (document.hidden ? close() : open()));
addEventListener("pagehide", close);
addEventListener("pageshow", (event) => event.persisted && open());
queueMicrotask(() => setTimeout(open));
