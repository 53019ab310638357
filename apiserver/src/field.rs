//! What is wrong with a field, in the words that Kubernetes' clients and people know.

use std::fmt;

use serde_json::Value;

use crate::status::{Cause, Details, Reason, Status};

/// Most errors that one schema or object is told; the rest is not looked for.
pub const ERRORS_COUNT_MAX: usize = 100;

/// Most bytes of a field's name that a path shows: names are as long as the object.
const NAME_BYTES_MAX: usize = 256;

/// Most bytes of a value that an error shows.
const VALUE_BYTES_MAX: usize = 4096;

/// Why a field is refused (`reason` of a cause, and the words before the value).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FieldReason {
    Required,
    Duplicate,
    Invalid,
    NotSupported,
    Forbidden,
    TooLong,
    TooMany,
    TypeInvalid,
    Internal,
}

impl FieldReason {
    /// The machine's word, as in `details.causes`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Required => "FieldValueRequired",
            Self::Duplicate => "FieldValueDuplicate",
            Self::Invalid => "FieldValueInvalid",
            Self::NotSupported => "FieldValueNotSupported",
            Self::Forbidden => "FieldValueForbidden",
            Self::TooLong => "FieldValueTooLong",
            Self::TooMany => "FieldValueTooMany",
            Self::TypeInvalid => "FieldValueTypeInvalid",
            Self::Internal => "InternalError",
        }
    }

    fn words(self) -> &'static str {
        match self {
            Self::Required => "Required value",
            Self::Duplicate => "Duplicate value",
            Self::Invalid | Self::TypeInvalid => "Invalid value",
            Self::NotSupported => "Unsupported value",
            Self::Forbidden => "Forbidden",
            Self::TooLong => "Too long",
            Self::TooMany => "Too many",
            Self::Internal => "Internal error",
        }
    }
}

/// One field that is refused.
#[derive(Clone, Debug, PartialEq)]
pub struct FieldError {
    pub reason: FieldReason,
    /// Such as `spec.containers[0].name`; empty for the object itself.
    pub path: String,
    /// What is there; not shown where it is `None`, nor for reasons that show none.
    pub value: Option<Value>,
    pub detail: String,
}

impl FieldError {
    pub fn new(
        reason: FieldReason,
        path: impl Into<String>,
        value: Option<Value>,
        detail: impl Into<String>,
    ) -> Self {
        Self { reason, path: path.into(), value, detail: detail.into() }
    }

    pub fn invalid(path: impl Into<String>, value: impl Into<Value>, detail: impl Into<String>) -> Self {
        Self::new(FieldReason::Invalid, path, Some(value.into()), detail)
    }

    pub fn required(path: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::new(FieldReason::Required, path, None, detail)
    }

    pub fn forbidden(path: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::new(FieldReason::Forbidden, path, None, detail)
    }

    pub fn duplicate(path: impl Into<String>, value: impl Into<Value>) -> Self {
        Self::new(FieldReason::Duplicate, path, Some(value.into()), "")
    }

    /// A value that is none of those that are known, which are told in the order given.
    pub fn not_supported<S: AsRef<str>>(
        path: impl Into<String>,
        value: impl Into<Value>,
        known: &[S],
    ) -> Self {
        let known = known.iter().map(|known| quote(known.as_ref())).collect::<Vec<_>>().join(", ");
        let detail = if known.is_empty() { String::new() } else { format!("supported values: {known}") };
        Self::new(FieldReason::NotSupported, path, Some(value.into()), detail)
    }

    /// A text of more than `bytes_max` bytes.
    pub fn too_long(path: impl Into<String>, bytes_max: u64) -> Self {
        let unit = if bytes_max == 1 { "byte" } else { "bytes" };
        Self::new(FieldReason::TooLong, path, None, format!("may not be more than {bytes_max} {unit}"))
    }

    /// A list, or a map, of more than `count_max` items.
    pub fn too_many(path: impl Into<String>, count: u64, count_max: u64) -> Self {
        let unit = if count_max == 1 { "item" } else { "items" };
        let detail = format!("must have at most {count_max} {unit}");
        Self::new(FieldReason::TooMany, path, Some(count.into()), detail)
    }

    /// What stands after the path, which is also the message of the cause.
    pub fn body(&self) -> String {
        let mut body = self.reason.words().to_owned();
        if let (Some(value), true) = (&self.value, self.shows_value()) {
            let value = match value {
                Value::String(value) => quote(value),
                value => value.to_string(),
            };
            body.push_str(": ");
            body.push_str(shortened(&value));
        }
        if !self.detail.is_empty() {
            body.push_str(": ");
            body.push_str(&self.detail);
        }
        body
    }

