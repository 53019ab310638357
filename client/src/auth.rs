//! Credentials: where they are found, and how a registry asks for them.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use crate::{Error, ErrorKind, Reference, Result};

/// Largest credentials file read, bytes.
const AUTH_FILE_BYTES_MAX: u64 = 1 << 20;

/// A user name and password. `Debug` shows neither.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    /// User name.
    pub username: String,
    /// Password or token.
    pub password: String,
}

impl Credentials {
    /// The value of an `Authorization` header, RFC 7617.
    pub fn basic(&self) -> String {
        format!("Basic {}", STANDARD.encode(format!("{}:{}", self.username, self.password)))
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials(..)")
    }
}

/// The `auths` of the credential files that apply, most important file first.
///
/// Credential helpers (`credsStore`, `credHelpers`) are not run.
#[derive(Clone, Debug, Default)]
pub struct AuthStore {
    files: Vec<HashMap<String, Credentials>>,
}

#[derive(Deserialize)]
struct AuthFile {
    #[serde(default)]
    auths: HashMap<String, AuthEntry>,
}

#[derive(Deserialize)]
struct AuthEntry {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
}

impl AuthStore {
    /// Reads `explicit` (which must exist), else what `REGISTRY_AUTH_FILE` names (which must exist), else
    /// `$XDG_RUNTIME_DIR/containers/auth.json` and `$DOCKER_CONFIG/config.json` or `~/.docker/config.json`, those
    /// that exist. `env` looks up an environment variable.
    pub fn discover(explicit: Option<&Path>, env: impl Fn(&str) -> Option<OsString>) -> Result<Self> {
        let env = |name: &str| env(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        if let Some(path) = explicit.map(Path::to_owned).or_else(|| env("REGISTRY_AUTH_FILE")) {
            return Ok(Self { files: vec![read_file(&path)?] });
        }
        let containers = env("XDG_RUNTIME_DIR").map(|dir| dir.join("containers/auth.json"));
        let docker = env("DOCKER_CONFIG").or_else(|| env("HOME").map(|home| home.join(".docker")));
        let docker = docker.map(|dir| dir.join("config.json"));
        let present = [containers, docker].into_iter().flatten().filter(|path| path.exists());
        Ok(Self { files: present.map(|path| read_file(&path)).collect::<Result<_>>()? })
    }

    /// A store that knows one registry.
    pub fn single(host: &str, credentials: Credentials) -> Self {
        Self { files: vec![HashMap::from([(host.to_owned(), credentials)])] }
    }

    /// The credentials for a whole registry, `host[:port]`.
    pub fn of_host(&self, host: &str) -> Option<&Credentials> {
        let host = historic_host(host);
        self.files.iter().find_map(|entries| {
            let is_its = |key: &str| historic_host(key) == host;
            entries.get(host).or_else(|| entries.iter().find(|(key, _)| is_its(key)).map(|(_, found)| found))
        })
    }

    /// The credentials for `reference`: the longest entry of the form `host/path` that contains the repository, else
    /// `host`, in any of its historic spellings (`https://host/v1/`).
    pub fn find(&self, reference: &Reference) -> Option<&Credentials> {
        let full = format!("{}/{}", reference.host(), reference.repository());
        self.files.iter().find_map(|entries| {
            let mut key = full.as_str();
            loop {
                if let Some(found) = entries.get(key) {
                    return Some(found);
                }
                match key.rfind('/') {
                    Some(at) => key = &key[..at],
                    None => break,
                }
            }
            entries.iter().find(|(key, _)| historic_host(key) == reference.host()).map(|(_, found)| found)
        })
    }
}

/// The host that a key such as `https://index.docker.io/v1/` means.
fn historic_host(key: &str) -> &str {
    let rest = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
    let is_url = rest.len() != key.len();
    match rest.split_once('/') {
        Some((_, path)) if !is_url && !matches!(path, "" | "v1/" | "v2/" | "v1" | "v2") => "",
        Some(("index.docker.io" | "registry-1.docker.io", _)) => "docker.io",
        Some((host, _)) => host,
        None if matches!(rest, "index.docker.io" | "registry-1.docker.io") => "docker.io",
        None => rest,
    }
}

fn read_file(path: &Path) -> Result<HashMap<String, Credentials>> {
    let shown = path.display();
    let bad = |why: &str| Error::new(ErrorKind::Invalid, format!("credentials file {shown}: {why}"));
    let failed =
        |e: std::io::Error| Error::with(ErrorKind::Invalid, format!("reading credentials file {shown}"), e);
    if std::fs::metadata(path).map_err(failed)?.len() > AUTH_FILE_BYTES_MAX {
        return Err(bad(&format!("is larger than {AUTH_FILE_BYTES_MAX} bytes")));
    }
    let bytes = std::fs::read(path).map_err(failed)?;
    // The parser's own message could quote a secret.
    let file: AuthFile = serde_json::from_slice(&bytes)
        .map_err(|e| bad(&format!("is not JSON of the form {{\"auths\": {{..}}}}, see line {}", e.line())))?;
    let mut entries = HashMap::new();
    for (key, entry) in file.auths {
        if let Some(credentials) = entry_credentials(&entry) {
            entries.insert(key, credentials);
        } else if entry.auth.is_some_and(|auth| !auth.is_empty()) {
            return Err(bad(&format!("the auth of {key:?} is not base64 of user:password")));
        }
    }
    Ok(entries)
}

fn entry_credentials(entry: &AuthEntry) -> Option<Credentials> {
    if let Some(auth) = entry.auth.as_deref().filter(|auth| !auth.is_empty()) {
        let text = String::from_utf8(STANDARD.decode(auth.trim()).ok()?).ok()?;
        let (username, password) = text.split_once(':')?;
        let password = password.trim_end_matches('\0');
        return Some(Credentials { username: username.to_owned(), password: password.to_owned() });
    }
    Some(Credentials { username: entry.username.clone()?, password: entry.password.clone()? })
}

/// What a registry asks for in a `WWW-Authenticate` header, RFC 9110 section 11.6.1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Challenge {
    Basic,
    Bearer { realm: String, service: Option<String>, scope: Option<String> },
}

