// The training's loss by epoch.
function startLearning() {
  const { losses } = DATA.training;
  drawn(byId("loss"), (width) => {
    const box = boxOf(width, 240);
    const most = Math.max(...losses, 0.01);
    const x = linear(1, Math.max(2, losses.length), box.left + 10, box.right - 6);
    const y = linear(0, most, box.bottom, box.top);
    const step = Math.max(1, Math.ceil(losses.length / Math.max(2, width / 60)));
    const chart = frame(box, `Loss from ${losses[0]?.toFixed(3)} to ${losses.at(-1)?.toFixed(3)} over ${losses.length} epochs.`, {
      x, y, xTicks: losses.map((_, index) => index + 1).filter((epoch) => (epoch - 1) % step === 0), yTicks: linearTicks(most), xName: "epoch", yName: "loss" });
    chart.append(svg("path", { class: "curve", d: losses.map((loss, index) => `${index ? "L" : "M"}${x(index + 1)} ${y(loss)}`).join("") }),
      ...losses.map((loss, index) => svg("circle", { class: "dot", cx: x(index + 1), cy: y(loss), r: 4 })));
    return chart;
  });
  byId("loss-table").replaceChildren(table(["epoch", "loss"], losses.map((loss, index) => [index + 1, loss.toFixed(4)])));
}
