#![no_main]

#[path = "../bodies.rs"]
mod bodies;
#[path = "../mutate.rs"]
mod mutate;

const WORDS: mutate::Words = mutate::Words {
    bytes: 4,
    big_endian: true,
    entry: |place| place / 512,
    unit: 512,
    flags: &[u32::MAX as u64],
};

libfuzzer_sys::fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    mutate::mutate(&WORDS, data, size, max_size, seed)
});

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| bodies::vpc(bytes));
