//! What an expression speaks of has to be there: its fields in the schema, its variables and functions.
//!
//! Less than a type checker: what is not known for certain is left to the evaluation.

use std::sync::Arc;

use kube_cel::cel::{
    Context,
    common::ast::{CallExpr, ComprehensionExpr, EntryExpr, Expr, LiteralValue, operators},
    parser::Expression,
};

use super::{
    Node, Type,
    convert::escaped,
    format::Format,
    meter::{self, Budget},
};

/// Deepest nesting that is looked at; what is deeper is refused by who weaves the counting in.
const DEPTH_MAX: usize = 150;

/// Fields of `metadata` that a rule may speak of.
pub const METADATA_FIELDS: [&str; 2] = ["name", "generateName"];

#[derive(Clone, Copy, Debug)]
enum Kind<'a> {
    Dyn,
    Bool,
    Bytes,
    Duration,
    List,
    Map,
    Metadata,
    Node(&'a Node),
    Null,
    Number,
    String,
    Timestamp,
}

impl Kind<'_> {
    /// The type's name, if it is known.
    fn name(self) -> Option<&'static str> {
        Some(match self {
            Self::Dyn | Self::Null => return None,
            Self::Bool => "bool",
            Self::Bytes => "bytes",
            Self::Duration => "google.protobuf.Duration",
            Self::List => "list",
            Self::Map | Self::Metadata => "map",
            Self::Number => "number",
            Self::String => "string",
            Self::Timestamp => "google.protobuf.Timestamp",
            Self::Node(node) => match (node.r#type, node.checks.as_ref().and_then(|checks| checks.format)) {
                (Type::Object, _) => "map",
                (Type::Array, _) => "list",
                (Type::Integer | Type::Number, _) => "number",
                (Type::Boolean, _) => "bool",
                (Type::String, Some(Format::Byte)) => "bytes",
                (Type::String, Some(Format::Date | Format::DateTime)) => "google.protobuf.Timestamp",
                (Type::String, Some(Format::Duration)) => "google.protobuf.Duration",
                (Type::String, _) => "string",
                (Type::IntOrString | Type::Any, _) => return None,
            },
        })
    }
}

/// Checks a rule of a value of this schema.
///
/// # Errors
///
/// What it speaks of that is not there, or that it is no condition.
pub fn check_rule(expression: &Expression, node: &Node, is_old_self_optional: bool) -> Result<(), String> {
    match check(expression, node, is_old_self_optional)?.name() {
        None | Some("bool") => Ok(()),
        Some(_) => Err("cel expression must evaluate to a bool".to_owned()),
    }
}

/// Checks an expression that makes a message. Errors as of [`check_rule`].
pub fn check_message(expression: &Expression, node: &Node, is_old_self_optional: bool) -> Result<(), String> {
    match check(expression, node, is_old_self_optional)?.name() {
        None | Some("string") => Ok(()),
        Some(_) => Err("messageExpression must evaluate to a string".to_owned()),
    }
}

fn check<'a>(expression: &'a Expression, node: &'a Node, is_optional: bool) -> Result<Kind<'a>, String> {
    let old = if is_optional { Kind::Dyn } else { Kind::Node(node) };
    let mut checker = Checker {
        variables: vec![("self", Kind::Node(node)), ("oldSelf", old)],
        context: meter::context(&Arc::new(Budget::default())),
        depth: 0,
    };
    checker.kind(expression)
}

struct Checker<'a> {
    variables: Vec<(&'a str, Kind<'a>)>,
    context: Context<'static>,
    depth: usize,
}

