//! The query of a request, and the options in the body of a deletion (ListOptions, CreateOptions, UpdateOptions, PatchOptions and
//! DeleteOptions of meta.k8s.io/v1).

use serde::Deserialize;

use crate::field::{self, FieldError};
use crate::status::{Result, Status};

const GROUP: &str = "meta.k8s.io";
/// Longest name of a field manager, bytes.
const FIELD_MANAGER_BYTES_MAX: usize = 128;
/// Most parameters of a query.
const PARAMETERS_MAX: usize = 100;

/// How a `resourceVersion` binds a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Match {
    Exact,
    NotOlderThan,
}

/// What to list or to watch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ListOptions {
    pub label_selector: String,
    pub field_selector: String,
    pub watches: bool,
    pub wants_bookmarks: bool,
    /// Empty for the newest.
    pub resource_version: String,
    pub version_match: Option<Match>,
    pub timeout_seconds: Option<u64>,
    /// Most objects in a page; 0 for all.
    pub limit: u64,
    pub continue_: String,
    pub send_initial_events: Option<bool>,
}

/// Whether a write is one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DryRun {
    #[default]
    No,
    /// Everything is done but the writing.
    All,
}

/// What becomes of fields that the schema does not have, and of fields that come twice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FieldValidation {
    Ignore,
    #[default]
    Warn,
    Strict,
}

/// How to write.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WriteOptions {
    pub dry_run: DryRun,
    /// Empty for the one that the user agent names.
    pub field_manager: String,
    pub field_validation: FieldValidation,
    pub force: Option<bool>,
}

/// What becomes of the objects that an object owns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum Propagation {
    Orphan,
    Background,
    Foreground,
}

/// How to delete.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeleteOptions {
    pub dry_run: DryRun,
    pub grace_period_seconds: Option<u64>,
    pub propagation: Option<Propagation>,
    pub uid: Option<String>,
    pub resource_version: Option<String>,
}

/// Query parameters in their order.
struct Query(Vec<(String, String)>);

impl Query {
    fn parse(query: &str) -> Result<Self> {
        let mut pairs = Vec::new();
        for (key, value) in form_urlencoded::parse(query.as_bytes()) {
            if pairs.len() == PARAMETERS_MAX {
                let text = format!("the query has more than {PARAMETERS_MAX} parameters");
                return Err(Status::bad_request(text));
            }
            pairs.push((key.into_owned(), value.into_owned()));
        }
        Ok(Self(pairs))
    }

    /// The first value of a parameter.
    fn get(&self, key: &str) -> Option<&str> {
        self.0.iter().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
    }

    fn text(&self, key: &str) -> String {
        self.get(key).unwrap_or_default().to_owned()
    }

    /// A number; none where the parameter is missing or empty.
    fn number(&self, key: &str) -> Result<Option<u64>> {
        match self.get(key).filter(|value| !value.is_empty()) {
            None => Ok(None),
            Some(value) => value.parse().map(Some).map_err(|_| {
                Status::bad_request(format!(
                    "{key}: {value:?} is not a number of 0 or more; leave it out or mend it"
                ))
            }),
        }
    }

    /// A parameter that is there without a value, or with any but `0` and `false`, is true.
    fn flag(&self, key: &str) -> Option<bool> {
        self.get(key).map(|value| !matches!(value, "0" | "false" | "False" | "FALSE"))
    }

    fn dry_run(&self, errors: &mut Vec<FieldError>) -> DryRun {
        let values: Vec<_> =
            self.0.iter().filter(|(name, _)| name == "dryRun").map(|(_, v)| v.as_str()).collect();
        dry_run(&values, errors)
    }
}

fn dry_run(values: &[&str], errors: &mut Vec<FieldError>) -> DryRun {
    match values.iter().find(|value| **value != "All") {
        None if values.is_empty() => DryRun::No,
        None => DryRun::All,
        Some(other) => {
            errors.push(FieldError::not_supported("dryRun", *other, &["All"]));
            DryRun::All
        }
    }
}

/// The errors, if there are any.
fn checked(kind: &str, errors: Vec<FieldError>) -> Result<()> {
    if errors.is_empty() { Ok(()) } else { Err(field::invalid(GROUP, kind, "", errors)) }
}

