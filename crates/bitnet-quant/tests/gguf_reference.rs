//! Files of other writers: what the Python `gguf` package wrote and decoded, and the golden models.

use bitnet_core::weights::{FloatRows, Scales, TernaryRows};
use bitnet_quant::gguf::{Array, GgufFile, Tensor, Value};
use bitnet_quant::pack::{FloatFormat, Packing, encode, encode_float};
use std::path::{Path, PathBuf};

fn packings() -> GgufFile {
    GgufFile::open(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/packings.gguf"))
        .unwrap()
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/goldens").join(name)
}

fn floats(tensor: &dyn FloatRows) -> Vec<f32> {
    let mut numbers = vec![f32::NAN; tensor.rows() * tensor.cols()];
    for (row, out) in numbers.chunks_exact_mut(tensor.cols()).enumerate() {
        tensor.decode_row(row, out);
    }
    numbers
}

/// The numbers a tensor stands for, of whatever kind.
fn numbers(file: &GgufFile, name: &str) -> Vec<f32> {
    match file.tensor(name).unwrap() {
        Tensor::Float(tensor) => floats(&tensor),
        Tensor::Ternary(tensor) => {
            let mut codes = vec![9; tensor.cols()];
            let mut numbers = Vec::new();
            for row in 0..tensor.rows() {
                tensor.decode_row(row, &mut codes);
                numbers.extend(codes.iter().enumerate().map(|(col, &code)| {
                    let scale = match tensor.scales() {
                        Scales::Tensor(scale) => *scale,
                        Scales::Row(values) => values[row],
                        Scales::Group { group, values } => {
                            values[row * tensor.cols().div_ceil(*group) + col / group]
                        }
                    };
                    scale * (f32::from(code) - 1.0)
                }));
            }
            numbers
        }
    }
}

#[test]
fn every_packing_decodes_as_the_reference_does() {
    let file = packings();
    let names = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K", "F16", "BF16"];
    for name in names.iter().chain(&["TQ1_0", "TQ2_0"]) {
        assert_eq!(file.info(name).unwrap().tensor_type.to_string(), *name);
        assert_eq!(file.info(name).unwrap().shape, [2, 256]);
        let expected = numbers(&file, &format!("{name}.expected"));
        // The same operations in the same order: equal, not near.
        assert_eq!(numbers(&file, name), expected, "{name}");
    }
}

#[test]
fn q8_0_is_encoded_as_the_reference_does() {
    let file = packings();
    let Tensor::Float(source) = file.tensor("numbers").unwrap() else { panic!("floats") };
    let expected = file.bytes(file.info("numbers.q8_0").unwrap());
    assert!(encode_float(FloatFormat::Q8_0, &source, "numbers").unwrap() == expected[..]);
}

#[test]
fn q6_k_is_encoded_closely() {
    let file = packings();
    let Tensor::Float(source) = file.tensor("numbers").unwrap() else { panic!("floats") };
    let bytes = encode_float(FloatFormat::Q6K, &source, "numbers").unwrap();
    let tensor = bitnet_quant::pack::FloatTensor::new("numbers", FloatFormat::Q6K, 2, 256, bytes);
    let (before, after) = (floats(&source), floats(&tensor.unwrap()));
    let square = |x: f32| f64::from(x) * f64::from(x);
    let error: f64 = before.iter().zip(&after).map(|(a, b)| square(a - b)).sum();
    let norm: f64 = before.iter().map(|x| square(*x)).sum();
    // 64 steps over ±2.1σ, the usual largest of 16 numbers, are 0.065σ wide; uniform rounding in
    // them makes an error of 0.065/√12 = 1.9 %. Fitting the step must not make it worse.
    let relative = (error / norm).sqrt();
    assert!(relative < 0.019, "{relative}");
    // Runs of zeros stay zeros.
    assert!(after[256..288].iter().all(|&x| x == 0.0));
}

#[test]
fn trits_are_encoded_as_the_reference_does() {
    let file = packings();
    for (name, packing) in [("trits.tq1_0", Packing::Tq1_0), ("trits.tq2_0", Packing::Tq2_0)] {
        let Tensor::Ternary(tensor) = file.tensor(name).unwrap() else { panic!("ternary") };
        let encoded = encode(packing, &tensor, name).unwrap();
        assert!(encoded.bytes == tensor.bytes(), "{name}");
        assert_eq!(encoded.scale_error, 0.0);
        let expected = numbers(&file, "trits");
        for (a, b) in numbers(&file, name).iter().zip(&expected) {
            assert_eq!(a.partial_cmp(&0.0), b.partial_cmp(&0.0));
        }
    }
}

#[test]
fn every_value_type_is_read() {
    let file = packings();
    let values = [
        ("uint8", Value::U8(200)),
        ("int8", Value::I8(-100)),
        ("uint16", Value::U16(60000)),
        ("int16", Value::I16(-30000)),
        ("uint32", Value::U32(4_000_000_000)),
        ("int32", Value::I32(-2_000_000_000)),
        ("uint64", Value::U64((1 << 63) + 1)),
        ("int64", Value::I64(-(1 << 62))),
        ("float32", Value::F32(0.1)),
        ("float64", Value::F64(0.1)),
        ("bool", Value::Bool(true)),
        ("string", Value::String("ternär".to_owned())),
        ("strings", Value::Array(Array::String(vec!["a".into(), "".into(), "ü".into()]))),
        ("ints", Value::Array(Array::I32(vec![1, -2, 3]))),
        ("floats", Value::Array(Array::F32(vec![0.5, -0.25]))),
    ];
    for (name, value) in values {
        assert_eq!(file.metadata().value(&format!("test.{name}")), Some(&value));
    }
    let nested = Array::Array(vec![Array::I32(vec![1, 2]), Array::I32(vec![3])]);
    assert_eq!(file.metadata().value("test.nested"), Some(&Value::Array(nested)));
}

#[test]
fn keys_are_asked_for_by_type() {
    let file = packings();
    assert_eq!(file.require::<u32>("test.uint8").unwrap(), 200);
    assert_eq!(file.require::<&str>("test.string").unwrap(), "ternär");
    assert_eq!(file.require::<Vec<i32>>("test.ints").unwrap(), [1, -2, 3]);
    assert_eq!(file.require::<&[String]>("test.strings").unwrap()[2], "ü");
    assert_eq!(file.get::<bool>("test.absent").unwrap(), None);
    let message = |error: bitnet_quant::Error| {
        let message = error.to_string();
        message.split_once(": ").expect("the file's name").1.to_owned()
    };
    let error = file.get::<u32>("test.int8").unwrap_err();
    assert_eq!(message(error), "key test.int8: expected an unsigned 32-bit integer, got i8 -100");
    let error = file.require::<&[f32]>("test.strings").unwrap_err();
    assert_eq!(
        message(error),
        "key test.strings: expected an array of f32, got array of string 3 values"
    );
    assert_eq!(
        message(file.require::<u32>("test.absent").unwrap_err()),
        "key test.absent is missing"
    );
}

#[test]
fn golden_models_open_and_hold_the_same_trits() {
    let tq1 = GgufFile::open(golden("gguf-bitnet-silu/model-tq1_0.gguf")).unwrap();
    let tq2 = GgufFile::open(golden("gguf-bitnet-silu/model-tq2_0.gguf")).unwrap();
    let mut compared = 0;
    for info in tq1.tensors() {
        assert_eq!(numbers(&tq1, &info.name), numbers(&tq2, &info.name), "{}", info.name);
        if let Tensor::Ternary(tensor) = tq1.tensor(&info.name).unwrap() {
            assert!(matches!(tensor.scales(), Scales::Tensor(_)), "{}", info.name);
            // Whatever the other file's packing, the bytes are those of its writer.
            let bytes = tq2.bytes(tq2.info(&info.name).unwrap());
            assert!(encode(Packing::Tq2_0, &tensor, "w").unwrap().bytes == bytes[..]);
            let bytes = tq1.bytes(info);
            assert!(encode(Packing::Tq1_0, &tensor, "w").unwrap().bytes == bytes[..]);
            compared += 1;
        }
    }
    assert_eq!(compared, 14);
}

#[test]
fn golden_i2_s_survives_a_round_trip() {
    let file = GgufFile::open(golden("bitnet-tiny/model-i2_s.gguf")).unwrap();
    assert_eq!(file.require::<&str>("general.architecture").unwrap(), "bitnet-b1.58");
    let mut compared = 0;
    for info in file.tensors() {
        if let Tensor::Ternary(tensor) = file.tensor(&info.name).unwrap() {
            assert_eq!(encode(tensor.packing(), &tensor, "w").unwrap().bytes, tensor.bytes());
            compared += 1;
        }
    }
    assert_eq!(compared, 14);
}
