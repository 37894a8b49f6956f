//! The command line: its commands and the help a newcomer reads first.

use clap::{Parser, Subcommand};

use crate::commands::{
    batch, bench, bench_serve, chat, completions, convert, devices, eval, inspect, logits,
    quantize, run, serve, tokenizer, train,
};
use crate::term::OutputArgs;

const EXAMPLES: &str = "\
Examples:
  bitnet run \"Once upon a time\"            a story from the built-in model: no download, no setup
  bitnet chat -m models/bitnet-2b4t        talk to a model of your own
  bitnet serve                             an OpenAI-compatible server on port 8080
  bitnet batch in.jsonl out.jsonl          answer a file of requests, and go on where it stopped
  bitnet inspect model.gguf                what a model file is and holds
  bitnet convert model/ model.gguf --to i2_s
  bitnet eval book.txt -m model.gguf       perplexity and bits per byte
  bitnet train tales.txt --out runs/tales --preset 1m --minutes 10
  bitnet bench --synthetic 2b4t            speed of a shape on this machine, no file needed

MODEL is a GGUF file, a safetensors file, a Hugging Face folder, or 'builtin'.
Exit codes: 0 done, 1 failed, 2 used wrongly, 130 interrupted.";

/// Runs, trains, inspects, converts and measures ternary language models.
#[derive(Debug, Parser)]
#[command(name = "bitnet", version, after_help = EXAMPLES, max_term_width = 100)]
#[command(subcommand_required = true, arg_required_else_help = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
    #[command(flatten, next_help_heading = "Output")]
    pub(crate) output: OutputArgs,
}

/// What to do.
#[allow(clippy::large_enum_variant)] // there is one value of it
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Continue a prompt, or answer it
    Run(run::RunArgs),
    /// Talk with a model
    Chat(chat::ChatArgs),
    /// Serve models over HTTP: OpenAI's, Anthropic's and Ollama's wire formats
    Serve(Box<serve::ServeArgs>),
    /// Answer a file of requests: OpenAI's batch format
    Batch(batch::BatchArgs),
    /// Show what a model is: architecture, tensors, tokenizer, template
    Inspect(inspect::InspectArgs),
    /// Write a model in another file format or packing, without losing a trit
    Convert(convert::ConvertArgs),
    /// Make a ternary model from float weights trained for it
    Quantize(quantize::QuantizeArgs),
    /// Measure how well a model predicts a text: perplexity, bits per byte
    Eval(eval::EvalArgs),
    /// Measure how fast a model runs, and how fast this machine could run it at best
    Bench(bench::BenchArgs),
    /// Measure how fast a server answers: latency percentiles, throughput, goodput
    BenchServe(Box<bench_serve::BenchServeArgs>),
    /// Train a ternary model on text of your own
    Train(Box<train::TrainArgs>),
    /// Train a model on, on new text or conversations
    Finetune(Box<train::FinetuneArgs>),
    /// Make a ternary model of a float one, which teaches it
    Distill(Box<train::DistillArgs>),
    /// Make a tokenizer
    Tokenizer(tokenizer::TokenizerArgs),
    /// Print a model's logits for given token ids
    Logits(logits::LogitsArgs),
    /// List the devices and CPU kernels of this machine
    Devices(devices::DevicesArgs),
    /// Print a completion script for a shell
    Completions(completions::CompletionsArgs),
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_explains_itself_with_an_example() {
        for command in Cli::command().get_subcommands() {
            let name = command.get_name();
            assert!(command.get_about().is_some(), "{name} has no description");
            let help = command.get_after_help().unwrap_or_default().to_string();
            assert!(help.contains(&format!("bitnet {name}")), "{name} shows no example");
        }
    }
}
