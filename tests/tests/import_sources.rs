//! `dvcr import` from buckets and of signed images: MinIO and cosign on the other side.

use anyhow::{Context, Result};
use dvcr_tests::{
    Asked, Fault, Registry, S3Proxy, S3Server, TempDir, assert_same_bytes, cmd, dvcr, fixture, qemu, run,
    run_dvcr, run_output, temp_dir, tool, utf8,
};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;

const VIRTUAL_BYTES: u64 = 64 << 20;
const DATA_BYTES: usize = 5 << 20;

struct Setup {
    dir: TempDir,
    registry: Registry,
    source: PathBuf,
}

impl Setup {
    fn new() -> Result<Self> {
        let dir = temp_dir();
        let source = dir.path().join("disk.qcow2");
        fixture::noise_qcow2(&source, VIRTUAL_BYTES, DATA_BYTES)?;
        let registry = Registry::start(&dir.path().join("registry"))?;
        Ok(Self { dir, registry, source })
    }

    fn assert_populates(&self, reference: &str) -> Result<()> {
        let disk = self.dir.path().join("populated.raw");
        run_dvcr(&["populate", reference, utf8(&disk)])?;
        qemu::assert_same_disk(&self.source, "qcow2", &disk, "raw")?;
        Ok(std::fs::remove_file(disk)?)
    }
}

/// A command line without the keys of whoever runs the tests.
fn dvcr_import(args: &[&str]) -> Result<Command> {
    let mut command = cmd(dvcr()?, ["import", "--output", "json"]);
    for name in ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION"] {
        command.env_remove(name);
    }
    command.args(args);
    Ok(command)
}

fn summary(command: &Command) -> Result<Value> {
    Ok(serde_json::from_str(&run(command)?)?)
}

/// Puts a file into a bucket of its own.
fn put(server: &S3Server, file: &Path, key: &str) -> Result<String> {
    let bucket = server.new_bucket()?;
    let user = format!("{}:{}", S3Server::ACCESS_KEY, S3Server::SECRET_KEY);
    let signature = format!("aws:amz:{}:s3", S3Server::REGION);
    let mut command = cmd("curl", ["-sSf", "--user", &user, "--aws-sigv4", &signature, "-T", utf8(file)]);
    run(command.arg(format!("{}/{bucket}/{key}", server.endpoint())))?;
    Ok(format!("s3://{bucket}/{key}"))
}

#[test]
fn an_object_of_a_bucket_is_imported_by_who_may_read_it() -> Result<()> {
    let (setup, server) = (Setup::new()?, S3Server::shared_minio());
    let object = put(&server, &setup.source, "images/disk%201.qcow2")?;
    let endpoint = server.endpoint();
    let tag = setup.registry.reference("vi/of-bucket:1");
    let args = ["--s3-endpoint", &endpoint, &object, &tag];

    let refused = run(&dvcr_import(&args)?).unwrap_err();
    assert!(format!("{refused:#}").contains("403"), "{refused:#}");
    let (id, secret) = (S3Server::ACCESS_KEY, S3Server::SECRET_KEY);
    let mut by_env = dvcr_import(&args)?;
    let by_env = by_env.env("IMPORTER_ACCESS_KEY_ID", id).env("IMPORTER_SECRET_KEY", secret);
    let done = summary(by_env)?;
    assert_eq!((&done["outcome"], &done["file_name"]), (&"imported".into(), &"disk 1.qcow2".into()));
    setup.assert_populates(&tag)?;

    let file = setup.dir.path().join("credentials");
    std::fs::write(&file, format!("aws_access_key_id = {id}\naws_secret_access_key = {secret}\n"))?;
    let by_file = ["--s3-credentials", utf8(&file), "--if-changed"];
    let refresh = dvcr_import(&[&by_file[..], &args].concat())?;
    // Nothing was noted yet; then the ETag tells, however the address is signed.
    assert_eq!(summary(&refresh)?["outcome"], "same-content");
    assert_eq!(summary(&refresh)?["outcome"], "unchanged");

    std::fs::write(&file, format!("aws_access_key_id = {id}\naws_secret_access_key = wrong-s3cret\n"))?;
    let wrong = dvcr_import(&[&by_file[..2], &args].concat())?;
    let refused = format!("{:#}", run(&wrong).unwrap_err());
    assert!(refused.contains("403") && !refused.contains("s3cret"), "{refused}");
    assert!(!refused.contains("X-Amz-Signature"), "{refused}");
    Ok(())
}

