//! The body of a request as a JSON object.

use std::cell::RefCell;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use crate::object::Object;
use crate::status::{Reason, Result, Status};

/// Longest body, bytes: as much as etcd's clients are used to, and then some.
pub const BODY_BYTES_MAX: usize = 3 << 20;
/// Most fields that come twice which are told of.
const DUPLICATES_MAX: usize = 100;

/// How a body is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    Json,
    Yaml,
}

impl Encoding {
    /// Of a `Content-Type`; JSON where none is given.
    ///
    /// # Errors
    /// [`Reason::UnsupportedMediaType`] for any other.
    pub fn of(content_type: Option<&str>) -> Result<Self> {
        let essence = content_type.unwrap_or_default().split(';').next().unwrap_or_default().trim();
        match essence.to_ascii_lowercase().as_str() {
            "" | "application/json" => Ok(Self::Json),
            "application/yaml" | "application/x-yaml" | "text/yaml" => Ok(Self::Yaml),
            other => {
                let text = format!(
                    "the body of the request was in an unknown format - accepted media types include: application/json, \
                     application/yaml; this one is {other}"
                );
                Err(Status::new(Reason::UnsupportedMediaType, text))
            }
        }
    }
}

/// An object, and what was odd about its text.
#[derive(Clone, Debug, PartialEq)]
pub struct Decoded {
    pub object: Object,
    /// `duplicate field "spec.a"` for each field that came more than once; the last one counts.
    pub duplicates: Vec<String>,
}

/// Reads a body. Its depth is bounded at 128, by the parsers; YAML is further bounded in what aliases may repeat.
///
/// # Errors
/// [`Reason::BadRequest`] for what is no object; [`Reason::RequestEntityTooLarge`] beyond [`BODY_BYTES_MAX`].
pub fn decode(encoding: Encoding, body: &[u8]) -> Result<Decoded> {
    if body.len() > BODY_BYTES_MAX {
        let text = format!("Request entity too large: limit is {BODY_BYTES_MAX}");
        return Err(Status::new(Reason::RequestEntityTooLarge, text));
    }
    let duplicates = RefCell::new(Vec::new());
    let seed = Seed { path: None, duplicates: &duplicates };
    let value = match encoding {
        Encoding::Json => {
            let mut reader = serde_json::Deserializer::from_slice(body);
            let value = seed.deserialize(&mut reader).and_then(|value| reader.end().map(|()| value));
            value.map_err(|e| Status::bad_request(format!("the body is not valid JSON: {e}")))?
        }
        Encoding::Yaml => {
            let text = std::str::from_utf8(body).map_err(|_| Status::bad_request("the body is not UTF-8"))?;
            let options = serde_saphyr::options! {
                duplicate_keys: serde_saphyr::DuplicateKeyPolicy::PassThrough,
                with_snippet: false,
                strict_booleans: true,
            };
            let value = serde_saphyr::with_deserializer_from_str_with_options(text, options, |reader| {
                seed.deserialize(reader)
            });
            value.map_err(|e| Status::bad_request(format!("the body is not valid YAML: {e}")))?
        }
    };
    match value {
        Value::Object(object) => Ok(Decoded { object, duplicates: duplicates.into_inner() }),
        other => {
            let what = match other {
                Value::Array(_) => "a list",
                Value::Null => "empty",
                _ => "a scalar",
            };
            Err(Status::bad_request(format!("the body is {what}, where an object is wanted")))
        }
    }
}

/// Where in an object a value is, from the inside out.
enum Path<'a> {
    Field(&'a str, Option<&'a Path<'a>>),
    Item(usize, Option<&'a Path<'a>>),
}

impl fmt::Display for Path<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Field(name, None) => f.write_str(name),
            Self::Field(name, Some(before)) => write!(f, "{before}.{name}"),
            Self::Item(index, before) => {
                before.map_or(Ok(()), |before| before.fmt(f))?;
                write!(f, "[{index}]")
            }
        }
    }
}

/// Makes a value, and takes note of fields that come twice.
#[derive(Clone, Copy)]
struct Seed<'a> {
    path: Option<&'a Path<'a>>,
    duplicates: &'a RefCell<Vec<String>>,
}

