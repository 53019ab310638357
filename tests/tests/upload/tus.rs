//! The tus protocol, by a client of others and by hand.

use anyhow::Result;
use dvcr_tests::{cmd, run, tool, utf8};

use crate::relay::Relay;
use crate::support::{Bench, ByHand, curl};

/// Uploads with tuspy: address, file, bytes of a part, whether parts have checksums.
const TUSPY: &str = r#"
import sys
from tusclient import client
address, file, part, checks = sys.argv[1:]
uploader = client.TusClient(address).uploader(
    file, chunk_size=int(part), retries=20, retry_delay=0.2, metadata={"filename": "from-tuspy.qcow2"},
    upload_checksum=checks == "yes")
uploader.upload()
print(uploader.url, uploader.offset)
"#;

const TUS: &str = "Tus-Resumable: 1.0.0";
const STREAM: &str = "Content-Type: application/offset+octet-stream";

#[test]
fn tuspy_uploads_also_over_broken_connections() -> Result<()> {
    let bench = Bench::new(12 << 20)?;
    for (part, checks, cuts) in [(1 << 20, "yes", false), (5 << 20, "no", true), (1 << 30, "no", true)] {
        let mut uploader = bench.uploader(&[])?;
        let relay = Relay::start(uploader.address);
        if cuts {
            relay.cut_at(&[bench.size / 3, bench.size / 2]);
        }
        // A proxy may show the endpoint under another name; here the query alone does.
        let address = format!("{}?token=x", relay.url());
        let part = part.to_string();
        let told =
            run(&cmd(tool("tuspy-python")?, ["-c", TUSPY, &address, utf8(&bench.image), &part, checks]))?;
        assert!(told.contains(&format!(" {}", bench.size)), "{told}");
        assert_eq!(uploader.ended()?, Some(0), "{}", uploader.daemon.log());
        assert!(uploader.daemon.log().contains("from-tuspy.qcow2"), "{}", uploader.daemon.log());
        bench.assert_stored()?;
    }
    Ok(())
}

#[test]
fn the_protocol_is_answered_by_the_letter() -> Result<()> {
    let bench = Bench::new(1 << 20)?;
    let mut uploader = bench.uploader(&[])?;
    let url = uploader.url();
    let options = curl(&["-X", "OPTIONS", &url])?;
    assert_eq!((options.status, options.header("tus-version")), (204, Some("1.0.0")));
    for extension in
        ["creation", "creation-with-upload", "creation-defer-length", "termination", "checksum", "expiration"]
    {
        let all = options.header("tus-extension").unwrap_or_default();
        assert!(all.split(',').any(|one| one == extension), "{all}");
    }
    let old = curl(&["-X", "POST", "-H", "Tus-Resumable: 0.2.2", "-H", "Upload-Length: 1", &url])?;
    assert_eq!((old.status, old.header("tus-version")), (412, Some("1.0.0")));
    let head = |url: &str| curl(&["-I", "-H", TUS, url]);
    assert_eq!(head(&url)?.status, 404);
    assert_eq!(curl(&["-X", "POST", "-H", TUS, &url])?.status, 400);

    // A length that is told later; an upload that is ended.
    let metadata = "Upload-Metadata: filename ZGlzay5xY293Mg==";
    let created = curl(&["-X", "POST", "-H", TUS, "-H", "Upload-Defer-Length: 1", "-H", metadata, &url])?;
    assert_eq!((created.status, created.header("upload-offset")), (201, Some("0")), "{created:?}");
    let location = created.header("location").unwrap_or_default();
    assert!(location.starts_with("?upload=") && created.header("upload-expires").is_some(), "{created:?}");
    let session = format!("{url}{location}");
    let known = head(&session)?;
    assert_eq!((known.status, known.header("upload-defer-length")), (200, Some("1")));
    assert_eq!(known.header("upload-metadata"), Some("filename ZGlzay5xY293Mg=="));
    assert_eq!(known.header("cache-control"), Some("no-store"));
    let part = |url: &str, at: usize, bytes: &[u8], more: &[&str]| {
        let file = bench.dir.path().join("part");
        std::fs::write(&file, bytes)?;
        let (body, offset) = (format!("@{}", utf8(&file)), format!("Upload-Offset: {at}"));
        let mut args = vec!["-X", "PATCH", "--data-binary", &body, "-H", TUS, "-H", &offset];
        more.iter().for_each(|header| args.extend(["-H", *header]));
        args.push(url);
        curl(&args)
    };
    let bytes = bench.bytes();
    assert_eq!(part(&session, 0, &bytes[..100], &["Content-Type: text/plain"])?.status, 415);
    let wrong = part(&session, 7, &bytes[..100], &[STREAM])?;
    assert_eq!((wrong.status, wrong.header("upload-offset")), (409, Some("0")));
    assert_eq!(part(&session, 0, &bytes[..100], &[STREAM])?.header("upload-offset"), Some("100"));
    let damaged = ["Upload-Checksum: sha1 AAAAAAAAAAAAAAAAAAAAAAAAAAA=", STREAM];
    assert_eq!(part(&session, 100, &bytes[100..200], &damaged)?.status, 460);
    assert_eq!(head(&session)?.header("upload-offset"), Some("100"));
    assert_eq!(curl(&["-X", "POST", "-H", TUS, "-H", "Upload-Length: 1", &url])?.status, 409);
    assert_eq!(curl(&["-X", "DELETE", "-H", TUS, &session])?.status, 204);
    assert_eq!(head(&session)?.status, 404);

    // With the first bytes at once, methods by the other header, coded bytes, and a length told at the end.
    let zstd = zstd_of(&bytes[..1000])?;
    let file = bench.dir.path().join("first");
    std::fs::write(&file, zstd)?;
    let body = format!("@{}", utf8(&file));
    let created = curl(&[
        "-X",
        "POST",
        "--data-binary",
        &body,
        "-H",
        TUS,
        "-H",
        "Upload-Defer-Length: 1",
        "-H",
        STREAM,
        "-H",
        "Content-Encoding: zstd",
        &url,
    ])?;
    assert_eq!((created.status, created.header("upload-offset")), (201, Some("1000")), "{created:?}");
    let session = format!("{url}{}", created.header("location").unwrap_or_default());
    let length = format!("Upload-Length: {}", bytes.len());
    let too_long = [&bytes[1000..], b"x"].concat();
    assert_eq!(part(&session, 1000, &too_long, &[STREAM, &length])?.status, 413);
    let body = format!("@{}", utf8(&file));
    std::fs::write(&file, &bytes[1000..2000])?;
    let over = curl(&[
        "-X",
        "POST",
        "--data-binary",
        &body,
        "-H",
        TUS,
        "-H",
        "X-HTTP-Method-Override: PATCH",
        "-H",
        STREAM,
        "-H",
        "Upload-Offset: 1000",
        &session,
    ])?;
    assert_eq!((over.status, over.header("upload-offset")), (204, Some("2000")), "{over:?}");
    let last = part(&session, 2000, &bytes[2000..], &[STREAM, "Prefer: return=representation"])?;
    assert_eq!(
        (last.status, last.header("upload-offset")),
        (200, Some(&*bytes.len().to_string())),
        "{last:?}"
    );
    assert!(last.json()["digest"].is_string());
    assert_eq!(uploader.ended()?, Some(0));
    bench.assert_stored()
}

