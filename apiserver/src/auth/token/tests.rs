use std::cell::RefCell;
use std::collections::BTreeMap;

use super::*;

const NOW: i64 = 1_800_000_000;

/// What the lookup finds.
#[derive(Default)]
struct World(RefCell<BTreeMap<(String, String, String), Value>>);

impl World {
    fn new() -> Self {
        let world = Self::default();
        world.put(
            "serviceaccounts",
            "d",
            "robot",
            json!({"metadata": {"name": "robot", "namespace": "d", "uid": "sa-1"}}),
        );
        let spec = json!({"serviceAccountName": "robot", "nodeName": "n"});
        world.put("pods", "d", "p", json!({"metadata": {"uid": "pod-1"}, "spec": spec}));
        world.put(
            "pods",
            "d",
            "other",
            json!({"metadata": {"uid": "pod-2"}, "spec": {"serviceAccountName": "default"}}),
        );
        world.put("secrets", "d", "s", json!({"metadata": {"uid": "secret-1"}}));
        world.put("nodes", "", "n", json!({"metadata": {"uid": "node-1"}}));
        world
    }

    fn put(&self, resource: &str, namespace: &str, name: &str, object: Value) {
        let key = (resource.to_owned(), namespace.to_owned(), name.to_owned());
        self.0.borrow_mut().insert(key, object);
    }

    fn remove(&self, resource: &str, namespace: &str, name: &str) {
        self.0.borrow_mut().remove(&(resource.to_owned(), namespace.to_owned(), name.to_owned())).unwrap();
    }

    fn find(&self, resource: &str, namespace: &str, name: &str) -> Result<Option<Arc<Object>>> {
        let key = (resource.to_owned(), namespace.to_owned(), name.to_owned());
        Ok(self.0.borrow().get(&key).map(|value| Arc::new(value.as_object().unwrap().clone())))
    }

    fn account(&self) -> Arc<Object> {
        self.find("serviceaccounts", "d", "robot").unwrap().unwrap()
    }

    fn request(&self, tokens: &Tokens, request: Value) -> Result<Object> {
        tokens.request(request.as_object().unwrap(), &self.account(), &|r, ns, n| self.find(r, ns, n), NOW)
    }

    fn verify(&self, tokens: &Tokens, token: &str, now: i64) -> Result<Verified> {
        tokens.verify(token, &[], &|r, ns, n| self.find(r, ns, n), now)
    }
}

fn tokens() -> (tempfile::TempDir, Tokens) {
    let folder = tempfile::tempdir().unwrap();
    let tokens =
        Tokens::open(folder.path(), "https://kubernetes.default.svc", vec!["api".to_owned()]).unwrap();
    (folder, tokens)
}

fn token_of(answer: &Object) -> &str {
    object::text(answer, &["status", "token"]).unwrap()
}

fn payload(token: &str) -> Value {
    let part = token.split('.').nth(1).unwrap();
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(part).unwrap()).unwrap()
}

fn bound_to(kind: &str, name: &str) -> Value {
    json!({"spec": {"boundObjectRef": {"apiVersion": "v1", "kind": kind, "name": name}}})
}

#[test]
fn a_token_says_what_kubernetes_says_in_it() {
    let ((_folder, tokens), world) = (tokens(), World::new());
    let answer = world.request(&tokens, bound_to("Pod", "p")).unwrap();
    let mut claims = payload(token_of(&answer));
    let jti = claims["jti"].take();
    assert_eq!(jti.as_str().unwrap().len(), 36);
    let wanted = json!({
        "aud": ["api"], "exp": NOW + 3600, "iat": NOW, "nbf": NOW, "iss": "https://kubernetes.default.svc", "jti": null,
        "sub": "system:serviceaccount:d:robot",
        "kubernetes.io": {
            "namespace": "d", "serviceaccount": {"name": "robot", "uid": "sa-1"}, "pod": {"name": "p", "uid": "pod-1"},
            "node": {"name": "n", "uid": "node-1"},
        },
    });
    assert_eq!(claims, wanted);
    assert_eq!(answer["spec"]["expirationSeconds"], 3600);
    assert_eq!(answer["status"]["expirationTimestamp"], "2027-01-15T09:00:00Z");
    let header = jsonwebtoken::decode_header(token_of(&answer)).unwrap();
    assert_eq!((header.alg, header.kid), (Algorithm::ES256, Some(tokens.key_id.clone())));
    let verified = world.verify(&tokens, token_of(&answer), NOW).unwrap();
    assert_eq!(verified.audiences, ["api"]);
    assert_eq!(verified.user.name, "system:serviceaccount:d:robot");
    assert_eq!(
        verified.user.groups,
        ["system:serviceaccounts", "system:serviceaccounts:d", "system:authenticated"]
    );
    let told = |key: &str| verified.user.extra[&format!("authentication.kubernetes.io/{key}")].concat();
    assert_eq!((told("pod-name"), told("pod-uid")), ("p".to_owned(), "pod-1".to_owned()));
    assert_eq!((told("node-name"), told("node-uid")), ("n".to_owned(), "node-1".to_owned()));
    assert_eq!(told("credential-id"), format!("JTI={}", jti.as_str().unwrap()));
}

