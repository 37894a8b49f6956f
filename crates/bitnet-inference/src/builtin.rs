//! The model inside the program: something to run before anything is downloaded.

use bitnet_quant::checkpoint::{Checkpoint, ModelFiles};
use bytes::Bytes;

/// The name under which `load_model` finds the built-in model.
pub const BUILTIN_MODEL: &str = "builtin";

/// Opens the built-in model the way any folder is opened.
pub fn checkpoint() -> bitnet_quant::Result<Checkpoint> {
    macro_rules! file {
        ($name:literal) => {
            ($name, Bytes::from_static(include_bytes!(concat!("../builtin/", $name))))
        };
    }
    let files = [
        file!("config.json"),
        file!("model.safetensors"),
        file!("tokenizer.json"),
        file!("tokenizer_config.json"),
    ];
    Checkpoint::from_files(ModelFiles::in_memory(BUILTIN_MODEL, files))
}
