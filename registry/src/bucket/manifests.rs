//! Manifests: found, and accepted with the tags that name them.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::Instant;

use futures_util::stream::{self, StreamExt, TryStreamExt};
use uuid::Uuid;

use super::condemned::claim_of;
use super::links::Link;
use super::tags::Immutable;
use super::view::View;
use super::{Bucket, found};
use crate::digest::Digest;
use crate::lock;
use crate::model::{self, Checked};
use crate::names::{Reference, RepoName, Tag};
use crate::rules::Rules;
use crate::s3::{self, Put, Validity};
use crate::store::{ChangeError, Error, Kind, MANIFEST_BYTES_MAX, Manifest, Result};

/// Blobs and manifests of one manifest that are looked for at a time.
const LOOKS_AT_ONCE_MAX: usize = 32;
/// How often the end of a collection is waited for that is about to remove the same manifest.
const WAITS_MAX: u32 = 4;
/// Tags of which is remembered what they named, about 500 bytes each; when there are more, all are forgotten.
const NAMED_MAX: usize = 10_000;

/// What is asked to be accepted.
struct Push<'a> {
    repo: &'a RepoName,
    manifest: &'a Manifest,
    checked: &'a Checked,
    tags: &'a [Tag],
    rules: &'a Rules,
}

impl Push<'_> {
    /// What a collection must not take meanwhile, as it is claimed.
    fn claims(&self) -> Vec<Digest> {
        let tags = self.tags.iter().map(|tag| claim_of(self.repo, tag));
        let own = std::iter::once(self.manifest.digest.clone()).chain(tags);
        self.checked.blobs.iter().chain(&self.checked.manifests).cloned().chain(own).collect()
    }
}

/// What came of a manifest.
enum Placed {
    /// It is there, without these.
    Done(Vec<Digest>),
    Missing(Vec<Digest>),
    Immutable(Immutable),
    /// A collection is about to remove one of its digest, or one of its tags.
    Condemned(Digest),
}

/// What is read of a manifest.
pub(super) enum Found {
    Whole(Manifest),
    Damaged,
}

/// What tags named when they were last read, by their keys.
#[derive(Debug, Default)]
pub(super) struct Named(Mutex<HashMap<String, Digest>>);

impl Named {
    fn get(&self, key: &str) -> Option<Digest> {
        lock(&self.0).get(key).cloned()
    }

    fn put(&self, key: String, digest: Digest) {
        let mut all = lock(&self.0);
        if all.len() >= NAMED_MAX && !all.contains_key(&key) {
            all.clear();
        }
        all.insert(key, digest);
    }
}

impl Bucket {
    /// Reads the manifest that a reference names in a repository.
    ///
    /// Of a tag that named something in memory, it is looked for at the same time as the tag is read.
    pub(super) async fn find_manifest(
        &self,
        repo: &RepoName,
        reference: &Reference,
    ) -> Result<Option<Manifest>> {
        let digest = match reference {
            Reference::Digest(digest) => digest.clone(),
            Reference::Tag(tag) => {
                let key = self.keys.tag_current_link(repo, tag);
                let guess = self.named.get(&key).and_then(|digest| self.manifests.get(&digest));
                let has = async {
                    match &guess {
                        Some(manifest) => self.has_revision(repo, &manifest.digest).await,
                        None => Ok(false),
                    }
                };
                let (link, has) = tokio::join!(self.read_link_together(&key), has);
                let Some(Link { target, .. }) = link? else { return Ok(None) };
                // One that was not there may have come before the tag was read.
                if let (Some(manifest), Ok(true)) = (guess, has)
                    && manifest.digest == target
                {
                    return Ok(Some(manifest));
                }
                self.named.put(key, target.clone());
                target
            }
        };
        match self.read_manifest(repo, &digest).await? {
            Some(Found::Whole(manifest)) => Ok(Some(manifest)),
            Some(Found::Damaged) => {
                let told = format!("the manifest {digest} is damaged in the bucket; push it again");
                Err(Error::new(told, std::io::ErrorKind::InvalidData.into()))
            }
            None => Ok(None),
        }
    }

    /// Reads a manifest of a repository, and sees whether it is what its digest says.
    ///
    /// Content never changes under its digest, so what is in memory is good; whether the repository has it is asked every time, as
    /// another replica may have deleted it.
    pub(super) async fn read_manifest(&self, repo: &RepoName, digest: &Digest) -> s3::Result<Option<Found>> {
        let has = self.has_revision(repo, digest);
        if let Some(manifest) = self.manifests.get(digest) {
            return Ok(has.await?.then_some(Found::Whole(manifest)));
        }
        let (key, asked) = (self.keys.blob(digest), Instant::now());
        let (has, content) = tokio::join!(has, self.client.get(&key, MANIFEST_BYTES_MAX as u64));
        // What is no manifest may be of any length.
        if !has? {
            return Ok(None);
        }
        let Some(bytes) = found(content)?.map(|object| object.content) else {
            self.sound.forget(digest);
            return Ok(None);
        };
        if Digest::of(digest.algorithm(), &bytes) != *digest {
            self.sound.forget(digest);
            return Ok(Some(Found::Damaged));
        }
        self.sound.put(digest, (), asked);
        let media_type = model::media_type_of(&bytes).into();
        let manifest = Manifest { digest: digest.clone(), bytes, media_type };
        self.manifests.put(manifest.clone());
        Ok(Some(Found::Whole(manifest)))
    }

