//! The disk among the files of an image, as a file system merged of its layers shows it.
//!
//! ```text
//!  layer 3   disk/.wh.old.img        ──> hides disk/old.img below it
//!  layer 2   disk/vm.img             ──> the disk
//!  layer 1   disk/old.img, disk/vm.img
//! ```

use std::collections::BTreeSet;

use crate::tar::{DISK_DIRECTORY, Entries, Entry, Kind, Source};
use crate::{Error, ErrorKind, Result};

/// Most files below `disk/`, and most white-outs, that are kept in mind for one image.
const NAMES_MAX: usize = 1024;
/// Longest path that is kept in mind, bytes; that of Linux.
const PATH_BYTES_MAX: usize = 4096;
const WHITE_OUT: &str = ".wh.";
/// Names of the layering itself; only the one of an opaque directory means something.
const WHITE_OUT_META: &str = ".wh..wh.";
const OPAQUE: &str = ".wh..wh..opq";

/// A disk file found in a layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    /// Without a leading `./`.
    pub(crate) path: String,
    /// Bytes.
    pub(crate) size: u64,
    /// Where its first byte is in the tar.
    pub(crate) offset: u64,
}

impl Found {
    /// The last component of the path.
    pub(crate) fn file_name(&self) -> &str {
        self.path.rsplit('/').next().unwrap_or(&self.path)
    }
}

/// What the layers above hide of those below.
#[derive(Clone, Debug, Default)]
pub(crate) struct Hidden {
    /// The path and everything below it; the empty path is the root.
    trees: BTreeSet<String>,
    /// The path alone.
    files: BTreeSet<String>,
}

/// How much of a layer is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reach {
    /// All of it: of several entries with one name the last is the file.
    Whole,
    /// Up to the disk; [`refuse_another`] looks at the rest when it has been read.
    FirstDisk,
}

/// Finds the first regular, not empty file below `disk/` that neither the layers above nor a later entry of this one
/// hide. What the layer hides of those below is added to `hidden`.
pub(crate) fn find_disk(
    source: &mut impl Source,
    hidden: &mut Hidden,
    reach: Reach,
) -> Result<Option<Found>> {
    let above = hidden.clone();
    let mut disks: Vec<Found> = Vec::new();
    let mut entries = Entries::new(source);
    while let Some(entry) = entries.next()? {
        disks.retain(|disk| !replaces(&entry, &disk.path));
        if is_disk(&entry) && !above.hides(&entry.path) {
            if entry.sparse {
                let text = format!("{:?} is stored as a sparse tar entry, which is not read", entry.path);
                return Err(Error::new(ErrorKind::Unsupported, text));
            }
            if disks.len() == NAMES_MAX {
                return Err(too_many());
            }
            disks.push(Found { path: entry.path.clone(), size: entry.size, offset: entry.offset });
            if reach == Reach::FirstDisk {
                break;
            }
        }
        hidden.add(&entry)?;
    }
    Ok(disks.into_iter().next())
}

/// Fails if an entry after the disk's takes its place, which only shows when the disk has been read already.
/// `source` stands behind the disk.
pub(crate) fn refuse_another(source: &mut impl Source, path: &str) -> Result<()> {
    let mut entries = Entries::new(source);
    while let Some(entry) = entries.next()? {
        if replaces(&entry, path) {
            let text = format!(
                "the layer holds {path:?} more than once, and only an uncompressed layer can be read then; push the \
                 image with the file once"
            );
            return Err(Error::new(ErrorKind::Unsupported, text));
        }
    }
    Ok(())
}

impl Hidden {
    fn hides(&self, path: &str) -> bool {
        self.files.contains(path)
            || self.trees.contains("")
            || self.trees.contains(path)
            || path.match_indices('/').any(|(at, _)| self.trees.contains(&path[..at]))
    }

    fn add(&mut self, entry: &Entry) -> Result<()> {
        let (parent, name) = entry.path.rsplit_once('/').unwrap_or(("", &entry.path));
        let (path, names) = if name == OPAQUE {
            (parent.to_owned(), &mut self.trees)
        } else if name.starts_with(WHITE_OUT_META) {
            return Ok(());
        } else if let Some(name) = name.strip_prefix(WHITE_OUT) {
            (if parent.is_empty() { name.to_owned() } else { format!("{parent}/{name}") }, &mut self.trees)
        } else if entry.kind == Kind::Directory {
            (entry.path.clone(), &mut self.files)
        } else {
            (entry.path.clone(), &mut self.trees)
        };
        let matters = path.is_empty() || path == DISK_DIRECTORY || is_below_disk(&path);
        if !matters || names.contains(&path) {
            return Ok(());
        }
        if names.len() == NAMES_MAX || path.len() > PATH_BYTES_MAX {
            return Err(too_many());
        }
        names.insert(path);
        Ok(())
    }
}

