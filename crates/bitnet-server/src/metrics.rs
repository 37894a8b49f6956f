//! What the server measures, in Prometheus text: our names (`bitnet_…`) and vLLM's (`vllm:…`), so that
//! boards and routers made for vLLM read this server too.
//!
//! Each server owns its recorder; nothing is global. Buckets are set for CPUs: first tokens from a
//! millisecond (the built-in model) to minutes (a long prompt on two cores). Formulas: TTFT runs from
//! the arrival of the request's head to its first token, waiting included; ITL is each gap between
//! tokens of one sequence; TPOT is `(last - first token) / (tokens - 1)` of a sequence; queue, prefill
//! and decode times are the engine's own.

use std::time::{Duration, Instant, SystemTime};

use bitnet_inference::{ModelStats, Usage};
use metrics::{Counter, Gauge, Histogram, Key, Label, Level, Metadata, Recorder, Unit};
use metrics_exporter_prometheus::{
    Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder,
};

static METADATA: Metadata<'static> = Metadata::new("bitnet_server", Level::INFO, None);

/// Seconds, for whole requests and first tokens.
const REQUEST_SECONDS: [f64; 16] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
];
/// Seconds, between two tokens.
const TOKEN_SECONDS: [f64; 14] =
    [0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 5.0];
const TOKENS: [f64; 13] =
    [1.0, 4.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 16384.0, 131_072.0];

/// A histogram under our name and under vLLM's.
struct Timed {
    bitnet: &'static str,
    vllm: &'static str,
    help: &'static str,
    buckets: &'static [f64],
    unit: Unit,
}

const TTFT: Timed = Timed {
    bitnet: "bitnet_time_to_first_token_seconds",
    vllm: "vllm:time_to_first_token_seconds",
    help: "From the arrival of a request to its first token, waiting included.",
    buckets: &REQUEST_SECONDS,
    unit: Unit::Seconds,
};
const ITL: Timed = Timed {
    bitnet: "bitnet_inter_token_latency_seconds",
    vllm: "vllm:inter_token_latency_seconds",
    help: "Gaps between successive tokens of a sequence.",
    buckets: &TOKEN_SECONDS,
    unit: Unit::Seconds,
};
const TPOT: Timed = Timed {
    bitnet: "bitnet_time_per_output_token_seconds",
    vllm: "vllm:request_time_per_output_token_seconds",
    help: "Per sequence: time from first to last token over tokens less one.",
    buckets: &TOKEN_SECONDS,
    unit: Unit::Seconds,
};
const E2E: Timed = Timed {
    bitnet: "bitnet_request_seconds",
    vllm: "vllm:e2e_request_latency_seconds",
    help: "From the arrival of a request to the last token of a sequence.",
    buckets: &REQUEST_SECONDS,
    unit: Unit::Seconds,
};
const QUEUE: Timed = Timed {
    bitnet: "bitnet_request_queue_seconds",
    vllm: "vllm:request_queue_time_seconds",
    help: "From submission to a sequence's first step.",
    buckets: &REQUEST_SECONDS,
    unit: Unit::Seconds,
};
const PREFILL: Timed = Timed {
    bitnet: "bitnet_request_prefill_seconds",
    vllm: "vllm:request_prefill_time_seconds",
    help: "From a sequence's first step to its first token.",
    buckets: &REQUEST_SECONDS,
    unit: Unit::Seconds,
};
const DECODE: Timed = Timed {
    bitnet: "bitnet_request_decode_seconds",
    vllm: "vllm:request_decode_time_seconds",
    help: "From a sequence's first token to its last.",
    buckets: &REQUEST_SECONDS,
    unit: Unit::Seconds,
};
const PROMPT_SIZE: Timed = Timed {
    bitnet: "bitnet_request_prompt_tokens",
    vllm: "vllm:request_prompt_tokens",
    help: "Prompt tokens of a sequence.",
    buckets: &TOKENS,
    unit: Unit::Count,
};
const ANSWER_SIZE: Timed = Timed {
    bitnet: "bitnet_request_generation_tokens",
    vllm: "vllm:request_generation_tokens",
    help: "Generated tokens of a sequence.",
    buckets: &TOKENS,
    unit: Unit::Count,
};
const HISTOGRAMS: [&Timed; 9] =
    [&TTFT, &ITL, &TPOT, &E2E, &QUEUE, &PREFILL, &DECODE, &PROMPT_SIZE, &ANSWER_SIZE];

const HTTP_SECONDS: &str = "bitnet_http_request_seconds";

