"use strict";
// What the page of a comparison does besides: the table sorts, searches and unfolds; picked arms have their curves in
// colour; figures name as many of their points as have the room.
const COLOURS = ["#3b82f6", "#e69f00", "#0f9d78", "#d9480f", "#cc79a7", "#56b4e9", "#9a7b2f", "#7c6cd9"];
const DASHES = ["solid", "8px,4px", "2px,3px", "10px,3px,2px,3px", "14px,4px", "5px,2px", "2px,5px", "9px,2px,2px,2px,2px,2px"];
const GREY = "#94a3b8";
const picks = new Map(); // arm -> its place, which gives colour, dash and height in the strip

// ---- the leaderboard ------------------------------------------------------------------------------------------------

const board = document.getElementById("board");

function compareCells(a, b, sign) {
  if (a === "" || b === "") return (a === "") - (b === "");  // what is not known stands last either way
  const [x, y] = [Number(a), Number(b)];
  return sign * (Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b) : x - y);
}

function sortBy(button) {
  const head = button.closest("th");
  const column = head.cellIndex;
  const turned = { ascending: "descending", descending: "ascending" };
  const way = turned[head.getAttribute("aria-sort")] ?? button.dataset.first;
  for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", way);
  const key = (body) => body.rows[0].cells[column].dataset.sort;
  const sign = way === "ascending" ? 1 : -1;
  board.append(...[...board.tBodies].sort((a, b) => compareCells(key(a), key(b), sign)));
}

function unfold(button) {
  const more = button.closest("tbody").rows[1];
  more.hidden = !more.hidden;
  button.setAttribute("aria-expanded", !more.hidden);
}

if (board) {
  board.querySelector("th").setAttribute("aria-sort", "ascending");
  board.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button?.matches(".sort")) sortBy(button);
    if (button?.matches(".open")) unfold(button);
  });
  document.getElementById("search")?.addEventListener("input", (event) => {
    const words = event.target.value.toLowerCase();
    for (const body of board.tBodies) body.hidden = !body.dataset.arm.toLowerCase().includes(words);
  });
}

// ---- arms in colour -------------------------------------------------------------------------------------------------

function pick(chip, on) {
  const arm = chip.dataset.arm;
  chip.setAttribute("aria-pressed", on);
  if (!on) return picks.delete(arm);
  const taken = new Set(picks.values());
  let place = 0;
  while (taken.has(place)) place += 1;
  picks.set(arm, place);
  const line = chip.querySelector("line");
  const look = { x1: 1, x2: 23, y1: 2, y2: 2, stroke: COLOURS[place % 8], "stroke-width": 2.5 };
  for (const [name, value] of Object.entries(look)) line.setAttribute(name, value);
  line.setAttribute("stroke-dasharray", dash(place) === "solid" ? "none" : dash(place).replaceAll("px", ""));
  return picks;
}

// The ninth arm has the first one's colour and the second one's dash, so no two of 64 look alike.
function dash(place) {
  return DASHES[(place + Math.floor(place / 8)) % 8];
}

function faded(colour, share) {
  const [r, g, b] = [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16));
  return `rgba(${r}, ${g}, ${b}, ${share})`;
}

function colourTrace(trace) {
  const { arm, part } = trace.meta;
  const place = picks.get(arm);
  const picked = place !== undefined;
  const hue = picked ? COLOURS[place % 8] : GREY;
  if (part === "course") return;
  if (part === "band") {
    trace.visible = picked;
    trace.fillcolor = faded(hue, 0.13);
    return;
  }
  trace.opacity = picked ? 1 : 0.3;
  if (part === "line" || part === "mean") {
    trace.line = { ...trace.line, color: hue, width: picked ? 2.5 : 1, dash: picked ? dash(place) : "solid" };
    return;
  }
  trace.visible = picked || part === "points";
  trace.marker = { ...trace.marker, color: hue, line: { ...trace.marker.line, color: hue } };
  if (part === "broken") trace.y = trace.x.map(() => (picked ? 7 - (place % 8) : 0));
}

async function colourFigure(figure) {
  if (figure.dataset.drawn !== "yes" || !figure.data.some((trace) => trace.meta?.arm)) return;
  figure.stale = figure.offsetParent === null; // one that is not seen is coloured when it is
  if (figure.stale) return;
  figure.data.filter((trace) => trace.meta?.arm).forEach(colourTrace);
  await Plotly.redraw(figure);
  await namePoints(figure);
}

const curves = document.getElementById("curves");
const chips = [...document.querySelectorAll(".chip[data-arm]")];
for (const chip of chips.filter((chip) => chip.getAttribute("aria-pressed") === "true")) pick(chip, true);

// A reader who picks several in a row waits for one drawing, not for each.
let waiting;
function colourAll() {
  clearTimeout(waiting);
  waiting = setTimeout(() => curves.querySelectorAll(".figure").forEach(colourFigure), 80);
}

for (const chip of chips) {
  chip.addEventListener("click", () => {
    pick(chip, chip.getAttribute("aria-pressed") !== "true");
    colourAll();
  });
}

document.getElementById("pick-none")?.addEventListener("click", () => {
  for (const chip of chips) pick(chip, false);
  colourAll();
});

