#![no_main]

#[path = "../bodies.rs"]
mod bodies;
#[path = "../mutate.rs"]
mod mutate;

const WORDS: mutate::Words = mutate::Words {
    bytes: 8,
    big_endian: true,
    entry: |place| place,
    unit: 512,
    flags: &[1 << 62, 1 << 63, 1, 1 << 62 | 1 << 61],
};

libfuzzer_sys::fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    mutate::mutate(&WORDS, data, size, max_size, seed)
});

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| bodies::qcow2(bytes));