impl ListOptions {
    /// Reads a query.
    ///
    /// # Errors
    /// `BadRequest` for what is no number, `Invalid` for what contradicts itself.
    pub fn parse(query: &str) -> Result<Self> {
        let query = Query::parse(query)?;
        let mut errors = Vec::new();
        let version_match = match query.get("resourceVersionMatch").unwrap_or_default() {
            "" => None,
            "Exact" => Some(Match::Exact),
            "NotOlderThan" => Some(Match::NotOlderThan),
            other => {
                let known = ["Exact", "NotOlderThan", ""];
                errors.push(FieldError::not_supported("resourceVersionMatch", other, &known));
                None
            }
        };
        let options = Self {
            label_selector: query.text("labelSelector"),
            field_selector: query.text("fieldSelector"),
            watches: query.flag("watch").unwrap_or(false),
            wants_bookmarks: query.flag("allowWatchBookmarks").unwrap_or(false),
            resource_version: query.text("resourceVersion"),
            version_match,
            timeout_seconds: query.number("timeoutSeconds")?,
            limit: query.number("limit")?.unwrap_or(0),
            continue_: query.text("continue"),
            send_initial_events: query.flag("sendInitialEvents"),
        };
        options.check(&mut errors);
        checked("ListOptions", errors)?;
        Ok(options)
    }

    fn check(&self, errors: &mut Vec<FieldError>) {
        const MATCH: &str = "resourceVersionMatch";
        if self.watches {
            let initial = self.send_initial_events.is_some();
            if initial && self.version_match != Some(Match::NotOlderThan) {
                let text = "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan";
                errors.push(FieldError::forbidden(MATCH, text));
            }
            if self.version_match.is_some() && !initial {
                let text = "resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided";
                errors.push(FieldError::forbidden(MATCH, text));
            }
        } else {
            if self.version_match.is_some() && self.resource_version.is_empty() {
                errors.push(FieldError::forbidden(
                    MATCH,
                    "resourceVersionMatch is forbidden unless resourceVersion is provided",
                ));
            }
            if self.version_match == Some(Match::Exact) && self.resource_version == "0" {
                let text = "resourceVersionMatch \"exact\" is forbidden for resourceVersion \"0\"";
                errors.push(FieldError::forbidden(MATCH, text));
            }
            if self.send_initial_events.is_some() {
                errors.push(FieldError::forbidden(
                    "sendInitialEvents",
                    "sendInitialEvents is forbidden for list",
                ));
            }
        }
        if self.version_match.is_some() && !self.continue_.is_empty() {
            errors.push(FieldError::forbidden(
                MATCH,
                "resourceVersionMatch is forbidden when continue is provided",
            ));
        }
    }
}

impl WriteOptions {
    /// Reads the query of a create, update or patch; `kind` is the name of its options, `applies` whether it is a server-side apply.
    ///
    /// # Errors
    /// `Invalid` for values that there are not, and for an apply without a field manager.
    pub fn parse(kind: &str, query: &str, applies: bool) -> Result<Self> {
        let query = Query::parse(query)?;
        let mut errors = Vec::new();
        let field_validation = match query.get("fieldValidation").unwrap_or_default() {
            "" | "Warn" => FieldValidation::Warn,
            "Ignore" => FieldValidation::Ignore,
            "Strict" => FieldValidation::Strict,
            other => {
                let known = ["", "Ignore", "Strict", "Warn"];
                errors.push(FieldError::not_supported("fieldValidation", other, &known));
                FieldValidation::Warn
            }
        };
        let options = Self {
            dry_run: query.dry_run(&mut errors),
            field_manager: query.text("fieldManager"),
            field_validation,
            force: query.flag("force"),
        };
        if applies && options.field_manager.is_empty() {
            errors.push(FieldError::required("fieldManager", "is required for apply patch"));
        }
        if !applies && options.force.is_some() {
            errors.push(FieldError::forbidden("force", "may not be specified for non-apply patch"));
        }
        if options.field_manager.len() > FIELD_MANAGER_BYTES_MAX {
            errors.push(FieldError::too_long("fieldManager", FIELD_MANAGER_BYTES_MAX as u64));
        }
        if options.field_manager.chars().any(char::is_control) {
            let text = "it has a character that cannot be printed";
            errors.push(FieldError::invalid("fieldManager", &*options.field_manager, text));
        }
        checked(kind, errors)?;
        Ok(options)
    }
}

