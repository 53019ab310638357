use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicUsize;

use dvcr_tests::{S3Server, TempDir, temp_dir};
use tokio::runtime::Handle;

use super::*;
use crate::bucket::{self, Bucket, Timing};
use crate::digest::Digest;
use crate::names::{Reference, RepoName};
use crate::rules::Rules;
use crate::s3::{Settings, testing};
use crate::storage::Storage;
use crate::storage::collect::Grace;
use crate::storage::layout::Layout;
use crate::store::conformance::{Process, by_tag, content, image, index, put, repo, sha256};
use crate::store::{ChangeError, Content, collect};

const TIMING: Timing = Timing {
    validity: Duration::from_secs(3),
    view_age: Duration::from_millis(200),
    lease: Duration::from_secs(60),
};
const MOVE: Options = Options { prunes: false, switches: true };
const COPY: Options = Options { prunes: false, switches: false };

/// Where a store is opened from.
enum Home {
    Directory(TempDir),
    Bucket { settings: Box<Settings>, keys: TempDir, _lives: Arc<S3Server> },
}

impl Home {
    fn directory() -> Self {
        Self::Directory(temp_dir())
    }

    fn bucket() -> Self {
        let (server, keys) = (S3Server::shared_minio(), temp_dir());
        let mut settings = testing::settings(&server, &keys);
        settings.bucket = server.new_bucket().unwrap();
        Self::Bucket { settings: Box::new(settings), keys, _lives: server }
    }

    fn open(&self, handle: &Handle) -> Arc<dyn Store> {
        let _entered = handle.enter();
        match self {
            Self::Directory(root) => Arc::new(Storage::open(root.path(), Grace::default()).unwrap()),
            Self::Bucket { settings, .. } => {
                let options = bucket::Options { grace: Duration::from_secs(3600), timing: TIMING };
                let store: Arc<dyn Store> =
                    handle.block_on(Bucket::open((**settings).clone(), options)).unwrap();
                store
            }
        }
    }

    fn path(&self) -> &Path {
        match self {
            Self::Directory(root) | Self::Bucket { keys: root, .. } => root.path(),
        }
    }
}

/// A process that serves a store.
struct Serving {
    process: Process,
    served: Arc<Served>,
    handle: Handle,
}

impl Serving {
    fn start(home: &Home) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let served = Arc::new(Served::new(home.open(runtime.handle())));
        let (handle, store) = (runtime.handle().clone(), Arc::<Served>::clone(&served));
        Self { process: Process::new(runtime, store), served, handle }
    }

    fn open(&self, home: &Home) -> Arc<dyn Store> {
        home.open(&self.handle)
    }

    fn migrate(&self, to: &Arc<dyn Store>, options: Options) -> Result<()> {
        self.migrate_until(to, options, &AtomicBool::default(), &Counts::default())
    }

    fn migrate_until(
        &self,
        to: &Arc<dyn Store>,
        options: Options,
        stop: &AtomicBool,
        counts: &Counts,
    ) -> Result<()> {
        let _entered = self.handle.enter();
        migrate(&self.served, to, "elsewhere", options, counts, stop)
    }

    /// Pushes one of everything.
    fn fill(&self) {
        let process = &self.process;
        let (a, b) = (repo("team/a"), repo("b"));
        let layers: Vec<_> =
            [10, 70_000, 3 << 20].map(|length| process.push_blob(&a, &content(length, 7))).to_vec();
        let one = process.put(&a, &image("one", &layers[0], &layers), &["v1", "latest"]);
        process.put(&a, &index("untagged", None), &[]);
        process.put(&a, &index("sbom", Some(&one)), &["sbom"]);
        process.push_blob(&a, b"nobody refers to this yet");
        layers.iter().for_each(|layer| {
            self.served.mount_blob(&a, &b, layer).unwrap();
        });
        process.put(&b, &image("copy", &layers[1], &layers), &["copy"]);
        let lacking = Rules { sparse_manifests: vec!["**".parse().unwrap()], ..Rules::default() };
        put(&*self.served, &b, &image("sparse", &sha256(b"not here"), &[]), &["sparse"], &lacking).unwrap();
        for n in 0..30 {
            process.put(&repo(&format!("many/r{n}")), &index("same", None), &["x", &format!("t{n}")]);
        }
    }
}

