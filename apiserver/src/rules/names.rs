//! What names, label keys and label values may be (Kubernetes, "Object Names and IDs", "Labels and Selectors"). Messages are those
//! that Kubernetes' clients know.

/// Longest label, also one of a DNS name, and longest DNS name, bytes.
const LABEL_BYTES_MAX: usize = 63;
const SUBDOMAIN_BYTES_MAX: usize = 253;

fn is_lower(byte: u8) -> bool {
    byte.is_ascii_lowercase() || byte.is_ascii_digit()
}

/// `[a-z0-9]([-a-z0-9]*[a-z0-9])?`
fn is_dns_label(text: &str) -> bool {
    let bytes = text.as_bytes();
    let ends = bytes.first().is_some_and(|b| is_lower(*b)) && bytes.last().is_some_and(|b| is_lower(*b));
    ends && bytes.iter().all(|b| is_lower(*b) || *b == b'-')
}

/// `(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])`
fn is_label_part(text: &str) -> bool {
    let bytes = text.as_bytes();
    let is_inner = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    let is_end = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphanumeric);
    is_end(bytes.first()) && is_end(bytes.last()) && bytes.iter().all(is_inner)
}

const LABEL_RULE: &str = "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end \
    with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?')";
const LABEL_1035_RULE: &str = "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an alphabetic \
    character, and end with an alphanumeric character (e.g. 'my-name',  or 'abc-123', regex used for validation is \
    '[a-z]([-a-z0-9]*[a-z0-9])?')";
const SUBDOMAIN_RULE: &str = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must \
    start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is \
    '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')";
const LABEL_KEY_RULE: &str = "must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric \
    character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')";
const LABEL_VALUE_RULE: &str = "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must \
    start and end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for validation is \
    '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')";

fn is_subdomain(text: &str) -> bool {
    text.split('.').all(is_dns_label)
}

/// The rules that a name does not keep; names of objects are measured in characters.
fn broken(text: &str, chars_max: usize, keeps_rule: bool, rule: &str) -> Vec<String> {
    let too_long = (text.len() > chars_max).then(|| format!("must be no more than {chars_max} characters"));
    too_long.into_iter().chain((!keeps_rule).then(|| rule.to_owned())).collect()
}

/// What is wrong with a DNS label, such as the name of a namespace (RFC 1123).
pub fn dns_label(text: &str) -> Vec<String> {
    let rule = if is_subdomain(text) { "must not contain dots" } else { LABEL_RULE };
    broken(text, LABEL_BYTES_MAX, is_dns_label(text), rule)
}

/// What is wrong with a label of RFC 1035, such as the name of a service: it begins with a letter.
pub fn dns_1035_label(text: &str) -> Vec<String> {
    let is_right = is_dns_label(text) && text.starts_with(|c: char| c.is_ascii_lowercase());
    broken(text, LABEL_BYTES_MAX, is_right, LABEL_1035_RULE)
}

/// What is wrong with a DNS name, such as the name of most objects (RFC 1123).
pub fn dns_subdomain(text: &str) -> Vec<String> {
    broken(text, SUBDOMAIN_BYTES_MAX, is_subdomain(text), SUBDOMAIN_RULE)
}

/// What is wrong with a segment of a path, such as the name of a role.
pub fn path_segment(text: &str) -> Vec<String> {
    if matches!(text, "." | "..") {
        return vec![format!("may not be '{text}'")];
    }
    ["/", "%"].into_iter().filter(|c| text.contains(c)).map(|c| format!("may not contain '{c}'")).collect()
}

/// What is wrong with the key of a label, an annotation or a finalizer.
pub fn label_key(text: &str) -> Vec<String> {
    let (prefix, name) = match text.split_once('/') {
        None => (None, text),
        Some((_, name)) if name.contains('/') => {
            let text = format!(
                "a valid label key {LABEL_KEY_RULE} with an optional DNS subdomain prefix and '/' (e.g. 'example.com/MyName')"
            );
            return vec![text];
        }
        Some((prefix, name)) => (Some(prefix), name),
    };
    let mut wrong = Vec::new();
    match prefix {
        Some("") => wrong.push("prefix part must be non-empty".to_owned()),
        Some(prefix) => {
            if prefix.len() > SUBDOMAIN_BYTES_MAX {
                wrong.push(format!("prefix part must be no more than {SUBDOMAIN_BYTES_MAX} bytes"));
            }
            if !is_subdomain(prefix) {
                wrong.push(format!("prefix part {SUBDOMAIN_RULE}"));
            }
        }
        None => {}
    }
    if name.is_empty() {
        wrong.push("name part must be non-empty".to_owned());
    } else if name.len() > LABEL_BYTES_MAX {
        wrong.push(format!("name part must be no more than {LABEL_BYTES_MAX} bytes"));
    }
    if !is_label_part(name) {
        wrong.push(format!("name part {LABEL_KEY_RULE}"));
    }
    wrong
}

/// What is wrong with the value of a label.
pub fn label_value(text: &str) -> Vec<String> {
    let mut wrong = Vec::new();
    if text.len() > LABEL_BYTES_MAX {
        wrong.push(format!("must be no more than {LABEL_BYTES_MAX} bytes"));
    }
    if !text.is_empty() && !is_label_part(text) {
        wrong.push(LABEL_VALUE_RULE.to_owned());
    }
    wrong
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_dns() {
        let (label, name) = ("a".repeat(63), ["a"; 127].join("."));
        for right in ["a", "a-b", "0", &label] {
            assert!(dns_label(right).is_empty() && dns_subdomain(right).is_empty(), "{right}");
        }
        for right in ["a.b", "1.2-3", &name] {
            assert!(dns_subdomain(right).is_empty(), "{right}");
            assert!(dns_label(right).contains(&"must not contain dots".to_owned()), "{right}");
        }
        let (long_label, long_name) = ("a".repeat(64), ["a"; 128].join("."));
        for wrong in ["", "-a", "a-", "A", "a_b", "a..b", ".a", "ж", &long_name] {
            assert!(!dns_subdomain(wrong).is_empty(), "{wrong}");
        }
        assert_eq!(dns_label(&long_label), ["must be no more than 63 characters"]);
        assert!(dns_1035_label("a1").is_empty());
        assert!(!dns_1035_label("1a").is_empty());
        assert!(path_segment("system:x").is_empty());
        assert_eq!(path_segment("a/b%"), ["may not contain '/'", "may not contain '%'"]);
        assert_eq!(path_segment(".."), ["may not be '..'"]);
    }

    #[test]
    fn labels_have_a_key_with_or_without_a_prefix() {
        for right in ["a", "A.b_c-9", "example.com/a", "a/b"] {
            assert_eq!(label_key(right), Vec::<String>::new(), "{right}");
        }
        for (wrong, text) in [
            ("", "name part must be non-empty"),
            ("/a", "prefix part must be non-empty"),
            ("a/", "name part must be non-empty"),
            ("A/b", "prefix part a lowercase RFC 1123 subdomain"),
            ("a/b/c", "a valid label key must consist of"),
            ("-a", "name part must consist of"),
        ] {
            assert!(
                label_key(wrong).iter().any(|told| told.starts_with(text)),
                "{wrong}: {:?}",
                label_key(wrong)
            );
        }
        assert_eq!(label_value(""), Vec::<String>::new());
        assert_eq!(label_value("a.B_c"), Vec::<String>::new());
        assert_eq!(label_value(&"-".repeat(64)).len(), 2);
    }
}
