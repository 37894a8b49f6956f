//! What a measurement says, for people and for programs.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::str::FromStr;
use std::time::{Duration, SystemTime};

use bitnet_inference::bench::{Latency, Sample};
use serde::Serialize;
use serde_json::{Value, json};

use super::client::{Target, Timing};
use super::dataset::Dataset;
use super::load::{Load, Run};
use crate::commands::bench::utc;
use crate::term::{count, duration, rate};

/// A bound that a good request keeps.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Slo {
    metric: Metric,
    ms: f64,
}

/// What can be bounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Metric {
    Ttft,
    Tpot,
    E2e,
}

impl FromStr for Slo {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = || {
            format!("expected ttft, tpot or e2e and milliseconds, such as ttft=500, got {text:?}")
        };
        let (name, ms) = text.split_once('=').ok_or_else(expected)?;
        let metric = match name {
            "ttft" => Metric::Ttft,
            "tpot" => Metric::Tpot,
            "e2e" => Metric::E2e,
            _ => return Err(expected()),
        };
        let ms =
            ms.parse().ok().filter(|ms: &f64| ms.is_finite() && *ms > 0.0).ok_or_else(expected)?;
        Ok(Self { metric, ms })
    }
}

impl Slo {
    fn name(self) -> &'static str {
        match self.metric {
            Metric::Ttft => "ttft",
            Metric::Tpot => "tpot",
            Metric::E2e => "e2e",
        }
    }

    fn is_kept(self, timing: &Timing) -> bool {
        let time = match self.metric {
            Metric::Ttft => Some(timing.ttft()),
            Metric::Tpot => timing.tpot(),
            Metric::E2e => Some(timing.e2e()),
        };
        // A single token has no time between tokens to be too long.
        time.is_none_or(|time| ms(time) <= self.ms)
    }
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// One metric over all requests, in milliseconds.
#[derive(Debug, Serialize)]
struct Distribution {
    count: usize,
    mean: f64,
    stddev: f64,
    p50: f64,
    p90: f64,
    p95: f64,
    p99: f64,
    max: f64,
}

impl Distribution {
    fn new(times: Vec<Duration>) -> Self {
        let sample = Sample::new(times.iter().copied().map(ms).collect());
        let latency = Latency::new(times);
        let percentile = |percent| ms(latency.percentile(percent));
        Self {
            count: latency.count(),
            mean: sample.mean(),
            stddev: sample.deviation(),
            p50: percentile(50.0),
            p90: percentile(90.0),
            p95: percentile(95.0),
            p99: percentile(99.0),
            max: percentile(100.0),
        }
    }
}

/// One load.
#[derive(Debug, Serialize)]
struct Row {
    /// For people.
    load: String,
    concurrency: Option<usize>,
    arrivals_per_second: Option<f64>,
    completed: usize,
    failed: usize,
    /// How many failed in which way.
    failures: BTreeMap<String, usize>,
    interrupted: bool,
    seconds: f64,
    requests_per_second: f64,
    output_tokens_per_second: f64,
    total_tokens_per_second: f64,
    prompt_tokens_mean: f64,
    cached_tokens_mean: f64,
    output_tokens_mean: f64,
    /// Most requests open at a time.
    peak_concurrency: usize,
    ttft_ms: Distribution,
    tpot_ms: Distribution,
    itl_ms: Distribution,
    e2e_ms: Distribution,
    /// Requests a second that kept all bounds; null without bounds.
    goodput_per_second: Option<f64>,
}

