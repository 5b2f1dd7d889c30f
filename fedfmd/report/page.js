"use strict";
// What a reader can do on a page: choose the cost, switch series on and off, sort tables.

const hidden = new Set(); // keys of series
const figures = [];
let cost = document.querySelector("[name=cost]:checked");

async function loadBokeh() {
  const packed = document.getElementById("bokeh");
  if (!packed) return; // it lies beside the page
  const bytes = Uint8Array.from(atob(packed.textContent), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
}

async function draw(box) {
  const item = JSON.parse(box.querySelector("script").textContent);
  const views = await Bokeh.embed.embed_item(item, box);
  const figure = views.roots[0].model;
  figures.push(figure);
  paint(figure);
}

// A glyph's tags are its series and the properties that are drawn from the column of the chosen cost.
function paint(figure) {
  if (figure.tags.includes("cost")) figure.below[0].axis_label = cost.dataset.axis;
  for (const { glyph, hover_glyph, data_source } of figure.renderers) {
    for (const property of glyph.tags.slice(1)) {
      const column = cost.value + glyph[property].field.replace(/^[^:]+/, "");
      if (!data_source.columns().includes(column)) continue;
      for (const drawn of [glyph, hover_glyph]) if (drawn) drawn[property] = { field: column };
    }
  }
  for (const renderer of figure.renderers) renderer.visible = !hidden.has(renderer.glyph.tags[0]);
}

function chooseCost(input) {
  cost = input;
  for (const part of document.querySelectorAll("[data-cost]")) {
    part.hidden = !part.dataset.cost.split(" ").includes(cost.value);
  }
  figures.forEach(paint);
}

function toggle(keys) {
  const show = keys.every((key) => hidden.has(key));
  for (const key of keys) show ? hidden.delete(key) : hidden.add(key);
  for (const button of document.querySelectorAll("[data-series]")) {
    button.setAttribute("aria-pressed", !hidden.has(button.dataset.series));
  }
  figures.forEach(paint);
}

const SCALE = { k: 1e3, M: 1e6, G: 1e9 };

function numberOf(text) {
  const found = text.replace(/,/g, "").match(/^\W*?([+-]?[\d.]+(?:e[+-]?\d+)?)(?: ([kMG])\b)?/);
  return found ? parseFloat(found[1]) * (SCALE[found[2]] ?? 1) : text.startsWith("∞") ? Infinity : NaN;
}

// Rows by a column: the highest number first, then the lowest; texts from A; cells without a value stay last.
function sort(header) {
  const body = header.closest("table").tBodies[0];
  const rows = [...body.rows].map((row) => {
    const text = row.cells[header.cellIndex].textContent.trim();
    return { row, text, number: numberOf(text) };
  });
  const numeric = rows.some(({ number }) => !Number.isNaN(number)) && header.cellIndex > 0;
  const first = numeric ? "descending" : "ascending";
  const next = { ascending: "descending", descending: "ascending" }[header.ariaSort] ?? first;
  const sign = next === "ascending" ? 1 : -1;
  rows.sort((a, b) => {
    if (!numeric) return sign * a.text.localeCompare(b.text, undefined, { numeric: true });
    return Number.isNaN(a.number) - Number.isNaN(b.number) || sign * (a.number - b.number) || 0;
  });
  for (const other of header.parentNode.cells) other.ariaSort = null;
  header.ariaSort = next;
  body.append(...rows.map(({ row }) => row));
}

document.addEventListener("click", ({ target }) => {
  const key = target.closest("[data-series]");
  if (key) toggle([key.dataset.series]);
  if (target.closest("[data-all]")) {
    toggle([...new Set([...document.querySelectorAll("[data-series]")].map((button) => button.dataset.series))]);
  }
  if (target.closest("th button")) sort(target.closest("th"));
});
document.addEventListener("change", ({ target }) => {
  if (target.name === "cost") chooseCost(target);
});

(async () => {
  if (cost) chooseCost(cost); // browsers keep the choice when a page is loaded again
  await loadBokeh();
  for (const box of document.querySelectorAll(".chart")) await draw(box);
})();
