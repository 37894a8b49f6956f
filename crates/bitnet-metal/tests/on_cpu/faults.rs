//! Faults planted in the kernels' text: each must be found, by the compiler or by the comparison with
//! the oracle, or what that says of the kernels as they are would be worth little.
//!
//! Each fault runs in a process of its own, for it may crash or never end.

use super::oracle;
use super::simulator::{Floats, Library, over, sources};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Who finds a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum By {
    Compiler,
    Oracle,
}

/// What a fault is; who finds it; the file; the text that occurs there once, and what takes its place.
type Fault = (&'static str, By, &'static str, &'static str, &'static str);

const BARRIER: &str = "threadgroup_barrier(mem_flags::mem_threadgroup);";

const FAULTS: &[Fault] = &[
    (
        "a lane is left out of a sum",
        By::Oracle,
        "common.metal",
        "lane_sum += simd_shuffle_down(lane_sum, 8);",
        "",
    ),
    (
        "lanes fold in another order",
        By::Oracle,
        "common.metal",
        "lane_sum += simd_shuffle_down(lane_sum, 8);\n    lane_sum += simd_shuffle_down(lane_sum, 4);",
        "lane_sum += simd_shuffle_down(lane_sum, 4);\n    lane_sum += simd_shuffle_down(lane_sum, 8);",
    ),
    ("e^x is a little off", By::Oracle, "common.metal", "0.16666521f", "0.1666f"),
    (
        "bfloat16 is shifted too little",
        By::Oracle,
        "common.metal",
        "uint(((const device ushort*)bytes)[at]) << 16",
        "uint(((const device ushort*)bytes)[at]) << 15",
    ),
    (
        "no barrier after a row is staged",
        By::Oracle,
        "norm.metal",
        "            shared[i] = x[first + i];\n        }\n        threadgroup_barrier(mem_flags::mem_threadgroup);",
        "            shared[i] = x[first + i];\n        }",
    ),
    (
        "no barrier before a row is staged again",
        By::Oracle,
        "norm.metal",
        "        threadgroup_barrier(mem_flags::mem_threadgroup);\n        for (uint i = lid; i < count; i += threads) {",
        "        for (uint i = lid; i < count; i += threads) {",
    ),
    (
        "no barrier before a factor is read",
        By::Oracle,
        "norm.metal",
        "    threadgroup_barrier(mem_flags::mem_threadgroup);\n    return shared[STAGE];",
        "    return shared[STAGE];",
    ),
    (
        "a norm without its eps",
        By::Oracle,
        "norm.metal",
        "precise::sqrt(sum / float(width) + eps)",
        "precise::sqrt(sum / float(width))",
    ),
    (
        "no barrier before the largest are read",
        By::Oracle,
        "norm.metal",
        "            parts[sg] = largest;\n        }\n        threadgroup_barrier(mem_flags::mem_threadgroup);",
        "            parts[sg] = largest;\n        }",
    ),
    (
        "no barrier before factors are read",
        By::Oracle,
        "norm.metal",
        "    threadgroup_barrier(mem_flags::mem_threadgroup);\n\n    // Codes",
        "\n    // Codes",
    ),
    (
        "no barrier before codes are summed",
        By::Oracle,
        "norm.metal",
        "    threadgroup_barrier(mem_flags::mem_device);\n",
        "",
    ),
    (
        "codes are cut off instead of rounded",
        By::Oracle,
        "norm.metal",
        "0 : round_even(x * factor)",
        "0 : int(x * factor)",
    ),
    (
        "a wrong scale of activations",
        By::Oracle,
        "norm.metal",
        "most / 127.0f : as_type<float>",
        "most / 128.0f : as_type<float>",
    ),
    (
        "a simdgroup operation for half the threads",
        By::Oracle,
        "norm.metal",
        "        largest = simd_max(largest);\n        if (lane == 0) {\n            parts[sg] = largest;",
        "        if (lane < 16) {\n            largest = simd_max(largest);\n        }\n        if (lane == 0) {\n            parts[sg] = largest;",
    ),
    (
        "no barrier between the parts of a sum",
        By::Oracle,
        "bitlinear.metal",
        "    threadgroup_barrier(mem_flags::mem_threadgroup);\n    uint token = lid / 16;",
        "    uint token = lid / 16;",
    ),
    (
        "a barrier that few threads reach",
        By::Oracle,
        "bitlinear.metal",
        "        if (lane < 4) {\n            parts[",
        "        if (lane < 4) {\n            threadgroup_barrier(mem_flags::mem_threadgroup);\n            parts[",
    ),
    (
        "the last step is left out",
        By::Oracle,
        "bitlinear.metal",
        "step < p.steps; step += 8 * DECODE_SIMDGROUPS",
        "step + 1 < p.steps; step += 8 * DECODE_SIMDGROUPS",
    ),
    (
        "one step too many",
        By::Oracle,
        "bitlinear.metal",
        "step < p.steps; step += 8 * DECODE_SIMDGROUPS",
        "step <= p.steps; step += 8 * DECODE_SIMDGROUPS",
    ),
    ("a field is scaled wrongly", By::Oracle, "bitlinear.metal", "* 0.0625f", "* 0.125f"),
    (
        "a tile is off by one row",
        By::Oracle,
        "bitlinear.metal",
        "uint row = tile * 16 + lid % 16;",
        "uint row = tile * 16 + lid % 16 + 1;",
    ),
    (
        "outputs overwrite instead of adding up",
        By::Oracle,
        "bitlinear.metal",
        "    *out = p.accumulate != 0 ? *out + y : y;",
        "    *out = y;",
    ),
    (
        "the sum of the activations is added",
        By::Oracle,
        "bitlinear.metal",
        "float(sum - to.code_sums[token])",
        "float(sum + to.code_sums[token])",
    ),
    (
        "no barrier after blocks are staged",
        By::Oracle,
        "bitlinear.metal",
        "        threadgroup_barrier(mem_flags::mem_threadgroup);\n        for (uint k = 0;",
        "        for (uint k = 0;",
    ),
    (
        "no barrier before blocks are staged again",
        By::Oracle,
        "bitlinear.metal",
        "        threadgroup_barrier(mem_flags::mem_threadgroup);\n    }\n    // The sums take",
        "    }\n    // The sums take",
    ),
    (
        "no barrier before results are read",
        By::Oracle,
        "bitlinear.metal",
        "    threadgroup_barrier(mem_flags::mem_threadgroup);\n    Epilogue to",
        "    Epilogue to",
    ),
    (
        "a matrix is not transposed",
        By::Oracle,
        "bitlinear.metal",
        "ulong2(0, 0), true",
        "ulong2(0, 0), false",
    ),
    (
        "a block of tokens is off by one tile",
        By::Oracle,
        "bitlinear.metal",
        "near_tokens + m * 8 * TILED_STRIDE + k",
        "near_tokens + (m ^ 1) * 8 * TILED_STRIDE + k",
    ),
    (
        "a group's scale is its neighbour's",
        By::Oracle,
        "bitlinear.metal",
        "g / p.sum_groups) * 4 + quad",
        "g) * 4 + quad",
    ),
    (
        "a group ends a step early",
        By::Oracle,
        "bitlinear.metal",
        "min(p.steps, (g + 1) * p.group_steps)",
        "min(p.steps, (g + 1) * p.group_steps - 1)",
    ),
    (
        "a token's rows are mixed up",
        By::Oracle,
        "rows.metal",
        "+ token % 8) * 16",
        "+ token % 4) * 16",
    ),
    (
        "a float sum in another order",
        By::Oracle,
        "rows.metal",
        "(sum.x + sum.z) + (sum.y + sum.w)",
        "(sum.x + sum.y) + (sum.z + sum.w)",
    ),
    ("a gate without its half", By::Oracle, "rows.metal", "activated * up[at]", "activated"),
    (
        "no barrier after a head is turned",
        By::Oracle,
        "attention.metal",
        "        head[i + half_dim] = b * cosine + a * sine;\n    }\n    simdgroup_barrier(mem_flags::mem_threadgroup);",
        "        head[i + half_dim] = b * cosine + a * sine;\n    }",
    ),
    (
        "a rotation the other way",
        By::Oracle,
        "attention.metal",
        "head[i] = a * cosine - b * sine;",
        "head[i] = a * cosine + b * sine;",
    ),
    (
        "no barrier before bytes are packed",
        By::Oracle,
        "attention.metal",
        "    simdgroup_barrier(mem_flags::mem_threadgroup);\n    return finite ?",
        "    return finite ?",
    ),
    (
        "no barrier before weights are summed",
        By::Oracle,
        "attention.metal",
        "        scores[t] = exact_exp(scores[t] - most);\n    }\n    simdgroup_barrier(mem_flags::mem_threadgroup);",
        "        scores[t] = exact_exp(scores[t] - most);\n    }",
    ),
    (
        "no barrier before queries are read",
        By::Oracle,
        "attention.metal",
        "    threadgroup_barrier(mem_flags::mem_threadgroup);\n\n    for (uint t = lid; t < visible",
        "\n    for (uint t = lid; t < visible",
    ),
    (
        "no barrier between scores and weights",
        By::Oracle,
        "attention.metal",
        "    threadgroup_barrier(mem_flags::mem_threadgroup);\n    if (sg < n_queries) {\n        weigh(",
        "    if (sg < n_queries) {\n        weigh(",
    ),
    (
        "no barrier between weights and values",
        By::Oracle,
        "attention.metal",
        "    threadgroup_barrier(mem_flags::mem_threadgroup);\n\n    uint n_heads",
        "\n    uint n_heads",
    ),
    (
        "a row does not see itself",
        By::Oracle,
        "attention.metal",
        "uint seen = places[row].x + 1;",
        "uint seen = places[row].x;",
    ),
    (
        "a row sees its successor",
        By::Oracle,
        "attention.metal",
        "uint seen = places[row].x + 1;",
        "uint seen = places[row].x + 2;",
    ),
    (
        "layers share their cache",
        By::Oracle,
        "attention.metal",
        "(ulong(block) * c.n_layers + c.layer)",
        "(ulong(block) * c.n_layers)",
    ),
    (
        "spans join with each other's factors",
        By::Oracle,
        "attention.metal",
        "total = total * old_factor + next[1] * new_factor;",
        "total = total * new_factor + next[1] * old_factor;",
    ),
    (
        "device memory taken for threadgroup memory",
        By::Compiler,
        "bitlinear.metal",
        "threadgroup const int* part = (threadgroup const int*)parts + lid;",
        "threadgroup const int* part = code_sums + lid;",
    ),
    (
        "a constant is written to",
        By::Compiler,
        "bitlinear.metal",
        "    uint quad = lane & 3;\n    const device uint4* tile_weights = weights + ulong(tile) * p.steps * 4 + quad;\n    const device uchar* tokens",
        "    p.rows = 1;\n    uint quad = lane & 3;\n    const device uint4* tile_weights = weights + ulong(tile) * p.steps * 4 + quad;\n    const device uchar* tokens",
    ),
    (
        "a component that a vector has not",
        By::Compiler,
        "rows.metal",
        "sum.y + sum.w",
        "sum.y + sum.v",
    ),
];

