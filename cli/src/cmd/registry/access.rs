//! Flags that tell who may do what, and how the registry is reached.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::bail;
use clap::ArgGroup;
use dvcr_registry::{Auth, Bearer, Config, ExternalUrl, Pattern, Tls};

/// Who may do what. Files are read again when they change, and on SIGHUP.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Who may do what", group(ArgGroup::new("users").multiple(true)))]
pub struct AccessArgs {
    /// Serve anybody, on any address
    #[arg(long, conflicts_with = "users")]
    allow_anonymous: bool,

    /// File with the password of the user `admin`, who may do everything
    #[arg(long, value_name = "FILE", group = "users")]
    admin_password_file: Option<PathBuf>,

    /// File with the password of the user `node-puller`, who may pull from every repository
    #[arg(long, value_name = "FILE", group = "users")]
    node_puller_password_file: Option<PathBuf>,

    /// PEM file with the public key of tokens: ES256, with their rights inside, as passwords of any other user
    #[arg(long, value_name = "FILE", group = "users")]
    token_public_key: Option<PathBuf>,

    /// File of users and bcrypt hashes, as `htpasswd -B` writes it; they may do everything
    #[arg(long, value_name = "FILE", group = "users")]
    htpasswd: Option<PathBuf>,

    /// Repositories that anybody may pull from: `vi/team/disk`, `vi/team/*` or `**`; may be given several times
    #[arg(long, value_name = "PATTERN", group = "users")]
    anonymous_pull: Vec<Pattern>,

    /// Offer the Bearer flow too: tokens that are got from /token with a name and a password
    #[arg(long, requires = "users")]
    bearer: bool,

    /// PEM file with the private key, P-256, that signs these tokens; one is made at start without it
    #[arg(long, value_name = "FILE", requires = "bearer")]
    bearer_key: Option<PathBuf>,

    /// What clients call the registry, such as https://registry.example; without it, what their Host header says
    #[arg(long, value_name = "URL", requires = "bearer")]
    external_url: Option<ExternalUrl>,

    /// Believe a proxy's X-Forwarded-Proto and X-Forwarded-Host
    #[arg(long, requires = "bearer")]
    trust_forwarded: bool,

    /// PEM file with the certificate, and those between it and its root
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,

    /// PEM file with the private key of the certificate
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,

    /// PEM file with roots of clients' certificates; the common name is the user: `admin` may do everything, others pull
    #[arg(long, value_name = "FILE", requires = "tls_cert", group = "users")]
    client_ca: Option<PathBuf>,

    /// Serve without TLS on an address that is not loopback
    #[arg(long, conflicts_with = "tls_cert")]
    plain_http: bool,
}

impl AccessArgs {
    /// Puts the flags into a configuration.
    ///
    /// # Errors
    /// When the address is not loopback, and who may do what, or that there is no TLS, is not said.
    pub fn apply(self, listen: SocketAddr, config: &mut Config) -> anyhow::Result<()> {
        let names_users = self.names_users();
        if !listen.ip().is_loopback() {
            if !names_users && !self.allow_anonymous {
                bail!(
                    "{listen} is not a loopback address: name the users with --admin-password-file FILE, \
                     --htpasswd FILE or others of --help, or serve anybody with --allow-anonymous"
                );
            }
            if self.tls_cert.is_none() && !self.plain_http {
                bail!(
                    "{listen} is not a loopback address: give a certificate with --tls-cert FILE and --tls-key FILE, \
                     or serve without TLS, for a proxy that has it, with --plain-http"
                );
            }
        }
        config.auth = names_users.then(|| Auth {
            admin_password: self.admin_password_file,
            node_puller_password: self.node_puller_password_file,
            token_key: self.token_public_key,
            htpasswd: self.htpasswd,
            anonymous_pull: self.anonymous_pull,
            bearer: self.bearer.then_some(Bearer {
                key: self.bearer_key,
                external_url: self.external_url,
                trust_forwarded: self.trust_forwarded,
            }),
        });
        // The parser takes neither without the other.
        config.tls =
            self.tls_cert.zip(self.tls_key).map(|(cert, key)| Tls { cert, key, client_ca: self.client_ca });
        Ok(())
    }

    fn names_users(&self) -> bool {
        let files = [
            &self.admin_password_file,
            &self.node_puller_password_file,
            &self.token_public_key,
            &self.htpasswd,
            &self.client_ca,
        ];
        files.into_iter().any(Option::is_some) || !self.anonymous_pull.is_empty()
    }
}
