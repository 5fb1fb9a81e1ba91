// A chat with one or two models side by side. The server keeps it: this only shows what it tells.
import { make, on, post, say } from "/static/page.js";

const sides = document.getElementById("sides"), form = document.getElementById("say"), box = document.getElementById("text");
const problem = document.getElementById("problem"), told = document.getElementById("chat-state");
let sending = "";

const complain = (text) => { problem.textContent = text || ""; problem.hidden = !text; };
const bottom = (element) => { element.scrollTop = element.scrollHeight; };

function turn({ role, text }) {
  return make("div", { class: `turn ${role}` }, make("p", { class: "role" }, say(`role ${role}`)), make("div", { class: "text", dir: "auto" }, text));
}

function side(values) {
  const turns = make("div", { class: "turns", tabindex: 0, role: "log", "aria-label": values.name, "aria-busy": String(values.streaming) }, ...values.turns.map(turn));
  const note = values.note ? [make("p", { class: "hint", lang: "en" }, values.note)] : [];
  return make("section", { class: "side" }, make("h2", { dir: "auto" }, values.name), turns, ...note);
}

on("chat", (chat) => {
  sides.replaceChildren(...chat.sides.map(side));
  for (const turns of sides.querySelectorAll(".turns")) bottom(turns);
  told.textContent = [say(`chat ${chat.state}`), ...(chat.state === "answering" ? [] : chat.notes)].join(" · ");
  if (chat.problem) complain(chat.problem);
  else if (chat.state === "answering" || chat.state === "opening") complain("");
  form.hidden = !chat.sides.length;
  document.getElementById("send").disabled = chat.state !== "ready";
  document.getElementById("stop").disabled = chat.state !== "answering";
  for (const name of ["retry", "reset", "close", "save"]) form.querySelector(`[data-do=${name}]`).disabled = chat.state !== "ready";
  if (chat.draft && !box.value) box.value = chat.draft;
});
on("chunk", ({ side: place, text }) => {
  const turns = sides.children[place].querySelector(".turns");
  turns.lastElementChild.querySelector(".text").append(text);
  bottom(turns);
});

async function send() {
  if (!box.value.trim() || sending || document.getElementById("send").disabled) return;
  sending = box.value;
  try {
    const why = await post("/chat/say", { text: sending });
    complain(why);
    if (!why) box.value = "";
  } catch { complain(say("not sent")); } // what was typed stays
  sending = "";
}

form.addEventListener("submit", (event) => { event.preventDefault(); send(); });
box.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
});
for (const button of form.querySelectorAll("[data-do]")) {
  button.addEventListener("click", async () => {
    const fields = button.dataset.do === "save" ? { file: document.getElementById("file").value } : {};
    try {
      const why = await post(`/chat/${button.dataset.do}`, fields);
      complain(why);
      if (!why && button.dataset.do === "save") told.textContent = say("saved", { file: fields.file });
    } catch { complain(say("not sent")); }
  });
}
