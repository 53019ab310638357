//! Regular expressions as Go's RE2 reads them, compiled by a library of another dialect.
//!
//! | in RE2 | here |
//! | --- | --- |
//! | `\d`, `\w`, `\s`, `\b` know ASCII only | replaced by classes of ASCII |
//! | `[` in a class is a letter, as are `&&`, `--` and `~~` | escaped |
//! | `{` that begins no count is a letter | escaped |
//! | `\Q...\E` is a text | escaped |
//! | a count is at most 1000 | refused beyond |

use regex::{Regex, RegexBuilder};

/// Most bytes of a pattern.
const PATTERN_BYTES_MAX: usize = 8192;
/// Most bytes that a compiled pattern takes.
const COMPILED_BYTES_MAX: usize = 4 << 20;
/// Most bytes that matching keeps.
const CACHE_BYTES_MAX: usize = 1 << 20;
/// Deepest nesting of groups and repetitions.
const NESTING_DEPTH_MAX: u32 = 100;
/// RE2's own limit of a repetition.
const REPEAT_COUNT_MAX: u32 = 1000;

/// Compiles a pattern that is searched, not anchored.
///
/// # Errors
///
/// The text of what is wrong with it.
pub fn compile(pattern: &str) -> Result<Regex, String> {
    if pattern.len() > PATTERN_BYTES_MAX {
        return Err(format!("it has {} bytes, and at most {PATTERN_BYTES_MAX} are taken", pattern.len()));
    }
    RegexBuilder::new(&translated(pattern)?)
        .size_limit(COMPILED_BYTES_MAX)
        .dfa_size_limit(CACHE_BYTES_MAX)
        .nest_limit(NESTING_DEPTH_MAX)
        .build()
        .map_err(|error| match error {
            regex::Error::CompiledTooBig(_) => "error parsing regexp: expression too large".to_owned(),
            _ => format!("error parsing regexp: `{pattern}` is no regular expression of RE2"),
        })
}

fn translated(pattern: &str) -> Result<String, String> {
    let mut output = String::with_capacity(pattern.len() + 16);
    let mut rest = pattern;
    let mut in_class = false;
    // A repetition is not repeated; a question mark after it makes it lazy, once.
    let mut is_repeated = false;
    while let Some(char) = rest.chars().next() {
        rest = &rest[char.len_utf8()..];
        match char {
            '\\' => rest = escape(rest, in_class, &mut output)?,
            '[' if in_class => match rest.strip_prefix(':').and_then(|name| name.split_once(":]")) {
                Some((name, after)) if name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'^') => {
                    output.push_str(&format!("[:{name}:]"));
                    rest = after;
                }
                _ => output.push_str("\\["),
            },
            '[' => {
                in_class = true;
                output.push('[');
                if let Some(after) = rest.strip_prefix('^') {
                    output.push('^');
                    rest = after;
                }
                // A bracket that comes first closes nothing.
                if let Some(after) = rest.strip_prefix(']') {
                    output.push_str("\\]");
                    rest = after;
                }
            }
            ']' if in_class => {
                in_class = false;
                output.push(']');
            }
            '&' | '~' if in_class => {
                output.push('\\');
                output.push(char);
            }
            '*' | '+' | '?' if !in_class => {
                repeated(&mut is_repeated, pattern)?;
                output.push(char);
                rest = lazy(rest, &mut output);
                continue;
            }
            '{' if !in_class => match repeat(rest)? {
                Some(length) => {
                    repeated(&mut is_repeated, pattern)?;
                    output.push('{');
                    output.push_str(&rest[..length]);
                    rest = lazy(&rest[length..], &mut output);
                    continue;
                }
                None => output.push_str("\\{"),
            },
            '(' if !in_class => {
                output.push('(');
                refuse_flags(rest)?;
                if let Some(after) = rest.strip_prefix('?') {
                    output.push('?');
                    rest = after;
                }
            }
            char => output.push(char),
        }
        is_repeated = false;
    }
    Ok(output)
}

fn repeated(is_repeated: &mut bool, pattern: &str) -> Result<(), String> {
    if std::mem::replace(is_repeated, true) {
        return Err(format!("error parsing regexp: invalid nested repetition operator: `{pattern}`"));
    }
    Ok(())
}

/// Writes the question mark that makes a repetition lazy, if there is one, and returns what follows.
fn lazy<'a>(rest: &'a str, output: &mut String) -> &'a str {
    match rest.strip_prefix('?') {
        Some(after) => {
            output.push('?');
            after
        }
        None => rest,
    }
}

