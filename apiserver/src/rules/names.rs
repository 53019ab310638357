//! What names, label keys and label values may be (Kubernetes, "Object Names and IDs", "Labels and Selectors"). Messages are those
//! that Kubernetes' clients know.

/// Longest label of a DNS name, and longest DNS name, characters.
const LABEL_CHARS_MAX: usize = 63;
const SUBDOMAIN_CHARS_MAX: usize = 253;

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

fn too_long(most: usize) -> String {
    format!("must be no more than {most} characters")
}

/// What is wrong with a DNS label, such as the name of a namespace (RFC 1123).
pub fn dns_label(text: &str) -> Option<String> {
    if text.len() > LABEL_CHARS_MAX {
        return Some(too_long(LABEL_CHARS_MAX));
    }
    let wrong = "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end \
                 with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is \
                 '[a-z0-9]([-a-z0-9]*[a-z0-9])?')";
    (!is_dns_label(text)).then(|| wrong.to_owned())
}

/// What is wrong with a label of RFC 1035, such as the name of a service: it begins with a letter.
pub fn dns_1035_label(text: &str) -> Option<String> {
    if text.len() > LABEL_CHARS_MAX {
        return Some(too_long(LABEL_CHARS_MAX));
    }
    let wrong = "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an alphabetic character, \
                 and end with an alphanumeric character (e.g. 'my-name',  or 'abc-123', regex used for validation is \
                 '[a-z]([-a-z0-9]*[a-z0-9])?')";
    let is_right = is_dns_label(text) && text.starts_with(|c: char| c.is_ascii_lowercase());
    (!is_right).then(|| wrong.to_owned())
}

/// What is wrong with a DNS name, such as the name of most objects (RFC 1123).
pub fn dns_subdomain(text: &str) -> Option<String> {
    if text.len() > SUBDOMAIN_CHARS_MAX {
        return Some(too_long(SUBDOMAIN_CHARS_MAX));
    }
    let wrong = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and \
                 end with an alphanumeric character (e.g. 'example.com', regex used for validation is \
                 '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')";
    (!text.split('.').all(is_dns_label)).then(|| wrong.to_owned())
}

/// What is wrong with a segment of a path, such as the name of a role.
pub fn path_segment(text: &str) -> Option<String> {
    match text {
        "." | ".." => Some(format!("may not be '{text}'")),
        _ => ["/", "%"].into_iter().find(|c| text.contains(c)).map(|c| format!("may not contain '{c}'")),
    }
}

/// What is wrong with the key of a label, an annotation or a finalizer.
pub fn label_key(text: &str) -> Vec<String> {
    let pattern = "must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character \
                   (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is \
                   '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')";
    let (prefix, name) = match text.split_once('/') {
        None => (None, text),
        Some((_, name)) if name.contains('/') => {
            let text = format!(
                "a valid label key {pattern} with an optional DNS subdomain prefix and '/' (e.g. 'example.com/MyName')"
            );
            return vec![text];
        }
        Some((prefix, name)) => (Some(prefix), name),
    };
    let mut wrong = Vec::new();
    match prefix {
        Some("") => wrong.push("prefix part must be non-empty".to_owned()),
        Some(prefix) => wrong.extend(dns_subdomain(prefix).map(|text| format!("prefix part {text}"))),
        None => {}
    }
    if name.is_empty() {
        wrong.push("name part must be non-empty".to_owned());
    } else if name.len() > LABEL_CHARS_MAX {
        wrong.push(format!("name part {}", too_long(LABEL_CHARS_MAX)));
    }
    if !is_label_part(name) {
        wrong.push(format!("name part {pattern}"));
    }
    wrong
}

/// What is wrong with the value of a label.
pub fn label_value(text: &str) -> Vec<String> {
    let mut wrong = Vec::new();
    if text.len() > LABEL_CHARS_MAX {
        wrong.push(too_long(LABEL_CHARS_MAX));
    }
    if !text.is_empty() && !is_label_part(text) {
        let pattern = "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start \
                       and end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for \
                       validation is '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')";
        wrong.push(pattern.to_owned());
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
            assert_eq!((dns_label(right), dns_subdomain(right)), (None, None), "{right}");
        }
        for right in ["a.b", "1.2-3", &name] {
            assert_eq!(dns_subdomain(right), None, "{right}");
            assert!(dns_label(right).is_some(), "{right}");
        }
        let (long_label, long_name) = ("a".repeat(64), ["a"; 128].join("."));
        for wrong in ["", "-a", "a-", "A", "a_b", "a..b", ".a", "ж", &long_name] {
            assert!(dns_subdomain(wrong).is_some(), "{wrong}");
        }
        assert_eq!(dns_label(&long_label).unwrap(), "must be no more than 63 characters");
        assert_eq!(dns_1035_label("a1"), None);
        assert!(dns_1035_label("1a").is_some());
        assert_eq!(path_segment("system:x"), None);
        assert_eq!(path_segment("a/b").unwrap(), "may not contain '/'");
        assert_eq!(path_segment("..").unwrap(), "may not be '..'");
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
