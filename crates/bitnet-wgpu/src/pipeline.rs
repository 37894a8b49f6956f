//! Which shader computes what: their sources put together for a device, and their compiled form.
//!
//! A kernel's source is a few files of `kernels/` one after the other, chosen by what it reads
//! (number formats), how its results reach their place (set, added, gated) and what the device has
//! (subgroups, half precision). Order does not matter in WGSL.

use std::collections::HashMap;
use std::sync::Arc;

use bitnet_core::Result;
use bitnet_core::backend::KvType;
use bitnet_core::weights::FloatType;

use crate::device::Gpu;

macro_rules! kernel {
    ($name:literal) => {
        include_str!(concat!("kernels/", $name, ".wgsl"))
    };
}

/// How the result of a product reaches its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Store {
    /// It replaces what was there.
    Set,
    /// It is added.
    Add,
    /// It is multiplied with the activation of the gate's product.
    Gate,
}

/// Everything the backend computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Kernel {
    Embed(FloatType),
    Norm,
    QuantizeTokens,
    QuantizeGroups,
    TernaryDecode(Store),
    TernaryTiled(Store),
    TernaryGrouped(Store),
    FloatProduct(FloatType, Store),
    Rotate,
    StoreHeads(KvType),
    Attention(KvType),
    TopLogits,
    TopBest,
}

/// What of a device the sources depend on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Abilities {
    pub(crate) subgroups: bool,
    pub(crate) half_precision: bool,
}

impl Store {
    const fn source(self) -> &'static str {
        match self {
            Self::Set => kernel!("store_set"),
            Self::Add => kernel!("store_add"),
            Self::Gate => kernel!("store_gate"),
        }
    }
}

fn format(dtype: FloatType, abilities: Abilities) -> &'static str {
    match dtype {
        FloatType::F32 => kernel!("format_f32"),
        FloatType::F16 if abilities.half_precision => kernel!("format_f16_native"),
        FloatType::F16 => kernel!("format_f16"),
        FloatType::BF16 => kernel!("format_bf16"),
    }
}

const fn cache_format(dtype: KvType) -> &'static str {
    match dtype {
        KvType::F32 => kernel!("cache_f32"),
        KvType::F16 => kernel!("cache_f16"),
        KvType::Q8 => kernel!("cache_q8"),
    }
}

const fn cache_pack(dtype: KvType) -> &'static str {
    match dtype {
        KvType::F32 => kernel!("pack_f32"),
        KvType::F16 => kernel!("pack_f16"),
        KvType::Q8 => kernel!("pack_q8"),
    }
}

impl Kernel {
    /// The kernel in WGSL.
    pub(crate) fn source(self, abilities: Abilities) -> String {
        let parts: &[&str] = match self {
            Self::Embed(dtype) => &[format(dtype, abilities), kernel!("embed")],
            Self::Norm => &[kernel!("reduce"), kernel!("normed"), kernel!("norm")],
            Self::QuantizeTokens => &[
                kernel!("reduce"),
                kernel!("normed"),
                kernel!("quantize_scale"),
                kernel!("quantize_token"),
            ],
            Self::QuantizeGroups => &[
                kernel!("reduce"),
                kernel!("normed"),
                kernel!("quantize_scale"),
                kernel!("quantize_groups"),
            ],
            Self::TernaryDecode(store) => &[
                kernel!("ternary"),
                kernel!("ternary_whole"),
                kernel!("ternary_decode"),
                match abilities.subgroups {
                    true => kernel!("ternary_decode_subgroups"),
                    false => kernel!("ternary_decode_shared"),
                },
                store.source(),
            ],
            Self::TernaryTiled(store) => &[
                kernel!("ternary"),
                kernel!("ternary_whole"),
                kernel!("ternary_tiled"),
                store.source(),
            ],
            Self::TernaryGrouped(store) => {
                &[kernel!("reduce"), kernel!("ternary"), kernel!("ternary_grouped"), store.source()]
            }
            Self::FloatProduct(dtype, store) => &[
                kernel!("reduce"),
                format(dtype, abilities),
                kernel!("float_product"),
                store.source(),
            ],
            Self::Rotate => &[kernel!("reduce"), kernel!("head"), kernel!("rotate")],
            Self::StoreHeads(dtype) => &[
                kernel!("reduce"),
                kernel!("head"),
                kernel!("cache"),
                cache_pack(dtype),
                kernel!("store_heads"),
            ],
            Self::Attention(dtype) => {
                &[kernel!("reduce"), kernel!("cache"), cache_format(dtype), kernel!("attention")]
            }
            Self::TopLogits => &[kernel!("top_k_logits"), kernel!("top_k")],
            Self::TopBest => &[kernel!("top_k_best"), kernel!("top_k")],
        };
        let native_halves =
            matches!(self, Self::Embed(FloatType::F16) | Self::FloatProduct(FloatType::F16, _))
                && abilities.half_precision;
        let mut source = String::from(if native_halves { "enable f16;\n" } else { "" });
        for part in parts {
            source.push_str(part);
            source.push('\n');
        }
        source
    }
}

