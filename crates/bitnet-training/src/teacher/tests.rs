//! What a teacher says to itself, to others and to those that do not fit it; its gradients against slopes.

use bitnet_inference::builtin;

use super::*;
use crate::batch::Batch;
use crate::recipe::{Family, ModelRecipe, Recipe};
use crate::trainer::{StepStats, TrainOptions, Trainer};

const VOCAB: usize = 50;

fn config() -> ModelConfig {
    let recipe = ModelRecipe {
        family: Some(Family::Llama),
        hidden_size: Some(32),
        intermediate_size: Some(64),
        num_hidden_layers: Some(2),
        num_attention_heads: Some(4),
        num_key_value_heads: Some(2),
        ..Default::default()
    };
    recipe.config("t", VOCAB, 16).unwrap()
}

fn float_model(seed: u64) -> Model {
    let model = Model::new(config(), Precision::Float, seed).unwrap();
    // Larger matrices than new ones, or there would be nothing to teach. Larger norms too would make
    // softmaxes of nothing but zeros and ones.
    changed(&model, |name, _, x| if name.contains("norm") { x } else { x * 8.0 })
}

/// The model with every number replaced by what `change` makes of its tensor's name, its place and it.
fn changed(model: &Model, change: impl Fn(&str, usize, f32) -> f32) -> Model {
    let tensors = model
        .named_parameters()
        .map(|(p, values)| {
            let new = |(i, &x)| change(&p.name, i, x);
            (p.name.clone(), (p.shape.clone(), values.iter().enumerate().map(new).collect()))
        })
        .collect();
    Model::from_tensors(model.config().clone(), model.precision(), &tensors).unwrap()
}

fn options(threads: usize) -> TrainOptions {
    let mut recipe = Recipe::default();
    recipe.train.threads = threads;
    recipe.train.clip = 0.0;
    recipe.options()
}

fn batch(rows: usize, len: usize) -> Batch {
    let tokens = (0..rows * (len + 1)).map(|i| ((i * i * 7 + 3 * i) % VOCAB) as u32).collect();
    Batch { tokens, rows, len, loss_mask: None }
}

fn teacher(logits: f32, attention: f32) -> Teacher {
    let parts = DistillOptions { token: 0.0, logits, temperature: 3.0, attention, layer: Some(1) };
    Teacher::new(float_model(1), parts).unwrap()
}

/// What a step of a new trainer tells, and its gradient by tensor.
fn step(
    model: Model,
    batch: &Batch,
    teacher: &Teacher,
    threads: usize,
) -> (StepStats, HashMap<String, Vec<f32>>) {
    let mut trainer = Trainer::new(model, options(threads)).unwrap();
    let stats = trainer.step(std::slice::from_ref(batch), 0.5, Some(teacher)).unwrap();
    // After one step the first moment is a tenth of the gradient.
    let gradient = |first: &[f32]| first.iter().map(|m| m * 10.0).collect();
    let gradients = trainer.state().map(|(p, first, _)| (p.name.clone(), gradient(first)));
    (stats, gradients.collect())
}

#[test]
fn a_teacher_has_nothing_to_say_to_itself() {
    // Windows of more tokens than the head takes at a time, on more threads than one.
    for (rows, len, threads) in [(2, 8, 1), (3, 300, 2)] {
        let (stats, gradients) =
            step(float_model(1), &batch(rows, len), &teacher(2.0, 1.0), threads);
        assert!(stats.extra_loss.abs() < 1e-6, "{stats:?}");
        assert!(gradients.values().flatten().all(|x| x.abs() < 1e-5));
        let (stats, _) = step(float_model(2), &batch(rows, len), &teacher(2.0, 1.0), threads);
        assert!(stats.extra_loss > 0.1, "{stats:?}");
    }
}

/// Moves one number at a time and compares the change of the loss with the gradient.
fn check(values: &[f32], gradient: &[f32], mut loss: impl FnMut(&[f32]) -> f64) {
    let step = 1e-2;
    for i in (0..values.len()).step_by(values.len() / 23 + 1) {
        let mut moved = |by: f32| {
            let mut moved = values.to_vec();
            moved[i] += by;
            loss(&moved)
        };
        let slope = (moved(step) - moved(-step)) / f64::from(2.0 * step);
        let expected = f64::from(gradient[i]);
        assert!((slope - expected).abs() < 1e-3 + 0.02 * expected.abs(), "{slope} {expected}");
    }
}