const COUNTERS: [(&str, &str); 14] = [
    ("bitnet_http_requests_total", "HTTP requests by method, route and status."),
    ("bitnet_rejections_total", "Requests refused, by reason."),
    ("vllm:admission_rejections_total", "Requests refused, by reason."),
    ("bitnet_prompt_tokens_total", "Prompt tokens of finished sequences."),
    ("vllm:prompt_tokens_total", "Prompt tokens of finished sequences."),
    ("bitnet_generation_tokens_total", "Tokens generated."),
    ("vllm:generation_tokens_total", "Tokens generated."),
    ("bitnet_prefix_cache_queried_tokens_total", "Prompt tokens looked up in the prefix cache."),
    ("vllm:prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache."),
    ("bitnet_prefix_cache_hit_tokens_total", "Prompt tokens found in the prefix cache."),
    ("vllm:prefix_cache_hits_total", "Prompt tokens found in the prefix cache."),
    ("bitnet_sequences_total", "Sequences ended, by reason."),
    ("vllm:request_success_total", "Sequences ended by themselves, by reason."),
    ("vllm:num_preemptions_total", "Times a sequence gave its memory back to another."),
];

const GAUGES: [(&str, &str); 17] = [
    ("bitnet_requests_in_flight", "Requests admitted and not finished."),
    ("bitnet_sequences_running", "Sequences in the model's running set."),
    ("vllm:num_requests_running", "Sequences in the model's running set."),
    ("bitnet_sequences_waiting", "Sequences that wait for the running set."),
    ("vllm:num_requests_waiting", "Sequences that wait for the running set."),
    ("bitnet_kv_cache_usage_ratio", "Blocks of the KV cache in use by sequences, 0 to 1."),
    ("vllm:kv_cache_usage_perc", "Blocks of the KV cache in use by sequences, 0 to 1."),
    ("vllm:cache_config_info", "Shape of the KV cache."),
    ("bitnet_model_loaded", "1 for each model in memory."),
    ("bitnet_model_weight_bytes", "Bytes of weights on the device."),
    ("bitnet_model_kv_cache_bytes", "Bytes of the KV cache when full."),
    ("bitnet_build_info", "Version of this server."),
    ("process_resident_memory_bytes", "Memory of this process."),
    ("process_cpu_seconds_total", "CPU time of this process."),
    ("process_open_fds", "Open file descriptors."),
    ("process_threads", "Threads of this process."),
    ("process_start_time_seconds", "Start of this process, in seconds since 1970."),
];

/// The measurements of one server.
pub(crate) struct Metrics {
    recorder: PrometheusRecorder,
    handle: PrometheusHandle,
    in_flight: Gauge,
}

/// The handles of one model, looked up once a request.
pub(crate) struct ModelMetrics {
    ttft: [Histogram; 2],
    itl: [Histogram; 2],
    generated: [Counter; 2],
}

impl Metrics {
    /// A recorder with all names described and all buckets set.
    pub(crate) fn new() -> Self {
        let mut builder = PrometheusBuilder::new();
        for timed in HISTOGRAMS {
            for name in [timed.bitnet, timed.vllm] {
                builder = with_buckets(builder, name, timed.buckets);
            }
        }
        builder = with_buckets(builder, HTTP_SECONDS, &REQUEST_SECONDS);
        let recorder = builder.build_recorder();
        for timed in HISTOGRAMS {
            for name in [timed.bitnet, timed.vllm] {
                recorder.describe_histogram(name.into(), Some(timed.unit), timed.help.into());
            }
        }
        let help = "Time to the head of a response.";
        recorder.describe_histogram(HTTP_SECONDS.into(), Some(Unit::Seconds), help.into());
        for (name, help) in COUNTERS {
            recorder.describe_counter(name.into(), None, help.into());
        }
        for (name, help) in GAUGES {
            recorder.describe_gauge(name.into(), None, help.into());
        }
        let handle = recorder.handle();
        let in_flight = recorder.register_gauge(&"bitnet_requests_in_flight".into(), &METADATA);
        in_flight.set(0.0);
        let metrics = Self { recorder, handle, in_flight };
        metrics.gauge("bitnet_build_info", &[("version", env!("CARGO_PKG_VERSION"))]).set(1.0);
        metrics.gauge("process_start_time_seconds", &[]).set(seconds_since_1970());
        metrics
    }

