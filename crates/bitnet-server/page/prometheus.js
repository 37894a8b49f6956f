// Reads the text format of /metrics, and what dashboards compute from it: rates and quantiles.

/** A map from metric name to `[{labels, value}]`. */
export function parse(text) {
  const families = new Map();
  const line = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)/;
  for (const row of text.split("\n")) {
    const found = row[0] === "#" ? null : line.exec(row);
    if (!found) continue;
    const [, name, labels = "", value] = found;
    if (!families.has(name)) families.set(name, []);
    families.get(name).push({ labels: parseLabels(labels), value: Number(value.replace("Inf", "Infinity")) });
  }
  return families;
}

function parseLabels(text) {
  const labels = {};
  for (const [, name, value] of text.matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) {
    labels[name] = value.replace(/\\(.)/g, (_, char) => (char === "n" ? "\n" : char));
  }
  return labels;
}

/** The sum of a metric over all label values that `where` allows; null if there are none. */
export function sum(families, name, where = () => true) {
  const rows = (families.get(name) ?? []).filter(({ labels }) => where(labels));
  return rows.length ? rows.reduce((total, { value }) => total + value, 0) : null;
}

/** The largest of a metric. */
export function max(families, name, where = () => true) {
  const values = (families.get(name) ?? []).filter(({ labels }) => where(labels)).map(({ value }) => value);
  return values.length ? Math.max(...values) : null;
}

/** Cumulative bucket counts of a histogram, all labels but `le` summed: `[[upper bound, count]]`. */
export function buckets(families, name, where = () => true) {
  const counts = new Map();
  for (const { labels, value } of families.get(`${name}_bucket`) ?? []) {
    if (!where(labels)) continue;
    const bound = labels.le === "+Inf" ? Infinity : Number(labels.le);
    counts.set(bound, (counts.get(bound) ?? 0) + value);
  }
  return [...counts].sort(([a], [b]) => a - b);
}

/** What was counted between two readings of a histogram. */
export function difference(now, before) {
  const old = new Map(before);
  return now.map(([bound, count]) => [bound, Math.max(0, count - (old.get(bound) ?? 0))]);
}

/**
 * The `q`-quantile of cumulative buckets, linear inside a bucket as PromQL's histogram_quantile has
 * it; null where nothing was counted.
 */
export function quantile(cumulative, q) {
  const total = cumulative.at(-1)?.[1] ?? 0;
  if (total === 0) return null;
  const rank = q * total;
  let [below, counted] = [0, 0];
  for (const [bound, count] of cumulative) {
    if (count >= rank && count > counted) {
      if (bound === Infinity) return below;
      return below + ((bound - below) * (rank - counted)) / (count - counted);
    }
    [below, counted] = [bound, count];
  }
  return below;
}
