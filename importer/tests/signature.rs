//! Signed images: only what the key signed is imported, and exactly that.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by a panic")]

mod common;

use std::collections::HashMap;
use std::sync::Arc;

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use common::{Files, Registry, chain, import_one, import_request, path};
use dvcr_converter::progress::Progress;
use dvcr_image::{Repository, digest, media_type};
use dvcr_importer::signature::VerifyKey;
use dvcr_importer::{Error, ErrorKind, ImportSummary, import};
use serde_json::json;

const SIMPLE: &str = "application/vnd.dev.cosign.simplesigning.v1+json";
const BUNDLE: &str = "application/vnd.dev.sigstore.bundle.v0.3+json";

/// A key pair, and its public half in PEM.
struct Key {
    pair: EcdsaKeyPair,
    pem: String,
}

impl Key {
    fn new() -> Self {
        let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING).unwrap();
        // A SubjectPublicKeyInfo of id-ecPublicKey on prime256v1 up to the point (RFC 5480).
        let mut der = vec![
            0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a,
            0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
        ];
        der.extend(pair.public_key().as_ref());
        let pem = format!("-----BEGIN PUBLIC KEY-----\n{}\n-----END PUBLIC KEY-----\n", STANDARD.encode(der));
        Self { pair, pem }
    }

    fn verify_key(&self) -> VerifyKey {
        VerifyKey::from_pem(self.pem.as_bytes()).unwrap()
    }

    fn sign(&self, message: &[u8]) -> String {
        STANDARD.encode(self.pair.sign(&SystemRandom::new(), message).unwrap())
    }
}

fn payload(digest: &str) -> Vec<u8> {
    let image = json!({"docker-manifest-digest": digest});
    let identity = json!({"docker-reference": "registry.example/team/app"});
    let kind = "cosign container image signature";
    json!({"critical": {"identity": identity, "image": image, "type": kind}, "optional": null})
        .to_string()
        .into_bytes()
}

async fn descriptor(repository: &Repository, kind: &str, bytes: Vec<u8>) -> serde_json::Value {
    let size = bytes.len();
    let digest = repository.push_blob(bytes.into()).await.unwrap();
    json!({"mediaType": kind, "digest": digest.to_string(), "size": size})
}

/// Puts signatures beside an image, in cosign's tag scheme: payloads, each with its signature.
async fn put_simple(repository: &Repository, image: &str, signatures: &[(Vec<u8>, String)]) {
    let config = descriptor(repository, media_type::OCI_CONFIG, b"{}".to_vec()).await;
    let mut layers = Vec::new();
    for (payload, signature) in signatures {
        let mut layer = descriptor(repository, SIMPLE, payload.clone()).await;
        layer["annotations"] = json!({"dev.cosignproject.cosign/signature": signature});
        layers.push(layer);
    }
    let manifest = json!({"schemaVersion": 2, "mediaType": media_type::OCI_MANIFEST, "config": config, "layers": layers});
    let tag = format!("{}.sig", image.replace(':', "-"));
    repository.put_manifest(&tag, manifest.to_string().into(), media_type::OCI_MANIFEST).await.unwrap();
}

/// Lets a bundle refer to an image.
async fn put_bundle(repository: &Repository, image: &str, statement: &serde_json::Value, key: &Key) {
    let (kind, payload) = ("application/vnd.in-toto+json", statement.to_string());
    let message = format!("DSSEv1 {} {kind} {} {payload}", kind.len(), payload.len());
    let envelope = json!({
        "payload": STANDARD.encode(&payload),
        "payloadType": kind,
        "signatures": [{"sig": key.sign(message.as_bytes())}],
    });
    let bundle = json!({"mediaType": BUNDLE, "dsseEnvelope": envelope}).to_string();
    let subject = repository.manifest(image).await.unwrap();
    let subject = json!({"mediaType": subject.media_type, "digest": image, "size": subject.bytes.len()});
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": media_type::OCI_MANIFEST,
        "artifactType": BUNDLE,
        "config": descriptor(repository, "application/vnd.oci.empty.v1+json", b"{}".to_vec()).await,
        "layers": [descriptor(repository, BUNDLE, bundle.into_bytes()).await],
        "subject": subject,
    })
    .to_string();
    let digest = digest::sha256(manifest.as_bytes()).unwrap();
    let put = repository.put_manifest(digest.as_ref(), manifest.into(), media_type::OCI_MANIFEST).await;
    put.unwrap();
}

