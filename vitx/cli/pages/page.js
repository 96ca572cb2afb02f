"use strict";
const { columns, moments, headings } = JSON.parse(document.getElementById("moments").textContent);
const [all, play] = [document.getElementById("all"), document.getElementById("play")];
const articles = [...document.querySelectorAll("article")].map(article => ({
  article,
  own: article.querySelector(".slider input"),
  said: JSON.parse(article.querySelector("script").textContent),
  cells: [...article.querySelectorAll(".cell[data-run]")],
}));

// Updates the text next to the frame of a cell.
function tell(cell, said, at) {
  const [text, right, ...flat] = said[at];
  const caption = cell.querySelector(".caption");
  [caption.textContent, caption.dataset.right] = [text, right];
  cell.querySelectorAll(".flat").forEach((note, place) => note.hidden = !flat.includes(place));
  const heading = cell.querySelector(".heading");
  if (heading) heading.textContent = headings[cell.dataset.run][at];
}

function show({ article, own, said, cells }, at) {
  article.style.setProperty("--x", at % columns);
  article.style.setProperty("--y", Math.floor(at / columns));
  cells.forEach((cell, place) => tell(cell, said[place], at));
  if (!own) return;
  [own.value, own.nextElementSibling.textContent] = [at, moments[at]];
  own.setAttribute("aria-valuetext", moments[at]);
}

function showAll(at) {
  all.value = at;
  all.nextElementSibling.textContent = moments[at];
  all.setAttribute("aria-valuetext", moments[at]);
  document.querySelectorAll("[data-moment]").forEach(place => place.textContent = moments[at]);
  articles.forEach(one => show(one, at));
}

let playing = null;
function stop() {
  clearInterval(playing);
  playing = null;
  [play.textContent, play.title] = ["\u25b6", "play"];
}
play.addEventListener("click", () => {
  if (playing) return stop();
  [play.textContent, play.title] = ["\u23f8", "pause"];
  if (Number(all.value) === moments.length - 1) showAll(0);
  playing = setInterval(() => {
    if (Number(all.value) >= moments.length - 1) return stop();
    showAll(Number(all.value) + 1);
  }, Math.max(150, Math.min(700, 8000 / moments.length)));
});
all.addEventListener("input", () => { stop(); showAll(Number(all.value)); });
articles.forEach(one => one.own?.addEventListener("input", () => show(one, Number(one.own.value))));
showAll(moments.length - 1);

// Printers do not smooth enlarged pictures: small maps are drawn large for them.
const LARGE = 8;
function enlarged(film) {
  const [style, canvas] = [getComputedStyle(film), document.createElement("canvas")];
  const [x, y, w, h] = ["--x", "--y", "--w", "--h"].map(name => Number(style.getPropertyValue(name)));
  [canvas.width, canvas.height, canvas.className] = [w * LARGE, h * LARGE, "enlarged"];
  canvas.getContext("2d").drawImage(film, x * (w + 2) + 1, y * (h + 2) + 1, w, h, 0, 0, canvas.width, canvas.height);
  film.after(canvas);
}
addEventListener("beforeprint", () => {
  document.querySelectorAll("details").forEach(part => part.open = true);
  document.querySelectorAll(".map .film").forEach(enlarged);
});
addEventListener("afterprint", () => document.querySelectorAll(".enlarged").forEach(canvas => canvas.remove()));

// In a comparison: rows are sorted, and the pictures with them; runs are hidden or highlighted.
const table = document.querySelector("table");
const root = document.documentElement;
function order(a, b) {
  if ((a === null) !== (b === null)) return a === null ? 1 : -1;  // missing values come last in both directions
  if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
  return a < b ? -1 : Number(a > b);
}
function sort(heading) {
  const down = heading.getAttribute("aria-sort") === "ascending";
  table.querySelectorAll("[aria-sort]").forEach(other => other.removeAttribute("aria-sort"));
  heading.setAttribute("aria-sort", down ? "descending" : "ascending");
  const key = row => JSON.parse(row.cells[heading.dataset.place].dataset.value);
  const rows = [...table.tBodies[0].rows].sort((one, other) => {
    const [a, b] = [key(one), key(other)];
    return order(a, b) * (down && a !== null && b !== null ? -1 : 1);
  });
  rows.forEach((row, place) => root.style.setProperty(`--order-${row.dataset.run}`, place));
  table.tBodies[0].append(...rows);
}
table?.querySelectorAll("th[data-place]").forEach(heading =>
  heading.querySelector("button").addEventListener("click", () => sort(heading)));
const boxes = [...table?.querySelectorAll("tbody input[type=checkbox]") ?? []];
const hide = box => root.classList.toggle(`hide-${box.closest("tr").dataset.run}`, !box.checked);
boxes.forEach(box => box.addEventListener("change", () => hide(box)));
document.getElementById("every")?.addEventListener("change", event => boxes.forEach(box => {
  box.checked = event.target.checked;
  hide(box);
}));
if (table) document.addEventListener("pointerover", event => {
  const place = event.target.closest(".curve, .legend li, tbody tr");
  root.className = root.className.replace(/ ?focus(-\d+)?/g, "");
  const run = place?.getAttribute("class")?.match(/run-(\d+)/)?.[1];
  if (run) root.classList.add("focus", `focus-${run}`);
});
