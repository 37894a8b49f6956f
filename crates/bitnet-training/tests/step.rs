//! What a step is: the engine's own forward pass, a loss of what counts and of nothing else, clipping,
//! AdamW.

use std::path::Path;

use bitnet_inference::{EngineConfig, InferenceEngine, InferenceInput, KvType};
use bitnet_quant::convert::Target;
use bitnet_training::recipe::{Family, ModelRecipe};
use bitnet_training::tokenizer::{TokenizerOptions, train_tokenizer};
use bitnet_training::{
    AdamW, Batch, Model, ParameterKind, Precision, Schedule, Shape, TrainOptions, Trainer, export,
};

const VOCAB: usize = 300;

fn shape(family: Family, tied: bool) -> ModelRecipe {
    ModelRecipe {
        family: Some(family),
        hidden_size: Some(128),
        intermediate_size: Some(256),
        num_hidden_layers: Some(2),
        num_attention_heads: Some(4),
        num_key_value_heads: Some(2),
        tie_word_embeddings: Some(tied),
        ..ModelRecipe::default()
    }
}

fn model(family: Family, tied: bool, precision: Precision) -> Model {
    let config = shape(family, tied).config("t", VOCAB, 64).unwrap();
    Model::new(config, precision, 7).unwrap()
}

fn options(peak: f64, clip: f64) -> TrainOptions {
    let schedule =
        Schedule { shape: Shape::Cosine, peak, floor: 0.0, warmup: 0.0, weight_decay: 0.1 };
    TrainOptions { schedule, optimizer: AdamW::default(), clip, threads: 1 }
}

fn trainer(precision: Precision) -> Trainer {
    Trainer::new(model(Family::Bitnet, true, precision), options(1e-3, 0.0)).unwrap()
}

/// Made-up windows.
fn batch(rows: usize, len: usize, seed: u32) -> Batch {
    let mut state = seed;
    let mut token = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 16) % VOCAB as u32
    };
    Batch { tokens: (0..rows * (len + 1)).map(|_| token()).collect(), rows, len, loss_mask: None }
}

/// ‖a − b‖ / ‖b‖
fn distance(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let square = |x: f64| x * x;
    let difference: f64 = a.iter().zip(b).map(|(a, b)| square(f64::from(a - b))).sum();
    (difference / b.iter().map(|b| square(f64::from(*b))).sum::<f64>()).sqrt()
}

/// Logits after the last of `tokens`, by the engine from a file.
fn by_the_engine(path: &Path, texts: &[&[u32]]) -> Vec<Vec<f32>> {
    let config = EngineConfig { kv_type: KvType::F32, ..EngineConfig::balanced() };
    let engine = InferenceEngine::with_config(config).unwrap();
    let model = engine.load_model_blocking(path).unwrap();
    let logits = |text: &&[u32]| {
        let input = InferenceInput::Tokens(text.to_vec());
        engine.infer_blocking(&model, &input).unwrap().logits
    };
    texts.iter().map(logits).collect()
}

#[test]
fn the_forward_pass_of_training_is_the_engines() {
    let folder = tempfile::tempdir().unwrap();
    let (tales, text) = (folder.path().join("tales.txt"), folder.path().join("text"));
    std::fs::write(&tales, "The fox met the hen, and the hen met the fox. ".repeat(50)).unwrap();
    train_tokenizer(&[tales], &TokenizerOptions::new(VOCAB), &text, true, &mut |_| true).unwrap();
    for (family, tied) in [
        (Family::Bitnet, true),
        (Family::Bitnet, false),
        (Family::Llama, true),
        (Family::Llama, false),
    ] {
        let model = model(family, tied, Precision::Ternary);
        assert_eq!(model.config().sub_norms, family == Family::Bitnet);
        let mut trainer = Trainer::new(model, options(1e-2, 1.0)).unwrap();
        let windows = batch(2, 40, 1);
        // A few steps, or all norms would be ones.
        for _ in 0..4 {
            trainer.step(std::slice::from_ref(&windows), 0.2, None).unwrap();
        }
        let trained = trainer.logits(&windows).unwrap();
        // Ends inside and at the end of a block of the engine's cache, in both windows.
        let places: Vec<(usize, usize)> =
            [0, 1].iter().flat_map(|&row| [1, 7, 32, 33, 40].map(|end| (row, end))).collect();
        let texts: Vec<&[u32]> =
            places.iter().map(|&(row, end)| &windows.tokens[row * 41..row * 41 + end]).collect();
        let expected = |row: usize, end: usize| &trained[(row * 40 + end - 1) * VOCAB..][..VOCAB];

        let name = format!("{family:?}-{tied}");
        let masters = folder.path().join(&name);
        export::write_masters(trainer.model(), &text, &masters).unwrap();
        for (&(row, end), logits) in places.iter().zip(by_the_engine(&masters, &texts)) {
            let apart = distance(expected(row, end), &logits);
            assert!(apart < 1e-4, "{name}, window {row}, {end} tokens: {apart:.1e}");
        }
        // Packed files round the tables, to bf16 and f16: eight bits of a number and more.
        let checkpoint = export::checkpoint(trainer.model(), "t", &text).unwrap();
        for form in ["hf", "i2_s"] {
            let target: Target = form.parse().unwrap();
            let path = folder.path().join(format!("{name}-{form}"));
            export::write(&checkpoint, Precision::Ternary, target, &path, true).unwrap();
            for (&(row, end), logits) in places.iter().zip(by_the_engine(&path, &texts)) {
                let apart = distance(expected(row, end), &logits);
                assert!(apart < 0.03, "{name} as {form}, window {row}, {end} tokens: {apart:.1e}");
            }
        }
    }
}

