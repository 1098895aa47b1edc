// All candidates in a list of which only the rows in sight exist, so that ten thousand are as quick as ten.
const COLUMNS = [
  ["prompt", "prompt", (row) => row.text.toLowerCase()],
  ["f", "F's response, perplexity", (row) => row.f?.ppl ?? null],
  ["b", "B's response, perplexity", (row) => row.b?.ppl ?? null],
  ["margin", "margin", marginOf],
  ["reason", "outcome", (row) => row.reason],
  ["round", "round", (row) => row.round],
];
const view = { query: "", decision: "all", reason: "", round: "", ancestor: "", sort: null, descending: false, shown: [], refresh: null };
const SHORT = 160; // characters of a text in the list
const SHORT_NAME = 60; // and of a seed in a choice
const EXTRA = 6; // rows above and below those in sight, so that a quick scroll shows no gap

function startTable() {
  const search = el("input", { type: "search", placeholder: "Search prompts and responses", "aria-label": "Search prompts and responses" });
  const pick = (name, label, options) => el("select", { "aria-label": label, id: `filter-${name}`, change: (event) => { view[name] = event.target.value; refresh(); } },
    options.map(([value, text]) => el("option", { value }, text)));
  const reasons = [...new Set(ROWS.map((row) => row.reason))];
  const rounds = [...new Set(ROWS.map((row) => row.round))];
  const found = el("span", { class: "count", "aria-live": "polite", id: "found" });
  byId("filters").append(search,
    pick("decision", "Decision", [["all", "all"], ["kept", "kept"], ["dropped", "dropped"], ["changed", "changed by the control"]]),
    pick("reason", "Outcome in the run", [["", "any outcome"], ...reasons.map((reason) => [reason, reason])]),
    pick("round", "Round", [["", "any round"], ...rounds.map((round) => [String(round), `round ${round + 1}`])]),
    ...(SEEDS.size === 0 ? [] : [pick("ancestor", "Descends from", [["", "from any seed"], ...[...SEEDS].map(([id, text]) => [id, `from ${id}: ${text.slice(0, SHORT_NAME)}`])])]), found);
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("filters").hidden = false;

  const body = el("tbody", { role: "rowgroup" });
  const heads = COLUMNS.map(([name, title]) => el("th", { role: "columnheader", scope: "col", "data-column": name },
    el("button", { type: "button", click: () => sortBy(name) }, title)));
  const list = el("table", { class: "candidates", role: "table", "aria-label": "Candidates" },
    el("thead", { role: "rowgroup" }, el("tr", { role: "row", "aria-rowindex": 1 }, heads)), body);
  const viewport = el("div", { class: "viewport", tabindex: 0, role: "region", "aria-label": "Candidates" }, list);
  byId("table").replaceChildren(viewport);

  let made = new Map(); // rows that exist, by their place in the data
  const render = () => {
    const height = rowHeight();
    const first = Math.max(0, Math.floor(viewport.scrollTop / height) - EXTRA);
    const last = Math.min(view.shown.length, Math.ceil((viewport.scrollTop + viewport.clientHeight) / height) + EXTRA);
    const next = new Map();
    for (let place = first; place < last; place += 1) {
      const index = view.shown[place];
      const row = made.get(index) || tableRow(ROWS[index], index);
      row.setAttribute("aria-rowindex", place + 2);
      next.set(index, row);
    }
    made = next;
    const gap = (rows) => {
      const spacer = el("tr", { class: "spacer", role: "presentation" }, el("td", { colspan: COLUMNS.length, role: "presentation" }));
      spacer.firstChild.style.height = `${rows * height}px`;
      return spacer;
    };
    const focused = document.activeElement;
    const held = body.contains(focused);
    if (view.shown.length === 0) body.replaceChildren(el("tr", { role: "row" }, el("td", { role: "cell", colspan: COLUMNS.length, class: "nothing" }, "No candidate is like this.")));
    else body.replaceChildren(gap(first), ...next.values(), gap(view.shown.length - last));
    if (held) (body.contains(focused) ? focused : viewport).focus({ preventScroll: true });
  };
  const refresh = () => {
    const query = view.query.toLowerCase();
    const line = view.ancestor === "" ? null : descendantsOf(view.ancestor);
    view.shown = [...ROWS.keys()].filter((index) => (line === null || line.has(ROWS[index].id)) && matches(ROWS[index], index, query));
    if (view.sort !== null) sortShown();
    found.textContent = `${view.shown.length.toLocaleString("en")} of ${count(ROWS.length, "candidate")}`;
    list.setAttribute("aria-rowcount", view.shown.length + 1);
    for (const head of heads) {
      if (head.dataset.column === view.sort) head.setAttribute("aria-sort", view.descending ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    }
    made = new Map();
    viewport.scrollTop = 0;
    render();
  };
  const sortBy = (name) => {
    view.descending = view.sort === name && !view.descending;
    view.sort = name;
    refresh();
  };
  view.refresh = refresh;
  search.addEventListener("input", () => { view.query = search.value; refresh(); });
  let waiting = false;
  viewport.addEventListener("scroll", () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; render(); });
  });
  new ResizeObserver(render).observe(viewport);
  choice.listeners.push(refresh);
  refresh();
}

