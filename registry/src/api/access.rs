//! Who may do what: every route and method, for every kind of caller.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::body::Body;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::header::{AUTHORIZATION, WWW_AUTHENTICATE};
use http::{Method, Request};
use http_body_util::BodyExt;
use hyper::service::Service;
use hyper_util::service::TowerToHyperService;
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::route::Route;
use crate::auth::{Auth, Bearer, Peer};
use crate::{Config, Registry};

/// The columns of the table.
const CALLERS: [&str; 18] = [
    "nobody",
    "a wrong password",
    "admin",
    "node-puller",
    "a user of the htpasswd file",
    "a certificate of admin",
    "another certificate",
    "a token for nothing",
    "a token to pull",
    "a token to push",
    "a token to push, and to pull from vi/ns/b",
    "a token to delete",
    "a token for *",
    "a token to pull from vi/ns/*",
    "a token for * of vi/ns/b",
    "a token for the catalogue",
    "our own token to pull",
    "our own token for nothing",
];

// One letter for each caller. A: allowed, and so the status that the row tells; D: 403; C: 401.
const KNOWN: &str = "CC AAA AA AAAAAAAAA AA";
const PULL: &str = "CC AAA AA DAAADAADD AC";
const PUBLIC: &str = "AC AAA AA AAAAAAAAA AA";
const PUSH: &str = "CC ADA AD DDAADADDD CC";
const MOUNT: &str = "CC ADA AD DDDADDDDD CC";
const DELETE: &str = "CC ADA AD DDDDAADDD CC";
const OTHERS: &str = "CC ADA AD DDDDDDDDD CC";
const CATALOG: &str = "CC ADA AD DDDDDDDDA CC";

/// Method, path, the status of who may (on an empty registry), who may.
const TABLE: &[(&str, &str, u16, &str)] = &[
    ("GET", "/v2/", 200, KNOWN),
    ("HEAD", "/v2", 200, KNOWN),
    ("POST", "/v2/", 405, KNOWN),
    ("GET", "/v2/_catalog", 200, CATALOG),
    ("DELETE", "/v2/_catalog", 405, CATALOG),
    ("GET", "/v2/vi/ns/a/tags/list", 404, PULL),
    ("POST", "/v2/vi/ns/a/tags/list", 405, PUSH),
    ("GET", "/v2/vi/ns/a/referrers/DIGEST", 200, PULL),
    ("DELETE", "/v2/vi/ns/a/referrers/DIGEST", 405, DELETE),
    ("GET", "/v2/vi/ns/a/blobs/DIGEST", 404, PULL),
    ("HEAD", "/v2/vi/ns/a/blobs/DIGEST", 404, PULL),
    ("DELETE", "/v2/vi/ns/a/blobs/DIGEST", 404, DELETE),
    ("PUT", "/v2/vi/ns/a/blobs/DIGEST", 405, PUSH),
    ("OPTIONS", "/v2/vi/ns/a/blobs/DIGEST", 405, KNOWN),
    ("GET", "/v2/vi/ns/a/manifests/tag", 404, PULL),
    ("HEAD", "/v2/vi/ns/a/manifests/DIGEST", 404, PULL),
    ("PUT", "/v2/vi/ns/a/manifests/tag", 400, PUSH),
    ("PUT", "/v2/vi/ns/a/manifests/DIGEST", 400, PUSH),
    ("DELETE", "/v2/vi/ns/a/manifests/tag", 404, DELETE),
    ("DELETE", "/v2/vi/ns/a/manifests/DIGEST", 404, DELETE),
    ("POST", "/v2/vi/ns/a/blobs/uploads/", 202, PUSH),
    ("POST", "/v2/vi/ns/a/blobs/uploads/?digest=sha256:zz", 400, PUSH),
    ("POST", "/v2/vi/ns/a/blobs/uploads/?mount=DIGEST", 202, PUSH),
    ("POST", "/v2/vi/ns/a/blobs/uploads/?mount=DIGEST&from=vi/ns/b", 202, MOUNT),
    ("POST", "/v2/vi/ns/a/blobs/uploads/?mount=DIGEST&from=vi%2Fns%2Fb", 202, MOUNT),
    ("POST", "/v2/vi/ns/a/blobs/uploads/?mount=DIGEST&from=public/x", 202, PUSH),
    ("POST", "/v2/vi/ns/a/blobs/uploads/?mount=DIGEST&from=vi/ns/a/../b", 400, PUSH),
    ("GET", "/v2/vi/ns/a/blobs/uploads/", 405, PULL),
    ("GET", "/v2/vi/ns/a/blobs/uploads/UPLOAD", 404, PULL),
    ("PATCH", "/v2/vi/ns/a/blobs/uploads/UPLOAD", 404, PUSH),
    ("PUT", "/v2/vi/ns/a/blobs/uploads/UPLOAD?digest=DIGEST", 404, PUSH),
    ("DELETE", "/v2/vi/ns/a/blobs/uploads/UPLOAD", 404, DELETE),
    ("GET", "/v2/public/x/manifests/tag", 404, PUBLIC),
    ("HEAD", "/v2/public/x/blobs/DIGEST", 404, PUBLIC),
    ("GET", "/v2/public/x/tags/list", 404, PUBLIC),
    ("POST", "/v2/public/x/blobs/uploads/", 202, OTHERS),
    ("PUT", "/v2/public/x/manifests/tag", 400, OTHERS),
    ("DELETE", "/v2/public/x/manifests/tag", 404, OTHERS),
    ("GET", "/v2/publicly/manifests/tag", 404, "CC AAA AA DDDDDDDDD CC"),
    // What is no path tells nothing to who is not known.
    ("GET", "/v2/nowhere", 404, KNOWN),
    ("GET", "/v2/vi/ns/a/../b/manifests/tag", 400, KNOWN),
    ("GET", "/v1/", 404, KNOWN),
    ("GET", "/healthz/more", 404, KNOWN),
    ("GET", "/healthz", 200, "AA AAA AA AAAAAAAAA AA"),
    ("GET", "/readyz", 200, "AA AAA AA AAAAAAAAA AA"),
    ("GET", "/metrics", 200, "AA AAA AA AAAAAAAAA AA"),
];

