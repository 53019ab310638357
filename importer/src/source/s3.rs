//! An object in an S3 bucket: its address is signed once, and then read like any other over HTTP.
//!
//! The signature stands in the query (AWS Signature Version 4, "Authenticating Requests: Using Query Parameters"), so that every
//! range and every retry of the one transfer has it, and nothing of it goes to where the server may redirect.

use std::fmt;
use std::str::FromStr;

use aws_lc_rs::{digest, hmac};
use chrono::{DateTime, Utc};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use reqwest::Url;

use crate::{Error, ErrorKind, Result};

/// How long a signed address serves, seconds: the longest that the protocol has.
const EXPIRES_S: u32 = 7 * 24 * 3600;
/// The region that servers which know none of their own go by.
const REGION: &str = "us-east-1";
/// Longest key, bytes.
const KEY_BYTES_MAX: usize = 1024;

/// What is written as it is: RFC 3986's unreserved characters.
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');
/// In a path the separators too.
const ENCODED_PATH: &AsciiSet = &ENCODED.remove(b'/');

/// An object: `s3://bucket/key`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Object {
    bucket: String,
    key: String,
}

/// Where buckets are, and who reads them.
#[derive(Clone, Debug, Default)]
pub struct S3Options {
    /// The server, `http(s)://host[:port]`; by default that of AWS for the region.
    pub endpoint: Option<String>,
    /// The region; us-east-1 by default.
    pub region: Option<String>,
    /// Who reads; by default anybody may.
    pub credentials: Option<S3Credentials>,
}

/// A key to buckets. `Debug` shows nothing of it.
#[derive(Clone)]
pub struct S3Credentials {
    /// Tells who it is.
    pub access_key_id: String,
    /// Proves it.
    pub secret_access_key: String,
    /// Comes with keys that expire.
    pub session_token: Option<String>,
}

impl fmt::Debug for S3Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("S3Credentials(..)")
    }
}

impl FromStr for Object {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let bad = |why: &str| {
            Error::new(ErrorKind::Invalid, format!("the address of an object {why}; write s3://bucket/key"))
        };
        let rest = text.strip_prefix("s3://").ok_or_else(|| bad("does not begin with s3://"))?;
        let (bucket, key) = rest.split_once('/').ok_or_else(|| bad("names no key"))?;
        let is_bucket = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'-');
        if bucket.len() < 3 || bucket.len() > 63 || !bucket.bytes().all(is_bucket) || bucket.contains("..") {
            return Err(bad(
                "has a bucket whose name is not of 3 to 63 small letters, digits, dots and hyphens",
            ));
        }
        let key = percent_decode_str(key).decode_utf8().map_err(|_| bad("is not UTF-8"))?.into_owned();
        // What a URL would make another path of.
        let is_path = |part: &str| matches!(part, "." | "..");
        if key.is_empty() || key.len() > KEY_BYTES_MAX || key.split('/').any(is_path) {
            return Err(bad(&format!(
                "has a key of 0 or more than {KEY_BYTES_MAX} bytes, or with . or .. in it"
            )));
        }
        Ok(Self { bucket: bucket.to_owned(), key })
    }
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "s3://{}/{}", self.bucket, utf8_percent_encode(&self.key, ENCODED_PATH))
    }
}

impl Object {
    /// The address of the object over HTTP, signed for a week if there are credentials.
    pub(super) fn url(&self, options: &S3Options) -> Result<String> {
        self.url_at(options, Utc::now())
    }

    fn url_at(&self, options: &S3Options, now: DateTime<Utc>) -> Result<String> {
        let region = options.region.as_deref().unwrap_or(REGION);
        let endpoint = match &options.endpoint {
            Some(endpoint) => endpoint.clone(),
            None => format!("https://s3.{region}.amazonaws.com"),
        };
        let endpoint = Url::parse(&endpoint)
            .ok()
            .filter(|url| matches!(url.scheme(), "http" | "https") && url.host_str().is_some())
            .filter(|url| url.username().is_empty() && url.password().is_none() && url.query().is_none())
            .ok_or_else(|| {
                let text = "the S3 endpoint is no address of a server; write https://host[:port] without user and query";
                Error::new(ErrorKind::Invalid, text)
            })?;
        let folder = endpoint.path().trim_end_matches('/');
        let path = format!("{folder}/{}/{}", self.bucket, utf8_percent_encode(&self.key, ENCODED_PATH));
        // As the Host header has it: without the port that the scheme has anyway.
        let host = match (endpoint.host_str().unwrap_or_default(), endpoint.port()) {
            (host, Some(port)) => format!("{host}:{port}"),
            (host, None) => host.to_owned(),
        };
        let base = format!("{}://{host}{path}", endpoint.scheme());
        match &options.credentials {
            None => Ok(base),
            Some(credentials) => {
                let query = presigned(credentials, region, &host, &path, EXPIRES_S, now);
                Ok(format!("{base}?{query}"))
            }
        }
    }
}