    fn shows_value(&self) -> bool {
        !matches!(
            self.reason,
            FieldReason::Required | FieldReason::Forbidden | FieldReason::TooLong | FieldReason::Internal
        )
    }
}

fn shortened(text: &str) -> &str {
    &text[..text.floor_char_boundary(VALUE_BYTES_MAX)]
}

impl fmt::Display for FieldError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The object itself has no path, and this is how it is written then.
        let path = if self.path.is_empty() { "<nil>" } else { &self.path };
        write!(f, "{path}: {}", self.body())
    }
}

impl std::error::Error for FieldError {}

impl From<&FieldError> for Cause {
    fn from(error: &FieldError) -> Self {
        let field = if error.path.is_empty() { "<nil>".to_owned() } else { error.path.clone() };
        Self { reason: error.reason.as_str().to_owned(), message: error.body(), field }
    }
}

/// A value as an error keeps it: whole if it is short, else as its beginning, or not at all.
pub fn brief(value: &Value) -> Value {
    let mut left = VALUE_BYTES_MAX;
    match value {
        Value::String(text) => shortened(text).into(),
        value if is_short(value, &mut left) => value.clone(),
        _ => "<value omitted>".into(),
    }
}

fn is_short(value: &Value, left: &mut usize) -> bool {
    let size = value.as_str().map_or(0, str::len);
    let Some(rest) = left.checked_sub(size + 1) else { return false };
    *left = rest;
    match value {
        Value::Array(items) => items.iter().all(|item| is_short(item, left)),
        Value::Object(object) => object.iter().all(|(name, value)| {
            let Some(rest) = left.checked_sub(name.len()) else { return false };
            *left = rest;
            is_short(value, left)
        }),
        _ => true,
    }
}

/// A text in quotes, with the escapes that Go's `%q` has and messages of Kubernetes with it.
pub fn quote(text: &str) -> String {
    let mut quoted = String::with_capacity(text.len() + 2);
    quoted.push('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            '\n' => quoted.push_str("\\n"),
            '\r' => quoted.push_str("\\r"),
            '\t' => quoted.push_str("\\t"),
            '\x00'..='\x1f' | '\x7f' => quoted.push_str(&format!("\\x{:02x}", u32::from(c))),
            '\u{80}'..='\u{a0}' | '\u{ad}' => quoted.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

/// The answer to an object with such fields: `Status` 422.
pub fn invalid(group: &str, kind: &str, name: &str, mut errors: Vec<FieldError>) -> Status {
    errors.truncate(ERRORS_COUNT_MAX);
    let mut told: Vec<String> = errors.iter().map(ToString::to_string).collect();
    told.dedup();
    let told = match told.as_slice() {
        [one] => one.clone(),
        more => format!("[{}]", more.join(", ")),
    };
    let qualified = if group.is_empty() { kind.to_owned() } else { format!("{kind}.{group}") };
    let message = format!("{qualified} {} is invalid: {told}", quote(name));
    let causes = errors.iter().map(Cause::from).collect();
    let (name, group, kind) = (name.to_owned(), group.to_owned(), kind.to_owned());
    let details = Details { name, group, kind, causes, ..Details::default() };
    Status { details: Box::new(details), ..Status::new(Reason::Invalid, message) }
}

/// What a path shows of a name.
fn segment(name: &str) -> &str {
    &name[..name.floor_char_boundary(NAME_BYTES_MAX)]
}

/// A field's path, made longer and shorter while an object is walked.
#[derive(Clone, Debug, Default)]
pub struct Path(String);

impl Path {
    pub fn new(path: &str) -> Self {
        Self(path.to_owned())
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The path of a field below, without going there.
    pub fn child(&self, name: &str) -> String {
        let name = segment(name);
        if self.0.is_empty() { name.to_owned() } else { format!("{}.{name}", self.0) }
    }

    /// Goes to a field; what is returned leads back.
    pub fn enter_child(&mut self, name: &str) -> usize {
        let length = self.0.len();
        if length > 0 {
            self.0.push('.');
        }
        self.0.push_str(segment(name));
        length
    }

    /// Goes to a key of a map; what is returned leads back.
    pub fn enter_key(&mut self, key: &str) -> usize {
        let length = self.0.len();
        self.0.push('[');
        self.0.push_str(segment(key));
        self.0.push(']');
        length
    }

    /// Goes to an item of a list; what is returned leads back.
    pub fn enter_index(&mut self, index: usize) -> usize {
        self.enter_key(&index.to_string())
    }

    pub fn leave(&mut self, length: usize) {
        self.0.truncate(length);
    }
}
