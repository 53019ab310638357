//! JSONPath as Kubernetes reads it in the columns of CustomResourceDefinitions.
//!
//! `.spec.a`, `.metadata.annotations['x\.y/z']`, `[0]`, `[-1]`, `[1:3]`, `[*]`, `[0,2]`, `.*`, `..name` and
//! `.status.conditions[?(@.type=="Ready")].status`. A path is compiled once; how much one evaluation visits
//! is bounded, and one that fails or visits more has no result, as a path that leads nowhere.
//!
//! Source: <https://kubernetes.io/docs/reference/kubectl/jsonpath/>.

use std::cmp::Ordering;

use serde_json::Value;

use crate::object::Object;

/// The longest path that is compiled.
pub const JSONPATH_BYTES_MAX: usize = 4096;
/// The most values that one evaluation visits, or that of all columns of one row.
pub(super) const VISITS_MAX: usize = 20_000;
/// How deep paths within paths are compiled.
const DEPTH_MAX: usize = 8;
/// How deep `..` goes down; deeper JSON is not read from clients.
const DESCENT_MAX: usize = 256;

/// A compiled path.
#[derive(Clone, Debug, PartialEq)]
pub struct JsonPath {
    steps: Vec<Step>,
}

#[derive(Clone, Debug, PartialEq)]
enum Step {
    Field(String),
    /// All values of an object or a list.
    Wildcard,
    /// Everything below.
    Descent,
    Slice(Slice),
    Union(Vec<JsonPath>),
    Filter(Box<Filter>),
    /// A constant in a filter.
    Constant(Value),
    /// What compiles and fails whenever it is evaluated.
    Failure,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Slice {
    from: Option<i64>,
    to: To,
    step: Option<i64>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum To {
    End,
    Before(i64),
    /// One item.
    One,
}

#[derive(Clone, Debug, PartialEq)]
struct Filter {
    left: JsonPath,
    /// `None`: the left side exists.
    comparison: Option<(Comparison, JsonPath)>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Comparison {
    Less,
    LessOrEqual,
    Equal,
    NotEqual,
    GreaterOrEqual,
    Greater,
}

/// Why an evaluation has no result. The columns of a table do not tell which it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Failed;

impl JsonPath {
    /// Compiles a path.
    ///
    /// # Errors
    ///
    /// What cannot be read of it.
    pub fn compile(path: &str) -> Result<Self, String> {
        if path.len() > JSONPATH_BYTES_MAX {
            return Err(format!("a path of {} bytes: at most {JSONPATH_BYTES_MAX} are read", path.len()));
        }
        compile(path, 0)
    }

    /// The values that the path leads to, in order; none if it leads nowhere or its evaluation fails.
    pub fn evaluate<'a>(&'a self, value: &'a Value) -> Vec<&'a Value> {
        let mut visits = VISITS_MAX;
        walk(&self.steps, vec![value], &mut visits).unwrap_or_default()
    }
}

impl JsonPath {
    /// Whether the path begins with a field, as nearly all do: it is walked without the object being wrapped
    /// in a value.
    pub(super) fn begins_with_field(&self) -> bool {
        matches!(self.steps.first(), Some(Step::Field(_)))
    }

    /// As `evaluate`, within what is left of `visits`, which all columns of a row share. `whole` is the
    /// object as a value, for paths that do not begin with a field.
    pub(super) fn evaluate_in<'a>(
        &'a self,
        object: &'a Object,
        whole: Option<&'a Value>,
        visits: &mut usize,
    ) -> Values<'a> {
        let found = match (self.steps.split_first(), whole) {
            (Some((Step::Field(name), rest)), _) => {
                walk(rest, object.get(name).into_iter().collect(), visits)
            }
            (_, Some(whole)) => walk(&self.steps, vec![whole], visits),
            (_, None) => Err(Failed),
        };
        found.unwrap_or_default()
    }
}

/// Takes `count` off what may still be visited.
fn visit(visits: &mut usize, count: usize) -> Result<(), Failed> {
    let left = visits.checked_sub(count);
    *visits = left.unwrap_or(0);
    left.map(drop).ok_or(Failed)
}

fn compile(path: &str, depth: usize) -> Result<JsonPath, String> {
    if depth > DEPTH_MAX {
        return Err(format!("paths within paths deeper than {DEPTH_MAX}"));
    }
    let mut steps = Vec::new();
    let mut rest = path;
    while let Some(first) = rest.chars().next() {
        if let Some(behind) = rest.strip_prefix("[?(") {
            let (step, behind) = compile_filter(behind, depth)?;
            steps.push(step);
            rest = behind;
        } else if let Some(behind) = rest.strip_prefix("..") {
            if steps.last() == Some(&Step::Descent) {
                return Err("invalid multiple recursive descent".to_owned());
            }
            steps.push(Step::Descent);
            rest = behind;
            if behind.starts_with(|c: char| c == '_' || c.is_alphanumeric()) {
                let (field, behind) = compile_field(behind);
                steps.push(field);
                rest = behind;
            }
        } else {
            let behind = &rest[first.len_utf8()..];
            rest = match first {
                ' ' | '@' | '$' => behind,
                '[' => {
                    let (inside, behind) = behind.split_once(']').ok_or("unterminated array")?;
                    compile_brackets(inside, depth, &mut steps)?;
                    behind
                }
                '"' | '\'' => {
                    let (text, behind) = unquote(behind, first)?;
                    steps.push(Step::Constant(Value::String(text)));
                    behind
                }
                '.' => {
                    let (field, behind) = compile_field(behind);
                    steps.push(field);
                    behind
                }
                '+' | '-' => {
                    let end = behind
                        .find(|c: char| c != '.' && !c.is_ascii_digit())
                        .map_or(rest.len(), |end| end + 1);
                    steps.push(Step::Constant(number(&rest[..end])?));
                    &rest[end..]
                }
                '0'..='9' => {
                    let end = rest.find(|c: char| c != '.' && !c.is_ascii_digit()).unwrap_or(rest.len());
                    steps.push(Step::Constant(number(&rest[..end])?));
                    &rest[end..]
                }
                c if c == '_' || c.is_alphanumeric() => {
                    let end = rest.find(is_terminator).unwrap_or(rest.len());
                    steps.push(match &rest[..end] {
                        "true" => Step::Constant(Value::Bool(true)),
                        "false" => Step::Constant(Value::Bool(false)),
                        _ => Step::Failure,
                    });
                    &rest[end..]
                }
                '\r' | '\n' => return Err("unclosed action".to_owned()),
                c => return Err(format!("unrecognized character in action: {c:?}")),
            };
        }
    }
    Ok(JsonPath { steps })
}

/// What ends the name of a field.
fn is_terminator(c: char) -> bool {
    matches!(c, ' ' | '\t' | '\r' | '\n' | '.' | ',' | '[' | ']' | '$' | '@' | '{' | '}')
}

/// The name of a field; a `\` takes what comes behind it as it is.
fn compile_field(text: &str) -> (Step, &str) {
    let (mut end, mut is_escaped) = (text.len(), false);
    for (i, c) in text.char_indices() {
        match c {
            _ if is_escaped => is_escaped = false,
            '\\' => is_escaped = true,
            c if is_terminator(c) => {
                end = i;
                break;
            }
            _ => {}
        }
    }
    let (name, behind) = text.split_at(end);
    let step = if name == "*" { Step::Wildcard } else { Step::Field(name.replace('\\', "")) };
    (step, behind)
}

fn compile_brackets(inside: &str, depth: usize, steps: &mut Vec<Step>) -> Result<(), String> {
    if inside.contains('\n') {
        return Err("unterminated array".to_owned());
    }
    if inside.contains(',') {
        let parts =
            inside.split(',').map(|part| compile(&format!("[{}]", part.trim_matches(' ')), depth + 1));
        steps.push(Step::Union(parts.collect::<Result<_, _>>()?));
        return Ok(());
    }
    let quoted = inside.strip_prefix('\'').and_then(|name| name.strip_suffix('\''));
    if let Some(name) = quoted.filter(|name| !name.contains('\'')) {
        steps.extend(compile(&format!(".{name}"), depth + 1)?.steps);
        return Ok(());
    }
    let inside = if inside == "*" { ":" } else { inside };
    let mut parts = inside.splitn(3, ':');
    let index = |part: Option<&str>| match part {
        None | Some("") => Ok(None),
        Some(part) if part.strip_prefix('-').unwrap_or(part).bytes().all(|c| c.is_ascii_digit()) => {
            part.parse::<i64>().map(Some).map_err(|_| format!("array index {part} is not a number"))
        }
        Some(_) => Err(format!("invalid array index {inside}")),
    };
    let (from, to, step) = (parts.next(), parts.next(), parts.next());
    let to_index = index(to)?;
    let to = match (to, to_index) {
        (None, _) => To::One,
        (Some(_), None) => To::End,
        (Some(_), Some(to)) => To::Before(to),
    };
    steps.push(Step::Slice(Slice { from: index(from)?, to, step: index(step)? }));
    Ok(())
}

/// What is behind `[?(`: the filter, and what is behind its `)]`.
fn compile_filter(text: &str, depth: usize) -> Result<(Step, &str), String> {
    let (mut quote, mut is_closed, mut before, mut end) = (None, false, '(', None);
    for (i, c) in text.char_indices() {
        match c {
            '\n' => break,
            '"' | '\'' if quote.is_none() => quote = Some(c),
            c if Some(c) == quote && before != '\\' => is_closed = true,
            ')' if quote.is_some() == is_closed => {
                end = Some(i);
                break;
            }
            _ => {}
        }
        before = c;
    }
    let (inside, behind) = text.split_at(end.ok_or("unterminated filter")?);
    let behind = behind.strip_prefix(")]").ok_or("unclosed array expect ]")?;
    let is_operator = |c: char| "!<>=".contains(c);
    let filter = match inside.find(is_operator) {
        Some(start) if start > 0 => {
            let (left, rest) = inside.split_at(start);
            let (operator, right) = rest.split_at(rest.find(|c| !is_operator(c)).unwrap_or(rest.len()));
            let comparison = match operator {
                "<" => Some(Comparison::Less),
                "<=" => Some(Comparison::LessOrEqual),
                "==" => Some(Comparison::Equal),
                "!=" => Some(Comparison::NotEqual),
                ">=" => Some(Comparison::GreaterOrEqual),
                ">" => Some(Comparison::Greater),
                _ => None,
            };
            let (left, right) = (compile(left, depth + 1)?, compile(right, depth + 1)?);
            match comparison {
                Some(comparison) => Filter { left, comparison: Some((comparison, right)) },
                None => return Ok((Step::Failure, behind)),
            }
        }
        _ => Filter { left: compile(inside, depth + 1)?, comparison: None },
    };
    Ok((Step::Filter(Box::new(filter)), behind))
}

/// The text up to the closing quote, and what is behind that.
fn unquote(text: &str, quote: char) -> Result<(String, &str), String> {
    let mut unquoted = String::new();
    let mut chars = text.char_indices();
    while let Some((i, c)) = chars.next() {
        match c {
            '\n' => break,
            '\\' => unquoted.push(match chars.next().map(|(_, c)| c) {
                Some(c @ ('\\' | '"' | '\'')) => c,
                Some('n') => '\n',
                Some('r') => '\r',
                Some('t') => '\t',
                _ => return Err(format!("unquote string {quote}{text} error invalid syntax")),
            }),
            c if c == quote => return Ok((unquoted, &text[i + 1..])),
            c => unquoted.push(c),
        }
    }
    Err("unterminated quoted string".to_owned())
}

fn number(text: &str) -> Result<Value, String> {
    if let Ok(whole) = text.parse::<i64>() {
        return Ok(Value::from(whole));
    }
    text.parse::<f64>().map(Value::from).map_err(|_| format!("cannot parse number {text}"))
}

type Values<'a> = Vec<&'a Value>;

fn walk<'a>(steps: &'a [Step], mut values: Values<'a>, visits: &mut usize) -> Result<Values<'a>, Failed> {
    for step in steps {
        visit(visits, values.len())?;
        values = apply(step, values, visits)?;
    }
    Ok(values)
}

fn apply<'a>(step: &'a Step, values: Values<'a>, visits: &mut usize) -> Result<Values<'a>, Failed> {
    let mut found = Vec::new();
    match step {
        Step::Failure => return Err(Failed),
        Step::Constant(value) => {
            // A text stands alone, a number once for each value: filters compare one with one.
            let count = if value.is_string() { 1 } else { values.len() };
            found.extend(std::iter::repeat_n(value, count));
        }
        Step::Field(name) => {
            found.extend(values.into_iter().filter_map(|value| value.as_object()?.get(name)));
        }
        Step::Wildcard => {
            for value in values {
                children(value, &mut found, visits)?;
            }
        }
        Step::Descent => {
            for value in values {
                descend(value, &mut found, visits, 0)?;
            }
        }
        Step::Slice(slice) => {
            for value in values {
                match value {
                    Value::Array(items) => {
                        // As in Kubernetes, an empty part of one list ends the walk through all of them.
                        if !slice.of(items, &mut found, visits)? {
                            break;
                        }
                    }
                    Value::Null => {}
                    _ => return Err(Failed),
                }
            }
        }
        Step::Union(paths) => {
            for path in paths {
                found.extend(walk(&path.steps, values.clone(), visits)?);
            }
        }
        Step::Filter(filter) => {
            for value in values {
                let Value::Array(items) = value else { return Err(Failed) };
                for item in items {
                    visit(visits, 1)?;
                    if filter.holds(item, visits)? {
                        found.push(item);
                    }
                }
            }
        }
    }
    Ok(found)
}

fn children<'a>(value: &'a Value, found: &mut Values<'a>, visits: &mut usize) -> Result<(), Failed> {
    let count = match value {
        Value::Array(items) => items.len(),
        Value::Object(object) => object.len(),
        _ => 0,
    };
    visit(visits, count)?;
    match value {
        Value::Array(items) => found.extend(items),
        Value::Object(object) => found.extend(object.values()),
        _ => {}
    }
    Ok(())
}

