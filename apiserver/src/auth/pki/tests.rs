use std::os::unix::fs::PermissionsExt;

use rustls::server::WebPkiClientVerifier;

use super::*;

fn now() -> SystemTime {
    UNIX_EPOCH + days(20_000)
}

fn der_of(pem: &str) -> CertificateDer<'static> {
    CertificateDer::from_pem_slice(pem.as_bytes()).unwrap()
}

/// Verifies a client's certificate as the server does.
fn verify(
    authority: &Authority,
    certificate: &CertificateDer<'_>,
    then: SystemTime,
) -> Result<(), rustls::Error> {
    let mut roots = RootCertStore::empty();
    roots.add(der_of(&authority.certificate())).unwrap();
    let provider = Arc::new(aws_lc_rs::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build().unwrap();
    let then = UnixTime::since_unix_epoch(then.duration_since(UNIX_EPOCH).unwrap());
    verifier.verify_client_cert(certificate, &[], then).map(drop)
}

#[test]
fn an_authority_is_made_once_and_found_again() {
    let folder = tempfile::tempdir().unwrap();
    let pki = folder.path().join("pki");
    let first = Authority::open(&pki, now()).unwrap();
    let again = Authority::open(&pki, now() + days(100)).unwrap();
    assert_eq!(first.certificate(), again.certificate());
    let of_the_first = first.client("admin", &[], days(1), now()).unwrap();
    verify(&again, &der_of(&of_the_first.certificate), now()).unwrap();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&pki), mode(&first.path())), (0o700, 0o600));
    assert_eq!(std::fs::read_dir(&pki).unwrap().count(), 1);
}

#[test]
fn a_server_certificate_is_kept_until_a_month_before_its_end_and_while_it_has_all_names() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::open(folder.path(), now()).unwrap();
    let names = ["localhost", "127.0.0.1", "::1", "kubernetes.default.svc"];
    let path = authority.server(&names, now()).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let made =
        |then, names: &[&str]| std::fs::read_to_string(authority.server(names, then).unwrap()).unwrap();
    let first = made(now(), &names);
    // OpenSSL takes for self-signed what has its issuer's name.
    let name = |pem: &str| dvcr_tls::common_name(&der_of(pem)).unwrap();
    assert_ne!(name(&first), name(&authority.certificate()));
    assert_eq!(made(now() + days(SERVER_DAYS - RENEW_DAYS - 1), &names), first);
    assert_eq!(made(now(), &names[..1]), first);
    let renewed = made(now() + days(SERVER_DAYS - RENEW_DAYS + 1), &names);
    assert_ne!(renewed, first);
    assert_ne!(made(now() + days(SERVER_DAYS), &["localhost", "vm.example"]), renewed);
    assert!(matches!(authority.server(&["not a name"], now()), Err(Error::Name { .. })));
}

#[test]
fn a_server_certificate_of_another_authority_or_that_is_broken_is_made_again() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::open(folder.path(), now()).unwrap();
    let path = authority.server(&["localhost"], now()).unwrap();
    std::fs::write(&path, "nothing").unwrap();
    authority.server(&["localhost"], now()).unwrap();
    assert!(std::fs::read_to_string(&path).unwrap().contains("BEGIN CERTIFICATE"));
    std::fs::remove_file(authority.path()).unwrap();
    let other = Authority::open(folder.path(), now()).unwrap();
    let before = std::fs::read_to_string(&path).unwrap();
    other.server(&["localhost"], now()).unwrap();
    assert_ne!(std::fs::read_to_string(&path).unwrap(), before);
}

