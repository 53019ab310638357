//! What a policy closes and opens.

use super::*;

fn policy(text: &str) -> SourcePolicy {
    SourcePolicy::parse(text).unwrap()
}

fn admits(policy: &SourcePolicy, source: &str) -> bool {
    let outcome = policy.admit(&source.parse().unwrap());
    if let Err(error) = &outcome {
        assert_eq!(error.kind(), ErrorKind::Policy, "{error}");
    }
    outcome.is_ok()
}

#[test]
fn an_empty_policy_closes_every_network_that_is_not_the_internet() {
    let policy = policy("");
    for closed in [
        "127.0.0.1",
        "127.8.8.8",
        "0.0.0.0",
        "0.1.2.3",
        "10.0.0.1",
        "172.16.0.1",
        "172.31.255.255",
        "192.168.1.1",
        "100.64.0.1",
        "100.100.100.200",
        "169.254.169.254",
        "169.254.1.1",
        "168.63.129.16",
        "192.0.0.192",
        "198.18.0.1",
        "224.0.0.1",
        "239.255.255.255",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::7f00:1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "::ffff:169.254.169.254",
        "::ffff:0:10.0.0.1",
        "64:ff9b::10.0.0.1",
        "64:ff9b::169.254.169.254",
        "64:ff9b:1::1",
        "2002:a00:1::1",
        "2002:7f00:1::",
        "2002:a9fe:a9fe::1",
        "2001:0:1::1",
        "fd00:ec2::254",
        "fd20:ce::254",
        "fc00::1",
        "fe80::1",
        "fec0::1",
        "ff02::1",
        "100::1",
        "2001:db8::1",
    ] {
        let address: IpAddr = closed.parse().unwrap();
        let why = policy.admit_address(address).expect_err(closed);
        assert!(why.0.contains("lies in") && why.0.contains("networks.allow"), "{why}");
    }
    for open in [
        "1.1.1.1",
        "8.8.8.8",
        "9.255.255.255",
        "11.0.0.0",
        "100.63.255.255",
        "100.128.0.0",
        "172.15.0.1",
        "172.32.0.1",
        "192.167.1.1",
        "223.255.255.255",
        "::ffff:8.8.8.8",
        "64:ff9b::8.8.8.8",
        "2002:808:808::1",
        "2606:4700::1111",
        "2a00::1",
    ] {
        assert_eq!(policy.admit_address(open.parse().unwrap()), Ok(()), "{open}");
    }
}

#[test]
fn the_longest_network_decides_and_a_denial_wins_a_tie() {
    let policy = policy(
        "networks:\n  allow: [10.0.0.0/8, 10.1.2.0/24, fd00::/8, 127.0.0.1]\n  deny: [10.1.0.0/16, 10.1.2.0/24, \
         8.8.0.0/16]\n",
    );
    for (address, open) in [
        ("10.0.0.1", true),
        ("10.1.9.9", false),
        ("10.1.2.3", false),
        ("127.0.0.1", true),
        ("127.0.0.2", false),
        ("::ffff:127.0.0.1", true),
        ("::1", false),
        ("fd00:ec2::254", true),
        ("8.8.8.8", false),
        ("64:ff9b::8.8.8.8", false),
        ("64:ff9b::10.0.0.1", true),
        ("192.168.0.1", false),
    ] {
        assert_eq!(policy.admit_address(address.parse().unwrap()).is_ok(), open, "{address}");
    }
    let whole = SourcePolicy::parse("networks: {allow: [0.0.0.0/0], deny: [169.254.0.0/16]}").unwrap();
    assert!(whole.admit_address("127.0.0.1".parse().unwrap()).is_ok());
    assert!(whole.admit_address("169.254.169.254".parse().unwrap()).is_err());
}

/// The URL's parser knows every spelling of an address.
#[test]
fn an_address_in_a_url_is_judged_however_it_is_written() {
    let policy = policy("{}");
    for closed in [
        "http://127.0.0.1/a",
        "http://127.1/a",
        "http://2130706433/a",
        "http://0x7f.1/a",
        "http://017700000001/",
        "https://[::1]:8443/",
        "http://[::ffff:7f00:1]/",
        "http://127.0.0.1./",
        "http://user:s3cret@10.0.0.1/x",
        "http://%31%32%37.0.0.1/",
        "http://１２７.0.0.1/",
    ] {
        let error = policy.admit(&closed.parse().unwrap()).expect_err(closed);
        assert_eq!(error.kind(), ErrorKind::Policy);
        assert!(!error.to_string().contains("s3cret"), "{error}");
    }
    let error = policy.admit(&"http://10.0.0.1/x?token=s3cret".parse().unwrap()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "source http://10.0.0.1/x: 10.0.0.1 lies in 10.0.0.0/8 (private), which the source policy does not allow; \
         allow it under networks.allow"
    );
    assert!(admits(&policy, "https://8.8.8.8/a") && admits(&policy, "http://host.example/a"));
}

