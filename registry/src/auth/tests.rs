//! Credentials of every kind, good and bad.

use std::path::PathBuf;
use std::sync::Arc;

use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use proptest::prelude::*;
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, PublicKeyData};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::jwt::{LEEWAY_SECONDS, Verifier, now};
use super::*;

/// A controller's key, and a directory for files.
struct Signer {
    dir: TempDir,
    pair: KeyPair,
}

impl Signer {
    fn new() -> Self {
        let pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let signer = Self { dir: tempfile::tempdir().unwrap(), pair };
        signer.file("key.pem", signer.pair.public_key_pem().as_bytes());
        signer
    }

    fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    }

    fn public_key(&self) -> PathBuf {
        self.dir.path().join("key.pem")
    }

    fn verifier(&self) -> Verifier {
        Verifier::of_controller(&self.public_key()).unwrap()
    }

    fn sign(&self, header: &Header, claims: &Value) -> String {
        encode(header, claims, &EncodingKey::from_ec_der(&self.pair.serialize_der())).unwrap()
    }

    fn token(&self, access: Value) -> String {
        self.sign(&header(), &claims(access))
    }

    /// Puts a signature of ours below a header that the crate would not write.
    fn sign_raw(&self, header: &Value, claims: &Value) -> String {
        use aws_lc_rs::rand::SystemRandom;
        use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair};
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let message = format!("{}.{}", part(header), part(claims));
        let pair =
            EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &self.pair.serialize_der()).unwrap();
        let signature = pair.sign(&SystemRandom::new(), message.as_bytes()).unwrap();
        format!("{message}.{}", URL_SAFE_NO_PAD.encode(signature))
    }
}

fn header() -> Header {
    Header { kid: Some("dvcr".into()), ..Header::new(Algorithm::ES256) }
}

fn claims(access: Value) -> Value {
    let now = now();
    json!({
        "iss": "virtualization-controller", "aud": "dvcr", "iat": now, "nbf": now - 30, "exp": now + 3600,
        "access": access,
    })
}

/// Claims with one changed, or without it.
fn with(name: &str, value: Value) -> Value {
    let mut claims = claims(json!([]));
    let fields = claims.as_object_mut().unwrap();
    match value {
        Value::Null => drop(fields.remove(name)),
        value => drop(fields.insert(name.to_owned(), value)),
    }
    claims
}

fn users(auth: &Auth) -> Arc<Users> {
    Arc::new(Users::load(auth, None).unwrap())
}

fn basic(user: &str, password: &str) -> HeaderValue {
    basic_header(user, password)
}

#[test]
fn a_good_token_is_accepted() {
    let signer = Signer::new();
    let verifier = signer.verifier();
    for claims in [
        claims(json!([])),
        with("access", Value::Null),
        with("nbf", Value::Null),
        with("iat", Value::Null),
        with("aud", json!(["other", "dvcr"])),
        with("exp", json!(now() + 100)),
        // Within what clocks may differ.
        with("exp", json!(now() - LEEWAY_SECONDS / 2)),
        with("nbf", json!(now() + LEEWAY_SECONDS / 2)),
        with(
            "access",
            json!([{"type": "repository", "name": "a", "actions": null}, {"type": "x", "name": "y"}]),
        ),
    ] {
        assert!(verifier.verify(&signer.sign(&header(), &claims)).is_some(), "{claims}");
    }
}

#[test]
fn a_token_with_a_wrong_claim_is_refused() {
    let signer = Signer::new();
    let verifier = signer.verifier();
    for claims in [
        with("iss", json!("somebody")),
        with("iss", Value::Null),
        with("aud", json!("other")),
        with("aud", json!(["other"])),
        with("aud", json!([])),
        with("aud", Value::Null),
        with("exp", json!(now() - 60)),
        with("exp", json!(0)),
        with("exp", json!(-1)),
        with("exp", json!("soon")),
        with("exp", Value::Null),
        with("nbf", json!(now() + 60)),
        with("nbf", json!("soon")),
        with("access", json!("all")),
        with("access", json!([{"type": "repository"}])),
        with("access", json!([{"type": "repository", "name": "a", "actions": "pull"}])),
        json!([]),
    ] {
        assert!(verifier.verify(&signer.sign(&header(), &claims)).is_none(), "{claims}");
    }
}

