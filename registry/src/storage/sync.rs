//! Durable, atomic placement of files.
//!
//! Every file is written under `dvcr/tmp`, synced, renamed to its place, and then the directories on its way are synced:
//!
//! ```text
//! Temp::write ──fdatasync──> Changes::place ──mkdir, rename──> Changes::sync ──fsync of directories──> answer 201
//!      │ crash: a nameless leftover          │ crash: all or nothing      │ crash: durable, never acknowledged
//! ```
//!
//! A directory is an entry in its parent, so a new file is durable only when its whole chain of directories is. Syncing
//! the chain each time would cost more than the file: [`Dirs`] remembers which directories are known to be durable.

use std::collections::{BTreeSet, HashSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Directories remembered as durable; when more are seen all are forgotten, and synced again when met.
const DURABLE_DIRS_MAX: usize = 8192;
/// Rounds of making a directory and finding it deleted again by a concurrent removal.
const PLACE_ATTEMPTS_MAX: u32 = 8;

/// Makes and syncs directories below a root.
#[derive(Debug)]
pub(crate) struct Dirs {
    root: PathBuf,
    tmp: PathBuf,
    temp_count: AtomicU64,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    /// Directories whose entry in their parent, and so on up to the root, is on disk.
    durable: HashSet<PathBuf>,
    /// Counts removals, so that a sync that overlaps one does not remember what may be gone.
    removals: u64,
}

impl Dirs {
    /// `tmp` must lie on the same filesystem as `root`, and belong to this process alone.
    pub(crate) fn new(root: &Path, tmp: &Path) -> Self {
        Self {
            root: root.to_owned(),
            tmp: tmp.to_owned(),
            temp_count: AtomicU64::new(0),
            known: Mutex::default(),
        }
    }

    /// Begins a set of changes that become durable together.
    pub(crate) fn changes(&self) -> Changes<'_> {
        Changes { dirs: self, touched: BTreeSet::new() }
    }

    /// Returns a path in `tmp` that nobody uses.
    pub(crate) fn temp_path(&self) -> PathBuf {
        self.tmp.join(format!("{:x}", self.temp_count.fetch_add(1, Ordering::Relaxed)))
    }

    /// Writes a new file and syncs its data.
    pub(crate) fn write_temp(&self, bytes: &[u8]) -> io::Result<Temp> {
        let temp = Temp { path: self.temp_path(), kept: false };
        let mut file = OpenOptions::new().write(true).create_new(true).open(&temp.path)?;
        file.write_all(bytes)?;
        file.sync_data()?;
        Ok(temp)
    }

    /// Makes a directory with its parents, without syncing anything.
    pub(crate) fn make(&self, dir: &Path) -> io::Result<()> {
        let mut attempt = 1;
        loop {
            match (self.make_one(dir), dir.parent()) {
                // A removal may take the parent between the two calls.
                (Err(error), Some(parent))
                    if error.kind() == ErrorKind::NotFound
                        && dir != self.root
                        && attempt < PLACE_ATTEMPTS_MAX =>
                {
                    self.make(parent)?;
                    attempt += 1;
                }
                (done, _) => return done,
            }
        }
    }

    fn make_one(&self, dir: &Path) -> io::Result<()> {
        // Under the lock, so that nobody meets the new directory while one it replaces still counts as durable.
        let mut known = self.known();
        match fs::create_dir(dir) {
            Ok(()) => {
                known.durable.remove(dir);
                Ok(())
            }
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Moves a directory away and deletes it, so that no half of it is ever seen; durable when it returns.
    ///
    /// Returns whether there was one.
    pub(crate) fn remove_tree(&self, dir: &Path) -> io::Result<bool> {
        let grave = self.temp_path();
        {
            let mut known = self.known();
            match fs::rename(dir, &grave) {
                Ok(()) => {
                    known.removals += 1;
                    known.durable.retain(|path| !path.starts_with(dir));
                }
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        if let Some(parent) = dir.parent() {
            sync_dir(parent)?;
        }
        fs::remove_dir_all(&grave)?;
        Ok(true)
    }

    /// Removes `trees` below `dir` if they hold nothing but empty directories, and then `dir` and `parts` of it that are
    /// empty; returns whether it removed a tree. The caller sees to it that nobody places anything in the trees meanwhile.
    pub(crate) fn remove_empty(&self, dir: &Path, trees: &[&str], parts: &[&str]) -> io::Result<bool> {
        let mut found = false;
        for tree in trees {
            match is_empty_tree(&dir.join(tree)) {
                Ok(true) => found = true,
                Ok(false) => return Ok(false),
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        let mut known = self.known();
        known.removals += 1;
        known.durable.retain(|path| !path.starts_with(dir));
        for tree in trees {
            match fs::remove_dir_all(dir.join(tree)) {
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        // These stay when somebody has put something into them.
        for part in parts {
            let _ = fs::remove_dir(dir.join(part));
        }
        let _ = fs::remove_dir(dir);
        Ok(found)
    }

    /// Removes a file durably; returns whether there was one.
    pub(crate) fn remove_file(&self, file: &Path) -> io::Result<bool> {
        match fs::remove_file(file) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        }
        if let Some(parent) = file.parent() {
            sync_dir(parent)?;
        }
        Ok(true)
    }

    fn sync(&self, touched: &BTreeSet<PathBuf>) -> io::Result<()> {
        let mut todo = BTreeSet::new();
        let mut reached = Vec::new();
        let known = self.known();
        let removals = known.removals;
        for leaf in touched {
            let mut dir = leaf.as_path();
            todo.insert(dir);
            while let Some(parent) = dir.parent().filter(|_| dir != self.root && !known.durable.contains(dir))
            {
                todo.insert(parent);
                // The leaves, one per blob, are not worth remembering: few are written to twice.
                if dir != leaf {
                    reached.push(dir.to_owned());
                }
                dir = parent;
            }
        }
        drop(known);
        for dir in todo {
            sync_dir(dir)?;
        }
        let mut known = self.known();
        if known.removals == removals {
            if known.durable.len() + reached.len() > DURABLE_DIRS_MAX {
                known.durable.clear();
            }
            known.durable.extend(reached);
        }
        Ok(())
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A synced file in `tmp`; dropping it before it was placed removes it.
#[derive(Debug)]
pub(crate) struct Temp {
    path: PathBuf,
    kept: bool,
}

impl Temp {
    /// Moves the file into a directory that is itself on its way to its place.
    pub(crate) fn move_to(mut self, path: &Path) -> io::Result<()> {
        fs::rename(&self.path, path)?;
        self.kept = true;
        Ok(())
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        if !self.kept {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Changes that are durable once [`Changes::sync`] has returned; until then a crash may undo any of them.
#[derive(Debug)]
pub(crate) struct Changes<'a> {
    dirs: &'a Dirs,
    touched: BTreeSet<PathBuf>,
}

impl Changes<'_> {
    /// Moves a synced file to its place, over what is there.
    pub(crate) fn place(&mut self, mut temp: Temp, to: &Path) -> io::Result<()> {
        self.rename(&temp.path, to)?;
        temp.kept = true;
        Ok(())
    }

    /// Moves a file or directory, whose content is synced, to its place.
    pub(crate) fn rename(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        let Some(parent) = to.parent() else { return Err(ErrorKind::InvalidInput.into()) };
        let mut attempt = 1;
        loop {
            self.dirs.make(parent)?;
            match fs::rename(from, to) {
                Ok(()) => break,
                // A removal took the directory between the two calls.
                Err(error) if error.kind() == ErrorKind::NotFound && attempt < PLACE_ATTEMPTS_MAX => {
                    fs::symlink_metadata(from)?;
                    attempt += 1;
                }
                Err(error) => return Err(error),
            }
        }
        self.touched.insert(parent.to_owned());
        Ok(())
    }

    /// Counts a directory as changed, though somebody else may have changed it.
    pub(crate) fn touch(&mut self, dir: &Path) {
        self.touched.insert(dir.to_owned());
    }

    /// Syncs every directory that the changes depend on.
    pub(crate) fn sync(self) -> io::Result<()> {
        self.dirs.sync(&self.touched)
    }
}

fn is_empty_tree(dir: &Path) -> io::Result<bool> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if !entry.file_type()?.is_dir() || !is_empty_tree(&entry.path())? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Syncs the entries of a directory; one that is gone has none.
pub(crate) fn sync_dir(dir: &Path) -> io::Result<()> {
    match File::open(dir) {
        Ok(dir) => dir.sync_all(),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dirs() -> (tempfile::TempDir, Dirs) {
        let root = tempfile::tempdir().unwrap();
        let tmp = root.path().join("tmp");
        fs::create_dir(&tmp).unwrap();
        let dirs = Dirs::new(root.path(), &tmp);
        (root, dirs)
    }

    #[test]
    fn a_placed_file_is_there_and_tmp_is_empty() {
        let (root, dirs) = dirs();
        let to = root.path().join("a/b/c/file");
        let mut changes = dirs.changes();
        changes.place(dirs.write_temp(b"new").unwrap(), &to).unwrap();
        changes.sync().unwrap();
        drop(dirs.write_temp(b"never placed").unwrap());
        assert_eq!(fs::read(&to).unwrap(), b"new");
        assert_eq!(fs::read_dir(root.path().join("tmp")).unwrap().count(), 0);
        let known = dirs.known();
        assert!(known.durable.contains(&root.path().join("a/b")));
        assert!(!known.durable.contains(&root.path().join("a/b/c")), "leaves are not remembered");
    }

    #[test]
    fn a_directory_made_again_is_not_taken_for_durable() {
        let (root, dirs) = dirs();
        let file = root.path().join("a/b/c/file");
        for _ in 0..2 {
            let mut changes = dirs.changes();
            changes.place(dirs.write_temp(b"x").unwrap(), &file).unwrap();
            changes.sync().unwrap();
            // Behind our back, as an administrator would.
            fs::remove_dir_all(root.path().join("a")).unwrap();
            dirs.make(&root.path().join("a/b")).unwrap();
            assert!(dirs.known().durable.is_empty());
        }
        assert!(dirs.remove_tree(&root.path().join("a")).unwrap());
        assert!(!dirs.remove_tree(&root.path().join("a")).unwrap());
    }
}
