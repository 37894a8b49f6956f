//! What the GGUF writer writes, the reader reads; and, where Python is at hand, the `gguf` package.

use bitnet_core::weights::FloatType;
use bitnet_quant::gguf::{Array, GgufFile, GgufWriter, Metadata, TensorSpec, TensorType, Value};
use bitnet_quant::pack::{FloatFormat, I2sLayout, Packing};
use proptest::prelude::*;

fn spec(name: &str, shape: &[usize], tensor_type: TensorType) -> TensorSpec {
    TensorSpec { name: name.to_owned(), shape: shape.to_vec(), tensor_type }
}

/// Bytes that differ from tensor to tensor.
fn data(spec: &TensorSpec) -> Vec<u8> {
    let seed = spec.name.bytes().map(usize::from).sum::<usize>();
    (0..spec.n_bytes().unwrap()).map(|i| (i * 7 + seed) as u8).collect()
}

fn write(metadata: &Metadata, tensors: &[TensorSpec]) -> Vec<u8> {
    let mut writer = GgufWriter::new(Vec::new(), "out.gguf", metadata, tensors).unwrap();
    for spec in tensors {
        writer.write_tensor(&spec.name, &data(spec)).unwrap();
    }
    writer.finish().unwrap()
}

fn check(metadata: &Metadata, tensors: &[TensorSpec]) {
    let file = GgufFile::from_bytes(write(metadata, tensors), "out.gguf").unwrap();
    assert_eq!(file.version(), 3);
    assert_eq!(file.metadata(), metadata);
    assert_eq!(file.tensors().len(), tensors.len());
    for (info, spec) in file.tensors().iter().zip(tensors) {
        assert_eq!(info.name, spec.name);
        assert_eq!(info.shape, spec.shape);
        assert_eq!(info.tensor_type, spec.tensor_type);
        assert_eq!(info.range.start % file.alignment(), 0);
        assert_eq!(file.bytes(info)[..], data(spec));
    }
}

fn numbers() -> Metadata {
    let mut metadata = Metadata::new();
    for (key, value) in [
        ("a.u8", Value::U8(1)),
        ("a.i8", Value::I8(-1)),
        ("a.u16", Value::U16(2)),
        ("a.i16", Value::I16(-2)),
        ("a.u32", Value::U32(3)),
        ("a.i32", Value::I32(-3)),
        ("a.f32", Value::F32(0.5)),
        ("a.bool", Value::Bool(true)),
        ("a.string", Value::String("naïve\n".to_owned())),
        ("a.u64", Value::U64(u64::MAX)),
        ("a.i64", Value::I64(i64::MIN)),
        ("a.f64", Value::F64(0.1)),
        ("b.u8", Value::Array(Array::U8(vec![1, 2]))),
        ("b.i8", Value::Array(Array::I8(vec![-1]))),
        ("b.u16", Value::Array(Array::U16(vec![1, 2]))),
        ("b.i16", Value::Array(Array::I16(vec![-1]))),
        ("b.u32", Value::Array(Array::U32(vec![]))),
        ("b.i32", Value::Array(Array::I32(vec![-1, 7]))),
        ("b.f32", Value::Array(Array::F32(vec![0.25]))),
        ("b.bool", Value::Array(Array::Bool(vec![true, false]))),
        ("b.string", Value::Array(Array::String(vec!["x".into(), "".into()]))),
        ("b.u64", Value::Array(Array::U64(vec![9]))),
        ("b.i64", Value::Array(Array::I64(vec![-9]))),
        ("b.f64", Value::Array(Array::F64(vec![1e300]))),
        ("b.array", Value::Array(Array::Array(vec![Array::U8(vec![5]), Array::F32(vec![])]))),
    ] {
        assert_eq!(metadata.set(key, value), None);
    }
    metadata
}

#[test]
fn every_value_and_tensor_type_comes_back() {
    let float = |format| TensorType::of_float(format);
    let packed = |packing| TensorType::of_packing(packing).unwrap();
    let mut tensors =
        vec![spec("norm", &[7], TensorType::F32), spec("cube", &[2, 3, 256], TensorType::F16)];
    for (index, tensor_type) in [
        float(FloatFormat::Plain(FloatType::BF16)),
        float(FloatFormat::Q8_0),
        float(FloatFormat::Q4_0),
        float(FloatFormat::Q4_1),
        float(FloatFormat::Q5_0),
        float(FloatFormat::Q5_1),
        float(FloatFormat::Q4K),
        float(FloatFormat::Q5K),
        float(FloatFormat::Q6K),
        packed(Packing::I2S(I2sLayout::Canonical128)),
        packed(Packing::Tq1_0),
        packed(Packing::Tq2_0),
        packed(Packing::Q2_0),
        packed(Packing::Q2_0G128),
        packed(Packing::Q1_0),
        packed(Packing::Ptq1_0),
        packed(Packing::Tiles),
    ]
    .into_iter()
    .enumerate()
    {
        tensors.push(spec(&format!("blk.{index}.weight"), &[3, 256], tensor_type));
    }
    check(&numbers(), &tensors);
    check(&Metadata::new(), &[]);
    for alignment in [1, 8, 64, 65536] {
        let mut metadata = Metadata::new();
        metadata.set("general.alignment", Value::U32(alignment));
        check(&metadata, &tensors[..4]);
    }
}

