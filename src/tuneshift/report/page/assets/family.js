// The family tree as a flow: how many pairs of each round come down to each seed, or were written from which rounds.
const BANDS = {
  seed: { label: "seed", drawn: () => [{ label: "seeds", kept: null }, ...DATA.family.columns],
    bands: () => {
      const first = DATA.family.columns.find((column) => column.kept > 0).kept; // before it each seed has as much of its height
      const all = DATA.family.by_seed.reduce((sum, band) => sum + band.seeds, 0);
      return DATA.family.by_seed.map((band, index) => ({ kind: band.seeds > 1 ? "others" : `b${index}`,
        name: SEEDS.has(band.label) ? `${band.label}: ${SEEDS.get(band.label)}` : band.label, values: [(first * band.seeds) / all, ...band.values] }));
    } },
  parents: { label: "parents' round", drawn: () => DATA.family.columns,
    bands: () => DATA.family.by_parents.map((band, index, all) => ({
      kind: band.label === "seeds" ? "seeds" : `r${Math.round((5 * (index - 1)) / Math.max(1, all.length - 2))}`,
      name: `written from ${band.label}`, values: band.values })) },
};

function startFamily() {
  if (DATA.family.missing !== undefined) return;
  let by = "seed";
  const redraw = drawn(byId("family-chart"), (width) => {
    const [columns, bands] = [BANDS[by].drawn(), BANDS[by].bands()];
    byId("family-legend").replaceChildren(...bands.map((band) => el("li", {},
      svg("svg", { viewBox: "0 0 16 16", "aria-hidden": "true" }, svg("rect", { class: `band ${band.kind}`, x: 1, y: 1, width: 14, height: 14, rx: 2 })),
      el("span", { class: "cut", dir: "auto" }, band.name))));
    return flow(width, columns, bands);
  });
  byId("family-control").append(el("fieldset", {}, el("legend", {}, "Bands"),
    choices("bands", Object.entries(BANDS).map(([name, { label }]) => [name, label]), by, (value) => { by = value; redraw(); })));
  byId("family-control").hidden = false;
}

// Columns of stacked bars, each band running on from one to the next.
function flow(width, columns, bands) {
  const box = boxOf(width, Math.max(280, Math.min(400, 0.45 * width)));
  const step = (box.right - box.left) / columns.length;
  const bar = Math.min(44, 0.36 * step);
  const left = (index) => box.left + (index + 0.5) * step - bar / 2;
  const most = Math.max(...columns.map((_, index) => bands.reduce((sum, band) => sum + band.values[index], 0)));
  const y = linear(0, most, box.bottom, box.top);
  const label = `Kept pairs by round in ${count(bands.length, "band")}; the tables below have the same.`;
  const chart = frame(box, label, { x: () => 0, y, xTicks: [], yTicks: linearTicks(most, 1), xName: "round", yName: "kept pairs" });
  const every = Math.ceil(Math.max(...columns.map((column) => 7 * column.label.length + 8)) / step);
  const below = columns.map(() => 0);
  for (const band of bands.toReversed()) { // so that they stand in the legend's order
    const spans = columns.map((_, index) => {
      const bottom = y(below[index]);
      below[index] += band.values[index];
      return [bottom, y(below[index])];
    });
    const told = (index) => (event) => tell(event, columns[index].kept === null ? band.name
      : `${columns[index].label.includes(" ") ? "rounds" : "round"} ${columns[index].label}: ${Number(band.values[index].toFixed(1))} of ${count(columns[index].kept, "pair")}\n${band.name}`);
    const quiet = () => { byId("tip").hidden = true; };
    chart.append(svg("g", { class: `band ${band.kind}`, pointerleave: quiet },
      spans.slice(1).map(([bottom, top], index) => svg("path", { class: "ribbon", pointermove: told(index + 1),
        d: ribbon(left(index) + bar, spans[index], left(index + 1), [bottom, top]) })),
      spans.map(([bottom, top], index) => (bottom - top < 0.25 ? null
        : svg("rect", { x: left(index), y: top, width: bar, height: bottom - top, pointermove: told(index) })))));
  }
  columns.forEach((column, index) => {
    const centre = { x: left(index) + bar / 2, "text-anchor": "middle" };
    if (column.kept !== null && step > 28) chart.append(svg("text", { ...centre, class: "strong", y: y(below[index]) - 6 }, String(column.kept)));
    if (index % every === 0) chart.append(svg("text", { ...centre, x: Math.min(centre.x, width - 3.5 * column.label.length), y: box.bottom + 18 }, column.label));
  });
  return chart;
}

function ribbon(from, [fromBottom, fromTop], to, [toBottom, toTop]) {
  const middle = (from + to) / 2;
  return `M${from} ${fromTop}C${middle} ${fromTop} ${middle} ${toTop} ${to} ${toTop}V${toBottom}C${middle} ${toBottom} ${middle} ${fromBottom} ${from} ${fromBottom}Z`;
}

// A candidate's ancestry in words: the examples that it was written from, and its longest line to a seed.
const SHOWN_ANCESTORS = 8;
function ancestry(row) {
  if (parentsOf(row).length === 0) return []; // the user's own prompt
  const line = longestLine(row);
  const rest = line.length > SHOWN_ANCESTORS ? line.splice(2, line.length - SHOWN_ANCESTORS) : [];
  const name = (id) => (candidateOf(id) === undefined ? "seed" : `round ${candidateOf(id).round + 1}`);
  const person = (id) => [el("span", { class: "note" }, name(id)), " ",
    candidateOf(id) === undefined || id === row.id ? el("span", { class: "text", dir: "auto" }, textOf(id))
      : el("button", { type: "button", class: "open text", dir: "auto", click: () => openDetail(candidateOf(id)) }, textOf(id))];
  const item = (id) => el("li", { class: candidateOf(id) === undefined ? "seed" : "" }, person(id));
  const between = rest.length === 0 ? [] : [el("li", { class: "between" }, el("details", {},
    el("summary", {}, `${rest.length} more generations`), el("ol", { class: "lineage" }, rest.map(item))))];
  const below = row.kept && SEEDS.size > 0 ? descendantsOf(row.id).size : 0;
  return [
    ...(below === 0 ? [] : [el("p", {}, el("button", { type: "button", class: "quiet", click: () => showDescendants(row) }, `Show its ${count(below, "descendant")} in the list`))]),
    el("h4", {}, `Written from ${count(parentsOf(row).length, "example")}`),
    el("ul", { class: "parents" }, parentsOf(row).map((id) => el("li", {}, person(id)))),
    ...(line.length < 3 ? [] : [el("h4", {}, `Longest line from a seed: ${count(line.length + rest.length - 1, "generation")}`),
      el("ol", { class: "lineage" }, line.slice(0, 2).map(item), between, line.slice(2).map(item))]),
  ];
}
