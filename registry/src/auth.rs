//! Who may speak to the registry.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest, Sha256};
use tokio::sync::Semaphore;

use crate::{Error, Result};

/// Verified credentials remembered, so that bcrypt runs once per client; when there are more all are forgotten.
const VERIFIED_MAX: usize = 1024;
/// bcrypt runs at a time: it is slow on purpose, and must not take every core.
const VERIFICATIONS_MAX: usize = 2;
/// Largest htpasswd file, bytes.
const HTPASSWD_BYTES_MAX: u64 = 4 << 20;
/// What an unknown user's password is compared with, so that the answer takes as long as for a known one.
const NOBODY: &str = "$2b$10$abcdefghijklmnopqrstuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuu";

/// Who is let in.
#[derive(Clone, Debug, Default)]
pub enum Auth {
    /// Everybody may do everything.
    #[default]
    Anonymous,
    /// The users of a file may do everything, others nothing.
    Htpasswd(Htpasswd),
}

/// The users of an htpasswd file, with bcrypt hashes.
#[derive(Clone)]
pub struct Htpasswd(Arc<Users>);

struct Users {
    hashes: HashMap<String, String>,
    /// Salted hashes of credentials that were verified.
    verified: Mutex<HashSet<[u8; 32]>>,
    salt: [u8; 16],
    verifications: Arc<Semaphore>,
}

impl Htpasswd {
    /// Reads a file of `user:hash` lines, as `htpasswd -B` writes it; empty lines and `#` comments are passed over.
    ///
    /// # Errors
    /// When the file cannot be read, or a line is not of that form: other hashes than bcrypt are refused.
    pub fn load(path: &Path) -> Result<Self> {
        let read = || {
            let length = fs::metadata(path)?.len();
            if length > HTPASSWD_BYTES_MAX {
                let message = format!("{length} bytes are more than {HTPASSWD_BYTES_MAX}");
                return Err(std::io::Error::new(std::io::ErrorKind::FileTooLarge, message));
            }
            fs::read_to_string(path)
        };
        let text = read().map_err(|source| Error::Read { path: path.to_owned(), source })?;
        Self::parse(&text).map_err(|(line, why)| Error::Htpasswd { path: path.to_owned(), line, why })
    }

    fn parse(text: &str) -> Result<Self, (usize, &'static str)> {
        let mut hashes = HashMap::new();
        for (at, line) in text.lines().enumerate().map(|(at, line)| (at + 1, line.trim())) {
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let Some((user, hash)) = line.split_once(':') else {
                return Err((at, "is not of the form user:hash"));
            };
            let bcrypt = ["$2y$", "$2b$", "$2a$"].iter().any(|prefix| hash.starts_with(prefix));
            if user.is_empty() || !bcrypt || hash.len() != NOBODY.len() {
                return Err((at, "has no bcrypt hash; make one with `htpasswd -B`"));
            }
            hashes.insert(user.to_owned(), hash.to_owned());
        }
        if hashes.is_empty() {
            return Err((1, "names no user; add one with `htpasswd -B`"));
        }
        Ok(Self(Arc::new(Users {
            hashes,
            verified: Mutex::default(),
            salt: *uuid::Uuid::new_v4().as_bytes(),
            verifications: Arc::new(Semaphore::new(VERIFICATIONS_MAX)),
        })))
    }

    /// Checks the value of an `Authorization` header and returns the user.
    pub(crate) async fn verify(&self, authorization: &[u8]) -> Option<String> {
        let (user, password) = basic(authorization)?;
        let users = Arc::clone(&self.0);
        // What is remembered and looked up is a salted hash: its bytes tell nothing about the password, and neither
        // does the time the lookup takes.
        let key: [u8; 32] = Sha256::new()
            .chain_update(users.salt)
            .chain_update((user.len() as u64).to_be_bytes())
            .chain_update(&user)
            .chain_update(&password)
            .finalize()
            .into();
        if users.verified().contains(&key) {
            return Some(user);
        }
        let permit = Arc::clone(&users.verifications).acquire_owned().await.ok()?;
        let (accepted, user) = tokio::task::spawn_blocking(move || {
            let known = users.hashes.get(&user);
            let matches = bcrypt::verify(&password, known.map_or(NOBODY, String::as_str)).unwrap_or(false);
            let accepted = matches && known.is_some();
            if accepted {
                let mut verified = users.verified();
                if verified.len() >= VERIFIED_MAX {
                    verified.clear();
                }
                verified.insert(key);
            }
            drop(permit);
            (accepted, user)
        })
        .await
        .ok()?;
        accepted.then_some(user)
    }
}

impl Users {
    fn verified(&self) -> std::sync::MutexGuard<'_, HashSet<[u8; 32]>> {
        self.verified.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Htpasswd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Htpasswd({} users)", self.0.hashes.len())
    }
}

fn basic(authorization: &[u8]) -> Option<(String, String)> {
    let text = std::str::from_utf8(authorization).ok()?;
    let (scheme, credentials) = text.split_once(' ')?;
    if !scheme.eq_ignore_ascii_case("basic") {
        return None;
    }
    let decoded = String::from_utf8(STANDARD.decode(credentials.trim()).ok()?).ok()?;
    let (user, password) = decoded.split_once(':')?;
    Some((user.to_owned(), password.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(user: &str, password: &str) -> Vec<u8> {
        format!("Basic {}", STANDARD.encode(format!("{user}:{password}"))).into_bytes()
    }

    #[tokio::test]
    async fn only_the_right_password_of_a_known_user_is_accepted() {
        let hash = bcrypt::hash("secret", 4).unwrap();
        let users = Htpasswd::parse(&format!("# users\n\nadmin:{hash}\n")).unwrap();
        // Twice: the second time from memory.
        for _ in 0..2 {
            assert_eq!(users.verify(&header("admin", "secret")).await.as_deref(), Some("admin"));
            assert_eq!(users.verify(&header("admin", "wrong")).await, None);
            assert_eq!(users.verify(&header("nobody", "secret")).await, None);
        }
        assert_eq!(users.0.verified().len(), 1);
        for bad in [&b"Bearer x"[..], b"Basic", b"Basic !!", b"", b"\xff"] {
            assert_eq!(users.verify(bad).await, None);
        }
    }

    #[test]
    fn other_hashes_than_bcrypt_are_refused_with_their_line() {
        let bcrypt = bcrypt::hash("x", 4).unwrap();
        for (text, line) in [
            ("", 1),
            ("admin", 1),
            ("admin:{SHA}W6ph5Mm5Pz8GgiULbPgzG37mj9g=", 1),
            (&format!("a:{bcrypt}\nb:$apr1$x$y"), 2),
            (&format!(":{bcrypt}"), 1),
        ] {
            assert_eq!(Htpasswd::parse(text).err().unwrap().0, line, "{text}");
        }
    }

    #[test]
    fn the_stand_in_for_unknown_users_is_a_hash_that_takes_time() {
        assert!(!bcrypt::verify("x", NOBODY).unwrap());
    }

    #[test]
    fn debug_output_tells_no_hash() {
        let hash = bcrypt::hash("x", 4).unwrap();
        let users = Auth::Htpasswd(Htpasswd::parse(&format!("admin:{hash}")).unwrap());
        assert!(!format!("{users:?}").contains("$2"));
    }
}
