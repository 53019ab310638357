//! Rules in CEL (`x-kubernetes-validations`): compiled with the schema, evaluated with the object.
//!
//! What of a hostile rule or object is bounded, and by what:
//!
//! | | |
//! | --- | --- |
//! | length and depth of an expression | refused when it is compiled, on a stack of its own |
//! | steps and copies of one call | [`CALL_COST_MAX`], counted by calls that are woven into the expression ([`meter`](super::meter)) |
//! | all calls for an object | [`OBJECT_COST_MAX`] |
//! | a fault of the interpreter | caught, and told as an error of the rule |

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use kube_cel::cel::{
    Context, ExecutionError, Value as Cel,
    objects::OptionalValue,
    parser::{Expression, ParseError, ParseErrors, Parser},
};
use serde_json::{Value, json};

use super::{
    Node, Type,
    convert::{aligned, to_cel},
    meter::{self, Budget},
    types,
};
use crate::field::{ERRORS_COUNT_MAX, FieldError, FieldReason, brief};

/// Most that one call of a rule costs.
pub const CALL_COST_MAX: u64 = 1_000_000;
/// Most that all rules of an object cost.
pub const OBJECT_COST_MAX: u64 = 10_000_000;
/// Most bytes of an expression.
const EXPRESSION_BYTES_MAX: usize = 16 << 10;
/// Most bytes of a message that an expression makes.
const MESSAGE_BYTES_MAX: usize = 5 << 10;
/// Deepest nesting of brackets in an expression.
const BRACKETS_DEPTH_MAX: usize = 64;
/// Most syntax errors that one expression is told, and most bytes of a line that is shown with one.
const SYNTAX_ERRORS_COUNT_MAX: usize = 3;
const SYNTAX_LINE_BYTES_MAX: usize = 500;
/// Stack of the thread that compiles: an expression is as deep as it is long.
const COMPILE_STACK_BYTES: usize = 256 << 20;

const OUT_OF_BUDGET: &str =
    "validation failed due to running out of cost budget, no further validation rules will be run";
const COSTLY_MESSAGE: &str =
    "no further validation rules will be run due to call cost exceeds limit for messageExpression";

/// A rule of a schema.
#[derive(Clone, Debug)]
pub struct Rule {
    /// The expression, as written.
    pub text: String,
    pub message: Option<String>,
    pub reason: FieldReason,
    /// Path below the value that failures are told of.
    pub field_path: Option<String>,
    pub uses_old_self: bool,
    pub is_old_self_optional: bool,
    program: Arc<Expression>,
    message_program: Option<Arc<Expression>>,
}

/// What is written of a rule, checked but for its expressions.
#[derive(Clone, Debug, Default)]
pub struct Source {
    pub rule: String,
    pub message: String,
    pub message_expression: String,
    pub reason: Option<FieldReason>,
    pub field_path: Option<String>,
    pub optional_old_self: Option<bool>,
}

impl Source {
    /// What an error shows of it.
    pub fn value(&self) -> Value {
        json!({
            "Rule": self.rule,
            "Message": self.message,
            "MessageExpression": self.message_expression,
            "Reason": self.reason.map(FieldReason::as_str),
            "FieldPath": self.field_path.as_deref().unwrap_or_default(),
            "OptionalOldSelf": self.optional_old_self,
        })
    }

    /// Compiles the rule of a value of this schema.
    ///
    /// # Errors
    ///
    /// Which expression does not compile (`rule` or `messageExpression`), and why.
    pub fn compile(&self, node: &Node) -> Result<Rule, (&'static str, String)> {
        let is_optional = self.optional_old_self == Some(true);
        let program = parse(&self.rule)
            .and_then(|expression| types::check_rule(&expression, node, is_optional).map(|()| expression))
            .map_err(|error| ("rule", compile_error("compilation failed: ", error)))?;
        let uses_old_self = program.references().has_variable("oldSelf");
        let program =
            meter::metered(program).map_err(|error| ("rule", format!("compilation failed: {error}")))?;
        let message_program = match self.message_expression.trim() {
            "" => None,
            text => {
                let program = parse(text)
                    .and_then(|program| types::check_message(&program, node, is_optional).map(|()| program))
                    .map_err(|error| {
                        ("messageExpression", compile_error("messageExpression compilation failed: ", error))
                    })?;
                let program = meter::metered(program).map_err(|error| {
                    ("messageExpression", format!("messageExpression compilation failed: {error}"))
                })?;
                Some(Arc::new(program))
            }
        };
        let message = self.message.trim();
        Ok(Rule {
            text: self.rule.trim().to_owned(),
            message: (!message.is_empty()).then(|| message.to_owned()),
            reason: self.reason.unwrap_or(FieldReason::Invalid),
            field_path: self.field_path.clone(),
            uses_old_self,
            is_old_self_optional: is_optional,
            program: Arc::new(program),
            message_program,
        })
    }
}

