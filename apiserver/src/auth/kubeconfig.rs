//! Kubeconfigs: where the server is, how it is known, and who asks (kubeconfig v1, "Organizing Cluster Access Using kubeconfig Files").

use std::fmt;
use std::io;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::files;
use super::pki::Identity;

/// What a user shows to the server.
#[derive(Clone)]
pub enum Credential {
    /// A client certificate.
    Certificate(Identity),
    /// A bearer token.
    Token(String),
}

impl fmt::Debug for Credential {
    /// Leaves the secrets out.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Certificate(_) => "Certificate",
            Self::Token(_) => "Token",
        })
    }
}

/// One server, one user, one context.
#[derive(Clone, Debug)]
pub struct Kubeconfig {
    /// Name of the server in the file.
    pub cluster: String,
    /// Its URL, `https://HOST:PORT`.
    pub server: String,
    /// Certificate of its authority, PEM.
    pub authority: String,
    /// Name of the user in the file.
    pub user: String,
    pub credential: Credential,
    /// Namespace of requests that name none; `default` without.
    pub namespace: Option<String>,
}

impl Kubeconfig {
    /// Renders the file, in YAML.
    pub fn render(&self) -> String {
        // Strings of JSON are strings of YAML.
        let quoted = |text: &str| serde_json::Value::from(text).to_string();
        let data = |text: &str| STANDARD.encode(text);
        let credential = match &self.credential {
            Credential::Certificate(identity) => format!(
                "    client-certificate-data: {}\n    client-key-data: {}\n",
                data(&identity.certificate),
                data(&identity.key)
            ),
            Credential::Token(token) => format!("    token: {}\n", quoted(token)),
        };
        let namespace = match &self.namespace {
            Some(namespace) => format!("    namespace: {}\n", quoted(namespace)),
            None => String::new(),
        };
        let context = format!("{}@{}", self.user, self.cluster);
        format!(
            "apiVersion: v1\nkind: Config\nclusters:\n- name: {cluster}\n  cluster:\n    server: {server}\n    \
             certificate-authority-data: {authority}\nusers:\n- name: {user}\n  user:\n{credential}contexts:\n- name: {context}\n  \
             context:\n    cluster: {cluster}\n    user: {user}\n{namespace}current-context: {context}\n",
            cluster = quoted(&self.cluster),
            server = quoted(&self.server),
            authority = data(&self.authority),
            user = quoted(&self.user),
            context = quoted(&context),
        )
    }

    /// Writes the file, readable by its owner alone; it is there whole or as it was. Blocks.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        files::write(path, &self.render())
    }
}

#[cfg(test)]
mod tests;
