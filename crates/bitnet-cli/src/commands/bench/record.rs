//! What a measurement is worth keeping: results, the limits beside them, and the circumstances.

use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

use bitnet_inference::bench::{Bench, Bound, Limits, Measurement, process};
use serde::Serialize;

use crate::flags::KvArg;

/// All results of one invocation. Its JSON form is what `benches/record/` keeps.
#[derive(Debug, Serialize)]
pub(crate) struct Record {
    pub(crate) results: Vec<Row>,
    pub(crate) runs: Vec<Run>,
    /// Name of the model, or its shape.
    pub(crate) model: String,
    /// Numbers in all tensors of the model.
    pub(crate) parameters: u64,
    /// What the processor calls itself.
    pub(crate) cpu: String,
    /// Number format of the KV cache.
    pub(crate) kv_cache: String,
    /// Version of this program.
    pub(crate) version: &'static str,
    /// Commit it was built from; empty if unknown.
    pub(crate) commit: &'static str,
    /// UTC, `2026-01-31T12:00:00Z`.
    pub(crate) date: String,
    /// The system's load average of the minute before, where it tells.
    pub(crate) load_average: Option<f64>,
}

/// The model in place on one number of threads.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Run {
    pub(crate) threads: usize,
    pub(crate) kernel: String,
    /// What the threads read from memory at most, 10⁹ bytes a second.
    pub(crate) read_gb_per_s: f64,
    /// What they multiply and accumulate at most, 10⁹ 8-bit integers a second.
    pub(crate) mac_g_per_s: f64,
    /// Seconds until the model was in place.
    pub(crate) load_s: f64,
    /// Seconds until it had computed a first token.
    pub(crate) first_token_s: f64,
    /// Bytes of memory of the process after that.
    pub(crate) resident_bytes: Option<u64>,
    /// The most bytes of memory the process held until the tests were done.
    pub(crate) peak_bytes: Option<u64>,
    /// Bytes of weights on the device.
    pub(crate) weight_bytes: u64,
    /// Of these, bytes every step reads.
    pub(crate) layer_bytes: u64,
    /// Bytes of the head, read where logits are wanted.
    pub(crate) head_bytes: u64,
}

/// The result of a test.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Row {
    pub(crate) test: String,
    pub(crate) threads: usize,
    /// Mean over the repetitions, all sequences together.
    pub(crate) tok_per_s: f64,
    pub(crate) stddev: f64,
    pub(crate) samples: Vec<f64>,
    /// `tok_per_s / limit_tok_per_s`
    pub(crate) share_of_limit: f64,
    /// What the machine would reach at best.
    pub(crate) limit_tok_per_s: f64,
    /// What bounds that: `memory` or `arithmetic`.
    pub(crate) limited_by: &'static str,
    /// Weights and KV cache read for each token, at least.
    pub(crate) bytes_per_token: f64,
    /// Ternary multiply-accumulates for each token.
    pub(crate) macs_per_token: f64,
    /// Milliseconds from the start of the prompt to its logits (prompts only).
    pub(crate) ttft_ms: Option<f64>,
    /// Median and 99th percentile of the time of a step, milliseconds.
    pub(crate) step_p50_ms: f64,
    pub(crate) step_p99_ms: f64,
    pub(crate) sequences: usize,
    pub(crate) depth: usize,
    /// Processors other programs kept busy meanwhile, where the system tells.
    pub(crate) other_load: Option<f64>,
    /// Hash of the last logits.
    pub(crate) fingerprint: String,
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} on {} threads", self.test, self.threads)
    }
}

/// Other work above this many processors makes a result worthless.
const DISTURBED: f64 = 0.1;

impl Record {
    /// Nothing yet, as of now.
    pub(crate) fn start() -> Self {
        Self {
            results: Vec::new(),
            runs: Vec::new(),
            model: String::new(),
            parameters: 0,
            cpu: String::new(),
            kv_cache: String::new(),
            version: env!("CARGO_PKG_VERSION"),
            commit: env!("BITNET_COMMIT"),
            date: utc(SystemTime::now()),
            load_average: process::load_average(),
        }
    }

    /// Whether nothing has been measured yet.
    pub(crate) fn is_empty(&self) -> bool {
        self.results.is_empty()
    }

    /// Notes what is measured.
    pub(crate) fn describe(&mut self, bench: &Bench, kv: KvArg) {
        self.model.clone_from(&bench.config().name);
        self.parameters = bench.total_weights();
        self.cpu = bench.device().hardware;
        self.kv_cache = format!("{kv:?}").to_lowercase();
    }

    /// Adds the results of one number of threads.
    pub(crate) fn add(&mut self, mut run: Run, limits: Limits, measurements: &[Measurement]) {
        run.read_gb_per_s = limits.bytes_per_second / 1e9;
        run.mac_g_per_s = limits.macs_per_second / 1e9;
        let threads = run.threads;
        self.results.extend(measurements.iter().map(|m| Row::new(m, threads, &limits)));
        self.runs.push(run);
    }

    /// Results measured while the machine did other work.
    pub(crate) fn disturbed(&self) -> impl Iterator<Item = &Row> {
        self.results.iter().filter(|row| row.other_load.is_some_and(|load| load > DISTURBED))
    }

