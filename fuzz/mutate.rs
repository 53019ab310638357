//! A mutator that knows what tables look like: now and then a word becomes one that points into the file.
//!
//! Blind changes hit the bounds checks of a table entry; to get past them an entry has to be a multiple of the unit, below
//! the end of the file, and often one that another entry has too.

/// How a format's tables hold places in the file.
pub struct Words {
    /// Bytes of an entry, 4 or 8.
    pub bytes: usize,
    /// Whether the most significant byte comes first.
    pub big_endian: bool,
    /// What an entry is for each place.
    pub entry: fn(place: u64) -> u64,
    /// Bytes between places.
    pub unit: u64,
    /// Flags and markers that entries have.
    pub flags: &'static [u64],
}

/// Changes the input: every fourth time by planting an entry, else as libFuzzer likes.
pub fn mutate(words: &Words, data: &mut [u8], size: usize, max_size: usize, seed: u32) -> usize {
    if !seed.is_multiple_of(4) || size < 64 {
        return libfuzzer_sys::fuzzer_mutate(data, size, max_size);
    }
    let mut random = Random(u64::from(seed) << 1 | 1);
    for _ in 0..1 + random.below(3) {
        let at = random.below((size / words.bytes) as u64) as usize * words.bytes;
        let Some(slot) = data[..size].get_mut(at..at + words.bytes) else { continue };
        let place = random.below(64) * words.unit;
        let flag = match random.below(3) {
            0 => {
                words.flags.get(random.below(words.flags.len().max(1) as u64) as usize).copied().unwrap_or(0)
            }
            _ => 0,
        };
        let entry = (words.entry)(place) | flag;
        let (be, le) = (entry.to_be_bytes(), entry.to_le_bytes());
        slot.copy_from_slice(match words.big_endian {
            true => &be[8 - words.bytes..],
            false => &le[..words.bytes],
        });
    }
    size
}

/// xorshift64*
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) % bound.max(1)
    }
}