/// All that a store has, read back.
fn all(handle: &Handle, store: &Arc<dyn Store>) -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    for name in store.repositories(None, usize::MAX).unwrap().names {
        let repo = RepoName::parse(&name).unwrap();
        for digest in store.digests(&repo, Content::Blobs, None, usize::MAX).unwrap() {
            let blob = Arc::clone(store).open_blob(&repo, &digest).unwrap().unwrap();
            let length = blob.length();
            let pieces: Vec<_> =
                handle.block_on(futures_util::TryStreamExt::try_collect(blob.read(0, length))).unwrap();
            let pieces: Vec<bytes::Bytes> = pieces;
            assert_eq!(Digest::of(digest.algorithm(), &pieces.concat()), digest);
            all.insert(format!("{name} blob {digest}"), length.to_string());
        }
        for digest in store.digests(&repo, Content::Manifests, None, usize::MAX).unwrap() {
            let manifest = store.find_manifest(&repo, &Reference::Digest(digest.clone())).unwrap().unwrap();
            all.insert(format!("{name}@{digest}"), String::from_utf8(manifest.bytes.to_vec()).unwrap());
            let mut referrers = Vec::new();
            let visit = &mut |manifest: &crate::store::Manifest| {
                referrers.push(manifest.digest.to_string());
                std::ops::ControlFlow::Continue(())
            };
            store.referrers(&repo, &digest, None, visit).unwrap();
            all.insert(format!("{name}@{digest} referrers"), referrers.join(" "));
        }
        for tag in store.tags(&repo, None, usize::MAX).unwrap().unwrap().names {
            let named = store.find_manifest(&repo, &by_tag(&tag)).unwrap().unwrap();
            all.insert(format!("{name}:{tag}"), named.digest.to_string());
        }
    }
    all
}

fn pairs() -> [(Home, Home); 3] {
    [
        (Home::directory(), Home::directory()),
        (Home::directory(), Home::bucket()),
        (Home::bucket(), Home::directory()),
    ]
}

#[test]
fn everything_comes_along_and_the_source_is_not_served_any_more() {
    for (home, other) in pairs() {
        let serving = Serving::start(&home);
        serving.fill();
        let (from, to) = (Arc::clone(serving.served.current()), serving.open(&other));
        let before = all(&serving.handle, &from);
        serving.migrate(&to, COPY).unwrap();
        assert!(!serving.served.has_moved() && from.moved().unwrap().is_none());
        assert_eq!(all(&serving.handle, &to), before);

        // What changes between the two.
        serving.process.put(&repo("b"), &index("new", None), &["copy"]);
        serving.served.remove(&repo("many/r7"), None, &Rules::default()).unwrap();
        let refused = serving.migrate(&to, MOVE).unwrap_err();
        assert!(
            refused.to_string().contains("3 tags and manifests that the source has not: many/r7"),
            "{refused}"
        );
        assert!(!serving.served.has_moved());
        serving.migrate(&to, Options { prunes: true, switches: true }).unwrap();
        assert!(serving.served.has_moved());
        assert_eq!(from.moved().unwrap().as_deref(), Some("elsewhere"));
        assert_eq!(to.moved().unwrap(), None);
        let moved: BTreeMap<_, _> = all(&serving.handle, &to);
        let kept = |map: &BTreeMap<String, String>| -> BTreeMap<String, String> {
            map.iter()
                .filter(|(key, _)| !key.starts_with("many/r7"))
                .map(|(k, v)| (k.clone(), v.clone()))
                .collect()
        };
        assert_eq!(kept(&moved), kept(&all(&serving.handle, &from)));
        // Requests go there.
        serving.process.put(&repo("later"), &index("later", None), &["x"]);
        assert!(to.find_manifest(&repo("later"), &by_tag("x")).unwrap().is_some());
        assert!(from.find_manifest(&repo("later"), &by_tag("x")).unwrap().is_none());
    }
}

