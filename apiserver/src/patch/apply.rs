//! Server-side apply and the tracking of who changed what (KEP-555).
//!
//! ```text
//!  live ───────┬─> merged ──> without what the manager applied before, and nobody wants now ──> new ──> conflicts? ──> new object
//!  applied ────┘                                                                                 │
//!  managedFields: others give up what changed or is gone; the manager owns what it applied <─────┘
//! ```

use chrono::{DateTime, Utc};
use serde_json::{Map, Value};

use super::check_depth;
use super::fields::Set;
use super::managed::{Entry, Managed, Manager, Operation, without_system_fields};
use super::typed::{View, changes, check, fields, merge, remove, whole, with_declared};
use crate::object::{self, Object};
use crate::schema::Node;
use crate::status::{Cause, Reason, Result, Status};

/// Where kubectl keeps what it applied on the client's side.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";
/// Paths of one answer to a conflict; what is beyond is counted, not told.
const CONFLICTS_MAX_BYTES: usize = 64 << 10;
/// All annotations of an object together.
const ANNOTATIONS_MAX_BYTES: usize = 256 << 10;
/// The one manager whose conflicts with its own client-side applies are none.
const KUBECTL: &str = "kubectl";
/// Manager of what an object had before anybody applied to it.
const BEFORE_FIRST_APPLY: &str = "before-first-apply";

/// One request to apply a configuration.
#[derive(Clone, Copy)]
pub struct Apply<'a> {
    pub node: &'a Node,
    /// The object as it is; `None` makes it.
    pub live: Option<&'a Object>,
    /// What the manager wants, without the parts that this request cannot change, such as `status` beside a status subresource.
    pub applied: &'a Object,
    pub manager: &'a str,
    /// Takes over what others own.
    pub force: bool,
    /// Version of the request.
    pub api_version: &'a str,
    /// Such as `status`; empty for the object itself.
    pub subresource: &'a str,
    pub now: DateTime<Utc>,
}

/// One write that is no apply.
#[derive(Clone, Copy)]
pub struct Update<'a> {
    pub node: &'a Node,
    /// The object as it is; `None` for a create.
    pub live: Option<&'a Object>,
    pub manager: &'a str,
    /// Version of the request.
    pub api_version: &'a str,
    /// Such as `status`; empty for the object itself.
    pub subresource: &'a str,
    pub now: DateTime<Utc>,
}

/// Applies a configuration: the object has what it asks for, has no more what the manager asked for before and nobody else does, and tells
/// in `metadata.managedFields` who wants what. Nothing is defaulted, and fields of the server, as `metadata.uid`, are merged as all others are.
/// What is applied twice is the same object, times included.
///
/// # Errors
/// `BadRequest` for a configuration that cannot be merged, `Conflict` with a cause for each field that another manager owns and that would
/// change.
pub fn apply(request: Apply<'_>) -> Result<Object> {
    let view = View::of(request.node);
    check_applied(view, &request)?;
    let (live, managed) = match request.live {
        None => (identity(request.applied), Managed::default()),
        Some(live) => {
            let mut managed = owned(view, live).map_err(|why| {
                Status::new(Reason::InternalError, format!("failed to decode managed fields: {why}"))
            })?;
            let live = without_managed_fields(live);
            if managed.0.is_empty() {
                let by = request.manager(BEFORE_FIRST_APPLY, Operation::Update);
                update(view, &identity(&live), &live, &mut managed, (by, request.api_version, request.now));
            }
            (live, managed)
        }
    };
    let done = applying(view, &request, &live, managed.clone(), request.force).or_else(|conflicts| {
        let conflicts = without_those_of_kubectl(view, &request, &live, conflicts);
        match conflicts.is_empty() {
            true => applying(view, &request, &live, managed, true),
            false => Err(conflicts),
        }
    });
    let (mut new, managed) = done.map_err(|conflicts| conflict(&conflicts))?;
    if request.manager == KUBECTL && last_applied(&new).is_some() {
        keep_last_applied(&mut new, request.applied);
    }
    managed.write(&mut new);
    Ok(new)
}

impl Apply<'_> {
    fn manager(&self, name: &str, operation: Operation) -> Manager {
        Manager::new(name, operation, self.api_version, self.subresource)
    }
}