/// The query that lets GET read `path` at `host`.
fn presigned(
    credentials: &S3Credentials,
    region: &str,
    host: &str,
    path: &str,
    expires_s: u32,
    now: DateTime<Utc>,
) -> String {
    let encode = |text: &str| utf8_percent_encode(text, ENCODED).to_string();
    let (day, time) = (now.format("%Y%m%d").to_string(), now.format("%Y%m%dT%H%M%SZ").to_string());
    let scope = format!("{day}/{region}/s3/aws4_request");
    let who = encode(&format!("{}/{scope}", credentials.access_key_id));
    // In the order of the names, as it is signed.
    let mut query = format!(
        "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential={who}&X-Amz-Date={time}&X-Amz-Expires={expires_s}"
    );
    if let Some(token) = &credentials.session_token {
        query += &format!("&X-Amz-Security-Token={}", encode(token));
    }
    query += "&X-Amz-SignedHeaders=host";
    let request = format!("GET\n{path}\n{query}\nhost:{host}\n\nhost\nUNSIGNED-PAYLOAD");
    let hash = hex(digest::digest(&digest::SHA256, request.as_bytes()).as_ref());
    let text = format!("AWS4-HMAC-SHA256\n{time}\n{scope}\n{hash}");
    let secret = format!("AWS4{}", credentials.secret_access_key).into_bytes();
    let key = [day.as_str(), region, "s3", "aws4_request"]
        .iter()
        .fold(secret, |key, part| signed(&key, part.as_bytes()));
    query + "&X-Amz-Signature=" + &hex(&signed(&key, text.as_bytes()))
}

fn signed(key: &[u8], text: &[u8]) -> Vec<u8> {
    hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), text).as_ref().to_vec()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn credentials() -> S3Credentials {
        S3Credentials {
            access_key_id: "AKIAIOSFODNN7EXAMPLE".into(),
            secret_access_key: "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY".into(),
            session_token: None,
        }
    }

    /// The example of the protocol's own page.
    #[test]
    fn a_signature_is_that_of_the_protocol() {
        let now = "2013-05-24T00:00:00Z".parse().unwrap();
        let host = "examplebucket.s3.amazonaws.com";
        let query = presigned(&credentials(), "us-east-1", host, "/test.txt", 86_400, now);
        let expected = "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIAIOSFODNN7EXAMPLE%2F20130524%2Fus-east-1%2Fs3%2F\
             aws4_request&X-Amz-Date=20130524T000000Z&X-Amz-Expires=86400&X-Amz-SignedHeaders=host&X-Amz-Signature=\
             aeeed9bbccd4d02ee5c0109b86d86835f995330da4c265957d157751f604d404";
        assert_eq!(query, expected);
    }

    #[test]
    fn an_object_is_a_bucket_and_a_key() {
        let object: Object = "s3://a-bucket/images/disk 1%2b.qcow2".parse().unwrap();
        assert_eq!((object.bucket.as_str(), object.key.as_str()), ("a-bucket", "images/disk 1+.qcow2"));
        assert_eq!(object.to_string(), "s3://a-bucket/images/disk%201%2B.qcow2");
        let url = |endpoint: Option<&str>| {
            object.url(&S3Options { endpoint: endpoint.map(str::to_owned), ..S3Options::default() })
        };
        assert_eq!(
            url(None).unwrap(),
            "https://s3.us-east-1.amazonaws.com/a-bucket/images/disk%201%2B.qcow2"
        );
        assert_eq!(
            url(Some("http://[::1]:9000/s3/")).unwrap(),
            "http://[::1]:9000/s3/a-bucket/images/disk%201%2B.qcow2"
        );
        for bad in ["ftp://h", "https://user:s3cret@h", "h", "https://h/?x=s3cret"] {
            let error = url(Some(bad)).unwrap_err();
            assert!(!error.to_string().contains("s3cret"), "{error}");
        }
        for bad in
            ["s3://bucket", "s3://bucket/", "s3://B/key", "s3:///key", "s3://bucket/a/../b", "s3://b@b/x"]
        {
            assert_eq!(bad.parse::<Object>().unwrap_err().kind(), ErrorKind::Invalid, "{bad}");
        }
    }

    #[test]
    fn a_secret_stays_where_it_is() {
        let options = S3Options { credentials: Some(credentials()), ..S3Options::default() };
        let url = "s3://bucket/key".parse::<Object>().unwrap().url(&options).unwrap();
        assert!(!url.contains("EXAMPLEKEY") && url.contains("X-Amz-Signature="), "{url}");
        assert!(!format!("{options:?}").contains("EXAMPLE"));
    }
}
