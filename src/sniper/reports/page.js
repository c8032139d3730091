"use strict";
// Charts: the values under the pointer.
for (const chart of document.querySelectorAll("svg.chart")) {
  const data = JSON.parse(chart.querySelector("desc").textContent);
  const cursor = chart.querySelector(".cursor");
  const reading = document.createElement("div");
  reading.className = "reading";
  reading.setAttribute("aria-hidden", "true");
  chart.after(reading);
  chart.addEventListener("pointermove", (event) => {
    const place = new DOMPoint(event.clientX, event.clientY).matrixTransform(chart.getScreenCTM().inverse());
    const nearest = data.series.map((series) =>
      series.points.reduce((best, point) => Math.abs(point[0] - place.x) < Math.abs(best[0] - place.x) ? point : best));
    const column = nearest.reduce((best, point) => Math.abs(point[0] - place.x) < Math.abs(best[0] - place.x) ? point : best);
    cursor.setAttribute("transform", `translate(${column[0] + 9} 0)`);
    const values = nearest.map((point, index) => `${data.series.length > 1 ? data.series[index].name + " " : ""}${point[3]}`);
    reading.textContent = `${data.label} ${column[2]}: ${values.join(", ")}`;
  });
  chart.addEventListener("pointerleave", () => {
    cursor.removeAttribute("transform");
    reading.textContent = "";
  });
}

// The gallery of errors: filters, a large view, keys.
const gallery = document.querySelector("#gallery");
if (gallery) {
  const AT_ONCE = 24;
  const cards = [...gallery.querySelectorAll(".error")];
  const filters = document.querySelector("#filters");
  const more = document.querySelector("#more");
  const view = document.querySelector("#view");
  let matching = cards;
  let limit = AT_ONCE;
  let current = null;

  const show = () => {
    const visible = new Set(matching.slice(0, limit));
    for (const card of cards) card.hidden = !visible.has(card);
    more.hidden = matching.length <= limit;
    more.textContent = `Show ${Math.min(AT_ONCE, matching.length - limit)} more`;
  };
  const apply = () => {
    const { kind, label, size } = Object.fromEntries(new FormData(filters));
    matching = cards.filter((card) => {
      const isKind = !kind || card.dataset.kind === kind || (kind === "suspect" && card.dataset.suspect === "1");
      const isLabel = !label || card.dataset.labels.split(" ").includes(label);
      return isKind && isLabel && (!size || card.dataset.size === size);
    });
    limit = AT_ONCE;
    show();
    document.querySelector("#shown").textContent = matching.length
      ? `${matching.length} of ${cards.length} pictures` : "No picture has all of these properties.";
  };
  filters.addEventListener("input", apply);
  filters.addEventListener("reset", () => setTimeout(apply));
  more.addEventListener("click", () => {
    limit += AT_ONCE;
    show();
  });
  apply();

  const open = (card) => {
    current = card;
    const index = matching.indexOf(card);
    while (index >= limit) limit += AT_ONCE;
    show();
    view.querySelector(".large").replaceChildren(card.querySelector(".picture").cloneNode(true));
    view.querySelector(".facts").replaceChildren(...card.querySelector("figcaption").cloneNode(true).childNodes);
    view.querySelector(".number").textContent = `${index + 1} of ${matching.length}`;
    if (!view.open) view.showModal();
  };
  const step = (by) => {
    const next = matching[matching.indexOf(current) + by];
    if (next) open(next);
  };
  const focusBy = (by) => {
    const visible = matching.slice(0, limit);
    const index = visible.indexOf(document.activeElement);
    const next = visible[index < 0 ? 0 : index + by];
    if (next) {
      next.focus();
      next.scrollIntoView({ block: "nearest" });
    }
  };
  gallery.addEventListener("click", (event) => {
    const card = event.target.closest(".error");
    if (card) open(card);
  });
  view.addEventListener("close", () => current && current.focus());
  view.addEventListener("click", (event) => {
    if (event.target === view || event.target.closest(".close")) view.close();
    if (event.target.closest(".previous")) step(-1);
    if (event.target.closest(".following")) step(1);
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("select, input, textarea")) return;
    const by = { ArrowRight: 1, j: 1, ArrowLeft: -1, k: -1 }[event.key];
    if (by) {
      if (view.open) step(by);
      else if (event.key.length === 1 || document.activeElement.closest(".error")) focusBy(by);
      else return;
      event.preventDefault();
    } else if ((event.key === "Enter" || event.key === " ") && !view.open && event.target.closest(".error")) {
      open(event.target.closest(".error"));
      event.preventDefault();
    } else if (event.key === "f" && !view.open) {
      filters.querySelector("select").focus();
      event.preventDefault();
    }
  });
}
