//! The row of a Pod: how many containers are ready, what they do in one word, and how often they were started
//! again.
//!
//! The word is the phase, or the status's own reason, unless containers tell more: first those that
//! initialize, as `Init:…`, then the others, of which the first in the list is heard last. A deletion is told
//! before all of it.

use chrono::{DateTime, Utc};
use serde_json::{Value, json};

use super::age::since;
use super::cells::{NONE, at, list, objects, text};
use crate::object::{self, Object};

/// What tells that a Pod has ended, for whoever shows such rows in another way.
pub(super) fn condition(pod: &Object) -> Option<Value> {
    let phase = text(pod, &["status", "phase"]);
    let message = match phase {
        "Succeeded" => "The pod has completed successfully.",
        "Failed" => "The pod failed.",
        _ => return None,
    };
    Some(json!({"type": "Completed", "status": "True", "reason": phase, "message": message}))
}

pub(super) fn cells(pod: &Object, name: Value, age: Value, now: DateTime<Utc>) -> Vec<Value> {
    let summary = Summary::of(pod);
    let restarts = match summary.last_restart {
        Some(last) if summary.restarts != 0 => format!("{} ({} ago)", summary.restarts, since(last, now)),
        _ => summary.restarts.to_string(),
    };
    let or_none = |text: &str| Value::from(if text.is_empty() { NONE } else { text });
    let address = objects(pod, &["status", "podIPs"])
        .next()
        .map_or_else(|| text(pod, &["status", "podIP"]), |ip| text(ip, &["ip"]));
    vec![
        name,
        format!("{}/{}", summary.ready, summary.containers).into(),
        summary.reason.into(),
        restarts.into(),
        age,
        or_none(address),
        or_none(text(pod, &["spec", "nodeName"])),
        or_none(text(pod, &["status", "nominatedNodeName"])),
        readiness_gates(pod).into(),
    ]
}

struct Summary<'a> {
    containers: usize,
    ready: usize,
    reason: String,
    restarts: i64,
    /// When the container ended that was started again last.
    last_restart: Option<&'a str>,
}

impl<'a> Summary<'a> {
    fn of(pod: &'a Object) -> Self {
        let phase = text(pod, &["status", "phase"]);
        let own_reason = text(pod, &["status", "reason"]);
        let is_gated = objects(pod, &["status", "conditions"]).any(|condition| {
            text(condition, &["type"]) == "PodScheduled" && text(condition, &["reason"]) == "SchedulingGated"
        });
        let reason = match (is_gated, own_reason) {
            (true, _) => "SchedulingGated",
            (false, "") => phase,
            (false, reason) => reason,
        };
        let sidecars =
            objects(pod, &["spec", "initContainers"]).filter(|container| is_sidecar(container)).count();
        let mut summary = Self {
            containers: list(pod, &["spec", "containers"]).len() + sidecars,
            ready: 0,
            reason: reason.to_owned(),
            restarts: 0,
            last_restart: None,
        };
        let is_initializing = summary.add_init_containers(pod);
        if !is_initializing || condition_status(pod, "Initialized") == Some("True") {
            summary.add_containers(pod);
        }
        let is_deleted = object::text(pod, &["metadata", "deletionTimestamp"]).is_some();
        if is_deleted && own_reason == "NodeLost" {
            summary.reason = "Unknown".to_owned();
        } else if is_deleted && !matches!(phase, "Succeeded" | "Failed") {
            summary.reason = "Terminating".to_owned();
        }
        summary
    }

