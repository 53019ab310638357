use super::super::journal::{Group, Journal, encode};
use super::*;

fn file(folder: &Path) -> Box<dyn JournalFile> {
    InFolder(folder.to_owned()).open_journal(16 * 4096).unwrap()
}

/// A group of writes to `x` and `y`, the second of which deletes.
fn group(first: u64, bytes: usize) -> (Group, Vec<u8>) {
    let object = Object::from_iter([("text".to_owned(), "x".repeat(bytes).into())]);
    let text = Draft::new(&object).unwrap().at_revision(first);
    let events = [
        Arc::new(Event::new(first, key("a", "x"), None, Some(text.clone()))),
        Arc::new(Event::new(first + 1, key("a", "y"), Some(text.clone()), None)),
    ];
    let writes = vec![(key("a", "x"), Some(text)), (key("a", "y"), None)];
    (Group { first, time: 99, writes }, encode(99, events.iter()))
}

fn read(folder: &Path, epoch: u64) -> Vec<Group> {
    let mut journal = Journal::new(file(folder), epoch).unwrap();
    std::iter::from_fn(|| journal.read().unwrap()).collect()
}

#[test]
fn a_journal_gives_the_groups_of_its_epoch_back() {
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(read(folder.path(), 1), []);
    let mut journal = Journal::new(file(folder.path()), 1).unwrap();
    for (first, bytes) in [(1, 10), (3, 5000), (5, 4000)] {
        journal.append(group(first, bytes).1).unwrap();
    }
    let written = [group(1, 10).0, group(3, 5000).0, group(5, 4000).0];
    assert_eq!(read(folder.path(), 1), written);
    assert_eq!(written[2].last(), 6);
    assert_eq!(read(folder.path(), 2), [], "the journal of an epoch that has none");
    journal.begin(2);
    journal.append(group(7, 100).1).unwrap();
    assert_eq!(read(folder.path(), 2), [group(7, 100).0], "what is behind it is of an older epoch");
    assert_eq!(read(folder.path(), 1), []);
}

#[test]
fn a_journal_that_is_read_goes_on_behind_it() {
    let folder = tempfile::tempdir().unwrap();
    for first in [1, 3, 5] {
        let mut journal = Journal::new(file(folder.path()), 1).unwrap();
        while journal.read().unwrap().is_some() {}
        journal.append(group(first, 10).1).unwrap();
    }
    assert_eq!(read(folder.path(), 1).iter().map(|group| group.first).collect::<Vec<_>>(), [1, 3, 5]);
}

#[test]
fn a_group_that_is_not_whole_is_none() {
    let folder = tempfile::tempdir().unwrap();
    let mut journal = Journal::new(file(folder.path()), 1).unwrap();
    journal.append(group(1, 10).1).unwrap();
    journal.append(group(3, 300).1).unwrap();
    let path = folder.path().join("journal");
    let whole = std::fs::read(&path).unwrap();
    let length = group(3, 300).1.len();
    for at in 4096..4096 + length {
        let mut torn = whole.clone();
        torn[at] ^= 1 << (at % 8);
        std::fs::write(&path, torn).unwrap();
        assert_eq!(read(folder.path(), 1), [group(1, 10).0], "at {at}");
    }
}

#[test]
fn a_journal_that_is_full_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let mut journal = Journal::new(file(folder.path()), 1).unwrap();
    let mut groups = 0;
    while journal.fits(&group(1, 10).1) {
        journal.append(group(1 + 2 * groups, 10).1).unwrap();
        groups += 1;
    }
    assert_eq!(groups, 16);
    assert_eq!(read(folder.path(), 1).len(), 16);
}

#[tokio::test]
async fn a_journal_without_its_beginning_is_damage_and_no_loss_in_silence() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    store.write(put(&key("", "x"), 1)).await.unwrap();
    store.close().await;
    let epoch = 2;
    let mut journal = Journal::new(file(folder.path()), epoch).unwrap();
    journal.append(group(7, 10).1).unwrap();
    let error = Store::open(folder.path(), Options::default()).unwrap_err();
    assert_eq!(error.to_string(), "the store is damaged: the journal goes on at 7, and the objects end at 1");
}
