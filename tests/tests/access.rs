//! Who may do what, with the clients of others: they log in by Basic and by Bearer, over TLS too, and are told no.

use anyhow::{Context, Result, ensure};
use dvcr_tests::{
    Output, Registry, TempDir, cmd, dvcr, fixture, run, run_dvcr, run_output, temp_dir, tool, utf8,
    wait_until,
};
use rustix::process::{Pid, Signal, kill_process};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const ADMIN: &str = "admin:topsecret";
const PULLER: &str = "node-puller:pull-only";
const RELOAD_TIMEOUT: Duration = Duration::from_secs(20);

struct Setup {
    dir: TempDir,
    registry: Registry,
    /// An image as an OCI layout, with the tag 1.
    layout: String,
}

impl Setup {
    /// Starts a registry that knows `admin` and `node-puller`, with further arguments.
    fn new(args: &[&str]) -> Result<Self> {
        let dir = temp_dir();
        let (admin, puller) = (dir.path().join("admin"), dir.path().join("puller"));
        std::fs::write(&admin, "topsecret\n")?;
        std::fs::write(&puller, "pull-only\n")?;
        let mut all =
            vec!["--admin-password-file", utf8(&admin), "--node-puller-password-file", utf8(&puller)];
        all.extend(args);
        let registry = Registry::start_with(&dir.path().join("registry"), &all)?;
        let layout = layout(dir.path())?;
        Ok(Self { dir, registry, layout })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn skopeo(&self, args: &[&str]) -> Command {
        let mut command = cmd("skopeo", args);
        // Nobody's login counts here.
        command.env("REGISTRY_AUTH_FILE", self.path("nobody.json"));
        command
    }

    fn push(&self, credentials: Option<&str>, name: &str) -> Result<Output> {
        let mut command = self.skopeo(&["copy", "-q", "--dest-tls-verify=false"]);
        command.args(credentials.map(|credentials| format!("--dest-creds={credentials}")));
        run_output(command.arg(&self.layout).arg(format!("docker://{}", self.registry.reference(name))))
    }

    fn pull(&self, credentials: Option<&str>, name: &str) -> Result<Output> {
        let mut command = self.skopeo(&["inspect", "--tls-verify=false"]);
        command.args(credentials.map(|credentials| format!("--creds={credentials}")));
        run_output(command.arg(format!("docker://{}", self.registry.reference(name))))
    }

    /// Reads a counter of requests for tokens.
    fn tokens(&self) -> Result<u64> {
        let text = run(&cmd("curl", ["-sS", &format!("{}/metrics", self.registry.url())]))?;
        let of_token = |line: &&str| line.starts_with("dvcr_registry_requests_total{route=\"token\"");
        let numbers =
            text.lines().filter(of_token).filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok());
        Ok(numbers.sum())
    }

    /// Logs in with crane and copies an image both ways.
    fn crane(&self, name: &str) -> Result<()> {
        let config = self.path("crane");
        let host = self.registry.address().to_string();
        let crane = |args: &[&str]| run(cmd(tool("crane")?, args).env("DOCKER_CONFIG", &config));
        crane(&["auth", "login", &host, "-u", "admin", "-p", "topsecret"])?;
        let reference = self.registry.reference(name);
        let copy = self.registry.reference(&format!("copies/{name}"));
        let pulled = self.path("pulled");
        crane(&["pull", "--format=oci", &reference, utf8(&pulled)])?;
        crane(&["push", utf8(&pulled), &copy])?;
        // Between repositories it mounts, which needs the right to pull from the other one.
        crane(&["copy", &copy, &self.registry.reference(&format!("mounted/{name}"))])?;
        ensure!(crane(&["catalog", &host])?.contains("mounted/"));
        Ok(())
    }

