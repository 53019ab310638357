//! Label selectors, in the form of a query and in the form of objects.

use std::fmt;

use serde_json::Value;

use super::{SELECTOR_BYTES_MAX, SELECTOR_TERMS_MAX};
use crate::field::quote;
use crate::rules::names;
use crate::status::{Result, Status};

/// Requirements on labels, all of which must hold. The default one selects everything.
///
/// Source: <https://kubernetes.io/docs/concepts/overview/working-with-objects/labels/#label-selectors>.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LabelSelector {
    /// Sorted by key.
    requirements: Vec<Requirement>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Requirement {
    key: String,
    operator: Operator,
    /// Sorted, each once.
    values: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operator {
    Equals,
    DoubleEquals,
    NotEquals,
    In,
    NotIn,
    Exists,
    DoesNotExist,
    GreaterThan,
    LessThan,
}

impl LabelSelector {
    /// Reads the form of a query: `a=b,c!=d,e in (x,y),!f,g notin (z),h>1`. The empty text selects
    /// everything.
    ///
    /// # Errors
    ///
    /// BadRequest with the text of Kubernetes.
    pub fn parse(selector: &str) -> Result<Self> {
        if selector.len() > SELECTOR_BYTES_MAX {
            let message = format!(
                "a label selector of {} bytes: at most {SELECTOR_BYTES_MAX} are read",
                selector.len()
            );
            return Err(Status::bad_request(message));
        }
        let requirements = Parser { tokens: tokens(selector), at: 0 }.parse().map_err(Status::bad_request)?;
        Self::new(requirements)
    }

    /// Reads the form of objects: `matchLabels` and `matchExpressions`. An empty object selects everything.
    /// Where the field is absent, nothing is selected, which is for the caller to see.
    ///
    /// # Errors
    ///
    /// BadRequest with the text of Kubernetes.
    pub fn from_object(selector: &Value) -> Result<Self> {
        let mut requirements = Vec::new();
        if let Some(labels) = selector.get("matchLabels").filter(|labels| !labels.is_null()) {
            let labels = labels
                .as_object()
                .ok_or_else(|| Status::bad_request("matchLabels: Invalid value: an object is expected"))?;
            for (key, value) in labels {
                let value = value.as_str().ok_or_else(|| {
                    Status::bad_request(format!("matchLabels: {key}: a string is expected"))
                })?;
                requirements.push(
                    Requirement::new(key, Operator::Equals, vec![value.to_owned()])
                        .map_err(Status::bad_request)?,
                );
            }
        }
        if let Some(expressions) = selector.get("matchExpressions").filter(|list| !list.is_null()) {
            let list = expressions.as_array();
            let list = list
                .ok_or_else(|| Status::bad_request("matchExpressions: Invalid value: a list is expected"))?;
            for expression in list {
                requirements.push(Requirement::from_expression(expression).map_err(Status::bad_request)?);
            }
        }
        Self::new(requirements)
    }

    fn new(mut requirements: Vec<Requirement>) -> Result<Self> {
        if requirements.len() > SELECTOR_TERMS_MAX {
            let message = format!(
                "a label selector of {} terms: at most {SELECTOR_TERMS_MAX} are read",
                requirements.len()
            );
            return Err(Status::bad_request(message));
        }
        requirements.sort_by(|a, b| a.key.cmp(&b.key));
        Ok(Self { requirements })
    }

    /// Whether no label is looked at.
    pub fn is_everything(&self) -> bool {
        self.requirements.is_empty()
    }

    /// Whether an object is selected whose labels this function looks up.
    pub fn matches<'a>(&self, label: impl Fn(&str) -> Option<&'a str>) -> bool {
        self.requirements.iter().all(|requirement| requirement.matches(label(&requirement.key)))
    }
}

/// The canonical text of the selector, which reads as an equal one.
impl fmt::Display for LabelSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, requirement) in self.requirements.iter().enumerate() {
            let comma = if i > 0 { "," } else { "" };
            write!(f, "{comma}{requirement}")?;
        }
        Ok(())
    }
}

