//! GGUF files made to do harm: each is refused with an error that names what is wrong, in time and
//! memory that follow the bytes that are there, never the numbers they claim.

use bitnet_quant::gguf::{GgufFile, GgufWriter, Metadata, TensorSpec, TensorType, Value};
use proptest::prelude::*;
use std::time::{Duration, Instant};

/// A header under construction, byte by byte.
#[derive(Clone, Default)]
struct Raw(Vec<u8>);

impl Raw {
    fn new(n_tensors: u64, n_keys: u64) -> Self {
        Self(b"GGUF".to_vec()).u32(3).u64(n_tensors).u64(n_keys)
    }
    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }
    fn u32(self, value: u32) -> Self {
        self.bytes(&value.to_le_bytes())
    }
    fn u64(self, value: u64) -> Self {
        self.bytes(&value.to_le_bytes())
    }
    fn string(self, text: &str) -> Self {
        self.u64(text.len() as u64).bytes(text.as_bytes())
    }
    fn key_u32(self, key: &str, value: u32) -> Self {
        self.string(key).u32(4).u32(value)
    }
    fn tensor(self, name: &str, dims: &[u64], tensor_type: u32, offset: u64) -> Self {
        let described =
            dims.iter().fold(self.string(name).u32(dims.len() as u32), |raw, &dim| raw.u64(dim));
        described.u32(tensor_type).u64(offset)
    }
    /// Pads the header to 32 bytes and adds `len` bytes of data.
    fn data(mut self, len: usize) -> Self {
        let header = self.0.len().next_multiple_of(32);
        self.0.resize(header + len, 0);
        self
    }
    fn open(self) -> bitnet_quant::Result<GgufFile> {
        GgufFile::from_bytes(self.0, "bad.gguf")
    }
}

