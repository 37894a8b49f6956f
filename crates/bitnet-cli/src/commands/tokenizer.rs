//! `bitnet tokenizer train`: a byte-level BPE tokenizer of one's own.

use std::io::{self, Write};
use std::path::PathBuf;

use bitnet_training::tokenizer::{END_OF_TEXT, TokenizerOptions, train_tokenizer};
use clap::{Args, Subcommand};
use serde_json::json;

use crate::exit::{Outcome, Usage};
use crate::interrupt::Interrupt;
use crate::term::{Term, Unit, bytes, count};

const EXAMPLES: &str = "\
Examples:
  bitnet tokenizer train tales.txt --out tokenizer/ --vocab-size 4096
  bitnet tokenizer train a.txt.xz b.jsonl --out tokenizer/";

const TRAIN_EXAMPLES: &str = "\
Examples:
  bitnet tokenizer train tales.txt --out tokenizer/ --vocab-size 4096

Text comes from .txt and .md files, from .jsonl files with a \"text\" or \"messages\" in each line, and
from these with .xz behind. Every byte is a token, so no text is unknown. Token 0 ends documents.";

/// Arguments of `bitnet tokenizer`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct TokenizerArgs {
    #[command(subcommand)]
    command: TokenizerCommand,
}

#[derive(Debug, Subcommand)]
enum TokenizerCommand {
    /// Make a byte-level BPE tokenizer from files of text
    Train(TrainArgs),
}

#[derive(Debug, Args)]
#[command(after_help = TRAIN_EXAMPLES)]
struct TrainArgs {
    /// Files of text
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// Folder for tokenizer.json and tokenizer_config.json
    #[arg(short, long, value_name = "DIR")]
    out: PathBuf,
    /// Tokens in the vocabulary
    #[arg(long, value_name = "N", default_value_t = 4096)]
    vocab_size: usize,
    /// Do not merge pairs seen less often
    #[arg(long, value_name = "N", default_value_t = 2)]
    min_frequency: u64,
    /// Text of the token that ends a document; a line of it divides documents of a text file
    #[arg(long, value_name = "TEXT", default_value = END_OF_TEXT)]
    end_of_text: String,
    /// Replace what is there already
    #[arg(long)]
    force: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Trains and says what came of it.
pub(crate) fn run(args: TokenizerArgs, term: &Term) -> anyhow::Result<Outcome> {
    let TokenizerCommand::Train(args) = args.command;
    let options = TokenizerOptions {
        vocab_size: args.vocab_size,
        min_frequency: args.min_frequency,
        end_of_text: args.end_of_text,
    };
    let interrupt = Interrupt::install()?;
    let caught = interrupt.catch();
    let bar = term.bar("reading", 0, Unit::Bytes);
    let result = train_tokenizer(&args.files, &options, &args.out, args.force, &mut |read| {
        bar.set_length(read);
        bar.set_position(read);
        !caught.raised()
    });
    bar.finish_and_clear();
    let trained = match result {
        Err(bitnet_training::Error::Stopped) => return Ok(Outcome::Interrupted),
        Err(error @ bitnet_training::Error::Input { .. }) => {
            return Err(Usage::error(error.to_string()));
        }
        trained => trained?,
    };
    if trained.vocab_size < options.vocab_size {
        let (found, asked) = (trained.vocab_size as u64, options.vocab_size as u64);
        term.warn(&format!(
            "the text has pairs for {} tokens only, not {}",
            count(found),
            count(asked)
        ));
    }
    let mut out = io::stdout().lock();
    match args.json {
        true => {
            let found = json!({
                "output": args.out,
                "vocab_size": trained.vocab_size,
                "text_bytes": trained.text_bytes,
            });
            writeln!(out, "{found:#}")?;
        }
        false => writeln!(
            out,
            "{}: {} tokens from {} of text",
            args.out.display(),
            count(trained.vocab_size as u64),
            bytes(trained.text_bytes)
        )?,
    }
    Ok(Outcome::Done)
}
