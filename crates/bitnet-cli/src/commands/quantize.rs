//! `bitnet quantize`: ternary weights from the float weights that were trained for it.

use bitnet_quant::quantize::{QuantizeOptions, quantize};
use clap::Args;

use crate::exit::Outcome;
use crate::files::{InputArgs, OutputArgs};
use crate::term::Term;

const EXAMPLES: &str = "\
Examples:
  bitnet quantize masters/ model.gguf
  bitnet quantize masters/ packed/ --to hf --keep layers.0 --keep mlp.down_proj

Each projection becomes round(w / mean|w|), the quantizer BitNet b1.58 is trained with: weights
trained so lose nothing. Weights that were not need training afterwards.";

/// Arguments of `bitnet quantize`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct QuantizeArgs {
    #[command(flatten)]
    input: InputArgs,
    #[command(flatten)]
    output: OutputArgs,
    /// Leave projections in float whose path holds this; may be given several times
    #[arg(long, value_name = "PATH")]
    keep: Vec<String>,
}

/// Opens, quantizes, reports.
pub(crate) fn run(args: QuantizeArgs, term: &Term) -> anyhow::Result<Outcome> {
    let options = QuantizeOptions { output: args.output.options()?, keep: args.keep };
    let checkpoint = args.input.open()?;
    args.output.write("quantizing", term, |progress| {
        quantize(&checkpoint, &options, args.output.path(), progress)
    })?;
    Ok(Outcome::Done)
}