#[test]
fn schemes_hosts_and_registries_are_those_that_are_named() {
    let strict = policy(
        "schemes: [https, docker]\nhosts: [dl.example.org, '*.mirror.example']\nregistries: [quay.io/team, \
         r.example:5000, docker.io/library]\n",
    );
    for good in [
        "https://dl.example.org/a",
        "https://DL.example.org./a",
        "https://dl.example.org:8443/a",
        "https://a.mirror.example/",
        "https://a.b.mirror.example/",
        "docker://quay.io/team/x:1",
        "docker://quay.io/team",
        "docker://r.example:5000/any/thing",
        "docker://debian",
    ] {
        assert!(admits(&strict, good), "{good}");
    }
    for bad in [
        "http://dl.example.org/a",
        "https://example.org/",
        "https://x.dl.example.org/",
        "https://mirror.example/",
        "https://evilmirror.example/",
        "https://mirror.example.evil/",
        "docker://quay.io/teams/x",
        "docker://quay.io/other",
        "docker://r.example/any",
        "docker://evil/x",
        "/etc/passwd",
        "https://dl.example.org@evil.example/",
    ] {
        assert!(!admits(&strict, bad), "{bad}");
    }
    // A registry that is named may send to its storage; without a list it is a host like all.
    let storage = Url::parse("https://blobs.example/x").unwrap();
    assert!(strict.admit_registry_url(&storage).is_ok());
    assert!(policy("hosts: [r.example]").admit_registry_url(&storage).is_err());
    assert!(strict.admit_registry_url(&Url::parse("https://10.0.0.1/").unwrap()).is_err());
}

#[test]
fn https_only_and_checksum_required_are_held_against_every_kind_of_source() {
    let secure = policy("https_only: true\n");
    assert!(admits(&secure, "https://h.example/") && !admits(&secure, "http://h.example/"));
    assert!(secure.admit_registry_url(&Url::parse("http://r.example/").unwrap()).is_err());
    let pinned = policy("checksum_required: true\n");
    let sum: Checksum = format!("sha256:{}", "0".repeat(64)).parse().unwrap();
    let http: Source = "https://h.example/".parse().unwrap();
    assert!(pinned.admit_checksums(&http, &[]).is_err());
    assert!(pinned.admit_checksums(&http, std::slice::from_ref(&sum)).is_ok());
    let image: Source = "docker://r.example/a:1".parse().unwrap();
    assert!(pinned.admit_checksums(&image, &[]).is_err());
    let image: Source = format!("docker://r.example/a@sha256:{}", "0".repeat(64)).parse().unwrap();
    assert!(pinned.admit_checksums(&image, &[]).is_ok());
}

#[test]
fn a_policy_with_a_mistake_is_refused() {
    for bad in [
        "scheme: [https]",
        "networks: {alow: []}",
        "networks: {allow: [10.0.0.0/33]}",
        "networks: {allow: [10.0.0.1/8]}",
        "networks: {allow: [host.example]}",
        "hosts: ['https://h/']",
        "hosts: ['*.*.example']",
        "hosts: ['*']",
        "hosts: ['h:80']",
        "registries: ['']",
        "registries: ['https://r.example']",
        "https_only: perhaps",
        "https_only: true\nhttps_only: false",
        "[]",
    ] {
        let error = SourcePolicy::parse(bad).expect_err(bad);
        assert_eq!(error.kind(), ErrorKind::Invalid, "{bad}");
    }
}

#[test]
fn the_documentation_has_every_closed_network_and_an_example_that_is_one() {
    let docs = include_str!("../../../../docs/import.md");
    let table = docs.rsplit("| networks | what they are |").next().unwrap();
    for (network, _) in CLOSED {
        assert!(table.contains(network), "{network} is not in docs/import.md");
    }
    let example = docs.split("```yaml\n").nth(1).unwrap().split("```").next().unwrap();
    let example = policy(example);
    assert!(example.https_only && example.checksum_required && example.hosts.is_some());
    assert!(admits(&example, "docker://quay.io/team/x") && !admits(&example, "/dev/sda"));
}