#[test]
fn an_object_goes_on_where_the_connection_broke() -> Result<()> {
    let (setup, server) = (Setup::new()?, S3Server::shared_minio());
    let object = put(&server, &setup.source, "disk.qcow2")?;
    let cut = |asked: &Asked| match asked.path.contains("disk.qcow2") {
        true => Fault::CutBody(2 << 20),
        false => Fault::None,
    };
    let proxy = S3Proxy::start(server.address(), cut)?;
    let tag = setup.registry.reference("vi/of-bucket:1");
    let endpoint = proxy.endpoint();
    let mut command = dvcr_import(&["--s3-endpoint", &endpoint, &object, &tag])?;
    command.env("AWS_ACCESS_KEY_ID", S3Server::ACCESS_KEY);
    let done = summary(command.env("AWS_SECRET_ACCESS_KEY", S3Server::SECRET_KEY))?;
    assert_eq!(done["source_size"].as_u64(), Some(setup.source.metadata()?.len()));
    setup.assert_populates(&tag)
}

#[test]
fn what_cosign_signed_is_imported_by_either_form_of_signature() -> Result<()> {
    let setup = Setup::new()?;
    let dir = setup.dir.path();
    let cosign = |args: &[&str]| {
        let mut command = cmd(tool("cosign")?, args);
        let command = command.current_dir(dir).env("HOME", dir).env("DOCKER_CONFIG", dir);
        run(command.env("COSIGN_PASSWORD", "test"))
    };
    cosign(&["generate-key-pair"])?;
    let key = dir.join("cosign.pub");
    for (name, bundle) in [("tagged", "--new-bundle-format=false"), ("bundled", "--new-bundle-format=true")] {
        let signed = setup.registry.reference(&format!("team/{name}:1"));
        let done = summary(&dvcr_import(&[utf8(&setup.source), &signed])?)?;
        let digest = done["digest"].as_str().context("a digest")?;
        let (from, to) = (format!("docker://{signed}"), setup.registry.reference(&format!("vi/{name}:1")));
        let verified = dvcr_import(&["--verify-key", utf8(&key), &from, &to])?;
        let refused = format!("{:#}", run(&verified).unwrap_err());
        assert!(refused.contains("has no signature"), "{refused}");

        let named = setup.registry.reference(&format!("team/{name}@{digest}"));
        let alone = ["--tlog-upload=false", "--use-signing-config=false", "--allow-http-registry", "--yes"];
        cosign(&[&["sign", "--key", "cosign.key", bundle], &alone[..], &[&named]].concat())?;
        let done = summary(&verified)?;
        assert_eq!((&done["outcome"], &done["digest"]), (&"copied".into(), &digest.into()), "{name}");
    }
    let bundle = dir.join("bundle");
    std::fs::create_dir(&bundle)?;
    std::fs::copy(&setup.source, bundle.join("disk.img"))?;
    // A folder means the disk in it, and has no signature.
    let to = setup.registry.reference("vi/folder:1");
    let refused = run(&dvcr_import(&["--verify-key", utf8(&key), utf8(&bundle), &to])?).unwrap_err();
    assert!(format!("{refused:#}").contains("--checksum") || format!("{refused:#}").contains("checksum"));
    let done = summary(&dvcr_import(&[utf8(&bundle), &to])?)?;
    assert_eq!(done["file_name"], "disk.img");
    setup.assert_populates(&to)?;
    assert_same_bytes(&setup.source, &bundle.join("disk.img"), None)
}

#[test]
fn an_export_that_the_policy_closes_is_refused_and_not_asked_for_again() -> Result<()> {
    let dir = temp_dir();
    let registry = Registry::start(&dir.path().join("registry"))?;
    let reference = registry.reference("vi/closed:1");
    let policy = dir.path().join("policy.yaml");
    std::fs::write(&policy, "schemes: [nbd, docker]\n")?;
    for source in ["nbd://127.0.0.1:1/", "nbd://localhost:1/", "nbd://[::ffff:127.0.0.1]:1/"] {
        let refused = run_output(&dvcr_import(&[source, &reference, "--source-policy", utf8(&policy)])?)?;
        assert_eq!(refused.status.code(), Some(1), "{source}: {}", refused.stderr);
        let told = &refused.stderr;
        assert!(told.contains("networks.allow") && !told.contains("trying again"), "{source}: {told}");
    }
    Ok(())
}
