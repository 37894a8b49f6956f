//! The operations of a step, recorded by the backend and run together: as a graph built node by node,
//! or, where every sequence has one token, as one function that MLX compiles.
//!
//! A compiled function is traced once for each list of shapes and replayed with other arrays after
//! that. So nothing in it may depend on how far a sequence is: block tables have few lengths (`step`
//! pads them), and a mask made of positions says what is seen of them.

use crate::array::{Array, Ops, Seen};
use crate::backend::{MlxCache, MlxRope};
use crate::fused::Fused;
use crate::kv::Part;
use crate::library::device_error;
use crate::linear::{MlxLinear, MlxNorm, MlxTable, Prepared};
use crate::step::{Indices, Step};
use bitnet_core::backend::{Activation, KvSpec};
use bitnet_core::{Error, Result};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Deref;
use std::sync::Arc;

/// Something on the device that recorded operations refer to. Clones are the same thing, and equal.
pub struct Shared<T>(Arc<T>);

impl<T> Shared<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(Arc::new(value))
    }
}

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> PartialEq for Shared<T> {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl<T> Deref for Shared<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

type Norm = Option<Shared<MlxNorm>>;

/// An operation on buffers, which are numbers. What is recorded has been checked.
#[derive(Clone, PartialEq)]
pub(crate) enum Op {
    Embed { table: Shared<MlxTable>, x: u64 },
    Project { x: u64, norm: Norm, linears: Vec<Shared<MlxLinear>>, outs: Vec<u64> },
    ProjectAdd { x: u64, norm: Norm, linear: Shared<MlxLinear>, acc: u64 },
    Gate { x: u64, norm: Norm, halves: [Shared<MlxLinear>; 2], activation: Activation, out: u64 },
    Store { qkv: [u64; 3], norms: [Norm; 2], rope: Shared<MlxRope>, place: usize },
    Attend { q: u64, place: usize, out: u64 },
    Logits { x: u64, norm: Shared<MlxNorm>, head: Shared<MlxTable> },
    Read { x: u64, norm: Norm },
}

/// Operations in their order, and the layers of caches they use.
#[derive(Clone, Default, PartialEq)]
pub(crate) struct Program {
    ops: Vec<Op>,
    places: Vec<(Shared<MlxCache>, usize)>,
}

/// What operations work on, in a graph or in the trace of one.
pub(crate) struct State {
    pub(crate) indices: Indices,
    /// Keys and values of the program's places.
    pub(crate) places: Vec<[Part; 2]>,
    /// The last value of each buffer.
    pub(crate) values: BTreeMap<u64, Array>,
    /// What goes to the host.
    pub(crate) result: Option<Array>,
}

impl State {
    /// Arrays that a step must have computed when it ends.
    pub(crate) fn outputs(&self) -> Vec<&Array> {
        let parts = self.places.iter().flatten().flat_map(Part::arrays);
        parts.chain(self.values.values()).chain(self.result.as_ref()).collect()
    }

    /// As [`outputs`](Self::outputs), for a step that starts from nothing.
    pub(crate) fn inputs(&self) -> Vec<&Array> {
        let Indices { tokens, positions, logit_rows, slots, blocks } = &self.indices;
        let rows = [tokens, positions, logit_rows, slots].into_iter().flatten();
        let parts = self.places.iter().flatten().flat_map(Part::arrays);
        rows.chain(blocks).chain(parts).collect()
    }

    /// Which of its keys and values have scales.
    pub(crate) fn scales(&self) -> impl Iterator<Item = bool> {
        self.places.iter().flatten().map(|part| part.scales.is_some())
    }

    /// Tokens, and slots of each place.
    pub(crate) fn sizes(&self) -> Vec<usize> {
        let slots = self.places.iter().map(|[keys, _]| keys.data.shape()[0]);
        slots.chain([self.indices.blocks.len()]).collect()
    }

    /// The state of which `arrays` are the [`inputs`](Self::inputs); it has the form of this one.
    pub(crate) fn form(&self) -> impl Fn(Vec<Array>) -> Result<State> + Send + 'static + use<> {
        let Indices { tokens, positions, logit_rows, slots, .. } = &self.indices;
        let rows = [tokens, positions, logit_rows, slots].map(Option::is_some);
        let scales: Vec<bool> = self.scales().collect();
        move |arrays| {
            let parts: usize = scales.iter().map(|&scales| 1 + usize::from(scales)).sum();
            let first: usize = rows.iter().map(|&there| usize::from(there)).sum();
            let n_blocks = arrays.len().checked_sub(first + parts);
            let n_blocks = n_blocks.ok_or_else(|| device_error("a step lost its inputs"))?;
            let mut arrays = arrays.into_iter();
            let [tokens, positions, logit_rows, slots] =
                rows.map(|there| there.then(|| arrays.next()).flatten());
            let blocks = arrays.by_ref().take(n_blocks).collect();
            let places = take_parts(&mut arrays, &scales)?;
            let indices = Indices { tokens, positions, logit_rows, slots, blocks };
            Ok(State { indices, places, values: BTreeMap::new(), result: None })
        }
    }
}

