//! Every file of the fuzz corpus, through the bodies of the fuzz targets.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

#[path = "../../fuzz/bodies.rs"]
mod bodies;

fn each_file(target: &str, body: fn(&[u8])) {
    let corpus = format!("{}/../fuzz/corpus/{target}", env!("CARGO_MANIFEST_DIR"));
    let mut files = 0;
    for entry in std::fs::read_dir(&corpus).unwrap() {
        let path = entry.unwrap().path();
        eprintln!("{}", path.display());
        body(&std::fs::read(&path).unwrap());
        files += 1;
    }
    assert!(files > 0, "{corpus} is empty");
}

#[test]
fn the_qcow2_corpus_passes() {
    each_file("qcow2_open_read", bodies::qcow2_open_read);
}

#[test]
fn the_probe_corpus_passes() {
    each_file("probe", bodies::probe);
}

#[test]
fn the_wrapper_corpus_passes() {
    each_file("wrapper", bodies::wrapper);
}
