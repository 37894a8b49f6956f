//! TQ1_0 (GGUF type 34): five trits in a byte, a scale for every 256 columns. 1.6875 bits a weight.
//!
//! ```text
//! 256 weights → 54 bytes:  qs[48] | qh[4] | f16 scale          weight = scale · (code − 1)
//!
//!   qs[0..32]    byte m holds columns m, m+32, m+64, m+96, m+128          columns   0..160
//!   qs[32..48]   byte m holds columns m, m+16, m+32, m+48, m+64  (+160)   columns 160..240
//!   qh[0..4]     byte m holds columns m, m+4, m+8, m+12          (+240)   columns 240..256
//! ```
//!
//! A byte is a fraction in base 3: with `q` the number of its digits, first column most
//! significant (four digits are followed by a 0), the byte is `⌈q · 256 / 243⌉`. Multiplied by 3 as
//! a fraction of 256, its integer part is the first digit and its fraction the rest.

use super::block::Block;

/// The codec of one block.
pub(super) struct Tq1_0;

/// Columns of a block.
pub const COLS: usize = 256;
/// Bytes of a block.
pub const BYTES: usize = 54;

const _: () = assert!(48 * 5 + 4 * 4 == COLS && 48 + 4 + 2 == BYTES);

impl Block<COLS, BYTES> for Tq1_0 {
    const SCALE_AT: usize = 52;

    fn decode(block: &[u8; BYTES], codes: &mut [u8; COLS]) {
        let (bytes, _) = block.split_at(52);
        let (first, rest) = bytes.split_at(32);
        let (second, third) = rest.split_at(16);
        unpack_run::<32>(first, &mut codes[..160]);
        unpack_run::<16>(second, &mut codes[160..240]);
        unpack_run::<4>(third, &mut codes[240..]);
    }

    fn encode(codes: &[u8; COLS], block: &mut [u8; BYTES]) {
        pack_run(&codes[..160], &mut block[..32]);
        pack_run(&codes[160..240], &mut block[32..48]);
        pack_run(&codes[240..], &mut block[48..52]);
    }
}

/// Unpacks a run of `N` bytes: first the first digit of all, then the second, …
pub(super) fn unpack_run<const N: usize>(bytes: &[u8], codes: &mut [u8]) {
    let Some(mut fraction) = bytes.first_chunk::<N>().copied() else { return };
    for digit in codes.as_chunks_mut::<N>().0 {
        for (code, fraction) in digit.iter_mut().zip(&mut fraction) {
            // 3 · fraction / 256, by comparing: 86 and 171 are the first to reach 1 and 2.
            *code = u8::from(*fraction >= 86) + u8::from(*fraction >= 171);
            *fraction = fraction.wrapping_mul(3);
        }
    }
}

/// The reverse of [`unpack_run`]; codes are `0..=2`.
pub(super) fn pack_run(codes: &[u8], bytes: &mut [u8]) {
    let n = bytes.len();
    for (m, byte) in bytes.iter_mut().enumerate() {
        let digit = |place: usize| u16::from(codes.get(place * n + m).copied().unwrap_or(0));
        let q = (0..5).fold(0, |q, place| 3 * q + digit(place));
        *byte = ((q * 256).div_ceil(243)) as u8; // at most ⌈242 · 256 / 243⌉ = 255
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_bytes() {
        let mut codes = [1; COLS];
        codes[..160].chunks_mut(32).zip([2, 0, 1, 2, 1]).for_each(|(plane, code)| plane[0] = code);
        codes[240..].chunks_mut(4).zip([0, 2, 2, 1]).for_each(|(plane, code)| plane[3] = code);
        let mut block = [0; BYTES];
        Tq1_0::encode(&codes, &mut block);
        assert_eq!(block[0], 188); // 20121 in base 3 is 178; ⌈178 · 256 / 243⌉
        assert_eq!(block[1], 128); // 11111 is 121
        assert_eq!(block[51], 80); // 02210 is 75
        assert_eq!(block[48], 127); // 11110 is 120
    }

    #[test]
    fn every_number_of_five_digits_survives() {
        for q in 0..243u16 {
            let codes: [u8; 5] = std::array::from_fn(|i| (q / 3u16.pow(4 - i as u32) % 3) as u8);
            let mut byte = [0];
            pack_run(&codes, &mut byte);
            let mut back = [9; 5];
            unpack_run::<1>(&byte, &mut back);
            assert_eq!(back, codes);
        }
    }
}
