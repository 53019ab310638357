//! The cells of the core kinds.

use std::collections::BTreeSet;

use chrono::{DateTime, Utc};
use serde_json::Value;

use super::age::{UNKNOWN, since};
use super::kinds::Kind;
use super::pod;
use crate::object::{self, Object};
use crate::quantity::Quantity;
use crate::select::LabelSelector;

/// What stands for an empty cell.
pub(super) const NONE: &str = "<none>";
/// What stands for a field that is not set.
const UNSET: &str = "<unset>";
/// The most hosts of an Ingress that are shown.
const HOSTS_MAX: usize = 3;

impl Kind {
    /// The cells of an object, in the order of the columns.
    pub fn cells(self, object: &Object, is_marked: bool, now: DateTime<Utc>) -> Vec<Value> {
        let name = Value::from(object::name(object).unwrap_or_default());
        let age = Value::from(age(object, now));
        match self {
            Self::Binding => {
                let role =
                    format!("{}/{}", text(object, &["roleRef", "kind"]), text(object, &["roleRef", "name"]));
                let [users, groups, accounts] = subjects(object).map(|names| Value::from(names.join(", ")));
                vec![name, Value::from(role), age, users, groups, accounts]
            }
            Self::ConfigMap => vec![name, Value::from(len(object, "data") + len(object, "binaryData")), age],
            Self::Event => event(object, now),
            Self::Ingress => {
                let class = object::text(object, &["spec", "ingressClassName"]).unwrap_or(NONE);
                let ports = if list(object, &["spec", "tls"]).is_empty() { "80" } else { "80, 443" };
                vec![
                    name,
                    class.into(),
                    hosts(object).into(),
                    balancer(object).join(",").into(),
                    ports.into(),
                    age,
                ]
            }
            Self::Lease => vec![name, text(object, &["spec", "holderIdentity"]).into(), age],
            Self::Namespace => vec![name, text(object, &["status", "phase"]).into(), age],
            Self::NetworkPolicy => {
                let selector = at(object, &["spec", "podSelector"])
                    .map_or(Ok(LabelSelector::default()), LabelSelector::from_object);
                let selector = match selector {
                    Ok(selector) if selector.is_everything() => NONE.to_owned(),
                    Ok(selector) => selector.to_string(),
                    Err(_) => "<error>".to_owned(),
                };
                vec![name, selector.into(), age]
            }
            Self::Node => node(object, name, age),
            Self::PersistentVolume => {
                let claim = match at(object, &["spec", "claimRef"]).and_then(Value::as_object) {
                    Some(claim) => format!("{}/{}", text(claim, &["namespace"]), text(claim, &["name"])),
                    None => String::new(),
                };
                let reclaim = text(object, &["spec", "persistentVolumeReclaimPolicy"]);
                vec![
                    name,
                    size(at(object, &["spec", "capacity", "storage"])).into(),
                    access_modes(object, &["spec", "accessModes"]).into(),
                    reclaim.into(),
                    phase(object).into(),
                    claim.into(),
                    storage_class(object).into(),
                    set(object, "volumeAttributesClassName"),
                    text(object, &["status", "reason"]).into(),
                    age,
                    set(object, "volumeMode"),
                ]
            }
            Self::PersistentVolumeClaim => {
                let volume = text(object, &["spec", "volumeName"]);
                let (capacity, modes) = match volume {
                    "" => (String::new(), String::new()),
                    _ => (
                        size(at(object, &["status", "capacity", "storage"])),
                        access_modes(object, &["status", "accessModes"]),
                    ),
                };
                vec![
                    name,
                    phase(object).into(),
                    volume.into(),
                    capacity.into(),
                    modes.into(),
                    storage_class(object).into(),
                    set(object, "volumeAttributesClassName"),
                    age,
                    set(object, "volumeMode"),
                ]
            }
            Self::Pod => pod::cells(object, name, age, now),
            Self::ResourceQuota => {
                let [requests, limits] = quota(object);
                vec![name, requests.into(), limits.into(), age]
            }
            Self::Secret => vec![name, text(object, &["type"]).into(), Value::from(len(object, "data")), age],
            Self::Service => {
                let address = list(object, &["spec", "clusterIPs"]).first().and_then(Value::as_str);
                let address = address
                    .or(object::text(object, &["spec", "clusterIP"]).filter(|address| !address.is_empty()));
                let ports = ports(object);
                let ports = if ports.is_empty() { NONE.to_owned() } else { ports };
                vec![
                    name,
                    text(object, &["spec", "type"]).into(),
                    address.unwrap_or(NONE).into(),
                    external_address(object).into(),
                    ports.into(),
                    age,
                    labels(at(object, &["spec", "selector"])).into(),
                ]
            }
            Self::ServiceAccount => vec![name, age],
            Self::StorageClass => {
                let default = if is_marked { " (default)" } else { "" };
                let name = format!("{}{default}", object::name(object).unwrap_or_default());
                let expands = object.get("allowVolumeExpansion").and_then(Value::as_bool).unwrap_or(false);
                vec![
                    name.into(),
                    text(object, &["provisioner"]).into(),
                    object::text(object, &["reclaimPolicy"]).unwrap_or("Delete").into(),
                    object::text(object, &["volumeBindingMode"]).unwrap_or("Immediate").into(),
                    expands.into(),
                    age,
                ]
            }
        }
    }
}

