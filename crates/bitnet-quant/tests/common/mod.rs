//! What the tests of this crate share.
#![allow(dead_code)] // each test file uses its part

use bitnet_core::weights::{ActivationQuant, FloatRows, Matrix, Scales};
use bitnet_quant::checkpoint::ModelFiles;
use bitnet_quant::safetensors::{Planned, write_header};
use bitnet_quant::{Checkpoint, Error};
use bytes::Bytes;
use safetensors::Dtype;
use std::path::PathBuf;

/// The projections of a layer.
pub(crate) const PROJECTIONS: [&str; 7] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];

/// A file or folder of the golden models.
pub(crate) fn golden_path(name: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/goldens")).join(name)
}

/// Opens one of them.
pub(crate) fn golden(name: &str) -> Checkpoint {
    Checkpoint::open(golden_path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// A model small enough to damage a thousand times: one layer, 16 features, two heads, packed
/// ternary projections, an embedding of 8 tokens.
pub(crate) struct Tiny {
    pub(crate) config: serde_json::Value,
    pub(crate) tensors: Vec<(Planned, Vec<u8>)>,
}

impl Tiny {
    pub(crate) fn new() -> Self {
        Self::sized(16, 32)
    }

    /// The same with other widths.
    pub(crate) fn sized(hidden: usize, intermediate: usize) -> Self {
        let config = serde_json::json!({
            "model_type": "llama", "hidden_size": hidden, "intermediate_size": intermediate,
            "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 8,
            "tie_word_embeddings": true,
            "quantization_config": {"quant_method": "bitnet", "linear_class": "autobitlinear"}
        });
        let mut tiny = Self { config, tensors: Vec::new() };
        tiny.push_f32("model.embed_tokens.weight", &[8, hidden], &vec![0.5; 8 * hidden]);
        for norm in ["norm", "layers.0.input_layernorm", "layers.0.post_attention_layernorm"] {
            tiny.push_f32(&format!("model.{norm}.weight"), &[hidden], &vec![1.0; hidden]);
        }
        for part in PROJECTIONS {
            let (rows, cols) = match part {
                "mlp.gate_proj" | "mlp.up_proj" => (intermediate, hidden),
                "mlp.down_proj" => (hidden, intermediate),
                _ => (hidden, hidden),
            };
            let path = format!("model.layers.0.{part}");
            tiny.push_f32(&format!("{path}.weight_scale"), &[1], &[0.25]);
            let packed = vec![0b10_01_00_01; rows / 4 * cols];
            tiny.push(&format!("{path}.weight"), Dtype::U8, &[rows / 4, cols], packed);
        }
        tiny
    }

    pub(crate) fn push(&mut self, name: &str, dtype: Dtype, shape: &[usize], bytes: Vec<u8>) {
        let planned = Planned { name: name.to_owned(), dtype, shape: shape.to_vec() };
        assert_eq!(planned.byte_len(), bytes.len(), "{name}");
        self.tensors.push((planned, bytes));
    }

    pub(crate) fn push_f32(&mut self, name: &str, shape: &[usize], values: &[f32]) {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.push(name, Dtype::F32, shape, bytes);
    }

    /// Takes a tensor out, so that another may be pushed in its place.
    pub(crate) fn remove(&mut self, name: &str) -> (Planned, Vec<u8>) {
        let at = self.tensors.iter().position(|(planned, _)| planned.name == name);
        self.tensors.remove(at.unwrap_or_else(|| panic!("no tensor {name}")))
    }

    pub(crate) fn safetensors(&self) -> Vec<u8> {
        let plan: Vec<Planned> = self.tensors.iter().map(|(planned, _)| planned.clone()).collect();
        let mut bytes = Vec::new();
        write_header(&mut bytes, &plan).expect("memory takes all");
        self.tensors.iter().for_each(|(_, data)| bytes.extend_from_slice(data));
        bytes
    }

    pub(crate) fn files(&self) -> [(&'static str, Bytes); 2] {
        let config = Bytes::from(self.config.to_string());
        [("config.json", config), ("model.safetensors", self.safetensors().into())]
    }

    pub(crate) fn open(&self) -> Result<Checkpoint, Error> {
        Checkpoint::from_files(ModelFiles::in_memory("tiny", self.files()))
    }
}

/// Asks a checkpoint for everything it has, as loading a model does.
pub(crate) fn read_all(checkpoint: &Checkpoint) -> Result<(), Error> {
    let config = checkpoint.config();
    for layer in 0..config.num_hidden_layers {
        for part in PROJECTIONS {
            let linear = checkpoint.linear(&format!("model.layers.{layer}.{part}"))?;
            if let Matrix::Ternary { weights, .. } = linear.matrix {
                let mut codes = vec![0; weights.cols()];
                (0..weights.rows()).for_each(|row| weights.decode_row(row, &mut codes));
            }
        }
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            checkpoint.norm(&format!("model.layers.{layer}.{norm}"))?;
        }
    }
    let table = checkpoint.table("model.embed_tokens")?;
    table.decode_row(table.rows() - 1, &mut vec![0.0; table.cols()]);
    checkpoint.norm("model.norm").map(|_| ())
}

/// What a projection is: codes row by row, scale, quantization of its input.
pub(crate) type Trits = (Vec<u8>, f32, ActivationQuant);

/// The trits of a projection with one scale and neither bias nor norm.
pub(crate) fn trits(checkpoint: &Checkpoint, path: &str) -> Trits {
    let linear = checkpoint.linear(path).unwrap();
    assert!(linear.bias.is_none() && linear.input_norm.is_none());
    let Matrix::Ternary { weights, activations } = linear.matrix else { panic!("{path} is float") };
    let mut codes = vec![9; weights.rows() * weights.cols()];
    for (row, codes) in codes.chunks_mut(weights.cols()).enumerate() {
        weights.decode_row(row, codes);
    }
    let Scales::Tensor(scale) = weights.scales() else { panic!("{path} has several scales") };
    (codes, *scale, activations)
}

/// All numbers of a table.
pub(crate) fn floats(table: &dyn FloatRows) -> Vec<f32> {
    let mut all = vec![0.0; table.rows() * table.cols()];
    for (row, out) in all.chunks_mut(table.cols()).enumerate() {
        table.decode_row(row, out);
    }
    all
}
