//! Which manifests refer to a subject: an index of empty files beside distribution's layout.
//!
//! An entry is placed before the manifest it stands for and removed after it, so a lookup that passes over entries
//! without a manifest misses none and shows none too many. What another registry wrote to the directory meanwhile has no
//! entry: the first lookup in a repository goes through its manifests once.

use std::collections::HashSet;
use std::fs;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::blobs::found;
use super::sync::Changes;
use super::{Error, Result, Storage};
use crate::digest::Digest;
use crate::model;
use crate::names::RepoName;
use crate::store::Manifest;

/// Repositories remembered as gone through; when there are more all are forgotten.
const CHECKED_REPOS_MAX: usize = 4096;

/// The repositories whose index is known to be complete.
#[derive(Debug, Default)]
pub(crate) struct Checked(Mutex<HashSet<RepoName>>);

impl Storage {
    /// Lists the manifests whose subject is `subject`, in order; some may be gone when they are read.
    pub(crate) fn referrers(&self, repo: &RepoName, subject: &Digest) -> Result<Vec<Digest>> {
        self.complete_index(repo)?;
        let dir = self.layout.referrers(repo, subject);
        let mut digests = Vec::new();
        for entry in found(fs::read_dir(&dir)).map_err(Error::at("cannot list", &dir))?.into_iter().flatten()
        {
            let entry = entry.map_err(Error::at("cannot list", &dir))?;
            digests.extend(entry.file_name().to_string_lossy().replacen('-', ":", 1).parse::<Digest>());
        }
        digests.sort();
        Ok(digests)
    }

    /// Reads a manifest for a list: one that is damaged must not hide the others.
    pub(crate) fn sound_manifest(&self, repo: &RepoName, digest: &Digest) -> Option<Manifest> {
        self.manifest(repo, digest).unwrap_or_else(|error| {
            tracing::warn!(%repo, %digest, %error, "manifest left out of the referrers");
            None
        })
    }

    pub(super) fn place_referrer(
        &self,
        changes: &mut Changes<'_>,
        repo: &RepoName,
        subject: &Digest,
        referrer: &Digest,
    ) -> Result<()> {
        let path = self.layout.referrer(repo, subject, referrer);
        let temp = self.dirs.write_temp(b"").map_err(Error::at("cannot write", &path))?;
        changes.place(temp, &path).map_err(Error::at("cannot place", &path))
    }

    /// Removes an entry; one that stays is passed over by lookups.
    pub(super) fn remove_referrer(&self, repo: &RepoName, subject: &Digest, referrer: &Digest) {
        let path = self.layout.referrer(repo, subject, referrer);
        if let Err(error) = self.dirs.remove_file(&path) {
            tracing::warn!(path = %path.display(), %error, "a referrer's entry was not removed");
        }
    }

    /// Makes the entries of manifests that another registry wrote.
    fn complete_index(&self, repo: &RepoName) -> Result<()> {
        if self.checked().contains(repo) {
            return Ok(());
        }
        let mut changes = self.dirs.changes();
        for digest in self.revisions(repo)? {
            let Some(manifest) = self.sound_manifest(repo, &digest) else { continue };
            let Some(subject) = model::subject_of(&manifest.bytes) else { continue };
            if !self.layout.referrer(repo, &subject, &digest).exists() {
                self.place_referrer(&mut changes, repo, &subject, &digest)?;
            }
        }
        let dir = self.layout.repo(repo);
        changes.sync().map_err(Error::at("cannot sync the referrers of", &dir))?;
        let mut checked = self.checked();
        if checked.len() >= CHECKED_REPOS_MAX {
            checked.clear();
        }
        checked.insert(repo.clone());
        Ok(())
    }

    fn checked(&self) -> MutexGuard<'_, HashSet<RepoName>> {
        self.referrers.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
