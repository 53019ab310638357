//! Who we are to the store.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use aws_config::ConfigLoader;
use aws_config::profile::ProfileFileCredentialsProvider;
use aws_config::provider_config::ProviderConfig;
use aws_config::web_identity_token::{StaticConfiguration, WebIdentityTokenCredentialsProvider};
use aws_credential_types::provider::error::CredentialsError;
use aws_credential_types::provider::future;
use aws_sdk_s3::config::{Credentials, ProvideCredentials};

use super::settings::Settings;

/// Largest file with a part of a key, bytes.
const KEY_BYTES_MAX: u64 = 4096;
/// How long a key is used before its files are read again.
const KEY_AGE: Duration = Duration::from_secs(300);
/// What a role that we take is to be called in the logs of the store.
const SESSION_NAME: &str = "dvcr-registry";

/// The ways to prove who we are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Source {
    Anonymous,
    Files {
        access_key: PathBuf,
        secret_key: PathBuf,
    },
    Profile(String),
    WebIdentity {
        role_arn: String,
        token: PathBuf,
    },
    /// What the SDKs of Amazon look at, in their order: the environment, the default profile, a web identity of the
    /// environment, the container's, the instance's.
    Chain,
}

impl Source {
    /// Returns the one way that the settings give; they were checked.
    pub(super) fn of(settings: &Settings) -> Self {
        if settings.anonymous {
            return Self::Anonymous;
        }
        if let (Some(access_key), Some(secret_key)) = (&settings.access_key_file, &settings.secret_key_file) {
            return Self::Files { access_key: access_key.clone(), secret_key: secret_key.clone() };
        }
        if let (Some(role_arn), Some(token)) = (&settings.role_arn, &settings.web_identity_token_file) {
            return Self::WebIdentity { role_arn: role_arn.clone(), token: token.clone() };
        }
        match &settings.profile {
            Some(profile) => Self::Profile(profile.clone()),
            None => Self::Chain,
        }
    }

    /// Tells it to those who load the other things that the environment says.
    pub(super) fn put_into(self, loader: ConfigLoader, provider: &ProviderConfig) -> ConfigLoader {
        match self {
            Self::Anonymous => loader.no_credentials(),
            Self::Files { access_key, secret_key } => {
                loader.credentials_provider(KeyFiles { access_key, secret_key })
            }
            Self::Profile(name) => loader.profile_name(&name).credentials_provider(
                ProfileFileCredentialsProvider::builder().configure(provider).profile_name(name).build(),
            ),
            Self::WebIdentity { role_arn, token } => {
                let session_name = SESSION_NAME.to_owned();
                let role = StaticConfiguration { web_identity_token_file: token, role_arn, session_name };
                let builder = WebIdentityTokenCredentialsProvider::builder().configure(provider);
                loader.credentials_provider(builder.static_configuration(role).build())
            }
            Self::Chain => loader,
        }
    }
}

/// A static key in two files.
#[derive(Debug)]
struct KeyFiles {
    access_key: PathBuf,
    secret_key: PathBuf,
}

impl ProvideCredentials for KeyFiles {
    fn provide_credentials<'a>(&'a self) -> future::ProvideCredentials<'a>
    where
        Self: 'a,
    {
        future::ProvideCredentials::new(async {
            let (id, secret) = (read(&self.access_key).await?, read(&self.secret_key).await?);
            let until = SystemTime::now().checked_add(KEY_AGE);
            Ok(Credentials::new(id, secret, None, until, "files"))
        })
    }
}

async fn read(path: &Path) -> Result<String, CredentialsError> {
    use tokio::io::AsyncReadExt;

    let bad = |why: &dyn std::fmt::Display| {
        CredentialsError::invalid_configuration(format!("cannot read a key from {}: {why}", path.display()))
    };
    let file = tokio::fs::File::open(path).await.map_err(|error| bad(&error))?;
    let mut text = String::new();
    file.take(KEY_BYTES_MAX).read_to_string(&mut text).await.map_err(|error| bad(&error))?;
    match text.trim() {
        "" => Err(bad(&"it is empty")),
        key => Ok(key.to_owned()),
    }
}
