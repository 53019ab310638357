//! Files of users and bcrypt hashes.

use std::collections::HashMap;

/// What an unknown user's password is compared with, so that the answer takes as long as for a known one.
pub(super) const NOBODY: &str = "$2b$10$abcdefghijklmnopqrstuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuu";

/// Reads `user:hash` lines, as `htpasswd -B` writes them; empty lines and `#` comments are passed over.
///
/// # Errors
/// The number and the fault of a line that is not of that form: other hashes than bcrypt are refused.
pub(super) fn parse(text: &str) -> Result<HashMap<String, String>, (usize, &'static str)> {
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
    Ok(hashes)
}

#[cfg(test)]
mod tests {
    use super::*;

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
            assert_eq!(parse(text).unwrap_err().0, line, "{text}");
        }
        assert_eq!(parse(&format!("# users\n\nadmin:{bcrypt}\n")).unwrap().len(), 1);
    }

    #[test]
    fn the_stand_in_for_unknown_users_is_a_hash_that_takes_time() {
        assert!(!bcrypt::verify("x", NOBODY).unwrap());
    }
}