/// A caller's header and certificate.
type Credentials = (Option<String>, Option<&'static str>);

struct Bench {
    _dir: TempDir,
    router: axum::Router,
    callers: Vec<Credentials>,
}

impl Bench {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, content: &str| -> Option<PathBuf> {
            let path = dir.path().join(name);
            std::fs::write(&path, content).unwrap();
            Some(path)
        };
        let pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let mut config = Config::new(dir.path().join("root"));
        config.auth = Some(Auth {
            admin_password: file("admin", "secret"),
            node_puller_password: file("puller", "pull"),
            token_key: file("key", &pair.public_key_pem()),
            htpasswd: file("htpasswd", &format!("user:{}", bcrypt::hash("pass", 4).unwrap())),
            anonymous_pull: vec!["public/*".parse().unwrap()],
            bearer: Some(Bearer::default()),
        });
        let router = Registry::open(config).unwrap().router();
        let access =
            |name: &str, actions: &[&str]| json!({"type": "repository", "name": name, "actions": actions});
        let token = |access: Value| {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
            let claims = json!({
                "iss": "virtualization-controller", "aud": "dvcr", "iat": now, "nbf": now, "exp": now + 600,
                "access": access,
            });
            let header = Header { kid: Some("dvcr".into()), ..Header::new(Algorithm::ES256) };
            let token = encode(&header, &claims, &EncodingKey::from_ec_der(&pair.serialize_der())).unwrap();
            (Some(basic("dvcr-jwt", &token)), None)
        };
        let mut callers: Vec<Credentials> = vec![
            (None, None),
            (Some(basic("admin", "wrong")), None),
            (Some(basic("admin", "secret")), None),
            (Some(basic("node-puller", "pull")), None),
            (Some(basic("user", "pass")), None),
            (None, Some("admin")),
            (None, Some("somebody")),
            token(json!([])),
            token(json!([access("vi/ns/a", &["pull"])])),
            token(json!([access("vi/ns/x/../a", &["pull", "push"])])),
            token(json!([access("vi/ns/a", &["pull", "push"]), access("vi/ns/b", &["pull"])])),
            token(json!([access("vi/ns/a", &["delete"])])),
            token(json!([access("vi/ns/a", &["*"])])),
            token(json!([access("vi/ns/*", &["pull"])])),
            token(json!([access("vi/ns/b", &["*"])])),
            token(json!([{"type": "registry", "name": "catalog", "actions": ["*"]}])),
        ];
        let mut bench = Self { _dir: dir, router, callers: Vec::new() };
        for scope in ["repository:vi/ns/a:pull", ""] {
            let path = format!("/token?service=dvcr&scope={scope}");
            let (status, _, body) = bench.ask("GET", &path, &callers[2]).await;
            assert_eq!(status, 200, "{body}");
            callers.push((Some(format!("Bearer {}", body["token"].as_str().unwrap())), None));
        }
        bench.callers = callers;
        bench
    }

    /// Returns status, challenges and body.
    async fn ask(&self, method: &str, path: &str, (header, name): &Credentials) -> (u16, Vec<String>, Value) {
        let mut request = Request::builder().method(method).uri(path).header("host", "registry");
        if let Some(header) = header {
            request = request.header(AUTHORIZATION, header);
        }
        let mut request = request.body(Body::from("x")).unwrap();
        if let Some(name) = name {
            request.extensions_mut().insert(Peer::new(name));
        }
        let response = TowerToHyperService::new(self.router.clone()).call(request).await.unwrap();
        let (head, body) = response.into_parts();
        let values = head.headers.get_all(WWW_AUTHENTICATE).iter();
        let challenges = values.map(|value| value.to_str().unwrap().to_owned()).collect();
        let body = body.collect().await.unwrap().to_bytes();
        (head.status.as_u16(), challenges, serde_json::from_slice(&body).unwrap_or_default())
    }
}