impl Row {
    fn new(load: Load, run: &Run, slos: &[Slo]) -> Self {
        let done: Vec<&Timing> =
            run.outcomes.iter().filter_map(|outcome| outcome.as_ref().ok()).collect();
        let mut failures = BTreeMap::new();
        for failure in run.outcomes.iter().filter_map(|outcome| outcome.as_ref().err()) {
            *failures.entry(failure.clone()).or_default() += 1;
        }
        let seconds = run.took.as_secs_f64().max(1e-9);
        let sum =
            |of: &dyn Fn(&Timing) -> u64| done.iter().map(|timing| of(timing)).sum::<u64>() as f64;
        let prompt = sum(&|timing| timing.usage.prompt_tokens);
        let output = sum(&|timing| timing.usage.completion_tokens);
        let cached = sum(&|timing| timing.usage.cached_tokens());
        let n = done.len().max(1) as f64;
        let good = done.iter().filter(|timing| slos.iter().all(|slo| slo.is_kept(timing))).count();
        Self {
            load: load.to_string(),
            concurrency: if let Load::Closed(n) = load { Some(n) } else { None },
            arrivals_per_second: if let Load::Poisson(rate) = load { Some(rate) } else { None },
            completed: done.len(),
            failed: run.outcomes.len() - done.len(),
            failures,
            interrupted: run.interrupted,
            seconds,
            requests_per_second: done.len() as f64 / seconds,
            output_tokens_per_second: output / seconds,
            total_tokens_per_second: (prompt + output) / seconds,
            prompt_tokens_mean: prompt / n,
            cached_tokens_mean: cached / n,
            output_tokens_mean: output / n,
            peak_concurrency: peak(&done),
            ttft_ms: Distribution::new(done.iter().map(|timing| timing.ttft()).collect()),
            tpot_ms: Distribution::new(done.iter().filter_map(|timing| timing.tpot()).collect()),
            itl_ms: Distribution::new(done.iter().flat_map(|timing| timing.gaps()).collect()),
            e2e_ms: Distribution::new(done.iter().map(|timing| timing.e2e()).collect()),
            goodput_per_second: (!slos.is_empty()).then_some(good as f64 / seconds),
        }
    }
}

/// Most requests open at the same moment.
fn peak(done: &[&Timing]) -> usize {
    let mut changes: Vec<_> =
        done.iter().flat_map(|timing| [(timing.start, 1isize), (timing.end(), -1)]).collect();
    // One that ends when another begins does not overlap with it.
    changes.sort_by_key(|&(at, change)| (at, change));
    let mut open = 0;
    changes
        .iter()
        .map(|&(_, change)| {
            open += change;
            open
        })
        .max()
        .unwrap_or(0) as usize
}

/// All loads and their circumstances.
pub(crate) struct Report {
    address: String,
    path: &'static str,
    model: String,
    dataset: Value,
    prompts: String,
    slos: Vec<Slo>,
    date: String,
    rows: Vec<Row>,
}

impl Report {
    /// About to measure this.
    pub(crate) fn new(target: &Target, model: &str, dataset: &Dataset, slos: Vec<Slo>) -> Self {
        let shape = &dataset.shape;
        let (prompts, kind) = match dataset.n_rows() {
            Some(n) => (format!("{n} from a file"), json!({"rows": n})),
            None => {
                let mut text = format!("{} random words", shape.words);
                if shape.shared_words > 0 {
                    text.push_str(&format!(" after {} that all share", shape.shared_words));
                }
                (text, json!({"words": shape.words, "shared_words": shape.shared_words}))
            }
        };
        let mut dataset = kind;
        dataset["tokens"] = shape.tokens.into();
        dataset["spread"] = shape.spread.into();
        dataset["may_stop"] = shape.may_stop.into();
        dataset["temperature"] = shape.temperature.into();
        dataset["seed"] = shape.seed.into();
        Self {
            address: target.address(),
            path: target.endpoint.path(),
            model: model.to_owned(),
            dataset,
            prompts,
            slos,
            date: utc(SystemTime::now()),
            rows: Vec::new(),
        }
    }

    /// Adds what a load gave.
    pub(crate) fn add(&mut self, load: Load, run: &Run) {
        self.rows.push(Row::new(load, run, &self.slos));
    }

    /// Whether no request of any load was answered.
    pub(crate) fn all_failed(&self) -> bool {
        self.rows.iter().all(|row| row.completed == 0)
    }

    /// A few lines for each load.
    pub(crate) fn table(&self, out: &mut impl Write) -> io::Result<()> {
        writeln!(out, "server   {}{}, model {}", self.address, self.path, self.model)?;
        writeln!(out, "prompts  {}", self.prompts)?;
        for row in &self.rows {
            self.block(row, out)?;
        }
        Ok(())
    }

