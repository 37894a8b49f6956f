//! `bitnet batch`: answers a file of requests in OpenAI's batch format.
//!
//! Answers are written in the order of the requests, so the output itself says how far a batch has
//! come: run again, it goes on behind the last whole line. Memory holds the requests in work only.

mod files;

use std::collections::VecDeque;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use bitnet_inference::{InferenceEngine, MemorySize};
use bitnet_server::{AppState, BatchAnswer, BatchLines, ServerConfig};
use clap::Args;
use indicatif::ProgressBar;
use tokio::task::JoinHandle;

use crate::commands::serve;
use crate::exit::{Outcome, Usage};
use crate::flags::{EngineArgs, as_usage};
use crate::term::{Term, Unit, count, duration, rate};
use files::{Line, Lines, Output};

const EXAMPLES: &str = "\
Examples:
  bitnet batch in.jsonl out.jsonl
  bitnet batch in.jsonl out.jsonl -m chat=model.gguf --parallel 32

A line of the input is a request, such as
  {\"custom_id\":\"1\",\"method\":\"POST\",\"url\":\"/v1/completions\",
   \"body\":{\"model\":\"builtin\",\"prompt\":\"Once upon a time\",\"max_tokens\":20}}
(on one line); urls are /v1/chat/completions, /v1/completions, /v1/embeddings, /v1/responses. Answers
come in the order of the requests. After Ctrl-C the same command goes on where it stopped.";

/// Requests in work for each sequence that runs: while one answer holds the order up, others go on.
const AHEAD: usize = 4;
/// Sequences that may wait in the engine: those of all requests in work, each with many choices.
const MAX_WAITING: usize = 1 << 16;

/// Arguments of `bitnet batch`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct BatchArgs {
    /// The requests, one a line
    input: PathBuf,
    /// Where answers go; what it holds already is kept and not asked again
    output: PathBuf,
    /// A model to answer with, by the name requests call it; repeat for several [default: builtin]
    #[arg(short, long = "model", env = "BITNET_MODEL", value_name = "[NAME=]MODEL")]
    models: Vec<String>,
    /// Sequences computed together
    #[arg(long, env = "BITNET_PARALLEL", value_name = "N", default_value_t = 16)]
    parallel: usize,
    /// Memory for a model's KV cache, in MiB; taken as it fills
    #[arg(long, env = "BITNET_KV_MEMORY", value_name = "MIB", default_value_t = 2048)]
    kv_memory: u64,
    #[command(flatten)]
    engine: EngineArgs,
}

/// Answers every request that has no answer yet.
pub(crate) fn run(args: BatchArgs, term: &Term) -> anyhow::Result<Outcome> {
    let total = files::count_requests(&args.input)?;
    let mut lines = Lines::open(&args.input)?;
    let mut output = Output::open(&args.output)?;
    let mut tally = output.skip_answered(&mut lines)?;
    if tally.answered > 0 {
        let (known, total) = (count(tally.answered), count(total));
        term.note(&format!("{known} of {total} requests are answered already"));
    }
    let lines_of = lines_with(&args, term)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the threads of the batch")?;
    let bar = term.bar("batch", total, Unit::Items);
    bar.set_position(tally.answered);
    let window = args.parallel.saturating_mul(AHEAD).max(1);
    let started = Instant::now();
    let work = answer_all(&lines_of, &mut lines, &mut output, window, &mut tally, &bar);
    let outcome = runtime.block_on(work);
    bar.finish_and_clear();
    // Requests in work are dropped: the engine leaves them before its next step.
    runtime.shutdown_timeout(Duration::from_secs(5));
    let outcome = outcome?;
    let took = started.elapsed();
    term.note(&format!(
        "{} of {} requests answered, {} tokens at {} tok/s in {}",
        count(tally.answered),
        count(total),
        count(tally.tokens),
        rate(tally.tokens as f64 / took.as_secs_f64().max(1e-9)),
        duration(took)
    ));
    if outcome == Outcome::Done && tally.failed > 0 {
        let output = args.output.display();
        bail!("{} requests failed; their lines in {output} say why", count(tally.failed));
    }
    Ok(outcome)
}

fn lines_with(args: &BatchArgs, term: &Term) -> anyhow::Result<BatchLines> {
    let mut engine = args.engine.config(args.parallel);
    engine.memory_pool_size = MemorySize::MB(args.kv_memory);
    engine.max_waiting = MAX_WAITING;
    let mut config = ServerConfig::default();
    if !args.models.is_empty() {
        config.models = args.models.iter().map(|model| serve::named(model)).collect();
    }
    engine.max_cached_models = engine.max_cached_models.max(config.models.len());
    // How many are in work is bounded here, and a batch has the time it takes.
    config.limits.max_requests = MAX_WAITING;
    config.limits.max_requests_per_key = MAX_WAITING;
    config.limits.max_body_bytes = files::MAX_LINE_BYTES;
    config.limits.request_timeout = Duration::from_secs(7 * 24 * 3600);
    let engine = InferenceEngine::with_config(engine).map_err(as_usage)?;
    for warning in engine.warnings() {
        term.warn(warning);
    }
    // A wrong path should end the batch, not fail every line of it.
    engine.load_model_blocking(&config.models[0].1)?;
    let state = AppState::new(engine, config).map_err(|e| Usage::error(e.to_string()))?;
    Ok(BatchLines::new(state))
}

/// Keeps `window` requests in work and writes their answers in order.
async fn answer_all(
    batch: &BatchLines,
    lines: &mut Lines,
    output: &mut Output,
    window: usize,
    tally: &mut files::Tally,
    bar: &ProgressBar,
) -> anyhow::Result<Outcome> {
    let mut stop = std::pin::pin!(tokio::signal::ctrl_c());
    let mut in_work: VecDeque<JoinHandle<BatchAnswer>> = VecDeque::with_capacity(window);
    loop {
        while in_work.len() < window
            && let Some(line) = lines.next_request()?
        {
            let batch = batch.clone();
            in_work.push_back(tokio::spawn(async move {
                match line {
                    Line::Request(line) => batch.answer(&line).await,
                    Line::TooLong => batch.answer(files::TOO_LONG).await,
                }
            }));
        }
        let Some(next) = in_work.front_mut() else { return Ok(Outcome::Done) };
        let answer = tokio::select! {
            biased;
            _ = &mut stop => {
                in_work.iter().for_each(JoinHandle::abort);
                return Ok(Outcome::Interrupted);
            }
            answer = next => answer.context("a request's task failed")?,
        };
        in_work.pop_front();
        output.write(&answer.line)?;
        tally.answered += 1;
        tally.failed += u64::from(!answer.is_success);
        tally.tokens += answer.completion_tokens;
        bar.set_position(tally.answered);
        if tally.failed > 0 {
            bar.set_message(format!("{} failed", count(tally.failed)));
        }
    }
}