    /// Stores a manifest if the repository has what it refers to, and lets tags name it; returns what is missing where that is
    /// allowed.
    ///
    /// What it refers to is looked for after the view that all links are placed by, so a collection either sees the manifest or
    /// spares what it refers to. One who deletes the same manifest at the same time may have come behind: a tag that is placed then
    /// names nothing, which reads as if it were not there, and one that never changes may be placed anew.
    pub(super) async fn accept_manifest(
        &self,
        repo: &RepoName,
        manifest: &Manifest,
        checked: &Checked,
        tags: &[Tag],
        rules: &Rules,
    ) -> Result<Vec<Digest>, ChangeError> {
        let push = Push { repo, manifest, checked, tags, rules };
        let claims = push.claims();
        let link = self.keys.revision_link(repo, &manifest.digest);
        let mut room = self.quotas.room(repo, Uuid::new_v4(), 0);
        room.make_way(&link, manifest.bytes.len() as u64).await?;
        for _ in 0..WAITS_MAX {
            match self.place(&claims, async |view| self.place_manifest(&push, view).await).await? {
                // It was deleted meanwhile by one who had not seen the tag.
                Placed::Done(_)
                    if tags.iter().any(|tag| rules.is_immutable(repo, tag))
                        && !self.has_revision(repo, &manifest.digest).await? => {}
                Placed::Done(missing) => {
                    room.placed().await;
                    self.manifests.put(manifest.clone());
                    return Ok(missing);
                }
                Placed::Missing(missing) => return Err(ChangeError::Missing(missing)),
                Placed::Immutable(Immutable { tag, names }) => {
                    return Err(ChangeError::Immutable { tag, names });
                }
                Placed::Condemned(digest) => self.wait_until_removed(repo, &digest).await?,
            }
        }
        let told = format!("one collection after the other removes the manifest {}", manifest.digest);
        Err(Error::of(Kind::Unavailable, told, "it has to be pushed again").into())
    }

    /// Places a manifest anew that was just removed, unless what it refers to went meanwhile.
    pub(super) async fn put_back(
        &self,
        repo: &RepoName,
        manifest: &Manifest,
        rules: &Rules,
    ) -> s3::Result<()> {
        let Ok(checked) = model::check(&manifest.bytes, None) else { return Ok(()) };
        let push = Push { repo, manifest, checked: &checked, tags: &[], rules };
        match self.place(&push.claims(), async |view| self.place_manifest(&push, view).await).await? {
            Placed::Done(_) => {}
            Placed::Missing(_) | Placed::Immutable(_) | Placed::Condemned(_) => {
                tracing::warn!(%repo, digest = %manifest.digest, "a manifest is gone that a tag names which was put meanwhile");
            }
        }
        Ok(())
    }

    async fn place_manifest(&self, push: &Push<'_>, view: &View) -> s3::Result<Placed> {
        let Push { repo, manifest, checked, tags, rules } = push;
        let digest = &manifest.digest;
        let own = std::iter::once((*digest).clone()).chain(tags.iter().map(|tag| claim_of(repo, tag)));
        if let Some(condemned) = own.into_iter().find(|own| view.is_condemned(repo, own)) {
            return Ok(Placed::Condemned(condemned));
        }
        // Without a link the content is nobody's, so it need not wait. It is there already if it was some seconds ago and has a link.
        let was_there = self.sound.get(digest).is_some();
        let put = || self.put_content(manifest, view.validity());
        let there = async {
            match was_there {
                true => self.revision(repo, digest).await,
                false => put().await.map(|()| None),
            }
        };
        let (missing, immutable, there) = tokio::try_join!(
            self.missing(repo, checked, view),
            self.find_immutable(repo, tags, digest, rules),
            there,
        )?;
        if let Some(immutable) = immutable {
            return Ok(Placed::Immutable(immutable));
        }
        if !missing.is_empty() && !rules.may_be_sparse(repo) {
            return Ok(Placed::Missing(missing));
        }
        if was_there && there.is_none() {
            put().await?;
        }
        // The tags keep it. Without one, it is kept for as long as it is new.
        let is_placed = match there {
            Some(head) => !tags.is_empty() && self.is_young(head.modified).await?,
            None => false,
        };
        if !is_placed {
            if let Some(subject) = &checked.subject {
                self.place_referrer(repo, subject, digest).await?;
            }
            self.place_link(&self.keys.revision_link(repo, digest), digest, view.validity()).await?;
        }
        match self.place_tags(repo, tags, digest, rules, view.validity()).await? {
            Some(immutable) => Ok(Placed::Immutable(immutable)),
            None => Ok(Placed::Done(missing)),
        }
    }

    async fn put_content(&self, manifest: &Manifest, validity: Validity) -> s3::Result<()> {
        let (key, put) = (self.keys.blob(&manifest.digest), Put::default().valid(validity));
        self.client.put(&key, manifest.bytes.clone(), put).await?;
        self.sound.put(&manifest.digest, (), Instant::now());
        Ok(())
    }

    /// Finds what a manifest refers to and its repository lacks, or is about to lose.
    async fn missing(&self, repo: &RepoName, checked: &Checked, view: &View) -> s3::Result<Vec<Digest>> {
        let blobs = checked.blobs.iter().map(|digest| (digest, false));
        let manifests = checked.manifests.iter().map(|digest| (digest, true));
        let looks = stream::iter(blobs.chain(manifests)).map(async |(digest, is_manifest)| {
            let has = match is_manifest {
                _ if view.is_condemned(repo, digest) => false,
                false => self.has_blob(repo, digest, view).await?,
                true => {
                    let (has, length) =
                        tokio::try_join!(self.has_revision(repo, digest), self.length(digest))?;
                    has && length.is_some()
                }
            };
            Ok((!has).then(|| digest.clone()))
        });
        looks.buffered(LOOKS_AT_ONCE_MAX).try_filter_map(async |missing| Ok(missing)).try_collect().await
    }
}
