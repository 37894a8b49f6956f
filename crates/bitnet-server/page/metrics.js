// The second view: what the server measures, once a second, over the last minutes. Percentiles are
// of the requests of the last minute, from the buckets of its histograms.

import { metricsText } from "./api.js";
import { Chart } from "./chart.js";
import { el } from "./dom.js";
import { duration, figure } from "./messages.js";
import { buckets, difference, max, parse, quantile, sum } from "./prometheus.js";

const PERIOD_MS = 1000;
const SECONDS = 300;
const LATENCY_SECONDS = 60;
const QUANTILES = [["p50", 0.5], ["p95", 0.95], ["p99", 0.99]];
const HISTOGRAMS = ["bitnet_time_to_first_token_seconds", "bitnet_inter_token_latency_seconds", "bitnet_request_seconds"];

const seconds = (value) => (value < 0.01 ? `${(value * 1000).toFixed(value < 0.001 ? 2 : 1)} ms` : duration(value * 1000));
const percent = (value) => `${Math.round(value * 100)}%`;
const count = (value) => (Number.isInteger(value) ? value.toLocaleString("en") : value.toFixed(1));
const mebibytes = (value) => `${Math.round(value / 2 ** 20).toLocaleString("en")} MiB`;

export class Metrics {
  #timer = null;
  #abort = null;
  #readings = [];

  constructor(section, host) {
    this.host = host;
    this.state = el("span", { className: "live" }, "live");
    const tile = (label) => {
      const value = el("dd", {}, "–");
      return { value, node: el("div", { className: "tile" }, el("dt", {}, label), value) };
    };
    this.tiles = {
      speed: tile("Tokens a second"),
      running: tile("Sequences running"),
      first: tile("First token, p50"),
      hits: tile("Prompt from cache"),
      memory: tile("Memory"),
      requests: tile("Requests served"),
    };
    const percentiles = QUANTILES.map(([name]) => name);
    const chart = (title, unit, series, format, top) => new Chart({ title, unit, series, format, top });
    this.charts = {
      throughput: chart("Throughput", "tokens a second", ["generated", "prompt"], figure),
      queue: chart("Queue", "sequences", ["running", "waiting"], count),
      first: chart("Time to first token", "of the last minute", percentiles, seconds),
      between: chart("Time between tokens", "of the last minute", percentiles, seconds),
      whole: chart("Time of a request", "of the last minute", percentiles, seconds),
      cache: chart("KV cache in use", "of its blocks", ["in use"], percent, 1),
    };
    const head = el("div", { className: "metrics-head" }, el("h1", {}, "Metrics"), this.state,
      el("p", {}, "Read from /metrics every second while this view is open."));
    const tiles = el("dl", { className: "tiles" }, ...Object.values(this.tiles).map(({ node }) => node));
    const charts = el("div", { className: "charts" }, ...Object.values(this.charts).map(({ element }) => element));
    section.append(el("div", { className: "metrics-inner" }, head, tiles, charts));
    section.tabIndex = 0;
  }

  /** Reads until stopped. */
  start() {
    if (this.#timer !== null) return;
    const tick = async () => {
      const started = performance.now();
      await this.#read();
      if (this.#timer !== null) this.#timer = setTimeout(tick, Math.max(100, PERIOD_MS - (performance.now() - started)));
    };
    this.#timer = 0;
    this.#abort = new AbortController();
    tick();
  }

  /** Reads no more. */
  stop() {
    if (this.#timer === null) return;
    clearTimeout(this.#timer);
    this.#abort.abort();
    this.#timer = null;
  }

  async #read() {
    try {
      const families = parse(await metricsText(this.#abort.signal));
      this.#readings.push(reading(families, performance.now() / 1000));
      const oldest = this.#readings.at(-1).at - SECONDS - LATENCY_SECONDS;
      while (this.#readings[0].at < oldest) this.#readings.shift();
      this.#show();
      this.#say("live", false);
    } catch (error) {
      if (error.name === "AbortError") return;
      this.#say(error.message, true);
      if (error.status === 401) {
        this.stop();
        this.host.needKey();
      }
    }
  }

  #say(text, stale) {
    if (this.state.textContent !== text) this.state.textContent = text;
    this.state.toggleAttribute("data-stale", stale);
  }

  #show() {
    const all = this.#readings;
    const from = all.at(-1).at - SECONDS;
    const shown = all.map((_, i) => i).filter((i) => all[i].at >= from);
    // Whole minutes, so that the first of them already fills the charts.
    const span = Math.min(SECONDS, 60 * Math.max(1, Math.ceil((all.at(-1).at - all[0].at) / 60)));
    const draw = (name, values) => this.charts[name].update(shown.map((i) => ({ at: all[i].at, values: values(i) })), span);
    draw("throughput", (i) => [rate(all, i, "generated"), rate(all, i, "prompt")]);
    draw("queue", (i) => [all[i].running, all[i].waiting]);
    ["first", "between", "whole"].forEach((name, which) => draw(name, (i) => percentiles(all, i, which)));
    draw("cache", (i) => [all[i].cache]);
    const [last, at] = [all.at(-1), all.length - 1];
    const set = (name, value, format) => {
      this.tiles[name].value.textContent = value === null ? "–" : format(value);
    };
    set("speed", rate(all, at, "generated"), figure);
    set("running", last.running, (value) => (last.waiting > 0 ? `${value}, ${last.waiting} waiting` : `${value}`));
    set("first", percentiles(all, at, 0)[0], seconds);
    set("hits", last.queried ? last.hits / last.queried : null, percent);
    set("memory", last.memory, mebibytes);
    set("requests", last.finished, count);
  }
}

/** The figures of one reading. */
function reading(families, at) {
  const total = (name, where) => sum(families, name, where);
  return {
    at,
    generated: total("bitnet_generation_tokens_total"),
    prompt: total("bitnet_prompt_tokens_total"),
    running: total("bitnet_sequences_running") ?? 0,
    waiting: total("bitnet_sequences_waiting") ?? 0,
    cache: max(families, "bitnet_kv_cache_usage_ratio"),
    queried: total("bitnet_prefix_cache_queried_tokens_total"),
    hits: total("bitnet_prefix_cache_hit_tokens_total"),
    memory: total("process_resident_memory_bytes"),
    finished: total("bitnet_sequences_total", ({ finished_reason }) => finished_reason === "stop" || finished_reason === "length"),
    histograms: HISTOGRAMS.map((name) => buckets(families, name)),
  };
}

/** The growth of a counter a second, over the last two seconds or so; null before there is one. */
function rate(all, i, name) {
  const before = all[Math.max(0, i - 2)];
  const span = all[i].at - before.at;
  if (span <= 0) return null;
  return Math.max(0, (all[i][name] ?? 0) - (before[name] ?? 0)) / span;
}

/** Percentiles of what a histogram counted in the minute before a reading. */
function percentiles(all, i, which) {
  let j = i;
  while (j > 0 && all[i].at - all[j - 1].at <= LATENCY_SECONDS) j -= 1;
  const counted = difference(all[i].histograms[which], all[j].histograms[which]);
  return QUANTILES.map(([, q]) => quantile(counted, q));
}