    fn block(&self, row: &Row, out: &mut impl Write) -> io::Result<()> {
        writeln!(
            out,
            "\n{}: {} answered, {} failed in {}",
            row.load,
            count(row.completed as u64),
            count(row.failed as u64),
            duration(Duration::from_secs_f64(row.seconds))
        )?;
        for (failure, n) in &row.failures {
            writeln!(out, "  {n} × {}", crate::term::printable(failure))?;
        }
        if row.completed == 0 {
            return Ok(());
        }
        writeln!(
            out,
            "  {} requests/s · {} tok/s out · {} tok/s in all · up to {} open",
            rate(row.requests_per_second),
            rate(row.output_tokens_per_second),
            rate(row.total_tokens_per_second),
            row.peak_concurrency
        )?;
        writeln!(
            out,
            "  {:.1} tokens a prompt ({:.1} cached), {:.1} an answer",
            row.prompt_tokens_mean, row.cached_tokens_mean, row.output_tokens_mean
        )?;
        let heads = ["ms", "mean", "p50", "p90", "p95", "p99", "max"];
        writeln!(
            out,
            "  {:<5}{}",
            heads[0],
            heads[1..].iter().map(|head| format!("{head:>10}")).collect::<String>()
        )?;
        let metrics = [
            ("TTFT", &row.ttft_ms),
            ("TPOT", &row.tpot_ms),
            ("ITL", &row.itl_ms),
            ("E2E", &row.e2e_ms),
        ];
        for (name, d) in metrics {
            if d.count == 0 {
                continue;
            }
            let cells =
                [d.mean, d.p50, d.p90, d.p95, d.p99, d.max].map(|value| format!("{value:>10.2}"));
            writeln!(out, "  {name:<5}{}", cells.concat())?;
        }
        if let Some(goodput) = row.goodput_per_second {
            let bounds: Vec<_> =
                self.slos.iter().map(|slo| format!("{} ≤ {} ms", slo.name(), slo.ms)).collect();
            let share =
                goodput / (row.requests_per_second + row.failed as f64 / row.seconds) * 100.0;
            writeln!(
                out,
                "  goodput {} requests/s, {share:.1} % of all ({})",
                rate(goodput),
                bounds.join(", ")
            )?;
        }
        Ok(())
    }

    /// One object.
    pub(crate) fn json(&self, out: &mut impl Write) -> io::Result<()> {
        let slos: BTreeMap<_, _> = self.slos.iter().map(|slo| (slo.name(), slo.ms)).collect();
        let report = json!({
            "date": self.date,
            "version": env!("CARGO_PKG_VERSION"),
            "server": self.address,
            "path": self.path,
            "model": self.model,
            "dataset": self.dataset,
            "slo_ms": slos,
            "definitions": {
                "ttft": "first text - before connecting",
                "itl": "gaps between pieces of text, of all requests",
                "e2e": "last text - before connecting",
                "tpot": "(e2e - ttft) / (output tokens - 1), of requests with two tokens or more",
                "goodput": "answered requests that kept all of slo_ms / seconds",
                "percentiles": "nearest rank",
            },
            "runs": self.rows,
        });
        serde_json::to_writer_pretty(&mut *out, &report)?;
        writeln!(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::bench_serve::client::UsageCounts;
    use std::time::Instant;

    fn timing(start: Instant, ttft: u64, gap: u64) -> Timing {
        let at = |ms| start + Duration::from_millis(ms);
        let usage =
            UsageCounts { prompt_tokens: 10, completion_tokens: 3, ..UsageCounts::default() };
        Timing { start, pieces: vec![at(ttft), at(ttft + gap), at(ttft + 2 * gap)], usage }
    }

    #[test]
    fn bounds_are_read_and_kept() {
        let slo = |text: &str| text.parse::<Slo>();
        for text in ["ttft", "ttft=", "ttft=x", "ttft=-1", "ttft=inf", "itl=3", "=3"] {
            assert!(slo(text).is_err(), "{text}");
        }
        let timing = timing(Instant::now(), 100, 20);
        for (text, kept) in [
            ("ttft=100", true),
            ("ttft=99.9", false),
            ("tpot=20", true),
            ("tpot=19", false),
            ("e2e=140", true),
            ("e2e=139", false),
        ] {
            assert_eq!(slo(text).unwrap().is_kept(&timing), kept, "{text}");
        }
    }

    #[test]
    fn a_run_is_counted_as_defined() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let run = Run {
            outcomes: vec![
                Ok(timing(at(0), 100, 50)),   // until 200
                Ok(timing(at(150), 300, 50)), // until 550
                Err("429: busy".into()),
                Ok(timing(at(550), 100, 50)),
            ],
            took: Duration::from_secs(2),
            interrupted: false,
        };
        let row = Row::new(Load::Closed(2), &run, &["ttft=100".parse().unwrap()]);
        assert_eq!((row.completed, row.failed, row.peak_concurrency), (3, 1, 2));
        assert_eq!(row.failures["429: busy"], 1);
        assert_eq!((row.requests_per_second, row.output_tokens_per_second), (1.5, 4.5));
        assert_eq!(row.goodput_per_second, Some(1.0));
        assert_eq!((row.itl_ms.count, row.itl_ms.p99), (6, 50.0));
        assert_eq!((row.ttft_ms.p50, row.ttft_ms.max), (100.0, 300.0));
    }
}
