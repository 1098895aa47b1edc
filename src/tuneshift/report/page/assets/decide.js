// The rules of tuneshift/criteria.py that need both perplexities and nothing else, decided as it decides.
const quadrantOf = (f, b, tau) => `${f < tau ? "low" : "high"}-${tau <= b ? "high" : "low"}`;
const KEEPS = {
  ppl_diff: (f, b, at) => quadrantOf(f, b, at.tau) === "low-high",
  asymmetric: (f, b, at) => f < at.tau_f && b > at.tau_b,
  ratio: (f, b, at) => at.ratio * f <= b,
};

// A row with `stuck` is dropped at any threshold; one without a scored y_b is never kept by a rule that reads it.
function decide(row, rule, at) {
  if (row.stuck !== null) return { kept: false, reason: row.stuck };
  if (row.b === null) return { kept: false, reason: `${row.f.ppl < at.tau ? "low" : "high"}-unscored` };
  if (KEEPS[rule](row.f.ppl, row.b.ppl, at)) return { kept: true, reason: "kept" };
  const found = quadrantOf(row.f.ppl, row.b.ppl, at.tau);
  return { kept: false, reason: rule === "ppl_diff" ? found : `not ${rule} (${found})` };
}

// The command that writes this choice as a dataset.
function reselectCommand(rule, at) {
  const thresholds = DATA.rule.live[rule].map((name) => ` --set criterion.${name}=${at[name]}`).join("");
  return `tuneshift reselect ${DATA.run} --set criterion=${rule}${thresholds}`;
}