#[test]
fn every_lie_is_named() {
    let none = || Raw::new(0, 0);
    let key = || Raw::new(0, 1);
    let tensor = || Raw::new(1, 0);
    let nested = (0..10_000).fold(key().string("k").u32(9), |raw, _| raw.u32(9).u64(1));
    let cases: Vec<(&str, Raw, &str)> = vec![
        // The first bytes.
        ("empty", Raw::default(), "magic at byte 0: expected 4 bytes, got 0"),
        ("magic", Raw(b"GGML".to_vec()).u32(3).u64(0).u64(0), "magic: expected \"GGUF\""),
        ("text", Raw(b"<!DOCTYPE html>".to_vec()), "magic: expected \"GGUF\""),
        ("version 0", Raw(b"GGUF".to_vec()).u32(0).u64(0).u64(0), "version 0 is not supported"),
        ("version 1", Raw(b"GGUF".to_vec()).u32(1).u64(0).u64(0), "version 1 is not supported"),
        ("version 4", Raw(b"GGUF".to_vec()).u32(4).u64(0).u64(0), "version 4 is not supported"),
        ("big-endian", Raw(b"GGUF".to_vec()).u32(3 << 24), "3 in big-endian order"),
        // Counts.
        ("many tensors", Raw::new(u64::MAX, 0), "number of tensors: expected at most"),
        ("more tensors than bytes", Raw::new(1000, 0), "room for 1000"),
        ("many keys", Raw::new(0, 1 << 63), "number of metadata keys: expected at most"),
        ("2³² − 1 keys", Raw::new(0, 0xFFFF_FFFF), "number of metadata keys: expected at most"),
        ("more keys than bytes", Raw::new(0, 1000), "room for 1000"),
        // Keys.
        ("key length", key().u64(u64::MAX).data(99), "key: expected at most 65535"),
        ("key past the end", key().u64(100).data(9), "room for 100"),
        ("key with one byte less", key().u64(33).bytes(&[b'k'; 32]), "room for 33"),
        ("empty key", key().string("").u32(4).u32(1).data(9), "a printable name, got \"\""),
        ("key with NUL", key().key_u32("a\0b", 1), "a printable name, got \"a\\0b\""),
        ("key with escape", key().key_u32("\x1b[31m", 1), "a printable name"),
        ("key not UTF-8", key().u64(2).bytes(&[0xC3, 0x28]).u32(4).u32(1), "expected UTF-8"),
        ("value type 13", key().string("k").u32(13).data(9), "value type from 0 to 12, got 13"),
        ("value type −1", key().string("k").u32(u32::MAX).data(9), "value type from 0 to 12"),
        ("no value", key().string("key").u32(10).u32(0), "key key at byte 39: expected 8 bytes"),
        ("bool 2", key().string("k").u32(7).bytes(&[2]).data(9), "a bool, 0 or 1, got 2"),
        (
            "duplicate key",
            Raw::new(0, 2).key_u32("k", 1).key_u32("k", 1),
            "key k: expected one value, got a second one",
        ),
        ("string of 2⁶³", key().string("k").u32(8).u64(1 << 63), "room for 9223372036854775808"),
        ("string of 2³² − 1", key().string("k").u32(8).u64(0xFFFF_FFFF), "room for 4294967295"),
        ("string too long by 1", key().string("k").u32(8).u64(10).bytes(&[b'x'; 9]), "room for 10"),
        ("string not UTF-8", key().string("k").u32(8).u64(4).bytes(&[0xFF; 4]), "expected UTF-8"),
        // Arrays.
        ("array of 2⁶¹ u64", key().string("k").u32(9).u32(10).u64(1 << 61), "room for"),
        ("array of 2⁶³ bools", key().string("k").u32(9).u32(7).u64(1 << 63), "room for"),
        ("strings past the end", key().string("k").u32(9).u32(8).u64(1 << 40).data(64), "room for"),
        ("element type 13", key().string("k").u32(9).u32(13).u64(0), "element type from 0 to 12"),
        (
            "bools that are none",
            key().string("k").u32(9).u32(7).u64(1).bytes(&[7]),
            "0 or 1, got 7",
        ),
        ("arrays 10,000 deep", nested, "arrays at most 4 deep"),
        // Alignment.
        ("alignment 0", key().key_u32("general.alignment", 0), "a power of two up to 65536"),
        ("alignment 3", key().key_u32("general.alignment", 3), "got u32 3"),
        ("alignment 2³¹", key().key_u32("general.alignment", 1 << 31), "got u32 2147483648"),
        ("alignment i32", key().string("general.alignment").u32(5).u32(32), "got i32 32"),
        ("alignment string", key().string("general.alignment").u32(8).string("32"), "got string"),
        // Tensor descriptions.
        ("no name", tensor().tensor("", &[4], 0, 0).data(32), "a printable name"),
        ("name of 65", tensor().tensor(&"n".repeat(65), &[4], 0, 0).data(32), "at most 64, got 65"),
        (
            "name of 64 KiB",
            tensor().tensor(&"n".repeat(65536), &[4], 0, 0),
            "at most 64, got 65536",
        ),
        ("no dimension", tensor().tensor("t", &[], 0, 0).data(32), "1 to 4 dimensions, got 0"),
        ("5 dimensions", tensor().tensor("t", &[1; 5], 0, 0).data(32), "1 to 4 dimensions, got 5"),
        (
            "2³² − 1 dimensions",
            tensor().string("t").u32(u32::MAX).data(64),
            "1 to 4 dimensions, got 4294967295",
        ),
        ("dimension 0", tensor().tensor("t", &[0, 256], 0, 0).data(32), "at least 1, got 0"),
        (
            "product wraps",
            tensor().tensor("t", &[(1 << 42) + 1, 1 << 22], 0, 0).data(32),
            "a size in memory",
        ),
        ("bytes wrap", tensor().tensor("t", &[1 << 62], 0, 0).data(32), "a size in memory"),
        (
            "exabytes",
            tensor().tensor("t", &[1 << 50], 0, 0).data(32),
            "before the end of the file, got 32",
        ),
        (
            "dimension 2⁶⁴ − 1",
            tensor().tensor("t", &[u64::MAX], 24, 0).data(32),
            "before the end of",
        ),
        ("columns of TQ2_0", tensor().tensor("t", &[100], 35, 0).data(64), "divisible by 256"),
        ("columns of Q2_0", tensor().tensor("t", &[100], 42, 0).data(64), "divisible by 64"),
        ("odd I2_S", tensor().tensor("t", &[3, 3], 36, 0).data(64), "a multiple of 4 weights"),
        ("removed type", tensor().tensor("t", &[32], 31, 0).data(64), "type of tensor t: expected"),
        ("type 999", tensor().tensor("t", &[32], 999, 0).data(64), "got 999"),
        ("type −1", tensor().tensor("t", &[32], u32::MAX, 0).data(64), "got 4294967295"),
        ("TL1", tensor().tensor("t", &[32], 38, 0).data(64), "38 (TL1 of bitnet.cpp"),
        (
            "TL2",
            Raw::new(1, 1)
                .string("general.architecture")
                .u32(8)
                .string("bitnet-b1.58")
                .tensor("t", &[32], 39, 0)
                .data(64),
            "39 (TL2 of bitnet.cpp",
        ),
        (
            "duplicate tensor",
            Raw::new(2, 0).tensor("t", &[8], 0, 0).tensor("t", &[8], 0, 32).data(64),
            "tensor t: expected one description, got a second one",
        ),
        // Tensor data.
        ("misaligned", tensor().tensor("t", &[8], 0, 4).data(64), "divisible by 32, got 4"),
        ("offset past the end", tensor().tensor("t", &[8], 0, 96).data(64), "inside the file"),
        ("offset wraps", tensor().tensor("t", &[8], 0, u64::MAX - 31).data(64), "inside the file"),
        (
            "offset at the end",
            tensor().tensor("t", &[8], 0, 64).data(64),
            "before the end of the file, got 0",
        ),
        ("no data", tensor().tensor("t", &[8], 0, 0), "inside the file"),
        (
            "one byte short",
            tensor().tensor("t", &[8], 0, 0).data(31),
            "expected 32 bytes before the end",
        ),
        (
            "overlap",
            Raw::new(2, 0).tensor("a", &[16], 0, 0).tensor("b", &[8], 0, 32).data(64),
            "tensor a, shape [16] in F32: expected 64 bytes before tensor b, got 32",
        ),
        (
            "the same place twice",
            Raw::new(2, 0).tensor("a", &[8], 0, 0).tensor("b", &[8], 0, 0).data(64),
            "expected 32 bytes before tensor b, got 0",
        ),
        (
            "Q2_0 with room for neither block",
            Raw::new(2, 0).tensor("a", &[1024], 42, 0).tensor("b", &[8], 0, 320).data(352),
            "as much room as blocks of 64 or of 128",
        ),
        (
            "alignment against offsets",
            Raw::new(1, 1).key_u32("general.alignment", 64).tensor("t", &[8], 0, 32).data(128),
            "divisible by 64, got 32",
        ),
    ];
    for (case, raw, message) in cases {
        match raw.open() {
            Ok(_) => panic!("{case}: opened"),
            Err(error) => {
                let text = error.to_string();
                assert!(text.starts_with("bad.gguf: "), "{case}: {text}");
                assert!(text.contains(message), "{case}: {text}");
                assert!(text.len() < 400, "{case}: {text}");
                assert!(!text.contains(char::is_control), "{case}: {text}");
            }
        }
    }
    assert!(none().open().is_ok());
}