/// DeleteOptions as a body has them.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Body {
    dry_run: Vec<String>,
    grace_period_seconds: Option<i64>,
    orphan_dependents: Option<bool>,
    propagation_policy: Option<String>,
    preconditions: Option<Preconditions>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Preconditions {
    uid: Option<String>,
    resource_version: Option<String>,
}

impl DeleteOptions {
    /// Reads the body of a deletion, or where it is empty its query.
    ///
    /// # Errors
    /// `BadRequest` for a body that is no DeleteOptions, `Invalid` for values that there are not.
    pub fn parse(query: &str, body: &[u8]) -> Result<Self> {
        let mut errors = Vec::new();
        let body = if body.is_empty() {
            let query = Query::parse(query)?;
            let grace = query.number("gracePeriodSeconds")?;
            Body {
                dry_run: query
                    .0
                    .iter()
                    .filter(|(name, _)| name == "dryRun")
                    .map(|(_, v)| v.clone())
                    .collect(),
                grace_period_seconds: grace.map(|seconds| i64::try_from(seconds).unwrap_or(i64::MAX)),
                orphan_dependents: query.flag("orphanDependents"),
                propagation_policy: query.get("propagationPolicy").map(str::to_owned),
                preconditions: None,
            }
        } else {
            let parsed = serde_json::from_slice(body);
            parsed.map_err(|e| Status::bad_request(format!("the body is no DeleteOptions: {e}")))?
        };
        if body.orphan_dependents.is_some() && body.propagation_policy.is_some() {
            let policy = body.propagation_policy.as_deref().unwrap_or_default();
            let text = "orphanDependents and deletionPropagation cannot be both set";
            errors.push(FieldError::invalid("propagationPolicy", policy, text));
        }
        let propagation = match (body.propagation_policy.as_deref(), body.orphan_dependents) {
            (Some("Orphan"), _) | (None, Some(true)) => Some(Propagation::Orphan),
            (Some("Background"), _) | (None, Some(false)) => Some(Propagation::Background),
            (Some("Foreground"), _) => Some(Propagation::Foreground),
            (None, None) => None,
            (Some(other), _) => {
                let known = ["Foreground", "Background", "Orphan", "nil"];
                errors.push(FieldError::not_supported("propagationPolicy", other, &known));
                None
            }
        };
        let values: Vec<&str> = body.dry_run.iter().map(String::as_str).collect();
        let dry_run = dry_run(&values, &mut errors);
        checked("DeleteOptions", errors)?;
        let preconditions = body.preconditions.unwrap_or_default();
        Ok(Self {
            dry_run,
            // A negative one means as soon as can be, with time to end.
            grace_period_seconds: body
                .grace_period_seconds
                .map(|seconds| u64::try_from(seconds).unwrap_or(1)),
            propagation,
            uid: preconditions.uid,
            resource_version: preconditions.resource_version,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::Reason;

    #[test]
    fn a_query_says_what_to_list_and_to_watch() {
        let query = "labelSelector=a%3Db%2Cc&fieldSelector=metadata.name%3Dx&limit=500&continue=abc&resourceVersion=7";
        let options = ListOptions::parse(query).unwrap();
        assert_eq!((&*options.label_selector, &*options.field_selector), ("a=b,c", "metadata.name=x"));
        assert_eq!((options.limit, &*options.continue_, &*options.resource_version), (500, "abc", "7"));
        assert!(!options.watches);
        let query = "watch&allowWatchBookmarks=true&timeoutSeconds=9&sendInitialEvents=true&resourceVersionMatch=NotOlderThan";
        let options = ListOptions::parse(query).unwrap();
        assert!(options.watches && options.wants_bookmarks);
        assert_eq!((options.timeout_seconds, options.send_initial_events), (Some(9), Some(true)));
        assert!(!ListOptions::parse("watch=false").unwrap().watches);
        assert!(!ListOptions::parse("watch=0").unwrap().watches);
    }

    #[test]
    fn what_contradicts_itself_is_told_by_its_field() {
        for (query, field, text) in [
            ("resourceVersionMatch=Exact", "resourceVersionMatch", "unless resourceVersion is provided"),
            (
                "resourceVersion=0&resourceVersionMatch=Exact",
                "resourceVersionMatch",
                "is forbidden for resourceVersion",
            ),
            (
                "resourceVersion=1&resourceVersionMatch=Newer",
                "resourceVersionMatch",
                "Unsupported value: \"Newer\"",
            ),
            (
                "continue=a&resourceVersion=1&resourceVersionMatch=Exact",
                "resourceVersionMatch",
                "when continue is provided",
            ),
            ("sendInitialEvents=true", "sendInitialEvents", "is forbidden for list"),
            (
                "watch=1&sendInitialEvents=true",
                "resourceVersionMatch",
                "requires setting resourceVersionMatch",
            ),
            (
                "watch=1&resourceVersion=1&resourceVersionMatch=NotOlderThan",
                "resourceVersionMatch",
                "forbidden for watch",
            ),
        ] {
            let status = ListOptions::parse(query).unwrap_err();
            assert_eq!(status.reason, Reason::Invalid, "{query}");
            let causes = &status.details.causes;
            assert!(
                causes.iter().any(|c| c.field == field && c.message.contains(text)),
                "{query}: {causes:?}"
            );
            assert!(
                status.message.starts_with("ListOptions.meta.k8s.io \"\" is invalid: "),
                "{}",
                status.message
            );
        }
        assert_eq!(ListOptions::parse("limit=many").unwrap_err().reason, Reason::BadRequest);
        let many = "a=b&".repeat(PARAMETERS_MAX + 1);
        assert_eq!(ListOptions::parse(&many).unwrap_err().reason, Reason::BadRequest);
    }

    #[test]
    fn a_write_says_how_it_is_to_be_made() {
        let options =
            WriteOptions::parse("PatchOptions", "fieldManager=me&force=true&dryRun=All", true).unwrap();
        assert_eq!(
            (&*options.field_manager, options.force, options.dry_run),
            ("me", Some(true), DryRun::All)
        );
        let strict = WriteOptions::parse("CreateOptions", "fieldValidation=Strict", false).unwrap();
        assert_eq!(strict.field_validation, FieldValidation::Strict);
        for (query, applies, field) in [
            ("", true, "fieldManager"),
            ("force=true", false, "force"),
            ("dryRun=Some", false, "dryRun"),
            ("fieldValidation=Often", false, "fieldValidation"),
            ("fieldManager=a%0Ab", false, "fieldManager"),
        ] {
            let status = WriteOptions::parse("PatchOptions", query, applies).unwrap_err();
            assert_eq!(status.details.causes[0].field, field, "{query}");
        }
        let long = format!("fieldManager={}", "a".repeat(129));
        assert!(WriteOptions::parse("CreateOptions", &long, false).is_err());
    }

    #[test]
    fn a_deletion_says_what_becomes_of_what_is_owned() {
        let body = br#"{"kind":"DeleteOptions","apiVersion":"v1","propagationPolicy":"Foreground","gracePeriodSeconds":0,
            "preconditions":{"uid":"u","resourceVersion":"5"},"dryRun":["All"]}"#;
        let options = DeleteOptions::parse("propagationPolicy=Orphan", body).unwrap();
        assert_eq!(
            (options.propagation, options.grace_period_seconds),
            (Some(Propagation::Foreground), Some(0))
        );
        assert_eq!((options.uid.as_deref(), options.resource_version.as_deref()), (Some("u"), Some("5")));
        assert_eq!(options.dry_run, DryRun::All);
        let options = DeleteOptions::parse("propagationPolicy=Orphan&gracePeriodSeconds=3", b"").unwrap();
        assert_eq!((options.propagation, options.grace_period_seconds), (Some(Propagation::Orphan), Some(3)));
        assert_eq!(DeleteOptions::parse("", b"{}").unwrap(), DeleteOptions::default());
        assert_eq!(
            DeleteOptions::parse("orphanDependents=false", b"").unwrap().propagation,
            Some(Propagation::Background)
        );
        assert_eq!(DeleteOptions::parse("", b"[").unwrap_err().reason, Reason::BadRequest);
        for bad in [
            &br#"{"propagationPolicy":"Up"}"#[..],
            br#"{"orphanDependents":true,"propagationPolicy":"Orphan"}"#,
        ] {
            assert_eq!(DeleteOptions::parse("", bad).unwrap_err().reason, Reason::Invalid);
        }
    }
}
