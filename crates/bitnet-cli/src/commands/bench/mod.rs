//! `bitnet bench`: how fast a model runs here, and how fast this machine could run it at best.

mod format;
mod record;
mod small;

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use bitnet_inference::BUILTIN_MODEL;
use bitnet_inference::bench::process::{self, CpuTimes};
use bitnet_inference::bench::{Bench, Limits, Settings, Test};
use bitnet_inference::source::{self, WeightSource};
use bitnet_inference::synthetic::{SyntheticModel, SyntheticShape};
use bitnet_quant::pack::{I2sLayout, Packing};
use clap::{Args, ValueEnum};

use crate::exit::{Outcome, Usage};
use crate::flags::{KvArg, kernel_name};
use crate::term::{Term, Unit};
use record::Record;
pub(crate) use record::utc;

const EXAMPLES: &str = "\
Examples:
  bitnet bench                                   the built-in model
  bitnet bench --synthetic 2b4t -t 1,2           the shape of BitNet 2B4T, no file needed
  bitnet bench -m model.gguf -d 0,4096 -b 1,4,16
  bitnet bench --synthetic 2b4t --json > record.json
  bitnet bench --synthetic 2b4t --write-gguf 2b4t.gguf
  bitnet bench --small

Tests are named as in llama-bench: pp512 processes a prompt of 512 tokens, tg128 generates 128 tokens
one by one; x16 does so for 16 sequences together, @ d4096 behind 4096 tokens. Rates are tokens a
second, all sequences together, mean ± standard deviation after a warm-up; tokenization and sampling
are not in them. LIMIT is what this machine would reach if it did nothing but read every needed byte
once and multiply every weight once, measured in the same run on the same threads.";

/// Sequences decoded together and prompt lengths are lists: every combination is measured.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct BenchArgs {
    /// GGUF file, safetensors file, Hugging Face folder, or 'builtin'
    #[arg(short, long, default_value = BUILTIN_MODEL)]
    model: PathBuf,
    /// Measure a model of this shape with random weights: 0.7b, 2b4t, 3b or 8b
    #[arg(long, value_name = "SHAPE", conflicts_with = "model")]
    synthetic: Option<SyntheticShape>,
    /// Write the synthetic model to this GGUF file and measure nothing
    #[arg(long, value_name = "FILE", requires = "synthetic")]
    write_gguf: Option<PathBuf>,
    /// Packing of the ternary weights in that file
    #[arg(
        long,
        value_enum,
        value_name = "PACKING",
        requires = "write_gguf",
        default_value = "i2_s"
    )]
    packing: PackingArg,
    /// Measure the cost of small work instead: 256×256 products on one thread, and tokens of the
    /// built-in model through the whole engine
    #[arg(long, conflicts_with_all = ["synthetic", "model"])]
    small: bool,
    /// Prompt lengths to process; 0 for none
    #[arg(short = 'p', long, value_name = "N,…", value_delimiter = ',', default_value = "128,512")]
    prompt: Vec<usize>,
    /// Numbers of tokens to generate; 0 for none
    #[arg(short = 'n', long, value_name = "N,…", value_delimiter = ',', default_value = "128")]
    generate: Vec<usize>,
    /// Tokens already in the cache
    #[arg(short, long, value_name = "N,…", value_delimiter = ',', default_value = "0")]
    depth: Vec<usize>,
    /// Sequences that generate together
    #[arg(short, long, value_name = "N,…", value_delimiter = ',', default_value = "1")]
    batch: Vec<usize>,
    /// CPU threads [default: one for each physical core]
    #[arg(short, long, env = "BITNET_THREADS", value_name = "N,…", value_delimiter = ',')]
    threads: Vec<usize>,
    /// Measured repetitions of each test
    #[arg(short, long, value_name = "N", default_value_t = 5)]
    repetitions: usize,
    /// Prompt tokens computed in one step
    #[arg(long, value_name = "N", default_value_t = 512)]
    chunk: usize,
    /// Logits wanted of each token: the N largest, exactly, as sampling with top-k needs them; 0 for
    /// all
    #[arg(long, value_name = "N", default_value_t = 40)]
    logits: usize,
    /// CPU kernel, as `bitnet devices` lists them [default: the best this CPU has]
    #[arg(long, env = "BITNET_KERNEL", value_name = "NAME", value_parser = kernel_name)]
    kernel: Option<String>,
    /// Number format of the KV cache
    #[arg(long, env = "BITNET_KV", value_enum, value_name = "TYPE", default_value = "f16")]
    kv: KvArg,
    /// How results are printed
    #[arg(short, long, value_enum, value_name = "FORMAT", default_value = "table")]
    output: Format,
    /// The same as --output json
    #[arg(long, conflicts_with = "output")]
    json: bool,
}

/// Output formats.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    Table,
    Json,
    Csv,
    Markdown,
}

/// Packings a synthetic model may be written in.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum PackingArg {
    #[value(name = "i2_s")]
    I2S,
    #[value(name = "tq1_0")]
    Tq1_0,
    #[value(name = "tq2_0")]
    Tq2_0,
}

impl From<PackingArg> for Packing {
    fn from(packing: PackingArg) -> Self {
        match packing {
            PackingArg::I2S => Self::I2S(I2sLayout::Canonical128),
            PackingArg::Tq1_0 => Self::Tq1_0,
            PackingArg::Tq2_0 => Self::Tq2_0,
        }
    }
}

