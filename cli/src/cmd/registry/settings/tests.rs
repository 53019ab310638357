//! One description of every setting, and its effect.

use dvcr_registry::{Retention, Tags};

use super::*;

/// The page that holds the file with all defaults.
const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/registry-config.md");

/// What every setting is changed to, as it is written in a file.
const CHANGES: &[(&str, &str)] = &[
    ("root", "/other"),
    ("single-replica", "true"),
    ("listen", "127.0.0.1:5001"),
    ("gc-schedule", "off"),
    ("gc-grace", "30m"),
    ("upload-age", "2d"),
    ("gc-rate", "7"),
    ("allow-sparse-manifests", "[mirror/**]"),
    ("scrub-rate", "100M"),
    ("quota", "['vi/*/=50G', vi/ns1/=1T]"),
    ("reserve-space", "5G"),
    ("request-rate", "10"),
    ("idle-timeout", "5s"),
    ("redirect", "20m"),
    ("read-cache", "20G"),
    ("uploads-max", "1"),
    ("connections-max", "2"),
    ("upstream", "['a/=https://a.example']"),
    ("audit-log", "/audit.log"),
    ("allow-anonymous", "true"),
    ("admin-password-file", "/admin"),
    ("node-puller-password-file", "/puller"),
    ("token-public-key", "/token.pub"),
    ("htpasswd", "/users"),
    ("anonymous-pull", "[public/*, '**']"),
    ("bearer", "false"),
    ("bearer-key", "/bearer.pem"),
    ("external-url", "https://registry.example"),
    ("trust-forwarded", "true"),
    ("tls-cert", "/other.crt"),
    ("tls-key", "/other.key"),
    ("client-ca", "/ca.crt"),
    ("plain-http", "true"),
    ("bucket", "{bucket: images}"),
    ("mirror", "{root: /mnt/second}"),
    ("rules", "{pinned: [{repositories: golden/*}]}"),
    ("cache", "{upstreams: [{prefix: a/, url: 'https://a.example', bytes-max: 10G}]}"),
    ("webhooks", "[{name: ci, url: 'http://ci'}]"),
];

/// Settings among which every change has an effect.
const BASE: &[(&str, &str)] =
    &[("root", "/root"), ("htpasswd", "/h"), ("bearer", "true"), ("tls-cert", "/c"), ("tls-key", "/k")];

fn parse(text: &str) -> anyhow::Result<Settings> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("registry.yaml");
    std::fs::write(&file, text)?;
    Settings::read(&file)
}

fn parse_all(settings: &BTreeMap<&str, &str>) -> Settings {
    parse(&settings.iter().map(|(key, value)| format!("{key}: {value}\n")).collect::<String>()).unwrap()
}

/// All that a registry does by its settings.
fn effect(settings: Settings) -> String {
    let (listen, fits) = (settings.listen, settings.check().is_ok());
    format!("{listen} {fits} {:?}", settings.build().unwrap())
}

/// The file with all defaults is in the documentation; `INSTA_UPDATE=always cargo test -p dvcr` renews it.
#[test]
fn the_documented_file_is_what_is_printed_and_gives_the_defaults() {
    let printed = Settings::default().print().unwrap();
    let page = std::fs::read_to_string(PAGE).unwrap();
    let (before, rest) = page.split_once("```yaml\n").unwrap();
    let (documented, after) = rest.split_once("```").unwrap();
    if documented != printed && std::env::var("INSTA_UPDATE").is_ok_and(|update| update == "always") {
        std::fs::write(PAGE, format!("{before}```yaml\n{printed}```{after}")).unwrap();
        return;
    }
    assert_eq!(documented, printed);
    let settings = parse(documented).unwrap();
    assert_eq!(values(&settings).unwrap(), values(&Settings::default()).unwrap());
    let config = Settings { root: Some("/root".into()), ..settings }.config().unwrap();
    let mut expected = Config::new("/root");
    expected.collection.schedule = Some("0 2 * * *".parse().unwrap());
    assert_eq!(format!("{config:?}"), format!("{expected:?}"));
}

#[test]
fn every_setting_has_an_effect_and_is_printed_so_that_it_has_it_again() {
    let changed: Vec<_> = CHANGES.iter().map(|(key, _)| (*key).to_owned()).collect();
    let mut known: Vec<_> = values(&Settings::default()).unwrap().into_keys().collect();
    known.sort_by_key(|key| changed.iter().position(|other| other == key));
    assert_eq!(changed, known, "every setting has a change here");
    let base: BTreeMap<_, _> = BASE.iter().copied().collect();
    for (key, value) in CHANGES {
        let mut settings = base.clone();
        settings.insert(key, value);
        let settings = parse_all(&settings);
        assert_ne!(effect(settings.clone()), effect(parse_all(&base)), "{key}");
        let again = parse(&settings.print().unwrap()).unwrap();
        assert_eq!(values(&again).unwrap(), values(&settings).unwrap(), "{key}");
    }
}

