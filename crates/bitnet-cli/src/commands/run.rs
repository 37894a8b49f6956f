//! `bitnet run`: continues one prompt and streams the text.

use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};

use bitnet_inference::{BUILTIN_MODEL, GenerationOptions, InferenceInput, Model};
use clap::Args;
use serde_json::{Value, json};

use super::chat::conversation::Conversation;
use crate::answer::{self, Answer};
use crate::exit::{Outcome, Usage};
use crate::files::read_text;
use crate::flags::{DraftArg, EngineArgs, ModelArg, SamplingArgs, fresh_seed};
use crate::interrupt::Interrupt;
use crate::report;
use crate::term::{Style, Term, printable};

const EXAMPLES: &str = "\
Examples:
  bitnet run \"Once upon a time\"
  bitnet run -m model.gguf --chat \"Why is the sky blue?\"
  bitnet run -m model.gguf --greedy -n 64 --file prompt.txt
  git diff | bitnet run -m model.gguf --json > answer.json

-n is 256 unless given. The built-in model is drawn from more coolly than others: temperature 0.5,
min-p 0.1, repetition penalty 1.05.
A prompt given as an argument is shown before its continuation; one from a file or a pipe is not.
One line break at the end of a file or pipe is left out. Statistics go to standard error.";

/// Tokens generated unless -n says otherwise.
const DEFAULT_MAX_TOKENS: u32 = 256;

/// Arguments of `bitnet run`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct RunArgs {
    /// Text to continue; from --file or standard input if absent or '-'
    prompt: Option<String>,
    #[command(flatten)]
    model: ModelArg,
    /// Read the prompt from a file
    #[arg(short, long, value_name = "FILE", conflicts_with = "prompt")]
    file: Option<PathBuf>,
    /// Treat the prompt as a question and use the model's chat template
    #[arg(long)]
    chat: bool,
    /// Instructions before the question
    #[arg(long, value_name = "TEXT", requires = "chat")]
    system: Option<String>,
    /// Print one JSON object at the end instead of text
    #[arg(long)]
    json: bool,
    /// With --json: log-probability of each token and of N alternatives
    #[arg(long, value_name = "N", requires = "json")]
    logprobs: Option<u32>,
    /// Do not show the prompt before its continuation
    #[arg(long)]
    no_echo: bool,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    draft: DraftArg,
}

/// Reads the prompt, loads the model, streams the answer, says what it took.
pub(crate) fn run(args: RunArgs, term: &Term) -> anyhow::Result<Outcome> {
    let (prompt, typed) = read_prompt(&args)?;
    let base = default_options(args.model.model.as_os_str() == BUILTIN_MODEL);
    let mut options = args.sampling.options(base)?;
    if options.seed.is_none() && !options.is_greedy() {
        options.seed = Some(fresh_seed());
    }
    options.logprobs = args.logprobs;
    options.validate().map_err(|error| Usage::error(error.to_string()))?;

    let interrupt = Interrupt::install()?;
    let (engine, model) = args.draft.load(&args.engine, &args.model.model, term)?;
    let input = input(&args, &model, &prompt, &mut options, term)?;
    let known = model.warnings().len();
    let stream = engine.stream(&model, input, &options)?;

    let mut out = io::stdout().lock();
    let terminal = out.is_terminal();
    if typed && !args.chat && !args.no_echo && !args.json {
        write!(out, "{}", term.out(Style::Prompt, &prompt))?;
        out.flush()?;
    }
    let mut begun = !args.chat;
    let answer = answer::follow(stream, &interrupt, |chunk| {
        let text = if begun { &chunk.text } else { chunk.text.trim_start() };
        if !args.json && !text.is_empty() {
            begun = true;
            let text = if terminal { printable(text) } else { text.into() };
            out.write_all(text.as_bytes())?;
            out.flush()?;
        }
        Ok(())
    })?;

    if args.json {
        serde_json::to_writer_pretty(&mut out, &as_json(&model, &prompt, &options, &answer))?;
    }
    writeln!(out)?;
    out.flush()?;
    if !args.json && terminal {
        term.note("");
    }
    report::moved(&model, known, term);
    term.note(&report::usage_line(&answer.usage));
    if let Some(seed) = options.seed {
        term.detail(&format!("seed {seed}"));
    }
    Ok(if answer.interrupted() { Outcome::Interrupted } else { Outcome::Done })
}

/// The built-in model is small: a cooler draw keeps its sentences whole, a light penalty keeps it
/// from saying the same again.
fn default_options(builtin: bool) -> GenerationOptions {
    let options = GenerationOptions::default().max_tokens(DEFAULT_MAX_TOKENS);
    match builtin {
        true => options.temperature(0.5).min_p(0.1).repetition_penalty(1.05, 64),
        false => options,
    }
}

/// The prompt, and whether it was typed as an argument.
fn read_prompt(args: &RunArgs) -> anyhow::Result<(String, bool)> {
    let source = match (&args.prompt, &args.file) {
        (Some(prompt), _) if prompt != "-" => return non_empty(prompt.clone()).map(|p| (p, true)),
        (_, Some(path)) => path.as_path(),
        (None, None) if io::stdin().is_terminal() => {
            return Err(Usage::error(
                "expected a prompt: bitnet run \"Once upon a time\", or --file, or a pipe",
            ));
        }
        _ => Path::new("-"),
    };
    let mut text = read_text(source)?;
    if text.ends_with('\n') {
        text.truncate(text.len() - if text.ends_with("\r\n") { 2 } else { 1 });
    }
    non_empty(text).map(|prompt| (prompt, false))
}

fn non_empty(prompt: String) -> anyhow::Result<String> {
    match prompt.is_empty() {
        true => Err(Usage::error("expected a prompt, got an empty text")),
        false => Ok(prompt),
    }
}

/// The prompt as it stands, or as a question in the model's chat format.
fn input(
    args: &RunArgs,
    model: &Model,
    prompt: &str,
    options: &mut GenerationOptions,
    term: &Term,
) -> anyhow::Result<InferenceInput> {
    if !args.chat {
        return Ok(prompt.into());
    }
    let mut conversation = Conversation::new(model, args.system.clone());
    if let Some(note) = conversation.note() {
        term.note(note);
    }
    options.stop.extend(conversation.stop_strings());
    conversation.ask(prompt);
    conversation.prompt()
}

fn as_json(model: &Model, prompt: &str, options: &GenerationOptions, answer: &Answer) -> Value {
    let (usage, timings) = report::usage_json(&answer.usage);
    // Of a token alone; a character that several tokens make is in the whole text only.
    let text = |id: u32| model.tokenizer().ok().map(|tokenizer| tokenizer.decode(&[id], true));
    let token = |token: &bitnet_inference::GeneratedToken| match options.logprobs {
        None => json!({ "id": token.id, "text": text(token.id) }),
        Some(_) => {
            let top = |&(id, logprob): &(u32, f32)| json!({ "id": id, "text": text(id), "logprob": logprob });
            let top: Vec<_> = token.top_logprobs.iter().map(top).collect();
            json!({
                "id": token.id,
                "text": text(token.id),
                "logprob": token.logprob,
                "top_logprobs": top,
            })
        }
    };
    json!({
        "model": model.get_model_id(),
        "prompt": prompt,
        "text": answer.text,
        "tokens": answer.tokens.iter().map(token).collect::<Vec<_>>(),
        "finish_reason": answer.ending(),
        "stop_string": answer.stop_string,
        "seed": options.seed,
        "usage": usage,
        "timings": timings,
    })
}