#[test]
fn masked_places_have_no_loss_and_no_gradient() {
    // Gradients of ternary models are rounded to 16 bits, those of float ones are not.
    for (precision, bound) in [(Precision::Float, 2e-5), (Precision::Ternary, 1e-3)] {
        let mut trainer = trainer(precision);
        let whole = batch(3, 12, 2);
        let n = 36;
        let mask: Vec<bool> = (0..n).map(|i| i % 3 == 1 && i / 12 != 1).collect();
        let rest: Vec<bool> = mask.iter().map(|counts| !counts).collect();
        let mut look = |batch: &Batch| {
            let found = trainer.loss_and_gradients(std::slice::from_ref(batch)).unwrap();
            (found.0, found.1.concat())
        };
        let (all, all_gradient) = look(&whole);
        let masked = Batch { loss_mask: Some(mask.clone()), ..whole.clone() };
        let (one, one_gradient) = look(&masked);
        let (other, other_gradient) =
            look(&Batch { loss_mask: Some(rest.clone()), ..whole.clone() });
        // What counts in the one and what counts in the other are everything.
        let [a, b] = [&mask, &rest].map(|mask| mask.iter().filter(|counts| **counts).count());
        let sum = (one * a as f64 + other * b as f64) / n as f64;
        assert!((sum - all).abs() < 1e-9 * all, "{sum} {all}");
        let (a, b) = (a as f32 / n as f32, b as f32 / n as f32);
        let sum: Vec<f32> =
            one_gradient.iter().zip(&other_gradient).map(|(x, y)| x * a + y * b).collect();
        let apart = distance(&sum, &all_gradient);
        assert!(apart < bound, "{precision:?}: {apart:.1e}");
        assert!(distance(&one_gradient, &all_gradient) > 0.1, "a mask changes the gradient");

        // Nothing of the second window counts, and of the last token of the third only that it is
        // predicted, which does not count either.
        assert!(!mask[12..24].contains(&true) && !mask[35]);
        let mut other = masked.clone();
        other.tokens[38] = (other.tokens[38] + 1) % VOCAB as u32;
        assert_eq!(look(&other), (one, one_gradient.clone()));
        other.tokens[13..26].fill(5);
        let (loss, gradient) = look(&other);
        assert_eq!(loss, one);
        let apart = distance(&gradient, &one_gradient);
        assert!(apart < bound, "{precision:?}: {apart:.1e}");
        assert_eq!(trainer.eval(&masked).unwrap().1, 8);
    }
}

#[test]
fn batches_of_a_step_are_one_batch() {
    for (precision, bound) in [(Precision::Float, 2e-5), (Precision::Ternary, 1e-3)] {
        let mut trainer = trainer(precision);
        // Few predictions of the second batch count: the mean is over predictions, not over batches.
        let mask: Vec<bool> = (0..24).map(|i| i % 8 == 3).collect();
        let (first, second) =
            (batch(3, 12, 3), Batch { loss_mask: Some(mask.clone()), ..batch(2, 12, 4) });
        let together = Batch {
            tokens: [&first.tokens[..], &second.tokens].concat(),
            rows: 5,
            len: 12,
            loss_mask: Some([vec![true; 36], mask].concat()),
        };
        let parts = trainer.loss_and_gradients(&[first, second]).unwrap();
        let whole = trainer.loss_and_gradients(&[together]).unwrap();
        assert!((parts.0 - whole.0).abs() < 1e-9 * whole.0, "{} {}", parts.0, whole.0);
        let apart = distance(&parts.1.concat(), &whole.1.concat());
        assert!(apart < bound, "{precision:?}: {apart:.1e}");
    }
}