#[test]
fn nothing_that_is_pushed_deleted_or_moved_meanwhile_is_lost_or_comes_back() {
    for (home, other) in [(Home::directory(), Home::bucket()), (Home::bucket(), Home::directory())] {
        let serving = Serving::start(&home);
        serving.fill();
        let to = serving.open(&other);
        let (is_over, changes) = (AtomicBool::new(false), AtomicUsize::new(0));
        let known = thread::scope(|scope| {
            let writers: Vec<_> = (0..2_u32)
                .map(|writer| {
                    let (serving, is_over, changes) = (&serving, &is_over, &changes);
                    scope.spawn(move || {
                        let _entered = serving.handle.enter();
                        let repo = repo(&format!("busy/w{writer}"));
                        let mut tags: BTreeMap<String, Digest> = BTreeMap::new();
                        let mut n = 0;
                        // Some more when all has moved.
                        let mut left = 5;
                        while left > 0 {
                            left -= u32::from(is_over.load(Ordering::Relaxed));
                            n += 1;
                            changes.fetch_add(1, Ordering::Relaxed);
                            let tag = format!("t{}", n % 7);
                            match n % 5 {
                                0 => {
                                    serving
                                        .served
                                        .remove(&repo, Some(&by_tag(&tag)), &Rules::default())
                                        .unwrap();
                                    tags.remove(&tag);
                                }
                                1 if tags.contains_key(&tag) => {
                                    let digest = tags[&tag].clone();
                                    let by_digest = Reference::Digest(digest.clone());
                                    serving
                                        .served
                                        .remove(&repo, Some(&by_digest), &Rules::default())
                                        .unwrap();
                                    tags.retain(|_, named| *named != digest);
                                }
                                _ => {
                                    let layer =
                                        serving.process.push_blob(&repo, &content(2000, writer * 1000 + n));
                                    let bytes = image("busy", &layer, std::slice::from_ref(&layer));
                                    let digest = serving.process.put(&repo, &bytes, &[&tag]);
                                    tags.insert(tag, digest);
                                }
                            }
                        }
                        (repo, tags)
                    })
                })
                .collect();
            while changes.load(Ordering::Relaxed) < 20 {
                thread::yield_now();
            }
            let moved = serving.migrate(&to, MOVE);
            is_over.store(true, Ordering::Relaxed);
            let known: Vec<_> = writers.into_iter().map(|writer| writer.join().unwrap()).collect();
            moved.unwrap();
            known
        });
        for (repo, tags) in known {
            let listed = to.tags(&repo, None, usize::MAX).unwrap().unwrap().names;
            assert_eq!(listed, tags.keys().cloned().collect::<Vec<_>>());
            for (tag, digest) in &tags {
                let manifest = to.find_manifest(&repo, &by_tag(tag)).unwrap().unwrap();
                assert_eq!(manifest.digest, *digest);
                let checked = crate::model::check(&manifest.bytes, None).unwrap();
                for blob in &checked.blobs {
                    assert_eq!(to.claim_blob(&repo, blob).unwrap(), Some(2000));
                }
            }
        }
        // Reads back all that it has.
        all(&serving.handle, &to);
    }
}

#[test]
fn a_copy_that_is_stopped_goes_on_in_the_middle_of_a_blob() {
    const LENGTH: usize = (300 << 20) + 11;
    let (home, other) = (Home::directory(), Home::directory());
    let serving = Serving::start(&home);
    let repo = repo("large");
    let digest = serving.process.push_blob(&repo, &content(LENGTH, 1));
    serving.process.put(&repo, &image("large", &digest, std::slice::from_ref(&digest)), &["v1"]);
    let to = serving.open(&other);
    let (stop, counts) = (AtomicBool::default(), Counts::default());
    thread::scope(|scope| {
        scope.spawn(|| {
            while counts.copied.bytes.load(Ordering::Relaxed) < 260 << 20 {
                thread::yield_now();
            }
            stop.store(true, Ordering::Relaxed);
        });
        serving.migrate_until(&to, MOVE, &stop, &counts).unwrap_err();
    });
    assert!(!serving.served.has_moved());
    drop(to);
    let to = serving.open(&other);
    let again = Counts::default();
    serving.migrate_until(&to, MOVE, &AtomicBool::default(), &again).unwrap();
    let again = again.copied.bytes.load(Ordering::Relaxed);
    assert!(again < 50 << 20, "{again} bytes were read again");
    assert!(serving.process.read(&repo, &digest).unwrap() == content(LENGTH, 1));
}

#[test]
fn an_upload_that_was_begun_before_goes_on_behind() {
    for (home, other) in [(Home::directory(), Home::bucket()), (Home::directory(), Home::directory())] {
        let serving = Serving::start(&home);
        serving.fill();
        let (repo, whole) = (repo("open"), content(200_000, 3));
        let id = serving.process.acknowledged(&repo, &whole[..150_000]);
        let to = serving.open(&other);
        serving.migrate(&to, MOVE).unwrap();
        assert_eq!(serving.served.upload_offset(&repo, id).unwrap(), Some(150_000));
        serving.process.finish(&repo, id, &whole);
        assert_eq!(to.claim_blob(&repo, &sha256(&whole)).unwrap(), Some(200_000));
    }
}

