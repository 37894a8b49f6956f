//! `bitnet logits`: what a model computes for given token ids, for comparing engines.

use std::io::{self, BufWriter, Write};
use std::path::PathBuf;

use bitnet_inference::{InferenceInput, KvType, Model};
use clap::Args;

use crate::exit::Outcome;
use crate::flags::EngineArgs;
use crate::term::{Style, Term, printable};

const EXAMPLES: &str = "\
Examples:
  bitnet logits builtin --ids 2346,331,704
  bitnet logits model.gguf --ids 1,2,3 --all --json > logits.json

No token is added. The KV cache is f32 unless --kv says otherwise, so that nothing but the model's own
arithmetic is in the numbers. JSON: {\"logits\": [[…], …]}, a row for the last position, or for each
with --all; the numbers read back to the same 32 bits.";

/// Likeliest tokens shown without --json.
const SHOWN: usize = 10;

/// Arguments of `bitnet logits`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct LogitsArgs {
    /// GGUF file, safetensors file, Hugging Face folder, or 'builtin'
    model: PathBuf,
    /// Token ids, separated by commas
    #[arg(long, value_name = "IDS", value_delimiter = ',', required = true, value_parser = token_id)]
    ids: Vec<u32>,
    /// Logits after every token, not only the last
    #[arg(long)]
    all: bool,
    /// Print one JSON object instead of the likeliest tokens
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    engine: EngineArgs,
}

fn token_id(text: &str) -> Result<u32, String> {
    text.trim().parse().map_err(|_| "expected whole numbers separated by commas".into())
}

/// Computes and prints.
pub(crate) fn run(args: LogitsArgs, term: &Term) -> anyhow::Result<Outcome> {
    let (engine, model) = args.engine.load_with_kv(&args.model, KvType::F32, term)?;
    let n_tokens = args.ids.len();
    let input = InferenceInput::Tokens(args.ids);
    let rows = match args.all {
        true => engine.logits_of_all(&model, &input)?,
        false => vec![engine.infer_blocking(&model, &input)?.logits],
    };
    anyhow::ensure!(
        rows.iter().flatten().all(|logit| logit.is_finite()),
        "model {} computes logits that are not finite",
        model.get_model_id()
    );
    let mut out = BufWriter::new(io::stdout().lock());
    if args.json {
        print_json(&mut out, &rows)?;
    } else {
        let first = n_tokens - rows.len();
        for (i, row) in rows.iter().enumerate() {
            print_likeliest(&mut out, &model, first + i, row, term)?;
        }
    }
    out.flush()?;
    Ok(Outcome::Done)
}

/// Row by row, so that memory holds the numbers once.
fn print_json(out: &mut impl Write, rows: &[Vec<f32>]) -> anyhow::Result<()> {
    write!(out, "{{\"logits\": [")?;
    for (i, row) in rows.iter().enumerate() {
        out.write_all(if i > 0 { b",\n" } else { b"\n" })?;
        serde_json::to_writer(&mut *out, row)?;
    }
    writeln!(out, "\n]}}")?;
    Ok(())
}

fn print_likeliest(
    out: &mut impl Write,
    model: &Model,
    position: usize,
    row: &[f32],
    term: &Term,
) -> anyhow::Result<()> {
    let mut order: Vec<usize> = (0..row.len()).collect();
    order.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
    writeln!(out, "{}", term.out(Style::Label, format!("after position {position}")))?;
    for &id in order.iter().take(SHOWN) {
        let text = model.tokenizer().ok().map(|tokenizer| tokenizer.decode(&[id as u32], true));
        let text = text.map(|text| format!("{:?}", printable(&text))).unwrap_or_default();
        writeln!(out, "{:>10.4}  {id:>7}  {text}", row[id])?;
    }
    Ok(())
}