// ---- choices --------------------------------------------------------------------------------------------------------

document.getElementById("tried")?.addEventListener("change", (event) => {
  const figure = document.getElementById("trials");
  for (const trace of figure.data) trace.visible = trace.meta.arm === event.target.value;
  Plotly.redraw(figure);
});

document.getElementById("confused")?.addEventListener("change", (event) => {
  for (const one of document.querySelectorAll(".confusion")) one.hidden = one.dataset.arm !== event.target.value;
});

// ---- names of points ------------------------------------------------------------------------------------------------

const SIZE = 12;
const ruler = document.createElement("canvas").getContext("2d");

function namedTraces(figure) {
  const seen = (trace) => trace.meta?.labels && trace.visible !== false && trace.visible !== "legendonly";
  return figure.data.filter((trace) => seen(trace) && (!trace.meta.arm || picks.has(trace.meta.arm)));
}

// The points of a trace as boxes in pixels of the figure, those to be named first, and the lines of their intervals.
function pixels(figure, trace) {
  const { xaxis, yaxis } = figure._fullLayout;
  const down = (value) => yaxis._offset + yaxis.l2p(yaxis.d2l(value));
  return trace.x.map((value, i) => {
    const x = xaxis._offset + xaxis.l2p(xaxis.d2l(value));
    const y = trace.y[i];
    const error = trace.error_y;
    const ends = error?.array ? [down(y + error.array[i]), down(y - error.arrayminus[i])] : [down(y), down(y)];
    return { text: trace.text[i], needed: trace.meta.needed, x, y: down(y), top: Math.min(...ends), bottom: Math.max(...ends) };
  });
}

const meet = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;

// Where a name may stand beside its point, in the order of liking.
function stands(point, width) {
  const [side, above] = [12, SIZE + 3];
  const boxes = [
    [side, -SIZE / 2], [-side - width, -SIZE / 2], [side - 2, -above - 2], [side - 2, 4],
    [-side - width + 2, -above - 2], [-side - width + 2, 4], [-width / 2, -above - 8], [-width / 2, 10],
  ];
  return boxes.map(([dx, dy]) => {
    const [left, top] = [point.x + dx, point.y + dy];
    return { left, top, right: left + width, bottom: top + SIZE + 2 };
  });
}

async function namePoints(figure) {
  const traces = namedTraces(figure);
  if (!figure.data.some((trace) => trace.meta?.labels)) return;
  figure.captions ??= figure.layout.annotations ?? [];
  const { _size: room, font } = figure._fullLayout;
  const frame = { left: room.l, right: room.l + room.w + 8, top: room.t - 4, bottom: room.t + room.h };
  const points = traces.toReversed().flatMap((trace) => pixels(figure, trace)); // those that are needed are drawn last
  const dots = points.map((p) => ({ left: p.x - 8, right: p.x + 8, top: p.y - 8, bottom: p.y + 8 }));
  const spans = points.map((p) => ({ left: p.x - 2, right: p.x + 2, top: p.top, bottom: p.bottom }));
  ruler.font = `${SIZE}px ${font.family}`;
  const taken = [];
  const names = [];
  const seen = new Set();
  for (const point of points.filter(({ text }) => !seen.has(text) && seen.add(text))) {
    const plain = new DOMParser().parseFromString(point.text, "text/html").body.textContent;
    const within = (box) =>
      box.left >= frame.left && box.right <= frame.right && box.top >= frame.top && box.bottom <= frame.bottom;
    const free = (box, others) => within(box) && ![...others, ...taken].some((other) => meet(box, other));
    const boxes = stands(point, ruler.measureText(plain).width);
    const across = () => (point.needed ? boxes.find((box) => free(box, dots)) : undefined); // over an interval, if need be
    const box = boxes.find((box) => free(box, [...dots, ...spans])) ?? across();
    if (!box) continue;
    taken.push(box);
    names.push({
      text: point.text, showarrow: false, xref: "paper", yref: "paper", xanchor: "left", yanchor: "middle",
      x: (box.left - room.l) / room.w, y: 1 - ((box.top + box.bottom) / 2 - room.t) / room.h,
      font: { size: SIZE, color: colour("--ink") }, borderpad: 0, xshift: -1, bgcolor: colour("--card"),
    });
  }
  figure.naming = true;
  await Plotly.relayout(figure, { annotations: [...figure.captions, ...names] });
  figure.naming = false;
}

document.addEventListener("drawn", async (event) => {
  const figure = event.target;
  await colourFigure(figure);
  figure.on("plotly_relayout", () => figure.naming || nameAgain(figure)); // the reader has zoomed
  figure.on("plotly_legendclick", () => nameAgain(figure));
});

// Once a figure has come to rest; its intervals and names are of the same moment then.
function nameAgain(figure) {
  clearTimeout(figure.rest);
  figure.rest = setTimeout(() => namePoints(figure), 350);
}

document.addEventListener("shown", async (event) => {
  if (event.target.stale) await colourFigure(event.target);
  nameAgain(event.target);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () =>
  document.querySelectorAll(".figure[data-drawn='yes']").forEach(nameAgain),
);