    /// Logs in with buildah, pulls, and pushes what it pulled.
    fn buildah(&self, name: &str) -> Result<()> {
        let (storage, logins) = (self.path("storage"), self.path("buildah.json"));
        let buildah = |args: &[&str]| {
            let mut command = cmd("buildah", ["--storage-driver", "vfs"]);
            command.arg("--root").arg(storage.join("root")).arg("--runroot").arg(storage.join("run"));
            run(command.args(args).env("REGISTRY_AUTH_FILE", &logins))
        };
        let host = self.registry.address().to_string();
        buildah(&["login", "--tls-verify=false", "-u", "admin", "-p", "topsecret", &host])?;
        let reference = self.registry.reference(name);
        buildah(&["pull", "-q", "--tls-verify=false", &format!("docker://{reference}")])?;
        let back = format!("docker://{}", self.registry.reference(&format!("buildah/{name}")));
        buildah(&["push", "-q", "--tls-verify=false", &reference, &back])?;
        buildah(&["rmi", "--all"])?;
        Ok(())
    }
}

/// Makes an image with skopeo's help alone: a registry that asks nobody, and a copy out of it.
fn layout(dir: &Path) -> Result<String> {
    let (source, layout) = (dir.join("disk.qcow2"), dir.join("layout"));
    fixture::noise_qcow2(&source, 8 << 20, 1 << 20)?;
    let open = Registry::start(&dir.join("open"))?;
    let reference = open.reference("disk:1");
    run_dvcr(&["import", utf8(&source), &reference])?;
    let layout = format!("oci:{}:1", utf8(&layout));
    run(&cmd("skopeo", ["copy", "-q", "--src-tls-verify=false", &format!("docker://{reference}"), &layout]))?;
    Ok(layout)
}

fn assert_told(output: &Output, words: &[&str]) {
    assert!(!output.status.success(), "{}", output.stdout);
    assert!(words.iter().any(|word| output.stderr.contains(word)), "{}", output.stderr);
}

#[test]
fn clients_log_in_by_basic_and_are_told_what_they_may_not() -> Result<()> {
    let setup = Setup::new(&[])?;
    assert!(setup.push(Some(ADMIN), "vi/ns/disk:1")?.status.success());
    assert!(setup.pull(Some(PULLER), "vi/ns/disk:1")?.status.success());
    assert_told(&setup.push(Some(PULLER), "vi/ns/other:1")?, &["denied", "403", "Forbidden"]);
    for wrong in [None, Some("admin:wrong"), Some("nobody:topsecret")] {
        assert_told(&setup.pull(wrong, "vi/ns/disk:1")?, &["unauthorized", "authentication", "password"]);
        assert_told(&setup.push(wrong, "vi/ns/disk:1")?, &["unauthorized", "authentication", "password"]);
    }
    setup.crane("vi/ns/disk:1")?;
    setup.buildah("vi/ns/disk:1")?;
    let log = setup.registry.log();
    assert!(log.contains("user=\"node-puller\"") && !log.contains("topsecret"), "{log}");
    Ok(())
}

#[test]
fn clients_log_in_by_bearer() -> Result<()> {
    // Where something is public too, the first challenge is Bearer alone, and so all of them take it.
    let setup = Setup::new(&["--bearer", "--anonymous-pull", "public/**"])?;
    let mut tokens = 0;
    let mut more = |who: &str| {
        let now = setup.tokens()?;
        ensure!(now > tokens, "{who} asked for no token");
        tokens = now;
        Ok(())
    };
    assert!(setup.push(Some(ADMIN), "vi/ns/disk:1")?.status.success());
    assert!(setup.push(Some(ADMIN), "public/disk:1")?.status.success());
    assert!(setup.pull(Some(PULLER), "vi/ns/disk:1")?.status.success());
    more("skopeo")?;
    assert_told(&setup.push(Some(PULLER), "vi/ns/other:1")?, &["denied", "unauthorized", "authentication"]);
    for wrong in [None, Some("admin:wrong"), Some("nobody:topsecret")] {
        assert_told(&setup.pull(wrong, "vi/ns/disk:1")?, &["unauthorized", "authentication", "password"]);
    }
    // Nobody's token is good for what is public, and for no push.
    assert!(setup.pull(None, "public/disk:1")?.status.success());
    assert_told(&setup.push(None, "public/disk:2")?, &["denied", "unauthorized", "authentication"]);
    more("skopeo without a login")?;
    setup.crane("vi/ns/disk:1")?;
    more("crane")?;
    setup.buildah("vi/ns/disk:1")?;
    more("buildah")?;
    Ok(())
}