#[test]
fn adamw_is_what_the_paper_says() {
    let mut trainer = trainer(Precision::Float);
    let AdamW { beta1, beta2, epsilon } = trainer.options().optimizer;
    let values = |trainer: &Trainer| -> Vec<Vec<f32>> {
        trainer.model().named_parameters().map(|(_, values)| values.to_vec()).collect()
    };
    let mut moments: Vec<Vec<(f64, f64)>> =
        values(&trainer).iter().map(|values| vec![(0.0, 0.0); values.len()]).collect();
    for step in 1..=3 {
        let batches = [batch(2, 8, step)];
        let before = values(&trainer);
        let (_, gradients) = trainer.loss_and_gradients(&batches).unwrap();
        let stats = trainer.step(&batches, 0.25, None).unwrap();
        // Cosine decay from 1e-3, at a quarter of the run.
        let rate = 1e-3 * (0.5 + 0.5 * (std::f64::consts::PI / 4.0).cos());
        assert!((stats.rate - rate).abs() < 1e-12, "{stats:?}");
        let mut moved = 0.0f64;
        for (i, (parameter, after)) in trainer.model().named_parameters().enumerate() {
            let decay = if parameter.kind == ParameterKind::Norm { 0.0 } else { 0.1 };
            for (j, &after) in after.iter().enumerate() {
                let (m, v) = &mut moments[i][j];
                let g = f64::from(gradients[i][j]);
                *m = beta1 * *m + (1.0 - beta1) * g;
                *v = beta2 * *v + (1.0 - beta2) * g * g;
                let m = *m / (1.0 - beta1.powi(step as i32));
                let v = *v / (1.0 - beta2.powi(step as i32));
                let x = f64::from(before[i][j]);
                let expected = x - rate * decay * x - rate * m / (v.sqrt() + epsilon);
                // Masters are rounded to 24 bits; the change itself to 20 or better.
                let bound = x.abs() * 1.2e-7 + rate * 4e-6;
                let error = (f64::from(after) - expected).abs();
                assert!(error < bound, "{}, {j}, step {step}: {error:e}", parameter.name);
                moved = moved.max((expected - x).abs());
            }
        }
        assert!(moved > 0.5 * rate, "something moves: {moved}");
    }
}

#[test]
fn long_gradients_are_shortened_and_short_ones_kept() {
    let batches = [batch(2, 8, 9)];
    let step = |clip: f64| {
        let model = model(Family::Llama, false, Precision::Ternary);
        let mut trainer = Trainer::new(model, options(1e-3, clip)).unwrap();
        let norm = trainer.step(&batches, 0.1, None).unwrap().grad_norm;
        let first: Vec<f32> = trainer.state().flat_map(|(_, first, _)| first.to_vec()).collect();
        (norm, first)
    };
    let (norm, free) = step(0.0);
    assert!(norm > 0.1, "{norm}");
    let (told, cut) = step(norm / 4.0);
    assert_eq!(told, norm, "what is told is the length before clipping");
    // The first moment after one step is a tenth of the gradient.
    let quarter: Vec<f32> = free.iter().map(|m| m / 4.0).collect();
    let apart = distance(&cut, &quarter);
    assert!(apart < 1e-6, "{apart:.1e}");
    let length = cut.iter().map(|m| f64::from(m * m)).sum::<f64>().sqrt();
    assert!((length / (0.1 * norm / 4.0) - 1.0).abs() < 1e-5, "{length} of {norm}");
    assert_eq!(step(norm * 1.01), (norm, free));
}

#[test]
fn sums_that_may_overflow_are_refused() {
    let wide = |features| {
        let shape =
            ModelRecipe { intermediate_size: Some(features), ..shape(Family::Bitnet, true) };
        Model::new(shape.config("t", VOCAB, 64).unwrap(), Precision::Ternary, 7)
    };
    assert!(wide(32_764).is_ok());
    let error = wide(32_768).unwrap_err().to_string();
    assert_eq!(error, "model: expected at most 65534 gate and up features, got 65536");
}

#[test]
fn a_new_model_follows_from_its_seed() {
    let model = |seed| {
        let config = shape(Family::Bitnet, false).config("t", VOCAB, 64).unwrap();
        let model = Model::new(config, Precision::Ternary, seed).unwrap();
        model.named_parameters().map(|(_, values)| values.to_vec()).collect::<Vec<_>>()
    };
    let (one, again, other) = (model(3), model(3), model(4));
    assert_eq!(one, again);
    assert_ne!(one[0], other[0]);
    let square: f64 = one[0].iter().map(|x| f64::from(x * x)).sum();
    let deviation = (square / one[0].len() as f64).sqrt();
    assert!((deviation - 0.02).abs() < 3e-4, "{deviation}");
}
