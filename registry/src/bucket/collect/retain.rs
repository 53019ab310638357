//! What the rules do not keep: tags that are too many or too old, and manifests without a tag.
//!
//! Nothing is condemned together with what refers to it: first go the tags, then the manifests that no manifest refers to,
//! then those that only they referred to, or were attached to them, and so on. What somebody claims meanwhile is so spared with
//! all that belongs to it. Blobs follow when the repositories are marked, by what is left.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use futures_util::stream::{self, StreamExt, TryStreamExt};

use super::super::condemned::{Condemned, ROUND_ENTRIES_MAX};
use super::mark::of_repo;
use super::pages::{Entry, Repo};
use super::rounds::{Garbage, Rounds};
use super::{READS_AT_ONCE_MAX, Run, SECOND};
use crate::digest::Digest;
use crate::lock;
use crate::model::{self, Links};
use crate::names::{RepoName, Tag};
use crate::rules::Retention;
use crate::storage::retain::{keep_tied, stays_always, surplus_of};
use crate::store::{Error, Result};

/// What is to go of a repository.
#[derive(Debug)]
struct Going {
    repo: RepoName,
    tags: BTreeMap<Tag, Option<Digest>>,
    manifests: BTreeMap<Digest, Links>,
}

/// A tag, when it was pushed, and what it names, as far as that matters.
struct Named {
    tag: Tag,
    pushed: SystemTime,
    digest: Option<Digest>,
}

impl Run<'_> {
    /// Removes what the rules do not keep.
    pub(super) async fn retain(&self, mut rounds: Option<&mut Rounds<'_>>) -> Result<()> {
        let rules = &self.options.rules;
        if rules.retention.is_empty() {
            return Ok(());
        }
        let all = Mutex::new(Vec::new());
        self.each_repo(
            |repo| rules.retention_of(repo).is_some(),
            async |repo| {
                if let Some(rule) = rules.retention_of(&repo.name) {
                    let going = self.decide(repo, rule).await?;
                    if !going.tags.is_empty() || !going.manifests.is_empty() {
                        lock(&all).push(going);
                    }
                }
                Ok(())
            },
        )
        .await?;
        let mut all = all.into_inner().unwrap_or_else(PoisonError::into_inner);
        self.take_tags(&mut all, rounds.as_deref_mut()).await?;
        while all.iter().any(|going| !going.manifests.is_empty()) {
            self.take_unreferenced(&mut all, rounds.as_deref_mut()).await?;
        }
        Ok(())
    }

    async fn decide(&self, repo: Repo, rule: &Retention) -> Result<Going> {
        let Repo { name, tags, revisions, .. } = repo;
        let before = rule.untagged_after.and_then(|age| {
            // Both are cut to the second.
            self.begun.checked_sub(age.0.saturating_add(SECOND)).map(|before| before.min(self.cutoff))
        });
        // What tags name matters only to manifests without one.
        let tags = tags.into_iter().map(|(tag, pushed)| self.named(&name, tag, pushed, before.is_some()));
        let tags = stream::iter(tags).buffer_unordered(READS_AT_ONCE_MAX).try_collect::<Vec<_>>().await?;
        let (mut kept, mut going) = (tags, BTreeMap::new());
        if rule.limits_tags() {
            let rules = &self.options.rules;
            let (always, surplus): (Vec<_>, Vec<_>) =
                kept.into_iter().partition(|named| stays_always(rules, rule, &name, &named.tag));
            kept = always;
            for (named, goes) in surplus_of(surplus, |named| (&named.tag, named.pushed), rule, self.begun) {
                if goes && self.is_old(named.pushed) {
                    going.insert(named.tag, named.digest);
                } else {
                    kept.push(named);
                }
            }
        }
        let manifests = match before {
            Some(before) => self.untagged(&name, &kept, revisions, before).await?,
            None => BTreeMap::new(),
        };
        Ok(Going { repo: name, tags: going, manifests })
    }

    async fn named(&self, repo: &RepoName, tag: Tag, pushed: SystemTime, reads: bool) -> Result<Named> {
        let mut digest = None;
        if reads {
            let _permit = self.reads.acquire().await;
            self.check()?;
            let link = self.bucket.read_link(&self.bucket.keys.tag_current_link(repo, &tag)).await?;
            digest = link.map(|link| link.target);
        }
        Ok(Named { tag, pushed, digest })
    }

    /// Finds the manifests that were last pushed before `before`, and that neither a tag nor a manifest that stays refers to.
    async fn untagged(
        &self,
        repo: &RepoName,
        tags: &[Named],
        revisions: Vec<Entry>,
        before: SystemTime,
    ) -> Result<BTreeMap<Digest, Links>> {
        let mut kept: BTreeSet<Digest> = tags.iter().filter_map(|named| named.digest.clone()).collect();
        let is_new = |entry: &&Entry| entry.modified >= before;
        kept.extend(revisions.iter().filter(is_new).map(|entry| entry.digest.clone()));
        if revisions.iter().all(|entry| kept.contains(&entry.digest)) {
            return Ok(BTreeMap::new());
        }
        let links = revisions.into_iter().map(|Entry { digest, .. }| async move {
            let bytes = self.manifest(repo, &digest).await?;
            Ok::<_, Error>(bytes.and_then(|bytes| model::links(&bytes)).map(|links| (digest, links)))
        });
        let links = stream::iter(links).buffer_unordered(READS_AT_ONCE_MAX).try_collect::<Vec<_>>().await?;
        // One that cannot be read may refer to any other.
        let Some(mut manifests) = links.into_iter().collect::<Option<BTreeMap<_, _>>>() else {
            return Ok(BTreeMap::new());
        };
        keep_tied(&mut kept, &manifests);
        manifests.retain(|digest, _| !kept.contains(digest));
        Ok(manifests)
    }

    /// Removes tags. Of one that is claimed, since somebody moves it, what it names stays, too.
    async fn take_tags(&self, all: &mut [Going], mut rounds: Option<&mut Rounds<'_>>) -> Result<()> {
        let tags = |going: &Going| {
            let tags: Vec<_> = going.tags.keys().cloned().collect();
            let repo = going.repo.clone();
            tags.into_iter().map(move |tag| Condemned::Tag { repo: repo.clone(), tag })
        };
        let tags: Vec<Condemned> = all.iter().flat_map(tags).collect();
        let mut spared = BTreeSet::new();
        for several in tags.chunks(ROUND_ENTRIES_MAX) {
            let several = several.iter().cloned().map(Garbage::from).collect();
            for kept in self.condemn(several, rounds.as_deref_mut()).await? {
                if let Condemned::Tag { repo, tag } = kept.what {
                    spared.insert((repo, tag));
                }
            }
        }
        for going in all {
            let names = |(tag, digest): (Tag, Option<Digest>)| {
                digest.filter(|_| spared.contains(&(going.repo.clone(), tag)))
            };
            let kept = std::mem::take(&mut going.tags).into_iter().filter_map(names).collect();
            going.spare(kept);
        }
        Ok(())
    }

    /// Removes the manifests that none of those refers to that are to go.
    async fn take_unreferenced(&self, all: &mut [Going], mut rounds: Option<&mut Rounds<'_>>) -> Result<()> {
        let mut ready = Vec::new();
        for (at, going) in all.iter_mut().enumerate() {
            ready.extend(going.take_ready().into_iter().map(|one| (at, one)));
        }
        for several in ready.chunks(ROUND_ENTRIES_MAX) {
            let garbage = several.iter().map(|(_, (what, _))| Garbage::from(what.clone())).collect();
            let kept: BTreeSet<u128> = self
                .condemn(garbage, rounds.as_deref_mut())
                .await?
                .iter()
                .filter_map(|kept| of_manifest(&kept.what))
                .collect();
            for (at, (what, links)) in several {
                let (Some(id), Some(going)) = (of_manifest(what), all.get_mut(*at)) else { continue };
                if kept.contains(&id) {
                    let attached = going.attached_to(&what.claim());
                    going.spare(links.manifests.iter().cloned().chain(attached).collect());
                } else if rounds.is_none() {
                    lock(&self.gone).insert(id);
                }
            }
        }
        Ok(())
    }
}

