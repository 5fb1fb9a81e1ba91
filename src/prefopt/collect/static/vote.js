"use strict";
// Keys, the time that the page is looked at, and votes that are sent again until they are stored. All of it is a
// convenience: without script the same forms work by themselves.
(() => {
  // The page is first painted when this file is there, and keys that are pressed before the ballot is parsed wait for
  // it: whoever sees a response can rank it, and the second key of a fast typist never becomes the first.
  const early = [];
  let onKey = (event) => early.push(event);
  document.addEventListener("keydown", (event) => onKey(event));

  function begin() {
    const ballot = document.getElementById("ballot");
    onKey = () => {};
    if (!ballot) return;
    const count = Number(ballot.dataset.count);
    const undo = document.getElementById("undo");
    const order = document.getElementById("order");
    const letters = "abcdefghi".slice(0, count);
    let looked = 0, since = document.hidden ? null : performance.now(), sending = false;
    let tied = false;
    const typed = [];

    document.addEventListener("visibilitychange", () => {
      if (document.hidden && since !== null) { looked += performance.now() - since; since = null; }
      else if (!document.hidden && since === null) { since = performance.now(); }
    });
    const seconds = () => ((looked + (since === null ? 0 : performance.now() - since)) / 1000).toFixed(1);

    const press = (choice) => ballot.querySelector(`button[value="${choice}"]`).click();
    const rankOf = (place) => {
      const found = ballot.querySelector(`input[name="rank${place}"]:checked`);
      return found && found.value ? Number(found.value) : 0;
    };
    const setRank = (place, rank) => {
      ballot.querySelector(`input[name="rank${place}"][value="${rank || ""}"]`).checked = true;
    };
    const tell = () => {
      if (!order) return;
      const tiers = new Map();
      for (let place = 0; place < count; place++) {
        const rank = rankOf(place);
        ballot.querySelector(`[data-place="${place}"]`).classList.toggle("ranked", rank > 0);
        if (rank) tiers.set(rank, [...(tiers.get(rank) || []), letters[place].toUpperCase()]);
      }
      const sorted = [...tiers.keys()].sort((a, b) => a - b);
      order.textContent = sorted.map((rank) => tiers.get(rank).join(" = ")).join(" > ");
    };

    async function send(data) {
      if (sending) return;
      sending = true;
      data.set("active", seconds());
      const body = new URLSearchParams(data);
      for (;;) {
        try {
          const answer = await fetch(ballot.action, { method: "POST", body, redirect: "manual", credentials: "same-origin" });
          if (answer.type === "opaqueredirect") { location.assign("/?notice=saved"); return; }
          if (answer.status !== 429 && answer.status !== 503) break;
        } catch (error) { /* the server is away: the vote carries a ticket, so that sending it again is safe */ }
        document.getElementById("unsaved").hidden = false;
        await new Promise((resume) => setTimeout(resume, 1500));
      }
      // Refused: the browser shows why, as it does without script.
      for (const [name, value] of data) {
        if (name !== "choice" && name !== "active") continue;
        const field = document.createElement("input");
        field.type = "hidden"; field.name = name; field.value = value;
        if (name === "active") ballot.elements.active.remove();
        ballot.append(field);
      }
      ballot.submit();
    }

    ballot.addEventListener("submit", (event) => {
      if (!event.submitter || event.submitter.name !== "choice") { event.preventDefault(); return; }
      event.preventDefault();
      const data = new FormData(ballot);
      data.set("choice", event.submitter.value);
      send(data);
    });
    ballot.addEventListener("change", tell);

    function ranking(key) {
      const place = letters.indexOf(key);
      if (place >= 0 && key !== "") {
        if (rankOf(place)) return false;
        const last = typed[typed.length - 1];
        const used = Array.from({ length: count }, (_, p) => rankOf(p));
        const rank = tied && last !== undefined ? rankOf(last) : Math.max(0, ...used) + 1;
        if (rank > count) return false;
        setRank(place, rank); typed.push(place); tied = false;
      } else if (key === "=") { tied = true; }
      else if (key === "backspace") {
        const last = typed.pop();
        if (last !== undefined) setRank(last, 0);
        tied = false;
      } else if (key === "enter") { press("rank"); }
      else return false;
      tell();
      return true;
    }

    if (ballot.dataset.keys === "on") onKey = (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || event.isComposing) return;
      const key = event.key.toLowerCase();
      const where = event.target;
      if (where.matches("textarea, select")) {
        if (key === "escape") where.blur();
        return;
      }
      if (key === "enter" && where.matches("button, summary, a")) return;
      let done = true;
      if (count === 2 && "1234567".includes(key) && key.length === 1) {
        press(["a3", "a2", "a1", "tie", "b1", "b2", "b3"][Number(key) - 1]);
      } else if (count > 2 && ranking(key)) { /* done there */ }
      else if (key === "x") press("bad");
      else if (key === "s") document.getElementById("reason").focus();
      else if (key === "r") {
        ballot.querySelector(".why").open = true;
        document.getElementById("rationale").focus();
      } else if (key === "u" && undo) undo.requestSubmit();
      else done = false;
      if (done) event.preventDefault();
    };
    tell();
    early.forEach((event) => onKey(event));
  }

  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", begin);
  else begin();
})();
