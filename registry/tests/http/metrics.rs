//! What is told to those who watch: its form, its documentation, and the dashboard that shows it.

use std::collections::{BTreeMap, BTreeSet};

use dvcr_registry::{Quota, Upstream, Webhook};
use serde_json::Value;

use super::support::*;

/// The page with the table of all metrics.
const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/registry-metrics.md");
const DASHBOARD: &str = include_str!("../../../charts/dvcr/dashboards/registry.json");

/// A family of metrics as it is exported.
#[derive(Debug, Default)]
struct Family {
    help: String,
    kind: String,
    /// Names of samples, and the labels of each.
    samples: Vec<(String, BTreeMap<String, String>)>,
}

/// Reads the text format (exposition formats, version 0.0.4), strictly.
fn parse(text: &str) -> BTreeMap<String, Family> {
    assert!(text.ends_with('\n'));
    let mut families: BTreeMap<String, Family> = BTreeMap::new();
    let mut current = String::new();
    let mut seen = BTreeSet::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').unwrap();
            let earlier =
                families.insert(name.to_owned(), Family { help: help.to_owned(), ..Family::default() });
            assert!(earlier.is_none() && help.ends_with('.'), "{line}");
            current = name.to_owned();
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert!(name == current && ["counter", "gauge", "histogram"].contains(&kind), "{line}");
            assert_eq!(name.ends_with("_total"), kind == "counter", "{line}");
            families.get_mut(name).unwrap().kind = kind.to_owned();
        } else {
            let (sample, value) = line.rsplit_once(' ').unwrap();
            assert!(value.parse::<f64>().is_ok() && seen.insert(sample.to_owned()), "{line}");
            let (name, labels) = sample.split_once('{').unwrap_or((sample, "}"));
            let labels = labels.strip_suffix('}').unwrap();
            let labels = labels.split(',').filter(|label| !label.is_empty()).map(|label| {
                let (key, value) = label.split_once('=').unwrap();
                let value = value.strip_prefix('"').and_then(|value| value.strip_suffix('"')).unwrap();
                (key.to_owned(), value.to_owned())
            });
            let family = families.get_mut(&current).unwrap();
            let suffix = name.strip_prefix(&current).unwrap();
            let suffixes =
                if family.kind == "histogram" { &["_bucket", "_sum", "_count"][..] } else { &[""] };
            assert!(suffixes.contains(&suffix), "{line} stands below {current}");
            family.samples.push((name.to_owned(), labels.collect()));
        }
    }
    families
}

/// All metrics of a registry that has something to tell of each.
async fn exported() -> BTreeMap<String, Family> {
    let dir = tempfile::tempdir().unwrap();
    let served = Served::open_with(dir, |config| {
        config.cache.upstreams = vec![Upstream::new("up/", "https://up.example")];
        config.limits.quotas = vec![Quota { prefix: "a/".parse().unwrap(), bytes: 1 << 30 }];
        config.events.audit_log = Some(config.root.with_file_name("audit.log"));
        let (name, url) = ("ci".to_owned(), "http://127.0.0.1:9/".to_owned());
        config.events.webhooks = vec![Webhook { name, url, ..Webhook::default() }];
    })
    .await;
    served.push_image("a/b", "tag", 1).await;
    served.get("/v2/a/b/manifests/tag").await.expect(200);
    let text = served.get("/metrics").await.expect(200).text();
    parse(&text)
}

/// `INSTA_UPDATE=always cargo test -p dvcr-registry` renews the page.
#[tokio::test]
async fn every_metric_is_documented_as_it_is() {
    let rows: String = exported().await.iter().map(|(name, family)| row(name, family)).collect();
    let page = std::fs::read_to_string(PAGE).unwrap();
    let head = "| --- | --- | --- | --- |\n";
    let (before, rest) = page.split_once(head).unwrap();
    let (documented, after) = rest.split_once("\n\n").unwrap();
    if std::env::var("INSTA_UPDATE").is_ok_and(|update| update == "always") {
        std::fs::write(PAGE, format!("{before}{head}{rows}\n{after}")).unwrap();
        return;
    }
    assert_eq!(format!("{documented}\n"), rows, "INSTA_UPDATE=always renews the page");
}

fn row(name: &str, family: &Family) -> String {
    let labels: BTreeSet<_> = family.samples.iter().flat_map(|(_, labels)| labels.keys()).collect();
    let labels: Vec<_> = labels.into_iter().map(|label| format!("`{label}`")).collect();
    format!("| `{name}` | {} | {} | {} |\n", family.kind, labels.join(", "), family.help)
}

#[tokio::test]
async fn the_dashboard_asks_for_metrics_and_labels_that_there_are() {
    let families = exported().await;
    let samples: BTreeMap<&str, BTreeSet<&str>> = families
        .values()
        .flat_map(|family| &family.samples)
        .map(|(name, labels)| (name.as_str(), labels.keys().map(String::as_str).collect()))
        .collect();
    let dashboard: Value = serde_json::from_str(DASHBOARD).unwrap();
    let mut expressions = Vec::new();
    collect(&dashboard, &mut expressions);
    assert!(expressions.len() > 30, "{expressions:?}");
    for expression in &expressions {
        let mut rest = expression.as_str();
        while let Some(at) = rest.find("dvcr_") {
            rest = &rest[at..];
            let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
            let (name, behind) = rest.split_at(end);
            let labels = samples.get(name).unwrap_or_else(|| panic!("there is no {name}: {expression}"));
            let selected = behind.strip_prefix('{').and_then(|behind| behind.split_once('}'));
            for matcher in selected.iter().flat_map(|(selected, _)| selected.split(',')) {
                let label = matcher.split(['=', '!']).next().unwrap();
                // The first two are Prometheus' own.
                let is_known = ["job", "instance"].contains(&label) || labels.contains(label);
                assert!(is_known, "{name} has no label {label}: {expression}");
            }
            rest = behind;
        }
    }
    // Grafana tells panels apart by their id, and puts them where they say.
    let panels = dashboard["panels"].as_array().unwrap();
    let ids: BTreeSet<_> = panels.iter().map(|panel| panel["id"].as_u64().unwrap()).collect();
    assert_eq!(ids.len(), panels.len());
}

/// Expressions and queries, wherever they stand.
fn collect(value: &Value, expressions: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            for (key, value) in fields {
                match value {
                    Value::String(text) if ["expr", "query"].contains(&key.as_str()) => {
                        expressions.push(text.clone())
                    }
                    other => collect(other, expressions),
                }
            }
        }
        Value::Array(items) => items.iter().for_each(|item| collect(item, expressions)),
        _ => {}
    }
}