/// Keys and values, of which some have scales.
pub(crate) fn take_parts(
    arrays: &mut impl Iterator<Item = Array>,
    scales: &[bool],
) -> Result<Vec<[Part; 2]>> {
    let mut part = |scaled: bool| {
        let missing = || device_error("a step lost its cache");
        let data = arrays.next().ok_or_else(missing)?;
        let scales = scaled.then(|| arrays.next().ok_or_else(missing)).transpose()?;
        Ok(Part { data, scales })
    };
    scales.as_chunks().0.iter().map(|&[k, v]| Ok([part(k)?, part(v)?])).collect()
}

/// How far the sequences of a step are.
pub(crate) enum Extents<'a> {
    /// As the step says.
    Known(&'a Step),
    /// One token each, as far as its position on the device.
    Positions,
}

impl Program {
    pub(crate) fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    pub(crate) fn push(&mut self, op: Op) {
        self.ops.push(op);
    }

    /// Whether it ends with something for the host.
    pub(crate) fn has_result(&self) -> bool {
        matches!(self.ops.last(), Some(Op::Logits { .. } | Op::Read { .. }))
    }

    /// Buffers it writes, in the order of their numbers.
    pub(crate) fn written(&self) -> BTreeSet<u64> {
        let mut written = BTreeSet::new();
        for op in &self.ops {
            match op {
                Op::Embed { x: out, .. }
                | Op::ProjectAdd { acc: out, .. }
                | Op::Gate { out, .. }
                | Op::Store { qkv: [out, ..], .. }
                | Op::Attend { out, .. } => written.extend([*out]),
                Op::Project { outs, .. } => written.extend(outs),
                Op::Logits { .. } | Op::Read { .. } => {}
            }
        }
        written
    }

    /// The number of a layer of a cache among those it uses.
    pub(crate) fn place(&mut self, kv: &Shared<MlxCache>, layer: usize) -> usize {
        let known = self.places.iter().rposition(|(k, l)| *l == layer && k == kv);
        known.unwrap_or_else(|| {
            self.places.push((kv.clone(), layer));
            self.places.len() - 1
        })
    }

    /// Takes keys and values of its places out of their caches.
    pub(crate) fn take_places(&self) -> Result<Vec<[Part; 2]>> {
        self.places.iter().map(|(kv, layer)| kv.lock().take(*layer)).collect()
    }

    /// Gives keys and values of its places back.
    pub(crate) fn put_places(&self, parts: Vec<[Part; 2]>) {
        for ((kv, layer), parts) in self.places.iter().zip(parts) {
            kv.lock().put(*layer, parts);
        }
    }

    /// Adds every operation to the graph of a state.
    pub(crate) fn run(
        &self,
        ops: &Ops,
        fused: &Fused,
        extents: &Extents<'_>,
        state: &mut State,
    ) -> Result<()> {
        let mut masks = Vec::new();
        for op in &self.ops {
            match op {
                Op::Embed { table, x } => {
                    let rows = ops.take_rows(table.rows(), index(&state.indices.tokens)?)?;
                    state.values.insert(*x, rows);
                }
                Op::Project { x, norm, linears, outs } => {
                    let linears: Vec<&MlxLinear> = linears.iter().map(|l| &**l).collect();
                    let products = products(ops, fused, state.value(*x)?, norm, &linears)?;
                    state.values.extend(outs.iter().copied().zip(products));
                }
                Op::ProjectAdd { x, norm, linear, acc } => {
                    let product = products(ops, fused, state.value(*x)?, norm, &[linear])?;
                    let sum = ops.add(state.value(*acc)?, first(&product)?)?;
                    state.values.insert(*acc, sum);
                }
                Op::Gate { x, norm, halves: [gate, up], activation, out } => {
                    let halves = products(ops, fused, state.value(*x)?, norm, &[gate, up])?;
                    let up = halves.get(1).ok_or_else(|| device_error("a product is missing"))?;
                    let value = fused.gate(*activation, first(&halves)?, up)?;
                    state.values.insert(*out, value);
                }
                Op::Store { qkv: [q, k, v], norms: [q_norm, k_norm], rope, place } => {
                    let positions = index(&state.indices.positions)?;
                    let x = state.value(*q)?;
                    let turned = rope.turn(ops, x, q_norm, positions)?;
                    let turned = ops.reshape(&turned, &x.shape())?;
                    let keys = rope.turn(ops, state.value(*k)?, k_norm, positions)?;
                    let values = ops.reshape(state.value(*v)?, &keys.shape())?;
                    let slots = index(&state.indices.slots)?.clone();
                    state.values.insert(*q, turned);
                    // The old arrays are taken over, so that they can be written in place.
                    let [old_keys, old_values] = state.places.remove(*place);
                    let keys = old_keys.store(ops, &slots, &keys)?;
                    state.places.insert(*place, [keys, old_values.store(ops, &slots, &values)?]);
                }
                Op::Attend { q, place, out } => {
                    let spec = self.places[*place].0.lock().spec();
                    let value = attend(ops, extents, state, &mut masks, *q, *place, &spec)?;
                    state.values.insert(*out, value);
                }
                Op::Logits { x, norm, head } => {
                    let rows = index(&state.indices.logit_rows)?;
                    let x = norm.apply(ops, &ops.take_rows(state.value(*x)?, rows)?)?;
                    state.result = Some(ops.contiguous(&ops.matmul(&x, head.columns())?)?);
                }
                Op::Read { x, norm } => {
                    let x = state.value(*x)?;
                    let x = norm.as_ref().map_or(Ok(x.clone()), |norm| norm.apply(ops, x))?;
                    state.result = Some(ops.contiguous(&x)?);
                }
            }
        }
        Ok(())
    }
}

