//! Signatures of images, as cosign makes them with a key: nothing is taken on trust but that key.
//!
//! ```text
//!  tag sha256-<hex>.sig ──> layers: payload (simple signing) + signature in an annotation ─┐
//!  referrers of the digest ──> bundle: DSSE envelope around an in-toto statement ──────────┴─> the digest is signed
//! ```
//!
//! No transparency log and no certificate is asked. The formats are those of cosign's specs/SIGNATURE_SPEC.md and of
//! Sigstore's bundle v0.3.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1, ParsedPublicKey};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use dvcr_image::digest::Digest;
use dvcr_image::{Reference, Repository};
use rustls::pki_types::SubjectPublicKeyInfoDer;
use rustls::pki_types::pem::PemObject;
use serde::Deserialize;

use crate::{Error, ErrorKind, Result};

/// Largest key file, bytes.
const KEY_BYTES_MAX: u64 = 64 << 10;
/// Most signatures of one image that are looked at, of either form.
const SIGNATURES_MAX: usize = 64;
/// Largest payload or bundle that is read, bytes.
const PAYLOAD_BYTES_MAX: u64 = 1 << 20;

const SIMPLE_SIGNING: &str = "application/vnd.dev.cosign.simplesigning.v1+json";
const SIMPLE_TYPE: &str = "cosign container image signature";
const SIGNATURE_ANNOTATION: &str = "dev.cosignproject.cosign/signature";
const BUNDLE: &str = "application/vnd.dev.sigstore.bundle.v0.3+json";
const STATEMENT: &str = "application/vnd.in-toto+json";
/// The statement that is a signature; others attest something about the image, perhaps nothing good.
const SIGNED: &str = "https://sigstore.dev/cosign/sign/v1";

/// A public key: ECDSA on P-256, as `cosign generate-key-pair` makes them.
#[derive(Clone)]
pub struct VerifyKey(Arc<ParsedPublicKey>);

impl fmt::Debug for VerifyKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("VerifyKey(..)")
    }
}

impl VerifyKey {
    /// Reads a key in PEM from a file.
    pub fn read(path: &Path) -> Result<Self> {
        let failed = |e| Error::with(ErrorKind::Invalid, format!("reading the key {}", path.display()), e);
        let bytes = std::fs::metadata(path).map_err(failed)?.len();
        if bytes > KEY_BYTES_MAX {
            let text =
                format!("the key {} has {bytes} bytes, at most {KEY_BYTES_MAX} are read", path.display());
            return Err(Error::new(ErrorKind::Invalid, text));
        }
        let pem = std::fs::read(path).map_err(failed)?;
        Self::from_pem(&pem).map_err(|e| {
            Error::with(ErrorKind::Invalid, format!("{} is not a key that verifies", path.display()), e)
        })
    }

    /// Reads a key in PEM, `-----BEGIN PUBLIC KEY-----`.
    pub fn from_pem(pem: &[u8]) -> Result<Self> {
        let bad = "the key must be a public key in PEM, ECDSA on the curve P-256, such as cosign.pub";
        let der = SubjectPublicKeyInfoDer::from_pem_slice(pem)
            .map_err(|e| Error::with(ErrorKind::Invalid, bad, e))?;
        let key = ParsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, der.as_ref());
        key.map(|key| Self(Arc::new(key))).map_err(|e| Error::with(ErrorKind::Invalid, bad, e))
    }

    fn verifies(&self, message: &[u8], signature: &str) -> bool {
        let signature = STANDARD.decode(signature.trim());
        signature.is_ok_and(|signature| self.0.verify_sig(message, &signature).is_ok())
    }
}

/// Fails with [`ErrorKind::Untrusted`] unless the manifest `digest` of `image` has a signature of `key`.
pub(crate) async fn verify(
    repository: &Repository,
    image: &Reference,
    digest: &Digest,
    key: &VerifyKey,
) -> Result<()> {
    let failed = |e| Error::with(ErrorKind::Source, format!("reading the signatures of {image}"), e);
    let (mut found, mut last) = (0, None);
    for bundles in [false, true] {
        let candidates = match bundles {
            false => simple_signatures(repository, digest).await,
            true => bundles_of(repository, digest).await,
        };
        for candidate in candidates.map_err(failed)?.into_iter().take(SIGNATURES_MAX) {
            found += 1;
            match candidate.judge(digest, key) {
                Ok(()) => return Ok(()),
                Err(why) => last = Some(why),
            }
        }
    }
    let text = match last {
        None => format!(
            "{image} has no signature that is known here; sign it with cosign, by the key that is demanded"
        ),
        Some(why) => {
            format!("none of {found} signatures of {image} holds for the key that is demanded: {why}")
        }
    };
    Err(Error::new(ErrorKind::Untrusted, text))
}

