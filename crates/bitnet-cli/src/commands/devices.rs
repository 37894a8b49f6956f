//! `bitnet devices`: what this machine offers, why it does not offer the rest, and what is chosen.

use std::io::{self, Write};

use bitnet_core::backend::{Backend, DeviceInfo};
use bitnet_core::cpu::CpuBackend;
use bitnet_core::kernels::Kernels;
use bitnet_inference::device::{self, Device, DeviceReport};
use clap::Args;
use serde_json::{Value, json};

use crate::exit::Outcome;
use crate::term::{Style, Term, bytes};

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
    let cpu = CpuBackend::new(None, None)?.device();
    let kernels: Vec<_> = Kernels::available().iter().map(|kernels| kernels.name()).collect();
    let chosen = device::default_device();
    let mut reports = device::devices();
    // The one that is always there comes first.
    reports.sort_by_key(|report| report.device != Device::Cpu);
    let mut out = io::stdout().lock();
    if args.json {
        let devices: Vec<_> =
            reports.iter().map(|report| as_json(report, &cpu, &kernels)).collect();
        writeln!(out, "{:#}", json!({ "default": chosen.name(), "devices": devices }))?;
        return Ok(Outcome::Done);
    }
    for DeviceReport { device, found } in &reports {
        let name = term.out(Style::Label, device.name());
        let found = match found {
            Ok(found) => found,
            Err(reason) => {
                writeln!(out, "{name}  not here: {reason}")?;
                continue;
            }
        };
        let mark = if *device == chosen { " (default)" } else { "" };
        writeln!(out, "{name}  {}{mark}", found.hardware)?;
        if let Some(driver) = &found.driver {
            writeln!(out, "  driver   {driver}")?;
        }
        if let Some(memory) = found.memory_bytes {
            let whose = if found.unified_memory { " (the CPU's)" } else { "" };
            writeln!(out, "  memory   {}{whose}", bytes(memory))?;
        }
        if !found.accelerates {
            writeln!(out, "  note     slower than the CPU's own kernels: used only when named")?;
        }
        if *device == Device::Cpu {
            writeln!(out, "  threads  {} (physical cores; --threads changes it)", cpu.threads)?;
            let marked = |name: &&str| match **name == cpu.kernel {
                true => format!("{} (chosen)", term.out(Style::Prompt, *name)),
                false => (*name).to_owned(),
            };
            let kernels: Vec<_> = kernels.iter().map(marked).collect();
            writeln!(out, "  kernels  {}", kernels.join(", "))?;
        }
    }
    Ok(Outcome::Done)
}

fn as_json(report: &DeviceReport, cpu: &DeviceInfo, kernels: &[&str]) -> Value {
    let mut entry = match &report.found {
        Ok(found) => json!({
            "name": report.device.name(),
            "available": true,
            "hardware": found.hardware,
            "driver": found.driver,
            "memory_bytes": found.memory_bytes,
            "unified_memory": found.unified_memory,
            "accelerates": found.accelerates,
        }),
        Err(reason) => json!({
            "name": report.device.name(),
            "available": false,
            "reason": reason,
        }),
    };
    if report.device == Device::Cpu {
        entry["threads"] = json!(cpu.threads);
        entry["kernel"] = json!(cpu.kernel);
        entry["kernels"] = json!(kernels);
    }
    entry
}
