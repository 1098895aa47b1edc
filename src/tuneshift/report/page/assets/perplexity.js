// Both distributions, the plane, and the control that decides every candidate again.
const choice = {
  rule: DATA.rule.name in DATA.rule.live ? DATA.rule.name : "ppl_diff",
  at: { ...DATA.rule.thresholds },
  decisions: [],
  listeners: [],
};
const lineOf = (axis) => ({ ppl_diff: choice.at.tau, asymmetric: axis === "f" ? choice.at.tau_f : choice.at.tau_b })[choice.rule];

function startPerplexity() {
  const redraws = [
    histogram("f", "hist-f", (reply) => reply.f), histogram("b", "hist-b", (reply) => reply.b), plane(),
  ];
  let waiting = false;
  const apply = () => {
    choice.decisions = ROWS.map((row) => decide(row, choice.rule, choice.at));
    outcome();
    changes();
    for (const redraw of redraws) redraw();
    for (const listener of choice.listeners) listener();
  };
  const soon = () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; apply(); });
  };
  const pick = (rule) => { choice.rule = rule; byId("thresholds").replaceChildren(...sliders(soon)); soon(); };
  byId("rules").append(...choices("rule", Object.keys(DATA.rule.live).map((rule) => [rule, rule]), choice.rule, pick));
  byId("thresholds").replaceChildren(...sliders(soon));
  const own = DATA.rule.name in DATA.rule.live;
  const said = (DATA.rule.live[DATA.rule.name] || []).map((name) => `${name} ${DATA.rule.thresholds[name]}`).join(", ");
  byId("run-rule").textContent = `The run itself decided by ${DATA.rule.name}${said && `, ${said}`}${DATA.rule.calibrated ? " (calibrated)" : ""}.`
    + (own ? "" : " It is not decided by both perplexities alone, so the page starts at the paper's rule, ppl_diff.");
  const copy = byId("copy");
  if (navigator.clipboard) {
    copy.hidden = false;
    copy.addEventListener("click", async () => {
      await navigator.clipboard.writeText(byId("command").textContent);
      copy.textContent = "Copied";
      setTimeout(() => { copy.textContent = "Copy"; }, 1500);
    });
  }
  byId("control").addEventListener("submit", (event) => event.preventDefault());
  byId("control").hidden = false;
  apply();
}

// A slider and a number for each threshold that the rule reads; any number above 1 may be typed.
function sliders(changed) {
  return DATA.rule.live[choice.rule].map((name) => {
    const set = (value, other) => {
      if (!(value > 1)) return;
      choice.at[name] = value;
      other.value = value;
      changed();
    };
    const most = Math.max(4, Math.ceil(2 * DATA.rule.thresholds[name]));
    const slider = el("input", { type: "range", id: `at-${name}`, min: 1.01, max: most, step: 0.01, value: choice.at[name], "aria-label": name });
    const field = el("input", { type: "number", min: 1.0001, step: "any", value: choice.at[name], "aria-label": `${name}, as a number` });
    slider.addEventListener("input", () => set(Number(slider.value), field));
    field.addEventListener("input", () => set(Number(field.value), slider));
    return el("div", { class: "threshold" }, el("span", { "aria-hidden": "true" }, name), slider, field);
  });
}

function outcome() {
  const kept = choice.decisions.filter((decision) => decision.kept).length;
  const added = ROWS.filter((row, index) => choice.decisions[index].kept && !row.kept).length;
  const removed = ROWS.filter((row, index) => !choice.decisions[index].kept && row.kept).length;
  const unscored = ROWS.filter((row) => row.stuck === null && row.b === null).length;
  const fact = (value, text, id) => el("span", {}, el("strong", { id }, String(value)), text);
  byId("outcome").replaceChildren(
    fact(kept, "kept", "kept-count"),
    fact(percent(kept / ROWS.length, 1), `of ${count(ROWS.length, "candidate")}`, "keep-rate"),
    fact(`+${added}`, "newly kept", "added-count"), fact(`\u2212${removed}`, "no longer kept", "removed-count"),
    ...(unscored === 0 ? [] : [el("span", { class: "note" }, `${count(unscored, "candidate")} cannot be kept here: B was not asked, since F's answer failed the run's rule (synthesis.complete_scores asks everywhere).`)]));
  byId("command").textContent = reselectCommand(choice.rule, choice.at);
}

const SHOWN_CHANGES = 6;
function changes() {
  const changed = ROWS.map((row, index) => [row, choice.decisions[index]]).filter(([row, now]) => row.kept !== now.kept);
  byId("changes").replaceChildren(...(changed.length === 0 ? [] : [
    el("h3", {}, `Examples that change: ${changed.length}`),
    el("ul", {}, changed.slice(0, SHOWN_CHANGES).map(([row, now]) =>
      el("li", {},
        el("span", { class: `tag ${now.kept ? "kept" : ""}` }, now.kept ? "now kept" : `now ${now.reason}`), " ",
        el("button", { type: "button", class: "open text", dir: "auto", click: () => openDetail(row) }, row.text || "(empty)")))),
    el("button", { type: "button", class: "quiet", click: () => showChanged() }, "Show all of them in the list"),
  ]));
}