/// A signature that may be one.
enum Candidate {
    Simple { payload: Vec<u8>, signature: String },
    Bundle(Vec<u8>),
}

/// The layers of the image that stands beside the signed one.
async fn simple_signatures(repository: &Repository, digest: &Digest) -> dvcr_image::Result<Vec<Candidate>> {
    let tag = format!("{}.sig", digest.as_ref().replace(':', "-"));
    let image = match repository.image(&tag).await {
        Ok((_, image)) => image,
        Err(error) if error.kind() == dvcr_image::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut candidates = Vec::new();
    for layer in image.layers().iter().take(SIGNATURES_MAX) {
        let signature = layer.annotations().as_ref().and_then(|all| all.get(SIGNATURE_ANNOTATION));
        let is_payload =
            layer.media_type().to_string() == SIMPLE_SIGNING && layer.size() <= PAYLOAD_BYTES_MAX;
        if let Some(signature) = signature.filter(|_| is_payload) {
            let payload = repository.small_blob(layer.digest(), layer.size()).await?;
            candidates.push(Candidate::Simple { payload, signature: signature.clone() });
        }
    }
    Ok(candidates)
}

/// The bundles that refer to the signed image.
async fn bundles_of(repository: &Repository, digest: &Digest) -> dvcr_image::Result<Vec<Candidate>> {
    let mut candidates = Vec::new();
    for referrer in repository.referrers(digest, BUNDLE).await?.iter().take(SIGNATURES_MAX) {
        match bundle(repository, referrer.digest()).await {
            Ok(bundle) => candidates.extend(bundle.map(Candidate::Bundle)),
            Err(error) if is_passing(&error) => return Err(error),
            // One that somebody damaged must not hide the others.
            Err(error) => {
                tracing::debug!(referrer = %referrer.digest(), %error, "a signature is passed over")
            }
        }
    }
    Ok(candidates)
}

async fn bundle(repository: &Repository, referrer: &Digest) -> dvcr_image::Result<Option<Vec<u8>>> {
    let (_, image) = repository.image(referrer.as_ref()).await?;
    match image.layers().first() {
        Some(layer) if layer.media_type().to_string() == BUNDLE && layer.size() <= PAYLOAD_BYTES_MAX => {
            repository.small_blob(layer.digest(), layer.size()).await.map(Some)
        }
        _ => Ok(None),
    }
}

/// Whether the registry may do better another time.
fn is_passing(error: &dvcr_image::Error) -> bool {
    use dvcr_image::ErrorKind::{Denied, Unauthorized, Unavailable, Untrusted};
    matches!(error.kind(), Unavailable | Untrusted | Unauthorized | Denied)
}

#[derive(Deserialize)]
struct SimplePayload {
    critical: Critical,
}

#[derive(Deserialize)]
struct Critical {
    image: CriticalImage,
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Deserialize)]
struct CriticalImage {
    #[serde(rename = "docker-manifest-digest")]
    digest: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Bundle {
    dsse_envelope: Envelope,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Envelope {
    payload: String,
    payload_type: String,
    signatures: Vec<EnvelopeSignature>,
}

#[derive(Deserialize)]
struct EnvelopeSignature {
    sig: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Statement {
    subject: Vec<Subject>,
    predicate_type: String,
}

#[derive(Deserialize)]
struct Subject {
    digest: std::collections::BTreeMap<String, String>,
}

const NOT_BY_KEY: &str = "it was made by another key, or for other bytes";
const MALFORMED: &str = "it is malformed";

impl Candidate {
    /// Whether the key signed `digest`; what it signed is read only once its signature holds.
    fn judge(&self, digest: &Digest, key: &VerifyKey) -> Result<(), String> {
        match self {
            Self::Simple { payload, signature } => {
                if !key.verifies(payload, signature) {
                    return Err(NOT_BY_KEY.into());
                }
                let payload: SimplePayload = serde_json::from_slice(payload).map_err(|_| MALFORMED)?;
                if payload.critical.kind != SIMPLE_TYPE {
                    return Err("it is no signature of an image".into());
                }
                same(&payload.critical.image.digest, digest)
            }
            Self::Bundle(bytes) => {
                let Bundle { dsse_envelope: envelope } =
                    serde_json::from_slice(bytes).map_err(|_| "its bundle has no envelope")?;
                let payload = STANDARD.decode(&envelope.payload).map_err(|_| MALFORMED)?;
                let message = pre_authentication(&envelope.payload_type, &payload);
                let mut signatures = envelope.signatures.iter().take(SIGNATURES_MAX);
                if !signatures.any(|one| key.verifies(&message, &one.sig)) {
                    return Err(NOT_BY_KEY.into());
                }
                if envelope.payload_type != STATEMENT {
                    return Err("it is no statement about an image".into());
                }
                let statement: Statement = serde_json::from_slice(&payload).map_err(|_| MALFORMED)?;
                if statement.predicate_type != SIGNED {
                    return Err("it attests something else than that the image is signed".into());
                }
                let algorithm = digest.algorithm().to_string();
                let named = statement.subject.iter().filter_map(|subject| subject.digest.get(&algorithm));
                match named.map(|hex| format!("{algorithm}:{hex}")).find(|named| named == digest.as_ref()) {
                    Some(_) => Ok(()),
                    None => Err("it is for another image".into()),
                }
            }
        }
    }
}

fn same(signed: &str, digest: &Digest) -> Result<(), String> {
    match signed == digest.as_ref() {
        true => Ok(()),
        false => Err("it is for another image".into()),
    }
}

/// What a DSSE envelope's signatures are over (its protocol.md, PAE).
fn pre_authentication(kind: &str, payload: &[u8]) -> Vec<u8> {
    let mut message = format!("DSSEv1 {} {kind} {} ", kind.len(), payload.len()).into_bytes();
    message.extend_from_slice(payload);
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Made by cosign 3.1 with the key below.
    const KEY: &str = "-----BEGIN PUBLIC KEY-----\n\
        MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEZpLPJxMLvGLMJONc7JQamgCNRi7R\n\
        XBL9BOhDdOnDvZqqDXH2N7KjGWufiY00MK06ctPxWWHgZc6Fpec2UyQAkA==\n\
        -----END PUBLIC KEY-----\n";
    const DIGEST: &str = "sha256:78e5200e771dae3bfb991e11151a3914efa38df455893253298a83cb47b466f6";
    const PAYLOAD: &str = "eyJfdHlwZSI6Imh0dHBzOi8vaW4tdG90by5pby9TdGF0ZW1lbnQvdjEiLCAic3ViamVjdCI6W3siZGlnZXN0Ijp7InNoYTI1NiI6Ijc4ZTUyMDBlNzcxZGFlM2JmYjk5MWUxMTE1MWEzOTE0ZWZhMzhkZjQ1NTg5MzI1MzI5OGE4M2NiNDdiNDY2ZjYifSwgImFubm90YXRpb25zIjp7fX1dLCAicHJlZGljYXRlVHlwZSI6Imh0dHBzOi8vc2lnc3RvcmUuZGV2L2Nvc2lnbi9zaWduL3YxIiwgInByZWRpY2F0ZSI6e319";
    const SIGNATURE: &str =
        "MEYCIQD4FC5aYo7xZ2nuCHahThxxSLoDKB042HJdMAJ0dVxfXgIhALZcp9LGlOUXQ14OFl5ycGTzYiGpTtjusqGLPa7vE+d0";

    fn bundle(payload: &str, kind: &str) -> Candidate {
        let text = format!(
            "{{\"mediaType\":\"{BUNDLE}\",\"dsseEnvelope\":{{\"payload\":\"{payload}\",\"payloadType\":\"{kind}\",\
             \"signatures\":[{{\"sig\":\"{SIGNATURE}\"}}]}}}}"
        );
        Candidate::Bundle(text.into_bytes())
    }

    #[test]
    fn a_bundle_of_cosign_holds_for_its_image_alone() {
        let key = VerifyKey::from_pem(KEY.as_bytes()).unwrap();
        let digest = dvcr_image::digest::parse(DIGEST).unwrap();
        bundle(PAYLOAD, STATEMENT).judge(&digest, &key).unwrap();
        let other = dvcr_image::digest::sha256(b"other").unwrap();
        assert!(bundle(PAYLOAD, STATEMENT).judge(&other, &key).unwrap_err().contains("another image"));
        let tampered = PAYLOAD.replacen('e', "f", 1);
        assert!(bundle(&tampered, STATEMENT).judge(&digest, &key).unwrap_err().contains("other bytes"));
        assert!(bundle(PAYLOAD, "text/plain").judge(&digest, &key).is_err());
        assert!(Candidate::Bundle(b"{}".to_vec()).judge(&digest, &key).is_err());
    }

    #[test]
    fn a_key_of_another_kind_is_refused() {
        // Ed25519, RFC 8410.
        let ed25519 = "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE=\n\
                       -----END PUBLIC KEY-----\n";
        for bad in [ed25519, "", "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"] {
            assert_eq!(VerifyKey::from_pem(bad.as_bytes()).unwrap_err().kind(), ErrorKind::Invalid, "{bad}");
        }
    }
}
