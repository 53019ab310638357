//! What an expression costs, counted while it runs.
//!
//! The interpreter counts nothing and copies much: a selected field, an item, an argument. So calls are woven into the
//! expression that count what is copied, and every turn of a loop; they fail when the budget is spent. A failure could
//! be swallowed by `||`, so whoever runs the expression asks the budget at the end, too.

use std::{
    collections::HashMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use kube_cel::{
    KubeCelExt,
    cel::{
        Context, ExecutionError, ResolveResult, Value,
        common::ast::{
            CallExpr, ComprehensionExpr, EntryExpr, Expr, ListExpr, LiteralValue, SelectExpr, operators,
        },
        extractors::{Arguments, This},
        objects::Key,
        parser::Expression,
    },
};
use regex::Regex;

use super::pattern;

/// Deepest nesting of an expression.
const DEPTH_MAX: usize = 100;
/// Bytes of a text that cost as much as one value.
const BYTES_PER_COST: u64 = 10;
/// What a regular expression costs that is compiled while a rule runs, by each byte.
const REGEX_BYTE_COST: u64 = 100;
/// Most regular expressions that are kept for the rules of one object.
const REGEX_COUNT_MAX: usize = 16;
/// Most digits that a number is formatted with.
const PRECISION_MAX: u64 = 100;

const CHARGE: &str = "@charge";
const CHARGE_SEARCH: &str = "@search";
const CHARGE_SQUARE: &str = "@square";
const TICK: &str = "@tick";

/// Names of types, for what `type` says.
pub const TYPE_NAMES: [&str; 9] =
    ["bool", "bytes", "double", "int", "list", "map", "null_type", "string", "uint"];

/// Names before a dot that are part of a function's name.
const NAMESPACES: [&str; 9] =
    ["math", "sets", "lists", "strings", "base64", "ip", "format", "jsonpatch", "optional"];

/// Functions that look for a text at each place of another.
const SEARCH_FUNCTIONS: [&str; 2] = ["indexOf", "lastIndexOf"];
/// Bytes of a text that cost as much as one value, for each value that the text it is looked for in costs.
const SEARCH_BYTES_PER_COST: u64 = 30;

/// Functions that compare each with each.
const SQUARE_FUNCTIONS: [&str; 4] = ["contains", "equivalent", "intersects", "distinct"];

/// What is left to spend.
#[derive(Debug, Default)]
pub struct Budget {
    granted: AtomicU64,
    spent: AtomicU64,
}

impl Budget {
    /// Begins anew with this much.
    pub fn refill(&self, granted: u64) {
        self.granted.store(granted, Ordering::Relaxed);
        self.spent.store(0, Ordering::Relaxed);
    }

    /// What was spent of what was granted.
    pub fn spent(&self) -> u64 {
        self.spent.load(Ordering::Relaxed).min(self.granted.load(Ordering::Relaxed))
    }

    pub fn is_exhausted(&self) -> bool {
        self.spent.load(Ordering::Relaxed) > self.granted.load(Ordering::Relaxed)
    }

    /// Spends; false if there is not enough.
    pub fn spend(&self, cost: u64) -> bool {
        // Once it is exceeded nothing goes on, so it does not come near an overflow.
        let before = self.spent.load(Ordering::Relaxed);
        self.spent.store(before.saturating_add(cost), Ordering::Relaxed);
        !self.is_exhausted()
    }

    fn charge(&self, cost: u64) -> Result<(), ExecutionError> {
        if self.spend(cost) {
            return Ok(());
        }
        Err(ExecutionError::function_error("rule", "operation cancelled: actual cost limit exceeded"))
    }

    /// Charges for a value with all that is in it.
    fn charge_value(&self, value: &Value) -> Result<u64, ExecutionError> {
        let cost = match value {
            Value::String(text) => 1 + text.len() as u64 / BYTES_PER_COST,
            Value::Bytes(bytes) => 1 + bytes.len() as u64 / BYTES_PER_COST,
            _ => 1,
        };
        self.charge(cost)?;
        let mut total = cost;
        match value {
            Value::List(items) => {
                for item in items.iter() {
                    total += self.charge_value(item)?;
                }
            }
            Value::Map(map) => {
                for (key, value) in map.map.iter() {
                    if let Key::String(key) = key {
                        self.charge(key.len() as u64 / BYTES_PER_COST)?;
                    }
                    total += self.charge_value(value)?;
                }
            }
            _ => {}
        }
        Ok(total)
    }
}

/// A context with all functions, those among them that count.
pub fn context(budget: &Arc<Budget>) -> Context<'static> {
    let mut context = Context::default().with_all();
    let counter = budget.clone();
    context.add_function(CHARGE, move |value: Value| -> ResolveResult {
        counter.charge_value(&value)?;
        Ok(value)
    });
    let counter = budget.clone();
    context.add_function(CHARGE_SQUARE, move |value: Value| -> ResolveResult {
        if let Value::List(items) = &value {
            let total = counter.charge_value(&value)?;
            counter.charge(total.saturating_mul(items.len() as u64))?;
        }
        Ok(value)
    });
    let counter = budget.clone();
    context.add_function(CHARGE_SEARCH, move |value: Value| -> ResolveResult {
        if let Value::String(text) = &value {
            let length = text.len() as u64 / SEARCH_BYTES_PER_COST;
            counter.charge(length.saturating_mul(length))?;
        }
        Ok(value)
    });
    let counter = budget.clone();
    context.add_function(TICK, move || -> ResolveResult {
        counter.charge(1)?;
        Ok(Value::Bool(true))
    });
    missing_functions(&mut context);
    bounded_functions(&mut context, budget);
    context
}

