//! Which bucket it is, and how it is spoken to.

use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::multipart::{PART_BYTES_MAX, PART_BYTES_MIN};
use crate::units::{Size, Time};

const PART_SIZE: Size = Size(16 << 20);
const REQUEST_TIMEOUT: Time = Time(Duration::from_secs(30));
const ATTEMPTS: NonZeroU32 = NonZeroU32::MIN.saturating_add(4);
/// Longest name of a bucket or a root directory, bytes.
const NAME_BYTES_MAX: usize = 255;

/// A bucket of S3, or of what speaks like it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Settings {
    /// The bucket, which has to be there.
    pub bucket: String,
    /// The region that requests are signed for. Without it what the environment or the profile says counts, and with an
    /// endpoint `us-east-1`.
    pub region: Option<String>,
    /// `http://` or `https://`, host and port of a store that is not Amazon's.
    pub endpoint: Option<String>,
    /// Directory in the bucket that all keys lie below, as distribution's `rootdirectory`; empty is the whole bucket.
    pub root_directory: String,
    /// Whether the bucket is named in the path rather than in the host; by default, if there is an endpoint.
    pub path_style: Option<bool>,
    /// Certificates (PEM) that are trusted besides those of the system.
    pub ca_file: Option<PathBuf>,
    /// File with the id of a static key; goes with `secret_key_file`. Read again when the key is replaced.
    pub access_key_file: Option<PathBuf>,
    /// File with the secret of a static key.
    pub secret_key_file: Option<PathBuf>,
    /// Profile of the ordinary files, `~/.aws/config` and `~/.aws/credentials`.
    pub profile: Option<String>,
    /// Role that is taken by showing the token in `web_identity_token_file`.
    pub role_arn: Option<String>,
    /// File with a token, as Kubernetes mounts one.
    pub web_identity_token_file: Option<PathBuf>,
    /// Sign nothing, for a bucket that anybody may use.
    pub anonymous: bool,
    /// What the store encrypts with; what the bucket says, if nothing is said here.
    pub encryption: Option<Encryption>,
    /// The key of `aws:kms`; the account's own without it.
    pub kms_key_id: Option<String>,
    /// Such as `STANDARD_IA`; what the bucket says, if nothing is said here.
    pub storage_class: Option<String>,
    /// Bytes of the first parts of an upload.
    pub part_size: Size,
    /// How long the store may take to answer, and to send the next bytes of a body; a request that carries content has a
    /// second more for each MiB.
    pub request_timeout: Time,
    /// How often a request is sent at most, while the store does not answer or asks to come back.
    pub attempts: NonZeroU32,
}

/// How the store encrypts what it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Encryption {
    /// By a key of the store.
    #[serde(rename = "AES256")]
    Aes256,
    /// By a key of the key management service.
    #[serde(rename = "aws:kms")]
    Kms,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            bucket: String::new(),
            region: None,
            endpoint: None,
            root_directory: String::new(),
            path_style: None,
            ca_file: None,
            access_key_file: None,
            secret_key_file: None,
            profile: None,
            role_arn: None,
            web_identity_token_file: None,
            anonymous: false,
            encryption: None,
            kms_key_id: None,
            storage_class: None,
            part_size: PART_SIZE,
            request_timeout: REQUEST_TIMEOUT,
            attempts: ATTEMPTS,
        }
    }
}

impl Settings {
    /// All keys, with what they mean, as a section of a file of settings.
    pub const EXAMPLE: &'static str = r"
# An S3 bucket that holds the registry, in place of `root`; any number of replicas may share it
# (docs/registry-s3.md).
bucket:
  bucket: images                     # has to be there
  region: eu-central-1               # by default what the environment or the profile says
  endpoint: https://minio:9000       # a store that is not Amazon's
  root-directory: /registry          # all keys lie below it, as distribution's rootdirectory
  path-style: true                   # the bucket in the path, not in the host; by default if there is an endpoint
  ca-file: /run/secrets/ca.pem       # trusted besides the roots of the system
  # Who we are: one of these, or, without any, what the environment, the ordinary files of the profile
  # `default`, the container or the instance says.
  access-key-file: /run/secrets/access-key
  secret-key-file: /run/secrets/secret-key
  profile: registry
  role-arn: arn:aws:iam::123456789012:role/registry
  web-identity-token-file: /var/run/secrets/token
  anonymous: false
  encryption: aws:kms                # or AES256; by default what the bucket says
  kms-key-id: 1234abcd-12ab-34cd-56ef-1234567890ab
  storage-class: STANDARD_IA
  part-size: 16M                     # of the first parts of an upload, 5M to 5G
  request-timeout: 30s               # for an answer, or the next bytes of one
  attempts: 5                        # of a request that the store does not answer
";

