//! Loss and every gradient against what the reference implementation computed.

use bitnet_quant::Checkpoint;
use bitnet_training::{AdamW, Batch, Model, Precision, Schedule, Shape, TrainOptions, Trainer};
use safetensors::SafeTensors;
use std::path::{Path, PathBuf};

fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/goldens").join(path)
}

fn options() -> TrainOptions {
    let schedule =
        Schedule { shape: Shape::Cosine, peak: 1e-3, floor: 0.0, warmup: 0.0, weight_decay: 0.0 };
    TrainOptions { schedule, optimizer: AdamW::default(), clip: 1.0, threads: 1 }
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

/// ‖a − b‖ / ‖b‖
fn distance(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let square = |x: f64| x * x;
    let difference: f64 = a.iter().zip(b).map(|(a, b)| square(f64::from(a - b))).sum();
    let reference: f64 = b.iter().map(|b| square(f64::from(*b))).sum();
    (difference / reference).sqrt()
}

#[test]
fn loss_and_gradients_match_the_reference() {
    for name in ["bitnet-tiny", "llama-ternary-tiny"] {
        let checkpoint = Checkpoint::open(fixture(name).join("online")).unwrap();
        let golden = std::fs::read(fixture(name).join("golden.safetensors")).unwrap();
        let golden = SafeTensors::deserialize(&golden).unwrap();
        let ids = golden.tensor("input_ids").unwrap();
        let tokens: Vec<u32> =
            ids.data().as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b) as u32).collect();
        // The reference shifts the labels: the last token of a row predicts nothing.
        let (rows, width) = (ids.shape()[0], ids.shape()[1]);
        let batch = Batch { tokens, rows, len: width - 1, loss_mask: None };
        for threads in [1, 2] {
            let model = Model::from_checkpoint(&checkpoint, Precision::Ternary).unwrap();
            let mut trainer = Trainer::new(model, TrainOptions { threads, ..options() }).unwrap();
            // One batch for each row, so that two threads have something to share.
            let batches: Vec<Batch> = batch
                .tokens
                .chunks(width)
                .map(|row| Batch { tokens: row.to_vec(), rows: 1, ..batch.clone() })
                .collect();
            assert_eq!(batches.len(), rows);
            let (loss, gradients) = trainer.loss_and_gradients(&batches).unwrap();
            let want = floats(golden.tensor("loss").unwrap().data())[0];
            println!("{name}: loss {loss}, reference {want}");
            assert!((loss - f64::from(want)).abs() < 1e-4 * f64::from(want), "{name}: loss {loss}");
            let mut worst: (f64, &str) = (0.0, "");
            for ((parameter, _), ours) in trainer.model().named_parameters().zip(&gradients) {
                let reference = golden.tensor(&format!("grad.{}", parameter.name)).unwrap();
                let distance = distance(ours, &floats(reference.data()));
                println!("{name} {}: {distance:.2e}", parameter.name);
                if distance > worst.0 {
                    worst = (distance, &parameter.name);
                }
            }
            assert!(worst.0 < 1e-3, "{name}: {worst:?}");
        }
    }
}
