"use strict";
// What all reports do: figures are drawn when they are first seen, tabs change views, buttons copy.
// Figures take their colours of text and grid from the page, also when the reader changes between light and dark.
const CALM = { displayModeBar: false, responsive: true, displaylogo: false };

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function paint(figure) {
  const change = {
    "font.color": colour("--soft"),
    "hoverlabel.bgcolor": colour("--card"),
    "hoverlabel.bordercolor": colour("--line"),
    "hoverlabel.font.color": colour("--ink"),
  };
  for (const axis of Object.keys(figure.layout).filter((key) => /^[xy]axis\d*$/.test(key))) {
    for (const part of ["gridcolor", "linecolor", "tickcolor"]) change[`${axis}.${part}`] = colour("--line");
  }
  return Plotly.relayout(figure, change);
}

// A figure tells "drawn" when it stands for the first time and "shown" whenever its place on the page has changed.
async function draw(figure) {
  if (figure.dataset.drawn === "under way") return;
  if (figure.dataset.drawn) {
    await Plotly.Plots.resize(figure);
  } else {
    figure.dataset.drawn = "under way";
    const { data, layout } = JSON.parse(figure.nextElementSibling.textContent);
    await Plotly.newPlot(figure, data, layout, CALM);
    await paint(figure);
    figure.dataset.drawn = "yes";
    figure.dispatchEvent(new CustomEvent("drawn", { bubbles: true }));
  }
  figure.dispatchEvent(new CustomEvent("shown", { bubbles: true }));
}

function drawSeen() {
  const seen = [...document.querySelectorAll(".figure")].filter((figure) => figure.offsetParent !== null);
  return Promise.all(seen.map(draw));
}

function choose(tab) {
  for (const other of tab.parentElement.children) {
    const chosen = other === tab;
    other.setAttribute("aria-selected", chosen);
    other.tabIndex = chosen ? 0 : -1;
    document.getElementById(other.getAttribute("aria-controls")).hidden = !chosen;
  }
  document.getElementById(tab.getAttribute("aria-controls")).querySelectorAll(".figure").forEach(draw);
}

async function copy(button) {
  const text = button.dataset.text ?? button.parentElement.querySelector("pre").textContent;
  const words = (button.dataset.words ??= button.textContent);
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "copied";
  } catch {
    button.textContent = copyTheOldWay(text) ? "copied" : "not copied";
  }
  setTimeout(() => (button.textContent = words), 1500);
}

// Some browsers give a page from a disk no clipboard of the new kind.
function copyTheOldWay(text) {
  const field = document.body.appendChild(document.createElement("textarea"));
  field.value = text;
  field.select();
  const done = document.execCommand("copy");
  field.remove();
  return done;
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button?.matches("[role=tab]")) choose(button);
  if (button?.matches(".copy")) copy(button);
});

document.addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step || !event.target.matches("[role=tab]")) return;
  const heads = [...event.target.parentElement.children];
  const next = heads[(heads.indexOf(event.target) + step + heads.length) % heads.length];
  next.focus();
  choose(next);
});

let resting;
addEventListener("resize", () => {
  clearTimeout(resting);
  resting = setTimeout(drawSeen, 150);
});

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () =>
  document.querySelectorAll('.figure[data-drawn="yes"]').forEach(paint),
);

addEventListener("DOMContentLoaded", drawSeen);
