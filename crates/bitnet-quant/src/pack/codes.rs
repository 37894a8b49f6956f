//! Plain 2-bit codes: the form of weights that came from no packing, such as masters quantized at
//! load. Exists in memory only; scales stand beside it.
//!
//! ```text
//! a row of `cols` codes → q = ⌈cols / 4⌉ bytes; byte i holds columns i, i+q, i+2q, i+3q,
//! lowest bits first
//!
//!   bit    7 6      5 4      3 2      1 0
//!        w[i+3q]  w[i+2q]  w[i+q]    w[i]         code 0, 1, 2 = −1, 0, +1; 3 = +2
//! ```
//!
//! The planes are as long as the row allows, so that packing and unpacking are straight loops over
//! bytes for any number of columns. Bits without a column are 0.

/// Bytes of a row of `cols` codes.
pub const fn row_bytes(cols: usize) -> usize {
    cols.div_ceil(4)
}

/// Packs the codes of one row (each `0..=3`) into `bytes`, which has [`row_bytes`] of their number.
pub fn pack_row(codes: &[u8], bytes: &mut [u8]) {
    let quarter = bytes.len();
    bytes.fill(0);
    for (plane, codes) in codes.chunks(quarter.max(1)).enumerate() {
        for (byte, code) in bytes.iter_mut().zip(codes) {
            *byte |= code << (2 * plane);
        }
    }
}

/// The reverse of [`pack_row`].
pub fn unpack_row(bytes: &[u8], codes: &mut [u8]) {
    for (plane, codes) in codes.chunks_mut(bytes.len().max(1)).enumerate() {
        unpack_plane(bytes, plane, codes);
    }
}

/// Writes bits `2·plane` and `2·plane + 1` of each byte.
pub(super) fn unpack_plane(bytes: &[u8], plane: usize, codes: &mut [u8]) {
    // The shift as a constant lets the compiler use its byte shuffles.
    fn shifted<const SHIFT: u32>(bytes: &[u8], codes: &mut [u8]) {
        for (code, byte) in codes.iter_mut().zip(bytes) {
            *code = (byte >> SHIFT) & 3;
        }
    }
    match plane {
        0 => shifted::<0>(bytes, codes),
        1 => shifted::<2>(bytes, codes),
        2 => shifted::<4>(bytes, codes),
        _ => shifted::<6>(bytes, codes),
    }
}

/// Whether any of the four codes in any byte is 3.
pub(super) fn has_code_3(bytes: &[u8]) -> bool {
    // Both bits of a pair set: the pair's high bit falls on its low bit.
    bytes.iter().fold(0, |seen, byte| seen | (byte & (byte >> 1))) & 0x55 != 0
}

/// Position of the first byte with a code 3. Runs on the threads of rayon for long slices.
pub(super) fn first_code_3(bytes: &[u8]) -> Option<usize> {
    const CHUNK: usize = 1 << 16;
    let in_chunk = |(index, chunk): (usize, &[u8])| {
        has_code_3(chunk).then(|| {
            let byte = chunk.iter().position(|&byte| has_code_3(&[byte]));
            index * CHUNK + byte.unwrap_or_default()
        })
    };
    if bytes.len() < super::PARALLEL_BYTES {
        return bytes.chunks(CHUNK).enumerate().find_map(in_chunk);
    }
    use rayon::prelude::*;
    bytes.par_chunks(CHUNK).enumerate().find_map_first(in_chunk)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_bytes() {
        let mut bytes = [0xFF; 2];
        pack_row(&[0, 1, 2, 2, 1, 0, 3], &mut bytes); // planes [0 1] [2 2] [1 0] [3 –]
        assert_eq!(bytes, [0b11_01_10_00, 0b00_00_10_01]);
    }

    #[test]
    fn every_length_around_the_planes_survives() {
        for cols in 0..70 {
            let codes: Vec<u8> = (0..cols).map(|c| (c * 7 % 3) as u8).collect();
            let mut bytes = vec![0xFF; row_bytes(cols)];
            pack_row(&codes, &mut bytes);
            let mut back = vec![9; cols];
            unpack_row(&bytes, &mut back);
            assert_eq!(back, codes);
        }
    }

    #[test]
    fn long_slices_are_searched_whole() {
        let mut bytes = vec![0b10_10_10_10; super::super::PARALLEL_BYTES + 12345];
        assert_eq!(first_code_3(&bytes), None);
        let last = bytes.len() - 1;
        bytes[last] = 0b00_11_00_00;
        assert_eq!(first_code_3(&bytes), Some(last));
        bytes[70_000] = 3;
        assert_eq!(first_code_3(&bytes), Some(70_000));
    }
}
