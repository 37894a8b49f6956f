//! Distillation: a float model teaches a ternary one of its own shape.
//!
//! The student begins as the teacher, with norms before the output and down projections if asked for,
//! and learns three things on each window: the next token, the teacher's distribution of it, and how
//! the teacher's queries, keys and values of one layer relate to each other.
//!
//! ```text
//! L = token · CE + logits · τ² · KL(softmax(t/τ) ‖ softmax(s/τ)) + attention · mean KL(R_t ‖ R_s)
//! R = softmax(x xᵀ / √d)   for x = q, k, v of each head, over the tokens of a window
//! ```
//!
//! The relations are those of MiniLM, the sum that of BitDistill.

use std::collections::HashMap;

use bitnet_quant::config::{Architecture, ModelConfig};

use crate::batch::Batch;
use crate::distill::{ExtraLoss, Place, RelationGradients, Relations};
use crate::error::{Error, Result};
use crate::model::{Model, Precision};
use crate::trainer::{Shown, TrainOptions, Trainer};

/// How much each part of the loss counts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DistillOptions {
    /// The share of the next token.
    pub token: f32,
    /// The share of the teacher's distribution.
    pub logits: f32,
    /// What divides logits before they are compared.
    pub temperature: f32,
    /// The share of the relations.
    pub attention: f32,
    /// The layer whose relations are compared; `None`: the last but one, or the only one.
    pub layer: Option<usize>,
}

/// A teacher, and what it says of the batches of a step.
pub struct Teacher {
    trainer: Trainer,
    options: DistillOptions,
    layer: Option<usize>,
    /// For each batch: predictions of a window, and what the teacher computes.
    shown: Vec<(usize, Shown)>,
}

impl Teacher {
    /// A teacher for students of the same shape.
    ///
    /// # Errors
    /// [`Error::Setting`] for shares or a layer out of range.
    pub fn new(model: Model, options: DistillOptions, threads: TrainOptions) -> Result<Self> {
        for (what, value) in [
            ("distill.token", options.token),
            ("distill.logits", options.logits),
            ("distill.attention", options.attention),
        ] {
            if !(value >= 0.0 && value.is_finite()) {
                return Err(Error::setting(what, "0 or more", value));
            }
        }
        if !(options.temperature > 0.0 && options.temperature.is_finite()) {
            return Err(Error::setting("distill.temperature", "above 0", options.temperature));
        }
        let layers = model.config().num_hidden_layers;
        let layer = options.layer.unwrap_or(layers.saturating_sub(2));
        if layer >= layers {
            return Err(Error::setting("distill.layer", format!("below {layers}"), layer));
        }
        let layer = (options.attention > 0.0).then_some(layer);
        Ok(Self { trainer: Trainer::new(model, threads)?, options, layer, shown: Vec::new() })
    }

    /// Looks at the batches of the next step.
    ///
    /// # Errors
    /// [`Error::Data`] for a batch that does not fit the teacher.
    pub fn look(&mut self, batches: &[Batch]) -> Result<()> {
        let show = |batch: &Batch| Ok((batch.len, self.trainer.show(batch, self.layer)?));
        self.shown = batches.iter().map(show).collect::<Result<_>>()?;
        Ok(())
    }

    fn head_dim(&self) -> usize {
        self.trainer.model().config().head_dim
    }
}

/// A ternary student with the teacher's numbers; with `sub_norms`, norms of ones stand before the
/// output and down projections, which makes it a model of the family `bitnet`.
///
/// # Errors
/// A teacher that has another family's parts.
pub fn student(teacher: &Model, sub_norms: bool) -> Result<Model> {
    let sub_norms = sub_norms || teacher.config().sub_norms;
    let architecture = if sub_norms { Architecture::Bitnet } else { Architecture::Llama };
    let config = ModelConfig { sub_norms, architecture, ..teacher.config().clone() };
    let mut tensors: HashMap<String, (Vec<usize>, Vec<f32>)> = teacher
        .named_parameters()
        .map(|(p, values)| (p.name.clone(), (p.shape.clone(), values.to_vec())))
        .collect();
    if sub_norms && !teacher.config().sub_norms {
        for layer in 0..config.num_hidden_layers {
            for (part, width) in [
                ("self_attn.attn_sub_norm", config.query_width()),
                ("mlp.ffn_sub_norm", config.intermediate_size),
            ] {
                let name = format!("model.layers.{layer}.{part}.weight");
                tensors.insert(name, (vec![width], vec![1.0; width]));
            }
        }
    }
    Model::from_tensors(config, Precision::Ternary, &tensors)
}

impl ExtraLoss for Teacher {
    fn token_weight(&self) -> f32 {
        self.options.token
    }

