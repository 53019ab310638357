//! Objects as wholes: looked at, read, written, removed, listed.

use std::time::{Duration, SystemTime};

use aws_sdk_s3::presigning::PresigningConfig;
use aws_sdk_s3::primitives::{ByteStream, DateTime, DateTimeFormat};
use aws_sdk_s3::types::{Delete, ObjectIdentifier};
use bytes::{Bytes, BytesMut};
use futures_util::stream::{self, BoxStream, StreamExt};
use uuid::Uuid;

use super::attempt::{Call, Outcome};
use super::body::next_chunk;
use super::client::Client;
use super::error::{self, Error, Failure, Kind, Result};
use super::wire::Validity;
use crate::digest::{Algorithm, Digest};

/// Keys in one request that deletes many.
pub(crate) const DELETE_KEYS_MAX: usize = 1000;
/// Entries of one page of a list.
pub(crate) const PAGE_ENTRIES_MAX: u16 = 1000;
/// How long a signed URL may be valid (S3).
const URL_TIME_MAX: Duration = Duration::from_secs(7 * 86_400);
/// Least content that is hashed on a thread of its own, bytes.
const HASH_BYTES_MIN: usize = 64 << 10;
/// The name of what tells one write of an object from another.
const WRITE_ID: &str = "dvcr-write";

/// What is told of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    pub bytes: u64,
    /// As the store writes it, with its quotes.
    pub etag: String,
    /// When it was written, by the server's clock, in whole seconds.
    pub modified: SystemTime,
}

/// A small object with all its content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Object {
    pub content: Bytes,
    pub etag: String,
    pub modified: SystemTime,
}

/// What an object has to be for a write to take place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Condition {
    /// There is none (`If-None-Match: *`).
    Absent,
    /// It is the one with this ETag (`If-Match`).
    Is(String),
}

/// How an object is written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Put {
    pub condition: Option<Condition>,
    pub content_type: Option<&'static str>,
    /// SHA-256 of the content in hex, where it is known already; the store checks what it gets by it, unless there is a validity.
    pub sha256: Option<String>,
    /// `None` is the quarter of an hour that S3 gives to each request.
    pub validity: Option<Validity>,
}

impl Put {
    /// Writes only where nothing is.
    pub(crate) fn new() -> Self {
        Self { condition: Some(Condition::Absent), ..Self::default() }
    }

    /// Replaces only what has the ETag.
    pub(crate) fn over(etag: impl Into<String>) -> Self {
        Self { condition: Some(Condition::Is(etag.into())), ..Self::default() }
    }

    pub(crate) fn valid(self, validity: Validity) -> Self {
        Self { validity: Some(validity), ..self }
    }
}

/// Which keys are listed.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Listing<'a> {
    /// What keys begin with, below the root directory.
    pub prefix: &'a str,
    /// Keys with this behind the prefix are told by what they have up to it, once.
    pub delimiter: Option<char>,
    /// Keys behind this one.
    pub start_after: Option<&'a str>,
    /// Entries of a page at most, 1 to 1000; `None` is 1000.
    pub page_entries_max: Option<u16>,
}

/// A part of a list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Page {
    pub objects: Vec<(String, Head)>,
    /// What keys have up to the delimiter, it included.
    pub prefixes: Vec<String>,
    /// What the next page is asked for with; `None` is the end.
    pub next: Option<String>,
}

/// What came of the removal of many objects.
#[derive(Debug, Default)]
pub(crate) struct Deletion {
    /// Those that the store did not remove, and why.
    pub kept: Vec<(String, Error)>,
    /// Whether a request may still do its work, since its answer was lost and it was sent again.
    pub is_repeated: bool,
}

impl Client {
    /// Tells of an object what there is besides its content.
    ///
    /// # Errors
    /// [`Kind::NotFound`], and what goes wrong between us and the store.
    pub(crate) async fn head(&self, key: &str) -> Result<Head> {
        self.head_and_write(key).await.map(|(head, _)| head)
    }

