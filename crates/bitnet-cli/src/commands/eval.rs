//! `bitnet eval`: perplexity and bits per byte of a text.

use std::io::{self, Write};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Instant;

use bitnet_inference::InferenceError;
use bitnet_inference::eval::{EvalMode, EvalOptions, Evaluation, evaluate};
use clap::{Args, ValueEnum};
use serde_json::json;

use crate::exit::{Outcome, Usage};
use crate::files::read_text;
use crate::flags::{EngineArgs, ModelArg};
use crate::interrupt::Interrupt;
use crate::report;
use crate::term::{Style, Term, Unit, counted, duration, rate};

const EXAMPLES: &str = "\
Examples:
  bitnet eval book.txt
  bitnet eval wiki.test.raw -m model.gguf --window 2048
  bitnet eval book.txt --mode full --window 256 --max-chars 40000 --json

Modes, for windows of N tokens:
  half     what llama-perplexity does: windows side by side; the tokens after position N/2 count
  full     every token but the first counts once; a window begins with the last of the one before
  sliding  a window begins every --stride tokens, and its last --stride tokens count
Only full counts the end of a text that no whole window holds. Where the model starts prompts with
a BOS token, it replaces the first token of every window. Bits per byte compares models whose
tokenizers differ; perplexity does not.";

/// Arguments of `bitnet eval`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct EvalArgs {
    /// Text file; '-' for standard input
    text: PathBuf,
    #[command(flatten)]
    model: ModelArg,
    /// Tokens in a window [default: 512, or the context if that is shorter]
    #[arg(short, long, value_name = "N")]
    window: Option<usize>,
    /// Which tokens of a window count
    #[arg(long, value_enum, default_value = "half")]
    mode: Mode,
    /// Tokens from one window to the next [default: half a window]
    #[arg(long, value_name = "N")]
    stride: Option<usize>,
    /// Read only this many characters of the text
    #[arg(long, value_name = "N")]
    max_chars: Option<usize>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    engine: EngineArgs,
}

/// Which tokens of a window count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Mode {
    Half,
    Full,
    Sliding,
}

/// Reads the text, measures, prints.
pub(crate) fn run(args: EvalArgs, term: &Term) -> anyhow::Result<Outcome> {
    if args.stride.is_some() && args.mode != Mode::Sliding {
        return Err(Usage::error("--stride belongs to --mode sliding"));
    }
    let text = read(&args)?;
    let interrupt = Interrupt::install()?;
    let (engine, model) = args.engine.load(&args.model.model, term)?;
    let window = args.window.unwrap_or(512.min(model.context_length()));
    let mode = match args.mode {
        Mode::Half => EvalMode::SecondHalf,
        Mode::Full => EvalMode::Full,
        Mode::Sliding => EvalMode::Sliding { stride: args.stride.unwrap_or(window / 2) },
    };
    let options = EvalOptions { window: args.window, mode };

    let known = model.warnings().len();
    let caught = interrupt.catch();
    let started = Instant::now();
    let mut bar = None;
    let found = evaluate(&engine, &model, &text, &options, &mut |found| {
        let bar =
            bar.get_or_insert_with(|| term.bar("evaluating", found.windows as u64, Unit::Items));
        bar.set_position(found.windows_done as u64);
        bar.set_message(format!("perplexity {:.4}", found.perplexity()));
        if caught.raised() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    let found = found.map_err(|error| match error {
        InferenceError::Input { .. } => Usage::error(error.to_string()),
        other => other.into(),
    })?;

    report::moved(&model, known, term);
    print(&args, &found, term)?;
    let seconds = started.elapsed();
    let fed = (found.window * found.windows_done) as f64;
    term.note(&format!(
        "{} of {} in {} ({} tok/s)",
        found.windows_done,
        counted(found.windows as u64, "window"),
        duration(seconds),
        rate(fed / seconds.as_secs_f64()),
    ));
    Ok(if found.windows_done < found.windows { Outcome::Interrupted } else { Outcome::Done })
}

fn read(args: &EvalArgs) -> anyhow::Result<String> {
    let mut text = read_text(&args.text)?;
    if let Some((at, _)) = args.max_chars.and_then(|n| text.char_indices().nth(n)) {
        text.truncate(at);
    }
    match text.is_empty() {
        true => Err(Usage::error(format!("{}: expected some text, got none", args.text.display()))),
        false => Ok(text),
    }
}

fn print(args: &EvalArgs, found: &Evaluation, term: &Term) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    if args.json {
        let json = json!({
            "bits_per_byte": found.bits_per_byte(),
            "perplexity": found.perplexity(),
            "perplexity_error": found.perplexity_error(),
            "nats_per_token": found.nats_per_token(),
            "tokens": found.tokens,
            "bytes": found.bytes,
            "window": found.window,
            "windows": found.windows_done,
            "mode": args.mode.to_possible_value().map(|value| value.get_name().to_owned()),
        });
        writeln!(out, "{json:#}")?;
    } else {
        let label = |name: &str| term.out(Style::Label, format!("{name:15}"));
        let value = found.perplexity();
        let error =
            found.perplexity_error().map_or(String::new(), |error| format!(" ± {error:.4}"));
        writeln!(out, "{} {value:.4}{error}", label("perplexity"))?;
        writeln!(out, "{} {:.4}", label("bits per byte"), found.bits_per_byte())?;
        writeln!(out, "{} {:.4}", label("nats per token"), found.nats_per_token())?;
        let (tokens, bytes) = (counted(found.tokens, "token"), counted(found.bytes, "byte"));
        writeln!(out, "{} {tokens}, {bytes}", label("measured on"))?;
    }
    out.flush()?;
    Ok(())
}