fn basic(user: &str, password: &str) -> String {
    format!("Basic {}", STANDARD.encode(format!("{user}:{password}")))
}

fn fill(path: &str) -> String {
    path.replace("DIGEST", &format!("sha256:{}", "a".repeat(64)))
        .replace("UPLOAD", "00000000-0000-0000-0000-000000000000")
}

#[tokio::test]
async fn every_route_lets_in_who_may_and_nobody_else() {
    let bench = Arc::new(Bench::new().await);
    assert_eq!(bench.callers.len(), CALLERS.len());
    for (method, path, allowed, verdicts) in TABLE {
        let verdicts: Vec<char> = verdicts.chars().filter(|letter| *letter != ' ').collect();
        assert_eq!(verdicts.len(), CALLERS.len(), "{method} {path}");
        for ((caller, credentials), verdict) in CALLERS.iter().zip(&bench.callers).zip(verdicts) {
            let (status, challenges, body) = bench.ask(method, &fill(path), credentials).await;
            let expected = match verdict {
                'A' => *allowed,
                'D' => 403,
                _ => 401,
            };
            assert_eq!(status, expected, "{method} {path} by {caller}: {body}");
            assert_eq!(challenges.is_empty(), verdict != 'C', "{method} {path} by {caller}: {challenges:?}");
            let code = body["errors"][0]["code"].as_str();
            match verdict {
                _ if *method == "HEAD" => {}
                'D' => assert_eq!(code, Some("DENIED"), "{method} {path} by {caller}"),
                'C' => assert_eq!(code, Some("UNAUTHORIZED"), "{method} {path} by {caller}"),
                _ => {}
            }
        }
    }
}

#[test]
fn every_route_has_a_row() {
    // The names of the variants, from the text that declares them.
    let text = include_str!("route.rs");
    let (_, rest) = text.split_once("pub(crate) enum Route {\n").unwrap();
    let (variants, _) = rest.split_once("\n}").unwrap();
    let name = |text: &str| text.trim().split(['(', ',', ' ']).next().unwrap().to_owned();
    let declared: BTreeSet<String> =
        variants.lines().map(name).filter(|name| name.starts_with(char::is_uppercase)).collect();
    assert!(declared.len() >= 8, "{declared:?}");
    let routes = TABLE.iter().filter_map(|(method, path, ..)| {
        let path = fill(path);
        let path = path.split('?').next()?;
        Route::parse(&Method::from_bytes(method.as_bytes()).ok()?, path).ok()
    });
    let tested: BTreeSet<String> = routes.map(|route| name(&format!("{route:?}"))).collect();
    assert_eq!(tested, declared);
}