/// Writes into an object, which is about to be stored, who changed what: the fields that differ from the live object are the manager's,
/// and nobody else's. A request can change `metadata.managedFields`, and clears it with `[{}]`; one that has none leaves it as it is.
pub fn track_update(request: Update<'_>, mut new: Object) -> Object {
    let view = View::of(request.node);
    let of_live = || request.live.and_then(|live| owned(view, live).ok()).unwrap_or_default();
    let mut managed = if !request.subresource.is_empty() {
        of_live()
    } else if clears(&new) {
        Managed::default()
    } else {
        owned(view, &new).ok().filter(|managed| !managed.0.is_empty()).unwrap_or_else(of_live)
    };
    object::metadata_mut(&mut new).remove("managedFields");
    // An object that nobody tracks stays so, until somebody applies to it.
    if managed.0.is_empty() && request.live.is_some() {
        return new;
    }
    let live = request.live.map_or_else(|| identity(&new), without_managed_fields);
    let manager = Manager::new(request.manager, Operation::Update, request.api_version, request.subresource);
    update(view, &live, &new, &mut managed, (manager, request.api_version, request.now));
    managed.cap();
    managed.write(&mut new);
    new
}

fn owned(view: View<'_>, object: &Object) -> Result<Managed, String> {
    match object::metadata(object).and_then(|metadata| metadata.get("managedFields")) {
        None | Some(Value::Null) => Ok(Managed::default()),
        Some(entries) => Managed::read(view, entries),
    }
}

/// Whether a request wants nobody to own anything: an empty list, or one empty entry.
fn clears(object: &Object) -> bool {
    let entries = object::metadata(object).and_then(|metadata| metadata.get("managedFields"));
    match entries.and_then(Value::as_array).map(Vec::as_slice) {
        Some([]) => true,
        Some([Value::Object(entry)]) => entry.is_empty(),
        _ => false,
    }
}

/// An object of the same kind with nothing in it.
fn identity(object: &Object) -> Object {
    let of = |key: &str| Some((key.to_owned(), object.get(key)?.clone()));
    ["apiVersion", "kind"].into_iter().filter_map(of).collect()
}

fn without_managed_fields(object: &Object) -> Object {
    let mut object = object.clone();
    if let Some(Value::Object(metadata)) = object.get_mut("metadata") {
        metadata.remove("managedFields");
    }
    object
}

fn check_applied(view: View<'_>, request: &Apply<'_>) -> Result<()> {
    let applied = request.applied;
    applied.values().try_for_each(check_depth)?;
    let managed = object::metadata(applied).and_then(|metadata| metadata.get("managedFields"));
    if managed.is_some_and(|fields| !fields.is_null()) {
        return Err(Status::bad_request("metadata.managedFields must be nil"));
    }
    let version = object::text(applied, &["apiVersion"]).unwrap_or_default();
    if version != request.api_version {
        return Err(Status::bad_request(format!(
            "Incorrect version specified in apply patch. Specified patch version: {version}, expected: {}",
            request.api_version
        )));
    }
    check(view, applied).map_err(|why| {
        let namespace = object::namespace(applied).unwrap_or_default();
        let name = object::name(applied).unwrap_or_default();
        let kind = object::text(applied, &["kind"]).unwrap_or_default();
        Status::bad_request(format!(
            "failed to create typed patch object ({namespace}/{name}; {version}, Kind={kind}): {why}"
        ))
    })
}

/// What others own of what a request would change.
type Conflicts = Vec<(Manager, Set)>;

/// Applies; or tells what others own of it.
fn applying(
    view: View<'_>,
    request: &Apply<'_>,
    live: &Object,
    mut managed: Managed,
    force: bool,
) -> Result<(Object, Managed), Conflicts> {
    let manager = request.manager(request.manager, Operation::Apply);
    let before = managed.0.remove(&manager);
    let last = before.as_ref().map_or_else(Set::default, |entry| entry.set.clone());
    let applies = fields(view, request.applied);

    let mut wanted = applies.clone();
    managed.0.values().for_each(|entry| wanted.add(entry.set.clone()));
    let new = prune(view, merge(view, live, request.applied), &last, &wanted);

    let conflicts = give_up(view, live, &new, &mut managed);
    if !force && !conflicts.is_empty() {
        return Err(conflicts);
    }
    let set = without_system_fields(&applies);
    let is_same = *live == new && set == last;
    let time = before.filter(|_| is_same).map_or(Some(request.now), |entry| entry.time);
    managed.0.insert(manager, Entry { api_version: request.api_version.to_owned(), time, set });
    Ok((new, managed))
}

/// Takes out of an object what its manager applied before (`last`), unless it or somebody else still wants it. What is below a field that is
/// not wanted any more goes with it, if nobody wants that.
fn prune(view: View<'_>, merged: Object, last: &Set, wanted: &Set) -> Object {
    if last.is_empty() {
        return merged;
    }
    let last = with_declared(view, last);
    let all = whole(view, &merged);
    let pruned = remove(view, merged.clone(), &last);
    // Back comes what is wanted.
    let kept = whole(view, &pruned).union(&with_declared(view, wanted));
    let pruned = remove(view, merged.clone(), &all.difference(&kept));
    // Back comes what nobody wants, and the manager never had.
    let gone = all.difference(&whole(view, &pruned)).intersection(&last);
    remove(view, merged, &gone)
}