impl<'a> Checker<'a> {
    fn kind(&mut self, expression: &'a Expression) -> Result<Kind<'a>, String> {
        self.depth += 1;
        if self.depth > DEPTH_MAX {
            return Err("ERROR: an expression is nested too deep".to_owned());
        }
        let kind = match &expression.expr {
            Expr::Literal(literal) => match literal {
                LiteralValue::Boolean(_) => Kind::Bool,
                LiteralValue::Bytes(_) => Kind::Bytes,
                LiteralValue::Double(_) | LiteralValue::Int(_) | LiteralValue::UInt(_) => Kind::Number,
                LiteralValue::Null => Kind::Null,
                LiteralValue::String(_) => Kind::String,
            },
            Expr::Ident(name) => self.variable(name)?,
            Expr::Select(select) => {
                let kind = self.kind(&select.operand)?;
                let kind = field(kind, &select.field)?;
                if select.test { Kind::Bool } else { kind }
            }
            Expr::Call(call) => self.call(call)?,
            Expr::List(list) => {
                for element in &list.elements {
                    self.kind(element)?;
                }
                Kind::List
            }
            Expr::Map(map) => {
                for entry in &map.entries {
                    if let EntryExpr::MapEntry(entry) = &entry.expr {
                        self.kind(&entry.key)?;
                        self.kind(&entry.value)?;
                    }
                }
                Kind::Map
            }
            Expr::Comprehension(loops) => self.comprehension(loops)?,
            Expr::Struct(_) | Expr::Unspecified => Kind::Dyn,
        };
        self.depth -= 1;
        Ok(kind)
    }

    fn variable(&self, name: &str) -> Result<Kind<'a>, String> {
        match self.variables.iter().rev().find(|(known, _)| *known == name) {
            Some((_, kind)) => Ok(*kind),
            None if meter::TYPE_NAMES.contains(&name) => Ok(Kind::Dyn),
            None => Err(format!("ERROR: undeclared reference to '{name}' (in container '')")),
        }
    }

    fn call(&mut self, call: &'a CallExpr) -> Result<Kind<'a>, String> {
        let name = call.func_name.as_str();
        let mut is_function = call.target.is_none();
        let mut full_name = name.to_owned();
        if let Some(target) = &call.target {
            match &target.expr {
                Expr::Ident(prefix)
                    if meter::has_function(&self.context, &format!("{prefix}.{name}"), false) =>
                {
                    is_function = true;
                    full_name = format!("{prefix}.{name}");
                }
                _ => {
                    self.kind(target)?;
                }
            }
        }
        let args = call.args.iter().map(|arg| self.kind(arg)).collect::<Result<Vec<_>, _>>()?;
        if let Some(kind) = operator(name, &args)? {
            return Ok(kind);
        }
        if !meter::has_function(&self.context, &full_name, !is_function) {
            return Err(format!("ERROR: undeclared reference to '{full_name}' (in container '')"));
        }
        Ok(match full_name.as_str() {
            "contains" | "endsWith" | "isSorted" | "matches" | "startsWith" | "hasValue" => Kind::Bool,
            "size" | "int" | "uint" | "double" => Kind::Number,
            "string" | "lowerAscii" | "upperAscii" | "trim" | "join" | "format" => Kind::String,
            "bytes" => Kind::Bytes,
            "duration" => Kind::Duration,
            "timestamp" => Kind::Timestamp,
            _ => Kind::Dyn,
        })
    }

    fn comprehension(&mut self, loops: &'a ComprehensionExpr) -> Result<Kind<'a>, String> {
        let item = match self.kind(&loops.iter_range)? {
            Kind::Node(node) => match (node.r#type, &node.items) {
                (Type::Array, Some(items)) => Kind::Node(items),
                (Type::Object, _) => Kind::String,
                (Type::Array | Type::Any | Type::IntOrString, _) => Kind::Dyn,
                _ => {
                    return Err(
                        "ERROR: expression of a scalar type cannot be range of a comprehension".to_owned()
                    );
                }
            },
            Kind::Dyn | Kind::List | Kind::Map | Kind::Metadata => Kind::Dyn,
            _ => {
                return Err(
                    "ERROR: expression of a scalar type cannot be range of a comprehension".to_owned()
                );
            }
        };
        let start = self.kind(&loops.accu_init)?;
        let before = self.variables.len();
        self.variables.push((&loops.accu_var, start));
        self.variables.push((&loops.iter_var, item));
        self.kind(&loops.loop_cond)?;
        self.kind(&loops.loop_step)?;
        let result = self.kind(&loops.result)?;
        self.variables.truncate(before);
        Ok(result)
    }
}

fn field<'a>(kind: Kind<'a>, name: &str) -> Result<Kind<'a>, String> {
    let undefined = || Err(format!("ERROR: undefined field '{name}'"));
    let node = match kind {
        Kind::Node(node) => node,
        Kind::Metadata if METADATA_FIELDS.contains(&name) => return Ok(Kind::String),
        Kind::Metadata => return undefined(),
        Kind::Dyn | Kind::Map | Kind::Null => return Ok(Kind::Dyn),
        kind => {
            let name = kind.name().unwrap_or("dyn");
            return Err(format!("ERROR: type '{name}' does not support field selection"));
        }
    };
    match node.r#type {
        Type::Object => {}
        Type::Any | Type::IntOrString => return Ok(Kind::Dyn),
        _ => {
            let name = kind.name().unwrap_or("dyn");
            return Err(format!("ERROR: type '{name}' does not support field selection"));
        }
    }
    if node.is_embedded && name == "metadata" {
        return Ok(Kind::Metadata);
    }
    let found = node.properties.iter().find(|(known, _)| escaped(known).as_deref() == Some(name));
    match (found, &node.additional) {
        (Some((_, field)), _) => Ok(Kind::Node(field)),
        (None, Some(field)) => Ok(Kind::Node(field)),
        (None, None) if node.preserves_unknown => Ok(Kind::Dyn),
        (None, None) => undefined(),
    }
}