/// Which fault a child process is to plant.
const VARIABLE: &str = "BITNET_METAL_FAULT";
/// What a child says when the kernels were compiled, and when nothing was found in them.
const COMPILED: &str = "the kernels with the fault compile";
const SURVIVED: &str = "the fault was not found";

/// The kernels with one fault.
fn planted(&(what, _, file, from, to): &Fault) -> Vec<(&'static str, String)> {
    let mut all = sources();
    let (_, text) = all.iter_mut().find(|(name, _)| *name == file).expect("a file of kernels");
    assert_eq!(text.matches(from).count(), 1, "{what}: the text to be replaced");
    *text = text.replace(from, to);
    all
}

#[test]
fn every_fault_can_be_planted() {
    for fault in FAULTS {
        planted(fault);
    }
    assert!(FAULTS.iter().filter(|fault| fault.3.contains(BARRIER)).count() > 5);
}

/// A child process: the oracle on the kernels with the fault that the environment names.
#[test]
#[ignore = "run by `every_planted_fault_is_found`"]
fn one_fault() {
    let Ok(Ok(index)) = std::env::var(VARIABLE).map(|index| index.parse::<usize>()) else { return };
    let sources = FAULTS.get(index).map_or_else(sources, planted);
    let library = Arc::new(Library::compile(&sources, Floats::Exact).expect("the kernels compile"));
    println!("{COMPILED}");
    let want = oracle::scalar();
    for seed in [0, 1] {
        assert!(oracle::equal(&oracle::results(over(library.clone(), seed)), &want));
    }
    println!("{SURVIVED}");
}

