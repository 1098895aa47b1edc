// Every model's share of right answers with its interval.
const KINDS = { base: "of-b", source: "of-f", before: "of-t", after: "of-t" };

function startVerdict() {
  const { arms, chance } = DATA.verdict;
  if (arms === null) return;
  const shown = Object.entries(arms);
  drawn(byId("arms-chart"), (width) => {
    const box = { ...boxOf(width, 74 + 34 * shown.length, width < 480 ? 8 : 160), top: 8 };
    const x = linear(0, 100, box.left + 6, box.right - 6);
    const label = shown.map(([, { name, accuracy }]) => `${name} ${percent(accuracy, 1)}`).join("; ");
    const chart = frame(box, label, { x, y: () => 0, xTicks: [0, 25, 50, 75, 100], yTicks: [], xName: "right answers, %", yName: "" });
    shown.forEach(([arm, { name, accuracy, interval }], index) => {
      const kind = KINDS[arm];
      const y = box.top + 20 + 34 * index;
      const narrow = box.left < 100;
      chart.append(
        svg("text", { x: narrow ? x(0) : box.left - 14, y: narrow ? y - 9 : y + 4, "text-anchor": narrow ? "start" : "end", class: arm === "after" ? "strong" : "" }, name),
        svg("path", { class: `interval ${kind}`, d: `M${x(100 * interval.low)} ${y}H${x(100 * interval.high)}` }),
        svg("circle", { class: kind, cx: x(100 * accuracy), cy: y, r: 5.5 }));
    });
    if (chance !== null) chart.append(svg("path", { class: "chance", d: `M${x(100 * chance)} ${box.top}V${box.bottom}` }));
    return chart;
  });
}