    /// Whether one of them is still at work, or has failed.
    fn add_init_containers(&mut self, pod: &'a Object) -> bool {
        let (mut sidecar_restarts, mut sidecar_last) = (0, None);
        let mut is_initializing = false;
        let total = list(pod, &["spec", "initContainers"]).len();
        for (i, status) in objects(pod, &["status", "initContainerStatuses"]).enumerate() {
            let name = text(status, &["name"]);
            let is_sidecar = objects(pod, &["spec", "initContainers"])
                .rfind(|container| text(container, &["name"]) == name)
                .is_some_and(is_sidecar);
            let (restarts, last) = restarts(status);
            self.restarts += restarts;
            self.last_restart = later(self.last_restart, last);
            if is_sidecar {
                sidecar_restarts += restarts;
                sidecar_last = later(sidecar_last, last);
            }
            let terminated = state(status, "terminated");
            let waiting =
                state(status, "waiting").map(|waiting| text(waiting, &["reason"])).unwrap_or_default();
            if terminated.is_some_and(|terminated| number(terminated, "exitCode") == 0) {
                continue;
            }
            if is_sidecar && flag(status, "started") {
                self.ready += usize::from(flag(status, "ready"));
                continue;
            }
            self.reason = match (terminated, waiting) {
                (Some(terminated), _) => format!("Init:{}", ended(terminated)),
                (None, "" | "PodInitializing") => format!("Init:{i}/{total}"),
                (None, reason) => format!("Init:{reason}"),
            };
            is_initializing = true;
            break;
        }
        if !is_initializing || condition_status(pod, "Initialized") == Some("True") {
            // From here on only those that go on beside the containers count.
            (self.restarts, self.last_restart) = (sidecar_restarts, sidecar_last);
        }
        is_initializing
    }

    fn add_containers(&mut self, pod: &'a Object) {
        let (mut has_running, mut error) = (false, None);
        for status in objects(pod, &["status", "containerStatuses"]).rev() {
            let (restarts, last) = restarts(status);
            self.restarts += restarts;
            self.last_restart = later(self.last_restart, last);
            let waiting =
                state(status, "waiting").map(|waiting| text(waiting, &["reason"])).unwrap_or_default();
            if !waiting.is_empty() {
                self.reason = waiting.to_owned();
            } else if let Some(terminated) = state(status, "terminated") {
                self.reason = ended(terminated);
                if number(terminated, "exitCode") != 0 {
                    error = Some(self.reason.clone());
                }
            } else if flag(status, "ready") && state(status, "running").is_some() {
                has_running = true;
                self.ready += 1;
            }
        }
        if self.reason == "Completed" {
            if has_running && condition_status(pod, "Ready") == Some("True") {
                self.reason = "Running".to_owned();
            } else if let Some(error) = error {
                self.reason = error;
            } else if has_running {
                self.reason = "NotReady".to_owned();
            }
        }
    }
}

/// How a container ended: its reason, its signal or its exit code.
fn ended(terminated: &Object) -> String {
    match (text(terminated, &["reason"]), number(terminated, "signal")) {
        ("", 0) => format!("ExitCode:{}", number(terminated, "exitCode")),
        ("", signal) => format!("Signal:{signal}"),
        (reason, _) => reason.to_owned(),
    }
}

/// Whether an init container goes on beside the others.
fn is_sidecar(container: &Object) -> bool {
    text(container, &["restartPolicy"]) == "Always"
}

fn state<'a>(status: &'a Object, state: &str) -> Option<&'a Object> {
    at(status, &["state", state])?.as_object()
}

fn number(object: &Object, field: &str) -> i64 {
    object.get(field).and_then(Value::as_i64).unwrap_or(0)
}

fn flag(object: &Object, field: &str) -> bool {
    object.get(field) == Some(&Value::Bool(true))
}

/// How often a container was started again, within what Kubernetes counts, and when it had ended before the
/// last time.
fn restarts(status: &Object) -> (i64, Option<&str>) {
    let count = i64::from(i32::try_from(number(status, "restartCount")).unwrap_or(i32::MAX));
    (count, object::text(status, &["lastState", "terminated", "finishedAt"]))
}

/// The later of two times; what is no time is earlier than any.
fn later<'a>(a: Option<&'a str>, b: Option<&'a str>) -> Option<&'a str> {
    let time = |text: Option<&str>| DateTime::parse_from_rfc3339(text?).ok();
    if time(b) > time(a) { b } else { a }
}

fn condition_status<'a>(pod: &'a Object, r#type: &str) -> Option<&'a str> {
    let condition =
        objects(pod, &["status", "conditions"]).find(|condition| text(condition, &["type"]) == r#type)?;
    object::text(condition, &["status"])
}

/// How many of the Pod's readiness gates are conditions that are true.
fn readiness_gates(pod: &Object) -> String {
    let gates = list(pod, &["spec", "readinessGates"]);
    if gates.is_empty() {
        return NONE.to_owned();
    }
    let is_true = |gate: &&Value| {
        gate.get("conditionType").and_then(Value::as_str).and_then(|gate| condition_status(pod, gate))
            == Some("True")
    };
    format!("{}/{}", gates.iter().filter(is_true).count(), gates.len())
}