function histogram(axis, id, reply) {
  const values = ROWS.map(reply).filter((found) => found !== null && found.ppl !== null).map((found) => found.ppl);
  const end = axisEnd(values, 3);
  const bins = 30;
  const place = logarithmic(1, end, 0, bins);
  return drawn(byId(id), (width) => {
    const box = boxOf(width, 230, 36);
    const x = logarithmic(1, end, box.left, box.right);
    const line = lineOf(axis);
    const counts = Array.from({ length: bins }, () => [0, 0]); // below the line, and from it on
    for (const value of values) counts[Math.min(bins - 1, Math.floor(place(value)))][line !== undefined && !(value < line) ? 1 : 0] += 1;
    const most = Math.max(1, ...counts.map(([below, above]) => below + above));
    const y = linear(0, most, box.bottom, box.top);
    const chart = frame(box, `Histogram of ${values.length} perplexities; the table below has the counts.`, {
      x, y, xTicks: logTicks(1, end, x), yTicks: linearTicks(most, 1), xName: perplexityOf(axis), yName: "candidates" });
    const edge = (index) => end ** (index / bins);
    const wanted = axis === "f" ? 0 : 1; // the side that the rule wants
    counts.forEach((sides, index) => {
      let bottom = 0;
      sides.forEach((n, side) => {
        if (n === 0) return;
        const [left, right] = [x(edge(index)) + 0.5, x(edge(index + 1)) - 0.5];
        chart.append(svg("rect", { class: `${axis === "f" ? "of-f" : "of-b"} ${line === undefined || side === wanted ? "inside" : "outside"}`,
          x: left, width: right - left, y: y(bottom + n), height: y(bottom) - y(bottom + n) }));
        bottom += n;
      });
    });
    if (line !== undefined && line <= end) {
      chart.append(svg("path", { class: "guide", d: `M${x(line)} ${box.top - 6}V${box.bottom}` }),
        svg("text", { class: "strong", x: x(line) + 5, y: box.top + 4 }, shortNumber(line)));
    }
    byId(`${id}-table`).replaceChildren(table(["from", "to", "candidates"], counts.map(([below, above], index) =>
      [edge(index).toFixed(2), index === bins - 1 ? "and above" : edge(index + 1).toFixed(2), below + above])));
    return chart;
  });
}

function plane() {
  const rows = ROWS.map((row, index) => [row, index]).filter(([row]) => judgeable(row));
  const [endF, endB] = ["f", "b"].map((side) => axisEnd(rows.map(([row]) => row[side].ppl), 3));
  return drawn(byId("scatter"), (width) => {
    const box = boxOf(width, Math.max(320, Math.min(480, 0.62 * width)));
    const [x, y] = [logarithmic(1, endF, box.left, box.right), logarithmic(1, endB, box.bottom, box.top)];
    const groups = [
      { kind: "changed", shape: "dot", label: "changed by the control", points: [] },
      { kind: "dropped", shape: "cross", label: "dropped", points: [] },
      { kind: "kept", shape: "dot", label: "kept", points: [] },
    ];
    for (const [row, index] of rows) {
      const { kept } = choice.decisions[index];
      const point = { x: x(row.f.ppl), y: y(row.b.ppl), of: row };
      groups[kept ? 2 : 1].points.push(point);
      if (kept !== row.kept) groups[0].points.push(point);
    }
    const label = `${rows.length} candidates by both perplexities: ${groups[2].points.length} kept.`;
    const chart = frame(box, label, { x, y, xTicks: logTicks(1, endF, x), yTicks: logTicks(1, endB, y),
      xName: perplexityOf("f"), yName: perplexityOf("b") });
    drawPoints(chart, groups);
    chart.append(...(choice.rule === "ratio" ? ratioLine(x, y, endF, endB) : thresholdLines(box, x, y, rows)));
    legend(byId("scatter-legend"), groups.filter((group) => group.points.length > 0).reverse());
    pointable(chart, groups.slice(1), (row) => `${row.text}\nPPL_F(y_f) ${shownPerplexity(row.f.ppl)}, PPL_F(y_b) ${shownPerplexity(row.b.ppl)}`, openDetail);
    return chart;
  });
}

function ratioLine(x, y, endF, endB) {
  const { ratio } = choice.at;
  const until = Math.min(endF, endB / ratio);
  return until <= 1 ? [] : [svg("path", { class: "guide", d: `M${x(1)} ${y(ratio)}L${x(until)} ${y(ratio * until)}` })];
}

function thresholdLines(box, x, y, rows) {
  const [f, b] = [lineOf("f"), lineOf("b")];
  const counts = { "low-high": 0, "high-high": 0, "low-low": 0, "high-low": 0 };
  for (const [row] of rows) {
    const high = choice.rule === "asymmetric" ? row.b.ppl > b : b <= row.b.ppl;
    counts[`${row.f.ppl < f ? "low" : "high"}-${high ? "high" : "low"}`] += 1;
  }
  const places = { "low-high": [box.left + 8, box.top + 14, "start"], "high-high": [box.right, box.top + 14, "end"],
    "low-low": [box.left + 8, box.bottom - 8, "start"], "high-low": [box.right, box.bottom - 8, "end"] };
  return [
    svg("path", { class: "guide", d: `M${x(f)} ${box.top - 6}V${box.bottom}M${box.left} ${y(b)}H${box.right}` }),
    ...Object.entries(places).map(([name, [left, top, anchor]]) =>
      svg("text", { class: "strong", x: left, y: top, "text-anchor": anchor, "data-quadrant": name }, `${name}: ${counts[name]}`)),
  ];
}
