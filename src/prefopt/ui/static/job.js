// The log of a command while it grows.
import { make, on, say } from "/static/page.js";

const log = document.getElementById("log"), state = document.getElementById("state"), card = document.getElementById("job");
const LINK = /(http:\/\/(?:127\.0\.0\.1|localhost):\d+\/join\/\S+)/;
const first = card.dataset.state;

on("open", () => log.replaceChildren());
on("log", ({ id, text }) => {
  if (id !== card.dataset.job) return;
  const below = log.scrollTop + log.clientHeight >= log.scrollHeight - 8;
  for (const part of text.split(LINK)) log.append(LINK.test(part) ? make("a", { href: part, target: "_blank", rel: "noopener" }, part) : part);
  if (below) log.scrollTop = log.scrollHeight;
});
on("job", (job) => {
  if (job.id !== card.dataset.job) return;
  const words = say(`state ${job.state}`) + (job.status ? ` (${job.status})` : "");
  if (state.textContent !== words) state.textContent = words;
  // Buttons and results are made by the server. A form that may have been edited meanwhile stays as it is.
  if (job.state !== first && job.state === "ended" && !document.getElementById("options")) location.reload();
});
on("curves", ({ runs }) => {
  if (runs.length && !document.getElementById("curves")) location.reload(); // the run has begun
});
