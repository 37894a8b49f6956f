//! How a region is cut out of buffers, by what it is for and what the device can do.
//!
//! Weights stay as long as their model and are never resized: they get exactly what they need, small
//! ones side by side in one buffer where the device allows it. Activations come and go with steps of
//! ever other sizes: they get size classes, so that one step's buffers serve the next. Staging
//! buffers come and go faster still and hold anything: few, coarse classes.

use super::device::{BufferKind, MemoryProperties};
use crate::error::{Error, Result};

/// What a region is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum AccessPattern {
    /// Written once, read by every step, gone with its model.
    Weights,
    /// A little of it written and much of it read by every step, gone with its model.
    KvCache,
    /// Written and read within a step.
    Activations,
    /// Written by the host, read once by the device.
    Upload,
    /// Written by the device, read once by the host.
    Readback,
}

impl AccessPattern {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 5] =
        [Self::Weights, Self::KvCache, Self::Activations, Self::Upload, Self::Readback];

    /// A word for errors and traces.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Weights => "weights",
            Self::KvCache => "kv_cache",
            Self::Activations => "activations",
            Self::Upload => "upload",
            Self::Readback => "readback",
        }
    }

    /// The kind of buffer such a region lies in.
    pub const fn kind(self) -> BufferKind {
        match self {
            Self::Weights | Self::KvCache | Self::Activations => BufferKind::Device,
            Self::Upload => BufferKind::Upload,
            Self::Readback => BufferKind::Readback,
        }
    }
}

/// How a region comes by its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AllocationStrategy {
    /// A buffer of its own, no larger than needed, given back to the device at once.
    Dedicated,
    /// A buffer of its own from one of this many size classes per doubling, kept for the next
    /// region of about that size.
    Reused {
        /// At least 1; the more, the less is wasted and the rarer a buffer fits again.
        classes_per_doubling: u32,
    },
    /// A part of a buffer of this size that several regions share: the smallest gap that fits.
    Shared {
        /// Bytes of the common buffer.
        buffer_bytes: u64,
    },
}

/// Size of buffers that small regions share.
const SHARED_BYTES: u64 = 512 << 10;
/// A region of more than this part of a shared buffer gets one of its own.
const SHARED_PART: u64 = 4;

impl AllocationStrategy {
    /// The strategy for regions of `bytes` with this pattern on such a device.
    pub fn choose(properties: &MemoryProperties, pattern: AccessPattern, bytes: u64) -> Self {
        use AccessPattern::{Activations, KvCache, Readback, Upload, Weights};
        match pattern {
            Weights if properties.suballocates && bytes <= SHARED_BYTES / SHARED_PART => {
                Self::Shared { buffer_bytes: SHARED_BYTES }
            }
            Weights | KvCache => Self::Dedicated,
            Activations => Self::Reused { classes_per_doubling: 8 },
            // The host reaches device memory itself, so what is staged is as long-lived as a step.
            Upload | Readback if properties.unified => Self::Reused { classes_per_doubling: 8 },
            Upload | Readback => Self::Reused { classes_per_doubling: 4 },
        }
    }
}

/// Buffers that can stand in for one another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Shelf {
    pub(super) kind: BufferKind,
    /// Whether buffers are divided among regions.
    pub(super) shared: bool,
}

/// What to look for, and what to ask the device for if it is not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) shelf: Shelf,
    /// Bytes the region takes.
    pub(super) bytes: u64,
    /// Largest free buffer that may be taken whole for it.
    pub(super) at_most: u64,
    /// A new buffer's size.
    pub(super) buffer_bytes: u64,
    /// Whether the buffer outlives the region.
    pub(super) keep: bool,
}