/// The string at a path; empty if there is none.
pub(super) fn text<'a>(object: &'a Object, path: &[&str]) -> &'a str {
    object::text(object, path).unwrap_or_default()
}

/// The value at a path.
pub(super) fn at<'a>(object: &'a Object, path: &[&str]) -> Option<&'a Value> {
    let (first, rest) = path.split_first()?;
    rest.iter().try_fold(object.get(*first)?, |at, key| at.get(*key))
}

/// The list at a path; empty if there is none.
pub(super) fn list<'a>(object: &'a Object, path: &[&str]) -> &'a [Value] {
    at(object, path).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

/// The objects in the list at a path.
pub(super) fn objects<'a>(object: &'a Object, path: &[&str]) -> impl DoubleEndedIterator<Item = &'a Object> {
    list(object, path).iter().filter_map(Value::as_object)
}

fn age(object: &Object, now: DateTime<Utc>) -> String {
    since(text(object, &["metadata", "creationTimestamp"]), now)
}

fn len(object: &Object, field: &str) -> usize {
    object.get(field).and_then(Value::as_object).map_or(0, |map| map.len())
}

/// A field of `spec`, or that it is not set.
fn set(object: &Object, field: &str) -> Value {
    Value::from(object::text(object, &["spec", field]).unwrap_or(UNSET))
}

/// A quantity in its canonical form; none is zero.
fn size(value: Option<&Value>) -> String {
    match value {
        None | Some(Value::Null) => "0".to_owned(),
        Some(value) => Quantity::from_value(value)
            .map_or_else(|_| value.as_str().unwrap_or_default().to_owned(), |q| q.to_string()),
    }
}

fn phase(object: &Object) -> &str {
    match object::text(object, &["metadata", "deletionTimestamp"]) {
        Some(_) => "Terminating",
        None => text(object, &["status", "phase"]),
    }
}

fn storage_class(object: &Object) -> &str {
    let annotated =
        object::text(object, &["metadata", "annotations", "volume.beta.kubernetes.io/storage-class"]);
    annotated.unwrap_or_else(|| text(object, &["spec", "storageClassName"]))
}

fn access_modes(object: &Object, path: &[&str]) -> String {
    const MODES: [(&str, &str); 4] = [
        ("ReadWriteOnce", "RWO"),
        ("ReadOnlyMany", "ROX"),
        ("ReadWriteMany", "RWX"),
        ("ReadWriteOncePod", "RWOP"),
    ];
    let modes = list(object, path);
    let modes =
        MODES.iter().filter(|(mode, _)| modes.iter().any(|value| value == mode)).map(|(_, short)| *short);
    modes.collect::<Vec<_>>().join(",")
}

fn labels(labels: Option<&Value>) -> String {
    let labels = labels.and_then(Value::as_object).into_iter().flatten();
    let labels: Vec<_> =
        labels.map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or_default())).collect();
    if labels.is_empty() { NONE.to_owned() } else { labels.join(",") }
}