    /// Two results of the same test that do not agree, if there are any: results must not depend on
    /// the number of threads.
    pub(crate) fn contradiction(&self) -> Option<(&Row, &Row)> {
        self.results.iter().enumerate().find_map(|(i, a)| {
            let differs = |b: &&Row| b.test == a.test && b.fingerprint != a.fingerprint;
            self.results[i + 1..].iter().find(differs).map(|b| (a, b))
        })
    }
}

impl Run {
    /// What there is to say of a model in place; limits come later.
    pub(crate) fn new(bench: &Bench, peak_bytes: Option<u64>) -> Self {
        let (device, loading, cost) = (bench.device(), bench.loading(), bench.step_cost());
        Self {
            threads: device.threads,
            kernel: device.kernel,
            read_gb_per_s: 0.0,
            mac_g_per_s: 0.0,
            load_s: loading.load.as_secs_f64(),
            first_token_s: loading.first_token.as_secs_f64(),
            resident_bytes: loading.resident_bytes,
            peak_bytes,
            weight_bytes: bench.memory().weights,
            layer_bytes: cost.layer_bytes,
            head_bytes: bench.head_bytes(),
        }
    }
}

impl Row {
    fn new(measured: &Measurement, threads: usize, limits: &Limits) -> Self {
        let (limit, bound) = measured.limit(limits);
        let rate = measured.tokens_per_second.mean();
        let n_tokens = measured.test.n_tokens() as f64;
        let ms = |percent| measured.step.percentile(percent).as_secs_f64() * 1e3;
        let is_prompt = matches!(measured.test, bitnet_inference::bench::Test::Prefill { .. });
        Self {
            test: measured.test.to_string(),
            threads,
            tok_per_s: rate,
            stddev: measured.tokens_per_second.deviation(),
            samples: measured.tokens_per_second.values().to_vec(),
            share_of_limit: rate / limit,
            limit_tok_per_s: limit,
            limited_by: match bound {
                Bound::Memory => "memory",
                Bound::Arithmetic => "arithmetic",
            },
            bytes_per_token: measured.bytes_read as f64 / n_tokens,
            macs_per_token: measured.ternary_macs as f64 / n_tokens,
            ttft_ms: is_prompt.then(|| n_tokens / rate * 1e3),
            step_p50_ms: ms(50.0),
            step_p99_ms: ms(99.0),
            sequences: measured.test.n_sequences(),
            depth: measured.test.depth(),
            other_load: measured.other_load,
            fingerprint: format!("{:016x}", measured.fingerprint),
        }
    }
}

/// A time as `2026-01-31T12:00:00Z`.
pub(crate) fn utc(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Years that start in March put the leap day at their end; an era of 400 of them has 146,097
    // days, whatever its beginning.
    let days = days + 719_468; // from 0000-03-01 to 1970-01-01
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::time::Duration;

    /// A record as two thread counts would leave it.
    pub(crate) fn example() -> Record {
        let row = |test: &str, threads, rate: f64, limit: f64, fingerprint: &str| Row {
            test: test.into(),
            threads,
            tok_per_s: rate,
            stddev: 0.25,
            samples: vec![rate],
            share_of_limit: rate / limit,
            limit_tok_per_s: limit,
            limited_by: if test.starts_with("pp") { "arithmetic" } else { "memory" },
            bytes_per_token: 521e6,
            macs_per_token: 2.084e9,
            ttft_ms: test.starts_with("pp").then_some(4266.667),
            step_p50_ms: 20.0,
            step_p99_ms: 25.5,
            sequences: 1,
            depth: 0,
            other_load: Some(0.01),
            fingerprint: fingerprint.into(),
        };
        let run = |threads, read_gb_per_s| Run {
            threads,
            kernel: "avx2".into(),
            read_gb_per_s,
            mac_g_per_s: 234.0,
            load_s: 1.5,
            first_token_s: 1.75,
            resident_bytes: Some(1_000_000_000),
            peak_bytes: None,
            weight_bytes: 1_177_000_000,
            layer_bytes: 521_000_000,
            head_bytes: 656_000_000,
        };
        Record {
            results: vec![
                row("pp512", 1, 120.0, 240.0, "a"),
                row("tg128", 1, 40.0, 50.0, "b"),
                row("tg128", 2, 70.0, 100.0, "b"),
            ],
            runs: vec![run(1, 31.0), run(2, 62.0)],
            model: "synthetic 2b4t".into(),
            parameters: 2_412_819_200,
            cpu: "A CPU, \"fast\"".into(),
            kv_cache: "f16".into(),
            version: "0.1.0",
            commit: "0123456789",
            date: utc(UNIX_EPOCH),
            load_average: None,
        }
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        let date = |seconds| utc(UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(date(0), "1970-01-01T00:00:00Z");
        assert_eq!(date(951_782_399), "2000-02-28T23:59:59Z");
        assert_eq!(date(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(date(1_709_251_200), "2024-03-01T00:00:00Z");
        assert_eq!(date(4_107_542_400), "2100-03-01T00:00:00Z");
    }

    #[test]
    fn results_that_contradict_each_other_are_found() {
        let mut record = example();
        assert!(record.contradiction().is_none());
        record.results[2].fingerprint = "c".into();
        let (a, b) = record.contradiction().unwrap();
        assert_eq!((a.threads, b.threads), (1, 2));
        assert_eq!(record.disturbed().count(), 0);
        record.results[1].other_load = Some(0.5);
        assert_eq!(
            record.disturbed().map(Row::to_string).collect::<Vec<_>>(),
            ["tg128 on 1 threads"]
        );
    }
}
