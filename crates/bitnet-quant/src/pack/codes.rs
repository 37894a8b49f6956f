//! What layouts with four 2-bit codes in a byte share: taking one code out of every byte, and
//! finding code 3, which stands for +2 and is invalid in most of them.

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
    fn each_plane_is_a_pair_of_bits() {
        for plane in 0..4 {
            let mut codes = [9; 2];
            unpack_plane(&[0b11_10_01_00, 0b00_01_10_11], plane, &mut codes);
            assert_eq!(codes, [plane as u8, 3 - plane as u8]);
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