/// The value, if anything is below it, and what is below it.
fn descend<'a>(
    value: &'a Value,
    found: &mut Values<'a>,
    visits: &mut usize,
    depth: usize,
) -> Result<(), Failed> {
    let mut below = Vec::new();
    children(value, &mut below, visits)?;
    // To Kubernetes the bytes of a string are below it.
    if below.is_empty() && value.as_str().is_none_or(str::is_empty) {
        return Ok(());
    }
    if depth == DESCENT_MAX {
        return Err(Failed);
    }
    found.push(value);
    for child in below {
        descend(child, found, visits, depth + 1)?;
    }
    Ok(())
}

impl Slice {
    /// Adds the items of the slice; false if it is empty by its bounds.
    fn of<'a>(&self, items: &'a [Value], found: &mut Values<'a>, visits: &mut usize) -> Result<bool, Failed> {
        let len = i64::try_from(items.len()).map_err(|_| Failed)?;
        let from_end = |index: i64| if index < 0 { index.saturating_add(len) } else { index };
        let from = from_end(self.from.unwrap_or(0));
        let to = match self.to {
            To::End => len,
            To::Before(to) => from_end(to),
            To::One => from.saturating_add(1),
        };
        if from == to {
            return Ok(false);
        }
        let range = usize::try_from(from).ok().zip(usize::try_from(to).ok()).filter(|_| from < len);
        let items = range.and_then(|(from, to)| items.get(from..to)).ok_or(Failed)?;
        let step = usize::try_from(self.step.unwrap_or(1)).ok().filter(|step| *step > 0).ok_or(Failed)?;
        visit(visits, items.len() / step)?;
        found.extend(items.iter().step_by(step));
        Ok(true)
    }
}

