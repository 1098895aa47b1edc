// The map of prompts.
function startDiversity() {
  const { map } = DATA.diversity;
  if (!map || map.missing !== undefined) return;
  let colour = "decision";
  const rounds = Math.max(1, ...map.points.map((point) => (point.round ?? 0) + 1));
  const sixth = (round) => Math.min(5, Math.floor((6 * round) / rounds));
  const redraw = drawn(byId("map"), (width) => {
    const box = { width, height: Math.max(320, Math.min(520, 0.6 * width)) };
    const [x, y] = [linear(0, 1, 14, box.width - 14), linear(0, 1, box.height - 14, 14)];
    const groups = new Map();
    const group = (kind, shape, label) => groups.get(kind) || groups.set(kind, { kind, shape, label, points: [] }).get(kind);
    const ordered = ["dropped", "kept", "held_out", "seed"].flatMap((kind) => map.points.filter((point) => point.kind === kind));
    for (const point of ordered) {
      const place = { x: x(point.x), y: y(point.y), of: point };
      if (point.kind === "seed") group("seed", "diamond", "seed").points.push(place);
      else if (point.kind === "held_out") group("held_out", "triangle", "held-out prompt").points.push(place);
      else if (colour === "decision") group(point.kind, point.kind === "kept" ? "dot" : "cross", point.kind).points.push(place);
      else group(`by-round r${sixth(point.round)}`, "dot", `rounds from ${Math.ceil((sixth(point.round) * rounds) / 6) + 1}`).points.push(place);
    }
    const shown = [...groups.values()];
    const chart = svg("svg", { viewBox: `0 0 ${box.width} ${box.height}`, height: box.height, role: "img",
      "aria-label": `Map of ${map.points.length} prompts; the table below measures the same.` });
    drawPoints(chart, shown);
    legend(byId("map-legend"), shown.toSorted((a, b) => (a.kind < b.kind ? -1 : 1)));
    pointable(chart, shown, (point) => `${point.kind.replace("_", "-")}: ${point.text}`, (point) => { if (PLACES.has(point.id)) openDetail(candidateOf(point.id)); });
    return chart;
  });
  byId("map-control").append(el("fieldset", {}, el("legend", {}, "Colour by"),
    choices("colour", [["decision", "decision"], ["round", "round"]], colour, (value) => { colour = value; redraw(); })));
  byId("map-control").hidden = false;
}
