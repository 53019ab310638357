//! How objects are shown: as a Table, and as their metadata alone.
//!
//! What columns a kind has is data: the `additionalPrinterColumns` of a CustomResourceDefinition, and for the core kinds a table of the
//! same form with a function that fills a row. The clock is a parameter.
//!
//! Source: <https://kubernetes.io/docs/reference/using-api/api-concepts/#receiving-resources-as-tables>.

mod age;
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

use crate::object::Object;
use crate::select::quote;
use crate::status::{Result, Status};

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
    /// Of `meta.k8s.io`: `v1` or `v1beta1`.
    pub version: &'static str,
    pub now: DateTime<Utc>,
}

impl Columns {
    /// Shows objects as a Table. `metadata` is that of their list, or holds the `resourceVersion` of a single one.
    pub fn table(&self, objects: &[Object], metadata: &Object, options: &TableOptions) -> Object {
        let rows: Vec<Value> = self.rows(objects, options).collect();
        let definitions = if options.has_headers { self.definitions() } else { Value::Null };
        let mut table = Object::new();
        table.insert("kind".to_owned(), Value::from("Table"));
        table.insert("apiVersion".to_owned(), Value::from(format!("meta.k8s.io/{}", options.version)));
        table.insert("metadata".to_owned(), Value::Object(partial::list_metadata(metadata)));
        table.insert("columnDefinitions".to_owned(), definitions);
        table.insert("rows".to_owned(), Value::Array(rows));
        table
    }

    /// The rows of a Table, one by one.
    pub fn rows<'a>(
        &'a self,
        objects: &'a [Object],
        options: &'a TableOptions,
    ) -> impl Iterator<Item = Value> + use<'a> {
        let marked = self.marked(objects);
        objects.iter().enumerate().map(move |(i, object)| {
            let mut row = json!({"cells": self.cells(object, marked == Some(i), options.now)});
            if let Some(condition) = self.condition(object) {
                row["conditions"] = json!([condition]);
            }
            row["object"] = match options.include {
                Include::None => Value::Null,
                Include::Metadata => Value::Object(partial(object, options.version)),
                Include::Object => Value::Object(object.clone()),
            };
            row
        })
    }
}
