//! Byte quotas by repository prefix.
//!
//! A prefix's usage is the bytes of the distinct blobs and manifests that the repositories below it have, and of the
//! uploads that go on there. It is counted when somebody first brings something below the prefix, by going through its
//! repositories, and kept right from then on:
//!
//! ```text
//!            first push                            all repositories gone through
//!  Unknown ─────────────> Counting, one repository ─────────────────────────────> Ready
//!                         after the other
//! ```
//!
//! A link is made or removed, and counted, under the lock of its prefix; one of a repository that is not counted yet is
//! left to the counting, which also goes through each repository under the lock. So every link is counted once.
//!
//! Bytes are granted before they are taken in ([`Room`]): of uploads side by side, no two get the same.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::Path;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use uuid::Uuid;

use super::blobs::{found, link_target};
use super::collect::key;
use super::manifests::walk_below;
use super::{Error, Result, Storage};
use crate::digest::Digest;
use crate::names::RepoName;
use crate::store::Kind;
use crate::units::Size;

/// Prefixes whose usage is known at a time; when there are more, all that nobody is using are forgotten.
const PREFIXES_MAX: usize = 1024;
/// Bytes granted at a time to an upload that does not tell its length, if there are so many.
const GRANT_BYTES: u64 = 1 << 20;

/// A bound on the bytes below a prefix of repository names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quota {
    pub prefix: Prefix,
    pub bytes: u64,
}

/// The beginning of repository names, whole components: `vi/ns1/`, or `vi/*/` for every name in place of the star.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prefix(Vec<Option<String>>);

impl FromStr for Quota {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (prefix, size) = text
            .split_once('=')
            .ok_or_else(|| format!("{text:?} is no quota: write a prefix and a size, as in vi/ns1/=100G"))?;
        let Size(bytes) = size.parse()?;
        Ok(Self { prefix: prefix.parse()?, bytes })
    }
}

impl fmt::Display for Quota {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.prefix, Size(self.bytes))
    }
}

impl FromStr for Prefix {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "{text:?} is no prefix of repositories: write whole components and `/`, as vi/ns1/ or vi/*/"
            )
        };
        let names = text.strip_suffix('/').ok_or_else(wrong)?;
        let component = |name: &str| match name {
            "*" => Ok(None),
            _ if RepoName::parse(name).is_some() => Ok(Some(name.to_owned())),
            _ => Err(wrong()),
        };
        names.split('/').map(component).collect::<Result<_, _>>().map(Self)
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|name| write!(f, "{}/", name.as_deref().unwrap_or("*")))
    }
}

impl Prefix {
    /// The beginning of a name that this prefix means.
    fn matched<'a>(&self, repo: &'a RepoName) -> Option<&'a str> {
        let mut rest = repo.as_str();
        for name in &self.0 {
            let (first, behind) = rest.split_once('/')?;
            if name.as_ref().is_some_and(|name| name != first) {
                return None;
            }
            rest = behind;
        }
        repo.as_str().get(..repo.as_str().len() - rest.len())
    }

    /// What decides between two that match: more components, then fewer stars.
    fn rank(&self) -> (usize, usize) {
        (self.0.len(), self.0.iter().flatten().count())
    }

    fn has_star(&self) -> bool {
        self.0.contains(&None)
    }
}

/// The bytes are more than the quota leaves.
#[derive(Debug, thiserror::Error)]
#[error(
    "{prefix} may have {limit} bytes and has {used}: there is no room for {more} more, {} are missing",
    .used.saturating_add(*.more).saturating_sub(*.limit)
)]
pub(crate) struct Exceeded {
    pub(crate) prefix: String,
    pub(crate) limit: u64,
    pub(crate) used: u64,
    pub(crate) more: u64,
}

/// What is known of one prefix, for those who watch the registry.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Usage {
    pub(crate) prefix: String,
    pub(crate) limit: u64,
    /// Bytes; `None` if nobody has brought anything since the start.
    pub(crate) used: Option<u64>,
}

/// All quotas; the one that counts for a repository comes first.
#[derive(Debug, Default)]
pub(crate) struct Limits(Vec<Quota>);

impl Limits {
    pub(crate) fn new(mut quotas: Vec<Quota>) -> Self {
        quotas.sort_by_key(|quota| std::cmp::Reverse(quota.prefix.rank()));
        Self(quotas)
    }