/// Users, groups and service accounts of a binding.
fn subjects(object: &Object) -> [Vec<String>; 3] {
    let mut names = [const { Vec::new() }; 3];
    for subject in objects(object, &["subjects"]) {
        let name = text(subject, &["name"]);
        match text(subject, &["kind"]) {
            "User" => names[0].push(name.to_owned()),
            "Group" => names[1].push(name.to_owned()),
            "ServiceAccount" => names[2].push(format!("{}/{name}", text(subject, &["namespace"]))),
            _ => {}
        }
    }
    names
}

fn event(object: &Object, now: DateTime<Utc>) -> Vec<Value> {
    let time = |fields: &[&str]| {
        let field = fields.iter().map(|field| text(object, &[field])).find(|time| !time.is_empty());
        since(field.unwrap_or_default(), now)
    };
    // The two groups of events name the same fields in two ways.
    let text = |paths: [&[&str]; 2]| {
        let found = paths.into_iter().map(|path| text(object, path)).find(|text| !text.is_empty());
        found.unwrap_or_default()
    };
    let first = time(&["firstTimestamp", "deprecatedFirstTimestamp", "eventTime"]);
    let mut last = time(&["lastTimestamp", "deprecatedLastTimestamp"]);
    if last == UNKNOWN {
        last.clone_from(&first);
    }
    let mut count =
        ["count", "deprecatedCount"].iter().find_map(|field| object.get(*field)?.as_i64()).unwrap_or(0);
    if let Some(series) = object.get("series").and_then(Value::as_object) {
        last = since(object::text(series, &["lastObservedTime"]).unwrap_or_default(), now);
        count = series.get("count").and_then(Value::as_i64).unwrap_or(0);
    } else if count == 0 {
        count = 1;
    }
    let kind = text([&["involvedObject", "kind"], &["regarding", "kind"]]).to_lowercase();
    let target = match text([&["involvedObject", "name"], &["regarding", "name"]]) {
        "" => kind,
        name => format!("{kind}/{name}"),
    };
    let reporter = text([&["reportingComponent"], &["reportingController"]]);
    let component = match text([&["source", "component"], &["deprecatedSource", "component"]]) {
        "" => reporter,
        component => component,
    };
    let host = match text([&["source", "host"], &["deprecatedSource", "host"]]) {
        "" => text([&["reportingInstance"], &[]]),
        host => host,
    };
    let source = if host.is_empty() { component.to_owned() } else { format!("{component}, {host}") };
    vec![
        last.into(),
        text([&["type"], &[]]).into(),
        text([&["reason"], &[]]).into(),
        target.into(),
        text([&["involvedObject", "fieldPath"], &["regarding", "fieldPath"]]).into(),
        source.into(),
        text([&["message"], &["note"]]).trim().into(),
        first.into(),
        count.into(),
        object::name(object).unwrap_or_default().into(),
    ]
}

fn hosts(object: &Object) -> String {
    let rules = list(object, &["spec", "rules"]);
    let (mut hosts, mut has_more) = (Vec::new(), false);
    for rule in objects(object, &["spec", "rules"]) {
        has_more |= hosts.len() == HOSTS_MAX;
        let host = text(rule, &["host"]);
        if !has_more && !host.is_empty() {
            hosts.push(host);
        }
    }
    match (hosts.is_empty(), has_more) {
        (true, _) => "*".to_owned(),
        (false, false) => hosts.join(","),
        (false, true) => format!("{} + {} more...", hosts.join(","), rules.len().saturating_sub(HOSTS_MAX)),
    }
}

/// The addresses of a load balancer, each once, in order.
fn balancer(object: &Object) -> Vec<&str> {
    let addresses =
        objects(object, &["status", "loadBalancer", "ingress"]).map(|ingress| match text(ingress, &["ip"]) {
            "" => text(ingress, &["hostname"]),
            ip => ip,
        });
    addresses.filter(|address| !address.is_empty()).collect::<BTreeSet<_>>().into_iter().collect()
}

fn external_address(object: &Object) -> String {
    let external: Vec<&str> =
        list(object, &["spec", "externalIPs"]).iter().filter_map(Value::as_str).collect();
    let (addresses, empty) = match text(object, &["spec", "type"]) {
        "ClusterIP" | "NodePort" => (external, NONE),
        "LoadBalancer" => (balancer(object).into_iter().chain(external).collect(), "<pending>"),
        "ExternalName" => return text(object, &["spec", "externalName"]).to_owned(),
        _ => (Vec::new(), UNKNOWN),
    };
    if addresses.is_empty() { empty.to_owned() } else { addresses.join(",") }
}