#[test]
fn what_is_damaged_in_the_source_keeps_it_from_moving() {
    let (home, other) = (Home::directory(), Home::directory());
    let serving = Serving::start(&home);
    serving.fill();
    let (repo, layer) = (repo("team/a"), content(70_000, 7));
    let path = Layout::new(home.path()).blob(&sha256(&layer));
    fs::write(&path, content(70_000, 8)).unwrap();
    let to = serving.open(&other);
    let refused = serving.migrate(&to, MOVE).unwrap_err();
    assert!(refused.to_string().starts_with("1 blobs of the source are damaged"), "{refused}");
    assert!(!serving.served.has_moved());
    assert_eq!(serving.served.current().moved().unwrap(), None);
    // Changes do not wait any more.
    fs::write(&path, &layer).unwrap();
    assert_eq!(serving.process.push_blob(&repo, b"more"), sha256(b"more"));
    serving.migrate(&to, MOVE).unwrap();
    assert!(serving.process.read(&repo, &sha256(&layer)).unwrap() == layer);
}

#[test]
fn a_frozen_bucket_takes_no_change_by_any_replica_until_it_thaws() {
    let home = Home::bucket();
    let (one, other) = (Serving::start(&home), Serving::start(&home));
    other.process.put(&repo("r"), &index("before", None), &["x"]);
    let blob = other.process.push_blob(&repo("r"), b"before");
    let bucket = one.served.current();
    bucket.freeze(Duration::from_secs(60)).unwrap();
    let frozen = other.process.tagged(&repo("r"), "x").unwrap();
    for change in [
        put(&*other.served, &repo("r"), &index("frozen", None), &["x"], &Rules::default()).map(drop),
        other.served.remove(&repo("r"), Some(&by_tag("x")), &Rules::default()).map(drop),
        other.served.delete_blob(&repo("r"), &blob).map(drop).map_err(ChangeError::Store),
    ] {
        let Err(ChangeError::Store(error)) = change else { panic!("{change:?}") };
        assert_eq!(error.kind(), Kind::Unavailable, "{error}");
    }
    assert_eq!(other.process.tagged(&repo("r"), "x"), Some(frozen));
    bucket.note_moved(Some("elsewhere")).unwrap();
    assert_eq!(other.served.moved().unwrap().as_deref(), Some("elsewhere"));
    let deadline = Instant::now() + Duration::from_secs(60);
    bucket.note_moved(None).unwrap();
    while put(&*other.served, &repo("r"), &index("after", None), &["x"], &Rules::default()).is_err() {
        assert!(Instant::now() < deadline, "it does not thaw");
        thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn a_mirror_follows_and_catches_up_after_a_failure() {
    let (home, other) = (Home::directory(), Home::bucket());
    let serving = Serving::start(&home);
    serving.fill();
    let to = serving.open(&other);
    put(&*to, &repo("stale"), &index("stale", None), &["x"], &Rules::default()).unwrap();
    let mirror = Mirror::new(&serving.served, Arc::clone(&to), Duration::from_secs(3600));
    let stop = AtomicBool::default();
    thread::scope(|scope| {
        scope.spawn(|| {
            let _entered = serving.handle.enter();
            mirror.run(&serving.served, &stop);
        });
        let wait = |what: &str, is_so: &dyn Fn() -> bool| {
            let deadline = Instant::now() + Duration::from_secs(60);
            while !is_so() {
                assert!(Instant::now() < deadline, "{what}");
                thread::sleep(Duration::from_millis(50));
            }
        };
        wait("all is copied", &|| mirror.seen().complete_seconds.is_some());
        assert_eq!(all(&serving.handle, &to), all(&serving.handle, serving.served.current()));
        serving.process.put(&repo("team/a"), &index("new", None), &["new", "latest"]);
        serving.served.remove(&repo("b"), Some(&by_tag("copy")), &Rules::default()).unwrap();
        wait("changes are copied", &|| {
            let seen = mirror.seen();
            seen.pending == 0 && seen.lag_seconds == 0.0
        });
        assert_eq!(all(&serving.handle, &to), all(&serving.handle, serving.served.current()));
        // A collection says nothing of what it removes.
        let options = collect::Options {
            rules: Arc::default(),
            upload_age: Duration::from_secs(3600),
            dry_run: false,
            removals_per_second: 1000,
        };
        serving.served.collect(&options, &collect::Counts::default(), &stop).unwrap().unwrap();
        assert_eq!(mirror.seen().pending, 1);
        wait("all is compared", &|| mirror.seen().pending == 0);
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(mirror.seen().failures, 0);
}
