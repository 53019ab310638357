//! Objects that are uploaded in parts, and copies, which are so when they are large.

use std::ops::Range;
use std::time::SystemTime;

use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::{CompletedMultipartUpload, CompletedPart};
use bytes::Bytes;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

use super::attempt::Call;
use super::client::Client;
use super::error::{Failure, Result};
use super::object::{Condition, Head, PAGE_ENTRIES_MAX};
use super::wire::Validity;

/// Smallest part of an upload but its last, bytes.
pub(crate) const PART_BYTES_MIN: u64 = 5 << 20;
/// Largest part, bytes.
pub(crate) const PART_BYTES_MAX: u64 = 5 << 30;
/// Parts of one upload.
pub(crate) const PARTS_MAX: u16 = 10_000;
/// Largest copy in one piece, bytes. S3 takes 5 GiB, but copies each piece at the pace of one connection.
pub(super) const COPY_BYTES_MAX: u64 = 64 << 20;
/// Parts of a copy that are under way at a time.
const COPY_PARTS_AT_ONCE_MAX: usize = 16;
/// Bytes of the parts of a copy, unless they would be too many.
const COPY_PART_BYTES: u64 = 64 << 20;
/// Parts of a copy at most.
const COPY_PARTS_MAX: u64 = 9000;

/// What may stand in a path as it is.
const PATH: &AsciiSet = &NON_ALPHANUMERIC.remove(b'/').remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// An upload that has begun.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Upload {
    pub key: String,
    pub id: String,
}

/// A part that the store has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    /// 1 to 10,000.
    pub number: u16,
    pub bytes: u64,
    pub etag: String,
}

/// A page of the uploads that have begun and not ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Uploads {
    /// With when they began, by the server's clock.
    pub uploads: Vec<(Upload, SystemTime)>,
    /// What the next page is asked for with; `None` is the end.
    pub next: Option<Upload>,
}

impl Client {
    /// Begins an upload. One whose answer is lost remains, and is found by [`Self::uploads`].
    ///
    /// # Errors
    /// What goes wrong between us and the store.
    pub(crate) async fn create_upload(&self, key: &str, content_type: Option<&str>) -> Result<Upload> {
        let call = Call::new(self, "begin to upload", key);
        call.value(|| async {
            let request = self.s3().create_multipart_upload().bucket(self.bucket()).key(self.full(key));
            let request = request
                .set_content_type(content_type.map(str::to_owned))
                .set_server_side_encryption(self.encryption())
                .set_ssekms_key_id(self.kms_key())
                .set_storage_class(self.storage_class());
            let answer = request.customize().config_override(call.config()).send().await;
            let id = answer.map_err(|error| Failure::of(error, None))?.upload_id;
            let id = id.ok_or_else(|| Failure::wrong("its answer does not name the upload"))?;
            Ok(Upload { key: key.to_owned(), id })
        })
        .await
    }

    /// Uploads a part, in place of the one that had its number.
    ///
    /// # Errors
    /// [`super::Kind::NotFound`] if the upload has ended.
    pub(crate) async fn upload_part(&self, upload: &Upload, number: u16, content: Bytes) -> Result<Part> {
        let bytes = content.len() as u64;
        let payload = self.payload_hash(&content).await;
        let call = Call::new(self, "upload a part of", &upload.key).bytes(bytes).payload(payload);
        call.value(|| async {
            let request = self.s3().upload_part().bucket(self.bucket()).key(self.full(&upload.key));
            let request = request
                .upload_id(&upload.id)
                .part_number(i32::from(number))
                .body(ByteStream::from(content.clone()))
                .customize()
                .config_override(call.config());
            let request = if self.settings().is_tls() { request.disable_payload_signing() } else { request };
            let answer = request.send().await.map_err(|error| Failure::of(error, None))?;
            let etag = answer.e_tag.ok_or_else(|| Failure::wrong("its answer has no ETag"))?;
            Ok(Part { number, bytes, etag })
        })
        .await
    }