    /// The prefix that counts for a repository, which is the longest, and how many bytes it may have.
    pub(crate) fn of<'a>(&self, repo: &'a RepoName) -> Option<(&'a str, u64)> {
        self.0.iter().find_map(|quota| Some((quota.prefix.matched(repo)?, quota.bytes)))
    }

    /// Tells what is known of each prefix, and of those that are spelt out even if nothing is.
    pub(crate) fn usage(&self, known: impl Iterator<Item = Usage>) -> Vec<Usage> {
        let mut all: Vec<Usage> = known.collect();
        for quota in self.0.iter().filter(|quota| !quota.prefix.has_star()) {
            let prefix = quota.prefix.to_string();
            if !all.iter().any(|usage| usage.prefix == prefix) {
                all.push(Usage { prefix, limit: quota.bytes, used: None });
            }
        }
        all.sort_by(|a, b| a.prefix.cmp(&b.prefix));
        all
    }
}

/// All quotas, and what is known of the prefixes.
#[derive(Debug, Default)]
pub(super) struct Quotas {
    limits: Limits,
    prefixes: Mutex<HashMap<String, Arc<Counted>>>,
}

/// One prefix.
#[derive(Debug)]
struct Counted {
    prefix: String,
    limit: u64,
    /// Held by the one that counts.
    counting: Mutex<()>,
    /// Whether it has been counted; to look at the state takes as long as counting a repository.
    is_ready: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    phase: Phase,
    blobs: HashMap<u128, Held>,
    blob_bytes: u64,
    /// Bytes of the uploads, on disk or granted.
    uploads: HashMap<Uuid, u64>,
    upload_bytes: u64,
}

#[derive(Debug, Default)]
enum Phase {
    #[default]
    Unknown,
    Counting {
        counted: HashSet<RepoName>,
        /// In which something was changed before they were counted; some may be new.
        touched: HashSet<RepoName>,
    },
    Ready,
}

/// A blob, with the number of links to it.
#[derive(Debug)]
struct Held {
    bytes: u64,
    links: u32,
}

/// What one upload has been granted; what it does not keep goes back when it is dropped.
#[derive(Debug, Default)]
pub(crate) struct Room {
    of: Option<Arc<Counted>>,
    id: Uuid,
    granted: u64,
    kept: u64,
    /// An upload of no more bytes needs no room: it is to be a blob of this length that the prefix has.
    known: u64,
}

impl Room {
    /// Makes room for an upload of so many bytes.
    pub(super) fn reach(&mut self, bytes: u64) -> Result<()> {
        match bytes <= self.known {
            true => Ok(()),
            false => self.take(bytes),
        }
    }

    /// Makes room for an upload of so many bytes that does not become a blob now, whatever it was to be.
    pub(super) fn take(&mut self, bytes: u64) -> Result<()> {
        let Some(of) = self.of.as_ref().filter(|_| bytes > self.granted) else { return Ok(()) };
        let generous = bytes.max(self.granted.saturating_add(GRANT_BYTES));
        self.granted = match of.grant(self.id, generous) {
            Ok(()) => generous,
            Err(_) => of.grant(self.id, bytes).map(|()| bytes)?,
        };
        Ok(())
    }

    /// Tells what of the upload stays on disk when the request ends.
    pub(super) fn keep(&mut self, bytes: u64) {
        self.kept = bytes;
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        if let Some(of) = &self.of {
            of.state().set_upload(self.id, self.kept);
        }
    }
}

impl Quotas {
    pub(super) fn new(quotas: Vec<Quota>) -> Self {
        Self { limits: Limits::new(quotas), prefixes: Mutex::default() }
    }

    fn of(&self, repo: &RepoName) -> Option<Arc<Counted>> {
        let (prefix, limit) = self.limits.of(repo)?;
        let mut prefixes = self.prefixes();
        if let Some(known) = prefixes.get(prefix) {
            return Some(Arc::clone(known));
        }
        if prefixes.len() >= PREFIXES_MAX {
            prefixes.retain(|_, known| Arc::strong_count(known) > 1);
        }
        let new = Counted {
            prefix: prefix.to_owned(),
            limit,
            counting: Mutex::default(),
            is_ready: AtomicBool::new(false),
            state: Mutex::default(),
        };
        Some(Arc::clone(prefixes.entry(prefix.to_owned()).or_insert(Arc::new(new))))
    }

