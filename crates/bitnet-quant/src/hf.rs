//! Hugging Face folders: `config.json`, safetensors in one file or several, tokenizer files.
//!
//! Gives hyper-parameters, text assets and raw tensors under canonical names; what the bytes of a
//! projection mean is decided by the checkpoint, with the [`Quantization`] found here.

pub(crate) mod config;
mod sentencepiece;
pub(crate) mod text;

use crate::checkpoint::{FileFormat, Kind, Origin, Parts, Tensor, plain_format};
use crate::error::{Error, Result};
use crate::files::ModelFiles;
use crate::pack::Packing;
use crate::safetensors::{self, RawTensor};
use ::safetensors::Dtype;
use serde::Deserialize;
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use config::HfConfig;
pub use config::ScaleUse;
pub(crate) use config::{Mode, Quantization, lists};

/// The index of a checkpoint in several files.
const INDEX: &str = "model.safetensors.index.json";
/// The weights of a checkpoint in one file.
const SINGLE: &str = "model.safetensors";
const MAX_CONFIG: u64 = 4 << 20;
const MAX_INDEX: u64 = 64 << 20;
const MAX_SHARDS: usize = 4096;

/// Loads the model in `files`. `weights` names the one safetensors file to open; without it the
/// folder's index decides, or `model.safetensors`, or the only safetensors file there is.
pub(crate) fn load(files: &ModelFiles, weights: Option<&str>) -> Result<Parts> {
    let config = read_config(files)?;
    let text = text::read(files, config.bos_token_id, &config.eos_token_ids)?;
    let HfConfig { model, mut quantization, projection_norm_eps, .. } = config;
    let tensors = open_tensors(files, weights)?;
    // Embedding models of the BitNet family say nothing of it but by these norms.
    if quantization.is_none() && tensors.contains_key("model.layers.0.self_attn.q_proj.norm.weight")
    {
        quantization = Some(Quantization::either());
    }
    let tensors = tensors
        .into_iter()
        .map(|(name, tensor)| {
            let tensor = tensor.into_tensor(&name, quantization.as_ref());
            (name, tensor)
        })
        .collect();
    Ok(Parts {
        place: files.place(),
        config: model,
        text,
        format: FileFormat::Safetensors,
        overrides: Vec::new(),
        tensors,
        projection_norm_eps,
        quantization,
        activation_group: None,
        head_order: None,
        origin: Origin::Folder(files.clone()),
    })
}

/// A tensor with its name in the file.
struct HfTensor {
    name: String,
    file: Arc<str>,
    raw: RawTensor,
}

impl HfTensor {
    /// Bytes are packed trits where the configuration promises them, and of no use elsewhere.
    fn into_tensor(self, canonical: &str, quantization: Option<&Quantization>) -> Tensor {
        let RawTensor { dtype, mut shape, bytes } = self.raw;
        let packed = canonical
            .strip_suffix(".weight")
            .is_some_and(|path| quantization.is_some_and(|q| q.converts(path)));
        let kind = match (plain_format(dtype), dtype) {
            (Some(format), _) => Kind::Float(format),
            (None, Dtype::U8) if packed && shape.len() == 2 => {
                shape[0] = shape[0].saturating_mul(4);
                Kind::Ternary(Packing::HfU8)
            }
            _ => Kind::Other(dtype.to_string()),
        };
        Tensor { name: self.name, file: self.file, shape, kind, bytes }
    }
}

/// Reads `config.json`.
fn read_config(files: &ModelFiles) -> Result<HfConfig> {
    const FILE: &str = "config.json";
    let json = files.read(FILE, MAX_CONFIG)?;
    let json = json.ok_or_else(|| Error::missing(FILE).in_file(files.place()))?;
    config::parse(&json, files.name()).map_err(|e| e.in_file(files.label(FILE)))
}