/// A compiled kernel.
pub(crate) struct Pipeline {
    pub(crate) raw: wgpu::ComputePipeline,
    pub(crate) layout: wgpu::BindGroupLayout,
}

/// The kernels one backend has used so far: found without a lock.
pub(crate) struct Pipelines {
    abilities: Abilities,
    known: HashMap<Kernel, Arc<Pipeline>>,
}

impl Pipelines {
    pub(crate) fn new(gpu: &Gpu) -> Self {
        let abilities = Abilities { subgroups: gpu.subgroups, half_precision: gpu.half_precision };
        Self { abilities, known: HashMap::new() }
    }

    /// The compiled form of a kernel.
    ///
    /// # Errors
    /// [`bitnet_core::Error::Device`] if the driver does not take the shader.
    pub(crate) fn get(&mut self, gpu: &Gpu, kernel: Kernel) -> Result<Arc<Pipeline>> {
        if let Some(pipeline) = self.known.get(&kernel) {
            return Ok(pipeline.clone());
        }
        let mut compiled = gpu.compiled.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(pipeline) = compiled.get(&kernel) {
            self.known.insert(kernel, pipeline.clone());
            return Ok(pipeline.clone());
        }
        let label = format!("{kernel:?}");
        let module = gpu.device.create_shader_module(wgpu::ShaderModuleDescriptor {
            label: Some(&label),
            source: wgpu::ShaderSource::Wgsl(kernel.source(self.abilities).into()),
        });
        let raw = gpu.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(&label),
            layout: None,
            module: &module,
            entry_point: Some("main"),
            // Every kernel writes its workgroup memory before it reads it.
            compilation_options: wgpu::PipelineCompilationOptions {
                zero_initialize_workgroup_memory: false,
                ..Default::default()
            },
            cache: None,
        });
        gpu.check()?;
        let layout = raw.get_bind_group_layout(0);
        let pipeline = Arc::new(Pipeline { raw, layout });
        compiled.insert(kernel, pipeline.clone());
        self.known.insert(kernel, pipeline.clone());
        Ok(pipeline)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Vec<Kernel> {
        let stores = [Store::Set, Store::Add, Store::Gate];
        let floats = [FloatType::F32, FloatType::F16, FloatType::BF16];
        let caches = [KvType::F32, KvType::F16, KvType::Q8];
        let mut kernels = vec![
            Kernel::Norm,
            Kernel::QuantizeTokens,
            Kernel::QuantizeGroups,
            Kernel::Rotate,
            Kernel::TopLogits,
            Kernel::TopBest,
        ];
        kernels.extend(floats.map(Kernel::Embed));
        for store in stores {
            kernels.extend([
                Kernel::TernaryDecode(store),
                Kernel::TernaryTiled(store),
                Kernel::TernaryGrouped(store),
            ]);
            kernels.extend(floats.map(|dtype| Kernel::FloatProduct(dtype, store)));
        }
        kernels.extend(caches.map(Kernel::StoreHeads));
        kernels.extend(caches.map(Kernel::Attention));
        kernels
    }

    /// Translates a shader as wgpu does for Vulkan, Metal and Direct3D 12, there in the dialect of
    /// Microsoft's compiler and, where it has all the shader asks for, of the older one.
    fn translate(
        module: &naga::Module,
        info: &naga::valid::ModuleInfo,
        abilities: Abilities,
    ) -> std::result::Result<(), String> {
        use naga::back::{hlsl, msl, spv};
        let options = spv::Options { lang_version: (1, 3), ..Default::default() };
        spv::write_vec(module, info, &options, None).map_err(|e| format!("SPIR-V: {e}"))?;
        let options = msl::Options { lang_version: (2, 4), ..Default::default() };
        let (_, names) = msl::write_string(module, info, &options, &Default::default())
            .map_err(|e| format!("MSL: {e}"))?;
        for name in names.entry_point_names {
            name.map_err(|e| format!("MSL: {e}"))?;
        }
        let mut dialects = vec![hlsl::ShaderModel::V6_4];
        if !abilities.subgroups && !abilities.half_precision {
            dialects.push(hlsl::ShaderModel::V5_1);
        }
        for shader_model in dialects {
            let immediates_target = Some(hlsl::BindTarget::default());
            let options = hlsl::Options { shader_model, immediates_target, ..Default::default() };
            let mut text = String::new();
            let names = hlsl::Writer::new(&mut text, &options, &Default::default())
                .write(module, info, None)
                .map_err(|e| format!("HLSL: {e}"))?;
            for name in names.entry_point_names {
                name.map_err(|e| format!("HLSL: {e}"))?;
            }
        }
        Ok(())
    }

    /// Every kernel in every form is valid WGSL that asks for nothing the device may lack, and can be
    /// said in the languages of all devices.
    #[test]
    fn every_shader_is_valid() {
        use naga::valid::{Capabilities, ValidationFlags, Validator};
        for (subgroups, half_precision) in
            [(false, false), (true, false), (false, true), (true, true)]
        {
            let abilities = Abilities { subgroups, half_precision };
            let mut capabilities =
                Capabilities::IMMEDIATES | Capabilities::SHADER_FLOAT16_IN_FLOAT32;
            capabilities.set(Capabilities::SUBGROUP, subgroups);
            capabilities.set(Capabilities::SHADER_FLOAT16, half_precision);
            for kernel in all() {
                let source = kernel.source(abilities);
                let module = naga::front::wgsl::parse_str(&source)
                    .unwrap_or_else(|e| panic!("{kernel:?}: {}", e.emit_to_string(&source)));
                let mut validator = Validator::new(ValidationFlags::all(), capabilities);
                validator
                    .subgroup_stages(naga::valid::ShaderStages::COMPUTE)
                    .subgroup_operations(naga::valid::SubgroupOperationSet::all());
                let info = validator
                    .validate(&module)
                    .unwrap_or_else(|e| panic!("{kernel:?}: {}", e.emit_to_string(&source)));
                translate(&module, &info, abilities)
                    .unwrap_or_else(|e| panic!("{kernel:?}, {abilities:?}: {e}"));
                let [entry] = &*module.entry_points else { panic!("{kernel:?}: one entry point") };
                let lanes: u32 = entry.workgroup_size.iter().product();
                assert!(lanes <= 256, "{kernel:?}: {lanes} lanes are more than every device has");
            }
        }
    }

    #[test]
    fn a_broken_shader_is_found() {
        let source = Kernel::Norm
            .source(Abilities { subgroups: false, half_precision: false })
            .replace("p.cols + col", "p.colls + col");
        assert!(naga::front::wgsl::parse_str(&source).is_err());
    }
}