    /// Reads an object of at most `bytes_max` bytes.
    ///
    /// # Errors
    /// [`Kind::NotFound`]; [`Kind::Other`] for a larger one.
    pub(crate) async fn get(&self, key: &str, bytes_max: u64) -> Result<Object> {
        let call = Call::new(self, "get", key);
        call.value(|| async {
            let request = self.s3().get_object().bucket(self.bucket()).key(self.full(key));
            let answer = request.customize().config_override(call.config()).send().await;
            let answer = answer.map_err(|error| Failure::of(error, None))?;
            let head = head(answer.content_length, answer.e_tag, answer.last_modified)?;
            if head.bytes > bytes_max {
                let why = format!("it has {} bytes, where {bytes_max} are the most", head.bytes);
                return Err(Failure::wrong(why));
            }
            let mut content = BytesMut::new();
            let mut body = answer.body;
            while let Some(chunk) = next_chunk(&mut body, self.settings().request_timeout.0).await? {
                content.extend_from_slice(&chunk);
                if content.len() as u64 > head.bytes {
                    return Err(Failure::wrong("its answer is longer than it says"));
                }
            }
            if (content.len() as u64) < head.bytes {
                return Err(Failure::broken("its answer is shorter than it says"));
            }
            Ok(Object { content: content.freeze(), etag: head.etag, modified: head.modified })
        })
        .await
    }

    /// Makes a URL by which whoever has it can read an object for so long, at most a week; the store is not asked.
    ///
    /// # Errors
    /// When there are no credentials to sign it with.
    pub(crate) async fn presigned(&self, key: &str, lasts: Duration) -> Result<String> {
        let call = Call::new(self, "sign a URL of", key);
        let failed = |failure: Failure| failure.into_error(call.operation, call.place(), false);
        let now = self.server_now().await?.earliest;
        let config = PresigningConfig::builder().start_time(now).expires_in(lasts.min(URL_TIME_MAX)).build();
        let config = config.map_err(|error| failed(Failure::wrong(error)))?;
        let request = self.s3().get_object().bucket(self.bucket()).key(self.full(key));
        let signed = request.response_content_type("application/octet-stream").presigned(config).await;
        Ok(signed.map_err(|error| failed(Failure::of(error, None)))?.uri().to_owned())
    }

    /// Writes an object and returns its ETag.
    ///
    /// A conditional write whose answer is lost is sent again, and then finds what it wrote itself; it is told apart by a
    /// name that each write has, so the answer is right all the same.
    ///
    /// # Errors
    /// [`Kind::Precondition`] if the condition does not hold (as [`Kind::NotFound`] does with [`Condition::Is`]),
    /// [`Kind::Expired`].
    pub(crate) async fn put(&self, key: &str, content: Bytes, put: Put) -> Result<String> {
        self.put_with(key, content, put, false).await
    }

    /// As [`Self::put`]; `forge` spoils the signature of a request with a validity.
    pub(super) async fn put_with(&self, key: &str, content: Bytes, put: Put, forge: bool) -> Result<String> {
        let write = put.condition.is_some().then(|| Uuid::new_v4().simple().to_string());
        let payload = match (put.validity, &put.sha256) {
            (None, None) => self.payload_hash(&content).await,
            (None, Some(hash)) => Some(hash.clone()),
            (Some(_), _) => None,
        };
        let is_unsigned = self.settings().is_tls() && payload.is_none();
        let mut call = Call::new(self, "put", key)
            .bytes(content.len() as u64)
            .valid(put.validity)
            .payload(payload)
            .placing();
        call.forge = forge;
        let written = call
            .run(|| async {
                let mut request = self.s3().put_object().bucket(self.bucket()).key(self.full(key));
                request = match &put.condition {
                    Some(Condition::Absent) => request.if_none_match("*"),
                    Some(Condition::Is(etag)) => request.if_match(etag),
                    None => request,
                };
                if let Some(write) = &write {
                    request = request.metadata(WRITE_ID, write);
                }
                let request = request
                    .body(ByteStream::from(content.clone()))
                    .set_content_type(put.content_type.map(str::to_owned))
                    .set_server_side_encryption(self.encryption())
                    .set_ssekms_key_id(self.kms_key())
                    .set_storage_class(self.storage_class())
                    .customize()
                    .config_override(call.config());
                let request = if is_unsigned { request.disable_payload_signing() } else { request };
                let answer = request.send().await.map_err(|error| Failure::of(error, put.validity))?;
                answer.e_tag.ok_or_else(|| Failure::wrong("its answer has no ETag"))
            })
            .await;
        let error = match written {
            Ok(Outcome { value, .. }) => return Ok(value),
            Err(error) => error,
        };
        if matches!(error.kind(), Kind::Precondition | Kind::NotFound | Kind::Expired)
            && error.is_uncertain()
            && write.is_some()
        {
            match self.head_and_write(key).await {
                Ok((head, found)) if found == write => return Ok(head.etag),
                Ok(_) => {}
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(error),
            }
        }
        Err(error)
    }

