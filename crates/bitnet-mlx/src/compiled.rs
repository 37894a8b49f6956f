//! Decoding steps as functions that MLX compiles, one for each program.
//!
//! MLX keeps a trace for each list of shapes a function was applied to and never forgets one, so a
//! function that has seen many is made anew.

use crate::array::Ops;
use crate::closure::Closure;
use crate::fused::Fused;
use crate::library::device_error;
use crate::program::{Extents, Program, State, take_parts};
use bitnet_core::Result;
use std::collections::HashSet;

/// Programs that are kept: a model has one, and a few more if its states are read.
const MAX_PROGRAMS: usize = 4;
/// Lists of shapes that a function may have seen.
const MAX_SHAPES: usize = 32;

/// The functions of a backend.
pub(crate) struct Compiled {
    ops: Ops,
    fuse: bool,
    /// The last used one at the end.
    known: Vec<Function>,
}

struct Function {
    program: Program,
    closure: Closure,
    /// Sequences and blocks of the steps it was traced for.
    shapes: HashSet<Vec<usize>>,
}

impl Compiled {
    /// `fuse`: see [`Closure::new`].
    pub(crate) fn new(ops: &Ops, fuse: bool) -> Self {
        Self { ops: ops.clone(), fuse, known: Vec::new() }
    }

    /// Does what [`Program::run`] does for a step that starts from nothing, by one function.
    pub(crate) fn run(&mut self, program: &Program, state: &mut State) -> Result<()> {
        let mut shape = state.sizes();
        shape.extend(state.indices.blocks.iter().map(|blocks| blocks.shape()[0]));
        let place = self.known.iter().position(|function| function.program == *program);
        let known = place.map(|place| self.known.remove(place));
        let mut function = match known {
            Some(f) if f.shapes.len() < MAX_SHAPES || f.shapes.contains(&shape) => f,
            _ => Function::new(&self.ops, self.fuse, program, state)?,
        };
        function.shapes.insert(shape);
        let arrays = function.closure.apply(&state.inputs())?;
        let scales: Vec<bool> = state.scales().collect();
        let mut arrays = arrays.into_iter();
        // The arrays of the old state go: nobody but the graph refers to the cache now.
        state.places = take_parts(&mut arrays, &scales)?;
        state.values = program.written().into_iter().zip(arrays.by_ref()).collect();
        state.result = arrays.next();
        if self.known.len() >= MAX_PROGRAMS {
            self.known.remove(0);
        }
        self.known.push(function);
        Ok(())
    }
}

impl Function {
    fn new(ops: &Ops, fuse: bool, program: &Program, state: &State) -> Result<Self> {
        let (form, traced) = (state.form(), program.clone());
        let body = move |ops: &Ops, arrays| {
            let mut state = form(arrays)?;
            // MLX compiles what is around the functions together with them.
            let fused = Fused::new(ops, false)?;
            traced.run(ops, &fused, &Extents::Positions, &mut state)?;
            if state.result.is_none() {
                return Err(device_error("a compiled step has no result"));
            }
            Ok(state.outputs().into_iter().cloned().collect())
        };
        let closure = Closure::new(ops, false, fuse, Box::new(body))?;
        Ok(Self { program: program.clone(), closure, shapes: HashSet::new() })
    }
}
