//! Names of objects, ordered so that a resource, or one namespace of it, is one range.

use std::fmt;

use super::Error;

/// The longest key. Resource, namespace and name are bounded by 253 bytes and a little each.
pub const KEY_BYTES_MAX: usize = 1024;

/// Between resource, namespace and name: smaller than anything in them, so that the order of keys is the order of their parts.
const SEPARATOR: char = '\0';

/// Which object: its resource, its namespace and its name.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(Box<str>);

impl Key {
    /// The key of an object.
    ///
    /// The resource is the group and the plural, such as `virtualization.deckhouse.io/virtualimages`; the namespace is empty for what
    /// has none.
    ///
    /// # Errors
    /// [`Error::Key`] if the resource or the name is empty, one of them has a NUL, or all together are longer than [`KEY_BYTES_MAX`].
    pub fn new(resource: &str, namespace: &str, name: &str) -> Result<Self, Error> {
        if name.is_empty() {
            return Err(bad("the name is empty"));
        }
        Ok(Self(join(&[resource, namespace, name])?))
    }

    /// The key as it is stored; `None` if it is none.
    pub(super) fn from_stored(stored: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(stored).ok()?;
        (text.matches(SEPARATOR).count() == 2).then(|| Self(text.into()))
    }

    /// Group and plural.
    pub fn resource(&self) -> &str {
        self.part(0)
    }

    /// The namespace; empty for what has none.
    pub fn namespace(&self) -> &str {
        self.part(1)
    }

    /// The name.
    pub fn name(&self) -> &str {
        self.part(2)
    }

    pub(super) fn stored(&self) -> &[u8] {
        self.0.as_bytes()
    }

    /// Under which key the objects of this one's namespace are counted.
    pub(super) fn counted(&self) -> &[u8] {
        let name = self.name().len();
        &self.0.as_bytes()[..self.0.len() - name]
    }

    fn part(&self, index: usize) -> &str {
        self.0.split(SEPARATOR).nth(index).unwrap_or_default()
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.replace(SEPARATOR, "/"))
    }
}

/// A resource, a namespace of it, or one object: keys that follow each other.
#[derive(Clone, PartialEq, Eq)]
pub struct Range {
    /// The first key that can be in it.
    start: Box<str>,
    /// The first that is behind it.
    end: Box<str>,
}

impl Range {
    /// All objects of a resource.
    ///
    /// # Errors
    /// Those of [`Key::new`].
    pub fn resource(resource: &str) -> Result<Self, Error> {
        Ok(Self::below(join(&[resource, ""])?))
    }

    /// The objects of a resource in one namespace.
    ///
    /// # Errors
    /// Those of [`Key::new`].
    pub fn namespace(resource: &str, namespace: &str) -> Result<Self, Error> {
        Ok(Self::below(join(&[resource, namespace, ""])?))
    }

    /// One object.
    pub fn object(key: &Key) -> Self {
        Self { start: key.0.clone(), end: format!("{}{SEPARATOR}", key.0).into() }
    }

    /// Whether the key is in it.
    pub fn has(&self, key: &Key) -> bool {
        self.start <= key.0 && key.0 < self.end
    }

    pub(super) fn start(&self) -> &[u8] {
        self.start.as_bytes()
    }

    pub(super) fn end(&self) -> &[u8] {
        self.end.as_bytes()
    }

    /// Group and plural of all that is in it.
    pub(super) fn of(&self) -> &str {
        self.start.split(SEPARATOR).next().unwrap_or_default()
    }

    /// All keys that begin with this, which ends with the separator.
    fn below(start: Box<str>) -> Self {
        let stem = start.strip_suffix(SEPARATOR).unwrap_or(&start);
        let end = format!("{stem}\u{1}").into();
        Self { start, end }
    }
}

impl fmt::Debug for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.start.replace(SEPARATOR, "/"))
    }
}

fn join(parts: &[&str]) -> Result<Box<str>, Error> {
    if parts.first().is_none_or(|resource| resource.is_empty()) {
        return Err(bad("the resource is empty"));
    }
    if parts.iter().any(|part| part.contains([SEPARATOR, '\u{1}'])) {
        return Err(bad("it has a control character"));
    }
    let joined = parts.join("\0");
    if joined.len() > KEY_BYTES_MAX {
        return Err(bad(&format!("it has {} bytes, and {KEY_BYTES_MAX} is the most", joined.len())));
    }
    Ok(joined.into())
}

fn bad(why: &str) -> Error {
    Error::Key(why.to_owned())
}
