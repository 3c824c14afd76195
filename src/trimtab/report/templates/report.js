"use strict";
// Rows fixed and broken: show those of the chosen system that hold every searched word.
(function () {
  const against = document.getElementById("against");
  const search = document.getElementById("search");
  if (!against) return;
  const lists = [...document.querySelectorAll(".change")].map((section) => ({
    direction: section.dataset.direction,
    count: section.querySelector(".shown-count"),
    note: section.querySelector(".list-note"),
    rows: [...section.querySelectorAll("li")].map((row) => ({
      row,
      against: row.dataset.against.split(" "),
      predictions: [...row.querySelectorAll("[data-system]")],
    })),
  }));
  function searchable(entry) {
    // The whole text stands in the opened part; the clipped copy and hidden predictions would match twice or wrongly.
    const copy = entry.row.cloneNode(true);
    copy.querySelectorAll(".clip, [hidden]").forEach((part) => part.remove());
    return copy.textContent.toLowerCase();
  }
  function update() {
    const name = against.value;
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const list of lists) {
      let kept = 0;
      let found = 0;
      for (const entry of list.rows) {
        entry.predictions.forEach((part) => { part.hidden = part.dataset.system !== name; });
        const belongs = entry.against.includes(name);
        kept += belongs;
        let shown = belongs;
        if (belongs && words.length) {
          const text = searchable(entry);
          shown = words.every((word) => text.includes(word));
        }
        entry.row.hidden = !shown;
        found += shown;
      }
      const total = Number(against.selectedOptions[0].dataset[list.direction]);
      list.count.textContent = total.toLocaleString("en");
      const notes = [];
      if (words.length) notes.push(found + " of " + kept + " hold " + words.map((word) => "“" + word + "”").join(" and "));
      if (kept < total) notes.push("the first " + kept + " are in this page, all in predictions.jsonl");
      list.note.textContent = notes.join("; ") || (total ? "" : "None.");
    }
  }
  against.addEventListener("change", update);
  search.addEventListener("input", update);
  update();
})();
// Confusion matrices: each side shows the system chosen above it.
document.querySelectorAll("[data-confusion]").forEach((select) => {
  const side = select.closest(".confusion-side");
  select.addEventListener("change", () => {
    side.querySelectorAll("[data-matrix]").forEach((part) => { part.hidden = part.dataset.matrix !== select.value; });
  });
});