#[test]
fn gradients_are_slopes_of_the_loss() {
    let teacher = teacher(2.0, 30.0);
    let mut look = teacher.look(&batch(1, 8).tokens, 1, 8).unwrap();
    // Of eight tokens the last six are compared.
    let logits: Vec<f32> = (0..6 * VOCAB).map(|i| (i as f32 * 0.37).sin()).collect();
    let counts = [true, false, true, true, true, true];
    let mut gradient = vec![0.0; logits.len()];
    look.logits(2, &logits, &counts, 1.0, &mut gradient);
    assert!(gradient[50..100].iter().all(|&x| x == 0.0), "what does not count is left alone");
    check(&logits, &gradient, |x| look.logits(2, x, &counts, 1.0, &mut vec![0.0; x.len()]));
    let q: Vec<f32> = (0..8 * 32).map(|i| (i as f32 * 0.51).sin()).collect();
    let k: Vec<f32> = (0..8 * 16).map(|i| (i as f32 * 0.23).cos()).collect();
    let mut run = |q: &[f32], into: &mut [f32]| {
        let (mut dk, mut dv) = (vec![0.0; k.len()], vec![0.0; k.len()]);
        let relations = Relations { rows: 1, len: 8, q, k: &k, v: &k };
        let into = RelationGradients { q: into, k: &mut dk, v: &mut dv };
        look.relations(relations, 1.0, into)
    };
    let mut gradient = vec![0.0; q.len()];
    run(&q, &mut gradient);
    check(&q, &gradient, |x| run(x, &mut vec![0.0; x.len()]));
}

#[test]
fn relations_weigh_the_same_however_little_is_to_be_predicted() {
    let teacher = teacher(0.0, 30.0);
    let whole = batch(2, 8);
    let half = Batch { loss_mask: Some((0..16).map(|i| i % 4 == 1).collect()), ..whole.clone() };
    let student = float_model(2);
    let (told, gradients) = step(student.clone(), &half, &teacher, 1);
    let (all, expected) = step(student.clone(), &whole, &teacher, 1);
    assert_eq!((told.tokens, all.tokens), (4, 16));
    assert!(told.extra_loss > 0.1);
    assert_eq!((told.extra_loss, &gradients), (all.extra_loss, &expected));
    // The largest slope of each projection that the relations depend on.
    for part in
        ["0.mlp.down_proj", "0.self_attn.o_proj", "1.self_attn.q_proj", "1.self_attn.k_proj"]
    {
        let name = format!("model.layers.{part}.weight");
        let gradient = &gradients[&name];
        let order = |&a: &usize, &b: &usize| gradient[a].abs().total_cmp(&gradient[b].abs());
        let place = (0..gradient.len()).max_by(order).unwrap();
        let loss = |by: f32| {
            let at = |tensor: &str, i: usize| tensor == name && i == place;
            let moved = changed(&student, |tensor, i, x| if at(tensor, i) { x + by } else { x });
            step(moved, &half, &teacher, 1).0.extra_loss
        };
        let by = 2e-3;
        let slope = (loss(by) - loss(-by)) / f64::from(2.0 * by);
        let expected = f64::from(gradient[place]);
        // Weights move in steps of the 16-bit numbers that products take.
        assert!((slope - expected).abs() < 0.05 * expected.abs(), "{name}: {slope} {expected}");
    }
}

#[test]
fn a_student_comes_closer_to_its_teacher() {
    let teacher = teacher(2.0, 1.0);
    let mut options = options(1);
    options.clip = 1.0;
    let mut student = Trainer::new(student(&float_model(1), true).unwrap(), options).unwrap();
    assert!(student.model().config().sub_norms);
    let batches = [batch(2, 8)];
    let mut losses = Vec::new();
    for _ in 0..60 {
        losses.push(student.step(&batches, 0.3, Some(&teacher)).unwrap().extra_loss);
    }
    assert!(losses[59] < 0.5 * losses[0], "{} to {}", losses[0], losses[59]);
}

#[test]
fn a_student_of_another_shape_is_refused() {
    let (with, without) = (teacher(1.0, 1.0), teacher(1.0, 0.0));
    with.suits(&config()).unwrap();
    let other = ModelConfig { vocab_size: 49, ..config() };
    for teacher in [&with, &without] {
        let error = teacher.suits(&other).unwrap_err().to_string();
        let expected =
            "distill.teacher: expected a model with the student's vocab_size, 49, got 50";
        assert_eq!(error, expected);
    }
    let mut trainer =
        Trainer::new(Model::new(other, Precision::Ternary, 1).unwrap(), options(1)).unwrap();
    let batch = Batch { tokens: vec![3; 9], rows: 1, len: 8, loss_mask: None };
    assert!(trainer.step(&[batch], 0.5, Some(&with)).is_err());
    for (other, expected) in [
        (ModelConfig { num_hidden_layers: 1, ..config() }, "expected below the student's 1 layers"),
        (ModelConfig { num_key_value_heads: 4, ..config() }, "4 query and 4 key/value heads of 8"),
        (ModelConfig { num_attention_heads: 2, head_dim: 16, ..config() }, "or attention = 0"),
    ] {
        let error = with.suits(&other).unwrap_err().to_string();
        assert!(error.contains(expected), "{error} should say {expected}");
        without.suits(&other).unwrap();
    }
}

#[test]
fn a_ternary_teacher_computes_with_trits() {
    let model = open(&builtin::checkpoint().unwrap()).unwrap();
    assert_eq!(model.precision(), Precision::Ternary);
}