#[test]
fn unusual_but_sound_files_open() {
    // Descending offsets, a gap, bytes after the last tensor.
    let raw = Raw::new(2, 0).tensor("a", &[8], 0, 96).tensor("b", &[8], 0, 0).data(200);
    let file = raw.open().unwrap();
    assert_eq!(file.bytes(file.info("b").unwrap()).len(), 32);
    // Version 2 has the same layout.
    let mut raw = Raw::new(1, 0).tensor("a", &[8], 0, 0).data(32);
    raw.0[4] = 2;
    assert_eq!(raw.open().unwrap().version(), 2);
    // Types that cannot be decoded are there to be listed.
    let file = Raw::new(1, 0).tensor("a", &[256], 10, 0).data(84).open().unwrap();
    assert_eq!(file.tensors()[0].tensor_type.to_string(), "Q2_K");
    let message = file.tensor("a").unwrap_err().to_string();
    assert!(message.contains("type of tensor a Q2_K is not supported"), "{message}");
}

#[test]
fn the_block_of_q2_0_follows_from_the_room() {
    use bitnet_quant::pack::Packing;
    let packing = |raw: Raw| raw.open().unwrap().tensors()[0].packing.unwrap();
    let two = |room| {
        let raw = Raw::new(2, 0).tensor("a", &[256, 8], 42, 0).tensor("b", &[8], 0, room);
        packing(raw.data(room as usize + 32))
    };
    assert_eq!(two(576), Packing::Q2_0); // 32 blocks of 18 bytes
    assert_eq!(two(544), Packing::Q2_0G128); // 16 blocks of 34 bytes
    let last = |len| Raw::new(1, 0).tensor("a", &[256, 4], 42, 0).data(len);
    assert_eq!(packing(last(288)), Packing::Q2_0);
    assert_eq!(packing(last(272)), Packing::Q2_0G128);
}

