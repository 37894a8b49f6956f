//! Tokens per second of a training step on random tokens: `cargo run --release -p bitnet-training
//! --example speed -- [LAYERS HIDDEN FFN VOCAB LEN ROWS THREADS STEPS]`.

use bitnet_quant::config::{Architecture, HiddenAct, ModelConfig, RopeScaling};
use bitnet_training::{AdamW, Batch, Model, Precision, Schedule, Shape, TrainOptions, Trainer};
use std::time::Instant;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1).map(|argument| argument.parse::<usize>());
    let mut next = |default| arguments.next().unwrap_or(Ok(default));
    let (layers, hidden, ffn, vocab) = (next(6)?, next(256)?, next(768)?, next(4096)?);
    let (len, rows, threads, steps) = (next(256)?, next(8)?, next(1)?, next(5)?);
    let config = ModelConfig {
        architecture: Architecture::Bitnet,
        name: "speed".into(),
        hidden_size: hidden,
        intermediate_size: ffn,
        num_hidden_layers: layers,
        num_attention_heads: hidden / 64,
        num_key_value_heads: (hidden / 128).max(1),
        head_dim: 64,
        vocab_size: vocab,
        max_position_embeddings: 1024,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        rope_scaling: RopeScaling::None,
        hidden_act: HiddenAct::Relu2,
        tie_word_embeddings: true,
        sub_norms: true,
        qk_norm: false,
        projection_norm_eps: None,
        attention_bias: false,
    };
    let schedule =
        Schedule { shape: Shape::Cosine, peak: 1e-3, floor: 0.0, warmup: 0.0, weight_decay: 0.1 };
    let options = TrainOptions { schedule, optimizer: AdamW::default(), clip: 1.0, threads };
    let precision = match std::env::var_os("FLOAT") {
        Some(_) => Precision::Float,
        None => Precision::Ternary,
    };
    let mut trainer = Trainer::new(Model::new(config, precision, 1)?, options)?;
    println!("{} parameters", trainer.model().parameter_count());
    let mut state = 1u64;
    let mut token = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 33) as u32 % vocab as u32
    };
    let tokens = (0..rows * (len + 1)).map(|_| token()).collect();
    let batch = Batch { tokens, rows, len, loss_mask: None };
    for _ in 0..steps {
        let start = Instant::now();
        let stats = trainer.step(std::slice::from_ref(&batch), 0.1, None)?;
        let seconds = start.elapsed().as_secs_f64();
        let speed = (rows * len) as f64 / seconds;
        println!("loss {:.4} norm {:.3}: {speed:.0} tokens/s", stats.loss, stats.grad_norm);
    }
    Ok(())
}
