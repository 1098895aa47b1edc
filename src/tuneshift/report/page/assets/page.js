// The document, and how things enter the page: text as text, never as markup.
const DATA = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child !== null)); // strings become text nodes
  return node;
}
const el = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

const percent = (share, digits = 0) => `${(100 * share).toFixed(digits)}%`;
function shownPerplexity(value) {
  if (value === null) return "n/a";
  return value < 100 ? value.toFixed(2) : value < 1e5 ? value.toFixed(0) : value.toExponential(1);
}
const count = (n, one, many = `${one}s`) => `${n.toLocaleString("en")} ${n === 1 ? one : many}`;

function table(header, rows) {
  return el("table", {},
    el("thead", {}, el("tr", {}, header.map((title) => el("th", { scope: "col", class: "num" }, title)))),
    el("tbody", {}, rows.map((row) => el("tr", {}, row.map((cell) => el("td", { class: "num" }, String(cell)))))));
}

// Radio buttons of one name; `changed` is told the new value.
function choices(name, options, chosen, changed) {
  return options.map(([value, label]) =>
    el("label", {},
      el("input", { type: "radio", name, value, checked: value === chosen, change: () => changed(value) }), label));
}