const rowHeight = () => parseFloat(getComputedStyle(document.documentElement).getPropertyValue("--row")) * parseFloat(getComputedStyle(document.documentElement).fontSize);

function matches(row, index, query) {
  const kept = choice.decisions[index].kept;
  const decided = { all: true, kept: row.kept, dropped: !row.kept, changed: row.kept !== kept }[view.decision];
  if (!decided || (view.reason && row.reason !== view.reason) || (view.round && String(row.round) !== view.round)) return false;
  row.haystack ??= [row.id, row.text, row.f && replyText(row.f), row.b && replyText(row.b)].filter(Boolean).join("\n").toLowerCase();
  return row.haystack.includes(query);
}

function sortShown() {
  const key = COLUMNS.find(([name]) => name === view.sort)[2];
  const keys = new Map(view.shown.map((index) => [index, key(ROWS[index])]));
  const sign = view.descending ? -1 : 1;
  view.shown.sort((one, other) => {
    const [a, b] = [keys.get(one), keys.get(other)];
    if (a === null || b === null) return (a === null) - (b === null); // what was not measured comes last, either way
    return a < b ? -sign : a > b ? sign : one - other;
  });
}

function tableRow(row, index) {
  const now = choice.decisions[index];
  const [f, b] = [row.f && replyText(row.f).slice(0, SHORT), row.b && replyText(row.b).slice(0, SHORT)];
  const [ownWords, otherWords] = f !== null && b !== null ? differingWords(f, b) : [null, null];
  const reply = (text, words, found, role) => el("td", { role: "cell", "data-label": role },
    el("span", { class: "cut", dir: "auto" }, text === null ? el("span", { class: "note" }, "not asked") : words ? marked(words, text) : text),
    found === null ? null : el("span", { class: "ppl" }, `PPL ${shownPerplexity(found.ppl)}`));
  const margin = marginOf(row);
  return el("tr", { class: "row", role: "row" },
    el("td", { role: "cell" }, el("button", { type: "button", class: "open", click: () => openDetail(row) },
      el("span", { class: "cut", dir: "auto" }, row.text.slice(0, 2 * SHORT) || "(empty)"))),
    reply(f, ownWords, row.f, "F"), reply(b, otherWords, row.b, "B"),
    el("td", { role: "cell", class: "num" }, margin === null ? "n/a" : margin.toFixed(2)),
    el("td", { role: "cell" }, el("span", { class: `tag ${row.kept ? "kept" : ""}` }, row.reason),
      row.kept === now.kept ? null : el("span", { class: "ppl" }, now.kept ? "now kept" : "now dropped")),
    el("td", { role: "cell", class: "num" }, String(row.round + 1)));
}

function showChanged() {
  view.decision = "changed";
  byId("filter-decision").value = "changed";
  view.refresh();
  byId("examples").scrollIntoView();
}

function showDescendants(row) {
  const choice = byId("filter-ancestor");
  if (![...choice.options].some((option) => option.value === row.id)) choice.append(el("option", { value: row.id }, `from ${row.id}: ${row.text.slice(0, SHORT_NAME)}`));
  choice.value = view.ancestor = row.id;
  view.refresh();
  byId("detail").close();
  byId("examples").scrollIntoView();
}