impl Filter {
    fn holds(&self, item: &Value, visits: &mut usize) -> Result<bool, Failed> {
        let Some((comparison, right)) = &self.comparison else {
            return Ok(walk(&self.left.steps, vec![item], visits).is_ok_and(|found| !found.is_empty()));
        };
        let left = walk(&self.left.steps, vec![item], visits)?;
        let right = match left.len() {
            0 => return Ok(false),
            1 => walk(&right.steps, vec![item], visits)?,
            _ => return Err(Failed),
        };
        match (left.as_slice(), right.as_slice()) {
            (_, []) => Ok(false),
            ([left], [right]) => comparison.holds(left, right),
            _ => Err(Failed),
        }
    }
}

impl Comparison {
    /// Compares what is of one type; whole numbers and others are two types.
    fn holds(self, left: &Value, right: &Value) -> Result<bool, Failed> {
        let order = match (left, right) {
            (Value::String(left), Value::String(right)) => Some(left.cmp(right)),
            (Value::Bool(left), Value::Bool(right)) if matches!(self, Self::Equal | Self::NotEqual) => {
                Some(left.cmp(right))
            }
            (Value::Number(left), Value::Number(right)) => match (left.as_i64(), right.as_i64()) {
                (Some(left), Some(right)) => Some(left.cmp(&right)),
                (None, None) => {
                    left.as_f64().zip(right.as_f64()).and_then(|(left, right)| left.partial_cmp(&right))
                }
                _ => None,
            },
            _ => None,
        };
        let order = order.ok_or(Failed)?;
        Ok(match self {
            Self::Less => order == Ordering::Less,
            Self::LessOrEqual => order != Ordering::Greater,
            Self::Equal => order == Ordering::Equal,
            Self::NotEqual => order != Ordering::Equal,
            Self::GreaterOrEqual => order != Ordering::Less,
            Self::Greater => order == Ordering::Greater,
        })
    }
}

#[cfg(test)]
mod tests;