/// What the library has not, or has with another meaning.
fn missing_functions(context: &mut Context<'_>) {
    context.add_function("dyn", |value: Value| -> ResolveResult { Ok(value) });
    // A text has as many characters, not bytes.
    context.add_function("size", |This(this): This<Value>| -> ResolveResult {
        let size = match &this {
            Value::String(text) => text.chars().count(),
            Value::Bytes(bytes) => bytes.len(),
            Value::List(items) => items.len(),
            Value::Map(map) => map.map.len(),
            _ => return Err(ExecutionError::NoSuchOverload),
        };
        i64::try_from(size).map(Value::Int).map_err(|_| ExecutionError::NoSuchOverload)
    });
    // Types are values that are only compared: their names serve.
    for name in TYPE_NAMES {
        context.add_variable_from_value(name, Value::String(Arc::new(name.to_owned())));
    }
    context.add_function("type", |value: Value| -> ResolveResult {
        let name = match value {
            Value::Bool(_) => "bool",
            Value::Bytes(_) => "bytes",
            Value::Float(_) => "double",
            Value::Int(_) => "int",
            Value::List(_) => "list",
            Value::Map(_) => "map",
            Value::Null => "null_type",
            Value::String(_) => "string",
            Value::UInt(_) => "uint",
            _ => return Err(ExecutionError::NoSuchOverload),
        };
        Ok(Value::String(Arc::new(name.to_owned())))
    });
}

/// Functions that replace those of the library: theirs make more of little than is bounded.
fn bounded_functions(context: &mut Context<'_>, budget: &Arc<Budget>) {
    let counter = budget.clone();
    context.add_function("lists.range", move |count: i64| -> ResolveResult {
        let count = u64::try_from(count)
            .map_err(|_| ExecutionError::function_error("lists.range", "range must be non-negative"))?;
        counter.charge(count)?;
        Ok(Value::List(Arc::new((0..count as i64).map(Value::Int).collect())))
    });
    let counter = budget.clone();
    context.add_function("replace", move |This(this): This<Arc<String>>, Arguments(args): Arguments| {
        replace(&counter, &this, &args)
    });
    let regexes = Arc::new(Regexes { budget: budget.clone(), compiled: Mutex::default() });
    let shared = regexes.clone();
    context.add_function(
        "matches",
        move |This(this): This<Arc<String>>, pattern: Arc<String>| -> ResolveResult {
            Ok(Value::Bool(shared.get(&pattern, &this)?.is_match(&this)))
        },
    );
    let shared = regexes.clone();
    context.add_function(
        "find",
        move |This(this): This<Arc<String>>, pattern: Arc<String>| -> ResolveResult {
            let regex = shared.get(&pattern, &this)?;
            let found = regex.find(&this).map(|found| found.as_str().to_owned()).unwrap_or_default();
            Ok(Value::String(Arc::new(found)))
        },
    );
    context.add_function("findAll", move |This(this): This<Arc<String>>, Arguments(args): Arguments| {
        let (Some(Value::String(pattern)), limit) = (args.first(), args.get(1)) else {
            return Err(ExecutionError::NoSuchOverload);
        };
        let limit = match limit {
            None => usize::MAX,
            Some(Value::Int(limit)) => usize::try_from(*limit).unwrap_or(usize::MAX),
            Some(_) => return Err(ExecutionError::NoSuchOverload),
        };
        let regex = regexes.get(pattern, &this)?;
        let found = regex.find_iter(&this).take(limit);
        let found: Vec<Value> =
            found.map(|found| Value::String(Arc::new(found.as_str().to_owned()))).collect();
        regexes.budget.charge(found.len() as u64)?;
        Ok(Value::List(Arc::new(found)))
    });
}

