//! Where the content of a registry is.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::migrate::{Mirror, Served};
use crate::storage::Storage;
use crate::storage::collect::Grace;
use crate::storage::layout::Layout;
use crate::store::Store;
use crate::units::Time;
use crate::{BucketSettings, Error, Limits, Result, bucket, store};

/// A directory, or a bucket.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Place {
    /// The directory, unless there is a bucket.
    pub root: PathBuf,
    /// The bucket.
    pub bucket: Option<BucketSettings>,
    /// Says that nobody else serves the bucket.
    pub single_replica: bool,
}

/// What was opened.
pub(crate) struct Opened {
    pub(crate) store: Arc<dyn Store>,
    /// The store itself, where something is done that is of a directory alone.
    pub(crate) directory: Option<Arc<Storage>>,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(bucket) = &self.bucket else { return write!(f, "{}", self.root.display()) };
        write!(f, "s3://{}", bucket.bucket)?;
        match bucket.root_directory.trim_matches('/') {
            "" => {}
            directory => write!(f, "/{directory}")?,
        }
        bucket.endpoint.as_ref().map_or(Ok(()), |endpoint| write!(f, " at {endpoint}"))
    }
}

impl Place {
    /// Makes paths absolute, so that they mean the same to another process.
    ///
    /// # Errors
    /// When the working directory is not known.
    pub fn absolute(mut self) -> std::io::Result<Self> {
        let files = self.bucket.iter_mut().flat_map(|bucket| {
            let files = [
                &mut bucket.ca_file,
                &mut bucket.access_key_file,
                &mut bucket.secret_key_file,
                &mut bucket.web_identity_token_file,
            ];
            files.into_iter().flatten()
        });
        for path in files.chain((!self.root.as_os_str().is_empty()).then_some(&mut self.root)) {
            *path = std::path::absolute(&path)?;
        }
        Ok(self)
    }

    /// Opens it for one who will serve it. Blocks; a bucket needs a runtime of several threads around it.
    pub(crate) fn open(&self, grace: Duration, limits: &Limits) -> Result<Opened> {
        match &self.bucket {
            None => {
                let storage = Storage::open(&self.root, Grace::new(grace))
                    .map_err(|source| Error::Open { path: self.root.clone(), source })?
                    .bounded(limits.quotas.clone(), limits.reserve_bytes);
                let directory = Arc::new(storage);
                Ok(Opened { store: Arc::<Storage>::clone(&directory), directory: Some(directory) })
            }
            Some(settings) => {
                let store = open_bucket(settings.clone(), &self.root, grace, self.single_replica, limits)?;
                Ok(Opened { store, directory: None })
            }
        }
    }

    /// Tells where the content has gone to, if it has.
    pub(crate) fn moved(&self, store: &dyn Store) -> Result<Option<String>> {
        aside(|| store.moved()).map_err(|source| Error::Task { source: Box::new(source) })
    }
}

/// Does what blocks on a thread of its own: the caller may be on one of the runtime, which must not wait for it.
fn aside<T: Send>(work: impl FnOnce() -> store::Result<T> + Send) -> store::Result<T> {
    std::thread::scope(|scope| scope.spawn(work).join())
        .unwrap_or_else(|_| Err(store::Error::other("the thread that asked the store panicked")))
}

/// What is kept like the registry.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct MirrorTo {
    /// The directory, unless there is a bucket.
    pub root: Option<PathBuf>,
    /// The bucket.
    pub bucket: Option<BucketSettings>,
    /// Says that nobody else uses the bucket.
    pub single_replica: bool,
    /// How often all is compared, for what others than this process have changed; an hour without it.
    pub interval: Option<Time>,
}

impl MirrorTo {
    /// All keys, with what they mean, as a section of a file of settings.
    pub const EXAMPLE: &'static str = r"
# A second directory or bucket that is kept like this registry, within seconds (docs/registry-migrate.md). What it has and this
# registry has not is removed there.
mirror:
  root: /mnt/second/registry         # a directory, or
  bucket:                            # a bucket, with the keys of `bucket` above
    bucket: images-second
  single-replica: false              # as the flag of this name, for the second bucket
  interval: 1h                       # how often all is compared
";

    /// Says what cannot be meant.
    ///
    /// # Errors
    /// In a sentence, with what to write.
    pub fn check(&self) -> Result<(), String> {
        match (&self.root, &self.bucket) {
            (None, None) | (Some(_), Some(_)) => Err("name a `root` or a `bucket`, one of them".to_owned()),
            (None, Some(bucket)) => bucket.check(),
            (Some(_), None) => Ok(()),
        }
    }

    pub(crate) fn open(self, served: &Served, grace: Duration) -> Result<Mirror> {
        self.check().map_err(|why| Error::Invalid { why: format!("in `mirror`: {why}") })?;
        let interval = self.interval.map_or(Duration::from_secs(3600), |Time(interval)| interval);
        let place = Place {
            root: self.root.unwrap_or_default(),
            bucket: self.bucket,
            single_replica: self.single_replica,
        };
        let Opened { store, .. } = place.open(grace, &Limits::default())?;
        Ok(Mirror::new(served, store, interval))
    }
}

/// Opens a bucket, and sees whether it can be shared.
fn open_bucket(
    settings: BucketSettings,
    root: &Path,
    grace: Duration,
    single_replica: bool,
    limits: &Limits,
) -> Result<Arc<dyn Store>> {
    let name = settings.bucket.clone();
    let options = bucket::Options { grace, timing: bucket::Timing::default() };
    let kept = limits.read_cache_bytes.map(|bytes| (Layout::new(root).read_cache(), bytes));
    let extras = bucket::Extras { quotas: limits.quotas.clone(), kept };
    let runtime = tokio::runtime::Handle::current();
    let open = move || {
        runtime.block_on(async {
            let bucket = bucket::Bucket::open_with(settings, options, extras).await?;
            bucket.find_out(single_replica).await?;
            Ok(bucket as Arc<dyn Store>)
        })
    };
    aside(open).map_err(|source| Error::Bucket { name, source: Box::new(source) })
}