#[test]
fn with_both_challenges_clients_take_the_one_they_like() -> Result<()> {
    let setup = Setup::new(&["--bearer"])?;
    assert!(setup.push(Some(ADMIN), "vi/ns/disk:1")?.status.success());
    assert!(setup.pull(Some(PULLER), "vi/ns/disk:1")?.status.success());
    setup.crane("vi/ns/disk:1")?;
    setup.buildah("vi/ns/disk:1")?;
    assert_eq!(setup.tokens()?, 0, "skopeo and buildah take the first, crane Basic before Bearer");
    // One that knows nothing but Basic, and speaks only when asked.
    let url = format!("{}/v2/vi/ns/disk/tags/list", setup.registry.url());
    let tags = run(&cmd("curl", ["-sSf", "--anyauth", "-u", PULLER, &url]))?;
    assert!(tags.contains("\"1\""), "{tags}");
    Ok(())
}

#[test]
fn what_is_public_is_pulled_without_a_login_and_never_pushed() -> Result<()> {
    let setup = Setup::new(&["--anonymous-pull", "public/*"])?;
    assert!(setup.push(Some(ADMIN), "public/disk:1")?.status.success());
    assert!(setup.push(Some(ADMIN), "vi/ns/disk:1")?.status.success());
    assert!(setup.pull(None, "public/disk:1")?.status.success());
    assert_told(&setup.pull(None, "vi/ns/disk:1")?, &["unauthorized", "authentication"]);
    assert_told(&setup.push(None, "public/disk:2")?, &["unauthorized", "authentication"]);
    let config = setup.path("nobody");
    let digest = run(cmd(tool("crane")?, ["digest", &setup.registry.reference("public/disk:1")])
        .env("DOCKER_CONFIG", &config))?;
    assert!(digest.starts_with("sha256:"));
    Ok(())
}

#[test]
fn dvcr_itself_logs_in_by_either_way() -> Result<()> {
    for args in [&[][..], &["--bearer"]] {
        let setup = Setup::new(args)?;
        let logins = setup.path("auth.json");
        let host = setup.registry.address().to_string();
        run(&cmd(
            "skopeo",
            [
                "login",
                "--tls-verify=false",
                "-u",
                "admin",
                "-p",
                "topsecret",
                "--authfile",
                utf8(&logins),
                &host,
            ],
        ))?;
        let reference = setup.registry.reference("vi/ns/disk:1");
        run_dvcr(&["import", utf8(&setup.path("disk.qcow2")), &reference, "--authfile", utf8(&logins)])?;
        run_dvcr(&["populate", &reference, utf8(&setup.path("disk.raw")), "--authfile", utf8(&logins)])?;
        assert_eq!(setup.tokens()? > 0, !args.is_empty());
    }
    Ok(())
}

#[test]
fn a_changed_password_counts_from_sighup_on() -> Result<()> {
    let setup = Setup::new(&[])?;
    let catalog = |password: &str| {
        let url = format!("{}/v2/_catalog", setup.registry.url());
        let credentials = format!("admin:{password}");
        Ok::<_, anyhow::Error>(run_output(&cmd("curl", ["-sSf", "-u", &credentials, &url]))?.status.success())
    };
    assert!(catalog("topsecret")? && !catalog("second")?);
    std::fs::write(setup.path("admin"), "second\n")?;
    let pid = Pid::from_raw(setup.registry.id().cast_signed()).context("a process has a number")?;
    kill_process(pid, Signal::HUP)?;
    wait_until(RELOAD_TIMEOUT, "the new password", || catalog("second").unwrap_or(false))?;
    assert!(!catalog("topsecret")?);
    Ok(())
}

