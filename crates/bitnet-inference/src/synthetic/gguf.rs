//! Writes a synthetic model as a GGUF file, for programs and measurements that need one.
//!
//! The architecture is `bitnet` (or `llama`), which llama.cpp opens too. The vocabulary has the bytes
//! and numbers, so that any text is a prompt and answers can be read.
//! Files of the `llama` architecture keep the rows of each head in another order; among random
//! weights one order is as good as another, so rows are written as they come.

use std::fs::{self, File};
use std::path::Path;

use bitnet_core::weights::{FloatRows, FloatType, Matrix};
use bitnet_quant::config::{Architecture, HiddenAct};
use bitnet_quant::gguf::{Array, GgufWriter, Metadata, TensorSpec, TensorType, Value};
use bitnet_quant::pack::{FloatFormat, Packing, encode};

use super::SyntheticModel;
use crate::error::{InferenceError, Result};
use crate::source::WeightSource;
use crate::tokenizer::alphabet;

/// Projections of a layer, in GGUF and by canonical name.
const PROJECTIONS: [(&str, &str); 7] = [
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// Norms of a layer; a model has those of its shape.
const NORMS: [(&str, &str); 6] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("attn_sub_norm", "self_attn.attn_sub_norm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_sub_norm", "mlp.ffn_sub_norm"),
];

/// What a tensor is made of.
enum Kind {
    Table,
    Norm,
    Projection,
}

/// A tensor of the file: its description, what it is, and its canonical name.
type Entry = (TensorSpec, Kind, String);

