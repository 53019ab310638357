//! The options of a source, the same for every command that reads one. Secrets come from files, never as arguments.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail};
use dvcr_image::{AuthStore, Network};
use dvcr_importer::signature::VerifyKey;
use dvcr_importer::{HttpOptions, Source, SourceOptions, SourcePolicy};

/// Largest file of options, secrets or certificates, bytes.
const FILE_BYTES_MAX: u64 = 4 << 20;
/// Most files of a folder of certificates.
const CA_FILES_MAX: usize = 1000;
/// What a file of certificates is known by in a folder of many things.
const PEM_CERTIFICATE: &[u8] = b"-----BEGIN CERTIFICATE-----";
/// Basic authentication by variables.
const ENV_USERNAME: &str = "DVCR_SOURCE_USERNAME";
const ENV_PASSWORD: &str = "DVCR_SOURCE_PASSWORD";

/// How to reach a source, and what it may be.
#[derive(Clone, Debug, Default, clap::Args)]
#[group(skip)]
pub struct Args {
    /// Accept any certificate of the source, redirects from https to http, and plain HTTP of a source registry.
    #[arg(long)]
    insecure_source: bool,
    /// Certificates (PEM) to trust besides those of the system: a file, or a folder of such files. May be repeated; the
    /// authority of a proxy that looks into TLS belongs here too.
    #[arg(long, value_name = "FILE|DIR")]
    source_ca: Vec<PathBuf>,
    /// Send the headers of this file, lines of `Name: value`, to an http(s) source; to no other host it redirects to.
    #[arg(long, value_name = "FILE")]
    source_headers: Option<PathBuf>,
    /// Authenticate to an http(s) source with the `user:password` in this file.
    ///
    /// The variables DVCR_SOURCE_USERNAME and DVCR_SOURCE_PASSWORD do the same.
    #[arg(long, value_name = "FILE", conflicts_with = "source_bearer")]
    source_basic: Option<PathBuf>,
    /// Authenticate to an http(s) source with the bearer token in this file.
    #[arg(long, value_name = "FILE")]
    source_bearer: Option<PathBuf>,
    /// Show this certificate (PEM, with its chain) to an https or nbds source.
    #[arg(long, value_name = "FILE", requires = "source_key")]
    source_cert: Option<PathBuf>,
    /// The key of --source-cert (PEM).
    #[arg(long, value_name = "FILE", requires = "source_cert")]
    source_key: Option<PathBuf>,
    /// What the source may be: schemes, hosts, registries, networks (YAML; docs/import.md). Without a policy it may be
    /// anything.
    #[arg(long, value_name = "FILE")]
    source_policy: Option<PathBuf>,
    /// A public key (PEM, ECDSA P-256, as cosign makes them) that a source in a registry must be signed with.
    #[arg(long, value_name = "FILE")]
    verify_key: Option<PathBuf>,
    #[command(flatten)]
    s3: crate::s3::Args,
}

impl Args {
    /// Reads the files. `env` looks up a variable; `auth` is for sources in registries.
    pub fn options(
        &self,
        source: &Source,
        auth: AuthStore,
        env: impl Fn(&str) -> Option<OsString>,
    ) -> anyhow::Result<SourceOptions> {
        Ok(SourceOptions {
            insecure: self.insecure_source,
            auth,
            http: self.http(source, &env)?,
            roots: roots(&self.source_ca)?,
            proxies: None,
            policy: self.policy()?,
            s3: self.s3.options(|name| env(name)?.into_string().ok())?,
            verify_key: self.verify_key.as_deref().map(VerifyKey::read).transpose()?,
        })
    }

    fn http(&self, source: &Source, env: impl Fn(&str) -> Option<OsString>) -> anyhow::Result<HttpOptions> {
        let mut http = HttpOptions::default();
        if let Some(path) = &self.source_headers {
            http.add_headers(&text(path)?).with_context(|| path.display().to_string())?;
        }
        if let Some(path) = &self.source_basic {
            http.set_basic(line(&text(path)?)).with_context(|| path.display().to_string())?;
        }
        if let Some(path) = &self.source_bearer {
            http.set_bearer(line(&text(path)?)).with_context(|| path.display().to_string())?;
        }
        if let (Some(certificate), Some(key)) = (&self.source_cert, &self.source_key) {
            identify(&mut http, certificate, key)?;
        }
        // Who has set the variables once and for all still reads other sources.
        let of_env = |name| env(name).and_then(|value| value.into_string().ok());
        if let (Source::Http(_), Some(username)) = (source, of_env(ENV_USERNAME))
            && self.source_basic.is_none()
            && self.source_bearer.is_none()
        {
            let password = of_env(ENV_PASSWORD).unwrap_or_default();
            http.set_basic(&format!("{username}:{password}")).context(ENV_USERNAME)?;
        }
        Ok(http)
    }