    fn layer(&self) -> Option<usize> {
        self.layer
    }

    fn logits(
        &self,
        place: Place,
        logits: &[f32],
        counts: &[bool],
        scale: f32,
        gradient: &mut [f32],
    ) -> f64 {
        if self.options.logits == 0.0 {
            return 0.0;
        }
        let (len, shown) = &self.shown[place.batch];
        let vocab = logits.len() / counts.len();
        let first = place.first_row * len + place.first_token;
        let (temperature, weight) = (self.options.temperature, self.options.logits * scale);
        let mut teacher = vec![0.0; vocab];
        let mut student = vec![0.0; vocab];
        let mut loss = 0.0;
        for (i, _) in counts.iter().enumerate().filter(|(_, counts)| **counts) {
            let row = i * vocab..(i + 1) * vocab;
            teacher.copy_from_slice(&shown.logits[(first + i) * vocab..][..vocab]);
            student.copy_from_slice(&logits[row.clone()]);
            softmax(&mut teacher, 1.0 / temperature);
            softmax(&mut student, 1.0 / temperature);
            loss += kl(&teacher, &student) * f64::from(temperature * temperature * weight);
            for ((gradient, t), s) in gradient[row].iter_mut().zip(&teacher).zip(&student) {
                *gradient += temperature * weight * (s - t);
            }
        }
        loss
    }

    fn relations(
        &self,
        place: Place,
        relations: Relations<'_>,
        scale: f32,
        gradient: RelationGradients<'_>,
    ) -> f64 {
        let Some(teacher) = &self.shown[place.batch].1.relations else { return 0.0 };
        let Relations { rows, len, q, k, v } = relations;
        let weight = self.options.attention * scale / 3.0;
        let dim = self.head_dim();
        let mut loss = 0.0;
        for ((teacher, student), gradient) in
            teacher.iter().zip([q, k, v]).zip([gradient.q, gradient.k, gradient.v])
        {
            let width = student.len() / (rows * len);
            let first = place.first_row * len * width;
            let teacher = &teacher[first..first + student.len()];
            for row in 0..rows {
                let window = row * len * width..(row + 1) * len * width;
                let (teacher, student) = (&teacher[window.clone()], &student[window.clone()]);
                loss += relate(teacher, student, width, dim, weight, &mut gradient[window]);
            }
        }
        loss
    }
}

