//! Who owns which fields of an object: `metadata.managedFields`.

use std::collections::BTreeMap;

use chrono::{DateTime, SecondsFormat, Utc};
use serde_json::{Map, Value};

use super::fields::{Element, Set, Slot};
use super::typed::{View, reconcile};
use crate::object::{self, Object};

/// Entries of updates that are kept apart; the oldest beyond are merged into one.
const UPDATES_MAX_COUNT: usize = 10;
/// Manager of the changes that are too old to be kept apart.
const ANCIENT: &str = "ancient-changes";

/// What a manager did to own its fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Operation {
    Apply,
    Update,
}

/// Who did what through which part of an object. A manager has one entry for each.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Manager {
    pub name: String,
    pub operation: Operation,
    /// Of updates alone: who applies goes on with the same fields in another version.
    pub api_version: Option<String>,
    pub subresource: String,
}

impl Manager {
    pub fn new(name: &str, operation: Operation, api_version: &str, subresource: &str) -> Self {
        let name = if name.is_empty() { "unknown" } else { name }.to_owned();
        let api_version = (operation == Operation::Update).then(|| api_version.to_owned());
        Self { name, operation, api_version, subresource: subresource.to_owned() }
    }
}

/// The manager as a conflict tells it.
impl std::fmt::Display for Manager {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", Value::from(self.name.as_str()))?;
        if !self.subresource.is_empty() {
            write!(f, " with subresource {}", Value::from(self.subresource.as_str()))?;
        }
        match &self.api_version {
            Some(version) => write!(f, " using {version}"),
            None => Ok(()),
        }
    }
}

/// What one manager owns.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Entry {
    pub api_version: String,
    pub time: Option<DateTime<Utc>>,
    pub set: Set,
}

/// All of `metadata.managedFields`.
#[derive(Clone, Debug, Default)]
pub(super) struct Managed(pub BTreeMap<Manager, Entry>);

impl Managed {
    /// Reads what an object has.
    ///
    /// # Errors
    /// Says which entry cannot be read.
    pub fn read(view: View<'_>, entries: &Value) -> Result<Self, String> {
        let entries = entries.as_array().ok_or("managedFields is a list")?.iter().enumerate();
        let read = |(index, entry): (usize, &Value)| {
            read_entry(view, entry).map_err(|why| format!("managed fields entry {index}: {why}"))
        };
        Ok(Self(entries.map(read).collect::<Result<_, _>>()?))
    }

    /// Writes all entries into the metadata of an object, in the order of Kubernetes.
    pub fn write(self, object: &mut Object) {
        let mut entries: Vec<(&Manager, &Entry)> =
            self.0.iter().filter(|(_, entry)| !entry.set.is_empty()).collect();
        entries.sort_by_key(|&(manager, entry)| {
            (manager.operation, seconds(entry), &manager.name, &entry.api_version, &manager.subresource)
        });
        let entries: Vec<Value> =
            entries.into_iter().map(|(manager, entry)| write_entry(manager, entry)).collect();
        let metadata = object::metadata_mut(object);
        match entries.is_empty() {
            true => metadata.remove("managedFields"),
            false => metadata.insert("managedFields".to_owned(), Value::Array(entries)),
        };
    }

    /// Merges the oldest updates of the same version, until there are not too many of them.
    pub fn cap(&mut self) {
        let updates = self.0.iter().filter(|(manager, _)| manager.operation == Operation::Update);
        let mut updates: Vec<(i64, Manager)> =
            updates.map(|(manager, entry)| (seconds(entry), manager.clone())).collect();
        updates.sort();
        let mut surplus = updates.len().saturating_sub(UPDATES_MAX_COUNT);
        let mut first_of_version: BTreeMap<String, Manager> = BTreeMap::new();
        for (_, manager) in updates {
            if surplus == 0 {
                break;
            }
            let version = manager.api_version.clone().unwrap_or_default();
            let Some(first) = first_of_version.get(&version) else {
                first_of_version.insert(version, manager);
                continue;
            };
            let ancient = Manager::new(ANCIENT, Operation::Update, &version, "");
            let Some(mut entry) = self.0.remove(&manager) else { continue };
            if let Some(mut before) = self.0.remove(&ancient).or_else(|| self.0.remove(first)) {
                // The small set goes into the large one.
                before.set.add(entry.set);
                entry.set = before.set;
            }
            self.0.insert(ancient, entry);
            surplus -= 1;
        }
    }
}

fn seconds(entry: &Entry) -> i64 {
    entry.time.map_or(0, |time| time.timestamp())
}

fn read_entry(view: View<'_>, entry: &Value) -> Result<(Manager, Entry), String> {
    let text = |key: &str| match entry.get(key) {
        None | Some(Value::Null) => Ok(""),
        Some(Value::String(text)) => Ok(text.as_str()),
        Some(other) => Err(format!("{key} is a string, not {other}")),
    };
    let operation = match text("operation")? {
        "Apply" => Operation::Apply,
        "Update" => Operation::Update,
        _ => return Err("operation must be `Apply` or `Update`".to_owned()),
    };
    let api_version = text("apiVersion")?;
    if api_version.is_empty() {
        return Err("apiVersion must not be empty".to_owned());
    }
    match text("fieldsType")? {
        "FieldsV1" => {}
        "" => return Err("missing fieldsType".to_owned()),
        other => return Err(format!("invalid fieldsType {other:?}")),
    }
    let time = match text("time")? {
        "" => None,
        time => {
            let time = DateTime::parse_from_rfc3339(time).map_err(|why| format!("time {time:?}: {why}"))?;
            Some(time.with_timezone(&Utc))
        }
    };
    let set = match entry.get("fieldsV1") {
        None | Some(Value::Null) => Set::default(),
        Some(fields) => Set::read(fields)?,
    };
    let manager = Manager {
        name: text("manager")?.to_owned(),
        ..Manager::new("", operation, api_version, text("subresource")?)
    };
    Ok((manager, Entry { api_version: api_version.to_owned(), time, set: reconcile(view, &set) }))
}

fn write_entry(manager: &Manager, entry: &Entry) -> Value {
    let mut written = Map::new();
    let mut put = |key: &str, value: &str| {
        if !value.is_empty() {
            written.insert(key.to_owned(), Value::from(value));
        }
    };
    put("manager", &manager.name);
    put("operation", if manager.operation == Operation::Apply { "Apply" } else { "Update" });
    put("apiVersion", &entry.api_version);
    put("subresource", &manager.subresource);
    put("fieldsType", "FieldsV1");
    if let Some(time) = entry.time {
        put("time", &time.to_rfc3339_opts(SecondsFormat::Secs, true));
    }
    // A set has no keys but strings, so that it always is a value.
    written.insert("fieldsV1".to_owned(), serde_json::to_value(&entry.set).unwrap_or_default());
    Value::Object(written)
}

/// Without the fields that nobody owns: what the object is, and what the server keeps in its metadata.
pub(super) fn without_system_fields(set: &Set) -> Set {
    let members = |names: &[&str]| {
        let mut set = Set::default();
        names.iter().for_each(|name| set.put(Element::Field((*name).to_owned()), Slot::member()));
        set
    };
    let of_metadata = [
        "name",
        "namespace",
        "creationTimestamp",
        "selfLink",
        "uid",
        "generation",
        "managedFields",
        "resourceVersion",
    ];
    let mut system = members(&["apiVersion", "kind"]);
    let metadata = Slot { is_member: true, below: members(&of_metadata) };
    system.put(Element::Field("metadata".to_owned()), metadata);
    set.difference(&system)
}