#[test]
fn a_token_with_a_wrong_header_is_refused() {
    let signer = Signer::new();
    let (verifier, good) = (signer.verifier(), claims(json!([])));
    let public = std::fs::read(signer.public_key()).unwrap();
    // Its own key as a secret: what is taken by who lets the token choose the algorithm.
    for secret in [public.as_slice(), &signer.pair.subject_public_key_info()] {
        for algorithm in [Algorithm::HS256, Algorithm::HS384] {
            let header = Header { kid: Some("dvcr".into()), ..Header::new(algorithm) };
            let token = encode(&header, &good, &EncodingKey::from_secret(secret)).unwrap();
            assert!(verifier.verify(&token).is_none(), "{algorithm:?}");
        }
    }
    for header in [
        json!({"alg": "none", "kid": "dvcr"}),
        json!({"alg": "None", "kid": "dvcr"}),
        json!({"alg": "RS256", "kid": "dvcr"}),
        json!({"alg": "PS256", "kid": "dvcr"}),
        json!({"alg": "ES384", "kid": "dvcr"}),
        json!({"alg": "EdDSA", "kid": "dvcr"}),
        json!({"alg": "es256", "kid": "dvcr"}),
        json!({"kid": "dvcr"}),
        json!({"alg": "ES256"}),
        json!({"alg": "ES256", "kid": "other"}),
        json!({"alg": "ES256", "kid": ""}),
        json!({"alg": "ES256", "kid": ["dvcr"]}),
        json!({"alg": "ES256", "kid": "dvcr", "crit": ["b64"], "b64": false}),
    ] {
        assert!(verifier.verify(&signer.sign_raw(&header, &good)).is_none(), "{header}");
    }
    assert!(verifier.verify(&signer.sign_raw(&json!({"alg": "ES256", "kid": "dvcr"}), &good)).is_some());
    // Without a signature, whatever the header says.
    let token = signer.sign(&header(), &good);
    let (message, _) = token.rsplit_once('.').unwrap();
    for forged in [message.to_owned(), format!("{message}."), format!("{message}.AAAA"), format!("{token}.")]
    {
        assert!(verifier.verify(&forged).is_none(), "{forged}");
    }
}

#[test]
fn a_key_that_a_token_brings_along_is_not_looked_at() {
    let (signer, stranger) = (Signer::new(), Signer::new());
    let point = &stranger.pair.public_key_raw()[1..];
    let (x, y) = (URL_SAFE_NO_PAD.encode(&point[..32]), URL_SAFE_NO_PAD.encode(&point[32..]));
    let jwk = json!({"kty": "EC", "crv": "P-256", "x": x, "y": y, "kid": "dvcr"});
    let certificate = rcgen::CertificateParams::new(vec![]).unwrap().self_signed(&stranger.pair).unwrap();
    let x5c = STANDARD.encode(certificate.der());
    for header in [
        json!({"alg": "ES256", "kid": "dvcr", "jwk": jwk}),
        json!({"alg": "ES256", "kid": "dvcr", "x5c": [x5c]}),
        json!({"alg": "ES256", "kid": "dvcr", "jku": "http://127.0.0.1:1/keys", "x5u": "http://127.0.0.1:1/cert"}),
    ] {
        let good = claims(json!([]));
        assert!(signer.verifier().verify(&stranger.sign_raw(&header, &good)).is_none(), "{header}");
        // They do no harm either to who signs with the right key.
        assert!(signer.verifier().verify(&signer.sign_raw(&header, &good)).is_some(), "{header}");
    }
}

#[test]
fn only_a_key_of_the_right_curve_is_taken() {
    let signer = Signer::new();
    let other = KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384).unwrap();
    for content in [
        other.public_key_pem().into_bytes(),
        signer.pair.serialize_pem().into_bytes(),
        b"".to_vec(),
        b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n".to_vec(),
    ] {
        let path = signer.file("bad.pem", &content);
        let error = Verifier::of_controller(&path).err().unwrap().to_string();
        assert!(error.contains("bad.pem") && error.contains("P-256"), "{error}");
    }
    for content in [other.serialize_pem(), signer.pair.public_key_pem()] {
        let path = signer.file("bad.pem", content.as_bytes());
        assert!(Key::load(&path).is_err());
    }
}