impl SyntheticModel {
    /// Writes the model with its ternary weights in `packing`, one tensor at a time; `progress` is
    /// called with (bytes written, bytes of all tensors). Opened again, it computes the same.
    ///
    /// # Errors
    /// A packing that GGUF does not have or that this shape does not fit; a file that exists already
    /// or cannot be written.
    pub fn write_gguf(
        &self,
        path: impl AsRef<Path>,
        packing: Packing,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<()> {
        let path = path.as_ref();
        let ternary = TensorType::of_packing(packing)
            .ok_or_else(|| InferenceError::input("packing", "one that GGUF has", packing))?;
        let entries = self.entries(ternary);
        // Sizes are checked before a file is made.
        for (spec, ..) in &entries {
            spec.n_bytes().map_err(|e| InferenceError::file(path.display().to_string(), e))?;
        }
        let file = File::create_new(path).map_err(|e| InferenceError::Resource {
            resource: path.display().to_string(),
            reason: e.to_string(),
        })?;
        let written = self.write(file, path, packing, &entries, progress);
        if written.is_err() {
            let _ = fs::remove_file(path);
        }
        written
    }

    fn write(
        &self,
        file: File,
        path: &Path,
        packing: Packing,
        entries: &[Entry],
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<()> {
        let in_file = |e| InferenceError::file(path.display().to_string(), e);
        let specs: Vec<TensorSpec> = entries.iter().map(|(spec, ..)| spec.clone()).collect();
        let writer = GgufWriter::new(file, path, &self.metadata(), &specs).map_err(in_file)?;
        let mut writer = writer.on_progress(progress);
        for (spec, kind, name) in entries {
            let bytes = match kind {
                Kind::Table => table_bytes(&*self.table(name)?),
                Kind::Norm => {
                    self.norm(name)?.weight.iter().flat_map(|x| x.to_le_bytes()).collect()
                }
                Kind::Projection => match self.linear(name)?.matrix {
                    Matrix::Ternary { weights, .. } => {
                        encode(packing, &*weights, name).map_err(in_file)?.bytes
                    }
                    Matrix::Float(_) => return Err(self.lacks(name)),
                },
            };
            writer.write_tensor(&spec.name, &bytes).map_err(in_file)?;
        }
        writer.finish().map_err(in_file)?;
        Ok(())
    }

    /// Every tensor of the file, in its order.
    fn entries(&self, ternary: TensorType) -> Vec<Entry> {
        let half = TensorType::of_float(FloatFormat::Plain(FloatType::F16));
        let spec =
            |name: String, shape: Vec<usize>, tensor_type| TensorSpec { name, shape, tensor_type };
        let mut entries = Vec::new();
        for (gguf, name) in [("token_embd", "model.embed_tokens"), ("output", "lm_head")] {
            if let Some((rows, cols)) = self.shape(name) {
                let spec = spec(format!("{gguf}.weight"), vec![rows, cols], half);
                entries.push((spec, Kind::Table, name.to_owned()));
            }
        }
        let mut norm = |gguf: String, name: String| {
            if let Some(width) = self.norm_width(&name) {
                let spec = spec(format!("{gguf}.weight"), vec![width], TensorType::F32);
                entries.push((spec, Kind::Norm, name));
            }
        };
        norm("output_norm".into(), "model.norm".into());
        for layer in 0..self.config.num_hidden_layers {
            for (gguf, part) in NORMS {
                norm(format!("blk.{layer}.{gguf}"), format!("model.layers.{layer}.{part}"));
            }
        }
        for layer in 0..self.config.num_hidden_layers {
            for (gguf, part) in PROJECTIONS {
                let name = format!("model.layers.{layer}.{part}");
                if let Some((rows, cols)) = self.shape(&name) {
                    let gguf = format!("blk.{layer}.{gguf}.weight");
                    entries.push((spec(gguf, vec![rows, cols], ternary), Kind::Projection, name));
                }
            }
        }
        entries
    }

    fn metadata(&self) -> Metadata {
        let c = &self.config;
        let family = match c.architecture {
            Architecture::Bitnet => "bitnet",
            Architecture::Qwen3 => "qwen3",
            _ => "llama",
        };
        let text = |text: &str| Value::String(text.to_owned());
        let number = |n: usize| Value::U32(n as u32);
        let mut metadata = Metadata::new();
        metadata.set("general.architecture", text(family));
        metadata.set("general.name", text(&c.name));
        metadata.set("general.quantization_version", Value::U32(2));
        let mut set = |key: &str, value| metadata.set(format!("{family}.{key}"), value);
        set("vocab_size", number(c.vocab_size));
        set("context_length", number(c.max_position_embeddings));
        set("embedding_length", number(c.hidden_size));
        set("block_count", number(c.num_hidden_layers));
        set("feed_forward_length", number(c.intermediate_size));
        set("rope.dimension_count", number(c.head_dim));
        set("rope.freq_base", Value::F32(c.rope_theta as f32));
        set("attention.head_count", number(c.num_attention_heads));
        set("attention.head_count_kv", number(c.num_key_value_heads));
        set("attention.key_length", number(c.head_dim));
        set("attention.value_length", number(c.head_dim));
        set("attention.layer_norm_rms_epsilon", Value::F32(c.rms_norm_eps));
        if c.hidden_act == HiddenAct::Relu2 {
            set("hidden_activation", text("relu2"));
        }
        let tokens = vocabulary(c.vocab_size);
        let kind = if tokens.is_some() { "gpt2" } else { "no_vocab" };
        metadata.set("tokenizer.ggml.model", text(kind));
        if let Some(tokens) = tokens {
            let list = |texts| Value::Array(Array::String(texts));
            metadata.set("tokenizer.ggml.pre", text("gpt-2"));
            metadata.set("tokenizer.ggml.tokens", list(tokens));
            metadata.set("tokenizer.ggml.merges", list(Vec::new()));
        }
        metadata
    }
}

/// A token for each byte, then ` 256`, ` 257` and so on; `None` where not even the bytes fit.
fn vocabulary(size: usize) -> Option<Vec<String>> {
    let character = |byte: u8| {
        let mut token = String::new();
        alphabet::push_chars(&[byte], &mut token);
        token
    };
    let space = character(b' ');
    let numbers = (256..size).map(|id| format!("{space}{id}"));
    (size >= 256).then(|| (0..=255).map(character).chain(numbers).collect())
}

/// The numbers of a table that holds them as they are to be written.
fn table_bytes(table: &dyn FloatRows) -> Vec<u8> {
    table.raw().map(|(_, bytes)| bytes.into()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::{Bench, Settings, Test};
    use crate::source;
    use crate::synthetic::SyntheticShape;
    use crate::tokenizer::EncodeOptions;
    use bitnet_quant::pack::I2sLayout;

    /// The shape of 2B4T, small.
    fn small() -> SyntheticModel {
        let config = bitnet_quant::config::ModelConfig {
            hidden_size: 256,
            intermediate_size: 512,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            head_dim: 64,
            vocab_size: 100,
            ..SyntheticShape::Bitnet2B4T.config()
        };
        SyntheticModel::new(config, 3)
    }

    fn fingerprint(open: impl FnOnce() -> Result<Box<dyn WeightSource>>) -> u64 {
        let test = Test::Decode { tokens: 3, sequences: 2, depth: 5 };
        let settings = Settings { threads: Some(1), repetitions: 1, ..Settings::default() };
        let mut bench = Bench::load(open, settings, &[test], &mut |_, _| {}).unwrap();
        bench.run(test, &mut |_, _| {}).unwrap().fingerprint
    }

    #[test]
    fn the_file_computes_what_the_model_in_memory_does() {
        let in_memory = fingerprint(|| Ok(Box::new(small())));
        let folder = tempfile::tempdir().unwrap();
        let packings = [Packing::I2S(I2sLayout::Canonical128), Packing::Tq2_0, Packing::Tq1_0];
        for packing in packings {
            let path = folder.path().join(format!("{packing}.gguf"));
            let mut written = (0, 1);
            small().write_gguf(&path, packing, &mut |done, total| written = (done, total)).unwrap();
            assert_eq!(written.0, written.1);
            let from_file = fingerprint(|| Ok(Box::new(source::open(&path)?)));
            assert_eq!(from_file, in_memory, "{packing}");
            let again = small().write_gguf(&path, packing, &mut |_, _| {});
            assert!(matches!(again, Err(InferenceError::Resource { .. })), "no file is replaced");
        }
    }

    #[test]
    fn any_text_is_a_prompt_of_the_file() {
        let mut config = small().config;
        config.vocab_size = 300;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        let model = SyntheticModel::new(config, 3);
        model.write_gguf(&path, Packing::Tq2_0, &mut |_, _| {}).unwrap();
        let engine = crate::InferenceEngine::builder().build_blocking().unwrap();
        let model = engine.load_model_blocking(&path).unwrap();
        let tokens = model.tokenizer().unwrap().encode("héy 🦀", EncodeOptions::PROMPT).unwrap();
        assert_eq!(tokens.len(), "héy 🦀".len());
        let options = crate::GenerationOptions::greedy().max_tokens(4);
        let answer = engine.generate_blocking(&model, "héy 🦀", &options).unwrap();
        assert_eq!(answer.tokens.len(), 4);
    }

    #[test]
    fn a_packing_that_does_not_fit_leaves_no_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        let model = SyntheticModel::new(SyntheticShape::Bitnet3B.config(), 0);
        let error = model.write_gguf(&path, Packing::Tq2_0, &mut |_, _| {}).unwrap_err();
        assert!(matches!(error, InferenceError::Model { .. }), "{error}");
        assert!(model.write_gguf(&path, Packing::HfU8, &mut |_, _| {}).is_err());
        assert!(!path.exists());
    }
}