/// What a child said, and whether it ended as one does in which something was found: a panic, a
/// crash, or no end at all. Ended by a stranger is neither.
fn wait(mut child: Child) -> (String, bool) {
    /// A machine may be busy with other things meanwhile.
    const PATIENCE: Duration = Duration::from_secs(900);
    /// Exit status of a test that failed, and signals of a process that went wrong by itself.
    const FAILED: i32 = 101;
    const CRASHES: [i32; 4] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGABRT, libc::SIGILL];
    let start = Instant::now();
    let mut endless = false;
    while child.try_wait().expect("a child").is_none() {
        if start.elapsed() > PATIENCE {
            endless = true;
            child.kill().expect("a child");
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let output = child.wait_with_output().expect("a child");
    let crashed = output.status.signal().is_some_and(|signal| CRASHES.contains(&signal));
    let found = endless || crashed || output.status.code() == Some(FAILED);
    (String::from_utf8_lossy(&output.stdout).into_owned(), found)
}

fn run(index: usize) -> (String, bool) {
    let program = std::env::current_exe().expect("this program");
    let arguments = ["faults::one_fault", "--exact", "--ignored", "--nocapture", "-q"];
    let mut command = Command::new(program);
    command.args(arguments).env(VARIABLE, index.to_string()).env("RUST_BACKTRACE", "0");
    let child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
    wait(child.expect("this program again"))
}

#[test]
#[ignore = "needs clang++: scripts/test-metal.sh"]
fn every_planted_fault_is_found() {
    let next = AtomicUsize::new(0);
    let check = || {
        let mut bad = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let (said, found) = match index <= FAULTS.len() {
                true => run(index),
                false => return bad,
            };
            let (compiled, survived) = (said.contains(COMPILED), said.contains(SURVIVED));
            match FAULTS.get(index) {
                // One more than there are faults: the kernels as they are, in which none is found.
                None if !survived => bad.push("the kernels without a fault".to_owned()),
                None => {}
                Some((what, by, ..)) if !found || survived || compiled != (*by == By::Oracle) => {
                    bad.push(format!("{what}: compiled {compiled}, found {found}"));
                }
                Some((what, by, ..)) => println!("found by the {by:?}: {what}"),
            }
        }
    };
    let bad: Vec<String> = std::thread::scope(|scope| {
        let others = [(); 6].map(|()| scope.spawn(check));
        others.into_iter().flat_map(|other| other.join().expect("a thread")).collect()
    });
    assert!(bad.is_empty(), "not found as expected: {bad:#?}");
}