/// Opens all tensors, by canonical name.
fn open_tensors(files: &ModelFiles, weights: Option<&str>) -> Result<BTreeMap<String, HfTensor>> {
    let mut found = BTreeMap::new();
    for shard in shards(files, weights)? {
        let bytes = files.map(&shard.file)?;
        let bytes = bytes.ok_or_else(|| Error::missing(&shard.file).in_file(files.place()))?;
        let label: Arc<str> = files.label(&shard.file).into();
        let mut promised = shard.tensors;
        for (name, raw) in safetensors::read(&bytes).map_err(|e| e.in_file(&label))? {
            promised.remove(&name);
            let tensor = HfTensor { name: name.clone(), file: label.clone(), raw };
            if found.insert(name.clone(), tensor).is_some() {
                let error = Error::malformed(format!("tensor {name}"), "one of this name", "two");
                return Err(error.in_file(label));
            }
        }
        if let Some(name) = promised.first() {
            return Err(
                Error::missing(format!("tensor {name}, promised by {INDEX}")).in_file(label)
            );
        }
    }
    let prefixed = !found.contains_key("embed_tokens.weight");
    let mut tensors = BTreeMap::new();
    for (name, tensor) in found {
        let canonical = canonical_name(&name, prefixed).into_owned();
        if tensors.contains_key(&canonical) {
            let error = Error::malformed(format!("tensor {canonical}"), "one name for it", "two");
            return Err(error.in_file(files.place()));
        }
        tensors.insert(canonical, tensor);
    }
    Ok(tensors)
}

/// A file of tensors and the names its index promises.
struct Shard {
    file: String,
    tensors: BTreeSet<String>,
}

fn shards(files: &ModelFiles, weights: Option<&str>) -> Result<Vec<Shard>> {
    let single = |file: &str| vec![Shard { file: file.to_owned(), tensors: BTreeSet::new() }];
    let index = read_index(files)?;
    match (weights, index) {
        // A file that the index lists is one part of a model, which is opened whole.
        (Some(file), Some(index)) if index.iter().any(|shard| shard.file == file) => Ok(index),
        (Some(file), _) => Ok(single(file)),
        (None, Some(index)) => Ok(index),
        (None, None) => match files.names_with("safetensors")?.as_slice() {
            [] => Err(Error::missing(SINGLE).in_file(files.place())),
            [file] => Ok(single(file)),
            several if several.iter().any(|file| file == SINGLE) => Ok(single(SINGLE)),
            several => {
                let expected = format!("{SINGLE}, {INDEX} or one file");
                let error = Error::malformed("safetensors files", expected, several.join(", "));
                Err(error.in_file(files.place()))
            }
        },
    }
}

fn read_index(files: &ModelFiles) -> Result<Option<Vec<Shard>>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let Some(json) = files.read(INDEX, MAX_INDEX)? else { return Ok(None) };
    let label = files.label(INDEX);
    let index: Index = serde_json::from_slice(&json).map_err(|e| Error::from(e).in_file(&label))?;
    let mut by_file: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (tensor, file) in index.weight_map {
        by_file.entry(file).or_default().insert(tensor);
    }
    if !(1..=MAX_SHARDS).contains(&by_file.len()) {
        let expected = format!("1 to {MAX_SHARDS} files");
        return Err(Error::malformed("weight_map", expected, by_file.len()).in_file(label));
    }
    Ok(Some(by_file.into_iter().map(|(file, tensors)| Shard { file, tensors }).collect()))
}

