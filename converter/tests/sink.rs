//! Sinks hold what was appended and rewritten, whatever the sizes and the order.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

mod common;

use common::temp_dir;
use dvcr_converter::ErrorKind;
use dvcr_converter::io::{Finished, Sink};
use dvcr_converter::sink::{ImageTarget, StreamTarget};
use proptest::prelude::*;

/// One call of a [`Sink`].
#[derive(Clone, Debug)]
enum Step {
    Append(usize),
    Zeros(u64),
    /// At this part, in thousandths, of what is there.
    Rewrite(u64, usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    // Around the sizes of a page, of the shortest hole and of a buffer.
    let len = prop_oneof![1usize..9000, 250_000usize..270_000, 2_000_000usize..5_000_000];
    let step = prop_oneof![
        4 => len.clone().prop_map(Step::Append),
        2 => len.clone().prop_map(|len| Step::Zeros(len as u64)),
        3 => (0u64..1000, len).prop_map(|(at, len)| Step::Rewrite(at, len)),
    ];
    prop::collection::vec(step, 1..24)
}

/// Runs `steps` on the sink and on a plain vector, and returns the vector.
fn play(steps: &[Step], sink: &mut dyn Sink) -> Vec<u8> {
    let mut model: Vec<u8> = Vec::new();
    for (seed, step) in steps.iter().enumerate() {
        match *step {
            Step::Append(len) => {
                let bytes = common::noise(len, seed as u64);
                sink.append(&bytes).unwrap();
                model.extend(bytes);
            }
            Step::Zeros(len) => {
                sink.append_zeros(len).unwrap();
                model.resize(model.len() + len as usize, 0);
            }
            Step::Rewrite(at, len) => {
                let at = model.len() * at as usize / 1000;
                let bytes = common::noise(len.min(model.len() - at), 1000 + seed as u64);
                sink.rewrite(&bytes, at as u64).unwrap();
                model[at..at + bytes.len()].copy_from_slice(&bytes);
            }
        }
    }
    model
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn a_file_holds_what_was_appended_and_rewritten(steps in steps()) {
        let dir = temp_dir();
        let path = dir.path().join("image");
        let mut target = ImageTarget::create(&path).unwrap();
        let model = play(&steps, &mut target);
        target.finish(&Finished { file_bytes: model.len() as u64, virtual_size: 0 }).unwrap();
        prop_assert!(std::fs::read(&path).unwrap() == model);
    }
}

#[test]
fn a_stream_keeps_its_head_back_and_cannot_change_what_is_gone() {
    let mut out = Vec::new();
    let mut target = StreamTarget::new(&mut out, 1000);
    target.append_zeros(1500).unwrap();
    target.append(&[7; 100]).unwrap();
    target.rewrite(&[9; 600], 400).unwrap();
    assert_eq!(target.rewrite(&[9; 601], 400).unwrap_err().kind(), ErrorKind::Target);
    assert_eq!(target.rewrite(&[9], u64::MAX).unwrap_err().kind(), ErrorKind::Target);
    let head = target.finish().unwrap();
    assert!(head == [[0; 400].as_slice(), &[9; 600]].concat());
    assert!(out == [[0; 500].as_slice(), &[7; 100]].concat());
}

#[test]
fn a_target_that_cannot_be_written_fails_and_leaves_nothing() {
    let dir = temp_dir();
    let path = dir.path().join("image");
    let mut target = ImageTarget::create(&path).unwrap();
    // No file system has files of this size: the write behind the hole fails.
    target.append_zeros(1 << 62).unwrap();
    let bytes = vec![1; 32 << 20];
    let appended = target.append(&bytes);
    let finished = target.finish(&Finished { file_bytes: (1 << 62) + bytes.len() as u64, virtual_size: 0 });
    assert_eq!(appended.and(finished).unwrap_err().kind(), ErrorKind::Io);
    assert!(std::fs::read_dir(dir.path()).unwrap().next().is_none());
}