#[test]
fn a_signing_key_of_a_file_is_shared_by_replicas() {
    let signer = Signer::new();
    let path = signer.file("signing.pem", signer.pair.serialize_pem().as_bytes());
    let issuer = || jwt::Issuer::new(&Key::load(&path).unwrap());
    let issued = issuer().issue("me", &[], None).unwrap();
    let verified = issuer().verifier.verify(&issued.token).unwrap();
    assert_eq!(verified.subject.as_deref(), Some("me"));
    assert!((60..=300).contains(&issued.life_seconds));
    // A key made at start knows only its own, and so does the controller's.
    let own = jwt::Issuer::new(&Key::generate().unwrap());
    assert!(own.verifier.verify(&issued.token).is_none());
    assert!(signer.verifier().verify(&issued.token).is_none());
    assert!(issuer().verifier.verify(&signer.token(json!([]))).is_none());
    // It does not outlive what it was given for.
    let short = own.issue("me", &[], Some(now() + 20)).unwrap();
    assert!(short.life_seconds <= 20);
}

#[tokio::test]
async fn every_source_knows_its_own_users() {
    let signer = Signer::new();
    let line = format!(
        "other:{}\nnode-puller:{}\n",
        bcrypt::hash("pass", 4).unwrap(),
        bcrypt::hash("h", 4).unwrap()
    );
    let auth = Auth {
        admin_password: Some(signer.file("admin", b"secret\n")),
        node_puller_password: Some(signer.file("puller", b"pull:me\r\n")),
        token_key: Some(signer.public_key()),
        htpasswd: Some(signer.file("htpasswd", line.as_bytes())),
        ..Auth::default()
    };
    let users = users(&auth);
    let token = signer.token(json!([]));
    // Twice: the second time from memory.
    for _ in 0..2 {
        for (user, password) in [
            ("admin", "secret"),
            ("node-puller", "pull:me"),
            ("other", "pass"),
            ("dvcr-jwt", &token),
            ("x", &token),
        ] {
            let who = users.verify(basic(user, password).as_bytes()).await.unwrap();
            assert_eq!(who.name(), Some(user));
        }
        for (user, password) in [
            ("admin", "secret\n"),
            ("admin", ""),
            ("admin", &token),
            ("node-puller", "h"),
            ("node-puller", &token),
            ("other", &token),
            ("other", "secret"),
            ("dvcr-jwt", "secret"),
            ("nobody", "pass"),
            ("", &token),
            ("Admin", "secret"),
            (&"x".repeat(256), &token),
        ] {
            let refused = users.verify(basic(user, password).as_bytes()).await.err();
            assert_eq!(refused, Some(Refused::Credentials), "{user}");
        }
    }
    for bad in [&b"Basic"[..], b"Basic !!", b"", b"\xff", b"Digest x", b"Basic eA=="] {
        assert_eq!(users.verify(bad).await.err(), Some(Refused::Credentials));
    }
    for bad in [&b"Bearer x"[..], b"bearer ", b"Bearer a.b.c"] {
        assert_eq!(users.verify(bad).await.err(), Some(Refused::Bearer));
    }
    assert!(matches!(users.verify(basic("", "").as_bytes()).await, Ok(Identity::Anonymous)));
}

