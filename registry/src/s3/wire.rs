//! What happens to a request at the wire: when it expires, when it left, when it was answered.
//!
//! A request of S3 is valid for a quarter of an hour, as long as its signature is in a header. Signed in its query, it is
//! valid for as many seconds as the query says. The SDK signs so only what it gives away as a URL; here the same is
//! done to requests of all operations, which then go the ordinary way.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use aws_runtime::auth::{HttpSignatureType, SigV4OperationSigningConfig};
use aws_sdk_s3::config::interceptors::{
    BeforeDeserializationInterceptorContextRef, BeforeTransmitInterceptorContextMut,
    BeforeTransmitInterceptorContextRef,
};
use aws_sdk_s3::config::{ConfigBag, Intercept, RuntimeComponents};
use aws_sdk_s3::error::BoxError;
use aws_sdk_s3::primitives::{DateTime, DateTimeFormat};
use aws_sigv4::http_request::SignableBody;

use super::clock::{Clock, Moment};

/// When a request is valid, by the server's clock: it refuses to begin with one that comes later.
///
/// The server looks at the clock when it has the head of a request. A body that is held up behind its head is still taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Validity {
    /// The first moment; what is less than a second is cut off.
    pub from: SystemTime,
    /// How long; whole seconds, at least one.
    pub lasts: Duration,
}

impl Validity {
    /// The moment from which on the server refuses.
    pub(crate) fn end(self) -> SystemTime {
        self.from.checked_add(self.lasts).unwrap_or(self.from)
    }
}

/// Goes with one request.
#[derive(Debug)]
pub(super) struct Wire {
    clock: Arc<Clock>,
    validity: Option<Validity>,
    /// SHA-256 of the content, in hex.
    payload: Option<String>,
    /// Spoil the signature, to see whether somebody looks at it.
    forge: bool,
    sent: OnceLock<Moment>,
}

impl Wire {
    pub(super) fn new(
        clock: Arc<Clock>,
        validity: Option<Validity>,
        payload: Option<String>,
        forge: bool,
    ) -> Self {
        Self { clock, validity, payload, forge, sent: OnceLock::new() }
    }
}

impl Intercept for Wire {
    fn name(&self) -> &'static str {
        "Wire"
    }

    fn modify_before_signing(
        &self,
        _: &mut BeforeTransmitInterceptorContextMut<'_>,
        _: &RuntimeComponents,
        bag: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let mut signing = bag.load::<SigV4OperationSigningConfig>().cloned().unwrap_or_default();
        match (self.validity, &self.payload) {
            (None, None) => return Ok(()),
            (None, Some(hash)) => {
                signing.signing_options.payload_override = Some(SignableBody::Precomputed(hash.clone()));
            }
            // A query has no place for a hash.
            (Some(validity), _) => {
                signing.signing_options.signature_type = HttpSignatureType::HttpRequestQueryParams;
                signing.signing_options.expires_in = Some(validity.lasts);
                signing.signing_options.payload_override = Some(SignableBody::UnsignedPayload);
            }
        }
        bag.interceptor_state().store_put(signing);
        Ok(())
    }

    fn modify_before_transmit(
        &self,
        context: &mut BeforeTransmitInterceptorContextMut<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        if self.forge {
            let request = context.request_mut();
            // Its last digit, which stands at the end of the query.
            let mut uri = request.uri().to_owned();
            let last = if uri.pop() == Some('0') { '1' } else { '0' };
            uri.push(last);
            request.set_uri(uri)?;
        }
        Ok(())
    }

    fn read_before_transmit(
        &self,
        _: &BeforeTransmitInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let _ = self.sent.set(Moment::now());
        Ok(())
    }

    fn read_after_transmit(
        &self,
        context: &BeforeDeserializationInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let date = context.response().headers().get("date").and_then(date);
        if let (Some(date), Some(sent)) = (date, self.sent.get()) {
            self.clock.note(date, *sent, Moment::now());
        }
        Ok(())
    }
}

/// Reads a `Date`, seconds since 1970.
pub(super) fn date(text: &str) -> Option<i64> {
    DateTime::from_str(text, DateTimeFormat::HttpDate).ok().map(|date| date.secs())
}