/// Brings the names that checkpoints use for the same tensor to one.
///
/// Models saved without their head lack the prefix `model.` (`prefixed` is false for them); the
/// 1bitLLM reproductions have their own names for the sub-norms; transformers and the embedding
/// models differ in the name of the norm inside a projection.
fn canonical_name(name: &str, prefixed: bool) -> Cow<'_, str> {
    let mut name = Cow::Borrowed(name);
    if !prefixed && !name.starts_with("lm_head.") {
        name = format!("model.{name}").into();
    }
    for (other, canonical) in [
        (".self_attn.inner_attn_ln.", ".self_attn.attn_sub_norm."),
        (".mlp.ffn_layernorm.", ".mlp.ffn_sub_norm."),
        ("_proj.rms_norm.", "_proj.norm."),
    ] {
        if name.contains(other) {
            name = name.replace(other, canonical).into();
        }
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;
    use ::safetensors::Dtype;
    use bytes::Bytes;

    /// A file with one-byte tensors of these names.
    fn file(names: &[&str]) -> Bytes {
        let plan: Vec<_> = names
            .iter()
            .map(|name| safetensors::Planned {
                name: name.to_string(),
                dtype: Dtype::U8,
                shape: vec![1],
            })
            .collect();
        let mut bytes = Vec::new();
        safetensors::write_header(&mut bytes, &plan).unwrap();
        bytes.resize(bytes.len() + names.len(), 0);
        bytes.into()
    }

    fn open(list: &[(&str, Bytes)], weights: Option<&str>) -> Result<Vec<String>> {
        let files = ModelFiles::in_memory("m", list.iter().cloned());
        open_tensors(&files, weights).map(|tensors| tensors.into_keys().collect())
    }

    fn index(entries: &[(&str, &str)]) -> Bytes {
        let map: BTreeMap<_, _> = entries.iter().copied().collect();
        Bytes::from(serde_json::json!({"metadata": {}, "weight_map": map}).to_string())
    }

    #[test]
    fn one_file_or_several() {
        let (a, b) =
            (("a.safetensors", file(&["model.x"])), ("b.safetensors", file(&["lm_head.weight"])));
        let both = index(&[("model.x", "a.safetensors"), ("lm_head.weight", "b.safetensors")]);
        let whole = ["lm_head.weight", "model.x"];
        assert_eq!(open(&[a.clone(), b.clone(), (INDEX, both.clone())], None).unwrap(), whole);
        let part = open(&[a.clone(), b.clone(), (INDEX, both)], Some("a.safetensors"));
        assert_eq!(part.unwrap(), whole, "a part opens the whole");
        assert_eq!(open(&[a.clone(), b.clone()], Some("a.safetensors")).unwrap(), ["model.x"]);
        assert_eq!(open(std::slice::from_ref(&a), None).unwrap(), ["model.x"]);
        assert!(
            open(&[a, b], None).unwrap_err().to_string().contains("a.safetensors, b.safetensors")
        );
        assert!(open(&[], None).unwrap_err().to_string().contains("model.safetensors is missing"));
    }

    #[test]
    fn lying_indexes_are_refused() {
        let a = ("a.safetensors", file(&["x"]));
        for (entries, expected) in [
            (&[("x", "gone.safetensors")][..], "gone.safetensors is missing"),
            (&[("x", "a.safetensors"), ("y", "a.safetensors")][..], "tensor y, promised by"),
            (&[][..], "weight_map: expected 1 to"),
        ] {
            let error = open(&[a.clone(), (INDEX, index(entries))], None).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        let twice = index(&[("x", "a.safetensors"), ("y", "b.safetensors")]);
        let b = ("b.safetensors", file(&["y", "x"]));
        let error = open(&[a, b, (INDEX, twice)], None).unwrap_err().to_string();
        assert!(error.contains("tensor x: expected one of this name, got two"), "{error}");

        let folder = tempfile::tempdir().unwrap();
        for path in ["../../etc/passwd", "/etc/passwd", "sub/../../a.safetensors"] {
            std::fs::write(folder.path().join(INDEX), index(&[("x", path)])).unwrap();
            let error = open_tensors(&ModelFiles::folder(folder.path()), None).err().unwrap();
            assert!(
                error.to_string().contains("the name of a file in the model's folder"),
                "{error}"
            );
        }
    }

    #[test]
    fn names_become_canonical() {
        for (name, prefixed, canonical) in [
            (
                "model.layers.0.self_attn.inner_attn_ln.weight",
                true,
                "model.layers.0.self_attn.attn_sub_norm.weight",
            ),
            (
                "model.layers.1.mlp.ffn_layernorm.weight",
                true,
                "model.layers.1.mlp.ffn_sub_norm.weight",
            ),
            ("layers.1.mlp.up_proj.norm.weight", false, "model.layers.1.mlp.up_proj.norm.weight"),
            (
                "model.layers.1.mlp.up_proj.rms_norm.weight",
                true,
                "model.layers.1.mlp.up_proj.norm.weight",
            ),
            ("lm_head.weight", false, "lm_head.weight"),
            ("norm.weight", false, "model.norm.weight"),
        ] {
            assert_eq!(canonical_name(name, prefixed), canonical);
        }
    }
}
