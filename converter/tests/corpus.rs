//! Every file of the fuzz corpus, through the bodies of the fuzz targets, and through qemu-img.
//!
//! `make fuzz` runs this over what it found, too: `DVCR_FUZZ_CORPUS` names a folder like `fuzz/corpus`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

#[path = "../../fuzz/bodies.rs"]
mod bodies;
#[path = "corpus/oracle.rs"]
mod oracle;

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use bodies::{TARGETS, Target, sparse};

/// The corpora to go through: the committed one, and the one asked for.
fn corpora() -> Vec<PathBuf> {
    let committed = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus");
    std::iter::once(committed).chain(std::env::var_os("DVCR_FUZZ_CORPUS").map(PathBuf::from)).collect()
}

/// The inputs of a target, in order of their names.
fn inputs(target: &Target) -> Vec<PathBuf> {
    let mut inputs = Vec::new();
    for corpus in corpora() {
        let Ok(entries) = std::fs::read_dir(corpus.join(target.name)) else { continue };
        inputs.extend(entries.map(|entry| entry.unwrap().path()));
    }
    inputs.sort();
    inputs
}

#[test]
fn every_input_of_the_corpus_passes() {
    for target in TARGETS {
        let inputs = inputs(target);
        assert!(!inputs.is_empty(), "the corpus of {} is empty", target.name);
        for input in inputs {
            let bytes = std::fs::read(&input).unwrap();
            let passes = std::panic::catch_unwind(|| (target.body)(&bytes)).is_ok();
            assert!(passes, "{} fails", input.display());
        }
    }
}

#[test]
fn every_folder_of_the_corpus_has_a_target() {
    for entry in std::fs::read_dir(&corpora()[0]).unwrap() {
        let name = entry.unwrap().file_name();
        assert!(TARGETS.iter().any(|target| target.name == name), "{name:?}");
    }
}

#[test]
fn an_input_survives_being_squeezed() {
    let mut file = vec![0; 3 << 20];
    for at in [0, 511, 70_000, 1 << 20, (1 << 20) + 600] {
        file[at] = 1;
    }
    file[2 << 20..(2 << 20) + 100_000].fill(9);
    for len in [0, 1, 512, 1000, file.len() - 1, file.len()] {
        assert!(sparse::expand(&sparse::squeeze(&file[..len])) == file[..len]);
    }
}

#[test]
fn qemu_reads_the_same_of_every_input_or_refuses_it_too() {
    let mut work = Vec::new();
    for target in TARGETS.iter().filter(|target| oracle::knows(target.name)) {
        work.extend(inputs(target).into_iter().map(|input| (target.name, input)));
    }
    let total = work.len();
    let (work, failures) = (Mutex::new(work), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let Some((format, input)) = work.lock().unwrap().pop() else { break };
                    let bytes = sparse::expand(&std::fs::read(&input).unwrap());
                    if let Err(why) = oracle::compare(format, bytes) {
                        failures.lock().unwrap().push(format!("{}: {why}", input.display()));
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().unwrap();
    assert!(failures.is_empty(), "{} of {total} inputs:\n{}", failures.len(), failures.join("\n"));
}