#[tokio::test]
async fn a_token_that_is_remembered_ends_all_the_same() {
    let signer = Signer::new();
    let users = users(&Auth { token_key: Some(signer.public_key()), ..Auth::default() });
    // Good for as long as clocks may differ, and a second of that has passed or will.
    let token = signer.sign(&header(), &with("exp", json!(now() + 1 - LEEWAY_SECONDS)));
    let header = basic("dvcr-jwt", &token);
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while users.verify(header.as_bytes()).await.is_ok() {
        assert!(std::time::Instant::now() < deadline, "it never ended");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    assert_eq!(users.verify(header.as_bytes()).await.err(), Some(Refused::Credentials));
}

#[tokio::test]
async fn what_is_remembered_is_bounded() {
    let signer = Signer::new();
    let users = users(&Auth { admin_password: Some(signer.file("admin", b"secret")), ..Auth::default() });
    let header = basic("admin", "secret");
    let text = header.to_str().unwrap().split_once(' ').unwrap().1.to_owned();
    for spaces in 0..3000 {
        let value = format!("Basic {}{text}", " ".repeat(spaces));
        assert!(users.verify(value.as_bytes()).await.is_ok());
    }
    assert!(users.remembered() <= 1024);
}

#[test]
fn neither_output_nor_errors_tell_secrets() {
    let signer = Signer::new();
    let auth = Auth {
        admin_password: Some(signer.file("admin", b"topsecret")),
        htpasswd: Some(signer.file("htpasswd", format!("a:{}", bcrypt::hash("x", 4).unwrap()).as_bytes())),
        token_key: Some(signer.public_key()),
        bearer: Some(Bearer::default()),
        ..Auth::default()
    };
    let guard = Guard::open(auth.clone(), false).unwrap();
    let text = format!("{guard:?} {auth:?} {:?}", guard.users.get());
    assert!(!text.contains("topsecret") && !text.contains("$2"), "{text}");
    for (content, why) in [(&b"top\nsecret"[..], "one line"), (b"", "one line"), (&[b'x'; 5000], "")] {
        let path = signer.file("bad", content);
        let error = Guard::open(Auth { admin_password: Some(path), ..Auth::default() }, false).unwrap_err();
        let text = format!("{error} {error:?}");
        assert!(text.contains(why) && text.contains("bad") && !text.contains("secret"), "{text}");
    }
    let path = signer.file("bad", b"user:plainsecret");
    let error = Guard::open(Auth { htpasswd: Some(path), ..Auth::default() }, false).unwrap_err();
    assert!(!format!("{error} {error:?}").contains("plainsecret"));
}

#[tokio::test]
async fn changed_files_count_from_the_next_look_on_and_bad_ones_never() {
    let signer = Signer::new();
    let path = signer.file("admin", b"one");
    let guard = Guard::open(Auth { admin_password: Some(path), ..Auth::default() }, false).unwrap();
    let knows =
        async |password: &str| guard.users.get().verify(basic("admin", password).as_bytes()).await.is_ok();
    assert!(knows("one").await);
    signer.file("admin", b"second");
    guard.refresh(false);
    assert!(!knows("one").await && knows("second").await);
    signer.file("admin", b"");
    guard.refresh(false);
    assert!(knows("second").await);
    std::fs::remove_file(signer.dir.path().join("admin")).unwrap();
    guard.refresh(true);
    assert!(knows("second").await);
}

#[test]
fn external_addresses_are_what_a_challenge_can_hold() {
    for (text, shown) in [
        ("https://registry.example", "https://registry.example"),
        ("http://127.0.0.1:5000/", "http://127.0.0.1:5000"),
        ("https://[::1]:5000/a/b/", "https://[::1]:5000/a/b"),
    ] {
        assert_eq!(text.parse::<ExternalUrl>().unwrap().to_string(), shown);
    }
    for bad in [
        "",
        "registry.example",
        "ftp://x",
        "https://",
        "https://user:pass@x",
        "https://x?y",
        "https://x#y",
        "https://x/\"",
        "https://x/a b",
        "//x",
    ] {
        assert!(bad.parse::<ExternalUrl>().is_err(), "{bad}");
    }
}

fn parts(path: &str, headers: &[(&'static str, &str)]) -> Parts {
    let mut request = http::Request::get(path);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(()).unwrap().into_parts().0
}

fn challenges(guard: &Guard, path: &str, headers: &[(&'static str, &str)]) -> Vec<String> {
    use axum::response::IntoResponse;
    let response = guard.challenge(&parts(path, headers), "no", None).into_response();
    let values = response.headers().get_all(WWW_AUTHENTICATE).iter();
    values.map(|value| value.to_str().unwrap().to_owned()).collect()
}

#[test]
fn challenges_name_the_address_that_the_client_uses() {
    let guard = |is_tls, bearer| {
        let auth = Auth { anonymous_pull: vec![], bearer: Some(bearer), ..Auth::default() };
        Guard::open(auth, is_tls).unwrap()
    };
    let plain = guard(false, Bearer::default());
    let forwarded =
        [("host", "inside:5000"), ("x-forwarded-proto", "https"), ("x-forwarded-host", "outside, inner")];
    let basic = "Basic realm=\"dvcr\"".to_owned();
    let bearer = |base: &str| format!("Bearer realm=\"{base}/token\",service=\"dvcr\"");
    assert_eq!(challenges(&plain, "/v2/", &forwarded), [basic.clone(), bearer("http://inside:5000")]);
    assert_eq!(
        challenges(&guard(true, Bearer::default()), "/v2/", &forwarded)[1],
        bearer("https://inside:5000")
    );
    let trusting = guard(false, Bearer { trust_forwarded: true, ..Bearer::default() });
    assert_eq!(challenges(&trusting, "/v2/", &forwarded)[1], bearer("https://outside"));
    assert_eq!(challenges(&trusting, "/v2/", &forwarded[..1])[1], bearer("http://inside:5000"));
    let url = Some("https://registry.example/dvcr".parse().unwrap());
    let fixed = guard(false, Bearer { external_url: url, ..Bearer::default() });
    assert_eq!(challenges(&fixed, "/v2/", &forwarded)[1], bearer("https://registry.example/dvcr"));
    // What could break out of the quotes, or no name at all: Basic is left.
    for headers in [&[("host", "a\",scope=\"x")][..], &[]] {
        assert_eq!(challenges(&plain, "/v2/", headers), std::slice::from_ref(&basic));
    }
    for (path, scope) in [
        ("/v2/a/b/tags/list", ",scope=\"repository:a/b:pull\""),
        ("/v2/_catalog", ",scope=\"registry:catalog:*\""),
        ("/v2/nowhere", ""),
    ] {
        let expected = format!("{}{scope}", bearer("http://x"));
        assert_eq!(challenges(&plain, path, &[("host", "x")])[1], expected, "{path}");
    }
    assert_eq!(challenges(&plain, "/token", &[("host", "x")]), [basic]);
}

#[test]
fn with_public_repositories_the_first_challenge_is_one_that_nobody_can_answer_too() {
    let auth = Auth {
        anonymous_pull: vec!["public/**".parse().unwrap()],
        bearer: Some(Bearer::default()),
        ..Auth::default()
    };
    let guard = Guard::open(auth, false).unwrap();
    let found = challenges(&guard, "/v2/", &[("host", "x")]);
    assert!(matches!(found.as_slice(), [one] if one.starts_with("Bearer ")), "{found:?}");
    assert_eq!(challenges(&guard, "/v2/a/tags/list", &[("host", "x")]).len(), 2);
}

proptest! {
    #[test]
    fn a_changed_token_is_never_accepted(at in 0_usize..400, byte in 0_u8..64) {
        let signer = Signer::new();
        let token = signer.token(json!([{"type": "repository", "name": "a", "actions": ["pull"]}]));
        let alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
        let mut changed = token.clone().into_bytes();
        let at = at % changed.len();
        changed[at] = alphabet[usize::from(byte)];
        let changed = String::from_utf8(changed).unwrap();
        prop_assert_eq!(signer.verifier().verify(&changed).is_some(), changed == token);
    }

    #[test]
    fn authorization_headers_are_read_without_a_panic(text in ".{0,200}", scheme in "(Basic|Bearer|basic|) ?") {
        let signer = Signer::new();
        let users = users(&Auth { token_key: Some(signer.public_key()), ..Auth::default() });
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let encoded = STANDARD.encode(&text);
        for value in [format!("{scheme}{text}"), format!("{scheme}{encoded}")] {
            let known = runtime.block_on(users.verify(value.as_bytes())).ok();
            prop_assert!(!matches!(known, Some(Identity::Known(_))));
        }
    }

    #[test]
    fn a_grant_matches_what_a_path_of_the_same_name_leads_to(
        parts in proptest::collection::vec("(a|b|c|\\.|\\.\\.|)", 1..6),
        name in "(a|b|c)(/(a|b|c)){0,3}",
    ) {
        let granted = parts.join("/");
        // The oracle walks a path: below a directory that stands for the root of names.
        let mut place: Vec<&str> = Vec::new();
        let mut left = granted.starts_with('/');
        for part in granted.split('/') {
            match part {
                "" | "." => {}
                ".." => left |= place.pop().is_none(),
                part => place.push(part),
            }
        }
        let expected = !left && place.join("/") == name;
        let matches = pattern::Granted::parse(&granted)
            .is_some_and(|granted| granted.matches(&RepoName::parse(&name).unwrap()));
        prop_assert_eq!(matches, expected, "{}", granted);
    }
}
