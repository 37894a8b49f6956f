//! `bitnet train` and `bitnet finetune`: ternary models of one's own.
//!
//! The recipe comes from a file, from flags, or from both; `recipe` puts them together, `watch` shows
//! how it goes.

mod recipe;
mod watch;

use std::io::{self, Write};
use std::path::PathBuf;

use bitnet_training::recipe::Recipe;
use bitnet_training::run::{Place, Report, run as run_recipe};
use clap::Args;
use serde_json::json;

use crate::exit::{Outcome, Usage};
use crate::interrupt::Interrupt;
use crate::term::{Term, count, duration};
use recipe::{DataArgs, ModelArgs, RunArgs};
use watch::Watch;

const EXAMPLES: &str = "\
Examples:
  bitnet train tales.txt --out runs/tales --preset 1m --minutes 10 --eval held-out.txt
  bitnet train --config run.toml --out runs/first
  bitnet train --out runs/first --resume
  bitnet run --model runs/tales/model \"Once upon a time\"

The model is written to OUT/model, with a card; --export names further forms. Ctrl-C saves a
checkpoint and ends; --resume goes on from it to the same losses. Flags come before the file.
Presets, by ternary weights: 1m, 3m, 6m, 19m, 31m, 85m.";

const FINETUNE_EXAMPLES: &str = "\
Examples:
  bitnet finetune builtin letters.txt --out runs/letters --steps 200
  bitnet finetune runs/first/masters chats.jsonl --out runs/chat --minutes 20 --export i2_s

Lines of a .jsonl file are {\"text\": …} or {\"messages\": [{\"role\": \"user\", \"content\": …}, …]}; of
conversations only the assistant's messages are learnt. Float masters (--export masters) lose nothing;
a packed model starts from its trits.";

/// Arguments of `bitnet train`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct TrainArgs {
    /// A recipe: a TOML file with everything the flags can say, and stages of data
    #[arg(short, long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// A model to go on from instead of random weights
    #[arg(long, value_name = "MODEL", conflicts_with = "preset")]
    from: Option<PathBuf>,
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    run: RunArgs,
}

/// Arguments of `bitnet finetune`.
#[derive(Debug, Args)]
#[command(after_help = FINETUNE_EXAMPLES)]
pub(crate) struct FinetuneArgs {
    /// The model to go on from: float masters, packed folder, GGUF file, or 'builtin'
    #[arg(value_name = "MODEL")]
    from: PathBuf,
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    run: RunArgs,
}

/// Highest learning rate of a fine-tuning, unless one is given.
const FINETUNE_RATE: f64 = 3e-4;

/// Trains from scratch, or on from a model.
pub(crate) fn train(args: TrainArgs, term: &Term) -> anyhow::Result<Outcome> {
    let mut recipe = args.run.begin(args.config.as_deref())?;
    args.data.apply(&mut recipe);
    args.model.apply(&mut recipe);
    if args.from.is_some() {
        recipe.from = args.from;
    }
    args.run.apply(&mut recipe)?;
    go(&recipe, &args.run, term)
}

/// Trains on from a model, with a rate that keeps what it knows.
pub(crate) fn finetune(args: FinetuneArgs, term: &Term) -> anyhow::Result<Outcome> {
    let mut recipe = args.run.begin(None)?;
    recipe.train.rate = FINETUNE_RATE;
    args.data.apply(&mut recipe);
    recipe.from = Some(args.from);
    args.run.apply(&mut recipe)?;
    go(&recipe, &args.run, term)
}

fn go(recipe: &Recipe, args: &RunArgs, term: &Term) -> anyhow::Result<Outcome> {
    let place = Place { folder: args.out.clone(), resume: args.resume };
    let interrupt = Interrupt::install()?;
    let caught = interrupt.catch();
    let mut watch = Watch::new(term);
    let result = run_recipe(recipe, &place, &mut |event| {
        watch.hear(&event);
        !caught.raised()
    });
    watch.finish();
    match result {
        Err(bitnet_training::Error::Stopped) => Ok(Outcome::Interrupted),
        Err(
            error @ (bitnet_training::Error::Setting { .. } | bitnet_training::Error::Input { .. }),
        ) => Err(Usage::error(error.to_string())),
        Err(error) => Err(error.into()),
        Ok(report) => {
            print(&report, args, term)?;
            Ok(if report.stopped { Outcome::Interrupted } else { Outcome::Done })
        }
    }
}

fn print(report: &Report, args: &RunArgs, term: &Term) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    if args.json {
        let found = json!({
            "stopped": report.stopped,
            "steps": report.steps,
            "tokens": report.tokens,
            "seconds": report.seconds,
            "bits_per_byte": report.measured.map(|measured| measured.bits_per_byte),
            "exported": report.exported,
        });
        writeln!(out, "{found:#}")?;
        return Ok(());
    }
    let time = std::time::Duration::from_secs_f64(report.seconds);
    term.note(&format!(
        "{} steps, {} tokens in {}",
        count(report.steps),
        count(report.tokens),
        duration(time)
    ));
    if report.stopped {
        let folder = args.out.display();
        term.note(&format!("saved; go on with: bitnet train --out {folder} --resume"));
    }
    if let Some(measured) = &report.measured {
        writeln!(out, "{:.4} bits per byte of held-out text", measured.bits_per_byte)?;
    }
    for path in &report.exported {
        writeln!(out, "{}", path.display())?;
    }
    Ok(())
}