impl Requirement {
    fn new(key: &str, operator: Operator, mut values: Vec<String>) -> Result<Self, String> {
        values.sort_unstable();
        values.dedup();
        let mut errors = Vec::new();
        errors.extend(key_error("key", key));
        let shown = || serde_json::to_string(&values).unwrap_or_default();
        match operator {
            Operator::In | Operator::NotIn if values.is_empty() => {
                errors.push(format!(
                    "values: Invalid value: {}: for 'in', 'notin' operators, values set can't be empty",
                    shown()
                ));
            }
            Operator::Exists | Operator::DoesNotExist if !values.is_empty() => {
                let text = "values set must be empty for exists and does not exist";
                errors.push(format!("values: Invalid value: {}: {text}", shown()));
            }
            Operator::GreaterThan | Operator::LessThan => {
                for (i, value) in values.iter().enumerate().filter(|(_, value)| value.parse::<i64>().is_err())
                {
                    let text = "for 'Gt', 'Lt' operators, the value must be an integer";
                    errors.push(format!("values[{i}]: Invalid value: {}: {text}", quote(value)));
                }
            }
            _ => {}
        }
        for (i, value) in values.iter().enumerate() {
            errors.extend(
                value_error(value)
                    .map(|text| format!("values[{i}][{key}]: Invalid value: {}: {text}", quote(value))),
            );
        }
        match errors.len() {
            0 => Ok(Self { key: key.to_owned(), operator, values }),
            1 => Err(errors.remove(0)),
            _ => Err(format!("[{}]", errors.join(", "))),
        }
    }

    fn from_expression(expression: &Value) -> Result<Self, String> {
        let text = |field: &str| expression.get(field).and_then(Value::as_str).unwrap_or_default();
        let operator = match text("operator") {
            "In" => Operator::In,
            "NotIn" => Operator::NotIn,
            "Exists" => Operator::Exists,
            "DoesNotExist" => Operator::DoesNotExist,
            other => return Err(format!("{} is not a valid label selector operator", quote(other))),
        };
        let values = match expression.get("values") {
            None | Some(Value::Null) => Vec::new(),
            Some(values) => {
                let strings =
                    values.as_array().map(|list| list.iter().map(|value| value.as_str().map(str::to_owned)));
                let strings = strings.and_then(Iterator::collect::<Option<Vec<_>>>);
                strings.ok_or_else(|| {
                    format!("values: Invalid value: {values}: a list of strings is expected")
                })?
            }
        };
        Self::new(text("key"), operator, values)
    }

    fn matches(&self, label: Option<&str>) -> bool {
        let is_one = |label: &str| self.values.binary_search_by(|value| value.as_str().cmp(label)).is_ok();
        match self.operator {
            Operator::Equals | Operator::DoubleEquals | Operator::In => label.is_some_and(is_one),
            Operator::NotEquals | Operator::NotIn => !label.is_some_and(is_one),
            Operator::Exists => label.is_some(),
            Operator::DoesNotExist => label.is_none(),
            Operator::GreaterThan => self.bounds(label).is_some_and(|(label, bound)| label > bound),
            Operator::LessThan => self.bounds(label).is_some_and(|(label, bound)| label < bound),
        }
    }

    /// The label and the bound as numbers.
    fn bounds(&self, label: Option<&str>) -> Option<(i64, i64)> {
        Some((label?.parse().ok()?, self.values.first()?.parse().ok()?))
    }
}

impl fmt::Display for Requirement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { key, operator, values } = self;
        let values = values.join(",");
        match operator {
            Operator::Equals => write!(f, "{key}={values}"),
            Operator::DoubleEquals => write!(f, "{key}=={values}"),
            Operator::NotEquals => write!(f, "{key}!={values}"),
            Operator::In => write!(f, "{key} in ({values})"),
            Operator::NotIn => write!(f, "{key} notin ({values})"),
            Operator::Exists => f.write_str(key),
            Operator::DoesNotExist => write!(f, "!{key}"),
            Operator::GreaterThan => write!(f, "{key}>{values}"),
            Operator::LessThan => write!(f, "{key}<{values}"),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token<'a> {
    /// A key, a value, `in` or `notin`.
    Word(&'a str),
    Symbol(&'a str),
    End,
}

impl<'a> Token<'a> {
    fn text(self) -> &'a str {
        match self {
            Self::Word(text) | Self::Symbol(text) => text,
            Self::End => "",
        }
    }
}

fn tokens(selector: &str) -> Vec<Token<'_>> {
    const SPACES: [char; 4] = [' ', '\t', '\r', '\n'];
    const SYMBOLS: [char; 7] = ['=', '!', '(', ')', ',', '>', '<'];
    let mut tokens = Vec::new();
    let mut rest = selector.trim_start_matches(SPACES);
    while !rest.is_empty() {
        let (token, behind) = if rest.starts_with("==") || rest.starts_with("!=") {
            let (symbol, behind) = rest.split_at(2);
            (Token::Symbol(symbol), behind)
        } else if rest.starts_with(SYMBOLS) {
            let (symbol, behind) = rest.split_at(1);
            (Token::Symbol(symbol), behind)
        } else {
            let end = rest.find(|c| SPACES.contains(&c) || SYMBOLS.contains(&c)).unwrap_or(rest.len());
            let (word, behind) = rest.split_at(end);
            (Token::Word(word), behind)
        };
        tokens.push(token);
        rest = behind.trim_start_matches(SPACES);
    }
    tokens
}

