//! Distillation: a model, float as a rule, teaches a ternary one.
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
//! The first two are means over the predictions that count, the relations over all tokens: those that
//! need not be predicted are looked back on too. The relations are those of MiniLM, the sum that of
//! BitDistill.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use bitnet_core::cpu::CpuBackend;
use bitnet_core::weights::Matrix;
use bitnet_quant::Checkpoint;
use bitnet_quant::config::{Architecture, ModelConfig};

use crate::distill::{Comparison, ExtraLoss, RelationGradients, Relations};
use crate::error::{Error, Result};
use crate::head::piece_logits;
use crate::model::{Model, Precision};
use crate::weights::Weights;
use crate::worker::{Shown, Windows, Worker};

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

/// A teacher. It computes windows on the thread that asks, just before its student does.
pub struct Teacher {
    model: Model,
    weights: Weights,
    options: DistillOptions,
    layer: Option<usize>,
    /// Buffers that no thread uses now.
    idle: Mutex<Vec<Worker>>,
}

impl Teacher {
    /// A teacher for students with the same vocabulary, and the same heads if relations count.
    ///
    /// # Errors
    /// [`Error::Setting`] for shares or a layer out of range.
    pub fn new(model: Model, options: DistillOptions) -> Result<Self> {
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
        let weights = Weights::new(&model, &mut CpuBackend::new(Some(1), None)?)?;
        Ok(Self { model, weights, options, layer, idle: Mutex::new(Vec::new()) })
    }

    /// What it knows.
    pub fn model(&self) -> &Model {
        &self.model
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<Worker>> {
        // A thread that panicked has not put its buffers back; those that are here are whole.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn show(&self, tokens: &[u32], rows: usize, len: usize) -> Result<Shown> {
        let idle = self.idle().pop();
        let mut worker = match idle {
            Some(worker) => worker,
            None => Worker::new(self.model.config())?,
        };
        let windows = Windows { tokens, mask: &[], rows, len };
        let shown = worker.show(&self.weights, &self.model.places, windows, self.layer);
        self.idle().push(worker);
        shown
    }
}

/// The model of a teacher: it computes as it does in the engine, with float projections or ternary ones.
///
/// # Errors
/// A checkpoint that cannot be read, or that has projections of both kinds.
pub fn open(checkpoint: &Checkpoint) -> Result<Model> {
    let (mut ternary, mut float) = (None, None);
    for path in checkpoint.projections() {
        match checkpoint.linear(&path)?.matrix {
            Matrix::Ternary { .. } => ternary = Some(path),
            Matrix::Float(_) => float = Some(path),
        }
    }
    match (ternary, float) {
        (Some(ternary), Some(float)) => {
            let expected = "projections that are all float or all ternary";
            let got = format!("{float} and ternary {ternary}");
            Err(Error::setting("distill.teacher", expected, got))
        }
        (Some(_), None) => Model::from_checkpoint(checkpoint, Precision::Ternary),
        (None, _) => Model::from_checkpoint(checkpoint, Precision::Float),
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
    fn suits(&self, student: &ModelConfig) -> Result<()> {
        let teacher = self.model.config();
        let same = |what: &str, student: usize, teacher: usize| match student == teacher {
            true => Ok(()),
            false => {
                let expected = format!("a model with the student's {what}, {student}");
                Err(Error::setting("distill.teacher", expected, teacher))
            }
        };
        same("vocab_size", student.vocab_size, teacher.vocab_size)?;
        let Some(layer) = self.layer else { return Ok(()) };
        if layer >= student.num_hidden_layers {
            let expected = format!("below the student's {} layers", student.num_hidden_layers);
            return Err(Error::setting("distill.layer", expected, layer));
        }
        let heads = |config: &ModelConfig| {
            let ModelConfig { num_attention_heads, num_key_value_heads, head_dim, .. } = *config;
            format!(
                "{num_attention_heads} query and {num_key_value_heads} key/value heads of {head_dim}"
            )
        };
        if heads(student) != heads(teacher) {
            let expected =
                format!("a model with the student's {}, or attention = 0", heads(student));
            return Err(Error::setting("distill.teacher", expected, heads(teacher)));
        }
        Ok(())
    }

    fn token_weight(&self) -> f32 {
        self.options.token
    }

    fn layer(&self) -> Option<usize> {
        self.layer
    }

    fn look(&self, tokens: &[u32], rows: usize, len: usize) -> Result<Box<dyn Comparison + '_>> {
        let shown = self.show(tokens, rows, len)?;
        Ok(Box::new(Look { teacher: self, shown, logits: Vec::new(), student: Vec::new() }))
    }
}

/// What the teacher computed on some windows. Its logits would be much larger than the hidden states
/// they come from, so they are made where they are compared.
struct Look<'a> {
    teacher: &'a Teacher,
    shown: Shown,
    /// Of the tokens that are compared, `(tokens, vocab)`.
    logits: Vec<f32>,
    student: Vec<f32>,
}

impl Comparison for Look<'_> {
    fn logits(
        &mut self,
        first_token: usize,
        logits: &[f32],
        counts: &[bool],
        scale: f32,
        gradient: &mut [f32],
    ) -> f64 {
        let Teacher { model, options, .. } = self.teacher;
        if options.logits == 0.0 || !counts.contains(&true) {
            return 0.0;
        }
        let vocab = model.config().vocab_size;
        self.logits.resize(counts.len() * vocab, 0.0);
        self.student.resize(vocab, 0.0);
        piece_logits(
            &self.shown.hidden,
            &model.values,
            &model.places,
            model.config(),
            first_token,
            counts.len(),
            &mut self.logits,
        );
        let (temperature, weight) = (options.temperature, options.logits * scale);
        let student = &mut self.student[..];
        let mut loss = 0.0;
        let rows = logits.chunks_exact(vocab).zip(gradient.chunks_exact_mut(vocab));
        let rows = self.logits.chunks_exact_mut(vocab).zip(rows).zip(counts);
        for ((teacher, (logits, gradient)), _) in rows.filter(|(_, counts)| **counts) {
            student.copy_from_slice(logits);
            softmax(teacher, 1.0 / temperature);
            softmax(student, 1.0 / temperature);
            loss += kl(teacher, student) * f64::from(temperature * temperature * weight);
            for ((gradient, t), s) in gradient.iter_mut().zip(&*teacher).zip(&*student) {
                *gradient += temperature * weight * (s - t);
            }
        }
        loss
    }

    fn relations(
        &mut self,
        relations: Relations<'_>,
        scale: f32,
        gradient: RelationGradients<'_>,
    ) -> f64 {
        let Some(teacher) = &self.shown.relations else { return 0.0 };
        let Relations { rows, len, q, k, v } = relations;
        let weight = self.teacher.options.attention * scale / 3.0;
        let dim = self.teacher.model.config().head_dim;
        let mut loss = 0.0;
        for ((teacher, student), gradient) in
            teacher.iter().zip([q, k, v]).zip([gradient.q, gradient.k, gradient.v])
        {
            let width = student.len() / (rows * len);
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
mod tests;