impl Challenge {
    /// The best challenge of all header values: Bearer before Basic; `None` if neither is there.
    pub(crate) fn parse<'a>(values: impl Iterator<Item = &'a str>) -> Option<Self> {
        let mut basic = None;
        for value in values {
            for (scheme, parameters) in split_challenges(value) {
                let get = |name: &str| parameters.iter().find(|(key, _)| key == name).map(|(_, v)| v.clone());
                if scheme.eq_ignore_ascii_case("bearer")
                    && let Some(realm) = get("realm")
                {
                    return Some(Self::Bearer { realm, service: get("service"), scope: get("scope") });
                } else if scheme.eq_ignore_ascii_case("basic") {
                    basic = Some(Self::Basic);
                }
            }
        }
        basic
    }
}

type Parameters = Vec<(String, String)>;

/// Splits `Scheme a=b, c="d, e", Scheme2 ...` into schemes with their parameters.
fn split_challenges(value: &str) -> Vec<(String, Parameters)> {
    let mut challenges: Vec<(String, Parameters)> = Vec::new();
    let mut rest = value.trim_start_matches([' ', ',', '\t']);
    while !rest.is_empty() {
        let word_end = rest.find([' ', '=', ',', '\t']).unwrap_or(rest.len());
        let (word, after) = rest.split_at(word_end);
        let after_blank = after.trim_start_matches([' ', '\t']);
        if let Some(argument) = after_blank.strip_prefix('=').filter(|_| !challenges.is_empty()) {
            let (argument, next) = parameter_value(argument.trim_start());
            if let Some((_, parameters)) = challenges.last_mut() {
                parameters.push((word.to_ascii_lowercase(), argument));
            }
            rest = next;
        } else {
            challenges.push((word.to_owned(), Vec::new()));
            // A stray '=' must not stop the scan from moving on.
            rest = after_blank.trim_start_matches('=');
        }
        rest = rest.trim_start_matches([' ', ',', '\t']);
    }
    challenges
}