fn replace(budget: &Budget, this: &str, args: &[Value]) -> ResolveResult {
    let (Some(Value::String(from)), Some(Value::String(to)), limit) =
        (args.first(), args.get(1), args.get(2))
    else {
        return Err(ExecutionError::NoSuchOverload);
    };
    let limit = match limit {
        None => usize::MAX,
        Some(Value::Int(limit)) => usize::try_from(*limit).unwrap_or(usize::MAX),
        Some(_) => return Err(ExecutionError::NoSuchOverload),
    };
    let count = this.matches(from.as_str()).take(limit).count() as u64;
    budget.charge(
        1 + count.saturating_mul(to.len() as u64) / BYTES_PER_COST + this.len() as u64 / BYTES_PER_COST,
    )?;
    Ok(Value::String(Arc::new(this.replacen(from.as_str(), to, limit))))
}

/// Regular expressions that rules of one object have used.
struct Regexes {
    budget: Arc<Budget>,
    compiled: Mutex<HashMap<String, Regex>>,
}

impl Regexes {
    /// The compiled pattern; charged for it, and for the search of `text`.
    fn get(&self, text: &str, searched: &str) -> Result<Regex, ExecutionError> {
        let length = text.len() as u64;
        let search = (1 + searched.len() as u64 / BYTES_PER_COST).saturating_mul(1 + length / 4);
        self.budget.charge(search)?;
        let mut compiled = self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(regex) = compiled.get(text) {
            return Ok(regex.clone());
        }
        self.budget.charge(length.saturating_mul(REGEX_BYTE_COST))?;
        let regex =
            pattern::compile(text).map_err(|error| ExecutionError::function_error("matches", error))?;
        if compiled.len() >= REGEX_COUNT_MAX {
            compiled.clear();
        }
        compiled.insert(text.to_owned(), regex.clone());
        Ok(regex)
    }
}

/// Whether there is a function of this name; `is_method` for one that is called on a value.
pub fn has_function(context: &Context<'_>, name: &str, is_method: bool) -> bool {
    let target = is_method.then(|| Box::new(expression(Expr::Literal(LiteralValue::Null))));
    let call = CallExpr { func_name: name.to_owned(), target, args: Vec::new() };
    let call = expression(Expr::Call(call));
    // Called without its arguments a function fails, but not for that it is not there.
    let result = catch_unwind(AssertUnwindSafe(|| context.resolve(&call)));
    !matches!(result, Ok(Err(ExecutionError::UndeclaredReference(missing))) if *missing == name)
}

/// Weaves counting into an expression.
///
/// # Errors
///
/// What the interpreter has not, and what is nested too deep.
pub fn metered(expression: Expression) -> Result<Expression, String> {
    meter(expression, 0)
}