    fn policy(&self) -> anyhow::Result<Option<Arc<SourcePolicy>>> {
        let Some(path) = &self.source_policy else { return Ok(None) };
        let policy = SourcePolicy::parse(&text(path)?).with_context(|| path.display().to_string())?;
        Ok(Some(Arc::new(policy)))
    }
}

/// How a source is reached, as operators say it.
#[derive(Clone, Debug, Default)]
pub struct Trust {
    /// Accept any certificate, and plain HTTP.
    pub insecure: bool,
    /// Files or folders with certificates (PEM).
    pub roots: Vec<PathBuf>,
    /// A file with what the source may be.
    pub policy: Option<PathBuf>,
}

impl Trust {
    /// Reads the files; `credentials` are user and password of an HTTP source.
    pub fn options(
        self,
        source: &Source,
        auth: AuthStore,
        credentials: Option<(&str, &str)>,
    ) -> anyhow::Result<SourceOptions> {
        let Self { insecure: insecure_source, roots: source_ca, policy: source_policy } = self;
        let args = Args { insecure_source, source_ca, source_policy, ..Args::default() };
        let mut options = args.options(source, auth, |name| std::env::var_os(name))?;
        if let (Source::Http(_), Some((user, password))) = (source, credentials) {
            options.http.set_basic(&format!("{user}:{password}")).context("the credentials of the source")?;
        }
        Ok(options)
    }
}

/// Reads a file with certificates, or those of a folder.
///
/// # Errors
/// Also when there is none.
pub fn certificates(path: &Path) -> anyhow::Result<Vec<u8>> {
    let pem = match fs::metadata(path).with_context(|| path.display().to_string())?.is_dir() {
        true => read_folder(path)?,
        false => read(path)?,
    };
    if !holds_certificate(&pem) {
        bail!("{} holds no certificate in PEM", path.display());
    }
    Ok(pem)
}

/// Reads a certificate of ours, and its key.
pub fn identify(http: &mut HttpOptions, certificate: &Path, key: &Path) -> anyhow::Result<()> {
    let identified = http.set_identity(&read(certificate)?, &read(key)?);
    identified.with_context(|| format!("{} and {}", certificate.display(), key.display()))
}

/// Reads all certificates of some files and folders.
pub fn roots(paths: &[PathBuf]) -> anyhow::Result<Vec<u8>> {
    let mut roots = Vec::new();
    for path in paths {
        roots.extend(certificates(path)?);
        roots.push(b'\n');
    }
    Ok(roots)
}

/// What the client of a registry trusts; `roots` are files or folders with certificates (PEM).
pub fn network(paths: &[PathBuf]) -> anyhow::Result<Network> {
    Ok(Network { roots: roots(paths)?, ..Network::default() })
}

/// The certificates of a folder, such as a mounted ConfigMap, which has other files and links beside them.
fn read_folder(path: &Path) -> anyhow::Result<Vec<u8>> {
    let shown = || path.display().to_string();
    let mut files = Vec::new();
    for entry in fs::read_dir(path).with_context(shown)? {
        let entry = entry.with_context(shown)?;
        if entry.file_name().as_encoded_bytes().starts_with(b".") || !entry.path().is_file() {
            continue;
        }
        if files.len() >= CA_FILES_MAX {
            bail!("{} has more than {CA_FILES_MAX} files; put the certificates into one", path.display());
        }
        files.push(entry.path());
    }
    files.sort();
    let mut pem = Vec::new();
    for file in files {
        let bytes = read(&file)?;
        if holds_certificate(&bytes) {
            pem.extend(bytes);
            pem.push(b'\n');
        }
    }
    Ok(pem)
}

fn holds_certificate(pem: &[u8]) -> bool {
    pem.windows(PEM_CERTIFICATE.len()).any(|window| window == PEM_CERTIFICATE)
}

/// Reads a file of settings, secrets or certificates, which is not large.
pub fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let file = File::open(path).with_context(|| path.display().to_string())?;
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).with_context(|| path.display().to_string())?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        bail!("{} is larger than {FILE_BYTES_MAX} bytes", path.display());
    }
    Ok(bytes)
}

fn text(path: &Path) -> anyhow::Result<String> {
    String::from_utf8(read(path)?).map_err(|_| anyhow::anyhow!("{} is not a text", path.display()))
}