/// The real text has the prefix for what does not compile, and none for what has the wrong type.
fn compile_error(prefix: &str, error: String) -> String {
    if error.contains("must evaluate to a") { error } else { format!("{prefix}{error}") }
}

fn parse(text: &str) -> Result<Expression, String> {
    let text = text.trim();
    if text.len() > EXPRESSION_BYTES_MAX {
        return Err(format!(
            "ERROR: an expression has at most {EXPRESSION_BYTES_MAX} bytes, and this has {}",
            text.len()
        ));
    }
    if nesting(text) > BRACKETS_DEPTH_MAX {
        return Err(format!("ERROR: brackets are nested at most {BRACKETS_DEPTH_MAX} deep"));
    }
    let parsed =
        catch_unwind(AssertUnwindSafe(|| Parser::default().enable_optional_syntax(true).parse(text)));
    match parsed {
        Ok(parsed) => parsed.map_err(|errors| syntax_errors(text, &errors)),
        Err(_) => Err("ERROR: the expression cannot be read".to_owned()),
    }
}

/// How deep brackets are within each other; those in texts count, too.
fn nesting(text: &str) -> usize {
    let (mut depth, mut deepest) = (0usize, 0);
    for byte in text.bytes() {
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        deepest = deepest.max(depth);
    }
    deepest
}

/// The first errors, each with its line if that is short.
fn syntax_errors(text: &str, errors: &ParseErrors) -> String {
    let text_of = |error: &ParseError| {
        let (line, column) = error.pos;
        let mut output = format!("ERROR: <input>:{line}:{column}: ");
        output.extend(error.msg.chars().take(SYNTAX_LINE_BYTES_MAX));
        let line = usize::try_from(line.saturating_sub(1)).ok().and_then(|line| text.lines().nth(line));
        if let Some(line) = line.filter(|line| line.len() <= SYNTAX_LINE_BYTES_MAX) {
            let before = usize::try_from(column.saturating_sub(1)).unwrap_or_default().min(line.len());
            output.push_str(&format!("\n | {line}\n | {}^", ".".repeat(before)));
        }
        output
    };
    errors.errors.iter().take(SYNTAX_ERRORS_COUNT_MAX).map(text_of).collect::<Vec<_>>().join("\n")
}

/// Runs what compiles expressions on a stack that they do not exceed.
pub fn on_deep_stack<T: Send>(work: impl FnOnce() -> T + Send) -> std::io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("cel".to_owned())
            .stack_size(COMPILE_STACK_BYTES)
            .spawn_scoped(scope, work)?;
        thread.join().map_err(|_| std::io::Error::other("the thread that compiles ended with a fault"))
    })
}

/// The evaluation of all rules of one object.
pub struct Evaluation {
    context: Context<'static>,
    budget: Arc<Budget>,
    left: u64,
    /// Whether the budget is spent: nothing more is evaluated.
    pub is_over: bool,
    pub errors: Vec<FieldError>,
}

impl Evaluation {
    pub fn new() -> Self {
        let budget = Arc::new(Budget::default());
        Self {
            context: meter::context(&budget),
            budget,
            left: OBJECT_COST_MAX,
            is_over: false,
            errors: Vec::new(),
        }
    }

    /// Evaluates the rules of a value. What fails is not told where `is_ratcheted`: nothing has changed there.
    pub fn rules(&mut self, node: &Node, path: &str, new: &Value, old: Option<&Value>, is_ratcheted: bool) {
        if self.is_over || node.rules.is_empty() || new.is_null() {
            return;
        }
        let Self { context, budget, left, is_over, errors } = self;
        let old = old.filter(|old| !old.is_null());
        let kind = type_name(node);
        let uses_old_self = node.rules.iter().any(|rule| rule.uses_old_self);
        budget.refill(*left);
        let mut scope = context.new_inner_scope();
        scope.add_variable_from_value("self", to_cel(new, Some(node), budget));
        let old_value =
            old.filter(|_| uses_old_self).map(|old| to_cel(&aligned(old, new, node), Some(node), budget));
        *left = left.saturating_sub(budget.spent());
        for rule in &node.rules {
            if rule.uses_old_self && old.is_none() && !rule.is_old_self_optional {
                continue;
            }
            if *left == 0 || errors.len() >= ERRORS_COUNT_MAX {
                if *left == 0 {
                    errors.push(FieldError::invalid(path, kind, OUT_OF_BUDGET));
                }
                *is_over = true;
                return;
            }
            let mut scope = scope.new_inner_scope();
            if rule.is_old_self_optional {
                let old = old_value.clone().map_or_else(OptionalValue::none, OptionalValue::of);
                scope.add_variable_from_value("oldSelf", Cel::Opaque(Arc::new(old)));
            } else if let (true, Some(old)) = (rule.uses_old_self, &old_value) {
                scope.add_variable_from_value("oldSelf", old.clone());
            }
            let shown = rule.message.as_deref().unwrap_or(&rule.text);
            let is_last = *left < CALL_COST_MAX;
            let (result, is_spent) = call(budget, left, &scope, &rule.program);
            if is_spent {
                let detail = if is_last { OUT_OF_BUDGET.to_owned() } else { costly(shown) };
                errors.push(FieldError::invalid(path, kind, detail));
                *is_over = true;
                return;
            }
            match result {
                Ok(Cel::Bool(true)) => {}
                Ok(Cel::Bool(false)) => {
                    let made =
                        rule.message_program.as_ref().map(|program| call(budget, left, &scope, program));
                    let made = match made {
                        Some((_, true)) => {
                            errors.push(FieldError::invalid(path, kind, COSTLY_MESSAGE));
                            *is_over = true;
                            return;
                        }
                        Some((result, false)) => message(result),
                        None => None,
                    };
                    let detail = made
                        .or_else(|| rule.message.clone())
                        .unwrap_or_else(|| format!("failed rule: {shown}"));
                    if rule.uses_old_self || !is_ratcheted {
                        errors.push(failure(rule, path, node, new, detail));
                    }
                }
                Ok(_) => errors.push(FieldError::invalid(path, kind, no_overload(shown))),
                Err(error) => {
                    let detail = match error_text(&error) {
                        None => no_overload(shown),
                        Some(error) => format!("{error} evaluating rule: {shown}"),
                    };
                    errors.push(FieldError::invalid(path, kind, detail));
                }
            }
        }
    }
}