struct Parser<'a> {
    tokens: Vec<Token<'a>>,
    at: usize,
}

impl<'a> Parser<'a> {
    fn peek(&self) -> Token<'a> {
        self.tokens.get(self.at).copied().unwrap_or(Token::End)
    }

    fn next(&mut self) -> Token<'a> {
        let token = self.peek();
        self.at += 1;
        token
    }

    fn parse(mut self) -> Result<Vec<Requirement>, String> {
        let mut requirements = Vec::new();
        loop {
            match self.peek() {
                Token::Word(_) | Token::Symbol("!") => {
                    let requirement = self
                        .requirement()
                        .map_err(|error| format!("unable to parse requirement: {error}"))?;
                    requirements.push(requirement);
                }
                Token::End => return Ok(requirements),
                Token::Symbol(other) => {
                    return Err(format!("found '{other}', expected: !, identifier, or 'end of string'"));
                }
            }
            match (self.next(), self.peek()) {
                (Token::End, _) => return Ok(requirements),
                (Token::Symbol(","), Token::Word(_) | Token::Symbol("!")) => {}
                (Token::Symbol(","), other) => {
                    return Err(format!("found '{}', expected: identifier after ','", other.text()));
                }
                (other, _) => {
                    return Err(format!("found '{}', expected: ',' or 'end of string'", other.text()));
                }
            }
        }
    }

    fn requirement(&mut self) -> Result<Requirement, String> {
        let is_negated = self.peek() == Token::Symbol("!");
        if is_negated {
            self.next();
        }
        let key = match self.next() {
            Token::Word(key) => key,
            other => return Err(format!("found '{}', expected: identifier", other.text())),
        };
        if let Some(error) = key_error("<nil>", key) {
            return Err(error);
        }
        if is_negated {
            return Requirement::new(key, Operator::DoesNotExist, Vec::new());
        }
        if matches!(self.peek(), Token::End | Token::Symbol(",")) {
            return Requirement::new(key, Operator::Exists, Vec::new());
        }
        let operator = match self.next() {
            Token::Word("in") => Operator::In,
            Token::Word("notin") => Operator::NotIn,
            Token::Symbol("=") => Operator::Equals,
            Token::Symbol("==") => Operator::DoubleEquals,
            Token::Symbol("!=") => Operator::NotEquals,
            Token::Symbol(">") => Operator::GreaterThan,
            Token::Symbol("<") => Operator::LessThan,
            other => return Err(format!("found '{}', expected: in, notin, =, ==, !=, gt, lt", other.text())),
        };
        let values = match operator {
            Operator::In | Operator::NotIn => self.values()?,
            _ => vec![self.value()?],
        };
        Requirement::new(key, operator, values)
    }

    fn value(&mut self) -> Result<String, String> {
        if matches!(self.peek(), Token::End | Token::Symbol(",")) {
            return Ok(String::new());
        }
        match self.next() {
            Token::Word(value) => Ok(value.to_owned()),
            other => Err(format!("found '{}', expected: identifier", other.text())),
        }
    }

    /// `(a,b)`, where any of them may be empty.
    fn values(&mut self) -> Result<Vec<String>, String> {
        match self.next() {
            Token::Symbol("(") => {}
            other => return Err(format!("found '{}' expected: '('", other.text())),
        }
        if !matches!(self.peek(), Token::Word(_) | Token::Symbol("," | ")")) {
            return Err(format!("found '{}', expected: ',', ')' or identifier", self.peek().text()));
        }
        let mut values = Vec::new();
        loop {
            match self.peek() {
                Token::Word(value) => {
                    self.next();
                    values.push(value.to_owned());
                }
                Token::Symbol("," | ")") => values.push(String::new()),
                other => return Err(format!("found '{}', expected: ',', or identifier", other.text())),
            }
            match self.next() {
                Token::Symbol(",") => {}
                Token::Symbol(")") => return Ok(values),
                other => return Err(format!("found '{}', expected: ',' or ')'", other.text())),
            }
        }
    }
}

fn key_error(field: &str, key: &str) -> Option<String> {
    let errors = names::label_key(key);
    (!errors.is_empty()).then(|| format!("{field}: Invalid value: {}: {}", quote(key), errors.join("; ")))
}

fn value_error(value: &str) -> Option<String> {
    let errors = names::label_value(value);
    (!errors.is_empty()).then(|| errors.join("; "))
}