    /// Whether a quota counts for a repository.
    pub(super) fn is_for(&self, repo: &RepoName) -> bool {
        self.limits.of(repo).is_some()
    }

    /// Tells whether to ask for room takes no time.
    pub(super) fn is_quick(&self, repo: &RepoName) -> bool {
        self.of(repo).is_none_or(|of| of.is_ready())
    }

    /// Places a link of a repository to a blob of so many bytes, which were granted to `room`.
    pub(super) fn placing<T>(
        &self,
        repo: &RepoName,
        link: &Path,
        (target, bytes): (&Digest, u64),
        room: &mut Room,
        place: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let Some(of) = self.of(repo) else { return place() };
        let mut state = of.state();
        let is_new = !link.exists();
        let placed = place()?;
        if state.counts(repo) {
            state.hold(key(target), u32::from(is_new), || bytes);
        }
        // From here on the blob counts, and the upload does not.
        if room.of.is_some() {
            state.set_upload(room.id, 0);
            (room.granted, room.kept) = (0, 0);
        }
        Ok(placed)
    }

    /// Has `remove` take away a link of a repository to a blob; returns whether there was one.
    pub(super) fn removing(
        &self,
        repo: &RepoName,
        target: u128,
        remove: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<bool> {
        let remove = || match remove() {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
            done => done.map(|()| true),
        };
        let Some(of) = self.of(repo) else { return remove() };
        let mut state = of.state();
        let removed = remove()?;
        if removed && state.counts(repo) {
            state.release(target);
        }
        Ok(removed)
    }

    /// Forgets an upload that was removed from disk.
    pub(super) fn ended(&self, repo: &RepoName, id: Uuid) {
        if let Some(of) = self.of(repo) {
            of.state().set_upload(id, 0);
        }
    }

    /// Tells what is known of each prefix.
    pub(super) fn usage(&self) -> Vec<Usage> {
        self.limits.usage(self.prefixes().values().map(|of| of.usage()))
    }

    fn prefixes(&self) -> MutexGuard<'_, HashMap<String, Arc<Counted>>> {
        self.prefixes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Storage {
    /// Makes room for an upload that has `had` bytes and is to have `bytes`, as the blob `digest` if that is told; one that
    /// the prefix has needs none. The first time below a prefix this goes through its repositories.
    ///
    /// # Errors
    /// When the quota does not leave so many; [`Error::exceeded`] tells.
    pub(super) fn room(
        &self,
        repo: &RepoName,
        id: Uuid,
        had: u64,
        bytes: u64,
        digest: Option<&Digest>,
    ) -> Result<Room> {
        let Some(of) = self.quotas.of(repo) else { return Ok(Room::default()) };
        self.count(&of)?;
        let known = digest.and_then(|digest| Some(of.state().blobs.get(&key(digest))?.bytes)).unwrap_or(0);
        // What is there already stays, whatever the quota has become.
        let mut room = Room { of: Some(of), id, granted: had, kept: had, known };
        if let Some(of) = room.of.as_ref().filter(|_| bytes > had.max(known)) {
            of.grant(id, bytes)?;
            room.granted = bytes;
        }
        Ok(room)
    }

    /// Makes room for a blob that is placed at once, unless the prefix has it.
    pub(super) fn room_for(&self, repo: &RepoName, digest: &Digest, bytes: u64) -> Result<Room> {
        self.room(repo, Uuid::new_v4(), 0, bytes, Some(digest))
    }

    /// Counts a prefix if it has not been.
    fn count(&self, of: &Counted) -> Result<()> {
        if of.is_ready() {
            return Ok(());
        }
        let _one = of.counting.lock().unwrap_or_else(PoisonError::into_inner);
        if of.is_ready() {
            return Ok(());
        }
        *of.state() = State::default();
        of.state().phase = Phase::Counting { counted: HashSet::new(), touched: HashSet::new() };
        let counted = self.count_all(of);
        if counted.is_err() {
            *of.state() = State::default();
        }
        counted
    }

    fn count_all(&self, of: &Counted) -> Result<()> {
        let begin = of.prefix.trim_end_matches('/');
        let base = self.layout.repositories().join(begin);
        walk_below(&base, begin, &["_layers", "_manifests", "_uploads"], &mut |repo| {
            // A longer prefix may have taken it.
            match self.quotas.limits.of(repo) {
                Some((prefix, _)) if prefix == of.prefix => self.count_repo(&mut of.state(), repo),
                _ => Ok(()),
            }
        })?;
        loop {
            let mut state = of.state();
            let Phase::Counting { counted, touched } = &state.phase else { return Ok(()) };
            let Some(left) = touched.difference(counted).next().cloned() else {
                state.phase = Phase::Ready;
                of.is_ready.store(true, Ordering::Release);
                return Ok(());
            };
            self.count_repo(&mut state, &left)?;
        }
    }

    fn count_repo(&self, state: &mut State, repo: &RepoName) -> Result<()> {
        if let Phase::Counting { counted, .. } = &mut state.phase
            && !counted.insert(repo.clone())
        {
            return Ok(());
        }
        // A link that was removed leaves its directory behind.
        self.each_revision(repo, |digest| {
            state.hold(key(&digest), 1, || self.bytes_of(&digest));
            Ok(())
        })?;
        self.each_layer(repo, |digest| {
            let link = self.layout.layer_link(repo, &digest);
            if link.exists()
                && let Some(target) = link_target(&link, &digest)?
            {
                state.hold(key(&target), 1, || self.bytes_of(&target));
            }
            Ok(())
        })?;
        let base = self.layout.uploads(repo);
        let fail = || Error::at("cannot list", &base);
        for entry in found(fs::read_dir(&base)).map_err(fail())?.into_iter().flatten() {
            let entry = entry.map_err(fail())?;
            let Some(id) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            let length = found(fs::metadata(entry.path().join("data"))).map_err(fail())?;
            state.set_upload(id, length.map_or(0, |metadata| metadata.len()));
        }
        Ok(())
    }

    /// The length of a blob, also of one that was put aside: it has its place until a push replaces it.
    fn bytes_of(&self, digest: &Digest) -> u64 {
        let length = fs::metadata(self.layout.blob(digest)).ok().map(|metadata| metadata.len());
        length.or_else(|| self.quarantined_bytes(digest)).unwrap_or(0)
    }
}

impl Counted {
    /// Lets an upload have so many bytes in all.
    fn grant(&self, id: Uuid, bytes: u64) -> Result<()> {
        let mut state = self.state();
        let had = state.uploads.get(&id).copied().unwrap_or(0);
        let used = state.used();
        let more = bytes.saturating_sub(had);
        if used.checked_add(more).is_none_or(|all| all > self.limit) {
            let exceeded = Exceeded { prefix: self.prefix.clone(), limit: self.limit, used, more };
            return Err(Error::of(Kind::Exceeded, "a quota is used up", exceeded));
        }
        state.set_upload(id, bytes.max(had));
        Ok(())
    }

    fn is_ready(&self) -> bool {
        self.is_ready.load(Ordering::Acquire)
    }

    fn usage(&self) -> Usage {
        let used = self.is_ready().then(|| self.state().used());
        Usage { prefix: self.prefix.clone(), limit: self.limit, used }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn used(&self) -> u64 {
        self.blob_bytes.saturating_add(self.upload_bytes)
    }

    /// Whether a change in a repository is to be counted now.
    fn counts(&mut self, repo: &RepoName) -> bool {
        match &mut self.phase {
            Phase::Unknown => false,
            Phase::Ready => true,
            Phase::Counting { counted, touched } => {
                let is_counted = counted.contains(repo);
                if !is_counted {
                    touched.insert(repo.clone());
                }
                is_counted
            }
        }
    }

    /// Counts new links to a blob; one whose content was missing so far gets its length.
    fn hold(&mut self, blob: u128, links: u32, bytes: impl FnOnce() -> u64) {
        let held = self.blobs.entry(blob).or_insert(Held { bytes: 0, links: 0 });
        held.links = held.links.saturating_add(links);
        if held.bytes == 0 {
            held.bytes = bytes();
            self.blob_bytes = self.blob_bytes.saturating_add(held.bytes);
        }
    }

    fn release(&mut self, blob: u128) {
        let Some(held) = self.blobs.get_mut(&blob) else { return };
        held.links = held.links.saturating_sub(1);
        if held.links == 0 {
            self.blob_bytes = self.blob_bytes.saturating_sub(held.bytes);
            self.blobs.remove(&blob);
        }
    }

    fn set_upload(&mut self, id: Uuid, bytes: u64) {
        let had = match bytes {
            0 => self.uploads.remove(&id),
            _ => self.uploads.insert(id, bytes),
        };
        self.upload_bytes = self.upload_bytes.saturating_sub(had.unwrap_or(0)).saturating_add(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn repo(name: &str) -> RepoName {
        RepoName::parse(name).unwrap()
    }

    fn quotas(all: &[(&str, u64)]) -> Quotas {
        let quota = |(prefix, bytes): &(&str, u64)| Quota { prefix: prefix.parse().unwrap(), bytes: *bytes };
        Quotas::new(all.iter().map(quota).collect())
    }

    #[test]
    fn prefixes_are_whole_components() {
        for good in ["a/", "vi/ns1/", "vi/*/", "*/", "*/*/x/"] {
            assert_eq!(good.parse::<Prefix>().unwrap().to_string(), good);
        }
        for bad in ["", "/", "a", "vi/ns1", "vi//", "vi/ns*/", "A/", "/vi/", "../"] {
            assert!(bad.parse::<Prefix>().unwrap_err().contains("vi/ns1/"), "{bad}");
        }
    }

    #[test]
    fn the_longest_prefix_counts_and_of_two_the_one_that_is_spelt_out() {
        let quotas = quotas(&[("vi/", 1), ("vi/*/", 2), ("vi/ns1/", 3), ("*/*/x/", 4)]);
        for (name, rule) in [
            ("vi/disk", Some(("vi/", 1))),
            ("vi/ns1", Some(("vi/", 1))),
            ("vi/ns1/disk", Some(("vi/ns1/", 3))),
            ("vi/ns2/disk", Some(("vi/ns2/", 2))),
            ("vi/ns2/x/y", Some(("vi/ns2/x/", 4))),
            ("vi", None),
            ("vix/ns1/disk", None),
        ] {
            assert_eq!(quotas.limits.of(&repo(name)), rule, "{name}");
        }
    }

    #[test]
    fn prefixes_that_nobody_uses_are_forgotten_when_there_are_many() {
        let quotas = quotas(&[("vi/*/", 10)]);
        let held = quotas.of(&repo("vi/held/x")).unwrap();
        for n in 0..2 * PREFIXES_MAX {
            quotas.of(&repo(&format!("vi/{n}/x"))).unwrap();
        }
        assert!(quotas.prefixes().len() <= PREFIXES_MAX);
        assert!(Arc::ptr_eq(&held, &quotas.of(&repo("vi/held/y")).unwrap()));
    }

    #[test]
    fn nobody_who_only_looks_waits_for_the_one_who_counts() {
        let quotas = quotas(&[("q/", 10)]);
        let of = quotas.of(&repo("q/a")).unwrap();
        let _counting = of.state();
        assert!(!quotas.is_quick(&repo("q/a")));
        assert_eq!(quotas.usage(), [Usage { prefix: "q/".to_owned(), limit: 10, used: None }]);
    }

    #[test]
    fn room_is_granted_once_and_given_back() {
        let quotas = quotas(&[("q/", 3 << 20)]);
        let of = quotas.of(&repo("q/a")).unwrap();
        let room = || Room { of: Some(Arc::clone(&of)), id: Uuid::new_v4(), granted: 0, kept: 0, known: 0 };
        let (mut first, mut second) = (room(), room());
        first.reach(1).unwrap();
        second.reach((2 << 20) - 5).unwrap();
        // No more at a time than there is.
        first.reach((1 << 20) + 5).unwrap();
        let refused = first.reach((1 << 20) + 6).unwrap_err();
        let exceeded = refused.exceeded().unwrap();
        assert_eq!((exceeded.limit, exceeded.used), (3 << 20, 3 << 20));
        assert!(!refused.is_full());
        second.keep(7);
        drop((first, second));
        let state = of.state();
        assert_eq!((state.used(), state.uploads.len()), (7, 1));
    }
}