/// A secret without the end of its line.
fn line(text: &str) -> &str {
    text.trim_end_matches(['\r', '\n'])
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        source: Args,
    }

    fn options(args: &[&str], env: &[(&str, &str)], source: &str) -> anyhow::Result<SourceOptions> {
        let command = Command::try_parse_from(["test"].iter().chain(args))?;
        let find = |name: &str| env.iter().find(|(known, _)| *known == name).map(|(_, value)| value.into());
        command.source.options(&source.parse().unwrap(), AuthStore::default(), find)
    }

    #[test]
    fn secrets_come_from_files_and_stay_hidden() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        fs::write(path("headers"), "X-Token: s3cret\n").unwrap();
        fs::write(path("basic"), "alice:s3cret\n").unwrap();
        fs::write(path("bearer"), "s3cret\n").unwrap();
        fs::write(path("wrong"), "X-Token: good\ns3cret\n").unwrap();
        for (flag, file) in
            [("--source-headers", "headers"), ("--source-basic", "basic"), ("--source-bearer", "bearer")]
        {
            let options = options(&[flag, &path(file)], &[], "https://h/").unwrap();
            assert!(!options.http.is_empty(), "{flag}");
            assert!(!format!("{options:?}").contains("s3cret"), "{options:?}");
        }
        let error = options(&["--source-headers", &path("wrong")], &[], "https://h/").unwrap_err();
        let shown = format!("{error:?}");
        assert!(shown.contains("line 2") && shown.contains("wrong") && !shown.contains("s3cret"), "{shown}");
        assert!(
            options(&["--source-cert", &path("basic")], &[], "https://h/").is_err(),
            "a key belongs to it"
        );
        let both = ["--source-basic", &path("basic"), "--source-bearer", &path("bearer")];
        assert!(options(&both, &[], "https://h/").is_err());
        assert!(options(&["--source-basic", &path("none")], &[], "https://h/").is_err());
    }

    #[test]
    fn the_variables_are_for_http_sources_and_count_less_than_flags() {
        let dir = tempfile::tempdir().unwrap();
        let token = dir.path().join("token");
        fs::write(&token, "t0ken").unwrap();
        let env = [(ENV_USERNAME, "alice"), (ENV_PASSWORD, "s3cret")];
        assert!(!options(&[], &env, "https://h/").unwrap().http.is_empty());
        assert!(options(&[], &env, "docker://h/a").unwrap().http.is_empty());
        assert!(options(&[], &[], "https://h/").unwrap().http.is_empty());
        options(&["--source-bearer", token.to_str().unwrap()], &env, "https://h/").unwrap();
    }

    /// As a ConfigMap is mounted: the files are links into a folder whose name begins with a dot.
    #[test]
    fn certificates_come_from_files_and_folders() {
        let dir = tempfile::tempdir().unwrap();
        let pem = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----";
        let data = dir.path().join("..data");
        fs::create_dir(&data).unwrap();
        for (name, content) in [("a.crt", pem), ("b.pem", pem), ("notes.txt", "hello")] {
            fs::write(data.join(name), content).unwrap();
            std::os::unix::fs::symlink(data.join(name), dir.path().join(name)).unwrap();
        }
        let roots = |path: &Path| {
            let options = options(&["--source-ca", path.to_str().unwrap()], &[], "https://h/");
            options.map(|options| String::from_utf8(options.roots).unwrap().matches("BEGIN").count())
        };
        assert_eq!(roots(dir.path()).unwrap(), 2);
        assert_eq!(roots(&data.join("a.crt")).unwrap(), 1);
        let empty = tempfile::tempdir().unwrap();
        for bad in [empty.path(), &data.join("notes.txt"), Path::new("/no/such/file")] {
            let error = roots(bad).unwrap_err();
            assert!(format!("{error:?}").contains(bad.to_str().unwrap()), "{error:?}");
        }
    }

    #[test]
    fn a_policy_is_a_file_whose_mistakes_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("policy.yaml");
        let given = ["--source-policy", path.to_str().unwrap()];
        fs::write(&path, "https_only: true\n").unwrap();
        assert!(options(&given, &[], "https://h/").unwrap().policy.is_some());
        assert!(options(&[], &[], "https://h/").unwrap().policy.is_none());
        fs::write(&path, "https_onyl: true\n").unwrap();
        let error = format!("{:?}", options(&given, &[], "https://h/").unwrap_err());
        assert!(error.contains("https_onyl") && error.contains("policy.yaml"), "{error}");
    }
}
