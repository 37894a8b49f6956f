//! Bounds on the values a hostile template builds.
//!
//! The engine's fuel pays for instructions and text, and for the items an operation visits itself.
//! It does not see what values *share*: a list that contains itself twice, forty times over, costs
//! forty instructions and has 2⁴⁰ leaves for whatever compares, prints or copies it. Here the
//! compiled instructions are rewritten so that every value that is built is walked as the tree it
//! stands for, and refused beyond [`MAX_NODES`] or [`MAX_DEPTH`]; and so that operations which
//! look inside values pay for what they may see.
//!
//! Knows the engine's instructions (an interface without promises, hence the exact version in the
//! manifest), nothing of chats.

use std::collections::BTreeMap;
use std::sync::Arc;

use minijinja::machinery::{self, CompiledTemplate, Instruction, Instructions};
use minijinja::value::{Object, Value, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State};

/// Most values one value may hold, at any depth, each counted as often as it is reached.
const MAX_NODES: usize = 1 << 18;
/// Deepest nesting of values: what compares, prints and drops them recurses.
const MAX_DEPTH: usize = 64;
/// Values, and bytes of text, that are looked at for one unit of fuel.
const NODES_PER_FUEL: usize = 4;
const BYTES_PER_FUEL: usize = 1024;

/// The functions the rewritten instructions call. No template can write such names.
pub(super) const NAMES: [&str; 5] = [BUILT, STORED, READ, ADDED, INDEXED];
const BUILT: &str = "(built)";
const STORED: &str = "(stored)";
const READ: &str = "(read)";
const ADDED: &str = "(added)";
const INDEXED: &str = "(indexed)";

/// Filters and tests that do not look inside what they are given.
const LIGHT: [&str; 27] = [
    "length",
    "count",
    "first",
    "last",
    "trim",
    "upper",
    "lower",
    "capitalize",
    "title",
    "default",
    "d",
    "safe",
    "int",
    "float",
    "defined",
    "undefined",
    "none",
    "string",
    "mapping",
    "sequence",
    "iterable",
    "number",
    "integer",
    "boolean",
    "true",
    "false",
    "filter",
];

/// Adds the functions behind [`NAMES`].
pub(super) fn add_to(environment: &mut Environment<'static>) {
    environment.add_function(BUILT, |state: &State, value: Value| {
        walk(state, &value, false)?;
        Ok::<_, Error>(value)
    });
    environment.add_function(STORED, |state: &State, value: Value| {
        if is_namespace(&value) {
            return Err(too_large("a namespace inside a namespace"));
        }
        walk(state, &value, false)?;
        Ok::<_, Error>(value)
    });
    environment.add_global(READ, Value::from_object(Read));
    environment.add_function(INDEXED, |state: &State, container: Value, key: Value| {
        // Of a text the characters before the place are counted; lists and maps find it at once.
        if container.kind() == ValueKind::String {
            walk(state, &container, true)?;
        }
        walk(state, &key, true)?;
        Ok::<_, Error>(Value::from(vec![key, container]))
    });
    environment.add_function(ADDED, |state: &State, left: Value, right: Value| {
        let is_list = |value: &Value| matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable);
        if is_list(&left) && is_list(&right) {
            let (Some(left), Some(right)) = (left.len(), right.len()) else {
                return Err(too_large("the sum of lists of unknown lengths"));
            };
            let sum = left.saturating_add(right);
            if sum > MAX_NODES {
                return Err(too_large("a list"));
            }
            state.consume_fuel((sum / NODES_PER_FUEL) as u64)?;
        }
        Ok::<_, Error>(Value::from(vec![right, left]))
    });
}

/// Pays for looking inside its arguments, keyword arguments as they are, and returns them.
#[derive(Debug)]
struct Read;

impl Object for Read {
    fn call(self: &Arc<Self>, state: &mut State, values: &[Value]) -> Result<Value, Error> {
        values.iter().try_for_each(|value| walk(state, value, true))?;
        // Unpacking leaves the first of a list on top of the stack: the last operand comes first.
        Ok(values.iter().rev().cloned().collect())
    }
}

/// Renders `compiled` with every value that it builds bounded.
pub(super) fn render(
    environment: &Environment<'_>,
    compiled: &CompiledTemplate<'_>,
    context: Value,
) -> Result<String, Error> {
    let instructions = rewritten(&compiled.instructions)?;
    let blocks = BTreeMap::new();
    let mut text = String::new();
    let mut output = machinery::make_string_output(&mut text);
    machinery::eval(environment, &instructions, context, &blocks, &mut output, AutoEscape::None)?;
    drop(output);
    Ok(text)
}

fn too_large(what: &str) -> Error {
    Error::new(ErrorKind::OutOfFuel, format!("{what} is larger than any chat needs"))
}

fn is_namespace(value: &Value) -> bool {
    value.as_object().is_some_and(|object| object.type_name().ends_with("::Namespace"))
}

/// Visits the tree `value` stands for and pays for it. Only a root may be a namespace, the one
/// kind of value that can come to hold itself.
fn walk(state: &State, value: &Value, may_hold_namespaces: bool) -> Result<(), Error> {
    let mut seen = Seen { nodes: 0, bytes: 0, may_hold_namespaces };
    let outcome = seen.visit(value, 0);
    state.consume_fuel((seen.nodes / NODES_PER_FUEL + seen.bytes / BYTES_PER_FUEL) as u64)?;
    outcome
}