    /// Makes the object of an upload's parts, and returns its ETag.
    ///
    /// # Errors
    /// [`super::Kind::NotFound`] if the upload has ended, be it by this very call: see [`super::Error::is_uncertain`].
    pub(crate) async fn complete_upload(
        &self,
        upload: &Upload,
        parts: &[Part],
        condition: Option<Condition>,
        validity: Option<Validity>,
    ) -> Result<String> {
        let bytes = parts.iter().fold(0_u64, |sum, part| sum.saturating_add(part.bytes));
        // The store puts nothing together, but it may look at all of it.
        let call =
            Call::new(self, "end the upload of", &upload.key).bytes(bytes / 16).valid(validity).placing();
        call.value(|| async {
            let completed = |part: &Part| {
                CompletedPart::builder().part_number(i32::from(part.number)).e_tag(&part.etag).build()
            };
            let list = parts.iter().map(completed).collect();
            let list = CompletedMultipartUpload::builder().set_parts(Some(list)).build();
            let request = self.s3().complete_multipart_upload().bucket(self.bucket());
            let request = request.key(self.full(&upload.key)).upload_id(&upload.id).multipart_upload(list);
            let request = match &condition {
                Some(Condition::Absent) => request.if_none_match("*"),
                Some(Condition::Is(etag)) => request.if_match(etag),
                None => request,
            };
            let answer = request.customize().config_override(call.config()).send().await;
            let etag = answer.map_err(|error| Failure::of(error, validity))?.e_tag;
            etag.ok_or_else(|| Failure::wrong("its answer has no ETag"))
        })
        .await
    }

    /// Ends an upload without an object; that it has ended is no error.
    ///
    /// # Errors
    /// What goes wrong between us and the store.
    pub(crate) async fn abort_upload(&self, upload: &Upload) -> Result<()> {
        let call = Call::new(self, "give up the upload of", &upload.key);
        let aborted = call.value(|| async {
            let request = self.s3().abort_multipart_upload().bucket(self.bucket());
            let request = request.key(self.full(&upload.key)).upload_id(&upload.id);
            let answer = request.customize().config_override(call.config()).send().await;
            answer.map(drop).map_err(|error| Failure::of(error, None))
        });
        match aborted.await {
            Err(error) if error.is_not_found() => Ok(()),
            done => done,
        }
    }

    /// Lists the uploads to keys that begin with `prefix`; `next` is what the page before gave.
    ///
    /// # Errors
    /// What goes wrong between us and the store.
    pub(crate) async fn uploads(&self, prefix: &str, next: Option<&Upload>) -> Result<Uploads> {
        let call = Call::new(self, "list the uploads to", prefix);
        let answer = call
            .value(|| async {
                let request = self.s3().list_multipart_uploads().bucket(self.bucket());
                let request = request
                    .prefix(self.full(prefix))
                    .max_uploads(i32::from(PAGE_ENTRIES_MAX))
                    .set_key_marker(next.map(|upload| self.full(&upload.key)))
                    .set_upload_id_marker(next.map(|upload| upload.id.clone()));
                let answer = request.customize().config_override(call.config()).send().await;
                answer.map_err(|error| Failure::of(error, None))
            })
            .await?;
        let bad = |why: &str| Failure::wrong(why).into_error(call.operation, call.place(), false);
        let upload = |key: Option<String>, id: Option<String>| {
            let key = self.below(key.as_deref()?)?.to_owned();
            Some(Upload { key, id: id? })
        };
        let mut page = Uploads::default();
        for found in answer.uploads.unwrap_or_default() {
            let begun = found.initiated.and_then(|time| SystemTime::try_from(time).ok());
            let upload = upload(found.key, found.upload_id).zip(begun);
            page.uploads.push(upload.ok_or_else(|| bad("it told of an upload without key, id or time"))?);
        }
        if answer.is_truncated == Some(true) {
            let next = upload(answer.next_key_marker, answer.next_upload_id_marker);
            page.next = Some(next.ok_or_else(|| bad("it did not tell how its list goes on"))?);
        }
        Ok(page)
    }

    /// Copies an object within the store, whatever its size, and returns the copy's ETag.
    ///
    /// # Errors
    /// [`super::Kind::NotFound`], [`super::Kind::Precondition`] if the source is replaced meanwhile, [`super::Kind::Expired`].
    pub(crate) async fn copy(&self, from: &str, to: &str, validity: Option<Validity>) -> Result<String> {
        let head = self.head(from).await?;
        match head.bytes <= self.copy_bytes_max() {
            true => self.copy_whole(from, to, &head, validity).await,
            false => self.copy_in_parts(from, to, &head, validity).await,
        }
    }