// One candidate in full: both responses, what differs, and how much each token surprised F, or B where B wrote it.
const SHADES = [["F", "surprise under F"], ["B", "surprise under B"], ["difference", "what differs"]];
let shade = "F";
function openDetail(row) {
  const dialog = byId("detail");
  const at = view.shown.indexOf(PLACES.get(row.id));
  const key = dialog.contains(document.activeElement) ? document.activeElement.dataset.key : undefined;
  const step = (by, label) => el("button", { type: "button", class: "quiet", "data-key": label, disabled: at < 0 || !(at + by in view.shown), click: () => openDetail(ROWS[view.shown[at + by]]) }, label);
  const shading = (value, label) => el("label", {}, el("input", { type: "radio", name: "shade", value, "data-key": value, checked: shade === value, change: () => { shade = value; openDetail(row); } }), label);
  dialog.replaceChildren(
    el("header", {}, el("h3", { id: "detail-title" }, row.id), step(-1, "Previous"), step(1, "Next"),
      el("button", { type: "button", class: "quiet", "data-key": "Close", click: () => dialog.close() }, "Close")),
    el("div", { class: "inner" },
      el("p", {}, el("span", { class: `tag ${row.kept ? "kept" : ""}` }, row.reason), ` round ${row.round + 1}`,
        marginOf(row) === null ? null : `, margin ${marginOf(row).toFixed(3)} nats a token`),
      el("h4", {}, "Prompt"), el("div", { class: "reply", dir: "auto" }, row.text || "(empty)"),
      el("fieldset", {}, el("legend", {}, "Shade"), SHADES.map(([value, label]) => shading(value, label))),
      shade !== "difference" ? el("p", { class: "note" }, `Surprise under ${shade} in nats: `, ...[["s0", "below 0.1"], ["s1", "0.1"], ["s2", "0.5"], ["s3", "2"], ["s4", "5 and above"]].flatMap(([name, text]) => [el("span", { class: `level ${name}` }, text), " "])) : null,
      ...detailReplies(row),
      ...ancestry(row)));
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
  if (key !== undefined) (dialog.querySelector(`[data-key="${key}"]:enabled`) ?? dialog.querySelector("[data-key=Close]")).focus();
}

function detailReplies(row) {
  const words = row.f && row.b ? differingWords(replyText(row.f), replyText(row.b)) : [null, null];
  return [["F", row.f, words[0]], ["B", row.b, words[1]]].flatMap(([writer, reply, differing]) => [
    el("h4", {}, `${writer}'s response`, reply === null ? null : `: PPL ${shownPerplexity(reply.ppl)} under F, ${count(reply.tokens, "token")}, ended by ${reply.end}`),
    reply === null || shade === "difference" ? null : unshaded(reply, writer),
    el("div", { class: "reply", dir: "auto", tabindex: 0 },
      reply === null ? "not asked" : shade !== "difference" ? surprising(reply) : differing ? marked(differing, replyText(reply)) : replyText(reply)),
    reply?.pieces ? el("details", {}, el("summary", {}, "Surprise by token as a table"), surpriseTable(reply)) : null,
  ]);
}

// Why a response has no shading by the chosen model, if it has none.
function unshaded(reply, writer) {
  const why = shade === "B" && writer === "F" ? "B's surprise at F's response was not measured."
    : reply.tokens === 0 ? null
    : !reply.pieces ? "Not shaded: this response is not cut into its tokens here."
    : reply.surprise[shade] === null ? "B's surprise is not known token by token. These are not the tokens that were sampled: a stop string began inside one, or a substitute base with tokens of its own wrote the response."
    : null;
  return why === null ? null : el("p", { class: "note" }, why);
}

// The hundredths of a nat of each token, and of the end where there is one; null where not finite. See packed_surprise in examples.py.
function unpacked(surprise) {
  const found = [];
  let [value, scale] = [0, 1];
  for (const digit of surprise) {
    const code = DATA.examples.digits.indexOf(digit);
    value += (code % 32) * scale;
    scale *= 32;
    if (code >= 32) continue;
    found.push(value === 0 ? null : value - 1);
    [value, scale] = [0, 1];
  }
  return found;
}

const nats = (hundredths) => (hundredths === null ? "not finite" : (hundredths / 100).toFixed(2));
function surpriseTable(reply) {
  const known = Object.entries(reply.surprise).filter(([, surprise]) => surprise !== null);
  const columns = known.map(([, surprise]) => unpacked(surprise));
  return table(["token", ...known.map(([model]) => `nats under ${model}`)],
    columns[0].map((_, index) => [index in reply.pieces ? JSON.stringify(reply.pieces[index]) : "end", ...columns.map((column) => nats(column[index]))]));
}

const BOUNDS = [10, 50, 200, 500]; // hundredths of a nat: a token of 90 %, 61 %, 14 % and 0.7 % probability
function surprising(reply) {
  if (!reply.pieces || reply.surprise[shade] === null) return [replyText(reply)];
  const token = (text, surprise, kind = "") => {
    const level = surprise === null ? "unknown" : `s${BOUNDS.filter((bound) => surprise >= bound).length}`;
    return el("span", { class: `token ${level} ${kind}`, title: surprise === null ? nats(null) : `${nats(surprise)} nats under ${shade}` }, text);
  };
  const found = unpacked(reply.surprise[shade]);
  const end = found.length === reply.pieces.length ? [] : [" ", token("end", found.at(-1), "end")];
  return [...reply.pieces.map((piece, index) => token(piece, found[index])), ...end];
}