impl<'de> DeserializeSeed<'de> for Seed<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Seed<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value of JSON")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Value, E> {
        let number = Number::from_f64(value);
        number.map(Value::Number).ok_or_else(|| E::custom(format_args!("{value} is no number of JSON")))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        self.deserialize(deserializer)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        loop {
            let path = Path::Item(list.len(), self.path);
            match items.next_element_seed(Seed { path: Some(&path), ..self })? {
                Some(item) => list.push(item),
                None => return Ok(Value::Array(list)),
            }
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(name) = fields.next_key_seed(self)? {
            let name = match name {
                Value::String(name) => name,
                Value::Bool(_) | Value::Number(_) => name.to_string(),
                _ => return Err(A::Error::custom("the name of a field is no text")),
            };
            let path = Path::Field(&name, self.path);
            let value = fields.next_value_seed(Seed { path: Some(&path), ..self })?;
            if map.contains_key(&name) {
                let mut duplicates = self.duplicates.borrow_mut();
                if duplicates.len() < DUPLICATES_MAX {
                    duplicates.push(format!("duplicate field {:?}", path.to_string()));
                }
            }
            map.insert(name, value);
        }
        Ok(Value::Object(map))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn json(text: &str) -> Result<Decoded> {
        decode(Encoding::Json, text.as_bytes())
    }

    #[test]
    fn a_field_that_comes_twice_is_told_by_its_path_and_the_last_one_counts() {
        let decoded = json(r#"{"a":{"b":[{"c":1,"c":2}],"b.d":0,"b.d":0},"a2":0}"#).unwrap();
        assert_eq!(decoded.duplicates, [r#"duplicate field "a.b[0].c""#, r#"duplicate field "a.b.d""#]);
        assert_eq!(decoded.object["a"]["b"][0]["c"], 2);
        let yaml = decode(Encoding::Yaml, b"a: 1\nb:\n  - {c: x}\na: 2\n").unwrap();
        assert_eq!(yaml.duplicates, [r#"duplicate field "a""#]);
        assert_eq!(Value::Object(yaml.object), json!({"a": 2, "b": [{"c": "x"}]}));
    }

    #[test]
    fn yaml_is_the_object_that_its_json_is() {
        let text = "kind: A\nspec:\n  yes: true\n  n: 12\n  f: 1.5\n  s: \"12\"\n  z: null\n  1: one\n  l:\n  - a\n  - b: {}\n";
        let expected = json!({"kind": "A", "spec": {"yes": true, "n": 12, "f": 1.5, "s": "12", "z": null, "1": "one", "l": ["a", {"b": {}}]}});
        assert_eq!(Value::Object(decode(Encoding::Yaml, text.as_bytes()).unwrap().object), expected);
        // What clients of an apply send is JSON by the name of YAML.
        let text = expected.to_string();
        assert_eq!(Value::Object(decode(Encoding::Yaml, text.as_bytes()).unwrap().object), expected);
    }

    #[test]
    fn what_is_no_object_is_refused() {
        for bad in ["", "[]", "1", "null", "{", "{}{}", "{\"a\":}", "{\"a\":1e999}"] {
            assert_eq!(json(bad).unwrap_err().reason, Reason::BadRequest, "{bad}");
        }
        assert_eq!(decode(Encoding::Yaml, b"\xff").unwrap_err().reason, Reason::BadRequest);
    }

    #[test]
    fn what_is_too_long_or_too_deep_or_repeats_itself_ends_in_an_error() {
        let long = format!("{{\"a\":\"{}\"}}", "x".repeat(BODY_BYTES_MAX));
        assert_eq!(json(&long).unwrap_err().reason, Reason::RequestEntityTooLarge);
        let deep = "{\"a\":".repeat(100_000);
        assert_eq!(json(&deep).unwrap_err().reason, Reason::BadRequest);
        assert!(decode(Encoding::Yaml, "[".repeat(100_000).as_bytes()).is_err());
        let mut bomb = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n".to_owned();
        for n in 1..12 {
            let repeated = vec![format!("*a{}", n - 1); 9].join(",");
            bomb += &format!("a{n}: &a{n} [{repeated}]\n");
        }
        assert_eq!(decode(Encoding::Yaml, bomb.as_bytes()).unwrap_err().reason, Reason::BadRequest);
    }

    #[test]
    fn a_media_type_is_json_or_yaml() {
        assert_eq!(Encoding::of(None).unwrap(), Encoding::Json);
        assert_eq!(Encoding::of(Some("application/json; charset=utf-8")).unwrap(), Encoding::Json);
        assert_eq!(Encoding::of(Some("Application/YAML")).unwrap(), Encoding::Yaml);
        let status = Encoding::of(Some("application/vnd.kubernetes.protobuf")).unwrap_err();
        assert_eq!(status.reason, Reason::UnsupportedMediaType);
    }

    proptest! {
        #[test]
        fn json_is_read_as_others_read_it(text in r#"[\[\]{}:,"ab0-9. truefalsn\\-]{0,40}"#) {
            let others = serde_json::from_str::<Value>(&text).ok().filter(Value::is_object);
            prop_assert_eq!(json(&text).ok().map(|decoded| Value::Object(decoded.object)), others);
        }

        #[test]
        fn no_text_makes_a_decoder_fail_but_by_an_error(text in "\\PC{0,200}") {
            let _ = decode(Encoding::Yaml, text.as_bytes());
            let _ = json(&text);
        }
    }
}
