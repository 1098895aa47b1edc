// Every model's share of right answers with its interval.
const KINDS = { base: "of-b", source: "of-f", before: "of-t", after: "of-t" };

function startVerdict() {
  const { arms, chance } = DATA.verdict;
  if (arms === null) return;
  const rows = Object.entries(arms).map(([arm, { name, accuracy, interval }]) => ({ name, kind: KINDS[arm], value: accuracy, ...interval }));
  intervals(byId("arms-chart"), rows, { strong: arms.after.name, chance });
}
