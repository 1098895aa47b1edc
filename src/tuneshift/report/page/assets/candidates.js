// The run's candidates, and what they descend from.
const ROWS = DATA.examples.rows;
const PLACES = new Map(ROWS.map((row, index) => [row.id, index]));
const candidateOf = (id) => ROWS[PLACES.get(id)];
const replyText = (reply) => reply.text ?? reply.pieces.join("");
const judgeable = (row) => row.stuck === null && row.b !== null;
const marginOf = (row) => (judgeable(row) ? Math.log(row.b.ppl) - Math.log(row.f.ppl) : null);

const parentsOf = (row) => DATA.calls[row.call] ?? [];
const SEEDS = new Map((DATA.family.seeds ?? []).map((seed) => [seed.id, seed.text ?? seed.id]));
const textOf = (id) => candidateOf(id)?.text ?? SEEDS.get(id) ?? id;

// The ids of all that descends from a seed or a candidate. A parent stands before its children.
function descendantsOf(ancestor) {
  const found = new Set([ancestor]);
  for (const row of ROWS) if (parentsOf(row).some((id) => found.has(id))) found.add(row.id);
  found.delete(ancestor);
  return found;
}

// The longest line from a seed to a candidate, as ids.
function longestLine(row) {
  const generation = (id) => DATA.family.generations?.[id] ?? 0;
  const line = [row.id];
  for (let at = row; at !== undefined && parentsOf(at).length > 0; at = candidateOf(line[0])) {
    line.unshift(parentsOf(at).reduce((best, id) => (generation(id) > generation(best) ? id : best)));
  }
  return line;
}
