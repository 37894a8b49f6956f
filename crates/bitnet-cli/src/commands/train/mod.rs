//! `bitnet train`, `bitnet finetune` and `bitnet distill`: ternary models of one's own.
//!
//! The recipe comes from a file, from flags, or from both; `recipe` puts them together, `watch` shows
//! how it goes.

mod recipe;
mod watch;

use std::io::{self, Write};
use std::path::PathBuf;

use bitnet_training::Error;
use bitnet_training::recipe::{DistillRecipe, Recipe};
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

const DISTILL_EXAMPLES: &str = "\
Examples:
  bitnet distill llama/ tales.txt --out runs/student --tokens 10000000 --eval held-out.txt
  bitnet distill llama/ tales.txt --out runs/plain --steps 1000 --no-sub-norms --attention 0

The student has the teacher's shape, tokenizer and numbers, with norms put before the output and down
projections. It learns the text, the teacher's distribution of each next token, and how the teacher's
queries, keys and values relate in one layer (BitDistill). The teacher is a float model of the family
llama; `bitnet train --float --family llama` makes one.";

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
    /// Train float weights, not ternary ones: a teacher for bitnet distill
    #[arg(long)]
    float: bool,
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

/// Arguments of `bitnet distill`.
#[derive(Debug, Args)]
#[command(after_help = DISTILL_EXAMPLES)]
pub(crate) struct DistillArgs {
    /// The float model to learn from
    #[arg(value_name = "TEACHER")]
    teacher: PathBuf,
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    parts: PartsArgs,
    #[command(flatten)]
    run: RunArgs,
}

/// What a student learns from its teacher.
#[derive(Debug, Args)]
#[command(next_help_heading = "Distillation")]
struct PartsArgs {
    /// Do not put norms before the output and down projections: the student stays a llama
    #[arg(long)]
    no_sub_norms: bool,
    /// Share of the text's next token in the loss [default: 1]
    #[arg(long, value_name = "X")]
    token: Option<f32>,
    /// Share of the teacher's distribution [default: 1]
    #[arg(long, value_name = "X")]
    logits: Option<f32>,
    /// What divides logits before they are compared [default: 2]
    #[arg(long, value_name = "T")]
    temperature: Option<f32>,
    /// Share of the relations of queries, keys and values [default: 1]
    #[arg(long, value_name = "X")]
    attention: Option<f32>,
    /// Layer whose relations are compared, from 0 [default: the last but one]
    #[arg(long, value_name = "N")]
    layer: Option<usize>,
}

/// Highest learning rate of a distillation, unless one is given.
const DISTILL_RATE: f64 = 1e-3;

/// Highest learning rate of a fine-tuning, unless one is given.
const FINETUNE_RATE: f64 = 3e-4;

/// Trains from scratch, or on from a model.
pub(crate) fn train(args: TrainArgs, term: &Term) -> anyhow::Result<Outcome> {
    let mut recipe = args.run.begin(args.config.as_deref())?;
    args.data.apply(&mut recipe);
    if args.from.is_some() {
        recipe.from = args.from;
    }
    args.model.apply(&mut recipe, args.run.resume)?;
    recipe.train.float |= args.float;
    args.run.apply(&mut recipe)?;
    go(&recipe, &args.run, term)
}

/// Trains on from a model, with a rate that keeps what it knows.
pub(crate) fn finetune(args: FinetuneArgs, term: &Term) -> anyhow::Result<Outcome> {
    let mut recipe = args.run.begin(None)?;
    if !args.run.resume {
        recipe.train.rate = FINETUNE_RATE;
    }
    args.data.apply(&mut recipe);
    recipe.from = Some(args.from);
    args.run.apply(&mut recipe)?;
    go(&recipe, &args.run, term)
}

/// Makes a ternary student of a float teacher.
pub(crate) fn distill(args: DistillArgs, term: &Term) -> anyhow::Result<Outcome> {
    let mut recipe = args.run.begin(None)?;
    if !args.run.resume {
        recipe.train.rate = DISTILL_RATE;
    }
    args.data.apply(&mut recipe);
    let begun = recipe.distill.take();
    let mut distill = match begun {
        Some(begun) => DistillRecipe { teacher: args.teacher, ..begun },
        None => DistillRecipe::new(args.teacher),
    };
    args.parts.apply(&mut distill);
    recipe.distill = Some(distill);
    args.run.apply(&mut recipe)?;
    go(&recipe, &args.run, term)
}

impl PartsArgs {
    /// Changes what is given.
    fn apply(&self, distill: &mut DistillRecipe) {
        distill.sub_norms &= !self.no_sub_norms;
        for (part, given) in [
            (&mut distill.token, self.token),
            (&mut distill.logits, self.logits),
            (&mut distill.temperature, self.temperature),
            (&mut distill.attention, self.attention),
        ] {
            *part = given.unwrap_or(*part);
        }
        distill.layer = self.layer.or(distill.layer);
    }
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
        Err(Error::Stopped) => Ok(Outcome::Interrupted),
        Err(error) => Err(as_usage(error)),
        Ok(report) => {
            print(&report, args, term)?;
            Ok(if report.stopped { Outcome::Interrupted } else { Outcome::Done })
        }
    }
}

/// Settings and data that cannot be meant are a wrong use, not a failure.
fn as_usage(error: Error) -> anyhow::Error {
    match error {
        Error::Setting { .. } | Error::Input { .. } => Usage::error(error.to_string()),
        error => error.into(),
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