#[tokio::test]
async fn a_token_holds_no_more_than_its_owner_may() {
    let bench = Bench::new().await;
    let scopes = "scope=repository:vi/ns/a:pull,push,delete&scope=repository:vi/ns/b:pull&scope=registry:catalog:*\
                  &scope=repository:public/x:pull,push&scope=nonsense&scope=repository:A:pull&scope=other:a:pull";
    for (caller, expected) in [
        (0, json!([["public/x", "pull"]])),
        (
            2,
            json!([
                ["vi/ns/a", "pull,push,delete"],
                ["vi/ns/b", "pull"],
                ["catalog", "*"],
                ["public/x", "pull,push"]
            ]),
        ),
        (3, json!([["vi/ns/a", "pull"], ["vi/ns/b", "pull"], ["public/x", "pull"]])),
        (
            5,
            json!([
                ["vi/ns/a", "pull,push,delete"],
                ["vi/ns/b", "pull"],
                ["catalog", "*"],
                ["public/x", "pull,push"]
            ]),
        ),
        (6, json!([["vi/ns/a", "pull"], ["vi/ns/b", "pull"], ["public/x", "pull"]])),
        (7, json!([["public/x", "pull"]])),
        (9, json!([["vi/ns/a", "pull,push"], ["public/x", "pull"]])),
        (15, json!([["catalog", "*"], ["public/x", "pull"]])),
    ] {
        let path = format!("/token?account=x&service=dvcr&{scopes}");
        let (status, _, body) = bench.ask("GET", &path, &bench.callers[caller]).await;
        assert_eq!(status, 200, "{}: {body}", CALLERS[caller]);
        assert_eq!(body["token"], body["access_token"]);
        assert!((60..=300).contains(&body["expires_in"].as_u64().unwrap()));
        let token = body["token"].as_str().unwrap();
        let claims: Value =
            jsonwebtoken::dangerous::insecure_decode(token).map(|token| token.claims).unwrap();
        let granted: Vec<Value> = claims["access"].as_array().unwrap().iter().map(short).collect();
        assert_eq!(Value::from(granted), expected, "{}", CALLERS[caller]);
    }
    // Nobody gets one for a wrong password, or for another token of ours.
    for caller in [1, 16, 17] {
        let (status, challenges, _) = bench.ask("GET", "/token", &bench.callers[caller]).await;
        assert_eq!(status, 401, "{}", CALLERS[caller]);
        assert_eq!(challenges, ["Basic realm=\"dvcr\""]);
    }
    for (method, path, status) in [
        ("GET", "/token?service=other".to_owned(), 400),
        ("GET", format!("/token?{}", "scope=a:b:c+a:b:d&".repeat(40)), 400),
        ("DELETE", "/token".to_owned(), 405),
        ("POST", "/token".to_owned(), 400),
    ] {
        assert_eq!(bench.ask(method, &path, &bench.callers[2]).await.0, status, "{method} {path}");
    }
}

/// An access as a name and its actions.
fn short(access: &Value) -> Value {
    let actions: Vec<_> = access["actions"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    json!([access["name"], actions.join(",")])
}

#[tokio::test]
async fn a_registry_without_the_bearer_flow_has_no_endpoint_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let path: &Path = &dir.path().join("admin");
    std::fs::write(path, "secret").unwrap();
    let mut config = Config::new(dir.path().join("root"));
    config.auth = Some(Auth { admin_password: Some(path.to_owned()), ..Auth::default() });
    let router = Registry::open(config).unwrap().router();
    let bench = Bench { _dir: dir, router, callers: Vec::new() };
    let admin = (Some(basic("admin", "secret")), None);
    assert_eq!(bench.ask("GET", "/token", &admin).await.0, 404);
    let (status, challenges, _) = bench.ask("GET", "/v2/", &(None, None)).await;
    assert_eq!((status, challenges), (401, vec!["Basic realm=\"dvcr\"".to_owned()]));
}
