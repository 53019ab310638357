//! What is recorded, and who is told of it.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::queue::QUEUE_BYTES_MIN;
use crate::rules::Pattern;
use crate::units::{Size, Time};
use crate::{Error, Result};

/// Longest name of an endpoint, bytes.
const NAME_BYTES_MAX: usize = 64;
/// Most events in one request.
const BATCH_MAX: usize = 1000;

/// What is recorded of requests; nothing by default. `docs/registry-events.md` tells of both.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Events {
    /// File of JSON lines, appended to; made if it is not there.
    pub audit_log: Option<PathBuf>,
    pub webhooks: Vec<Webhook>,
}

/// An address that is told what happens, in the envelope of CNCF distribution.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Webhook {
    /// Names the endpoint in metrics, in the log, and the directory of its queue: `[a-z0-9][a-z0-9._-]*`.
    pub name: String,
    /// Where events are posted to, `http://` or `https://`. Never logged.
    pub url: String,
    /// Headers of each request.
    pub headers: BTreeMap<String, String>,
    /// Headers whose values are in files, which are read again when they change.
    pub secret_headers: BTreeMap<String, PathBuf>,
    /// PEM file with the roots of the endpoint's certificate; `None` is the system's.
    pub ca: Option<PathBuf>,
    /// How long one request may take.
    pub timeout: Time,
    /// Pause after a first failure; it doubles with each further one, up to a minute.
    pub backoff: Time,
    /// Events in one request, at most; 1 for receivers that look at the first only.
    pub batch: usize,
    /// Bytes of events that wait on disk, at most; the oldest make room.
    pub queue_bytes: Size,
    /// What is not told.
    pub ignore: Ignore,
    /// Repositories that are told of; none named is all.
    pub repositories: Vec<Pattern>,
}

/// What an endpoint is not told.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Ignore {
    /// Of manifests; blobs have `application/octet-stream`.
    pub media_types: Vec<String>,
    /// `push`, `pull`, `mount`, `delete`.
    pub actions: Vec<String>,
}

impl Default for Webhook {
    fn default() -> Self {
        Self {
            name: String::new(),
            url: String::new(),
            headers: BTreeMap::new(),
            secret_headers: BTreeMap::new(),
            ca: None,
            timeout: Time(Duration::from_secs(5)),
            backoff: Time(Duration::from_secs(1)),
            batch: 100,
            queue_bytes: Size(64 << 20),
            ignore: Ignore::default(),
            repositories: Vec::new(),
        }
    }
}

impl fmt::Debug for Webhook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Neither the address nor the values of headers: both may hold secrets.
        f.debug_struct("Webhook")
            .field("name", &self.name)
            .field("headers", &self.headers.keys())
            .field("secret_headers", &self.secret_headers)
            .field("timeout", &self.timeout)
            .field("backoff", &self.backoff)
            .field("batch", &self.batch)
            .field("queue_bytes", &self.queue_bytes)
            .field("ignore", &self.ignore)
            .field("repositories", &self.repositories)
            .finish_non_exhaustive()
    }
}

impl Events {
    /// Checks what the types leave open.
    pub(super) fn check(&self) -> Result<()> {
        for (at, hook) in self.webhooks.iter().enumerate() {
            hook.check()?;
            if self.webhooks[..at].iter().any(|other| other.name == hook.name) {
                let why = format!("two webhooks are called {:?}; give each a name of its own", hook.name);
                return Err(Error::Invalid { why });
            }
        }
        Ok(())
    }
}