    async fn copy_whole(
        &self,
        from: &str,
        to: &str,
        head: &Head,
        validity: Option<Validity>,
    ) -> Result<String> {
        let call = Call::new(self, "copy to", to).bytes(head.bytes).valid(validity).placing();
        call.value(|| async {
            let request = self.s3().copy_object().bucket(self.bucket()).key(self.full(to));
            let request = request
                .copy_source(self.source(from))
                .copy_source_if_match(&head.etag)
                .set_server_side_encryption(self.encryption())
                .set_ssekms_key_id(self.kms_key())
                .set_storage_class(self.storage_class());
            let answer = request.customize().config_override(call.config()).send().await;
            let answer = answer.map_err(|error| Failure::of(error, validity))?;
            let etag = answer.copy_object_result.and_then(|copy| copy.e_tag);
            etag.ok_or_else(|| Failure::wrong("its answer has no ETag"))
        })
        .await
    }

    async fn copy_in_parts(
        &self,
        from: &str,
        to: &str,
        head: &Head,
        validity: Option<Validity>,
    ) -> Result<String> {
        let upload = self.create_upload(to, None).await?;
        let ranges = pieces(head.bytes, self.copy_bytes_max());
        let parts = stream::iter((1_u16..).zip(ranges))
            .map(|(number, range)| self.copy_part(from, &upload, number, range, &head.etag))
            .buffered(COPY_PARTS_AT_ONCE_MAX)
            .try_collect::<Vec<_>>();
        let done = match parts.await {
            Ok(parts) => self.complete_upload(&upload, &parts, None, validity).await,
            Err(error) => Err(error),
        };
        if let Err(error) = &done
            && !error.is_not_found()
            && let Err(error) = self.abort_upload(&upload).await
        {
            tracing::warn!(key = to, %error, "what was copied lies there until uploads are collected");
        }
        done
    }

    async fn copy_part(
        &self,
        from: &str,
        upload: &Upload,
        number: u16,
        range: Range<u64>,
        etag: &str,
    ) -> Result<Part> {
        let bytes = range.end.saturating_sub(range.start);
        let call = Call::new(self, "copy a part to", &upload.key).bytes(bytes);
        call.value(|| async {
            let request = self.s3().upload_part_copy().bucket(self.bucket()).key(self.full(&upload.key));
            let request = request
                .upload_id(&upload.id)
                .part_number(i32::from(number))
                .copy_source(self.source(from))
                .copy_source_if_match(etag)
                .copy_source_range(format!("bytes={}-{}", range.start, range.end.saturating_sub(1)));
            let answer = request.customize().config_override(call.config()).send().await;
            let answer = answer.map_err(|error| Failure::of(error, None))?;
            let etag = answer.copy_part_result.and_then(|copy| copy.e_tag);
            Ok(Part { number, bytes, etag: etag.ok_or_else(|| Failure::wrong("its answer has no ETag"))? })
        })
        .await
    }

    /// An object as the header says it that names the source of a copy.
    fn source(&self, key: &str) -> String {
        let path = format!("{}/{}", self.bucket(), self.full(key));
        utf8_percent_encode(&path, PATH).to_string()
    }
}

/// Cuts an object into pieces that can be copied, of at most so many bytes unless they would be too many.
fn pieces(bytes: u64, copy_bytes_max: u64) -> impl Iterator<Item = Range<u64>> {
    let piece = COPY_PART_BYTES.min(copy_bytes_max).max(bytes.div_ceil(COPY_PARTS_MAX)).max(PART_BYTES_MIN);
    let starts = (0..bytes.div_ceil(piece)).map(move |index| index.saturating_mul(piece));
    starts.map(move |start| start..start.saturating_add(piece).min(bytes))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_pieces_of_a_copy_are_all_of_it_and_within_the_limits(bytes in 1_u64..=5 << 40) {
            let pieces: Vec<_> = pieces(bytes, COPY_BYTES_MAX).collect();
            prop_assert!(pieces.len() <= usize::from(PARTS_MAX));
            prop_assert_eq!(pieces[0].start, 0);
            prop_assert_eq!(pieces[pieces.len() - 1].end, bytes);
            for pair in pieces.windows(2) {
                prop_assert_eq!(pair[0].end, pair[1].start);
                prop_assert!((PART_BYTES_MIN..=PART_BYTES_MAX).contains(&(pair[0].end - pair[0].start)));
            }
        }
    }
}
