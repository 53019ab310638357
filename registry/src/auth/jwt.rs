//! Tokens: those of the controller, verified with a pinned key, and our own, which we also sign.
//!
//! Both are ES256 and tell in `access` what they allow. Neither is ever verified with a key that it brings along: the
//! headers `jwk`, `x5c`, `jku` and `x5u` are not looked at.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use aws_lc_rs::encoding::AsDer;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair, ParsedPublicKey,
};
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation, decode, decode_header, encode};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{PrivateKeyDer, SubjectPublicKeyInfoDer};
use serde::{Deserialize, Serialize};

use super::pattern::{Granted, clean};
use super::rules::{Actions, Grant};
use crate::{Error, Result, reload};

/// Whom tokens are for.
pub(crate) const SERVICE: &str = "dvcr";
/// How far the clocks of those who make tokens may be from ours.
pub(super) const LEEWAY_SECONDS: u64 = 10;
/// Who signs the tokens that come as passwords.
const CONTROLLER: &str = "virtualization-controller";
/// What names the key of these.
const CONTROLLER_KEY: &str = "dvcr";
/// Who signs our own.
const OURSELVES: &str = "dvcr-registry";
/// What names the key of these.
const OUR_KEY: &str = "dvcr-registry";
/// How long our own are good for; clients count on a minute.
const LIFE_SECONDS: u64 = 300;
/// Longest token, bytes.
const TOKEN_BYTES_MAX: usize = 16 << 10;
/// Largest file with a key, bytes.
const KEY_BYTES_MAX: u64 = 64 << 10;

/// What a good token says.
#[derive(Debug)]
pub(super) struct Verified {
    pub(super) subject: Option<String>,
    pub(super) grants: Vec<Grant>,
    /// Seconds since 1970 from when on it is not good any more.
    pub(super) expires: u64,
}

/// One entry of `access`, as the token specification of CNCF distribution has it.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Access {
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) name: String,
    #[serde(default)]
    pub(super) actions: Option<Vec<String>>,
}

impl Access {
    /// `None` if it allows nothing that we know.
    fn grant(&self) -> Option<Grant> {
        let actions = self.actions.as_deref().unwrap_or_default();
        match self.kind.as_str() {
            "repository" => {
                let actions = Actions::of(actions.iter().map(String::as_str));
                Granted::parse(&self.name).map(|granted| Grant::Repository(granted, actions))
            }
            "registry" if clean(&self.name) == "catalog" && actions.iter().any(|action| action == "*") => {
                Some(Grant::Catalog)
            }
            _ => None,
        }
    }
}

/// Verifies tokens of one signer.
pub(super) struct Verifier {
    key: DecodingKey,
    key_id: &'static str,
    validation: Validation,
}

impl Verifier {
    /// Reads the public key that the controller's tokens are verified with, from a PEM file.
    pub(super) fn of_controller(path: &Path) -> Result<Self> {
        let bytes = reload::read(path, KEY_BYTES_MAX)?;
        let key = SubjectPublicKeyInfoDer::from_pem_slice(&bytes).ok();
        let key = key.filter(|key| ParsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, key.as_ref()).is_ok());
        let key = key.ok_or_else(|| Error::Secret {
            path: path.to_owned(),
            why: "holds no public key of the curve P-256 in PEM",
        })?;
        Ok(Self::new(key.as_ref(), CONTROLLER_KEY, CONTROLLER))
    }

    fn new(key: &[u8], key_id: &'static str, issuer: &str) -> Self {
        let mut validation = Validation::new(Algorithm::ES256);
        validation.leeway = LEEWAY_SECONDS;
        validation.validate_nbf = true;
        validation.set_audience(&[SERVICE]);
        validation.set_issuer(&[issuer]);
        validation.set_required_spec_claims(&["exp", "iss", "aud"]);
        Self { key: DecodingKey::from_ec_der(key), key_id, validation }
    }

    /// Returns what a token says, if it is good now.
    pub(super) fn verify(&self, token: &str) -> Option<Verified> {
        #[derive(Deserialize)]
        struct Claims {
            sub: Option<String>,
            exp: f64,
            access: Option<Vec<Access>>,
        }
        if token.len() > TOKEN_BYTES_MAX {
            return None;
        }
        let token = decode::<Claims>(token, &self.key, &self.validation).ok()?;
        // What is marked as critical has to be understood, and we understand nothing (RFC 7515, 4.1.11).
        if token.header.kid.as_deref() != Some(self.key_id) || token.header.crit.is_some() {
            return None;
        }
        let Claims { sub, exp, access } = token.claims;
        Some(Verified {
            subject: sub,
            grants: access.unwrap_or_default().iter().filter_map(Access::grant).collect(),
            // Positive and finite: it was validated.
            expires: (exp as u64).saturating_add(LEEWAY_SECONDS),
        })
    }
}