    /// Says what cannot be meant.
    ///
    /// # Errors
    /// In a sentence, with what to write.
    pub fn check(&self) -> Result<(), String> {
        let bad = |name: &str| name.is_empty() || name.len() > NAME_BYTES_MAX || name.contains('/');
        if bad(&self.bucket) {
            return Err(format!("{:?} is no bucket: write its name alone in `bucket`", self.bucket));
        }
        let root = self.root();
        if root.len() > NAME_BYTES_MAX || root.split('/').any(|name| matches!(name, "." | "..")) {
            return Err(format!("{:?} is no root-directory: write a path without dots", self.root_directory));
        }
        if let Some(endpoint) = &self.endpoint {
            let is_url = reqwest::Url::parse(endpoint).is_ok_and(|url| {
                matches!(url.scheme(), "http" | "https") && url.has_host() && url.username().is_empty()
            });
            if !is_url {
                return Err(format!("{endpoint:?} is no endpoint: write https://host[:port]"));
            }
        }
        if self.access_key_file.is_some() != self.secret_key_file.is_some() {
            return Err("a static key needs both access-key-file and secret-key-file".to_owned());
        }
        if self.role_arn.is_some() != self.web_identity_token_file.is_some() {
            return Err("a web identity needs both role-arn and web-identity-token-file".to_owned());
        }
        let ways = [
            self.anonymous,
            self.access_key_file.is_some(),
            self.profile.is_some(),
            self.web_identity_token_file.is_some(),
        ];
        if ways.into_iter().filter(|given| *given).count() > 1 {
            let why = "give one of anonymous, access-key-file, profile and web-identity-token-file, or none";
            return Err(format!("there is more than one way to prove who we are: {why}"));
        }
        if self.kms_key_id.is_some() && self.encryption != Some(Encryption::Kms) {
            return Err("kms-key-id is for `encryption: aws:kms` alone".to_owned());
        }
        if !(PART_BYTES_MIN..=PART_BYTES_MAX).contains(&self.part_size.0) {
            let (min, max) = (Size(PART_BYTES_MIN), Size(PART_BYTES_MAX));
            return Err(format!(
                "a part-size of {} is not possible: S3 takes {min} to {max}",
                self.part_size
            ));
        }
        if self.request_timeout.0.is_zero() {
            return Err("a request-timeout of 0s lets no request succeed: 30s is usual".to_owned());
        }
        Ok(())
    }

    /// The root directory without slashes around it.
    pub(super) fn root(&self) -> &str {
        self.root_directory.trim_matches('/')
    }

    /// Whether the bucket is named in the path.
    pub(super) fn is_path_style(&self) -> bool {
        self.path_style.unwrap_or(self.endpoint.is_some())
    }

    /// Whether requests are encrypted on their way.
    pub(super) fn is_tls(&self) -> bool {
        !self.endpoint.as_ref().is_some_and(|endpoint| endpoint.starts_with("http://"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(json: &str) -> Result<Settings, String> {
        let settings: Settings = serde_json::from_str(json).map_err(|error| error.to_string())?;
        settings.check().map(|()| settings)
    }

    #[test]
    fn the_keys_of_a_file_are_in_kebab_case_and_sizes_have_units() {
        let read = settings(
            r#"{"bucket": "b", "endpoint": "http://127.0.0.1:9000", "root-directory": "/a/b/", "part-size": "8M",
                "request-timeout": "5s", "attempts": 3, "encryption": "aws:kms", "kms-key-id": "k"}"#,
        )
        .unwrap();
        assert_eq!(
            (read.root(), read.part_size, read.encryption),
            ("a/b", Size(8 << 20), Some(Encryption::Kms))
        );
        assert!(read.is_path_style() && !read.is_tls());
        let written: Settings = serde_json::from_str(&serde_json::to_string(&read).unwrap()).unwrap();
        assert_eq!(written, read);
        let amazon = settings(r#"{"bucket": "b"}"#).unwrap();
        assert!(!amazon.is_path_style() && amazon.is_tls());
    }

    #[test]
    fn what_cannot_be_meant_is_refused_with_what_to_write() {
        for (bad, told) in [
            (r#"{}"#, "`bucket`"),
            (r#"{"bucket": "a/b"}"#, "`bucket`"),
            (r#"{"bucket": "b", "buckt": 1}"#, "unknown field"),
            (r#"{"bucket": "b", "endpoint": "minio:9000"}"#, "https://host"),
            (r#"{"bucket": "b", "root-directory": "a/../b"}"#, "without dots"),
            (r#"{"bucket": "b", "access-key-file": "a"}"#, "secret-key-file"),
            (r#"{"bucket": "b", "role-arn": "a"}"#, "web-identity-token-file"),
            (r#"{"bucket": "b", "anonymous": true, "profile": "p"}"#, "more than one way"),
            (r#"{"bucket": "b", "kms-key-id": "k"}"#, "aws:kms"),
            (r#"{"bucket": "b", "encryption": "customer"}"#, "AES256"),
            (r#"{"bucket": "b", "part-size": "1M"}"#, "5M to 5G"),
            (r#"{"bucket": "b", "request-timeout": "0s"}"#, "30s is usual"),
        ] {
            let error = settings(bad).unwrap_err();
            assert!(error.contains(told), "{bad}: {error}");
        }
    }
}
