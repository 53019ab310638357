//! TLS: certificates that are replaced while it serves, and clients that show one.

use std::net::SocketAddr;
use std::path::Path;

use dvcr_registry::{Auth, Config, Tls};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, IsCa, KeyPair};
use reqwest::{Certificate, Client, Identity, StatusCode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::{Served, eventually};

/// Who signs certificates.
struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new(name: &str) -> Self {
        let mut params = params(&[name]);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    /// Certificate and key, in PEM.
    fn sign(&self, params: CertificateParams) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        (params.signed_by(&key, &self.0).unwrap().pem(), key.serialize_pem())
    }

    fn server(&self, dir: &Path) {
        let (cert, key) = self.sign(CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap());
        std::fs::write(dir.join("cert.pem"), cert).unwrap();
        std::fs::write(dir.join("key.pem"), key).unwrap();
    }

    fn client(&self, names: &[&str]) -> Identity {
        let (cert, key) = self.sign(params(names));
        Identity::from_pem(format!("{cert}{key}").as_bytes()).unwrap()
    }

    /// A client that trusts this authority, and nobody else.
    fn trusting(&self, identity: Option<Identity>) -> Client {
        let root = Certificate::from_pem(self.0.pem().as_bytes()).unwrap();
        let client = Client::builder().tls_certs_only([root]);
        match identity {
            Some(identity) => client.identity(identity),
            None => client,
        }
        .build()
        .unwrap()
    }
}

fn params(names: &[&str]) -> CertificateParams {
    let mut params = CertificateParams::new(vec![]).unwrap();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "tests");
    for name in names {
        params.distinguished_name.push(DnType::CommonName, *name);
    }
    params
}

fn tls(dir: &Path) -> Tls {
    Tls { cert: dir.join("cert.pem"), key: dir.join("key.pem"), client_ca: None }
}

async fn get(client: &Client, address: SocketAddr, path: &str) -> Result<StatusCode, reqwest::Error> {
    client.get(format!("https://{address}{path}")).send().await.map(|response| response.status())
}

#[tokio::test]
async fn a_replaced_certificate_is_served_without_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let (old, new) = (Authority::new("old"), Authority::new("new"));
    old.server(dir.path());
    let files = tls(dir.path());
    let served = Served::open_with(dir, |config| config.tls = Some(files)).await;
    let kept = old.trusting(None);
    assert_eq!(get(&kept, served.address, "/v2/").await.unwrap(), 200);
    assert!(get(&new.trusting(None), served.address, "/v2/").await.is_err());

    // A certificate without its key, as between two writes: the old pair goes on.
    let key = std::fs::read(served.dir().join("key.pem")).unwrap();
    new.server(served.dir());
    let new_key = std::fs::read(served.dir().join("key.pem")).unwrap();
    std::fs::write(served.dir().join("key.pem"), key).unwrap();
    assert_eq!(get(&old.trusting(None), served.address, "/v2/").await.unwrap(), 200);
    std::fs::write(served.dir().join("key.pem"), new_key).unwrap();
    eventually("the new certificate", async || {
        get(&new.trusting(None), served.address, "/v2/").await.ok().filter(|status| *status == 200)
    })
    .await;
    assert!(get(&old.trusting(None), served.address, "/v2/").await.is_err());
    // Connections that are there go on.
    assert_eq!(get(&kept, served.address, "/v2/").await.unwrap(), 200);
    served.close().await;
}

#[tokio::test]
async fn a_certificate_tells_who_a_client_is() {
    let dir = tempfile::tempdir().unwrap();
    let (ours, stranger) = (Authority::new("ours"), Authority::new("stranger"));
    ours.server(dir.path());
    let clients = Authority::new("clients");
    let ca = dir.path().join("clients.pem");
    std::fs::write(&ca, clients.0.pem()).unwrap();
    let password = dir.path().join("password");
    std::fs::write(&password, "secret").unwrap();
    let files = Tls { client_ca: Some(ca), ..tls(dir.path()) };
    let served = Served::open_with(dir, |config: &mut Config| {
        config.tls = Some(files);
        config.auth = Some(Auth { admin_password: Some(password), ..Auth::default() });
    })
    .await;
    let status = async |identity, method: &str, path: &str| {
        let url = format!("https://{}{path}", served.address);
        let request = ours.trusting(identity).request(method.parse().unwrap(), url);
        request.send().await.map(|response| response.status().as_u16()).ok()
    };
    let pull = ("GET", "/v2/a/manifests/tag");
    let push = ("POST", "/v2/a/blobs/uploads/");
    for (names, pulls, pushes, lists) in [
        (&["admin"][..], 404, 202, 200),
        (&["node-puller"], 404, 403, 403),
        (&["node-7.example"], 404, 403, 403),
        // Who has no name is nobody.
        (&[], 401, 401, 401),
    ] {
        let identity = || Some(clients.client(names));
        assert_eq!(status(identity(), pull.0, pull.1).await, Some(pulls), "{names:?}");
        assert_eq!(status(identity(), push.0, push.1).await, Some(pushes), "{names:?}");
        assert_eq!(status(identity(), "GET", "/v2/_catalog").await, Some(lists), "{names:?}");
    }
    // No certificate: the other credentials are left. One of a stranger's: no connection.
    assert_eq!(status(None, pull.0, pull.1).await, Some(401));
    assert_eq!(status(Some(stranger.client(&["admin"])), pull.0, pull.1).await, None);
    // What a request says itself counts more than its connection.
    let url = format!("https://{}/v2/", served.address);
    let client = ours.trusting(Some(clients.client(&["node-puller"])));
    let asked = async |password: &str| {
        client.get(&url).basic_auth("admin", Some(password)).send().await.unwrap().status().as_u16()
    };
    assert_eq!((asked("secret").await, asked("wrong").await), (200, 401));
}

#[tokio::test]
async fn who_speaks_no_tls_to_a_tls_port_holds_nobody_up() {
    let dir = tempfile::tempdir().unwrap();
    let ours = Authority::new("ours");
    ours.server(dir.path());
    let files = tls(dir.path());
    let served = Served::open_with(dir, |config| config.tls = Some(files)).await;
    let mut plain = TcpStream::connect(served.address).await.unwrap();
    plain.write_all(b"GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    let _ = plain.read_to_end(&mut answer).await;
    assert!(!answer.starts_with(b"HTTP"));
    let _silent = TcpStream::connect(served.address).await.unwrap();
    assert_eq!(get(&ours.trusting(None), served.address, "/v2/").await.unwrap(), 200);
}

#[test]
fn files_that_are_no_pair_are_refused_with_their_names() {
    let dir = tempfile::tempdir().unwrap();
    Authority::new("ours").server(dir.path());
    let cert = dir.path().join("cert.pem");
    let open = |tls: Tls| {
        let mut config = Config::new(dir.path().join("root"));
        config.tls = Some(tls);
        dvcr_registry::Registry::open(config).unwrap_err().to_string()
    };
    let other = dir.path().join("other.pem");
    std::fs::write(&other, KeyPair::generate().unwrap().serialize_pem()).unwrap();
    assert!(open(Tls { key: other.clone(), ..tls(dir.path()) }).contains("cert.pem"));
    assert!(open(Tls { key: cert.clone(), ..tls(dir.path()) }).contains("cert.pem"));
    assert!(open(Tls { cert: other.clone(), ..tls(dir.path()) }).contains("other.pem"));
    assert!(open(Tls { client_ca: Some(other), ..tls(dir.path()) }).contains("other.pem"));
    assert!(open(Tls { cert: dir.path().join("none.pem"), ..tls(dir.path()) }).contains("none.pem"));
}