/// Whether the disk at `path` is gone once `entry` is unpacked over it.
fn replaces(entry: &Entry, path: &str) -> bool {
    match path.strip_prefix(entry.path.as_str()) {
        Some("") => true,
        Some(rest) => rest.starts_with('/') && entry.kind != Kind::Directory,
        None => false,
    }
}

fn is_disk(entry: &Entry) -> bool {
    let name = entry.path.rsplit('/').next().unwrap_or_default();
    entry.kind == Kind::File && entry.size > 0 && is_below_disk(&entry.path) && !name.starts_with(WHITE_OUT)
}

fn is_below_disk(path: &str) -> bool {
    let below = path.strip_prefix(DISK_DIRECTORY).is_some_and(|rest| rest.starts_with('/'));
    below && path.split('/').all(|part| part != "..")
}

fn too_many() -> Error {
    let text = format!("the image has more than {NAMES_MAX} names below disk/, or longer ones than are read");
    Error::new(ErrorKind::Unsupported, text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tar::Forward;
    use crate::tar::tests::entry;

    fn tar(entries: &[(&str, &[u8], u8)]) -> Vec<u8> {
        entries.iter().flat_map(|(path, content, kind)| entry(path, content, *kind)).collect()
    }

    /// The content of the disk that is found in layers from first to last.
    fn merged(layers: &[&[(&str, &[u8], u8)]]) -> Option<Vec<u8>> {
        let mut hidden = Hidden::default();
        layers.iter().rev().find_map(|layer| {
            let layer = tar(layer);
            let found = find_disk(&mut Forward(&layer[..]), &mut hidden, Reach::Whole).unwrap()?;
            let at = found.offset as usize;
            Some(layer[at..at + found.size as usize].to_vec())
        })
    }

    const FILE: u8 = b'0';
    const LINK: u8 = b'2';
    const DIRECTORY: u8 = b'5';

    #[test]
    fn the_disk_is_the_one_that_the_merged_layers_show() {
        let old: &[(&str, &[u8], u8)] = &[("disk/", b"", DIRECTORY), ("disk/old.img", b"old", FILE)];
        let shows_old = |above: &[(&str, &[u8], u8)]| merged(&[old, above]) == Some(b"old".to_vec());
        assert!(shows_old(&[]));
        assert!(shows_old(&[("disk/", b"", DIRECTORY), ("etc/.wh.disk", b"", FILE)]));
        assert!(shows_old(&[("disk/.wh.other.img", b"", FILE), ("disk/.wh..wh.plnk", b"", DIRECTORY)]));
        for above in [
            ("./disk/.wh.old.img", FILE),
            ("disk/.wh..wh..opq", FILE),
            (".wh.disk", FILE),
            (".wh..wh..opq", FILE),
            ("disk", LINK),
            ("disk/old.img", LINK),
            ("disk/old.img", FILE),
            ("disk/old.img/", DIRECTORY),
        ] {
            assert_eq!(merged(&[old, &[(above.0, b"", above.1)]]), None, "{above:?}");
        }
        let newer: &[(&str, &[u8], u8)] = &[("disk/new.img", b"new", FILE), ("disk/.wh.new.img", b"", FILE)];
        assert_eq!(merged(&[old, newer]).unwrap(), b"new", "a white-out is for the layers below");
        assert_eq!(merged(&[newer, old]).unwrap(), b"old", "the upper layer's comes first");
        assert_eq!(merged(&[newer, &[("disk/.wh.new.img", b"", FILE)], &[("etc/x", b"x", FILE)]]), None);
    }

    #[test]
    fn the_last_entry_of_a_name_is_the_file() {
        let twice: &[(&str, &[u8], u8)] = &[
            ("disk/vm.img", b"first", FILE),
            ("disk/b.img", b"other", FILE),
            ("./disk//vm.img", b"last", FILE),
        ];
        assert_eq!(merged(&[&twice[..1]]).unwrap(), b"first");
        assert_eq!(merged(&[&[twice[0], twice[2]]]).unwrap(), b"last");
        assert_eq!(merged(&[twice]).unwrap(), b"other");
        assert_eq!(merged(&[&[twice[0], ("disk", b"", LINK)]]), None);
        // Of a stream only the rest tells.
        let bytes = tar(&twice[1..]);
        refuse_another(&mut Forward(&bytes[..]), "disk/c.img").unwrap();
        let error = refuse_another(&mut Forward(&bytes[..]), "disk/vm.img").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
    }

    #[test]
    fn names_without_end_are_refused() {
        let names: Vec<_> = (0..=NAMES_MAX).map(|n| format!("disk/.wh.{n}")).collect();
        let bytes: Vec<u8> = names.iter().flat_map(|name| entry(name, b"", FILE)).collect();
        let found = find_disk(&mut Forward(&bytes[..]), &mut Hidden::default(), Reach::Whole);
        assert_eq!(found.unwrap_err().kind(), ErrorKind::Unsupported);
    }
}