/// Evaluates an expression; the second is whether its budget was spent.
fn call(
    budget: &Budget,
    left: &mut u64,
    scope: &Context<'_>,
    program: &Expression,
) -> (Result<Cel, ExecutionError>, bool) {
    budget.refill(CALL_COST_MAX.min(*left));
    let result = catch_unwind(AssertUnwindSafe(|| scope.resolve(program)))
        .unwrap_or_else(|_| Err(ExecutionError::function_error("rule", "internal error")));
    *left = left.saturating_sub(budget.spent());
    (result, budget.is_exhausted())
}

fn failure(rule: &Rule, path: &str, node: &Node, new: &Value, detail: String) -> FieldError {
    let path = match &rule.field_path {
        None => path.to_owned(),
        Some(below) if path.is_empty() => below.clone(),
        Some(below) => format!("{path}.{below}"),
    };
    let value = (!matches!(node.r#type, Type::Object | Type::Array)).then(|| brief(new));
    match rule.reason {
        FieldReason::Required | FieldReason::Forbidden => FieldError::new(rule.reason, path, None, detail),
        FieldReason::Duplicate => FieldError::new(rule.reason, path, value, ""),
        _ => FieldError::new(FieldReason::Invalid, path, value, detail),
    }
}

/// What an expression made, if it is a message that can be told.
fn message(result: Result<Cel, ExecutionError>) -> Option<String> {
    let Ok(Cel::String(message)) = result else { return None };
    let message = message.trim();
    let is_told = !message.is_empty() && message.len() <= MESSAGE_BYTES_MAX && !message.contains('\n');
    is_told.then(|| message.to_owned())
}

fn costly(shown: &str) -> String {
    format!(
        "'operation cancelled: actual cost limit exceeded': \
         no further validation rules will be run due to call cost exceeds limit for rule: {shown}"
    )
}

/// `shown` is the rule, or its message.
fn no_overload(shown: &str) -> String {
    format!(
        "'no such overload': call arguments did not match a supported operator, \
         function or macro signature for rule: {shown}"
    )
}

/// The name of a type, as errors show it.
pub fn type_name(node: &Node) -> &'static str {
    match node.r#type {
        Type::Object => "object",
        Type::Array => "array",
        Type::String => "string",
        Type::Integer => "integer",
        Type::Number => "number",
        Type::Boolean => "boolean",
        Type::IntOrString | Type::Any => "",
    }
}

/// In the words of the usual interpreter; `None` for what has no operator or function of its types.
fn error_text(error: &ExecutionError) -> Option<String> {
    Some(match error {
        ExecutionError::NoSuchKey(key) => format!("no such key: {key}"),
        ExecutionError::IndexOutOfBounds(Cel::Int(index)) => format!("index out of bounds: {index}"),
        ExecutionError::IndexOutOfBounds(_) => "index out of bounds".to_owned(),
        ExecutionError::DivisionByZero(_) => "division by zero".to_owned(),
        ExecutionError::RemainderByZero(_) => "modulus by zero".to_owned(),
        ExecutionError::Overflow(..) => "integer overflow".to_owned(),
        ExecutionError::FunctionError { message, .. } => message.clone(),
        ExecutionError::UndeclaredReference(name) => format!("no such attribute(s): {name}"),
        _ => return None,
    })
}
