//! Exports of nbdkit and qemu-nbd as sources: every disk is what `qemu-img` reads of the file behind the export.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by a panic")]

mod common;

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{Files, MIB, Registry, Relay, chain, import_one, import_request, path, populate_one, run};
use dvcr_converter::progress::Progress;
use dvcr_importer::{Error, ErrorKind, import};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const START_TIMEOUT: Duration = Duration::from_secs(30);
const NEVER: u64 = u64::MAX;

/// A server on a socket of its own; killed when dropped.
struct Server {
    socket: PathBuf,
    child: Child,
    _dir: TempDir,
}

impl Server {
    fn nbdkit(args: &[&str]) -> Self {
        Self::start(|socket| {
            let mut command = Command::new("nbdkit");
            command.args(["--foreground", "--readonly", "--unix"]).arg(socket).args(args);
            command
        })
    }

    fn qemu_nbd(file: &Path, args: &[&str]) -> Self {
        Self::start(|socket| {
            let mut command = Command::new("qemu-nbd");
            command.args(["--read-only", "--persistent", "--socket"]).arg(socket).args(args).arg(file);
            command
        })
    }

    fn start(command: impl Fn(&Path) -> Command) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("socket");
        let mut command = command(&socket);
        let quiet = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = quiet.spawn().unwrap_or_else(|e| panic!("{command:?}: {e}"));
        let mut server = Self { socket, child, _dir: dir };
        let deadline = Instant::now() + START_TIMEOUT;
        while UnixStream::connect(&server.socket).is_err() {
            assert!(server.child.try_wait().unwrap().is_none(), "{command:?} ended");
            assert!(Instant::now() < deadline, "{command:?} does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
        server
    }

    fn url(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", path(&self.socket))
    }

    async fn relay(&self, cut_after: u64) -> Relay {
        Relay::to_socket(self.socket.clone(), cut_after).await
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The disk with its zeros as holes.
fn sparse(files: &Files) -> PathBuf {
    let (from, to) = (files.path("disk.raw"), files.path("sparse.raw"));
    run("cp", &["--sparse=always", path(&from), path(&to)]);
    to
}

async fn digest_of(source: &str, registry: &Registry, name: &str) -> String {
    let done = import_one(source, &registry.reference(name)).await;
    done.unwrap_or_else(|e| panic!("{name}: {}", chain(&e))).digest
}

async fn fails(source: &str, registry: &Registry) -> Error {
    let error = import_one(source, &registry.reference("failing")).await.unwrap_err();
    assert_eq!(registry.repository("failing").manifest_digest("latest").await.unwrap(), None);
    error
}

#[tokio::test(flavor = "multi_thread")]
async fn every_server_gives_the_disk_that_its_file_holds() {
    let (registry, files) = (Registry::ours().await, Files::new());
    let raw = sparse(&files);
    let expected = digest_of(path(&files.path("disk.raw")), &registry, "disk").await;
    let file = path(&raw);
    let servers = [
        ("qemu", Server::qemu_nbd(&raw, &["--format", "raw", "--export-name", "disk"])),
        ("nbdkit", Server::nbdkit(&["file", file])),
        ("simple", Server::nbdkit(&["--no-sr", "file", file])),
        (
            "small",
            Server::nbdkit(&[
                "--filter=blocksize-policy",
                "file",
                file,
                "blocksize-minimum=4096",
                "blocksize-preferred=4096",
                "blocksize-maximum=65536",
                "blocksize-error-policy=error",
            ]),
        ),
        ("silent", Server::nbdkit(&["--filter=noextents", "file", file])),
        ("one-by-one", Server::nbdkit(&["--filter=noparallel", "file", file, "serialize=requests"])),
    ];
    for (name, server) in &servers {
        assert_eq!(digest_of(&server.url("disk"), &registry, name).await, expected, "{name}");
        let target = files.path("out.raw");
        populate_one(&registry.reference(name), &target).await.unwrap();
        run("qemu-img", &["compare", "-f", "raw", "-F", "raw", path(&target), file]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_of_qcow2_bytes_is_stored_byte_for_byte() {
    let (registry, files) = (Registry::ours().await, Files::new());
    let qcow2 = files.qcow2(&[]);
    let expected = digest_of(path(&qcow2), &registry, "file").await;
    let bytes = Server::qemu_nbd(&qcow2, &["--format", "raw", "--export-name", "disk.qcow2"]);
    assert_eq!(digest_of(&bytes.url("disk.qcow2"), &registry, "bytes").await, expected);
    // The disk inside of it is another matter.
    let disk = Server::qemu_nbd(&qcow2, &["--format", "qcow2", "--export-name", "disk"]);
    let raw = digest_of(path(&files.path("disk.raw")), &registry, "raw").await;
    assert_eq!(digest_of(&disk.url("disk"), &registry, "disk").await, raw);
}

#[tokio::test(flavor = "multi_thread")]
async fn holes_are_not_sent() {
    let (registry, files) = (Registry::ours().await, Files::new());
    let raw = sparse(&files);
    std::fs::File::options().write(true).open(&raw).unwrap().set_len(1 << 30).unwrap();
    let server = Server::nbdkit(&["file", path(&raw)]);
    let relay = server.relay(NEVER).await;
    digest_of(&format!("nbd://{}/disk", relay.address), &registry, "disk").await;
    // 15 MiB of data in units of 2 MiB, and what was read ahead for the probe.
    let passed = relay.passed();
    assert!(passed < 40 * MIB as u64, "{passed} bytes of 1 GiB");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_is_read_on_over_another_connection() {
    let (registry, files) = (Registry::ours().await, Files::new());
    let raw = sparse(&files);
    let expected = digest_of(path(&files.path("disk.raw")), &registry, "file").await;
    let qemu = Server::qemu_nbd(&raw, &["--format", "raw", "--export-name", "disk"]);
    // With more threads this nbdkit does not survive its clients' leaving.
    let simple = Server::nbdkit(&["--threads=1", "--no-sr", "file", path(&raw)]);
    for (name, server) in [("chunks", qemu), ("simple", simple)] {
        let relay = server.relay(5 * MIB as u64).await;
        let digest = digest_of(&format!("nbd://{}/disk", relay.address), &registry, name).await;
        assert_eq!(digest, expected, "{name}");
        assert!(relay.cuts() >= 3, "{name}: {} cuts", relay.cuts());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checksum_is_over_the_bytes_of_the_export() {
    let (registry, files) = (Registry::ours().await, Files::new());
    let raw = sparse(&files);
    let server = Server::nbdkit(&["file", path(&raw)]);
    let sum = String::from_utf8(run("sha256sum", &[path(&raw)])).unwrap();
    let mut request = import_request(&server.url(""), &registry.reference("right"));
    request.checksums = vec![format!("sha256:{}", &sum[..64]).parse().unwrap()];
    import(request.clone(), Arc::new(Progress::default())).await.unwrap_or_else(|e| panic!("{}", chain(&e)));
    request.checksums = vec![format!("sha256:{}", "0".repeat(64)).parse().unwrap()];
    let error = import(request, Arc::new(Progress::default())).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Checksum);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_server_refuses_is_told() {
    let (registry, files) = (Registry::ours().await, Files::new());
    let raw = files.path("disk.raw");
    let server = Server::qemu_nbd(&raw, &["--format", "raw", "--export-name", "disk"]);
    let error = fails(&server.url("other"), &registry).await;
    assert_eq!(error.kind(), ErrorKind::Source);
    assert!(chain(&error).contains("has no export \"other\""), "{}", chain(&error));
    let broken = Server::nbdkit(&["--filter=error", "file", path(&raw), "error-pread-rate=100%"]);
    let error = fails(&broken.url(""), &registry).await;
    assert_eq!(error.kind(), ErrorKind::Source, "{}", chain(&error));
    assert!(chain(&error).contains("input/output error"), "{}", chain(&error));
    let error = fails("nbd+unix:///x?socket=/nowhere/socket", &registry).await;
    assert_eq!(error.kind(), ErrorKind::Source, "{}", chain(&error));
    assert!(chain(&error).contains("/nowhere/socket"), "{}", chain(&error));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_behind_tls_needs_a_certificate_that_is_trusted() {
    let (registry, files) = (Registry::ours().await, Files::new());
    let raw = files.path("disk.raw");
    let certificates = files.path("certificates");
    std::fs::create_dir(&certificates).unwrap();
    let [ca_key, ca, key, cert] = ["ca-key.pem", "ca-cert.pem", "server-key.pem", "server-cert.pem"]
        .map(|name| certificates.join(name));
    let kind =
        ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"];
    let subject = ["-subj", "/CN=authority", "-keyout", path(&ca_key), "-out", path(&ca)];
    run("openssl", &[&kind[..], &subject].concat());
    let signed = ["-CA", path(&ca), "-CAkey", path(&ca_key), "-keyout", path(&key), "-out", path(&cert)];
    let names = ["-subj", "/CN=server", "-addext", "subjectAltName=IP:127.0.0.1"];
    let use_as = ["-addext", "basicConstraints=critical,CA:FALSE"];
    run("openssl", &[&kind[..], &signed, &names, &use_as].concat());
    let folder = format!("--tls-certificates={}", path(&certificates));
    let server = Server::nbdkit(&["--tls=require", &folder, "file", path(&raw)]);
    let relay = server.relay(NEVER).await;
    let url = format!("nbds://{}/disk", relay.address);

    let error = fails(&url.replace("nbds", "nbd"), &registry).await;
    assert!(chain(&error).contains("nbds://"), "{}", chain(&error));
    let error = fails(&url, &registry).await;
    assert_eq!(error.kind(), ErrorKind::Source);
    assert!(error.to_string().contains("--source-ca") && !error.is_passing(), "{}", chain(&error));
    let expected = digest_of(path(&raw), &registry, "file").await;
    for (insecure, roots) in [(true, Vec::new()), (false, std::fs::read(&ca).unwrap())] {
        let mut request = import_request(&url, &registry.reference("tls"));
        (request.source_options.insecure, request.source_options.roots) = (insecure, roots);
        let done = import(request, Arc::new(Progress::default())).await;
        assert_eq!(done.unwrap_or_else(|e| panic!("{}", chain(&e))).digest, expected);
    }
}

/// A server that answers the first connection with `bytes`, whatever it is asked.
async fn scripted(bytes: Vec<u8>) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("nbd://{}/x", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            let bytes = bytes.clone();
            tokio::spawn(async move {
                let _ = socket.write_all(&bytes).await;
                // Until the other side has enough.
                while matches!(socket.read(&mut [0; 1024]).await, Ok(1..)) {}
            });
        }
    });
    url
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_breaks_the_protocol_is_left_with_a_word_why() {
    let registry = Registry::ours().await;
    let hello = [b"NBDMAGICIHAVEOPT".as_slice(), &3u16.to_be_bytes()].concat();
    let reply = |option: u32, kind: u32, data: &[u8]| {
        let magic = 0x0003_e889_0455_65a9_u64.to_be_bytes();
        let fields = [option, kind, data.len() as u32].map(u32::to_be_bytes).concat();
        [&magic, &fields[..], data].concat()
    };
    let export = |size: u64| [&[0; 2], &size.to_be_bytes()[..], &[0, 3]].concat();
    let no_chunks = reply(8, 1 << 31 | 1, &[]);
    let opened = |size| [&hello[..], &no_chunks, &reply(7, 3, &export(size)), &reply(7, 1, &[])].concat();
    let simple =
        |cookie: u64| [&0x6744_6698_u32.to_be_bytes()[..], &[0; 4], &cookie.to_be_bytes()[..]].concat();
    let blocks = [&3u16.to_be_bytes()[..], &[0, 0, 2, 1], &[0; 4], &[255; 4]].concat();
    let endless = [&hello[..], &no_chunks, &reply(7, 3, &export(512)).repeat(100)].concat();
    for (name, bytes, part) in [
        ("http", b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(), "no NBD server"),
        ("old", [b"NBDMAGICIHAVEOPT".as_slice(), &[0, 0]].concat(), "too old"),
        ("another option", [&hello[..], &reply(9, 1, &[])].concat(), "does not answer option 8"),
        ("long", [&hello[..], &reply(8, 1, &[0; 70_000])].concat(), "70000 bytes"),
        ("endless", endless, "without end"),
        ("no size", [&hello[..], &no_chunks, &reply(7, 1, &[])].concat(), "size"),
        (
            "odd blocks",
            [&hello[..], &no_chunks, &reply(7, 3, &export(512)), &reply(7, 3, &blocks), &reply(7, 1, &[])]
                .concat(),
            "requests of 513",
        ),
        ("no reply", [opened(512), b"garbage, and more of it".to_vec()].concat(), "where a reply begins"),
        ("wrong cookie", [opened(512), simple(77), vec![0; 512]].concat(), "was not asked"),
        (
            "a chunk elsewhere",
            [
                opened(512),
                [0x668e_33ef_u32.to_be_bytes().as_slice(), &[0, 1, 0, 1], &[0; 8], &[0, 0, 0, 12]].concat(),
                4096u64.to_be_bytes().to_vec(),
                vec![0; 4],
            ]
            .concat(),
            "asked for were 512",
        ),
    ] {
        let error = fails(&scripted(bytes).await, &registry).await;
        assert_eq!(error.kind(), ErrorKind::Source, "{name}: {}", chain(&error));
        assert!(chain(&error).contains(part), "{name}: {}", chain(&error));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_of_holes_is_imported_without_reading_them() {
    let (registry, files) = (Registry::ours().await, Files::new());
    // So large that reading all of it would take hours.
    let huge = files.path("huge.raw");
    let file = std::fs::File::create(&huge).unwrap();
    file.set_len(8 << 40).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &files.raw[MIB..3 * MIB], 5 << 40).unwrap();
    let done = import_one(path(&huge), &registry.reference("file")).await.unwrap();
    assert_eq!((done.virtual_size, done.source_size), (8 << 40, 8 << 40));
    let server = Server::nbdkit(&["file", path(&huge)]);
    assert_eq!(digest_of(&server.url("huge"), &registry, "export").await.len(), done.digest.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn however_a_raw_disk_is_read_it_makes_the_same_image() {
    let (registry, files) = (Registry::ours().await, Files::new());
    let odd = files.path("disk.img");
    for len in [1, 511, 513, MIB + 100, 3 * MIB - 1] {
        std::fs::write(&odd, &files.raw[20 * MIB - len / 2..][..len]).unwrap();
        let at_random = digest_of(path(&odd), &registry, "random").await;
        let mut request = import_request(path(&odd), &registry.reference("stream"));
        let sum = String::from_utf8(run("md5sum", &[path(&odd)])).unwrap();
        request.checksums = vec![format!("md5:{}", &sum[..32]).parse().unwrap()];
        let streamed = import(request, Arc::new(Progress::default())).await.unwrap();
        assert_eq!(at_random, streamed.digest, "{len} bytes");
    }
    // A fixed VHD shows at its end.
    let vhd = files.path("disk.vhd");
    run(
        "qemu-img",
        &["convert", "-O", "vpc", "-o", "subformat=fixed", path(&files.path("disk.raw")), path(&vhd)],
    );
    let at_random = digest_of(path(&vhd), &registry, "vhd").await;
    let wrapped = digest_of(path(&files.wrap(&vhd, "gz")), &registry, "wrapped").await;
    assert_eq!(at_random, wrapped);
}