#[test]
fn clients_verify_the_certificate_and_show_their_own() -> Result<()> {
    let dir = temp_dir();
    let openssl = |args: &[&str]| run(cmd("openssl", args).current_dir(dir.path()));
    let key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1"];
    let mut ca = vec!["req", "-x509", "-subj", "/CN=tests", "-keyout", "ca.key", "-out", "ca.crt"];
    ca.extend(key);
    openssl(&ca)?;
    for (name, subject) in [("server", "/CN=server"), ("client", "/O=tests/CN=node-puller")] {
        let (file, request) = (format!("{name}.key"), format!("{name}.csr"));
        let mut args = vec!["req", "-subj", subject, "-addext", "subjectAltName=IP:127.0.0.1"];
        args.extend(["-keyout", &file, "-out", &request]);
        args.extend(key.iter().filter(|arg| !["-days", "1"].contains(arg)));
        openssl(&args)?;
        let cert = format!("{name}.cert");
        let sign = ["x509", "-req", "-in", &request, "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial"];
        openssl(&[&sign[..], &["-days", "1", "-copy_extensions", "copy", "-out", &cert]].concat())?;
    }
    let [cert, key, ca] = ["server.cert", "server.key", "ca.crt"].map(|name| dir.path().join(name));
    let tls = ["--tls-cert", utf8(&cert), "--tls-key", utf8(&key), "--client-ca", utf8(&ca), "--bearer"];
    let setup = Setup::new(&tls)?;
    // As `/etc/containers/certs.d/<host>` has it: *.crt are roots, *.cert and *.key belong together.
    let certs = |files: &[&str]| {
        let certs = temp_dir();
        for file in files {
            std::fs::copy(dir.path().join(file), certs.path().join(file))?;
        }
        Ok::<_, anyhow::Error>(certs)
    };
    let (roots, whole) = (certs(&["ca.crt"])?, certs(&["ca.crt", "client.cert", "client.key"])?);
    let reference = format!("docker://{}", setup.registry.reference("vi/ns/disk:1"));
    let copy = |certs: &TempDir, credentials: &str| {
        let mut command = setup.skopeo(&["copy", "-q", "--dest-cert-dir", utf8(certs.path())]);
        command.args((!credentials.is_empty()).then(|| format!("--dest-creds={credentials}")));
        run_output(command.args([&setup.layout, &reference]))
    };
    assert!(copy(&roots, ADMIN)?.status.success());
    assert_told(&copy(&certs(&[])?, ADMIN)?, &["certificate"]);
    assert_told(&copy(&whole, "")?, &["denied", "403", "unauthorized", "authentication"]);
    let inspect = |certs: &TempDir| {
        run_output(&setup.skopeo(&["inspect", "--cert-dir", utf8(certs.path()), &reference]))
    };
    assert!(inspect(&whole)?.status.success());
    assert_told(&inspect(&roots)?, &["unauthorized", "authentication"]);
    // crane asks for a token over TLS, at the address that it used itself.
    let logins = setup.path("crane");
    let crane = |args: &[&str]| {
        run(cmd(tool("crane")?, args).env("DOCKER_CONFIG", &logins).env("SSL_CERT_FILE", &ca))
    };
    let host = setup.registry.address().to_string();
    crane(&["auth", "login", &host, "-u", "admin", "-p", "topsecret"])?;
    assert!(crane(&["digest", &setup.registry.reference("vi/ns/disk:1")])?.starts_with("sha256:"));
    Ok(())
}

#[test]
fn on_other_addresses_users_and_tls_have_to_be_named_or_done_without() -> Result<()> {
    let dir = temp_dir();
    let password = dir.path().join("admin");
    std::fs::write(&password, "topsecret")?;
    let start = |args: &[&str]| {
        let mut command =
            cmd(dvcr()?, ["registry", "--listen", "0.0.0.0:0", "--root", utf8(&dir.path().join("root"))]);
        run_output(command.args(args))
    };
    for (args, word) in [
        (&[][..], "--allow-anonymous"),
        (&["--admin-password-file", utf8(&password)], "--plain-http"),
        (&["--allow-anonymous"], "--plain-http"),
        (&["--allow-anonymous", "--admin-password-file", utf8(&password)], "--allow-anonymous"),
        (&["--bearer", "--plain-http", "--allow-anonymous"], "--bearer"),
        (&["--tls-cert", "x", "--admin-password-file", utf8(&password)], "--tls-key"),
        (&["--plain-http", "--admin-password-file", "/nowhere/password"], "/nowhere/password"),
        (&["--plain-http", "--token-public-key", utf8(&password)], "P-256"),
        (&["--plain-http", "--anonymous-pull", "a b"], "pattern"),
    ] {
        let output = start(args)?;
        assert!(!output.status.success() && output.stderr.contains(word), "{args:?}: {}", output.stderr);
        assert!(!output.stderr.contains("topsecret"), "{}", output.stderr);
    }
    Ok(())
}