impl Plan {
    pub(super) fn new(
        properties: &MemoryProperties,
        strategy: AllocationStrategy,
        pattern: AccessPattern,
        bytes: u64,
    ) -> Result<Self> {
        let too_large = || Error::OutOfMemory { what: pattern.name().into(), bytes };
        if bytes == 0 {
            return Err(Error::invalid(pattern.name(), "a region of no bytes"));
        }
        let kind = pattern.kind();
        let exact = bytes.checked_next_multiple_of(properties.alignment).ok_or_else(too_large)?;
        let plan = match strategy {
            AllocationStrategy::Dedicated => Self {
                shelf: Shelf { kind, shared: false },
                bytes: exact,
                at_most: exact,
                buffer_bytes: exact,
                keep: false,
            },
            AllocationStrategy::Reused { classes_per_doubling } => {
                let class = size_class(exact, properties.alignment, classes_per_doubling);
                let class =
                    class.ok_or_else(too_large)?.min(properties.max_buffer_bytes).max(exact);
                Self {
                    shelf: Shelf { kind, shared: false },
                    bytes: class,
                    // The next class will do: better than another buffer beside it.
                    at_most: class.saturating_add(class / u64::from(classes_per_doubling.max(1))),
                    buffer_bytes: class,
                    keep: true,
                }
            }
            AllocationStrategy::Shared { .. } if !properties.suballocates => {
                let reason = "buffers of this device hold one region each";
                return Err(Error::invalid(pattern.name(), reason));
            }
            AllocationStrategy::Shared { buffer_bytes } => {
                let buffer_bytes = buffer_bytes.checked_next_multiple_of(properties.alignment);
                Self {
                    shelf: Shelf { kind, shared: true },
                    bytes: exact,
                    at_most: u64::MAX,
                    buffer_bytes: buffer_bytes.ok_or_else(too_large)?.max(exact),
                    keep: false,
                }
            }
        };
        match plan.buffer_bytes <= properties.max_buffer_bytes {
            true => Ok(plan),
            false => Err(too_large()),
        }
    }
}

/// The smallest of `per_doubling` evenly spaced sizes between two powers of two that holds `bytes`,
/// as a multiple of `alignment`.
fn size_class(bytes: u64, alignment: u64, per_doubling: u32) -> Option<u64> {
    let step = (bytes.checked_next_power_of_two()? / 2 / u64::from(per_doubling.max(1))).max(1);
    bytes.checked_next_multiple_of(step)?.checked_next_multiple_of(alignment)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DISCRETE: MemoryProperties = MemoryProperties {
        unified: false,
        suballocates: true,
        alignment: 256,
        max_buffer_bytes: 1 << 30,
        total_bytes: None,
    };

    #[test]
    fn classes_waste_at_most_their_step() {
        for bytes in [1, 255, 256, 257, 4096, 5000, 1 << 20, (1 << 20) + 1, 123_456_789] {
            for per_doubling in [1, 4, 8] {
                let class = size_class(bytes, 1, per_doubling).unwrap();
                assert!(class >= bytes);
                let waste = (class - bytes) as f64 / bytes as f64;
                assert!(waste <= 1.0 / f64::from(per_doubling), "{bytes}: {class}");
                assert_eq!(size_class(class, 1, per_doubling), Some(class), "a class is its own");
            }
        }
        assert_eq!(size_class(u64::MAX, 256, 4), None);
    }

    #[test]
    fn the_device_and_the_pattern_choose() {
        use AccessPattern::{Activations, KvCache, Upload, Weights};
        use AllocationStrategy::{Dedicated, Reused, Shared};
        let choose = AllocationStrategy::choose;
        let whole = MemoryProperties { suballocates: false, ..DISCRETE };
        let unified = MemoryProperties { unified: true, ..DISCRETE };
        assert!(matches!(choose(&DISCRETE, Weights, 10_240), Shared { .. }));
        assert_eq!(choose(&DISCRETE, Weights, 1 << 28), Dedicated);
        assert_eq!(choose(&whole, Weights, 10_240), Dedicated);
        assert_eq!(choose(&whole, KvCache, 1 << 20), Dedicated);
        assert_eq!(choose(&whole, Activations, 99), Reused { classes_per_doubling: 8 });
        assert_eq!(choose(&DISCRETE, Upload, 99), Reused { classes_per_doubling: 4 });
        assert_eq!(choose(&unified, Upload, 99), Reused { classes_per_doubling: 8 });
    }

    #[test]
    fn impossible_plans_are_errors() {
        let plan = |properties, strategy, bytes| {
            Plan::new(properties, strategy, AccessPattern::Weights, bytes)
        };
        use AllocationStrategy::{Dedicated, Reused, Shared};
        assert!(matches!(plan(&DISCRETE, Dedicated, 0), Err(Error::Invalid { .. })));
        for bytes in [(1 << 30) + 1, u64::MAX] {
            for strategy in
                [Dedicated, Reused { classes_per_doubling: 4 }, Shared { buffer_bytes: 1 << 20 }]
            {
                let error = plan(&DISCRETE, strategy, bytes);
                assert!(matches!(error, Err(Error::OutOfMemory { .. })), "{bytes}: {error:?}");
            }
        }
        let whole = MemoryProperties { suballocates: false, ..DISCRETE };
        assert!(plan(&whole, Shared { buffer_bytes: 1 << 20 }, 1).is_err());
        // The largest buffer there is can be had, though its class would be larger.
        let largest = (1 << 30) - 256 * 5;
        let reused = plan(&DISCRETE, Reused { classes_per_doubling: 1 }, largest).unwrap();
        assert_eq!(reused.buffer_bytes, 1 << 30);
    }
}