proptest! {
    #[test]
    fn any_names_and_shapes_come_back(
        keys in proptest::collection::vec(("[a-zäß.]{1,20}", any::<u32>()), 0..6),
        shapes in proptest::collection::vec(proptest::collection::vec(1..6usize, 1..5), 0..8),
    ) {
        let mut metadata = Metadata::new();
        for (key, value) in keys {
            metadata.set(key, Value::U32(value));
        }
        let tensors: Vec<_> = shapes
            .iter()
            .enumerate()
            .map(|(index, shape)| spec(&format!("t{index}"), shape, TensorType::F16))
            .collect();
        check(&metadata, &tensors);
    }
}

#[test]
fn progress_counts_every_byte() {
    let large = spec("large", &[3 << 19], TensorType::F32); // six chunks
    let small = spec("small", &[3], TensorType::F32);
    let mut seen = Vec::new();
    let tensors = [large.clone(), small.clone()];
    let mut writer = GgufWriter::new(Vec::new(), "out.gguf", &Metadata::new(), &tensors)
        .unwrap()
        .on_progress(|done, total| seen.push((done, total)));
    writer.write_tensor("large", &data(&large)).unwrap();
    writer.write_tensor("small", &data(&small)).unwrap();
    writer.finish().unwrap();
    let total = (6 << 20) + 12;
    assert_eq!(seen.len(), 7);
    assert_eq!(seen[0], (1 << 20, total));
    assert_eq!(seen[6], (total, total));
}

#[test]
fn mistakes_of_the_caller_are_errors() {
    let one = [spec("a", &[4], TensorType::F32), spec("b", &[4], TensorType::F32)];
    let writer = || GgufWriter::new(Vec::new(), "out.gguf", &Metadata::new(), &one).unwrap();
    let message = |error: bitnet_quant::Error| error.to_string();
    assert_eq!(
        message(writer().write_tensor("b", &[0; 16]).unwrap_err()),
        "out.gguf: next tensor: expected a, got b"
    );
    assert_eq!(
        message(writer().write_tensor("a", &[0; 15]).unwrap_err()),
        "out.gguf: tensor a: expected 16 bytes, got 15"
    );
    let mut begun = writer();
    begun.write_tensor("a", &[0; 16]).unwrap();
    assert_eq!(message(begun.finish().unwrap_err()), "out.gguf: tensor b is missing");

    let refused = |metadata: &Metadata, tensors: &[TensorSpec]| {
        message(GgufWriter::new(Vec::new(), "out.gguf", metadata, tensors).unwrap_err())
    };
    let none = Metadata::new();
    let twice = [one[0].clone(), one[0].clone()];
    assert!(refused(&none, &twice).contains("a second one"));
    assert!(refused(&none, &[spec("", &[1], TensorType::F32)]).contains("a printable name"));
    assert!(refused(&none, &[spec(&"n".repeat(65), &[1], TensorType::F32)]).contains("at most 64"));
    assert!(refused(&none, &[spec("a", &[], TensorType::F32)]).contains("1 to 4 dimensions"));
    assert!(refused(&none, &[spec("a", &[2, 0], TensorType::F32)]).contains("none of them 0"));
    assert!(refused(&none, &[spec("a", &[1], TensorType(999))]).contains("got 999"));
    assert!(refused(&none, &[spec("a", &[100], TensorType(35))]).contains("divisible by 256"));
    let mut metadata = Metadata::new();
    metadata.set("general.alignment", Value::U32(24));
    assert!(refused(&metadata, &[]).contains("a power of two"));
    let deep = (0..5).fold(Array::U8(vec![]), |inner, _| Array::Array(vec![inner]));
    let mut metadata = Metadata::new();
    metadata.set("deep", Value::Array(deep));
    assert!(refused(&metadata, &[]).contains("at most 4 deep"));
}

/// Needs a Python with the `gguf` package, named by `BITNET_TEST_PYTHON`.
#[test]
#[ignore = "needs Python with the gguf package"]
fn the_python_package_reads_what_we_write() {
    let python = std::env::var("BITNET_TEST_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/check_gguf.py");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out.gguf");
    let tensors = [
        spec("f32", &[2, 3], TensorType::F32),
        spec("tq1", &[2, 256], TensorType::of_packing(Packing::Tq1_0).unwrap()),
        spec("q6k", &[1, 2, 256], TensorType::of_float(FloatFormat::Q6K)),
    ];
    // The package cannot read an array of arrays of different types.
    let mut metadata = numbers();
    metadata.set("b.array", Value::Array(Array::Array(vec![Array::U8(vec![5])])));
    std::fs::write(&path, write(&metadata, &tensors)).unwrap();
    let output = std::process::Command::new(python).arg(script).arg(&path).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let mut expected: Vec<String> = metadata.entries().iter().map(|(key, _)| key.clone()).collect();
    for spec in &tensors {
        let sum: u64 = data(spec).iter().map(|&byte| u64::from(byte)).sum();
        expected.push(format!("{} {:?} {sum}", spec.name, spec.shape));
    }
    assert_eq!(text.lines().collect::<Vec<_>>(), expected);
}