fn meter(input: Expression, depth: usize) -> Result<Expression, String> {
    if depth > DEPTH_MAX {
        return Err(format!("ERROR: an expression is nested at most {DEPTH_MAX} deep"));
    }
    let below = |input: Expression| meter(input, depth + 1);
    // What is looked into is not copied.
    let base = |input: Box<Expression>| match input.expr {
        Expr::Ident(_) => Ok(input),
        _ => meter(*input, depth + 1).map(Box::new),
    };
    let expr = match input.expr {
        expr @ Expr::Literal(_) => return Ok(expression(expr)),
        expr @ Expr::Ident(_) => return Ok(charged(expr)),
        Expr::Select(select) => {
            let is_test = select.test;
            let expr = Expr::Select(SelectExpr { operand: base(select.operand)?, ..select });
            return Ok(if is_test { expression(expr) } else { charged(expr) });
        }
        Expr::Call(call) => return meter_call(call, depth),
        Expr::List(list) => {
            let elements = list.elements.into_iter().map(below).collect::<Result<_, _>>()?;
            Expr::List(ListExpr { elements, optional_indices: list.optional_indices })
        }
        Expr::Map(mut map) => {
            for entry in &mut map.entries {
                let EntryExpr::MapEntry(entry) = &mut entry.expr else {
                    return Err("ERROR: messages cannot be made in a rule".to_owned());
                };
                entry.key = below(std::mem::take(&mut entry.key))?;
                entry.value = below(std::mem::take(&mut entry.value))?;
            }
            Expr::Map(map)
        }
        Expr::Comprehension(loops) => {
            if loops.iter_var2.is_some() {
                return Err("ERROR: a macro with two variables is not supported".to_owned());
            }
            let condition = vec![
                function(TICK, Vec::new()),
                below(loops.loop_cond)?,
                expression(Expr::Literal(LiteralValue::Boolean(false.into()))),
            ];
            Expr::Comprehension(Box::new(ComprehensionExpr {
                iter_range: below(loops.iter_range)?,
                accu_init: below(loops.accu_init)?,
                loop_cond: function(operators::CONDITIONAL, condition),
                loop_step: below(loops.loop_step)?,
                result: below(loops.result)?,
                iter_var: loops.iter_var,
                iter_var2: None,
                accu_var: loops.accu_var,
            }))
        }
        Expr::Struct(_) | Expr::Unspecified => {
            return Err("ERROR: messages cannot be made in a rule".to_owned());
        }
    };
    Ok(expression(expr))
}

fn meter_call(call: CallExpr, depth: usize) -> Result<Expression, String> {
    let below = |input: Expression| meter(input, depth + 1);
    let CallExpr { func_name, target, mut args } = call;
    let is_looked_into =
        matches!(func_name.as_str(), operators::INDEX | operators::OPT_INDEX | operators::OPT_SELECT);
    let is_logical = matches!(
        func_name.as_str(),
        operators::LOGICAL_AND
            | operators::LOGICAL_OR
            | operators::LOGICAL_NOT
            | operators::NOT_STRICTLY_FALSE
    );
    let charge = match func_name.as_str() {
        name if target.is_some() && SQUARE_FUNCTIONS.contains(&name) => Some(CHARGE_SQUARE),
        name if target.is_some() && SEARCH_FUNCTIONS.contains(&name) => Some(CHARGE_SEARCH),
        _ => None,
    };
    for (index, arg) in args.iter_mut().enumerate() {
        let is_plain = (is_logical || (is_looked_into && index == 0)) && matches!(arg.expr, Expr::Ident(_));
        if !is_plain {
            *arg = below(std::mem::take(arg))?;
        }
        if let Some(charge) = charge {
            *arg = function(charge, vec![std::mem::take(arg)]);
        }
    }
    if func_name == "format" && target.as_deref().is_some_and(|target| !is_format(target)) {
        return Err(format!("ERROR: a format is a text, with a precision of at most {PRECISION_MAX}"));
    }
    let target = match target {
        Some(target) => Some(Box::new(match &target.expr {
            Expr::Ident(name) if NAMESPACES.contains(&name.as_str()) => *target,
            _ => match charge {
                Some(charge) => function(charge, vec![below(*target)?]),
                None => below(*target)?,
            },
        })),
        None => None,
    };
    let expr = Expr::Call(CallExpr { func_name, target, args });
    Ok(if is_looked_into { charged(expr) } else { expression(expr) })
}

/// Whether what is formatted is a literal without a precision that fills the memory.
fn is_format(target: &Expression) -> bool {
    let Expr::Literal(LiteralValue::String(text)) = &target.expr else { return false };
    text.inner().split('.').skip(1).all(|after| {
        let digits: String = after.chars().take_while(char::is_ascii_digit).collect();
        digits.is_empty() || digits.parse::<u64>().is_ok_and(|digits| digits <= PRECISION_MAX)
    })
}

fn expression(expr: Expr) -> Expression {
    Expression { id: 0, expr }
}

fn function(name: &str, args: Vec<Expression>) -> Expression {
    expression(Expr::Call(CallExpr { func_name: name.to_owned(), target: None, args }))
}

fn charged(expr: Expr) -> Expression {
    function(CHARGE, vec![expression(expr)])
}
