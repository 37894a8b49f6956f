//! `bitnet`: runs, trains, inspects, converts and measures ternary language models.
//!
//! This file parses the command line and hands each command to its file in `commands/`. What the
//! commands share: `flags` (options of the engine and the sampler), `files` (models to read and write), `answer` (a generation that
//! Ctrl-C can stop), `report` (statistics), `term` (colours and bars), `exit` (exit codes).
#![forbid(unsafe_code)]
// A closed pipe must end the program quietly; `print!` would panic.
#![deny(clippy::print_stdout, clippy::print_stderr)]

mod answer;
mod cli;
mod commands;
mod exit;
mod files;
mod flags;
mod interrupt;
mod report;
mod term;

use std::process::ExitCode;

use clap::Parser;

use crate::cli::{Cli, Command};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let term = term::Term::new(&cli.output);
    let result = match cli.command {
        Command::Run(args) => commands::run::run(args, &term),
        Command::Chat(args) => commands::chat::run(args, &term),
        Command::Serve(args) => commands::serve::run(*args, &term),
        Command::Batch(args) => commands::batch::run(args, &term),
        Command::Inspect(args) => commands::inspect::run(args, &term),
        Command::Convert(args) => commands::convert::run(args, &term),
        Command::Quantize(args) => commands::quantize::run(args, &term),
        Command::Eval(args) => commands::eval::run(args, &term),
        Command::Bench(args) => commands::bench::run(args, &term),
        Command::BenchServe(args) => commands::bench_serve::run(*args, &term),
        Command::Train(args) => commands::train::train(*args, &term),
        Command::Finetune(args) => commands::train::finetune(*args, &term),
        Command::Distill(args) => commands::train::distill(*args, &term),
        Command::Tokenizer(args) => commands::tokenizer::run(args, &term),
        Command::Logits(args) => commands::logits::run(args, &term),
        Command::Devices(args) => commands::devices::run(args, &term),
        Command::Completions(args) => commands::completions::run(args),
    };
    exit::code(result, &term)
}