/// Tells whether a text is meant as a token, good or not.
pub(super) fn is_token(text: &str) -> bool {
    text.len() <= TOKEN_BYTES_MAX && decode_header(text).is_ok()
}

/// A key of our own.
#[derive(Clone)]
pub(super) struct Key {
    /// PKCS #8.
    private: Vec<u8>,
    /// As in a certificate.
    public: Vec<u8>,
}

impl Key {
    /// Makes a new one.
    pub(super) fn generate() -> Result<Self> {
        EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING)
            .and_then(|pair| Self::of(&pair))
            .map_err(|_| Error::Invalid { why: "the system gave no key to sign tokens with".to_owned() })
    }

    /// Reads a PEM file, PKCS #8 or what openssl calls an EC private key.
    pub(super) fn load(path: &Path) -> Result<Self> {
        let bytes = reload::read(path, KEY_BYTES_MAX)?;
        let key = PrivateKeyDer::from_pem_slice(&bytes).ok();
        let pair = key.and_then(|key| {
            EcdsaKeyPair::from_private_key_der(&ECDSA_P256_SHA256_FIXED_SIGNING, key.secret_der()).ok()
        });
        pair.and_then(|pair| Self::of(&pair).ok()).ok_or_else(|| Error::Secret {
            path: path.to_owned(),
            why: "holds no private key of the curve P-256 in PEM",
        })
    }

    fn of(pair: &EcdsaKeyPair) -> Result<Self, aws_lc_rs::error::Unspecified> {
        let public = pair.public_key().as_der()?.as_ref().to_vec();
        Ok(Self { private: pair.to_pkcs8v1()?.as_ref().to_vec(), public })
    }
}

/// Signs tokens, and knows them again.
pub(super) struct Issuer {
    key: EncodingKey,
    pub(super) verifier: Verifier,
}

/// A new token.
#[derive(Debug)]
pub(crate) struct Issued {
    pub(crate) token: String,
    /// Seconds since 1970.
    pub(crate) at: u64,
    pub(crate) life_seconds: u64,
}

impl Issuer {
    pub(super) fn new(key: &Key) -> Self {
        Self {
            key: EncodingKey::from_ec_der(&key.private),
            verifier: Verifier::new(&key.public, OUR_KEY, OURSELVES),
        }
    }

    /// Makes a token that is good for five minutes, but not beyond `expires`.
    pub(super) fn issue(
        &self,
        subject: &str,
        access: &[Access],
        expires: Option<u64>,
    ) -> Result<Issued, jsonwebtoken::errors::Error> {
        #[derive(Serialize)]
        struct Claims<'a> {
            iss: &'a str,
            aud: &'a str,
            sub: &'a str,
            iat: u64,
            nbf: u64,
            exp: u64,
            jti: String,
            access: &'a [Access],
        }
        let at = now();
        let end = at.saturating_add(LIFE_SECONDS);
        let exp = expires.map_or(end, |expires| end.min(expires));
        let claims = Claims {
            iss: OURSELVES,
            aud: SERVICE,
            sub: subject,
            iat: at,
            nbf: at,
            exp,
            jti: uuid::Uuid::new_v4().to_string(),
            access,
        };
        let header = Header { kid: Some(OUR_KEY.to_owned()), ..Header::new(Algorithm::ES256) };
        let token = encode(&header, &claims, &self.key)?;
        Ok(Issued { token, at, life_seconds: exp.saturating_sub(at) })
    }
}

/// Seconds since 1970.
pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