impl State {
    fn value(&self, buffer: u64) -> Result<&Array> {
        self.values.get(&buffer).ok_or_else(|| device_error("a buffer was not written"))
    }
}

fn index(array: &Option<Array>) -> Result<&Array> {
    array.as_ref().ok_or_else(|| device_error("an index of the step is missing"))
}

fn first(products: &[Array]) -> Result<&Array> {
    products.first().ok_or_else(|| device_error("a product is missing"))
}

/// Outputs of projections that share an input.
fn products(
    ops: &Ops,
    fused: &Fused,
    x: &Array,
    norm: &Norm,
    linears: &[&MlxLinear],
) -> Result<Vec<Array>> {
    let x = norm.as_ref().map_or(Ok(x.clone()), |norm| norm.apply(ops, x))?;
    let mut last: Option<(&MlxLinear, Prepared)> = None;
    let mut outs = Vec::with_capacity(linears.len());
    for linear in linears {
        let serves =
            |(of, input): &(&MlxLinear, Prepared)| of.same_norm(linear) && linear.accepts(input);
        if !last.as_ref().is_some_and(serves) {
            let own = match &linear.input_norm {
                Some(norm) => &norm.apply(ops, &x)?,
                None => &x,
            };
            last = Some((linear, linear.prepare(ops, fused, own)?));
        }
        if let Some((_, input)) = &last {
            outs.push(linear.product(ops, input)?);
        }
    }
    Ok(outs)
}

/// Attention of all sequences, `(tokens, heads · features)`. `masks` keeps what is seen of each
/// sequence's blocks, `(positions)`, from layer to layer.
fn attend(
    ops: &Ops,
    extents: &Extents<'_>,
    state: &State,
    masks: &mut Vec<Array>,
    q: u64,
    place: usize,
    spec: &KvSpec,
) -> Result<Array> {
    let [keys, values] = &state.places[place];
    let KvSpec { head_dim, block_tokens, .. } = *spec;
    let x = state.value(q)?;
    let width = x.shape()[1];
    let scale = 1.0 / (head_dim as f32).sqrt();
    let mut outs = Vec::with_capacity(state.indices.blocks.len());
    for (i, blocks) in state.indices.blocks.iter().enumerate() {
        let (rows, positions) = match extents {
            Extents::Known(step) => {
                let slice = &step.batch.sequences[i];
                (slice.rows.clone(), Some(slice.first_position + slice.rows.len()))
            }
            Extents::Positions => (i..i + 1, None),
        };
        let [k, v] = [keys, values].map(|part| part.gather(ops, block_tokens, blocks, positions));
        let (k, mut v) = (k?, v?);
        let own = ops.slice_rows(x, rows.start, rows.end)?;
        let own = ops.reshape(&own, &[1, rows.len(), width / head_dim, head_dim])?;
        let own = ops.transpose(&own, &[0, 2, 1, 3])?;
        let y = if positions.is_some() {
            let seen = if rows.len() > 1 { Seen::Causal } else { Seen::All };
            ops.attention(&own, &k, &v, scale, seen)?
        } else {
            let n = k.shape()[2];
            if masks.len() == i {
                let here = ops.slice_rows(index(&state.indices.positions)?, i, i + 1)?;
                masks.push(ops.less_equal(&ops.count(n)?, &here)?);
            }
            // What others left in a block, be it no number, must not count: not even times 0.
            let column = ops.reshape(&masks[i], &[1, 1, n, 1])?;
            v = ops.choose(&column, &v, &ops.floats(&[0.0], &[])?)?;
            let mask = ops.reshape(&masks[i], &[1, 1, 1, n])?;
            // MLX's compiler writes single numbers into its kernels with six digits, longer arrays not.
            let own = ops.multiply(&own, &ops.floats(&vec![scale; head_dim], &[head_dim])?)?;
            ops.attention(&own, &k, &v, 1.0, Seen::Where(&mask))?
        };
        let y = ops.transpose(&y, &[0, 2, 1, 3])?;
        outs.push(ops.reshape(&y, &[rows.len(), width])?);
    }
    match &outs[..] {
        [] => Err(Error::invalid("attention", "nothing was stored in this step")),
        [only] => Ok(only.clone()),
        outs => ops.concatenate_rows(&outs.iter().collect::<Vec<_>>()),
    }
}