#[test]
fn an_authority_that_has_ended_says_what_to_do() {
    // Before 2050 and after it, the time is written in another way.
    for now in [now(), UNIX_EPOCH + days(25_000), UNIX_EPOCH + days(30_000)] {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::open(folder.path(), now).unwrap();
        assert_eq!(end_of(&authority.certificate).unwrap(), now + days(AUTHORITY_DAYS));
        Authority::open(folder.path(), now + days(AUTHORITY_DAYS - 1)).unwrap();
        let error = Authority::open(folder.path(), now + days(AUTHORITY_DAYS)).unwrap_err();
        assert!(
            matches!(error, Error::Ended { .. }) && error.to_string().contains("move the file away"),
            "{error}"
        );
    }
}

#[test]
fn a_file_with_something_else_is_not_overwritten() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::open(folder.path(), now()).unwrap();
    let stranger = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
    for text in ["", "-----BEGIN CERTIFICATE-----\n", &(authority.certificate() + &stranger.serialize_pem())]
    {
        std::fs::write(authority.path(), text).unwrap();
        let error = Authority::open(folder.path(), now()).unwrap_err();
        assert!(matches!(error, Error::Content { .. }), "{error}");
        assert_eq!(std::fs::read_to_string(authority.path()).unwrap(), text);
    }
}

#[test]
fn a_verified_client_certificate_says_its_user_and_all_of_its_groups() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::open(folder.path(), now()).unwrap();
    let many: Vec<String> =
        (0..GROUPS_MAX).map(|at| format!("{at}{}", "g".repeat(NAME_BYTES_MAX - 3))).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    for groups in [&[][..], &["system:masters"], &["dev", "ops", "qa", "Größe"], &many] {
        let identity = authority.client("jane", groups, days(1), now()).unwrap();
        let certificate = der_of(&identity.certificate);
        verify(&authority, &certificate, now()).unwrap();
        verify(&authority, &certificate, now() + days(2)).unwrap_err();
        let user = user_of(&certificate).unwrap();
        assert_eq!(user.name, "jane");
        assert_eq!(user.groups, [groups, &[AUTHENTICATED]].concat());
    }
}

#[test]
fn certificates_serve_their_own_purpose_alone_and_strangers_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::open(&folder.path().join("a"), now()).unwrap();
    let stranger = Authority::open(&folder.path().join("b"), now()).unwrap();
    let client = der_of(&stranger.client("admin", &["system:masters"], days(1), now()).unwrap().certificate);
    verify(&authority, &client, now()).unwrap_err();
    let server = authority.server(&["localhost"], now()).unwrap();
    let server = der_of(&std::fs::read_to_string(server).unwrap());
    verify(&authority, &server, now()).unwrap_err();
    let client = der_of(&authority.client("localhost", &[], days(1), now()).unwrap().certificate);
    authority.accepts(&client, "localhost", now()).unwrap_err();
    // Neither does a part of a certificate that was changed pass.
    let mut changed = authority.client("jane", &["dev"], days(1), now()).unwrap();
    changed.certificate = pem("CERTIFICATE", &{
        let mut bytes = der_of(&changed.certificate).to_vec();
        let at = bytes.windows(3).position(|three| three == b"dev").unwrap();
        bytes[at] = b'r';
        bytes
    });
    verify(&authority, &der_of(&changed.certificate), now()).unwrap_err();
}

#[test]
fn names_that_no_certificate_can_have_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::open(folder.path(), now()).unwrap();
    let long = "x".repeat(NAME_BYTES_MAX + 1);
    let many = vec!["g"; GROUPS_MAX + 1];
    for (user, groups) in [("", &[][..]), (&long, &[]), ("jane", &["dev", ""]), ("jane", &many)] {
        assert!(matches!(authority.client(user, groups, days(1), now()), Err(Error::Name { .. })));
    }
}

#[test]
fn keys_are_in_no_debug_output() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::open(folder.path(), now()).unwrap();
    let identity = authority.client("jane", &[], days(1), now()).unwrap();
    let shown = format!("{identity:?} {authority:?}");
    let secret = identity.key.lines().nth(1).unwrap();
    assert!(!shown.contains(secret) && !shown.contains("PRIVATE"), "{shown}");
}
