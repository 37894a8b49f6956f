//! `bitnet bench --small`: work whose cost is not in its bytes.

use std::io::{self, Write};
use std::time::SystemTime;

use bitnet_inference::bench::{Latency, products_per_second};
use bitnet_inference::{BUILTIN_MODEL, EngineConfig, InferenceEngine, InferenceInput};
use serde_json::json;

use super::record::utc;
use super::{BenchArgs, Format};
use crate::exit::{Outcome, Usage};
use crate::term::{Term, count};

/// Rows and columns of the layer.
const SIZE: usize = 256;
/// Tokens generated with the built-in model.
const TOKENS: usize = 1000;
/// The prompt before them.
const PROMPT: &str = "Once upon a time";

/// Measures and prints.
pub(crate) fn run(args: &BenchArgs, term: &Term) -> anyhow::Result<Outcome> {
    if matches!(args.format(), Format::Csv | Format::Markdown) {
        return Err(Usage::error("--small prints a table or json"));
    }
    let [threads] = args.thread_counts()[..] else {
        return Err(Usage::error("--small measures one number of threads at a time"));
    };
    term.detail("measuring products on one thread");
    let products = products_per_second(SIZE, args.kernel.as_deref(), args.repetitions)?;

    term.detail("measuring the built-in model");
    let config = EngineConfig {
        threads,
        kernel: args.kernel.clone(),
        kv_type: args.kv.into(),
        ..EngineConfig::balanced()
    };
    let engine = InferenceEngine::with_config(config)?;
    let model = engine.load_model_blocking(BUILTIN_MODEL)?;
    let report = engine.benchmark_model_blocking(&model, &InferenceInput::from(PROMPT), TOKENS)?;

    let mut out = io::stdout().lock();
    let device = &report.device;
    if args.format() == Format::Json {
        let ms = |latency: &Latency, percent| latency.percentile(percent).as_secs_f64() * 1e3;
        let value = json!({
            "results": [
                {
                    "test": format!("product {SIZE}x{SIZE}"),
                    "threads": 1,
                    "ops_per_s": products.mean(),
                    "stddev": products.deviation(),
                    "samples": products.values(),
                },
                {
                    "test": format!("engine {BUILTIN_MODEL}"),
                    "threads": device.threads,
                    "tok_per_s": report.decode_tokens_per_second,
                    "token_p50_ms": ms(&report.token_latency, 50.0),
                    "token_p95_ms": ms(&report.token_latency, 95.0),
                    "token_p99_ms": ms(&report.token_latency, 99.0),
                    "ttft_p50_ms": ms(&report.time_to_first_token, 50.0),
                    "resident_bytes": report.resident_bytes,
                },
            ],
            "cpu": device.hardware,
            "kernel": device.kernel,
            "version": env!("CARGO_PKG_VERSION"),
            "commit": env!("BITNET_COMMIT"),
            "date": utc(SystemTime::now()),
        });
        serde_json::to_writer_pretty(&mut out, &value)?;
        writeln!(out)?;
    } else {
        writeln!(
            out,
            "Products of {SIZE}×{SIZE}, 1 thread: {} ± {} a second ({}, {})\n",
            count(products.mean() as u64),
            count(products.deviation() as u64),
            device.kernel,
            device.hardware,
        )?;
        writeln!(out, "{}", report.display())?;
    }
    out.flush()?;
    Ok(Outcome::Done)
}