#[test]
fn the_key_is_made_once_and_nobody_else_reads_or_sees_it() {
    use std::os::unix::fs::PermissionsExt;
    let ((folder, tokens), world) = (tokens(), World::new());
    let answer = world.request(&tokens, json!({})).unwrap();
    let again =
        Tokens::open(folder.path(), "https://kubernetes.default.svc", vec!["api".to_owned()]).unwrap();
    world.verify(&again, token_of(&answer), NOW).unwrap();
    let path = folder.path().join("service-accounts.pem");
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let key = std::fs::read_to_string(path).unwrap();
    assert!(!format!("{tokens:?}").contains(key.lines().nth(1).unwrap()));
}

#[test]
fn a_token_ends_with_its_time_and_with_what_it_is_bound_to() {
    let ((_folder, tokens), world) = (tokens(), World::new());
    let made = |request| token_of(&world.request(&tokens, request).unwrap()).to_owned();
    let (plain, pod, secret, node) = (
        made(json!({})),
        made(bound_to("Pod", "p")),
        made(bound_to("Secret", "s")),
        made(bound_to("Node", "n")),
    );
    let why =
        |token: &str, now| world.verify(&tokens, token, now).map(|_| ()).map_err(|status| status.message);
    for token in [&plain, &pod, &secret, &node] {
        assert_eq!(why(token, NOW + 3600 + LEEWAY_SECS), Ok(()));
        assert_eq!(why(token, NOW + 3601 + LEEWAY_SECS).unwrap_err(), "service account token has expired");
        assert_eq!(why(token, NOW - LEEWAY_SECS), Ok(()));
        assert_eq!(why(token, NOW - LEEWAY_SECS - 1).unwrap_err(), "service account token is not valid yet");
    }
    let invalidated = Err("service account token has been invalidated".to_owned());
    world.remove("pods", "d", "p");
    assert_eq!((why(&pod, NOW), why(&plain, NOW)), (invalidated.clone(), Ok(())));
    world.put("secrets", "d", "s", json!({"metadata": {"uid": "secret-2"}}));
    assert_eq!(why(&secret, NOW), invalidated);
    world.put(
        "nodes",
        "",
        "n",
        json!({"metadata": {"uid": "node-1", "deletionTimestamp": "2020-01-01T00:00:00Z"}}),
    );
    assert_eq!(why(&node, NOW), invalidated);
    world.put("serviceaccounts", "d", "robot", json!({"metadata": {"uid": "sa-2"}}));
    assert_eq!(why(&plain, NOW).unwrap_err(), "service account UID (sa-2) does not match claim (sa-1)");
    world.remove("serviceaccounts", "d", "robot");
    assert_eq!(why(&plain, NOW).unwrap_err(), "serviceaccounts \"robot\" not found");
}

#[test]
fn a_token_request_out_of_bounds_is_refused_in_the_words_of_kubernetes() {
    let ((_folder, tokens), world) = (tokens(), World::new());
    let refused = |request: Value| {
        let status = world.request(&tokens, request).unwrap_err();
        (status.reason.code(), status.message)
    };
    let (code, message) = refused(json!({"spec": {"expirationSeconds": 599}}));
    assert_eq!(code, 422);
    assert!(
        message.ends_with(
            "spec.expirationSeconds: Invalid value: 599: may not specify a duration less than 10 minutes"
        ),
        "{message}"
    );
    assert!(
        refused(json!({"spec": {"expirationSeconds": (1_i64 << 32) + 1}}))
            .1
            .ends_with("larger than 2^32 seconds")
    );
    assert_eq!(refused(json!({"spec": {"expirationSeconds": 1e9}})).0, 400);
    assert_eq!(refused(json!({"metadata": {"name": "x"}})).0, 422);
    assert_eq!(refused(json!({"metadata": {"uid": "x"}})).0, 409);
    assert_eq!(refused(bound_to("Pod", "gone")).0, 404);
    let (code, message) = refused(bound_to("Pod", "other"));
    assert_eq!(code, 400);
    assert!(message.contains("different serviceaccount name"), "{message}");
    assert_eq!(refused(bound_to("Deployment", "x")).0, 400);
    let mut other = bound_to("Secret", "s");
    other["spec"]["boundObjectRef"]["uid"] = json!("secret-0");
    assert_eq!(refused(other).0, 409);
    assert_eq!(refused(json!({"spec": {"audiences": vec!["a"; AUDIENCES_MAX + 1]}})).0, 400);
    let long = world.request(&tokens, json!({"spec": {"expirationSeconds": 1_i64 << 32}})).unwrap();
    assert_eq!(long["spec"]["expirationSeconds"], LIFE_SECS_MAX);
    assert_eq!(payload(token_of(&long))["exp"], NOW + LIFE_SECS_MAX);
}