impl Webhook {
    /// Every key, as it is written in a file.
    pub const EXAMPLE: &str = r#"
# Who is told of pushes, pulls, mounts and deletions (docs/registry-events.md). Only name and url are needed.
webhooks:
  - name: ci
    url: https://ci.example/hooks/registry
    # headers of each request; values that nobody may see are in files
    headers: {X-Source: registry}
    secret-headers: {Authorization: /run/secrets/ci-hook}
    # PEM file with the roots of its certificate, in place of the system's
    ca: /etc/dvcr/ci-ca.pem
    # how long one request may take, and the pause after it failed, which doubles up to a minute
    timeout: 5s
    backoff: 1s
    # events in one request; 1 for receivers that look at the first only
    batch: 100
    # events that wait on disk; then the oldest make room
    queue-bytes: 64M
    ignore:
      media-types: [application/octet-stream]
      actions: [pull]
    # which are told of; all by default
    repositories: [vi/**]
"#;

    fn check(&self) -> Result<()> {
        let Self { name, .. } = self;
        let bad = |why: String| Err(Error::Invalid { why });
        let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        let is_name = name.bytes().next().is_some_and(plain)
            && name.len() <= NAME_BYTES_MAX
            && name.bytes().all(|byte| plain(byte) || b"._-".contains(&byte));
        if !is_name {
            return bad(format!(
                "{name:?} cannot name a webhook; use up to {NAME_BYTES_MAX} lower-case letters and digits, and `.`, `_`, \
                 `-` behind the first"
            ));
        }
        if self.timeout.0.is_zero() || self.backoff.0.is_zero() {
            return bad(format!("webhook {name}: timeout and backoff cannot be 0; write 1s or more"));
        }
        if !(1..=BATCH_MAX).contains(&self.batch) {
            return bad(format!("webhook {name}: batch is {}; it can be 1 to {BATCH_MAX}", self.batch));
        }
        if self.queue_bytes < QUEUE_BYTES_MIN {
            let bytes = self.queue_bytes;
            return bad(format!(
                "webhook {name}: queue-bytes is {bytes}; it must be {QUEUE_BYTES_MIN} at least"
            ));
        }
        let unknown = self
            .ignore
            .actions
            .iter()
            .find(|action| !["push", "pull", "mount", "delete"].contains(&&***action));
        match unknown {
            Some(action) => bad(format!(
                "webhook {name}: {action:?} is no action; there are push, pull, mount and delete"
            )),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_webhook_is_read_as_it_is_written_and_shows_no_secrets() {
        let hook: Webhook = serde_json::from_value(json!({
            "name": "ci", "url": "https://user:secret1@ci.example/hook/secret2", "headers": {"X-Token": "secret3"},
            "secret-headers": {"Authorization": "/run/secrets/ci"}, "ca": "/etc/ca.pem", "timeout": "2s",
            "backoff": "1m", "batch": 1, "queue-bytes": "1M", "repositories": ["vi/**"],
            "ignore": {"media-types": ["application/octet-stream"], "actions": ["pull"]},
        }))
        .unwrap();
        assert_eq!((hook.timeout.0, hook.backoff.0), (Duration::from_secs(2), Duration::from_secs(60)));
        let events = Events { webhooks: vec![hook], ..Events::default() };
        events.check().unwrap();
        assert!(!format!("{events:?}").contains("secret1"), "{events:?}");
        assert!(!format!("{events:?}").contains("secret2"));
        assert!(!format!("{events:?}").contains("secret3"));
        assert!(serde_json::from_value::<Webhook>(json!({"nam": "x"})).is_err());
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_its_name() {
        let good = Webhook { name: "a".to_owned(), ..Webhook::default() };
        let with = |change: &dyn Fn(&mut Webhook)| {
            let mut hook = good.clone();
            change(&mut hook);
            Events { webhooks: vec![good.clone(), hook], ..Events::default() }.check()
        };
        with(&|hook| hook.name = "b.c-d_1".to_owned()).unwrap();
        for name in ["", "..", ".", "A", "a/b", "a", &"x".repeat(65)] {
            assert!(with(&|hook| hook.name = name.to_owned()).is_err(), "{name}");
        }
        let bad: [&dyn Fn(&mut Webhook); 4] = [
            &|hook| hook.batch = 0,
            &|hook| hook.queue_bytes = Size(1),
            &|hook| hook.timeout = Time(Duration::ZERO),
            &|hook| hook.ignore.actions = vec!["pulls".to_owned()],
        ];
        for change in bad {
            let error = with(&|hook| {
                hook.name = "second".to_owned();
                change(hook);
            });
            assert!(error.unwrap_err().to_string().contains("second"));
        }
    }
}
