//! `bitnet devices`: what this machine offers and what would be chosen.

use std::io::{self, Write};

use bitnet_core::backend::Backend;
use bitnet_core::cpu::CpuBackend;
use bitnet_core::kernels::Kernels;
use clap::Args;
use serde_json::json;

use crate::exit::Outcome;
use crate::term::{Style, Term};

const EXAMPLES: &str = "\
Examples:
  bitnet devices
  BITNET_KERNEL=scalar bitnet run \"Once upon a time\"

All kernels give the same tokens; they differ in speed alone.";

/// Arguments of `bitnet devices`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct DevicesArgs {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Asks the backends and prints.
pub(crate) fn run(args: DevicesArgs, term: &Term) -> anyhow::Result<Outcome> {
    let device = CpuBackend::new(None, None)?.device();
    let kernels: Vec<_> = Kernels::available().iter().map(|kernels| kernels.name()).collect();
    let mut out = io::stdout().lock();
    if args.json {
        let cpu = json!({
            "name": device.name,
            "hardware": device.hardware,
            "threads": device.threads,
            "kernel": device.kernel,
            "kernels": kernels,
        });
        writeln!(out, "{:#}", json!({ "default": device.name, "devices": [cpu] }))?;
        return Ok(Outcome::Done);
    }
    writeln!(out, "{}  {}", term.out(Style::Label, &device.name), device.hardware)?;
    writeln!(out, "  threads  {} (physical cores; --threads changes it)", device.threads)?;
    let marked = |name: &&str| match **name == device.kernel {
        true => format!("{} (chosen)", term.out(Style::Prompt, *name)),
        false => (*name).to_owned(),
    };
    let kernels: Vec<_> = kernels.iter().map(marked).collect();
    writeln!(out, "  kernels  {}", kernels.join(", "))?;
    Ok(Outcome::Done)
}