fn statement(digest: &str, predicate: &str) -> serde_json::Value {
    let (algorithm, hex) = digest.split_once(':').unwrap();
    json!({
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"digest": HashMap::from([(algorithm, hex)])}],
        "predicateType": predicate,
        "predicate": {},
    })
}

const SIGNED: &str = "https://sigstore.dev/cosign/sign/v1";

struct Setup {
    registry: Registry,
    files: Files,
    made: ImportSummary,
    key: Key,
}

impl Setup {
    async fn new() -> Self {
        let (registry, files) = (Registry::ours().await, Files::new());
        let made = import_one(path(&files.qcow2(&[])), &registry.reference("team/app:1")).await.unwrap();
        Self { registry, files, made, key: Key::new() }
    }

    async fn import(&self, to: &str) -> Result<ImportSummary, Error> {
        let source = format!("docker://{}", self.registry.reference("team/app:1"));
        let mut request = import_request(&source, &self.registry.reference(to));
        request.source_options.verify_key = Some(self.key.verify_key());
        import(request, Arc::new(Progress::default())).await
    }

    async fn is_refused(&self, part: &str) {
        let error = self.import("refused").await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Untrusted, "{}", chain(&error));
        assert!(error.to_string().contains(part), "{part}: {}", chain(&error));
        assert_eq!(self.registry.repository("refused").manifest_digest("latest").await.unwrap(), None);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_key_signed_is_imported_and_nothing_else_is() {
    let setup = Setup::new().await;
    let (repository, digest) = (setup.registry.repository("team/app"), setup.made.digest.as_str());
    setup.is_refused("has no signature").await;

    let (right, key) = (payload(digest), &setup.key);
    let stranger = Key::new();
    put_simple(&repository, digest, &[(right.clone(), stranger.sign(&right))]).await;
    setup.is_refused("another key").await;

    let elsewhere = payload(digest::sha256(b"other").unwrap().as_ref());
    put_simple(&repository, digest, &[(elsewhere.clone(), key.sign(&elsewhere))]).await;
    setup.is_refused("another image").await;

    let tampered = String::from_utf8(right.clone()).unwrap().replace("team/app", "team/apx").into_bytes();
    put_simple(&repository, digest, &[(tampered, key.sign(&right))]).await;
    setup.is_refused("other bytes").await;

    put_simple(&repository, digest, &[(right.clone(), "no base64".into())]).await;
    setup.is_refused("another key").await;

    let by_both = [(right.clone(), stranger.sign(&right)), (right.clone(), key.sign(&right))];
    put_simple(&repository, digest, &by_both).await;
    assert_eq!(setup.import("good").await.unwrap().digest, digest);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bundle_that_refers_to_the_image_is_a_signature_too() {
    let setup = Setup::new().await;
    let (repository, digest) = (setup.registry.repository("team/app"), setup.made.digest.as_str());
    put_bundle(&repository, digest, &statement(digest, SIGNED), &Key::new()).await;
    setup.is_refused("another key").await;
    let attested = statement(digest, "https://example.org/has-been-looked-at/v1");
    put_bundle(&repository, digest, &attested, &setup.key).await;
    setup.is_refused("none of 2 signatures").await;
    let other = statement(digest::sha256(b"other").unwrap().as_ref(), SIGNED);
    put_bundle(&repository, digest, &other, &setup.key).await;
    setup.is_refused("none of 3 signatures").await;
    put_bundle(&repository, digest, &statement(digest, SIGNED), &setup.key).await;
    assert_eq!(setup.import("good").await.unwrap().digest, digest);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signature_is_for_one_digest_and_not_for_a_tag() {
    let setup = Setup::new().await;
    let (repository, digest) = (setup.registry.repository("team/app"), setup.made.digest.as_str());
    let right = payload(digest);
    put_simple(&repository, digest, &[(right.clone(), setup.key.sign(&right))]).await;
    setup.import("good").await.unwrap();
    let other = setup.files.path("disk.raw");
    import_one(path(&other), &setup.registry.reference("team/app:1")).await.unwrap();
    setup.is_refused("has no signature").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_cannot_be_signed_is_refused() {
    let setup = Setup::new().await;
    let mut request = import_request(path(&setup.files.path("disk.raw")), &setup.registry.reference("a"));
    request.source_options.verify_key = Some(setup.key.verify_key());
    let error = import(request, Arc::new(Progress::default())).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{}", chain(&error));
}