/// Writes what follows a backslash, and returns what follows that.
fn escape<'a>(rest: &'a str, in_class: bool, output: &mut String) -> Result<&'a str, String> {
    let Some(char) = rest.chars().next() else {
        return Err("error parsing regexp: trailing backslash at end of expression: ``".to_owned());
    };
    let after = &rest[char.len_utf8()..];
    let ascii = match char {
        'd' => Some("0-9"),
        'w' => Some("0-9A-Za-z_"),
        's' => Some("\\t\\n\\x0c\\r "),
        'D' => Some("^0-9"),
        'W' => Some("^0-9A-Za-z_"),
        'S' => Some("^\\t\\n\\x0c\\r "),
        _ => None,
    };
    match (char, ascii) {
        (_, Some(ascii)) => output.push_str(&format!("[{ascii}]")),
        ('b' | 'B', None) if !in_class => output.push_str(&format!("(?-u:\\{char})")),
        ('Q', None) if !in_class => {
            let (text, after) = after.split_once("\\E").unwrap_or((after, ""));
            output.push_str(&regex::escape(text));
            return Ok(after);
        }
        ('<' | '>', None) => {
            return Err(format!("error parsing regexp: invalid escape sequence: `\\{char}`"));
        }
        (_, None) => {
            output.push('\\');
            output.push(char);
        }
    }
    Ok(after)
}

/// Bytes of a count, its closing brace included; `None` if the brace before begins none.
fn repeat(rest: &str) -> Result<Option<usize>, String> {
    let Some(end) = rest.find('}') else { return Ok(None) };
    let text = &rest[..end];
    let (least, most) = text.split_once(',').unwrap_or((text, text));
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if !is_number(least) || !(most.is_empty() || is_number(most)) {
        return Ok(None);
    }
    for number in [least, most].into_iter().filter(|number| !number.is_empty()) {
        if !number.parse::<u32>().is_ok_and(|number| number <= REPEAT_COUNT_MAX) {
            return Err(format!("error parsing regexp: invalid repeat count: `{{{text}}}`"));
        }
    }
    Ok(Some(end + 1))
}

/// Refuses flags that RE2 has not.
fn refuse_flags(rest: &str) -> Result<(), String> {
    let Some(flags) = rest.strip_prefix('?') else { return Ok(()) };
    let end = flags.find([':', ')', '<', 'P']).unwrap_or(flags.len());
    let flags = &flags[..end];
    match flags.chars().find(|flag| !"imsU-".contains(*flag)) {
        Some(_) => Err(format!("error parsing regexp: invalid or unsupported Perl syntax: `(?{flags}`")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::compile;

    #[track_caller]
    fn assert_match(pattern: &str, text: &str, matches: bool) {
        assert_eq!(compile(pattern).unwrap().is_match(text), matches, "{pattern} in {text}");
    }

    #[test]
    fn a_pattern_is_read_as_re2_reads_it() {
        assert_match(r"^\d+$", "12", true);
        assert_match(r"^\d+$", "\u{661}", false);
        assert_match(r"^\w$", "\u{e9}", false);
        assert_match(r"^[\w.]+$", "a.b", true);
        assert_match(r"^[^\d]$", "a", true);
        assert_match(r"^[[]$", "[", true);
        assert_match(r"^[a&&b]+$", "a&b", true);
        assert_match(r"^[]a]+$", "]a", true);
        assert_match(r"^[[:alpha:]]+$", "ab", true);
        assert_match(r"^a{,2}$", "a{,2}", true);
        assert_match(r"^\Qa.b\E$", "a.b", true);
        assert_match(r"^\Qa.b\E$", "axb", false);
        assert_match("b", "abc", true);
        assert_match(r"(?i)^ABC$", "abc", true);
        assert_match(r"^(?P<x>a|b)$", "b", true);
        assert_match(r"\bfoo\b", "a foo b", true);
    }

    #[test]
    fn what_re2_refuses_or_what_is_too_large_is_refused() {
        for pattern in ["(", "a{1001}", r"(?x)a", r"\", "a**", r"(?=a)", r"\1", "[b-a]", r"\<"] {
            assert!(compile(pattern).is_err(), "{pattern}");
        }
        assert!(compile(r"(((a{1000}){1000}){1000})").is_err());
        assert!(compile(&"(".repeat(5000)).is_err());
        assert!(compile(&"a".repeat(10_000)).is_err());
    }
}