    /// Removes an object; that there is none is no error.
    ///
    /// # Errors
    /// [`Kind::Expired`], and what goes wrong between us and the store.
    pub(crate) async fn delete(&self, key: &str, validity: Option<Validity>) -> Result<()> {
        let call = Call::new(self, "delete", key).valid(validity);
        let deleted = call.value(|| async {
            let request = self.s3().delete_object().bucket(self.bucket()).key(self.full(key));
            let answer = request.customize().config_override(call.config()).send().await;
            answer.map(drop).map_err(|error| Failure::of(error, validity))
        });
        match deleted.await {
            Err(error) if error.is_not_found() => Ok(()),
            done => done,
        }
    }

    /// Removes up to a thousand objects by one request, and returns those that the store did not remove.
    ///
    /// Some stores judge the validity for all of them, and some, as MinIO, for each key.
    ///
    /// # Errors
    /// When it cannot be told what was removed; [`Kind::Expired`].
    pub(crate) async fn delete_many(
        &self,
        keys: &[String],
        validity: Option<Validity>,
    ) -> Result<Vec<(String, Error)>> {
        self.delete_batch(keys, validity).await.map(|deletion| deletion.kept)
    }

    /// As [`Self::delete_many`], for one who has to know whether all is over with the answer.
    ///
    /// # Errors
    /// As there; see [`Error::is_uncertain`].
    pub(crate) async fn delete_batch(&self, keys: &[String], validity: Option<Validity>) -> Result<Deletion> {
        let call = Call::new(self, "delete many of", "").valid(validity);
        if keys.len() > DELETE_KEYS_MAX {
            let why = format!("{} keys are more than {DELETE_KEYS_MAX}", keys.len());
            return Err(Failure::wrong(why).into_error(call.operation, call.place(), false));
        }
        if keys.is_empty() {
            return Ok(Deletion::default());
        }
        let Outcome { value: answer, is_repeated } = call
            .run(|| async {
                let ids = keys.iter().map(|key| ObjectIdentifier::builder().key(self.full(key)).build());
                let ids = ids.collect::<Result<Vec<_>, _>>().map_err(Failure::wrong)?;
                let list =
                    Delete::builder().set_objects(Some(ids)).quiet(true).build().map_err(Failure::wrong)?;
                let request = self.s3().delete_objects().bucket(self.bucket()).delete(list);
                let answer = request.customize().config_override(call.config()).send().await;
                answer.map_err(|error| Failure::of(error, validity))
            })
            .await?;
        let told = answer.errors.unwrap_or_default().into_iter().filter_map(|told| {
            let key = self.below(told.key.as_deref().unwrap_or_default())?.to_owned();
            let (code, message) = (told.code.unwrap_or_default(), told.message.unwrap_or_default());
            let error = error::told(&code, &message, validity, "delete", self.place(&key));
            (!error.is_not_found()).then_some((key, error))
        });
        Ok(Deletion { kept: told.collect(), is_repeated })
    }

