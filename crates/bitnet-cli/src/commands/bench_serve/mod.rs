//! `bitnet bench-serve`: how fast a server answers, as its clients see it.

mod client;
mod dataset;
mod load;
mod report;

use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, ValueEnum};

use crate::exit::{Outcome, Usage};
use crate::term::{Term, Unit};
use client::{Endpoint, Target};
use dataset::{Dataset, Shape};
use load::Load;
use report::{Report, Slo};

const EXAMPLES: &str = "\
Examples:
  bitnet bench-serve                                       one request after another
  bitnet bench-serve -c 1,4,16 -n 200                      so many at a time, each a run of its own
  bitnet bench-serve --rate 2,4 --slo ttft=2000,tpot=100   Poisson arrivals a second, and goodput
  bitnet bench-serve --dataset prompts.jsonl --json > record.json

Measures any server that speaks OpenAI's wire format; start one with `bitnet serve`. Times are the
client's. TTFT: from before the connection is made to the first text. ITL: every gap between pieces of
text, of all requests together. E2E: to the last piece. TPOT: (E2E - TTFT) / (tokens - 1) of each request
with two tokens or more. Goodput: requests a second that keep all of --slo. Percentiles are nearest ranks.";

/// Each load is a run of its own, after a warm-up.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct BenchServeArgs {
    /// Address of the server, http only
    #[arg(long, env = "BITNET_URL", value_name = "URL", default_value = "http://127.0.0.1:8080")]
    url: String,
    /// The server's key
    #[arg(long, env = "BITNET_API_KEY", hide_env_values = true, value_name = "KEY")]
    api_key: Option<String>,
    /// Name of the model [default: the first the server has]
    #[arg(short, long, value_name = "NAME")]
    model: Option<String>,
    /// Which route answers
    #[arg(long, value_enum, default_value = "chat")]
    endpoint: Endpoint,
    /// Requests in each run
    #[arg(short = 'n', long, value_name = "N", default_value_t = 50)]
    requests: usize,
    /// Closed loop: so many requests at a time, the next when one has ended
    #[arg(
        short,
        long,
        value_name = "N,…",
        value_delimiter = ',',
        default_value = "1",
        conflicts_with = "rate"
    )]
    concurrency: Vec<usize>,
    /// Open loop: so many requests a second, at random times (Poisson), however many are open
    #[arg(short, long, value_name = "R,…", value_delimiter = ',')]
    rate: Vec<f64>,
    /// Requests before each run that are not counted
    #[arg(long, value_name = "N", default_value_t = 1)]
    warmup: usize,
    /// Seconds after which a request has failed
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    timeout: u64,
    /// Prompts from a file, one JSON object a line: {"prompt": …} or {"messages": […]}, and max_tokens
    /// if it differs
    #[arg(long, value_name = "FILE", conflicts_with_all = ["words", "shared_words"])]
    dataset: Option<PathBuf>,
    /// Random words in each prompt; the report says how many tokens they were
    #[arg(long, value_name = "N", default_value_t = 64)]
    words: usize,
    /// The same random words before those, in all prompts
    #[arg(long, value_name = "N", default_value_t = 0)]
    shared_words: usize,
    /// Tokens in each answer
    #[arg(short, long, value_name = "N", default_value_t = 64)]
    tokens: u32,
    /// How far lengths of prompts and answers differ: 0.5 is from half to one and a half times
    #[arg(long, value_name = "FRACTION", default_value_t = 0.0)]
    spread: f64,
    /// Let the model end its answers earlier; other servers may not know the field that forbids it
    #[arg(long)]
    may_stop: bool,
    /// Temperature of the answers [default: the server's]
    #[arg(long, value_name = "T")]
    temperature: Option<f64>,
    /// Seed of prompts, lengths and arrival times
    #[arg(long, value_name = "SEED", default_value_t = 1)]
    seed: u64,
    /// What a good request keeps, in milliseconds: ttft, tpot, e2e
    #[arg(long, value_name = "NAME=MS,…", value_delimiter = ',')]
    slo: Vec<Slo>,
    /// How results are printed
    #[arg(short = 'f', long, value_enum, value_name = "FORMAT", default_value = "table")]
    output: Format,
    /// The same as --output json
    #[arg(long, conflicts_with = "output")]
    json: bool,
}

/// Output formats.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    Table,
    Json,
}

impl BenchServeArgs {
    fn loads(&self) -> anyhow::Result<Vec<Load>> {
        if self.requests == 0 {
            return Err(Usage::error("--requests: expected at least 1, got 0"));
        }
        if self.rate.is_empty() {
            if self.concurrency.contains(&0) {
                return Err(Usage::error("--concurrency: expected at least 1, got 0"));
            }
            return Ok(self.concurrency.iter().copied().map(Load::Closed).collect());
        }
        match self.rate.iter().find(|&&rate| !(rate > 0.0 && rate.is_finite())) {
            Some(rate) => {
                Err(Usage::error(format!("--rate: expected a number above 0, got {rate}")))
            }
            None => Ok(self.rate.iter().copied().map(Load::Poisson).collect()),
        }
    }

    fn dataset(&self, model: &str) -> anyhow::Result<Dataset> {
        if !(0.0..=1.0).contains(&self.spread) {
            return Err(Usage::error(format!("--spread: expected 0 to 1, got {}", self.spread)));
        }
        let shape = Shape {
            model: model.to_owned(),
            endpoint: self.endpoint,
            words: self.words,
            shared_words: self.shared_words,
            tokens: self.tokens,
            spread: self.spread,
            may_stop: self.may_stop,
            temperature: self.temperature,
            seed: self.seed,
        };
        match &self.dataset {
            Some(path) => Dataset::read(path, shape),
            None => Ok(Dataset::synthetic(shape)),
        }
    }
}

/// Runs every load and prints what came out.
pub(crate) fn run(args: BenchServeArgs, term: &Term) -> anyhow::Result<Outcome> {
    let loads = args.loads()?;
    let target = Arc::new(Target::parse(
        &args.url,
        args.api_key.clone(),
        args.endpoint,
        Duration::from_secs(args.timeout),
    )?);
    // One thread: the server should have the others.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the client's thread")?;
    let model = match &args.model {
        Some(name) => name.clone(),
        None => runtime.block_on(client::first_model(&target))?,
    };
    let dataset = args.dataset(&model)?;
    let mut report = Report::new(&target, &model, &dataset, args.slo.clone());
    let mut outcome = Outcome::Done;
    for load in loads {
        let bar = term.bar(&load.to_string(), args.requests as u64, Unit::Items);
        let plan =
            load::Plan { load, requests: args.requests, warmup: args.warmup, seed: args.seed };
        let run = runtime.block_on(load::run(&target, &dataset, plan, &mut |tokens_per_second| {
            bar.inc(1);
            bar.set_message(format!("{} tok/s", crate::term::rate(tokens_per_second)));
        }));
        bar.finish_and_clear();
        let run = run?;
        let interrupted = run.interrupted;
        report.add(load, &run);
        if interrupted {
            term.warn("interrupted: these are the requests that had ended");
            outcome = Outcome::Interrupted;
            break;
        }
    }
    let mut out = io::stdout().lock();
    match args.json || args.output == Format::Json {
        true => report.json(&mut out)?,
        false => report.table(&mut out)?,
    }
    out.flush()?;
    if report.all_failed() {
        anyhow::bail!("no request was answered");
    }
    Ok(outcome)
}