/// Takes from all managers what has changed and what is gone; returns what has changed against their will.
fn give_up(view: View<'_>, live: &Object, new: &Object, managed: &mut Managed) -> Conflicts {
    let changes = changes(view, live, new);
    let changed = changes.modified.union(&changes.added);
    let lost = changed.union(&changes.removed);
    let mut conflicts = Vec::new();
    for (manager, entry) in &mut managed.0 {
        let conflict = entry.set.intersection(&changed);
        if !conflict.is_empty() {
            conflicts.push((manager.clone(), conflict));
        }
        entry.set = entry.set.difference(&lost);
    }
    managed.0.retain(|_, entry| !entry.set.is_empty());
    conflicts
}

/// Gives the fields that differ to the manager of a write.
fn update(
    view: View<'_>,
    live: &Object,
    new: &Object,
    managed: &mut Managed,
    by: (Manager, &str, DateTime<Utc>),
) {
    give_up(view, live, new, managed);
    let changes = changes(view, live, new);
    let changed = without_system_fields(&changes.modified.union(&changes.added));
    if changed.is_empty() {
        return;
    }
    let (manager, api_version, now) = by;
    let mut set = managed.0.remove(&manager).map_or_else(Set::default, |entry| entry.set);
    set.add(changed);
    managed.0.insert(manager, Entry { api_version: api_version.to_owned(), time: Some(now), set });
}

fn last_applied(object: &Object) -> Option<&str> {
    object::text(object, &["metadata", "annotations", LAST_APPLIED]).filter(|text| !text.is_empty())
}

/// The conflicts that remain for kubectl: none is with what it applied on the client's side, and what still is as it did.
fn without_those_of_kubectl(
    view: View<'_>,
    request: &Apply<'_>,
    live: &Object,
    conflicts: Conflicts,
) -> Conflicts {
    let last = last_applied(live).and_then(|text| serde_json::from_str::<Object>(text).ok()).filter(|last| {
        request.manager == KUBECTL
            && object::text(last, &["apiVersion"]) == Some(request.api_version)
            && check(view, last).is_ok()
    });
    let Some(last) = last else { return conflicts };
    let changes = changes(view, &last, live);
    let changed = changes.modified.union(&changes.added).union(&changes.removed);
    let own = fields(view, &last).difference(&changed);
    let remaining = conflicts.into_iter().map(|(manager, set)| (manager, set.difference(&own)));
    remaining.filter(|(_, set)| !set.is_empty()).collect()
}

/// Keeps the annotation of kubectl's client-side apply in step, so that one can go back to it.
fn keep_last_applied(new: &mut Object, applied: &Object) {
    let mut applied = applied.clone();
    if let Some(Value::Object(annotations)) = object::metadata_mut(&mut applied).get_mut("annotations") {
        annotations.remove(LAST_APPLIED);
    }
    let text = format!("{}\n", Value::Object(applied));
    let annotations =
        object::metadata_mut(new).entry("annotations").or_insert_with(|| Value::Object(Map::new()));
    if let Value::Object(annotations) = annotations {
        annotations.insert(LAST_APPLIED.to_owned(), Value::from(text));
        let bytes = |(key, value): (&String, &Value)| key.len() + value.as_str().map_or(0, str::len);
        if annotations.iter().map(bytes).sum::<usize>() > ANNOTATIONS_MAX_BYTES {
            annotations.remove(LAST_APPLIED);
        }
    }
}

fn conflict(conflicts: &[(Manager, Set)]) -> Status {
    let bytes_max = CONFLICTS_MAX_BYTES / conflicts.len().max(1);
    let all: Vec<(String, Vec<String>)> =
        conflicts.iter().map(|(manager, set)| (manager.to_string(), set.paths(bytes_max))).collect();
    let count: usize = conflicts.iter().map(|(_, set)| set.len()).sum();
    let message = match all.as_slice() {
        [(manager, paths)] if count == 1 => {
            format!("Apply failed with 1 conflict: conflict with {manager}: {}", paths.concat())
        }
        _ => {
            let by_manager = all.iter().map(|(manager, paths)| {
                let paths: String = paths.iter().map(|path| format!("\n- {path}")).collect();
                format!("conflicts with {manager}:{paths}")
            });
            format!("Apply failed with {count} conflicts: {}", by_manager.collect::<Vec<_>>().join("\n"))
        }
    };
    let mut status = Status::new(Reason::Conflict, message);
    for (manager, paths) in all {
        status.details.causes.extend(paths.into_iter().map(|field| Cause {
            reason: "FieldManagerConflict".to_owned(),
            message: format!("conflict with {manager}"),
            field,
        }));
    }
    status
}

#[cfg(test)]
#[path = "apply_tests.rs"]
mod tests;
