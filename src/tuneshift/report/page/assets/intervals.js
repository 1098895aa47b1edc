// Shares with their 95 % intervals: a row each, of {name, kind, value, low, high}, on one axis from 0 to 100 %.
const MOST_LETTERS = 44;
function intervals(node, rows, { strong = null, chance = null } = {}) {
  const short = (name) => (name.length > MOST_LETTERS ? `\u2026${name.slice(1 - MOST_LETTERS)}` : name); // a path's end tells most
  const longest = Math.max(...rows.map((row) => short(row.name).length));
  return drawn(node, (width) => {
    const narrow = width < 480;
    const box = { ...boxOf(width, 74 + 34 * rows.length, narrow ? 8 : Math.min(0.45 * width, 7 * longest + 28)), top: 8 };
    const x = linear(0, 100, box.left + 6, box.right - 6);
    const label = rows.map((row) => `${row.name} ${percent(row.value, 1)}`).join("; ");
    const chart = frame(box, label, { x, y: () => 0, xTicks: [0, 25, 50, 75, 100], yTicks: [], xName: "right answers, %", yName: "" });
    if (chance !== null) chart.append(svg("path", { class: "chance", d: `M${x(100 * chance)} ${box.top}V${box.bottom}` }));
    rows.forEach((row, index) => {
      const y = box.top + 20 + 34 * index;
      const at = x(100 * row.value);
      chart.append(
        svg("text", { x: narrow ? x(0) : box.left - 14, y: narrow ? y - 9 : y + 4, "text-anchor": narrow ? "start" : "end", class: row.name === strong ? "strong" : "name" }, short(row.name)),
        svg("path", { class: `interval ${row.kind}`, d: `M${x(100 * row.low)} ${y}H${x(100 * row.high)}` }),
        row.kind === "untrained" ? svg("rect", { class: row.kind, x: at - 5, y: y - 5, width: 10, height: 10 })
          : svg("circle", { class: row.kind, cx: at, cy: y, r: 5.5 }));
    });
    return chart;
  });
}
