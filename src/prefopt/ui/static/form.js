// Options are found by a word of their name or help, and the form is warned about before it is left unsent.
const find = document.getElementById("find"), form = document.getElementById("options");
let changed = false;
const opened = new Map([...form.querySelectorAll("details.group")].map((group) => [group, group.open]));

find.addEventListener("input", () => {
  const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const [group, open] of opened) {
    let some = false;
    for (const field of group.querySelectorAll(".field")) {
      field.hidden = !words.every((word) => field.dataset.words.includes(word.replace(/^--/, "").replaceAll("-", "_")) || field.dataset.words.includes(word));
      some ||= !field.hidden;
    }
    group.hidden = !some;
    group.open = words.length ? some : open;
  }
});
find.addEventListener("keydown", (event) => event.key === "Enter" && event.preventDefault());
form.addEventListener("input", (event) => { changed ||= event.target !== find; });
form.addEventListener("submit", () => { changed = false; });
addEventListener("beforeunload", (event) => changed && event.preventDefault());
document.getElementById("verb").addEventListener("change", (event) => { if (!changed) event.target.form.requestSubmit(); });