#[test]
fn every_key_of_a_section_is_in_its_example() {
    fn unset(value: &Value, path: &str) -> Vec<String> {
        match value {
            Value::Null => vec![path.to_owned()],
            Value::Array(items) if items.is_empty() => vec![path.to_owned()],
            Value::Array(items) => items.iter().flat_map(|item| unset(item, path)).collect(),
            Value::Object(fields) => {
                fields.iter().flat_map(|(key, value)| unset(value, &format!("{path}.{key}"))).collect()
            }
            _ => Vec::new(),
        }
    }
    for (key, example) in SECTIONS {
        let settings = parse(example).unwrap();
        let value = values(&settings).unwrap().remove(key).unwrap();
        let mut unset = unset(&value, key);
        // It refers to the example of that section.
        unset.retain(|key| !key.starts_with("mirror.bucket."));
        assert_eq!(unset, [""; 0], "these keys are not shown");
    }
    let rules = parse(Rules::EXAMPLE).unwrap().rules;
    let pattern = |text: &str| -> Pattern { text.parse().unwrap() };
    let Retention { keep_tags, keep_younger, .. } = &rules.retention[0];
    assert_eq!((keep_tags.len(), keep_younger), (2, &Some("30d".parse().unwrap())));
    assert_eq!(rules.immutable, [Tags { repositories: pattern("**"), tags: pattern("v*") }]);
}

#[test]
fn a_mistake_in_the_file_is_told_with_its_place_and_what_may_be_there() {
    for (text, words) in [
        (
            "listen: 127.0.0.1:5000\ngc-gracious: 1h\n",
            &["line 2", "gc-gracious", "gc-grace", "connections-max"][..],
        ),
        ("\n\ngc-grace: 90\n", &["line 3", "'90'", "s, m, h or d"]),
        ("listen: localhost\n", &["line 1", "socket address"]),
        ("gc-schedule: nightly\n", &["line 1", "nightly", "0 2 * * *", "off"]),
        ("quota:\n  - vi/=10G\n  - vi=10G\n", &["line 3", "vi/ns1/"]),
        ("quota: vi/=10G\n", &["line 1", "sequence"]),
        ("gc-rate: 0\n", &["line 1", "nonzero"]),
        ("bearer: perhaps\n", &["line 1", "boolean"]),
        ("rules:\n  retention:\n    - repositories: a\n      keep: 1\n", &["line 4", "keep", "keep-newest"]),
        ("gc-rate: 1\ngc-rate: 2\n", &["line 2", "gc-rate"]),
        ("- listen\n", &["line 1"]),
        ("a: &a [x, x]\nb: [*a, *a\n", &["line"]),
    ] {
        let error = format!("{:#}", parse(text).unwrap_err());
        for word in [&["registry.yaml"], words].concat() {
            assert!(error.contains(word), "{word}: {error}");
        }
    }
    let long = format!("# {}\n", "x".repeat(1 << 20));
    assert!(format!("{:#}", parse(&long).unwrap_err()).contains("more than 1048576 bytes"));
    for empty in ["", "# nothing\n", "---\n"] {
        assert_eq!(values(&parse(empty).unwrap()).unwrap(), values(&Settings::default()).unwrap(), "{empty}");
    }
}

#[test]
fn settings_that_go_ill_together_are_told_wherever_they_come_from() {
    for (text, word) in [
        ("allow-anonymous: true\nhtpasswd: /h", "allow-anonymous"),
        ("bearer: true", "--htpasswd"),
        ("bearer-key: /k\nhtpasswd: /h", "--bearer"),
        ("tls-cert: /c", "--tls-key"),
        ("tls-key: /k", "--tls-cert"),
        ("client-ca: /ca", "--tls-cert"),
        ("plain-http: true\ntls-cert: /c\ntls-key: /k", "--plain-http"),
        ("single-replica: true", "`bucket`"),
        ("redirect: 20m", "`bucket`"),
        ("bucket: {bucket: images}\nredirect: 0s", "20m"),
        ("bucket: {bucket: a/b}", "name alone"),
        ("scrub-rate: 0", "off"),
        ("idle-timeout: 0s", "60s"),
        ("listen: 0.0.0.0:5000\nplain-http: true", "--allow-anonymous"),
        ("listen: 0.0.0.0:5000\nallow-anonymous: true", "--plain-http"),
    ] {
        let error = parse(text).unwrap().check().unwrap_err().to_string();
        assert!(error.contains(word), "{text}: {error}");
    }
}
