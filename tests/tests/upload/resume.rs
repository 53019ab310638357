//! Uploads that break, and go on.

use anyhow::Result;
use dvcr_tests::{Daemon, fixture::Noise, run, utf8};
use std::time::Duration;

use crate::relay::Relay;
use crate::support::{Bench, ByHand, END_TIMEOUT, curl, upload};

/// Most bytes of a part that dvcr sends, with what goes around it.
const PART_BYTES_MAX: u64 = (17 << 20) + (64 << 10);

#[test]
fn a_plain_put_that_broke_goes_on_by_content_range() -> Result<()> {
    let bench = Bench::new(3 << 20)?;
    let mut uploader = bench.uploader(&[])?;
    let (bytes, size) = (bench.bytes(), bench.size);
    let mut first =
        ByHand::begin(uploader.address, &["PUT /upload HTTP/1.1", &format!("Content-Length: {size}")])?;
    first.send(&bytes[..1 << 20])?;
    uploader.wait_status("a MiB", |status| status["received"] == 1 << 20)?;
    drop(first);
    let url = uploader.url();
    let ask = |total: u64| {
        curl(&[
            "-X",
            "PUT",
            "-H",
            &format!("Content-Range: bytes */{total}"),
            "-H",
            "Content-Length: 0",
            &url,
        ])
    };
    // The server may not have noticed yet that the client is gone.
    dvcr_tests::wait_until(Duration::from_secs(60), "a free seat", || {
        ask(size).is_ok_and(|a| a.status == 308)
    })?;
    assert_eq!(ask(size)?.header("range"), Some("bytes=0-1048575"));
    assert_eq!(ask(size + 1)?.status, 503);
    let part = |range: std::ops::Range<usize>| {
        let file = bench.dir.path().join("part");
        std::fs::write(&file, &bytes[range.clone()])?;
        let range = format!("Content-Range: bytes {}-{}/{size}", range.start, range.end - 1);
        curl(&["-T", utf8(&file), "-H", &range, &url])
    };
    let early = part(2 << 20..(2 << 20) + 10)?;
    assert_eq!((early.status, early.header("range")), (416, Some("bytes=0-1048575")), "{early:?}");
    let next = part(1 << 20..2 << 20)?;
    assert_eq!((next.status, next.header("range")), (308, Some("bytes=0-2097151")), "{next:?}");
    let last = part(2 << 20..bytes.len())?;
    assert_eq!(last.status, 200, "{last:?}");
    assert!(last.json()["digest"].is_string());
    assert_eq!(uploader.ended()?, Some(0));
    bench.assert_stored()
}

#[test]
fn a_plain_put_after_a_broken_one_starts_over() -> Result<()> {
    let bench = Bench::new(3 << 20)?;
    let mut uploader = bench.uploader(&[])?;
    let mut first = ByHand::begin(uploader.address, &["PUT /upload HTTP/1.1", "Content-Length: 9999999"])?;
    first.send(&Noise::new(3).bytes(1 << 20))?;
    uploader.wait_status("a MiB", |status| status["received"] == 1 << 20)?;
    drop(first);
    let url = uploader.url();
    let mut status = 503;
    // The server may not have noticed yet that the client is gone.
    dvcr_tests::wait_until(Duration::from_secs(60), "a place", || {
        status = curl(&["-T", utf8(&bench.image), &url]).map_or(0, |answer| answer.status);
        status != 503
    })?;
    assert_eq!(status, 200);
    assert_eq!(uploader.ended()?, Some(0));
    bench.assert_stored()
}

#[test]
fn an_upload_whose_connections_break_anywhere_goes_on_by_itself() -> Result<()> {
    let bench = Bench::new(48 << 20)?;
    for seed in 0..2 {
        let mut uploader = bench.uploader(&[])?;
        let relay = Relay::start(uploader.address);
        // In the heads of the first requests, and anywhere in the image.
        let random = Noise::new(seed).bytes(8);
        let anywhere = |at: usize| u64::from(random[at]) * bench.size / 256;
        relay.cut_at(&[
            u64::from(random[0]),
            700 + u64::from(random[1]),
            anywhere(2),
            anywhere(3),
            bench.size - 1,
        ]);
        let told = run(&upload(&bench.image, &relay.url())?)?;
        assert!(told.contains("\"sha256:"), "seed {seed}: {told}");
        let again = relay.sent().saturating_sub(bench.size);
        assert!(again < 5 * PART_BYTES_MAX, "seed {seed}: {again} bytes were sent again");
        assert_eq!(uploader.ended()?, Some(0));
        bench.assert_stored()?;
    }
    Ok(())
}

#[test]
fn an_uploader_that_was_killed_or_stopped_goes_on_when_it_is_started_again() -> Result<()> {
    let bench = Bench::new(64 << 20)?;
    for kills in [true, false] {
        let mut first = bench.uploader(&[])?;
        let relay = Relay::start(first.address);
        // By then the registry has a part of it, whatever is on the way.
        relay.hold_after(56 << 20);
        let mut client = Daemon::spawn(&upload(&bench.image, &relay.url())?)?;
        relay.wait_held();
        match kills {
            true => first.daemon.kill9()?,
            false => assert_eq!(first.daemon.terminate()?.code(), Some(143)),
        }
        let mut second = bench.uploader(&[])?;
        relay.lead_to(second.address);
        relay.release();
        assert!(client.wait(END_TIMEOUT)?.success(), "{}", client.log());
        assert_eq!(second.ended()?, Some(0));
        let resumed = client.log().lines().find_map(|line| {
            let (_, number) = line.split_once("\"resumed_bytes\": ")?;
            number.trim_end_matches(',').parse::<u64>().ok()
        });
        assert!(resumed >= Some(8 << 20), "{resumed:?} {}", client.log());
        let again = relay.sent().saturating_sub(bench.size);
        assert!(again <= (56 << 20) - (8 << 20), "{again} bytes were sent again");
        bench.assert_stored()?;
    }
    Ok(())
}

#[test]
fn a_verdict_that_was_lost_is_told_again() -> Result<()> {
    let bench = Bench::new(2 << 20)?;
    for wrong in [false, true] {
        let sum = format!("sha256:{}", "0".repeat(64));
        let args = if wrong { vec!["--checksums", &sum] } else { vec![] };
        let mut uploader = bench.uploader(&args)?;
        let relay = Relay::start(uploader.address);
        // What compresses is little: by then nothing but the last part is on the way.
        relay.cut_next_answer_after((2 << 20) - (256 << 10));
        let told = dvcr_tests::run_output(&upload(&bench.image, &relay.url())?)?;
        match wrong {
            true => {
                assert!(told.stderr.contains("422") || told.stderr.contains("checksum"), "{}", told.stderr)
            }
            false => assert!(told.stdout.contains("\"sha256:"), "{} {}", told.stdout, told.stderr),
        }
        assert!(told.stderr.contains("trying again"), "{}", told.stderr);
        assert_eq!((told.status.success(), uploader.ended()?), (!wrong, Some(0)));
    }
    bench.assert_stored()
}