    /// Lists keys in the order of their bytes, a page of them; `next` is what the page before gave.
    ///
    /// # Errors
    /// What goes wrong between us and the store.
    pub(crate) async fn list(&self, listing: Listing<'_>, next: Option<&str>) -> Result<Page> {
        let call = Call::new(self, "list", listing.prefix);
        let answer = call
            .value(|| async {
                let request = self.s3().list_objects_v2().bucket(self.bucket());
                let request = request
                    .prefix(self.full(listing.prefix))
                    .set_delimiter(listing.delimiter.map(String::from))
                    .set_start_after(listing.start_after.map(|key| self.full(key)))
                    .max_keys(i32::from(listing.page_entries_max.unwrap_or(PAGE_ENTRIES_MAX)))
                    .set_continuation_token(next.map(str::to_owned));
                let answer = request.customize().config_override(call.config()).send().await;
                answer.map_err(|error| Failure::of(error, None))
            })
            .await?;
        let bad = |why: &str| Failure::wrong(why).into_error(call.operation, call.place(), false);
        let mut page = Page::default();
        for found in answer.contents.unwrap_or_default() {
            let key = found.key.as_deref().and_then(|key| self.below(key));
            let key = key.ok_or_else(|| bad("it told of a key that was not asked for"))?.to_owned();
            let head = head(found.size, found.e_tag, found.last_modified);
            page.objects.push((key, head.map_err(|_| bad("it told of a key without size, ETag or time"))?));
        }
        for found in answer.common_prefixes.unwrap_or_default() {
            let prefix = found.prefix.as_deref().and_then(|prefix| self.below(prefix));
            page.prefixes
                .push(prefix.ok_or_else(|| bad("it told of a key that was not asked for"))?.to_owned());
        }
        if answer.is_truncated == Some(true) {
            let next = answer.next_continuation_token;
            page.next = Some(next.ok_or_else(|| bad("it did not tell how its list goes on"))?);
        }
        Ok(page)
    }

    /// Lists all keys that begin with `prefix`, those behind `after` if that is given, in the order of their bytes and page by page.
    ///
    /// # Errors
    /// What goes wrong between us and the store; nothing comes after it.
    pub(crate) fn pages(
        &self,
        prefix: impl Into<String>,
        after: Option<String>,
    ) -> BoxStream<'static, Result<Vec<(String, Head)>>> {
        let begin = (self.clone(), prefix.into(), after, Some(None::<String>));
        let pages = stream::try_unfold(begin, |(client, prefix, after, next)| async move {
            let Some(token) = next else { return Ok(None) };
            let listing = Listing { prefix: &prefix, start_after: after.as_deref(), ..Listing::default() };
            let page = client.list(listing, token.as_deref()).await?;
            let next = page.next.map(Some);
            Ok(Some((page.objects, (client, prefix, after, next))))
        });
        pages.boxed()
    }

    /// Hashes content that is to be signed, on another thread; `None` if it is not, or is short: then the SDK does it.
    pub(super) async fn payload_hash(&self, content: &Bytes) -> Option<String> {
        if self.settings().is_tls() || content.len() < HASH_BYTES_MIN {
            return None;
        }
        let content = content.clone();
        let hash = move || Digest::of(Algorithm::Sha256, &content).hex().to_owned();
        tokio::task::spawn_blocking(hash).await.ok()
    }

    /// Tells of an object, and which conditional write made it.
    async fn head_and_write(&self, key: &str) -> Result<(Head, Option<String>)> {
        let call = Call::new(self, "look at", key);
        call.value(|| async {
            let request = self.s3().head_object().bucket(self.bucket()).key(self.full(key));
            let answer = request.customize().config_override(call.config()).send().await;
            let answer = answer.map_err(|error| Failure::of(error, None))?;
            let write = answer.metadata.and_then(|mut all| all.remove(WRITE_ID));
            Ok((head(answer.content_length, answer.e_tag, answer.last_modified)?, write))
        })
        .await
    }
}

pub(super) fn head(
    bytes: Option<i64>,
    etag: Option<String>,
    modified: Option<DateTime>,
) -> Result<Head, Failure> {
    let bytes = bytes.and_then(|bytes| u64::try_from(bytes).ok());
    match (bytes, etag, modified.map(SystemTime::try_from)) {
        (Some(bytes), Some(etag), Some(Ok(modified))) => Ok(Head { bytes, etag, modified }),
        (bytes, etag, _) => {
            let modified = modified.and_then(|time| time.fmt(DateTimeFormat::HttpDate).ok());
            let why =
                format!("its answer lacks something: bytes {bytes:?}, ETag {etag:?}, time {modified:?}");
            Err(Failure::wrong(why))
        }
    }
}
