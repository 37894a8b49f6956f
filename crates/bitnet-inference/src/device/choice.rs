//! The rules of device selection: what was asked for, what is there, what comes next when one fails.
//!
//! Knows names and their order, not how a device is found: that is handed in, so the rules are
//! tested without hardware.

use bitnet_core::backend::FoundDevice;

use super::{DEFAULT_ORDER, Device, find};
use crate::config::EngineConfig;
use crate::error::{InferenceError, Result};

/// The variable that names devices where the configuration leaves the choice open.
const ENVIRONMENT: &str = "BITNET_DEVICE";

/// Devices that may take a model, best first.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Choice {
    /// At least one; the CPU is the last one unless the configuration forbids falling back to it.
    devices: Vec<Device>,
    /// What was asked for and is not there.
    pub(crate) warning: Option<String>,
}

impl Choice {
    /// The device that is tried first.
    pub(crate) fn first(&self) -> Device {
        self.devices[0]
    }

    /// Whether the CPU may take over what another device fails at.
    pub(crate) fn ends_on_cpu(&self) -> bool {
        self.devices.len() > 1 && self.devices.contains(&Device::Cpu)
    }

    /// The result of the first device for which `open` succeeds, and what the ones before it said.
    /// Only failures of a device lead to the next one; a damaged model stays damaged.
    pub(crate) fn first_that_works<T>(
        &self,
        mut open: impl FnMut(Device) -> Result<T>,
    ) -> Result<(T, Vec<String>)> {
        let mut warnings = Vec::new();
        let (last, others) = self.devices.split_last().expect("a choice is not empty");
        for &device in others {
            match open(device) {
                Ok(opened) => return Ok((opened, warnings)),
                Err(error @ (InferenceError::Gpu { .. } | InferenceError::Memory { .. })) => {
                    warnings.push(format!("{device} did not take the model: {error}"));
                }
                Err(error) => return Err(error),
            }
        }
        open(*last).map(|opened| (opened, warnings))
    }
}

/// Resolves a preference against this build, this machine and the environment.
///
/// # Errors
/// [`InferenceError::Gpu`] if nothing that was asked for is there and the configuration is strict;
/// [`InferenceError::Input`] if the environment names unknown devices.
pub(crate) fn choose(config: &EngineConfig) -> Result<Choice> {
    let named = std::env::var(ENVIRONMENT).ok().filter(|names| !names.trim().is_empty());
    choose_from(config, named.as_deref(), &find)
}

/// The device [`Device::Auto`] stands for.
pub(super) fn best(find: &dyn Fn(Device) -> Result<FoundDevice, String>) -> Device {
    let mut misses = Vec::new();
    expand(Device::Auto, find, &mut misses).first().copied().unwrap_or(Device::Cpu)
}

fn choose_from(
    config: &EngineConfig,
    environment: Option<&str>,
    find: &dyn Fn(Device) -> Result<FoundDevice, String>,
) -> Result<Choice> {
    let order = match (&*config.device_order, config.device, environment) {
        ([], Device::Auto, Some(names)) => Device::parse_order(names)?,
        ([], device, _) => vec![device],
        (order, ..) => order.to_vec(),
    };
    let mut devices: Vec<Device> = Vec::new();
    let mut misses = Vec::new();
    for &asked in &order {
        for device in expand(asked, find, &mut misses) {
            if !devices.contains(&device) {
                devices.push(device);
            }
        }
    }
    let asked = order.iter().map(|device| device.name()).collect::<Vec<_>>().join(",");
    if devices.is_empty() && config.strict_device {
        return Err(InferenceError::Gpu { device: asked, reason: misses.join("; ") });
    }
    let warning = match devices.first() {
        // An order says itself what comes next.
        Some(_) => None,
        None => Some(format!("{asked} asked for, but {}: running on the CPU", misses.join("; "))),
    };
    if !config.strict_device && !devices.contains(&Device::Cpu) {
        devices.push(Device::Cpu);
    }
    Ok(Choice { devices, warning })
}

