//! `bitnet convert`: a model in another form, trit for trit.

use bitnet_quant::convert::convert;
use clap::Args;

use crate::exit::Outcome;
use crate::files::{InputArgs, OutputArgs};
use crate::term::Term;

const EXAMPLES: &str = "\
Examples:
  bitnet convert model/ model.gguf
  bitnet convert model.gguf small.gguf --to tq1_0 --embedding q6_k
  bitnet convert model.gguf model/
  bitnet convert wrong.gguf right.gguf --to i2_s --i2s-layout arm64

Forms:
  hf      Hugging Face folder, four weights to a byte; transformers reads it
  i2_s    GGUF of bitnet.cpp, 2 bits a weight
  tq1_0   GGUF of llama.cpp, 1.69 bits a weight
  tq2_0   GGUF of llama.cpp, 2.06 bits a weight
  q2_0    GGUF of llama.cpp, 2 bits and a scale for each 64 weights
  pq2_0, ptq1_0   GGUF of PrismML's llama.cpp, scales for each 128 weights
  tiles   GGUF for this program only, 1.6 bits a weight: starts at once, as it needs no repacking
No ternary weight changes; nothing appears under its final name before it is complete.";

/// Arguments of `bitnet convert`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct ConvertArgs {
    #[command(flatten)]
    input: InputArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// Opens, converts, reports.
pub(crate) fn run(args: ConvertArgs, term: &Term) -> anyhow::Result<Outcome> {
    let options = args.output.options()?;
    let checkpoint = args.input.open()?;
    args.output.write("converting", term, |progress| {
        convert(&checkpoint, options, args.output.path(), progress)
    })?;
    Ok(Outcome::Done)
}