impl Going {
    /// Takes out the manifests that none of the others refers to, nor is their subject.
    fn take_ready(&mut self) -> Vec<(Condemned, Links)> {
        let children: BTreeSet<&Digest> =
            self.manifests.values().flat_map(|links| links.manifests.iter()).collect();
        let is_ready = |digest: &Digest, links: &Links| {
            let subject = links.subject.as_ref();
            !children.contains(digest) && !subject.is_some_and(|subject| self.manifests.contains_key(subject))
        };
        let ready: Vec<Digest> = self
            .manifests
            .iter()
            .filter(|(digest, links)| is_ready(digest, links))
            .map(|(digest, _)| digest.clone())
            .collect();
        let taken: Vec<(Digest, Links)> = match ready.is_empty() {
            // They refer to each other in a ring: it is broken anywhere.
            true => std::mem::take(&mut self.manifests).into_iter().collect(),
            false => ready.into_iter().filter_map(|digest| self.manifests.remove_entry(&digest)).collect(),
        };
        let condemned = |(digest, links): (Digest, Links)| {
            let subject = links.subject.clone();
            (Condemned::Manifest { repo: self.repo.clone(), digest, subject }, links)
        };
        taken.into_iter().map(condemned).collect()
    }

    fn attached_to(&self, digest: &Digest) -> Vec<Digest> {
        let is_attached = |links: &Links| links.subject.as_ref() == Some(digest);
        let attached = self.manifests.iter().filter(|(_, links)| is_attached(links));
        attached.map(|(digest, _)| digest.clone()).collect()
    }

    /// Lets stay what is kept, and all that belongs to it.
    fn spare(&mut self, mut kept: BTreeSet<Digest>) {
        keep_tied(&mut kept, &self.manifests);
        self.manifests.retain(|digest, _| !kept.contains(digest));
    }
}

fn of_manifest(what: &Condemned) -> Option<u128> {
    match what {
        Condemned::Manifest { repo, digest, .. } => Some(of_repo(repo, digest)),
        _ => None,
    }
}
