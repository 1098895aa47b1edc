// Charts as SVG, drawn anew at each width, so that text keeps its size from a phone to a wide screen.
function drawn(node, draw) {
  let width = 0;
  const redraw = () => {
    width = node.clientWidth;
    if (width > 0) node.replaceChildren(draw(width));
  };
  new ResizeObserver(() => { if (node.clientWidth !== width) redraw(); }).observe(node);
  return redraw;
}

const linear = (low, high, from, to) => (value) => from + ((value - low) / (high - low || 1)) * (to - from);
function logarithmic(low, high, from, to) {
  const place = linear(Math.log(low), Math.log(high), from, to);
  return (value) => place(Math.log(Math.min(high, Math.max(low, value))));
}

function logTicks(low, high, place) {
  const ticks = [];
  for (let decade = 1; decade <= high; decade *= 10) {
    for (const step of decade === 1 ? [1, 1.5, 2, 3, 5] : [1, 2, 5]) ticks.push(step * decade);
  }
  const kept = [];
  for (const tick of ticks.filter((value) => value >= low && value <= high)) {
    if (kept.length === 0 || Math.abs(place(tick) - place(kept.at(-1))) >= 36) kept.push(tick);
  }
  return kept;
}

function linearTicks(high, least = 0) { // `least` is 1 for what is counted
  const rough = Math.max(least, high / 4);
  const unit = 10 ** Math.floor(Math.log10(rough || 1));
  const step = [1, 2, 5, 10].map((factor) => factor * unit).find((value) => value >= rough) || 1;
  return Array.from({ length: Math.floor(high / step + 1e-9) + 1 }, (_, index) => index * step);
}

const shortNumber = (value) => (value >= 1e4 ? value.toExponential(0).replace("+", "") : String(Number(value.toPrecision(6))));

// The name of a perplexity as it is written in the paper.
const perplexityOf = (side) => ["PPL", ["F", 4], ["(y", -4], [side, 4], [")", -4]].map((part) =>
  typeof part === "string" ? part : svg("tspan", { dy: part[1], "font-size": part[1] > 0 ? 9 : 12 }, part[0]));

// The frame of a plot: axes with ticks and names. `x` and `y` map values to places inside `box`.
function frame(box, label, { x, y, xTicks, yTicks, xName, yName }) {
  const chart = svg("svg", { viewBox: `0 0 ${box.width} ${box.height}`, height: box.height, role: "img", "aria-label": label });
  for (const tick of yTicks) {
    chart.append(svg("path", { class: "grid", d: `M${box.left} ${y(tick)}H${box.right}` }),
      svg("text", { x: box.left - 8, y: y(tick) + 4, "text-anchor": "end" }, shortNumber(tick)));
  }
  for (const tick of xTicks) {
    chart.append(svg("path", { class: "axis", d: `M${x(tick)} ${box.bottom}v5` }),
      svg("text", { x: x(tick), y: box.bottom + 18, "text-anchor": "middle" }, shortNumber(tick)));
  }
  chart.append(svg("path", { class: "axis", d: `M${box.left} ${box.bottom}H${box.right}` }),
    svg("text", { x: box.right, y: box.bottom + 36, "text-anchor": "end" }, ...[xName].flat()),
    svg("text", { x: 0, y: box.top - 10 }, ...[yName].flat()));
  return chart;
}
const boxOf = (width, height, left = 44) => ({ width, height, left, right: width - 12, top: 26, bottom: height - 42 });

// The greatest value that an axis shows: a few far outliers would squeeze all else, so they are put at its end.
function axisEnd(values, least) {
  const sorted = values.slice().sort((a, b) => a - b);
  const most = sorted.length ? sorted[Math.floor(0.99 * (sorted.length - 1))] : least;
  return Math.min(1e6, Math.max(least, most * 1.15));
}

const SHAPES = {
  dot: (x, y) => `M${x} ${y}h0`,
  cross: (x, y) => `M${x - 3} ${y - 3}l6 6m0-6l-6 6`,
  triangle: (x, y) => `M${x} ${y - 5}l5 9h-10z`,
  diamond: (x, y) => `M${x} ${y - 6}l6 6l-6 6l-6-6z`,
};

// Groups of points as one path each, which stays quick with ten thousand of them.
function drawPoints(chart, groups) {
  for (const group of groups) {
    const d = group.points.map((point) => SHAPES[group.shape](point.x.toFixed(1), point.y.toFixed(1))).join("");
    chart.append(svg("path", { class: `points ${group.kind}`, d }));
  }
}

function legend(node, groups) {
  node.replaceChildren(...groups.map((group) =>
    el("li", {},
      svg("svg", { viewBox: "0 0 16 16", "aria-hidden": "true" },
        svg("path", { class: `points ${group.kind}`, d: SHAPES[group.shape](8, 8) })),
      group.label)));
}

// Tells something beside the pointer.
function tell(event, text) {
  const tip = byId("tip");
  tip.hidden = false;
  tip.textContent = text;
  tip.style.left = `${Math.min(event.pageX + 14, document.documentElement.clientWidth - tip.offsetWidth - 8)}px`;
  tip.style.top = `${event.pageY + 16}px`;
}

// Tells what lies under the pointer, and opens it where it is a candidate.
function pointable(chart, groups, describe, open) {
  const tip = byId("tip");
  const nearest = (event) => {
    const bounds = chart.getBoundingClientRect();
    const scale = chart.viewBox.baseVal.width / bounds.width;
    const [x, y] = [(event.clientX - bounds.left) * scale, (event.clientY - bounds.top) * scale];
    let best = null;
    let reach = 14 ** 2;
    for (const group of groups) {
      for (const point of group.points) {
        const distance = (point.x - x) ** 2 + (point.y - y) ** 2;
        if (distance <= reach) [best, reach] = [point, distance];
      }
    }
    return best;
  };
  chart.addEventListener("pointermove", (event) => {
    const point = nearest(event);
    if (point === null) tip.hidden = true;
    else tell(event, describe(point.of));
  });
  chart.addEventListener("pointerleave", () => { tip.hidden = true; });
  chart.addEventListener("click", (event) => {
    const point = nearest(event);
    tip.hidden = true;
    if (point !== null) open(point.of);
  });
}