/// The loss between the relations of one window, `(len, width)`, and its gradient with respect to the
/// student's; both times `weight`, meaned over heads.
fn relate(
    teacher: &[f32],
    student: &[f32],
    width: usize,
    dim: usize,
    weight: f32,
    gradient: &mut [f32],
) -> f64 {
    let len = student.len() / width;
    let heads = width / dim;
    let (root, weight) = (1.0 / (dim as f32).sqrt(), weight / heads as f32);
    let mut loss = 0.0;
    let (mut of_teacher, mut of_student) = (vec![0.0; len], vec![0.0; len]);
    for head in 0..heads {
        let place = |token: usize| token * width + head * dim..token * width + (head + 1) * dim;
        for i in 0..len {
            for j in 0..len {
                of_teacher[j] = dot(&teacher[place(i)], &teacher[place(j)]);
                of_student[j] = dot(&student[place(i)], &student[place(j)]);
            }
            softmax(&mut of_teacher, root);
            softmax(&mut of_student, root);
            loss += kl(&of_teacher, &of_student) * f64::from(weight);
            for j in 0..len {
                // The score of i and j is a product of both.
                let slope = (of_student[j] - of_teacher[j]) * root * weight;
                for (a, b) in place(i).zip(place(j)) {
                    gradient[a] += slope * student[b];
                    gradient[b] += slope * student[a];
                }
            }
        }
    }
    loss
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// `softmax(x · factor)` in place.
fn softmax(x: &mut [f32], factor: f32) {
    let most = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for value in x.iter_mut() {
        *value = ((*value - most) * factor).exp();
        sum += *value;
    }
    x.iter_mut().for_each(|value| *value /= sum);
}

/// `Σ p ln(p/q)`, natural.
fn kl(p: &[f32], q: &[f32]) -> f64 {
    let term = |(&p, &q): (&f32, &f32)| match p > 0.0 {
        true => f64::from(p) * (f64::from(p) / f64::from(q.max(1e-30))).ln(),
        false => 0.0,
    };
    p.iter().zip(q).map(term).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::{ModelRecipe, Recipe};

    fn float_model(seed: u64) -> Model {
        let recipe = ModelRecipe {
            family: Some(crate::recipe::Family::Llama),
            hidden_size: Some(32),
            intermediate_size: Some(64),
            num_hidden_layers: Some(2),
            num_attention_heads: Some(4),
            num_key_value_heads: Some(2),
            ..Default::default()
        };
        let model =
            Model::new(recipe.config("t", 50, 16).unwrap(), Precision::Float, seed).unwrap();
        // Larger weights than new ones, or there would be nothing to teach.
        let louder = |values: &[f32]| values.iter().map(|x| x * 8.0).collect();
        let tensors = model
            .named_parameters()
            .map(|(p, values)| (p.name.clone(), (p.shape.clone(), louder(values))))
            .collect();
        Model::from_tensors(model.config().clone(), Precision::Float, &tensors).unwrap()
    }

    fn options() -> TrainOptions {
        let mut recipe = Recipe::default();
        recipe.train.threads = 1;
        recipe.options()
    }

    fn batch() -> Batch {
        let tokens = (0..2 * 9).map(|i| (i * 7 + 3) % 50).collect();
        Batch { tokens, rows: 2, len: 8, loss_mask: None }
    }

    fn teacher(attention: f32) -> Teacher {
        let parts =
            DistillOptions { token: 0.0, logits: 2.0, temperature: 3.0, attention, layer: Some(1) };
        let mut teacher = Teacher::new(float_model(1), parts, options()).unwrap();
        teacher.look(&[batch()]).unwrap();
        teacher
    }

    #[test]
    fn a_teacher_has_nothing_to_say_to_itself() {
        let teacher = teacher(1.0);
        let (_, shown) = &teacher.shown[0];
        let mut gradient = vec![0.0; shown.logits.len()];
        let place = Place { batch: 0, first_row: 0, first_token: 0 };
        let loss = teacher.logits(place, &shown.logits, &[true; 16], 1.0, &mut gradient);
        assert!(loss.abs() < 1e-6 && gradient.iter().all(|x| x.abs() < 1e-6));
        let [q, k, v] = shown.relations.as_ref().unwrap();
        let mut gradients = [q, k, v].map(|x| vec![0.0; x.len()]);
        let [dq, dk, dv] = &mut gradients;
        let relations = Relations { rows: 2, len: 8, q, k, v };
        let into = RelationGradients { q: dq, k: dk, v: dv };
        assert!(teacher.relations(place, relations, 1.0, into).abs() < 1e-6);
        assert!(gradients.iter().flatten().all(|x| x.abs() < 1e-6));
    }

    /// Moves one number at a time and compares the change of the loss with the gradient.
    fn check(values: &[f32], gradient: &[f32], loss: impl Fn(&[f32]) -> f64) {
        let step = 1e-2;
        for i in (0..values.len()).step_by(values.len() / 23 + 1) {
            let moved = |by: f32| {
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
        let teacher = teacher(30.0);
        let place = Place { batch: 0, first_row: 1, first_token: 0 };
        let logits: Vec<f32> = (0..8 * 50).map(|i| (i as f32 * 0.37).sin()).collect();
        let counts = [true, false, true, true, true, true, true, true];
        let mut gradient = vec![0.0; logits.len()];
        teacher.logits(place, &logits, &counts, 1.0, &mut gradient);
        assert!(gradient[50..100].iter().all(|&x| x == 0.0), "what does not count is left alone");
        check(&logits, &gradient, |x| {
            teacher.logits(place, x, &counts, 1.0, &mut vec![0.0; x.len()])
        });
        let q: Vec<f32> = (0..8 * 32).map(|i| (i as f32 * 0.51).sin()).collect();
        let k: Vec<f32> = (0..8 * 16).map(|i| (i as f32 * 0.23).cos()).collect();
        let run = |q: &[f32], into: &mut [f32]| {
            let (mut dk, mut dv) = (vec![0.0; k.len()], vec![0.0; k.len()]);
            let relations = Relations { rows: 1, len: 8, q, k: &k, v: &k };
            teacher.relations(
                place,
                relations,
                1.0,
                RelationGradients { q: into, k: &mut dk, v: &mut dv },
            )
        };
        let mut gradient = vec![0.0; q.len()];
        run(&q, &mut gradient);
        check(&q, &gradient, |x| run(x, &mut vec![0.0; x.len()]));
    }

    #[test]
    fn a_student_comes_closer_to_its_teacher() {
        let mut teacher = teacher(1.0);
        let mut student = Trainer::new(student(&float_model(1), true).unwrap(), options()).unwrap();
        assert!(student.model().config().sub_norms);
        let batches = [batch()];
        let mut losses = Vec::new();
        for _ in 0..60 {
            teacher.look(&batches).unwrap();
            losses.push(student.step(&batches, 0.3, Some(&teacher)).unwrap().extra_loss);
        }
        assert!(losses[59] < 0.5 * losses[0], "{} to {}", losses[0], losses[59]);
    }
}