impl BenchArgs {
    fn format(&self) -> Format {
        if self.json { Format::Json } else { self.output }
    }

    /// Every combination asked for, prompts first.
    fn tests(&self) -> Vec<Test> {
        let mut tests = Vec::new();
        for &depth in &self.depth {
            for &tokens in self.prompt.iter().filter(|&&tokens| tokens > 0) {
                tests.push(Test::Prefill { tokens, depth });
            }
            for &tokens in self.generate.iter().filter(|&&tokens| tokens > 0) {
                let test = |&sequences: &usize| Test::Decode { tokens, sequences, depth };
                tests.extend(self.batch.iter().map(test));
            }
        }
        tests
    }

    fn open(&self) -> bitnet_inference::error::Result<Box<dyn WeightSource>> {
        Ok(match self.synthetic {
            Some(shape) => Box::new(SyntheticModel::new(shape.config(), 0)),
            None => Box::new(source::open(&self.model)?),
        })
    }

    /// Thread counts in the order given; one `None` for the default.
    fn thread_counts(&self) -> Vec<Option<usize>> {
        match self.threads.as_slice() {
            [] => vec![None],
            threads => threads.iter().copied().map(Some).collect(),
        }
    }
}

/// Measures everything asked for and prints it.
pub(crate) fn run(args: BenchArgs, term: &Term) -> anyhow::Result<Outcome> {
    if let (Some(shape), Some(path)) = (args.synthetic, &args.write_gguf) {
        return write_gguf(shape, path, args.packing.into(), term);
    }
    warn_if_busy(term);
    if args.small {
        return small::run(&args, term);
    }
    let tests = args.tests();
    if tests.is_empty() {
        return Err(Usage::error("expected something to measure: -p or -n above 0"));
    }
    let mut record = Record::start();
    for threads in args.thread_counts() {
        measure(&args, threads, &tests, &mut record, term)?;
    }
    let mut out = io::stdout().lock();
    match args.format() {
        Format::Table => format::table(&record, &mut out)?,
        Format::Json => format::json(&record, &mut out)?,
        Format::Csv => format::csv(&record, &mut out)?,
        Format::Markdown => format::markdown(&record, &mut out)?,
    }
    out.flush()?;
    for row in record.disturbed() {
        term.warn(&format!(
            "{row}: other programs kept {:.1} processors busy meanwhile; measure again when they rest",
            row.other_load.unwrap_or_default(),
        ));
    }
    match record.contradiction() {
        None => Ok(Outcome::Done),
        Some((a, b)) => anyhow::bail!("{a} and {b} computed different logits: this is a bug"),
    }
}

/// Loads the model for one thread count and runs all tests on it.
fn measure(
    args: &BenchArgs,
    threads: Option<usize>,
    tests: &[Test],
    record: &mut Record,
    term: &Term,
) -> anyhow::Result<()> {
    let settings = Settings {
        threads,
        kernel: args.kernel.clone(),
        kv_type: args.kv.into(),
        chunk: args.chunk,
        n_best: Some(args.logits).filter(|&n| n > 0),
        repetitions: args.repetitions,
    };
    let fresh_peak = record.is_empty() || process::reset_peak_memory();
    let loading = term.bar("loading", 0, Unit::Items);
    let bench = Bench::load(|| args.open(), settings, tests, &mut |done, total| {
        loading.set_length(total as u64);
        loading.set_position(done as u64);
    });
    loading.finish_and_clear();
    let mut bench = bench.map_err(crate::flags::as_usage)?;

    let mut measurements = Vec::new();
    for &test in tests {
        let bar = term.bar(&test.to_string(), args.repetitions as u64, Unit::Items);
        let measurement = bench.run(test, &mut |done, _| bar.set_position(done as u64));
        bar.finish_and_clear();
        measurements.push(measurement?);
    }
    let peak_bytes = process::peak_memory().filter(|_| fresh_peak);
    // After the tests, so that the memory it reads is not counted as theirs.
    let device = bench.device();
    record.describe(&bench, args.kv);
    let run = record::Run::new(&bench, peak_bytes);
    drop(bench);
    let limits = Limits::measure(device.threads, &device.kernel)?;
    record.add(run, limits, &measurements);
    Ok(())
}

/// Writes a synthetic model for other programs, or for measuring how files load.
fn write_gguf(
    shape: SyntheticShape,
    path: &Path,
    packing: Packing,
    term: &Term,
) -> anyhow::Result<Outcome> {
    let model = SyntheticModel::new(shape.config(), 0);
    let bar = term.bar("writing", 0, Unit::Bytes);
    let written = model.write_gguf(path, packing, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    written?;
    term.note(&format!("{} written to {}", model.config().name, path.display()));
    Ok(Outcome::Done)
}

/// Says so if the machine has other work to do.
fn warn_if_busy(term: &Term) {
    let Some(before) = CpuTimes::now() else { return };
    thread::sleep(Duration::from_millis(300));
    let Some(after) = CpuTimes::now() else { return };
    let others = after.other_load_since(&before);
    if others > 0.2 {
        term.warn(&format!(
            "other programs keep {others:.1} processors busy: these results will be too low"
        ));
    }
}