#[test]
fn whoever_knows_the_upload_takes_it_from_a_connection_that_is_dead() -> Result<()> {
    let bench = Bench::new(1 << 20)?;
    let mut uploader = bench.uploader(&[])?;
    let (bytes, length) = (bench.bytes(), format!("Upload-Length: {}", bench.size));
    let created = curl(&["-X", "POST", "-H", TUS, "-H", &length, &uploader.url()])?;
    let query = created.header("location").unwrap_or_default().to_owned();
    let patch = format!("PATCH /upload{query} HTTP/1.1");
    let announced = format!("Content-Length: {}", bytes.len());
    // This one stops in the middle, and stays connected.
    let mut dead = ByHand::begin(uploader.address, &[&patch, TUS, STREAM, "Upload-Offset: 0", &announced])?;
    dead.send(&bytes[..5000])?;
    uploader.wait_status("5000 bytes", |status| status["received"] == 5000)?;
    let session = format!("{}{query}", uploader.url());
    assert_eq!(curl(&["-I", "-H", TUS, &session])?.header("upload-offset"), Some("5000"));
    let rest = bench.dir.path().join("rest");
    std::fs::write(&rest, &bytes[5000..])?;
    let body = format!("@{}", utf8(&rest));
    let last = curl(&[
        "-X",
        "PATCH",
        "--data-binary",
        &body,
        "-H",
        TUS,
        "-H",
        STREAM,
        "-H",
        "Upload-Offset: 5000",
        &session,
    ])?;
    assert_eq!(last.status, 204, "{last:?}");
    assert_eq!(uploader.ended()?, Some(0));
    bench.assert_stored()
}

/// Compresses with the program of Debian.
fn zstd_of(bytes: &[u8]) -> Result<Vec<u8>> {
    let dir = dvcr_tests::temp_dir();
    let (plain, coded) = (dir.path().join("plain"), dir.path().join("coded"));
    std::fs::write(&plain, bytes)?;
    run(&cmd("zstd", ["-q", utf8(&plain), "-o", utf8(&coded)]))?;
    Ok(std::fs::read(coded)?)
}
