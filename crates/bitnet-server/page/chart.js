// A line chart over the last minutes: SVG, an axis with round numbers, a legend with the figures, and
// a cursor that shows those of another moment. Missing values are gaps.

import { el, svg } from "./dom.js";

const [WIDTH, HEIGHT] = [480, 190];
const [LEFT, RIGHT, TOP, BOTTOM] = [46, 8, 8, 20];

export class Chart {
  /** `series` are names; `format` writes a value; `top` fixes the axis' upper end. */
  constructor({ title, unit, series, format, top = null }) {
    Object.assign(this, { title, series, format, top });
    this.points = [];
    this.seconds = 60;
    this.picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": title });
    this.values = series.map(() => el("b", {}, "–"));
    const entry = (name, i) => el("li", {}, el("i", { className: `s${i}`, attrs: { "aria-hidden": "true" } }), name, this.values[i]);
    const legend = el("ul", { className: "legend" }, ...series.map(entry));
    const caption = el("figcaption", {}, el("h2", {}, title), el("span", { className: "unit" }, unit));
    this.element = el("figure", { className: "chart" }, caption, this.picture, legend);
    this.picture.onpointermove = (event) => {
      const box = this.picture.getBoundingClientRect();
      this.cursor = ((event.clientX - box.left) / box.width) * box.width;
      this.draw();
    };
    this.picture.onpointerleave = () => {
      this.cursor = null;
      this.draw();
    };
  }

  /** Shows `points`, `{at (seconds), values}`, oldest first, over the last `seconds`. */
  update(points, seconds) {
    Object.assign(this, { points, seconds });
    this.draw();
  }

  draw() {
    const { points, series } = this;
    const width = this.picture.clientWidth || WIDTH;
    const height = this.picture.clientHeight || HEIGHT;
    this.picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const end = points.at(-1)?.at ?? 0;
    const highest = Math.max(0, ...points.flatMap(({ values }) => values.filter((value) => value !== null)));
    const top = this.top ?? roundUp(highest);
    const x = (at) => LEFT + ((at - end + this.seconds) / this.seconds) * (width - LEFT - RIGHT);
    const y = (value) => TOP + (1 - Math.min(1, value / top)) * (height - TOP - BOTTOM);
    const parts = [];
    for (const part of [0, 0.25, 0.5, 0.75, 1]) {
      parts.push(svg("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(part * top), y2: y(part * top) }));
      if (part % 0.5 === 0) parts.push(svg("text", { x: LEFT - 6, y: y(part * top) + 4, "text-anchor": "end" }, part === 0 ? "0" : this.format(part * top)));
    }
    for (const [part, label] of [[0, `${this.seconds / 60} min ago`], [1, "now"]]) {
      const anchor = part === 0 ? "start" : "end";
      parts.push(svg("text", { x: LEFT + part * (width - LEFT - RIGHT), y: height - 5, "text-anchor": anchor }, label));
    }
    series.forEach((_, i) => {
      for (const run of runs(points, i)) {
        const line = run.map(({ at, value }, j) => `${j ? "L" : "M"}${x(at).toFixed(1)} ${y(value).toFixed(1)}`).join("");
        const [first, last] = [x(run[0].at).toFixed(1), x(run.at(-1).at).toFixed(1)];
        if (i === 0) parts.push(svg("path", { class: "area s0", d: `${line}L${last} ${y(0)}L${first} ${y(0)}Z` }));
        parts.push(svg("path", { class: `series s${i}`, d: line }));
      }
    });
    const shown = this.#shown(x);
    if (this.cursor != null && shown) parts.push(svg("line", { class: "cursor", x1: x(shown.at), x2: x(shown.at), y1: TOP, y2: height - BOTTOM }));
    this.picture.replaceChildren(...parts);
    const figures = series.map((_, i) => (shown?.values[i] == null ? "–" : this.format(shown.values[i])));
    figures.forEach((figure, i) => {
      this.values[i].textContent = figure;
    });
    this.picture.setAttribute("aria-label", `${this.title}: ${series.map((name, i) => `${name} ${figures[i]}`).join(", ")}`);
  }

  /** The point under the cursor, or the last. */
  #shown(x) {
    if (this.cursor == null) return this.points.at(-1);
    const distance = ({ at }) => Math.abs(x(at) - this.cursor);
    return this.points.reduce((best, point) => (!best || distance(point) < distance(best) ? point : best), null);
  }
}

/** Unbroken runs of one series. */
function runs(points, i) {
  const all = [[]];
  for (const { at, values } of points) {
    if (values[i] === null) all.push([]);
    else all.at(-1).push({ at, value: values[i] });
  }
  return all.filter((run) => run.length > 0);
}

/** The next of 1, 2, 5, 10, 20, … */
function roundUp(value) {
  if (value <= 0) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value * 1.02) ?? 10 * power;
}
