//! Proofs of what the store promises.

mod crash;
mod faults;
mod files;
mod journal;
mod model;
mod watching;
mod writing;

use serde_json::json;

use super::*;
use crate::object::{self, Object};

const RESOURCE: &str = "example.com/things";

fn key(namespace: &str, name: &str) -> Key {
    Key::new(RESOURCE, namespace, name).unwrap()
}

fn all() -> Range {
    Range::resource(RESOURCE).unwrap()
}

fn object(name: &str, number: u64) -> Object {
    let text = json!({"apiVersion": "example.com/v1", "kind": "Thing", "metadata": {"name": name}, "spec": {"number": number}});
    text.as_object().unwrap().clone()
}

fn put(key: &Key, number: u64) -> Write {
    Write {
        key: key.clone(),
        expect: Expect::Any,
        value: Some(Draft::new(&object(key.name(), number)).unwrap()),
    }
}

fn delete(key: &Key) -> Write {
    Write { key: key.clone(), expect: Expect::Any, value: None }
}

/// The resource version that is in a text, and its number.
fn parse(text: &[u8]) -> (u64, u64) {
    let object: Object = serde_json::from_slice(text).unwrap();
    (object::resource_version(&object).unwrap(), object["spec"]["number"].as_u64().unwrap())
}

fn number(text: Option<&Text>) -> Option<u64> {
    text.map(|text| {
        let (revision, number) = parse(text.json());
        assert_eq!(revision, text.revision());
        number
    })
}

fn open(folder: &Path) -> Store {
    Store::open(folder, Options::default()).unwrap()
}

/// Key, number before and number after of the events that the watch has so far.
async fn drain(store: &Store, watch: &mut Watch) -> Result<Vec<(u64, Key, Option<u64>, Option<u64>)>, End> {
    let newest = store.revision();
    let mut seen = Vec::new();
    while watch.revision() < newest {
        let event = tokio::select! {
            biased;
            event = watch.next() => event?,
            // Nothing of the range may come: whether that is all is looked at again.
            () = tokio::time::sleep(Duration::from_millis(1)) => continue,
        };
        let (before, after) = (number(event.before.as_ref()), number(event.after.as_ref()));
        seen.push((event.revision, event.key.clone(), before, after));
    }
    Ok(seen)
}
