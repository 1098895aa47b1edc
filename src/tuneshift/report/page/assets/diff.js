// What two texts say differently: words that are not in their longest common subsequence.
const MOST_WORDS = 300; // of each text, since the comparison grows with their product

function differingWords(first, second) {
  const [a, b] = [first, second].map((text) => (text.match(/\s*\S+|\s+$/g) || []).slice(0, MOST_WORDS));
  const bare = (word) => word.trim();
  const lengths = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i -= 1) {
    for (let j = b.length - 1; j >= 0; j -= 1) {
      lengths[i][j] = bare(a[i]) === bare(b[j]) ? lengths[i + 1][j + 1] + 1 : Math.max(lengths[i + 1][j], lengths[i][j + 1]);
    }
  }
  const [own, other] = [a.map((word) => [word, true]), b.map((word) => [word, true])];
  for (let i = 0, j = 0; i < a.length && j < b.length;) {
    if (bare(a[i]) === bare(b[j])) own[i++][1] = other[j++][1] = false;
    else if (lengths[i + 1][j] >= lengths[i][j + 1]) i += 1;
    else j += 1;
  }
  return [own, other];
}

// A text with its differing words marked; what lies behind the compared words follows unmarked.
function marked(words, whole) {
  const compared = words.map(([word]) => word).join("");
  return [...words.map(([word, differs]) => (differs && word.trim() ? el("mark", {}, word) : word)), whole.slice(compared.length)];
}