fn ports(object: &Object) -> String {
    let number = |port: &Object, field: &str| port.get(field).and_then(Value::as_i64).unwrap_or(0);
    let ports = objects(object, &["spec", "ports"]).map(|port| {
        let protocol = text(port, &["protocol"]);
        match number(port, "nodePort") {
            0 => format!("{}/{protocol}", number(port, "port")),
            node_port => format!("{}:{node_port}/{protocol}", number(port, "port")),
        }
    });
    ports.collect::<Vec<_>>().join(",")
}

fn node(object: &Object, name: Value, age: Value) -> Vec<Value> {
    const ROLE_PREFIX: &str = "node-role.kubernetes.io/";
    let ready =
        objects(object, &["status", "conditions"]).rfind(|condition| text(condition, &["type"]) == "Ready");
    let mut status = match ready.map(|condition| text(condition, &["status"])) {
        Some("True") => "Ready".to_owned(),
        Some(_) => "NotReady".to_owned(),
        None => "Unknown".to_owned(),
    };
    if at(object, &["spec", "unschedulable"]) == Some(&Value::Bool(true)) {
        status.push_str(",SchedulingDisabled");
    }
    let labels = at(object, &["metadata", "labels"]).and_then(Value::as_object).into_iter().flatten();
    let roles = labels.filter_map(|(key, value)| match key.as_str() {
        "kubernetes.io/role" => value.as_str(),
        key => key.strip_prefix(ROLE_PREFIX),
    });
    let roles: BTreeSet<&str> = roles.filter(|role| !role.is_empty()).collect();
    let roles =
        if roles.is_empty() { NONE.to_owned() } else { roles.into_iter().collect::<Vec<_>>().join(",") };
    let address = |r#type: &str| {
        let found =
            objects(object, &["status", "addresses"]).find(|address| text(address, &["type"]) == r#type);
        Value::from(found.map_or(NONE, |address| text(address, &["address"])))
    };
    let info = |field: &str| match text(object, &["status", "nodeInfo", field]) {
        "" => UNKNOWN,
        info => info,
    };
    let mut kernel = info("kernelVersion").to_owned();
    let architecture = text(object, &["status", "nodeInfo", "architecture"]);
    if !architecture.is_empty() {
        kernel = format!("{kernel} ({architecture})");
    }
    vec![
        name,
        status.into(),
        roles.into(),
        age,
        text(object, &["status", "nodeInfo", "kubeletVersion"]).into(),
        address("InternalIP"),
        address("ExternalIP"),
        info("osImage").into(),
        kernel.into(),
        info("containerRuntimeVersion").into(),
    ]
}

/// What is used of what may be used: of requests and counts, and of limits.
fn quota(object: &Object) -> [String; 2] {
    let (mut requests, mut limits) = (Vec::new(), Vec::new());
    let hard = at(object, &["status", "hard"]).and_then(Value::as_object).into_iter().flatten();
    for (resource, hard) in hard {
        let used = size(at(object, &["status", "used", resource]));
        let cell = format!("{resource}: {used}/{}", size(Some(hard)));
        if resource.starts_with("limits.") { limits.push(cell) } else { requests.push(cell) }
    }
    [requests.join(", "), limits.join(", ")]
}

/// The StorageClass that is the default: of those marked so the newest, then the first by name.
pub(super) fn default_class(classes: &[Object]) -> Option<usize> {
    const MARKS: [&str; 2] =
        ["storageclass.kubernetes.io/is-default-class", "storageclass.beta.kubernetes.io/is-default-class"];
    let is_marked =
        |class: &Object| MARKS.iter().any(|mark| text(class, &["metadata", "annotations", mark]) == "true");
    let created =
        |class: &Object| DateTime::parse_from_rfc3339(text(class, &["metadata", "creationTimestamp"])).ok();
    let marked = classes.iter().enumerate().filter(|(_, class)| is_marked(class));
    let by_name =
        |(_, class): &(usize, &Object)| std::cmp::Reverse(object::name(class).unwrap_or_default().to_owned());
    marked.max_by_key(|class| (created(class.1), by_name(class))).map(|(i, _)| i)
}