/// What an operator makes of its operands; `None` if it is none.
fn operator<'a>(name: &str, args: &[Kind<'a>]) -> Result<Option<Kind<'a>>, String> {
    let names: Vec<Option<&str>> = args.iter().map(|kind| kind.name()).collect();
    let mismatch = || {
        let names = names.iter().map(|name| name.unwrap_or("dyn")).collect::<Vec<_>>().join(", ");
        Err(format!("ERROR: found no matching overload for '{name}' applied to '({names})'"))
    };
    let is = |index: usize, name: &str| {
        names.get(index).is_none_or(|known| known.is_none_or(|known| known == name))
    };
    let are_same = || match (names.first(), names.get(1)) {
        (Some(Some(left)), Some(Some(right))) => left == right,
        _ => true,
    };
    match name {
        operators::LOGICAL_AND | operators::LOGICAL_OR => {
            if !(is(0, "bool") && is(1, "bool")) {
                return mismatch();
            }
            Ok(Some(Kind::Bool))
        }
        operators::LOGICAL_NOT if !is(0, "bool") => mismatch(),
        operators::LOGICAL_NOT | operators::NOT_STRICTLY_FALSE => Ok(Some(Kind::Bool)),
        operators::EQUALS
        | operators::NOT_EQUALS
        | operators::LESS
        | operators::LESS_EQUALS
        | operators::GREATER
        | operators::GREATER_EQUALS => {
            if are_same() {
                Ok(Some(Kind::Bool))
            } else {
                mismatch()
            }
        }
        operators::IN => match names.get(1) {
            Some(None | Some("list" | "map")) => Ok(Some(Kind::Bool)),
            _ => mismatch(),
        },
        operators::CONDITIONAL => {
            if !is(0, "bool") {
                return mismatch();
            }
            let branches = (names.get(1).copied().flatten(), names.get(2).copied().flatten());
            Ok(Some(match (branches, args.get(1)) {
                ((Some(left), Some(right)), Some(kind)) if left == right => *kind,
                _ => Kind::Dyn,
            }))
        }
        operators::ADD => match (names.first().copied().flatten(), names.get(1).copied().flatten()) {
            (Some("string"), Some("string")) => Ok(Some(Kind::String)),
            (Some("number"), Some("number")) => Ok(Some(Kind::Number)),
            (Some("list"), Some("list")) => Ok(Some(Kind::List)),
            (
                Some("string" | "number" | "bool" | "list" | "map"),
                Some("string" | "number" | "bool" | "list" | "map"),
            ) => mismatch(),
            _ => Ok(Some(Kind::Dyn)),
        },
        operators::SUBSTRACT
        | operators::MULTIPLY
        | operators::DIVIDE
        | operators::MODULO
        | operators::NEGATE => match (names.first().copied().flatten(), names.get(1).copied().flatten()) {
            (Some("string" | "bool" | "list" | "map"), _) | (_, Some("string" | "bool" | "list" | "map")) => {
                mismatch()
            }
            (Some("number"), _) => Ok(Some(Kind::Number)),
            _ => Ok(Some(Kind::Dyn)),
        },
        operators::INDEX => Ok(Some(match args.first() {
            Some(Kind::Node(node)) => match (node.r#type, &node.items, &node.additional) {
                (Type::Array, Some(items), _) => Kind::Node(items),
                (Type::Object, _, Some(values)) => Kind::Node(values),
                _ => Kind::Dyn,
            },
            _ => Kind::Dyn,
        })),
        operators::OPT_INDEX | operators::OPT_SELECT => Ok(Some(Kind::Dyn)),
        _ => Ok(None),
    }
}