    fn key(name: &'static str, labels: &[(&'static str, &str)]) -> Key {
        let labels = labels.iter().map(|&(name, value)| Label::new(name, value.to_owned()));
        Key::from_parts(name, labels.collect::<Vec<_>>())
    }

    fn counter(&self, name: &'static str, labels: &[(&'static str, &str)]) -> Counter {
        self.recorder.register_counter(&Self::key(name, labels), &METADATA)
    }

    fn gauge(&self, name: &'static str, labels: &[(&'static str, &str)]) -> Gauge {
        self.recorder.register_gauge(&Self::key(name, labels), &METADATA)
    }

    fn histogram(&self, name: &'static str, labels: &[(&'static str, &str)]) -> Histogram {
        self.recorder.register_histogram(&Self::key(name, labels), &METADATA)
    }

    fn timed(&self, timed: &Timed, model: &str) -> [Histogram; 2] {
        [timed.bitnet, timed.vllm].map(|name| self.histogram(name, &[("model_name", model)]))
    }

    /// Counts a response. `route` is the pattern that matched, so that clients cannot make names.
    pub(crate) fn http(&self, method: &str, route: &str, status: u16, took: Duration) {
        let status = status.to_string();
        let labels = [("method", method), ("route", route), ("status", &status)];
        self.counter("bitnet_http_requests_total", &labels).increment(1);
        self.histogram(HTTP_SECONDS, &[("route", route)]).record(took);
    }

    /// Counts a request that was not admitted.
    pub(crate) fn rejected(&self, reason: &'static str) {
        for name in ["bitnet_rejections_total", "vllm:admission_rejections_total"] {
            self.counter(name, &[("reason", reason)]).increment(1);
        }
    }

    /// A request enters (`1`) or leaves (`-1`).
    pub(crate) fn in_flight(&self, change: f64) {
        self.in_flight.increment(change);
    }

    pub(crate) fn of_model(&self, model: &str) -> ModelMetrics {
        let names = ["bitnet_generation_tokens_total", "vllm:generation_tokens_total"];
        ModelMetrics {
            ttft: self.timed(&TTFT, model),
            itl: self.timed(&ITL, model),
            generated: names.map(|name| self.counter(name, &[("model_name", model)])),
        }
    }

    /// Counts a sequence that ended. `reason`: `stop`, `length`, `abort` or `error`; without usage
    /// where the engine did not get to report one.
    pub(crate) fn sequence_ended(
        &self,
        model: &str,
        reason: &'static str,
        took: Duration,
        usage: Option<&Usage>,
    ) {
        let labels = [("model_name", model), ("finished_reason", reason)];
        self.counter("bitnet_sequences_total", &labels).increment(1);
        if matches!(reason, "stop" | "length") {
            self.counter("vllm:request_success_total", &labels).increment(1);
        }
        let Some(usage) = usage else { return };
        let record = |timed: &Timed, value: f64| {
            for histogram in self.timed(timed, model) {
                histogram.record(value);
            }
        };
        record(&E2E, took.as_secs_f64());
        record(&QUEUE, usage.queued.as_secs_f64());
        record(&PREFILL, usage.prefill.as_secs_f64());
        record(&DECODE, usage.decode.as_secs_f64());
        record(&PROMPT_SIZE, usage.prompt_tokens as f64);
        record(&ANSWER_SIZE, usage.completion_tokens as f64);
        if usage.completion_tokens > 1 {
            record(&TPOT, usage.decode.as_secs_f64() / (usage.completion_tokens - 1) as f64);
        }
        let model = [("model_name", model)];
        let (prompt, cached) = (usage.prompt_tokens as u64, usage.cached_tokens as u64);
        for (name, value) in [
            ("bitnet_prompt_tokens_total", prompt),
            ("vllm:prompt_tokens_total", prompt),
            ("bitnet_prefix_cache_queried_tokens_total", prompt),
            ("vllm:prefix_cache_queries_total", prompt),
            ("bitnet_prefix_cache_hit_tokens_total", cached),
            ("vllm:prefix_cache_hits_total", cached),
        ] {
            self.counter(name, &model).increment(value);
        }
    }

    /// Sets the gauges of a model; `None` for one that is not loaded.
    pub(crate) fn model_state(&self, name: &str, state: Option<ModelState>) {
        let model = [("model_name", name)];
        self.gauge("bitnet_model_loaded", &model).set(f64::from(u8::from(state.is_some())));
        let Some(ModelState { stats, block_tokens, weight_bytes, kv_bytes }) = state else {
            return;
        };
        let used = stats.kv_blocks_in_use as f64 / (stats.kv_blocks as f64).max(1.0);
        for (gauge, value) in [
            ("bitnet_sequences_running", stats.running as f64),
            ("vllm:num_requests_running", stats.running as f64),
            ("bitnet_sequences_waiting", stats.waiting as f64),
            ("vllm:num_requests_waiting", stats.waiting as f64),
            ("bitnet_kv_cache_usage_ratio", used),
            ("vllm:kv_cache_usage_perc", used),
            ("bitnet_model_weight_bytes", weight_bytes as f64),
            ("bitnet_model_kv_cache_bytes", kv_bytes as f64),
        ] {
            self.gauge(gauge, &model).set(value);
        }
        self.counter("vllm:num_preemptions_total", &model).absolute(stats.preemptions);
        let (block_size, n_blocks) = (block_tokens.to_string(), stats.kv_blocks.to_string());
        let labels =
            [("model_name", name), ("block_size", &*block_size), ("num_gpu_blocks", &*n_blocks)];
        self.gauge("vllm:cache_config_info", &labels).set(1.0);
    }

    /// Everything, in the text format Prometheus reads.
    pub(crate) fn render(&self) -> String {
        for (name, value) in process_figures() {
            self.gauge(name, &[]).set(value);
        }
        self.handle.render()
    }

    /// Moves what histograms collected into their buckets; called now and then, so that they stay
    /// small even if nobody asks for `/metrics`.
    pub(crate) fn upkeep(&self) {
        self.handle.run_upkeep();
    }
}