#[test]
fn a_token_is_for_its_audiences_alone() {
    let ((_folder, tokens), world) = (tokens(), World::new());
    let answer = world.request(&tokens, json!({"spec": {"audiences": ["vault", "x"]}})).unwrap();
    let verify = |wanted: &[&str]| {
        let wanted: Vec<String> = wanted.iter().map(|one| (*one).to_owned()).collect();
        tokens.verify(token_of(&answer), &wanted, &|r, ns, n| world.find(r, ns, n), NOW)
    };
    let message = verify(&[]).unwrap_err().message;
    assert_eq!(message, r#"token audiences ["vault" "x"] is invalid for the target audiences ["api"]"#);
    assert_eq!(verify(&["y", "vault"]).unwrap().audiences, ["vault"]);
}

#[test]
fn what_we_did_not_sign_is_refused_and_not_repeated() {
    let ((_folder, tokens), world) = (tokens(), World::new());
    let (_other_folder, other) = self::tokens();
    let answer = world.request(&tokens, json!({})).unwrap();
    let token = token_of(&answer);
    let parts: Vec<&str> = token.split('.').collect();
    let unsigned = URL_SAFE_NO_PAD.encode(r#"{"alg":"none"}"#);
    let by_secret =
        encode(&Header::new(Algorithm::HS256), &payload(token), &EncodingKey::from_secret(b"k")).unwrap();
    let mut changed = payload(token);
    changed["sub"] = json!("system:serviceaccount:kube-system:admin");
    let changed = URL_SAFE_NO_PAD.encode(changed.to_string());
    let stranger = world.request(&other, json!({})).unwrap();
    for bad in [
        "",
        ".",
        "..",
        "...",
        "a.b.c",
        &token[1..],
        &token[..token.len() - 1],
        &format!("{unsigned}.{}.", parts[1]),
        &format!("{}.{changed}.{}", parts[0], parts[2]),
        &by_secret,
        token_of(&stranger),
        &"x".repeat(TOKEN_BYTES_MAX + 1),
        &format!("{}.{}", ".".repeat(TOKEN_BYTES_MAX - 1), "é"),
    ] {
        let status = world.verify(&tokens, bad, NOW).unwrap_err();
        assert_eq!((status.reason, &*status.message), (Reason::Unauthorized, "invalid bearer token"));
    }
}

#[test]
fn a_token_review_tells_who_it_is_or_why_nobody() {
    let ((_folder, tokens), world) = (tokens(), World::new());
    let answer = world.request(&tokens, json!({})).unwrap();
    let review = |spec: Value, now| {
        let review = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": spec});
        tokens.review(review.as_object().unwrap(), &|r, ns, n| world.find(r, ns, n), now)
    };
    let good = review(json!({"token": token_of(&answer)}), NOW).unwrap();
    assert_eq!(good["kind"], "TokenReview");
    assert_eq!(good["status"]["authenticated"], true);
    assert_eq!(good["status"]["user"]["username"], "system:serviceaccount:d:robot");
    assert_eq!(good["status"]["audiences"], json!(["api"]));
    let late = review(json!({"token": token_of(&answer)}), NOW + 9999).unwrap();
    assert_eq!(late["status"]["error"], "[invalid bearer token, service account token has expired]");
    assert_eq!(late["status"].get("authenticated"), None);
    assert_eq!(review(json!({"token": "x"}), NOW).unwrap()["status"]["error"], "invalid bearer token");
    assert_eq!(
        review(json!({}), NOW).unwrap_err().message,
        "token is required for TokenReview in authentication"
    );
}
