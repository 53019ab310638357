//! Who is told what, who is believed, and where nobody goes.

use std::ffi::OsString;

use dvcr_image::Proxies;
use tokio::net::TcpStream;

use super::*;
use crate::source::policy::SourcePolicy;

fn served(body: &Bytes) -> impl Fn(&Asked) -> Reply + Send + Sync + 'static {
    let body = body.clone();
    move |asked| Reply::file(asked, &body, "\"v1\"")
}

async fn open_with(url: &str, options: &SourceOptions) -> Result<HttpSource> {
    HttpSource::open_tuned(url, options, None, small()).await
}

async fn assert_reads(url: &str, options: &SourceOptions, body: &Bytes) {
    let mut source = open_with(url, options).await.unwrap_or_else(|e| panic!("{}", chain(&e)));
    let (bytes, outcome) = read(&mut source).await;
    outcome.unwrap();
    assert!(bytes == *body);
}

/// The connection breaks once, so that the file is asked for twice.
#[tokio::test(flavor = "multi_thread")]
async fn credentials_go_to_the_first_origin_alone() {
    let body = noise(500_000, 1);
    let breaks = served(&body);
    let storage = Server::start(move |asked| {
        let cut = asked.range.is_none().then_some(100_000);
        Reply { cut, ..breaks(asked) }
    })
    .await;
    let target = storage.url("blob?signature=x");
    let front = Server::start(move |asked| match asked.path.as_str() {
        "/a" => Reply::redirect("/b"),
        _ => Reply::redirect(target.clone()),
    })
    .await;
    let mut options = SourceOptions::default();
    options.http.add_headers("X-Token: t0ken").unwrap();
    let url = format!("http://alice:s3cret@{}/a", front.address);
    assert_reads(&url, &options, &body).await;
    assert_eq!(front.asked().len(), 2, "what was found once is asked for directly");
    for asked in front.asked() {
        assert!(asked.has("authorization: basic ywxpy2u6czn"), "{asked:?}");
        assert!(asked.has("x-token: t0ken"), "{asked:?}");
    }
    assert_eq!(storage.asked().len(), 2);
    for asked in storage.asked() {
        assert!(!asked.has("authorization") && !asked.has("x-token") && !asked.has("referer"), "{asked:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_way_back_to_the_first_origin_is_no_way_back_to_its_credentials() {
    let body = noise(1000, 2);
    let file = served(&body);
    let home = Arc::new(Mutex::new(String::new()));
    let back = Arc::clone(&home);
    let elsewhere = Server::start(move |_| Reply::redirect(back.lock().unwrap().clone())).await;
    let target = elsewhere.url("x");
    let front = Server::start(move |asked| match asked.path.as_str() {
        "/a" => Reply::redirect(target.clone()),
        _ => file(asked),
    })
    .await;
    *home.lock().unwrap() = front.url("admin");
    let mut options = SourceOptions::default();
    options.http.set_bearer("t0ken").unwrap();
    assert_reads(&front.url("a"), &options, &body).await;
    let asked = front.asked();
    assert!(asked[0].has("authorization: bearer t0ken") && !asked[1].has("authorization"), "{asked:?}");
}

/// A storage's signed address ends; the front gives a new one.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_redirect_led_to_is_looked_up_again_when_it_ends() {
    let body = noise(500_000, 3);
    let file = served(&body);
    let storage = Server::start(move |asked| match (asked.path.as_str(), asked.range) {
        ("/one", None) => Reply { cut: Some(100_000), ..file(asked) },
        ("/two", _) => file(asked),
        _ => Reply::status("403 Forbidden"),
    })
    .await;
    let (one, two) = (storage.url("one"), storage.url("two"));
    let front =
        Server::start(move |asked| Reply::redirect(if asked.n == 0 { one.clone() } else { two.clone() }))
            .await;
    assert_reads(&front.url("a"), &SourceOptions::default(), &body).await;
    assert_eq!(front.asked().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_behind_a_redirect_says_that_credentials_stayed_behind() {
    let storage = Server::start(|_| Reply::status("401 Unauthorized")).await;
    let target = storage.url("x");
    let front = Server::start(move |_| Reply::redirect(target.clone())).await;
    let mut options = SourceOptions::default();
    options.http.set_basic("alice:s3cret").unwrap();
    let error = open_with(&front.url("a"), &options).await.err().unwrap();
    assert!(error.to_string().contains("gets no credentials"), "{error}");
    let error = open_with(&storage.url("x"), &options).await.err().unwrap();
    assert!(error.to_string().contains("wants credentials, or other ones"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn redirects_have_an_end() {
    let server = Server::start(|asked| Reply::redirect(format!("/{}", asked.n))).await;
    let error = open(&server.url("a?token=s3cret")).await.err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Source);
    assert!(error.to_string().contains("redirects more than 10 times"), "{error}");
    assert!(!chain(&error).contains("s3cret"), "{error}");
    assert_eq!(server.asked().len(), 11);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_certificates_of_known_authorities_are_accepted() {
    let body = noise(300_000, 4);
    let (ours, theirs) = (Authority::new(), Authority::new());
    let server = Server::listen(Some(ours.acceptor(&ours.sign(|_| {}))), served(&body)).await;
    let with = |roots: Vec<u8>, insecure| SourceOptions { roots, insecure, ..SourceOptions::default() };
    for roots in [Vec::new(), theirs.pem()] {
        let error = open_with(&server.url("a?token=s3cret"), &with(roots, false)).await.err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Source);
        assert!(error.to_string().contains("--source-ca") && !error.is_passing(), "{error}");
        assert!(!chain(&error).contains("s3cret"), "{error}");
    }
    assert_reads(&server.url("a"), &with([theirs.pem(), ours.pem()].concat(), false), &body).await;
    assert_reads(&server.url("a"), &with(Vec::new(), true), &body).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_certificate_is_named_as_such() {
    let authority = Authority::new();
    let expired = authority.sign(|params| {
        params.not_before = rcgen::date_time_ymd(2001, 1, 1);
        params.not_after = rcgen::date_time_ymd(2002, 1, 1);
    });
    let server = Server::listen(Some(authority.acceptor(&expired)), served(&noise(10, 5))).await;
    let options = SourceOptions { roots: authority.pem(), ..SourceOptions::default() };
    let error = open_with(&server.url("a"), &options).await.err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Source);
    assert!(chain(&error).contains("expired") && !error.is_passing(), "{}", chain(&error));
    assert!(server.asked().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_certificate_is_shown_to_the_first_origin_alone() {
    let body = noise(300_000, 6);
    let authority = Authority::new();
    let tls = authority.acceptor(&authority.sign(|_| {}));
    let storage = Server::listen(Some(tls.clone()), served(&body)).await;
    let target = storage.url("x");
    let front = Server::listen(Some(tls), move |_| Reply::redirect(target.clone())).await;
    let mut options = SourceOptions { roots: authority.pem(), ..SourceOptions::default() };
    let (certificate, key) = authority.sign(|_| {});
    options.http.set_identity(certificate.as_bytes(), key.as_bytes()).unwrap();
    assert_reads(&front.url("a"), &options, &body).await;
    assert!(front.asked().iter().all(|asked| asked.certified));
    assert!(storage.asked().iter().all(|asked| !asked.certified));
    let error = options.http.set_identity(b"no", b"no").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
}

fn under(policy: &str) -> SourceOptions {
    let policy = Some(Arc::new(SourcePolicy::parse(policy).unwrap()));
    SourceOptions { policy, proxies: Some(Proxies::none()), ..SourceOptions::default() }
}

async fn assert_forbidden(url: &str, options: &SourceOptions, part: &str) {
    let error = open_with(url, options).await.err().unwrap_or_else(|| panic!("{url} is open"));
    assert_eq!(error.kind(), ErrorKind::Policy, "{url}: {}", chain(&error));
    assert!(error.to_string().contains(part), "{url}: {error}");
}

/// The name of this machine is resolved, and what it resolves to is closed: nothing is connected to.
#[tokio::test(flavor = "multi_thread")]
async fn addresses_are_judged_after_names_are_resolved() {
    let body = noise(300_000, 7);
    let server = Server::start(served(&body)).await;
    let port = server.address.port();
    for url in [
        format!("http://localhost:{port}/a"),
        format!("http://127.0.0.1:{port}/a"),
        format!("http://127.1:{port}/a"),
        format!("http://[::ffff:127.0.0.1]:{port}/a"),
    ] {
        assert_forbidden(&url, &under(""), "networks.allow").await;
    }
    assert_eq!(server.peak(), 0, "nobody knocked");
    let opened = under("networks: {allow: [127.0.0.1]}");
    // The other address of the name stays closed, and is left out.
    for host in ["localhost", "127.0.0.1"] {
        assert_reads(&format!("http://{host}:{port}/a"), &opened, &body).await;
    }
    assert_forbidden(&format!("http://127.0.0.2:{port}/a"), &opened, "127.0.0.2 lies in 127.0.0.0/8").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redirect_goes_nowhere_that_the_source_could_not_be() {
    let body = noise(1000, 8);
    let file = served(&body);
    let server = Server::start(move |asked| match asked.path.as_str() {
        "/metadata" => Reply::redirect("http://169.254.169.254/latest/"),
        "/host" => Reply::redirect(format!("http://localhost:{}/a", 1)),
        "/private" => Reply::redirect("http://[fd00::1]/"),
        "/good" => Reply::redirect("/a"),
        _ => file(asked),
    })
    .await;
    let options = under("hosts: [127.0.0.1]\nnetworks: {allow: [127.0.0.0/8]}");
    assert_reads(&server.url("good"), &options, &body).await;
    assert_forbidden(&server.url("metadata"), &options, "leads to http://169.254.169.254/latest/: 169.254")
        .await;
    assert_forbidden(&server.url("private"), &options, "fc00::/7").await;
    assert_forbidden(&server.url("host"), &options, "the host localhost").await;
    let secure = under("https_only: true\nnetworks: {allow: [127.0.0.0/8]}");
    assert_forbidden(&server.url("a"), &secure, "https_only").await;
}

/// A redirect to plain HTTP that `insecure` would let pass is the policy's to refuse.
#[tokio::test(flavor = "multi_thread")]
async fn https_only_holds_for_redirects() {
    let authority = Authority::new();
    let tls = authority.acceptor(&authority.sign(|_| {}));
    let plain = Server::start(|_| Reply::status("200 OK")).await;
    let target = plain.url("x");
    let front = Server::listen(Some(tls), move |_| Reply::redirect(target.clone())).await;
    let mut options = under("https_only: true\nnetworks: {allow: [127.0.0.0/8]}");
    options.insecure = true;
    assert_forbidden(&front.url("a"), &options, "https_only").await;
    assert_eq!(plain.peak(), 0);
}

fn by_way_of(variables: &[(&str, String)]) -> Option<Proxies> {
    let find = |name: &str| variables.iter().find(|(known, _)| *known == name);
    Some(Proxies::from_env(|name| find(name).map(|(_, value)| OsString::from(value))).unwrap())
}

/// The name is the proxy's to resolve, so that there need be none here.
#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_is_asked_for_what_the_variables_say() {
    let body = noise(300_000, 9);
    let proxy = Server::start(served(&body)).await;
    let direct = Server::start(served(&body)).await;
    let address = format!("http://user:s3cret@{}", proxy.address);
    let variables = [("http_proxy", address), ("no_proxy", "127.0.0.1".to_owned())];
    let mut options = SourceOptions { proxies: by_way_of(&variables), ..SourceOptions::default() };
    assert_reads("http://source.invalid/a", &options, &body).await;
    let asked = proxy.asked();
    assert_eq!(asked[0].path, "http://source.invalid/a");
    assert!(asked[0].has("proxy-authorization: basic"), "{asked:?}");
    assert_reads(&direct.url("a"), &options, &body).await;
    assert_eq!((proxy.asked().len(), direct.asked().len()), (1, 1));
    // A policy does not close the way to the proxy, but to what is named.
    options.policy = under("hosts: ['*.invalid', 10.0.0.1]").policy;
    assert_reads("http://source.invalid/a", &options, &body).await;
    assert_forbidden("http://10.0.0.1/a", &options, "10.0.0.0/8").await;
    assert_forbidden("http://other.example/a", &options, "the host other.example").await;
    assert_forbidden(&direct.url("a"), &options, "127.0.0.0/8").await;
    assert_eq!((proxy.asked().len(), direct.asked().len()), (2, 1));
}

/// A proxy that tunnels, as for https.
async fn tunnel(to: SocketAddr) -> (SocketAddr, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, seen) = (listener.local_addr().unwrap(), Arc::<Mutex<Vec<String>>>::default());
    let log = Arc::clone(&seen);
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            let log = Arc::clone(&log);
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(socket.read_u8().await.unwrap());
                }
                log.lock().unwrap().push(String::from_utf8(head).unwrap().lines().next().unwrap().to_owned());
                let mut other = TcpStream::connect(to).await.unwrap();
                socket.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut socket, &mut other).await;
            });
        }
    });
    (address, seen)
}

#[tokio::test(flavor = "multi_thread")]
async fn https_goes_through_a_tunnel_of_the_proxy() {
    let body = noise(300_000, 10);
    let authority = Authority::new();
    let certificate = authority.sign(|params| {
        params.subject_alt_names =
            CertificateParams::new(vec!["source.invalid".to_owned()]).unwrap().subject_alt_names;
    });
    let server = Server::listen(Some(authority.acceptor(&certificate)), served(&body)).await;
    let (proxy, seen) = tunnel(server.address).await;
    let proxies = by_way_of(&[("HTTPS_PROXY", proxy.to_string())]);
    let options = SourceOptions { proxies, roots: authority.pem(), ..SourceOptions::default() };
    assert_reads("https://source.invalid/a", &options, &body).await;
    assert_eq!(seen.lock().unwrap()[0], "CONNECT source.invalid:443 HTTP/1.1");
}