/// A token or a quoted string, and what follows it.
fn parameter_value(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find([',', ' ']).unwrap_or(text.len());
        return (text[..end].to_owned(), &text[end..]);
    };
    let mut value = String::new();
    let mut characters = quoted.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return (value, &quoted[at + 1..]),
            '\\' => value.extend(characters.next().map(|(_, escaped)| escaped)),
            other => value.push(other),
        }
    }
    (value, "")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn write(dir: &Path, name: &str, content: &str) -> PathBuf {
        let path = dir.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, content).unwrap();
        path
    }

    fn entry(user: &str) -> String {
        format!("{{\"auth\": \"{}\"}}", STANDARD.encode(format!("{user}:pass:word")))
    }

    fn user(store: &AuthStore, reference: &str) -> Option<String> {
        store.find(&reference.parse().unwrap()).map(|credentials| credentials.username.clone())
    }

    #[test]
    fn the_most_exact_entry_wins() {
        let dir = tempfile::tempdir().unwrap();
        let content = format!(
            "{{\"auths\": {{\"r.example\": {}, \"r.example/team\": {}, \"https://index.docker.io/v1/\": {},
               \"other.example:5000\": {{\"username\": \"plain\", \"password\": \"p\"}}, \"empty.example\": {{}}}}}}",
            entry("host"),
            entry("team"),
            entry("hub")
        );
        let path = write(dir.path(), "auth.json", &content);
        let store = AuthStore::discover(Some(&path), |_| None).unwrap();
        assert_eq!(user(&store, "r.example/a/b").as_deref(), Some("host"));
        assert_eq!(user(&store, "r.example/team/b").as_deref(), Some("team"));
        assert_eq!(user(&store, "r.example/teams/b").as_deref(), Some("host"));
        assert_eq!(user(&store, "debian").as_deref(), Some("hub"));
        assert_eq!(user(&store, "other.example:5000/a").as_deref(), Some("plain"));
        assert_eq!(user(&store, "other.example/a"), None);
        assert_eq!(user(&store, "empty.example/a"), None);
        let credentials = store.find(&"r.example/a".parse().unwrap()).unwrap();
        assert_eq!(credentials.password, "pass:word");
        assert!(!format!("{store:?}").contains("pass"));
    }

    #[test]
    fn files_are_looked_up_in_the_documented_order() {
        let dir = tempfile::tempdir().unwrap();
        let file = |user: &str| format!("{{\"auths\": {{\"r.example\": {}}}}}", entry(user));
        let explicit = write(dir.path(), "explicit.json", &file("explicit"));
        let named = write(dir.path(), "named.json", &file("named"));
        write(dir.path(), "run/containers/auth.json", &file("run"));
        write(dir.path(), "home/.docker/config.json", &file("home"));
        let all = |name: &str| match name {
            "REGISTRY_AUTH_FILE" => Some(named.clone().into_os_string()),
            "XDG_RUNTIME_DIR" => Some(dir.path().join("run").into_os_string()),
            "HOME" => Some(dir.path().join("home").into_os_string()),
            _ => None,
        };
        let found = |store: Result<AuthStore>| user(&store.unwrap(), "r.example/a").unwrap();
        assert_eq!(found(AuthStore::discover(Some(&explicit), all)), "explicit");
        assert_eq!(found(AuthStore::discover(None, all)), "named");
        assert_eq!(found(AuthStore::discover(None, |n| all(n).filter(|_| n != "REGISTRY_AUTH_FILE"))), "run");
        assert_eq!(found(AuthStore::discover(None, |n| all(n).filter(|_| n == "HOME"))), "home");
        assert!(AuthStore::discover(None, |_| None).unwrap().find(&"r.example/a".parse().unwrap()).is_none());
        assert!(AuthStore::discover(Some(&dir.path().join("absent")), |_| None).is_err());
    }

    #[test]
    fn a_broken_file_is_an_error_that_shows_no_secret() {
        let dir = tempfile::tempdir().unwrap();
        for content in
            ["{\"auths\": {\"r\": {\"auth\": \"%%secret\"}}}", "{\"auths\": [\"secret\"]}", "secret"]
        {
            let path = write(dir.path(), "auth.json", content);
            let error = AuthStore::discover(Some(&path), |_| None).unwrap_err();
            assert!(
                !error.to_string().contains("secret") && error.to_string().contains("auth.json"),
                "{error}"
            );
        }
    }

    #[test]
    fn challenges_are_parsed_as_servers_write_them() {
        let parse = |values: &[&str]| Challenge::parse(values.iter().copied());
        assert_eq!(parse(&["Basic realm=\"dvcr\""]), Some(Challenge::Basic));
        let bearer = Challenge::Bearer {
            realm: "https://auth.example/token".into(),
            service: Some("registry, \"one\"".into()),
            scope: Some("repository:a:pull,push".into()),
        };
        let text = r#"Bearer realm="https://auth.example/token",service="registry, \"one\"",scope="repository:a:pull,push""#;
        assert_eq!(parse(&[text]), Some(bearer.clone()));
        assert_eq!(parse(&["Basic realm=x", text]), Some(bearer.clone()));
        assert_eq!(parse(&[&format!("Basic realm=\"x\", {text}")]), Some(bearer));
        assert_eq!(parse(&["Negotiate", "Bearer service=x"]), None);
        assert_eq!(parse(&[]), None);
    }

    proptest! {
        #[test]
        fn no_header_makes_the_parser_panic_or_hang(value in "\\PC{0,60}") {
            let _ = Challenge::parse([value.as_str()].into_iter());
        }
    }
}
