//! `bitnet logits` against the reference implementation, for every form a model comes in.

mod common;

use common::{Golden, failure, golden, golden_tensor, ids, json, stdout};

/// Logits of the program for each sequence of `input_ids`, every position.
fn logits(path: &str, inputs: &Golden) -> Vec<f64> {
    let length = *inputs.shape.last().unwrap();
    let mut all = Vec::new();
    for sequence in inputs.values.chunks_exact(length) {
        let found = json(&["logits", path, "--ids", &ids(sequence), "--all", "--json"]);
        let rows = found["logits"].as_array().expect("rows");
        assert_eq!(rows.len(), length);
        for row in rows {
            all.extend(row.as_array().expect("a row").iter().map(|x| x.as_f64().unwrap()));
        }
    }
    all
}

/// ‖a−b‖/‖b‖ and, of the positions that are no ties, the share whose likeliest token is the same.
fn compare(found: &[f64], expected: &Golden) -> (f64, f64) {
    assert_eq!(found.len(), expected.values.len());
    let pairs = found.iter().zip(&expected.values);
    let difference: f64 = pairs.map(|(a, b)| (a - b).powi(2)).sum();
    let norm: f64 = expected.values.iter().map(|b| b * b).sum();
    let vocabulary = *expected.shape.last().unwrap();
    let best = |row: &[f64]| (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b]));
    // A row whose two likeliest tokens are this near is exchanged by any rounding.
    let tie = |row: &[f64]| {
        let best = row.iter().fold(f64::MIN, |a, &b| a.max(b));
        row.iter().filter(|&logit| best - logit < 1e-4).count() > 1
    };
    let rows = found.chunks_exact(vocabulary).zip(expected.values.chunks_exact(vocabulary));
    let rows = rows.filter(|(_, expected)| !tie(expected));
    let (n, same) =
        rows.fold((0, 0), |(n, same), (a, b)| (n + 1, same + usize::from(best(a) == best(b))));
    ((difference / norm).sqrt(), f64::from(same as u32) / f64::from(n))
}

/// `tolerance` is 1e-4 where no rounding of an activation flips, 3e-2 elsewhere: one flip moves a
/// logit by about a hundredth.
fn check(model: &str, file: &str, tensor: &str, tolerance: f64) {
    let inputs = golden_tensor(model, "input_ids");
    let found = logits(&golden(&format!("{model}/{file}")), &inputs);
    let (distance, same) = compare(&found, &golden_tensor(model, tensor));
    assert!(distance < tolerance, "{model}/{file}: distance {distance:e}");
    assert!(same > 0.97, "{model}/{file}: {same} of the likeliest tokens agree");
}

#[test]
fn bitnet_packed_multiply() {
    check("bitnet-tiny", "packed_multiply", "logits.packed_multiply", 1e-4);
}

#[test]
fn bitnet_packed_divide() {
    check("bitnet-tiny", "packed_divide", "logits.packed_divide", 1e-4);
}

#[test]
fn bitnet_masters_quantized_at_load() {
    check("bitnet-tiny", "online", "logits.online", 3e-2);
}

#[test]
fn bitnet_gguf_i2_s() {
    check("bitnet-tiny", "model-i2_s.gguf", "logits.i2_s", 3e-2);
}

#[test]
fn llama_packed_multiply() {
    check("llama-ternary-tiny", "packed_multiply", "logits.packed_multiply", 3e-2);
}

#[test]
fn llama_packed_divide() {
    check("llama-ternary-tiny", "packed_divide", "logits.packed_divide", 3e-2);
}

#[test]
fn llama_masters_quantized_at_load() {
    check("llama-ternary-tiny", "online", "logits.online", 3e-2);
}

#[test]
fn bitnet_silu_gguf_tq1_0() {
    check("gguf-bitnet-silu", "model-tq1_0.gguf", "logits.reference", 3e-2);
}

#[test]
fn bitnet_silu_gguf_tq2_0() {
    check("gguf-bitnet-silu", "model-tq2_0.gguf", "logits.reference", 3e-2);
}

#[test]
fn builtin_model() {
    let inputs = golden_tensor("story", "input_ids");
    let (distance, same) = compare(&logits("builtin", &inputs), &golden_tensor("story", "logits"));
    assert!(distance < 3e-2 && same > 0.97, "distance {distance:e}, same {same}");
}

#[test]
fn the_last_row_is_the_last_of_all_and_numbers_read_back_exactly() {
    let path = golden("bitnet-tiny/packed_multiply");
    let one = stdout(&["logits", &path, "--ids", "5,6,7", "--json"]);
    let all = stdout(&["logits", &path, "--ids", "5,6,7", "--json", "--all"]);
    let rows =
        |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap()["logits"].clone();
    let (one, all) = (rows(&one), rows(&all));
    assert_eq!((one.as_array().unwrap().len(), all.as_array().unwrap().len()), (1, 3));
    assert_eq!(one[0], all[2]);
    for number in one[0].as_array().unwrap() {
        let wide = number.as_f64().unwrap();
        // The shortest decimal of a float: parsing it as a float and printing it gives it again.
        let narrow: f32 = number.to_string().parse().unwrap();
        assert_eq!(serde_json::to_string(&narrow).unwrap(), number.to_string(), "{wide}");
    }
}

#[test]
fn threads_change_no_bit() {
    let path = golden("bitnet-tiny/model-i2_s.gguf");
    let with = |threads: &str| {
        stdout(&["logits", &path, "--ids", "5,6,7,8", "--all", "--json", "--threads", threads])
    };
    assert_eq!(with("1"), with("2"));
}

#[test]
fn people_see_the_likeliest_tokens() {
    let shown = stdout(&["logits", "builtin", "--ids", "2346,331,704,259"]);
    let lines: Vec<_> = shown.lines().collect();
    assert_eq!((lines.len(), lines[0]), (11, "after position 3"));
    assert!(lines[1].ends_with('"'), "a token's text: {}", lines[1]);
}

#[test]
fn ids_outside_the_vocabulary_are_named() {
    let (code, stderr) = failure(&["logits", "builtin", "--ids", "1,4096", "--json"]);
    assert_eq!(code, 1);
    assert!(stderr.contains("below 4096") && stderr.contains("got 4096"), "{stderr}");
    assert_eq!(failure(&["logits", "builtin", "--ids", "1,x"]).0, 2);
}
