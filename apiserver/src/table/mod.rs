//! How objects are shown: as a Table, and as their metadata alone.
//!
//! What columns a kind has is data: the `additionalPrinterColumns` of a CustomResourceDefinition, and for the
//! core kinds a table of the same form with a function that fills a row. The clock is a parameter.
//!
//! Source: <https://kubernetes.io/docs/reference/using-api/api-concepts/#receiving-resources-as-tables>.

mod age;
mod cells;
mod columns;
mod jsonpath;
mod kinds;
mod partial;
mod pod;
#[cfg(test)]
mod tests;

use chrono::{DateTime, Utc};
use serde_json::{Value, json};

pub use age::{human_duration, since};
pub use columns::Columns;
pub use jsonpath::{JSONPATH_BYTES_MAX, JsonPath};
pub use partial::{partial, partial_list};

use crate::field::quote;
use crate::negotiate::Target;
use crate::object::{self, Object};
use crate::status::{Reason, Result, Status};

/// What of its object a row carries (`includeObject`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Include {
    None,
    #[default]
    Metadata,
    Object,
}

impl Include {
    /// Reads the parameter of a query; the empty one is `Metadata`.
    ///
    /// # Errors
    ///
    /// BadRequest for any other value.
    pub fn parse(value: &str) -> Result<Self> {
        match value {
            "None" => Ok(Self::None),
            "Metadata" | "" => Ok(Self::Metadata),
            "Object" => Ok(Self::Object),
            other => Err(Status::bad_request(format!(
                "Unable to convert to Table as requested: includeObject: Invalid value: {}: must be 'Metadata', 'Object', 'None', or empty",
                quote(other)
            ))),
        }
    }
}

/// How a table is written.
#[derive(Clone, Copy, Debug)]
pub struct TableOptions {
    pub include: Include,
    /// Whether the columns are told; in a watch they are with the first event alone.
    pub has_headers: bool,
    pub now: DateTime<Utc>,
}

/// One object, read or told by a watch, as what the client asked for instead.
///
/// # Errors
///
/// NotAcceptable if the target is a list of other objects than rows, or not one of `OBJECT_TARGETS`.
pub fn object_as(
    target: Target,
    object: &Object,
    columns: &Columns,
    options: &TableOptions,
) -> Result<Object> {
    let kind = object::text(object, &["kind"]).unwrap_or("object");
    let no_metadata = Object::new();
    let metadata = object::metadata(object).unwrap_or(&no_metadata);
    match target.kind {
        "Table" => Ok(table(columns, Items::One(object), metadata, target.version, options)),
        "PartialObjectMetadata" => Ok(partial(object, target.version)),
        other => Err(Status::new(
            Reason::NotAcceptable,
            format!("you requested {other}, but the requested object is not a list ({kind})"),
        )),
    }
}

/// A list of objects as what the client asked for instead; `metadata` is that of the list.
///
/// # Errors
///
/// NotAcceptable if the target is one object, or not one of `OBJECT_TARGETS`.
pub fn list_as(
    target: Target,
    items: &[Object],
    metadata: &Object,
    columns: &Columns,
    options: &TableOptions,
) -> Result<Object> {
    match target.kind {
        "Table" => Ok(table(columns, Items::List(items), metadata, target.version, options)),
        "PartialObjectMetadataList" => Ok(partial_list(items, metadata, target.version)),
        other => Err(Status::new(
            Reason::NotAcceptable,
            format!("you requested {other}, but the requested object is a list"),
        )),
    }
}

#[derive(Clone, Copy)]
enum Items<'a> {
    One(&'a Object),
    List(&'a [Object]),
}

fn table(
    columns: &Columns,
    items: Items<'_>,
    metadata: &Object,
    version: &str,
    options: &TableOptions,
) -> Object {
    let (objects, marked) = match items {
        Items::One(object) => (std::slice::from_ref(object), None),
        Items::List(objects) => (objects, columns.marked(objects)),
    };
    let rows = objects.iter().enumerate().map(|(i, object)| {
        let mut row = json!({"cells": columns.cells(object, marked == Some(i), options.now)});
        if let Some(condition) = columns.condition(object) {
            row["conditions"] = json!([condition]);
        }
        row["object"] = match options.include {
            Include::None => Value::Null,
            Include::Metadata => Value::Object(partial(object, version)),
            Include::Object => Value::Object(object.clone()),
        };
        row
    });
    let rows: Vec<Value> = rows.collect();
    let definitions = if options.has_headers { columns.definitions() } else { Value::Null };
    let mut table = Object::new();
    table.insert("kind".to_owned(), Value::from("Table"));
    table.insert("apiVersion".to_owned(), Value::from(format!("meta.k8s.io/{version}")));
    table.insert("metadata".to_owned(), Value::Object(partial::list_metadata(metadata)));
    table.insert("columnDefinitions".to_owned(), definitions);
    table.insert("rows".to_owned(), Value::Array(rows));
    table
}