/// The devices here that a name stands for; reasons for the others go to `misses`.
fn expand(
    asked: Device,
    find: &dyn Fn(Device) -> Result<FoundDevice, String>,
    misses: &mut Vec<String>,
) -> Vec<Device> {
    let candidates: &[Device] = match asked {
        Device::Auto => &DEFAULT_ORDER,
        Device::Gpu => &DEFAULT_ORDER[..DEFAULT_ORDER.len() - 1],
        _ => &[asked],
    };
    let named = candidates.len() == 1;
    candidates
        .iter()
        .copied()
        .filter(|&device| match find(device) {
            // What is slower than the CPU must be named to be used.
            Ok(found) if named || found.accelerates => true,
            Ok(found) => {
                misses.push(format!("{device} has only {}, no accelerator", found.hardware));
                false
            }
            Err(reason) => {
                misses.push(match reason.contains(device.name()) {
                    true => reason,
                    false => format!("{device}: {reason}"),
                });
                false
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use Device::{Auto, Cpu, Gpu, Metal, Mlx, Wgpu};

    fn hardware(accelerates: bool) -> FoundDevice {
        FoundDevice {
            hardware: "a card".into(),
            driver: None,
            memory_bytes: None,
            unified_memory: false,
            accelerates,
        }
    }

    /// A machine with these accelerators and these devices in software.
    fn machine(
        real: &[Device],
        software: &[Device],
    ) -> impl Fn(Device) -> Result<FoundDevice, String> + use<> {
        let (real, software) = (real.to_vec(), software.to_vec());
        move |device| match () {
            () if device == Cpu || real.contains(&device) => Ok(hardware(true)),
            () if software.contains(&device) => Ok(hardware(false)),
            () => Err("not here".into()),
        }
    }

    fn config(device: Device, order: &[Device], strict_device: bool) -> EngineConfig {
        EngineConfig {
            device,
            device_order: order.to_vec(),
            strict_device,
            ..EngineConfig::balanced()
        }
    }

    #[test]
    fn the_table_of_choices() {
        let all = &[Mlx, Metal, Wgpu][..];
        // (asked, order, environment, accelerators, software, devices, warns)
        type Devices = &'static [Device];
        type Case = (Device, Devices, Option<&'static str>, Devices, Devices, Devices, bool);
        let lenient: &[Case] = &[
            (Auto, &[], None, &[], &[], &[Cpu], false),
            (Auto, &[], None, all, &[], &[Mlx, Metal, Wgpu, Cpu], false),
            (Auto, &[], None, &[Metal, Wgpu], &[], &[Metal, Wgpu, Cpu], false),
            (Auto, &[], None, &[Wgpu], &[Mlx], &[Wgpu, Cpu], false),
            (Auto, &[], None, &[], all, &[Cpu], false),
            (Cpu, &[], None, all, &[], &[Cpu], false),
            (Gpu, &[], None, all, &[], &[Mlx, Metal, Wgpu, Cpu], false),
            (Gpu, &[], None, &[], &[], &[Cpu], true),
            (Gpu, &[], None, &[], all, &[Cpu], true),
            // Who names a device gets it, however slow.
            (Wgpu, &[], None, &[], all, &[Wgpu, Cpu], false),
            (Wgpu, &[], None, &[Mlx], &[], &[Cpu], true),
            (Auto, &[Wgpu, Mlx], None, all, &[], &[Wgpu, Mlx, Cpu], false),
            (Auto, &[Metal, Auto], None, &[Wgpu], &[Metal], &[Metal, Wgpu, Cpu], false),
            (Auto, &[Cpu, Wgpu], None, all, &[], &[Cpu, Wgpu], false),
            // The environment decides only where the configuration does not.
            (Auto, &[], Some("wgpu"), all, &[], &[Wgpu, Cpu], false),
            (Auto, &[], Some("cpu"), all, &[], &[Cpu], false),
            (Auto, &[], Some("metal,cpu"), &[Mlx], &[], &[Cpu], false),
            (Metal, &[], Some("wgpu"), all, &[], &[Metal, Cpu], false),
            (Auto, &[Auto], Some("wgpu"), all, &[], &[Mlx, Metal, Wgpu, Cpu], false),
        ];
        for &(asked, order, environment, real, software, want, warns) in lenient {
            let config = config(asked, order, false);
            let choice =
                choose_from(&config, environment, &machine(real, software)).expect("a choice");
            let case = format!("{asked} {order:?} {environment:?} on {real:?} {software:?}");
            assert_eq!(choice.devices, want, "{case}");
            assert_eq!(choice.warning.is_some(), warns, "{case}");
        }
    }

    #[test]
    fn a_strict_engine_has_no_other_device() {
        let choice =
            choose_from(&config(Wgpu, &[], true), None, &machine(&[Wgpu], &[])).expect("here");
        assert_eq!(choice.devices, [Wgpu]);
        assert!(!choice.ends_on_cpu());
        let error = choose_from(&config(Metal, &[], true), None, &machine(&[Wgpu], &[]));
        let error = error.expect_err("absent").to_string();
        assert_eq!(error, "device metal: metal: not here");
        let gpu = choose_from(&config(Gpu, &[], true), None, &machine(&[], &[Wgpu]));
        let error = gpu.expect_err("software only").to_string();
        assert!(error.contains("wgpu has only a card, no accelerator"), "{error}");
    }

    #[test]
    fn a_warning_gives_the_reason() {
        let choice = choose_from(&config(Wgpu, &[], false), None, &machine(&[], &[]));
        let warning = choice.expect("the CPU").warning.expect("a warning");
        assert_eq!(warning, "wgpu asked for, but wgpu: not here: running on the CPU");
    }

    #[test]
    fn a_device_that_fails_leads_to_the_next_and_says_so() {
        let choice = Choice { devices: vec![Mlx, Wgpu, Cpu], warning: None };
        let full = || InferenceError::Memory {
            what: "KV cache".into(),
            needed_bytes: 2,
            available_bytes: 1,
        };
        let (opened, warnings) = choice
            .first_that_works(|device| match device {
                Mlx => Err(InferenceError::Gpu { device: "mlx".into(), reason: "lost".into() }),
                Wgpu => Err(full()),
                other => Ok(other),
            })
            .expect("the CPU works");
        assert_eq!((opened, warnings.len()), (Cpu, 2));
        assert!(warnings[0].contains("mlx") && warnings[0].contains("lost"), "{}", warnings[0]);

        // A damaged model is damaged on every device.
        let mut asked = 0;
        let result = choice.first_that_works(|_| -> Result<()> {
            asked += 1;
            Err(InferenceError::model_lacks("m", "a tensor"))
        });
        assert!(matches!(result, Err(InferenceError::Model { .. })));
        assert_eq!(asked, 1);
        // Where nothing else is allowed, the failure is the result.
        let alone = Choice { devices: vec![Wgpu], warning: None };
        assert!(alone.first_that_works(|_| -> Result<()> { Err(full()) }).is_err());
    }

    #[test]
    fn names_are_read_as_an_order() {
        assert_eq!(Device::parse_order("mlx, Metal,cpu").expect("names"), [Mlx, Metal, Cpu]);
        for bad in ["", "cuda", "cpu,,wgpu"] {
            let error = Device::parse_order(bad).expect_err("no device");
            assert!(matches!(error, InferenceError::Input { .. }), "{bad}");
        }
        let bad = choose_from(&config(Auto, &[], false), Some("abacus"), &machine(&[], &[]));
        assert!(matches!(bad, Err(InferenceError::Input { .. })));
    }
}
