//! Who we are, and whom we trust.

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};

use super::*;
use crate::s3::credentials::Source;

#[tokio::test]
async fn a_store_with_a_certificate_of_our_own_authority_is_trusted_when_told_so() {
    let mut params = CertificateParams::new(vec![]).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
    let cert = params.signed_by(&key, &authority).unwrap().pem();
    let pem = key.serialize_pem();
    let server =
        tokio::task::spawn_blocking(move || S3Server::minio_tls(&cert, &pem)).await.unwrap().unwrap();
    let fixture = Fixture::new(Arc::new(server)).await;
    let dir = temp_dir();
    let file = dir.path().join("ca.pem");
    std::fs::write(&file, authority.pem()).unwrap();

    let trusting = Settings { ca_file: Some(file.clone()), ..fixture.settings.clone() };
    let client = Client::open(trusting.clone()).await.unwrap();
    client.put("key", Bytes::from_static(b"x"), Put::new()).await.unwrap();
    assert!(client.probe().await.unwrap().is_safe_for_replicas());

    let strange = Settings { attempts: std::num::NonZeroU32::MIN, ..fixture.settings.clone() };
    let error = Client::open(strange).await.unwrap().head("key").await.unwrap_err();
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert!(error.kind() == Kind::Unavailable && cause.contains("certificate"), "{cause}");
    std::fs::write(&file, "no certificate").unwrap();
    let error = Client::open(trusting).await.unwrap_err();
    assert!(std::error::Error::source(&error).unwrap().to_string().contains("ca.pem"), "{error:?}");
}

#[test]
fn settings_choose_one_way_to_prove_who_we_are() {
    let bucket = || Settings { bucket: "b".to_owned(), ..Settings::default() };
    assert_eq!(Source::of(&bucket()), Source::Chain);
    assert_eq!(Source::of(&Settings { anonymous: true, ..bucket() }), Source::Anonymous);
    let profile = Settings { profile: Some("p".to_owned()), ..bucket() };
    assert_eq!(Source::of(&profile), Source::Profile("p".to_owned()));
    let (role_arn, token) = ("arn:aws:iam::1:role/r".to_owned(), std::path::PathBuf::from("/token"));
    let role = Settings {
        role_arn: Some(role_arn.clone()),
        web_identity_token_file: Some(token.clone()),
        ..bucket()
    };
    assert_eq!(Source::of(&role), Source::WebIdentity { role_arn, token });
}

/// The ways of the environment: its variables, a profile by its name, a role by the token of a file.
#[test]
fn what_the_environment_says_is_used_to_sign() {
    let server = S3Server::shared_minio();
    let bucket = server.new_bucket().unwrap();
    let dir = temp_dir();
    let (id, secret) = (S3Server::ACCESS_KEY, S3Server::SECRET_KEY);
    let credentials = format!("[given]\naws_access_key_id = {id}\naws_secret_access_key = {secret}\n");
    std::fs::write(dir.path().join("credentials"), credentials).unwrap();
    std::fs::write(dir.path().join("config"), "").unwrap();
    for environment in [
        vec![("AWS_ACCESS_KEY_ID", id), ("AWS_SECRET_ACCESS_KEY", secret)],
        vec![("AWS_PROFILE", "given")],
        vec![("DVCR_TEST_PROFILE", "given")],
    ] {
        let mut command = std::process::Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "--include-ignored", "--nocapture"]);
        command.arg("bucket::tests::identity::a_client_of_the_environment_writes");
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("AWS_")) {
            command.env_remove(name);
        }
        command.env("AWS_SHARED_CREDENTIALS_FILE", dir.path().join("credentials"));
        command.env("AWS_CONFIG_FILE", dir.path().join("config"));
        command.env("AWS_EC2_METADATA_DISABLED", "true").envs(environment.iter().copied());
        command.env("DVCR_TEST_ENDPOINT", server.endpoint()).env("DVCR_TEST_BUCKET", &bucket);
        dvcr_tests::run(&command).unwrap_or_else(|error| panic!("{environment:?}: {error:#}"));
    }
}

/// Runs inside [`what_the_environment_says_is_used_to_sign`]; there is nothing to do outside of it.
#[tokio::test]
async fn a_client_of_the_environment_writes() {
    let Ok(endpoint) = std::env::var("DVCR_TEST_ENDPOINT") else { return };
    let settings = Settings {
        endpoint: Some(endpoint),
        bucket: std::env::var("DVCR_TEST_BUCKET").unwrap(),
        profile: std::env::var("DVCR_TEST_PROFILE").ok(),
        ..Settings::default()
    };
    let client = Client::open(settings).await.unwrap();
    client.put("key", Bytes::from_static(b"x"), Put::default()).await.unwrap();
}