/// What a loaded model holds and does.
pub(crate) struct ModelState {
    pub(crate) stats: ModelStats,
    pub(crate) block_tokens: usize,
    pub(crate) weight_bytes: u64,
    pub(crate) kv_bytes: u64,
}

impl ModelMetrics {
    /// Notes a token of a sequence: its first since `arrived`, or the next after `previous`.
    pub(crate) fn token(&self, arrived: Instant, previous: Option<Instant>, now: Instant) {
        let (histograms, from) = match previous {
            None => (&self.ttft, arrived),
            Some(previous) => (&self.itl, previous),
        };
        for histogram in histograms {
            histogram.record(now.duration_since(from));
        }
        for counter in &self.generated {
            counter.increment(1);
        }
    }
}

fn with_buckets(builder: PrometheusBuilder, name: &str, buckets: &[f64]) -> PrometheusBuilder {
    let matcher = Matcher::Full(name.to_owned());
    builder.set_buckets_for_metric(matcher, buckets).expect("the bucket lists are not empty")
}

fn seconds_since_1970() -> f64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

/// Memory, CPU time, descriptors and threads of this process, where `/proc` tells.
fn process_figures() -> Vec<(&'static str, f64)> {
    let mut figures = Vec::new();
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let number = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse::<f64>().ok()
    };
    if let Some(kib) = number("VmRSS:") {
        figures.push(("process_resident_memory_bytes", kib * 1024.0));
    }
    if let Some(threads) = number("Threads:") {
        figures.push(("process_threads", threads));
    }
    if let Ok(entries) = std::fs::read_dir("/proc/self/fd") {
        figures.push(("process_open_fds", entries.count() as f64));
    }
    // Nanoseconds on the CPU come first; unlike /proc/self/stat this needs no clock-tick constant.
    // It counts the main thread only, so the threads are added up.
    if let Ok(tasks) = std::fs::read_dir("/proc/self/task") {
        let nanoseconds = tasks.flatten().filter_map(|task| {
            let text = std::fs::read_to_string(task.path().join("schedstat")).ok()?;
            text.split_whitespace().next()?.parse::<f64>().ok()
        });
        figures.push(("process_cpu_seconds_total", nanoseconds.sum::<f64>() / 1e9));
    }
    figures
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histograms_have_buckets_under_both_names() {
        let metrics = Metrics::new();
        let (start, step) = (Instant::now(), Duration::from_millis(3));
        let model = metrics.of_model("m");
        model.token(start, None, start + step);
        model.token(start, Some(start + step), start + 2 * step);
        let usage = Usage { prompt_tokens: 40, cached_tokens: 32, ..Usage::default() };
        metrics.sequence_ended("m", "stop", step, Some(&usage));
        metrics.rejected("queue_full");
        let text = metrics.render();
        for line in [
            "bitnet_time_to_first_token_seconds_bucket{model_name=\"m\",le=\"0.005\"} 1",
            "vllm:time_to_first_token_seconds_bucket{model_name=\"m\",le=\"0.0025\"} 0",
            "vllm:inter_token_latency_seconds_count{model_name=\"m\"} 1",
            "vllm:generation_tokens_total{model_name=\"m\"} 2",
            "vllm:prefix_cache_hits_total{model_name=\"m\"} 32",
            "vllm:request_success_total{model_name=\"m\",finished_reason=\"stop\"} 1",
            "vllm:admission_rejections_total{reason=\"queue_full\"} 1",
            "bitnet_requests_in_flight 0",
        ] {
            assert!(text.lines().any(|l| l == line), "no line {line} in\n{text}");
        }
    }

    #[test]
    fn two_servers_do_not_share_counts() {
        let (one, other) = (Metrics::new(), Metrics::new());
        one.rejected("queue_full");
        assert!(!other.render().contains("queue_full"));
    }
}
