//! Reads the kernels' text: the C++ functions that call each kernel with what its arguments ask for.
//!
//! An argument says in `[[…]]` what it is. Clang knows nothing of that, so it is read here, and taken
//! out of the text that clang sees; nothing else is changed.

/// What an argument is bound to.
#[derive(Debug, PartialEq, Eq)]
enum Binding {
    Buffer(usize),
    Threadgroup,
    Builtin(String),
}

/// One argument of a kernel.
#[derive(Debug)]
struct Argument {
    /// Without its name: `const device uint*`.
    kind: String,
    binding: Binding,
}

/// The text without `[[…]]`.
pub(crate) fn without_attributes(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("[[") {
        out.push_str(before);
        rest = after.split_once("]]").expect("an attribute ends").1;
    }
    out.push_str(rest);
    out
}

/// The functions that call the kernels in `texts`, and the one that finds them by name.
pub(crate) fn calls(texts: &[String]) -> String {
    let mut functions = String::new();
    let mut table = String::new();
    for text in texts {
        for part in text.split("kernel void ").skip(1) {
            let (name, rest) = part.split_once('(').expect("a kernel has arguments");
            let (list, _) = rest.split_once(") {").expect("a kernel has a body");
            let arguments: Vec<Argument> = list.split(",\n").map(argument).collect();
            functions += &function(name, &arguments);
            let n_buffers = arguments.iter().filter(|a| matches!(a.binding, Binding::Buffer(_)));
            let n_buffers = n_buffers.count();
            let shared = arguments.iter().any(|a| a.binding == Binding::Threadgroup);
            table += &format!(
                "  if (strcmp(l->name, \"{name}\") == 0) {{\n    if (l->n_buffers != {n_buffers}) return \
                 \"{name} has {n_buffers} buffers\";\n    if ((l->threadgroup_bytes != 0) != {shared}) \
                 return \"{name}: threadgroup memory\";\n    const char* error = check_{name}(*l);\n    \
                 return error != nullptr ? error : simulator::run(*l, call_{name});\n  }}\n"
            );
        }
    }
    format!(
        "{functions}\nextern \"C\" const char* bitnet_metal_run(const simulator::Launch* l) {{\n{table}  \
         return \"no such kernel\";\n}}\n"
    )
}

fn argument(text: &str) -> Argument {
    let (declaration, attribute) = text.split_once("[[").expect("an argument says what it is");
    let attribute = attribute.split_once("]]").expect("an attribute ends").0;
    let (kind, _) = declaration.trim().rsplit_once(' ').expect("an argument has a name");
    let index = |prefix: &str| -> Option<usize> {
        attribute.strip_prefix(prefix)?.strip_suffix(')')?.parse().ok()
    };
    let binding = match (index("buffer("), index("threadgroup(")) {
        (Some(at), _) => Binding::Buffer(at),
        (_, Some(0)) => Binding::Threadgroup,
        _ => Binding::Builtin(attribute.to_owned()),
    };
    Argument { kind: kind.trim().to_owned(), binding }
}

/// `call_NAME` and `check_NAME`: the sizes of constants must be those of the structures.
fn function(name: &str, arguments: &[Argument]) -> String {
    let mut checks = String::new();
    let mut values = Vec::new();
    for Argument { kind, binding } in arguments {
        values.push(match binding {
            Binding::Buffer(at) => match kind.strip_suffix('&') {
                Some(structure) => {
                    let plain = structure.trim_start_matches("constant ").trim();
                    checks += &format!(
                        "  if (l.lengths[{at}] != sizeof({plain})) return \"{name}: size of {plain}\";\n"
                    );
                    format!("*({structure}*)(uintptr_t)l.buffers[{at}]")
                }
                None => format!("({kind})(uintptr_t)l.buffers[{at}]"),
            },
            Binding::Threadgroup => format!("({kind})(uintptr_t)simulator::position.shared"),
            Binding::Builtin(builtin) => match (builtin.as_str(), kind.as_str()) {
                ("threadgroup_position_in_grid", "uint3") => "simulator::group_position()".into(),
                ("threadgroups_per_grid", "uint3") => {
                    "uint3{l.groups[0], l.groups[1], l.groups[2]}".into()
                }
                ("threads_per_threadgroup", "uint3") => "uint3{l.threads, 1, 1}".into(),
                ("thread_index_in_threadgroup", "uint") => "simulator::group.current".into(),
                ("thread_index_in_simdgroup", "uint") => "simulator::lane()".into(),
                ("simdgroup_index_in_threadgroup", "uint") => {
                    "simulator::group.current / simulator::SIMD_WIDTH".into()
                }
                other => panic!("{name}: the simulator does not know {other:?}"),
            },
        });
    }
    format!(
        "static const char* check_{name}(const simulator::Launch& l) {{\n  (void)l;\n{checks}  return nullptr;\n}}\n\
         static void call_{name}(const void*) {{\n  const simulator::Launch& l = *simulator::position.launch;\n  \
         {name}({});\n}}\n",
        values.join(",\n    ")
    )
}