#[test]
fn time_follows_the_size_of_the_header() {
    // 60,000 keys and 200,000 tensors: minutes if names were compared in pairs.
    let (n_keys, n_tensors) = (60_000, 200_000);
    let mut raw = Raw::new(n_tensors, n_keys);
    for index in 0..n_keys {
        raw = raw.string(&format!("k{index}")).u32(0).bytes(&[0]);
    }
    for index in 0..n_tensors {
        raw = raw.tensor(&format!("t{index}"), &[8], 0, index * 32);
    }
    let raw = raw.data(n_tensors as usize * 32);
    let start = Instant::now();
    let file = raw.open().unwrap();
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    assert_eq!(file.tensors().len(), n_tensors as usize);
    assert_eq!(file.info("t199999").unwrap().shape, [8]);
}

/// A file with every kind of field, small enough to damage in every place.
fn small_file() -> Vec<u8> {
    let mut metadata = Metadata::new();
    metadata.set("general.architecture", Value::String("bitnet".to_owned()));
    metadata.set("general.alignment", Value::U32(32));
    metadata.set(
        "list",
        Value::Array(bitnet_quant::gguf::Array::String(vec!["ab".into(), "c".into()])),
    );
    metadata.set("flag", Value::Bool(true));
    let spec = |name: &str, shape: &[usize], id| TensorSpec {
        name: name.to_owned(),
        shape: shape.to_vec(),
        tensor_type: TensorType(id),
    };
    let tensors = [
        spec("a.weight", &[2, 128], 36),
        spec("b.weight", &[256], 35),
        spec("c.weight", &[2, 64], 42),
        spec("norm.weight", &[3], 0),
    ];
    let mut writer = GgufWriter::new(Vec::new(), "small", &metadata, &tensors).unwrap();
    for spec in &tensors {
        writer.write_tensor(&spec.name, &vec![0; spec.n_bytes().unwrap()]).unwrap();
    }
    writer.finish().unwrap()
}

/// Reads everything that can be read of a file; what it says is not looked at.
fn read_all(bytes: &[u8]) {
    let Ok(file) = GgufFile::from_bytes(bytes.to_vec(), "bad.gguf") else {
        return;
    };
    for (_, value) in file.metadata().entries() {
        assert!(value.to_string().len() < 1000);
    }
    for info in file.tensors() {
        assert!(info.range.end <= bytes.len());
        let _ = file.tensor(&info.name);
    }
}

#[test]
fn a_file_cut_anywhere_is_an_error_or_whole() {
    let bytes = small_file();
    // The last tensor's 12 bytes are followed by 20 of padding.
    let needed = bytes.len() - 20;
    for len in 0..bytes.len() {
        let opened = GgufFile::from_bytes(bytes[..len].to_vec(), "cut.gguf");
        assert_eq!(opened.is_ok(), len >= needed, "{len} of {}", bytes.len());
    }
}

#[test]
fn every_byte_may_be_wrong() {
    let bytes = small_file();
    for position in 0..bytes.len() {
        for value in [0, 1, 0x7F, 0x80, 0xFF] {
            let mut bytes = bytes.clone();
            bytes[position] = value;
            read_all(&bytes);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn bits_may_flip(flips in proptest::collection::vec((any::<proptest::sample::Index>(), 0..8u32), 1..12)) {
        let mut bytes = small_file();
        for (position, bit) in flips {
            let position = position.index(bytes.len());
            bytes[position] ^= 1 << bit;
        }
        read_all(&bytes);
    }

    #[test]
    fn any_bytes_may_follow_the_magic(rest in proptest::collection::vec(any::<u8>(), 0..300)) {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend(rest);
        read_all(&bytes);
    }
}