struct Seen {
    nodes: usize,
    bytes: usize,
    may_hold_namespaces: bool,
}

impl Seen {
    fn visit(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        self.nodes += 1;
        if depth > MAX_DEPTH {
            return Err(too_large("the nesting of a value"));
        }
        if self.nodes > MAX_NODES {
            return Err(too_large("a value"));
        }
        if depth > 0 && !self.may_hold_namespaces && is_namespace(value) {
            return Err(too_large("a namespace inside a value"));
        }
        match value.kind() {
            ValueKind::String => self.bytes += value.as_str().map_or(0, str::len),
            ValueKind::Map => {
                for key in value.try_iter()? {
                    self.visit(&key, depth + 1)?;
                    self.visit(&value.get_item(&key)?, depth + 1)?;
                }
            }
            // Iterators without a length can be read but once; they hold what was walked before.
            ValueKind::Seq | ValueKind::Iterable if value.len().is_some() => {
                for item in value.try_iter()? {
                    self.visit(&item, depth + 1)?;
                }
            }
            _ => {}
        }
        Ok(())
    }
}

/// What surrounds an instruction: a call that gets its operands before it, one that gets its
/// result after it.
#[derive(Default)]
struct Around<'source> {
    before: Vec<Instruction<'source>>,
    after: Vec<Instruction<'source>>,
}

fn around<'source>(instruction: &Instruction<'source>) -> Result<Around<'source>, Error> {
    // Functions return one value: operands go in as arguments and come back as a list.
    let operands = |function, count: u16| {
        vec![
            Instruction::CallFunction(function, Some(count)),
            Instruction::UnpackList(usize::from(count)),
        ]
    };
    let built = || vec![Instruction::CallFunction(BUILT, Some(1))];
    let counted = |count: &Option<u16>| {
        count.ok_or_else(|| {
            Error::new(ErrorKind::SyntaxError, "arguments from a list (`*args`) are not supported")
        })
    };
    Ok(match instruction {
        Instruction::Add => Around { before: operands(ADDED, 2), after: Vec::new() },
        Instruction::Eq
        | Instruction::Ne
        | Instruction::Gt
        | Instruction::Gte
        | Instruction::Lt
        | Instruction::Lte
        | Instruction::In
        | Instruction::CompareAndPreserve(_)
        | Instruction::StringConcat => Around { before: operands(READ, 2), after: Vec::new() },
        Instruction::GetItem => Around { before: operands(INDEXED, 2), after: Vec::new() },
        Instruction::Emit => Around { before: operands(READ, 1), after: Vec::new() },
        Instruction::PerformTest(name, count, _) if !LIGHT.contains(name) => {
            Around { before: operands(READ, counted(count)?), after: Vec::new() }
        }
        Instruction::ApplyFilter(name, count, _) if !LIGHT.contains(name) => {
            Around { before: operands(READ, counted(count)?), after: built() }
        }
        Instruction::CallFunction(_, count)
        | Instruction::CallMethod(_, count)
        | Instruction::CallObject(count) => {
            counted(count)?;
            Around { before: Vec::new(), after: built() }
        }
        Instruction::ApplyFilter(..)
        | Instruction::BuildMap(_)
        | Instruction::BuildList(_)
        | Instruction::BuildTuple(_)
        | Instruction::Slice
        | Instruction::Mul => Around { before: Vec::new(), after: built() },
        // The namespace lies on top of the value.
        Instruction::SetAttr(_) => Around {
            before: vec![
                Instruction::Swap,
                Instruction::CallFunction(STORED, Some(1)),
                Instruction::Swap,
            ],
            after: Vec::new(),
        },
        _ => Around::default(),
    })
}

/// The instructions with their guards, jumps led to where their targets have moved.
fn rewritten<'source>(original: &Instructions<'source>) -> Result<Instructions<'source>, Error> {
    let mut guarded = Instructions::new(original.name(), original.source());
    // Where each instruction, its guards included, begins.
    let mut starts = Vec::new();
    let mut index = 0;
    while let Some(instruction) = original.get(index) {
        let mut push = |instruction| match (original.get_span(index), original.get_line(index)) {
            (Some(span), _) => guarded.add_with_span(instruction, span),
            (None, Some(line)) => {
                guarded.add_with_line(instruction, u16::try_from(line).unwrap_or(u16::MAX))
            }
            (None, None) => guarded.add(instruction),
        };
        let Around { before, after } = around(instruction)?;
        let mut first = None;
        for instruction in before.into_iter().chain([instruction.clone()]).chain(after) {
            let at = push(instruction);
            first.get_or_insert(at);
        }
        starts.extend(first);
        index += 1;
    }
    let end = starts.last().map_or(0, |_| length(&guarded));
    for index in 0..end {
        if let Some(
            Instruction::Jump(target)
            | Instruction::JumpIfFalse(target)
            | Instruction::JumpIfFalseOrPop(target)
            | Instruction::JumpIfTrueOrPop(target)
            | Instruction::Iterate(target)
            | Instruction::BuildMacro(_, target, _),
        ) = guarded.get_mut(index)
        {
            *target = starts.get(*target as usize).copied().unwrap_or(end);
        }
    }
    Ok(guarded)
}

fn length(instructions: &Instructions<'_>) -> u32 {
    let mut length = 0;
    while instructions.get(length).is_some() {
        length += 1;
    }
    length
}
