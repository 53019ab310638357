use std::os::unix::fs::MetadataExt;

use super::*;

#[tokio::test]
async fn the_files_are_their_owners_alone() {
    let folder = tempfile::tempdir().unwrap();
    let inner = folder.path().join("a/b");
    let store = open(&inner);
    assert_eq!(inner.metadata().unwrap().mode() & 0o777, 0o700);
    for file in std::fs::read_dir(&inner).unwrap() {
        assert_eq!(file.unwrap().metadata().unwrap().mode() & 0o777, 0o600);
    }
    store.close().await;
}

#[tokio::test]
async fn a_second_process_is_told_that_the_store_is_in_use() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    // The lock is of the open file, as if another process had it.
    let error = Store::open(folder.path(), Options::default()).unwrap_err();
    assert!(error.to_string().contains("is in use by another process"), "{error}");
    store.close().await;
    let store = open(folder.path());
    drop(store.watch(&all(), 0).unwrap());
    store.close().await;
}

#[tokio::test]
async fn a_closed_store_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let mut watch = store.watch(&all(), 0).unwrap();
    store.write(put(&key("", "x"), 1)).await.unwrap();
    store.close().await;
    store.close().await;
    assert_eq!(watch.next().await.unwrap().revision, 1);
    assert!(matches!(watch.next().await, Err(End::Closed)));
    assert!(matches!(store.write(put(&key("", "x"), 2)).await, Err(Error::Closed)));
    assert!(matches!(store.get(&key("", "x")), Err(Error::Closed)));
    assert!(matches!(store.watch(&all(), 1), Err(Error::Closed)));
}

#[tokio::test]
async fn a_store_of_another_format_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    open(folder.path()).close().await;
    let db = Database::open(folder.path().join("objects.redb")).unwrap();
    let txn = db.begin_write().unwrap();
    txn.open_table(tables::STATE).unwrap().insert("format", 7).unwrap();
    txn.commit().unwrap();
    drop(db);
    let error = Store::open(folder.path(), Options::default()).unwrap_err();
    assert_eq!(error.to_string(), "the store has format 7, and this program knows 1: use a newer one");
    std::fs::write(folder.path().join("objects.redb"), "something else").unwrap();
    assert!(matches!(Store::open(folder.path(), Options::default()), Err(Error::Storage(_))));
}

#[tokio::test]
async fn a_file_that_is_mostly_empty_is_made_small() {
    let folder = tempfile::tempdir().unwrap();
    let options = Options { history_events_max: 10, ..Options::default() };
    let store = Store::open(folder.path(), options).unwrap();
    let large = Object::from_iter([("spec".to_owned(), json!({"number": 1, "text": "x".repeat(1 << 20)}))]);
    let large = Draft::new(&large).unwrap();
    let keys: Vec<_> = (0..48).map(|name| key("", &format!("x{name:02}"))).collect();
    for keys in keys.chunks(8) {
        let write = |key: &Key| Write { value: Some(large.clone()), ..put(key, 0) };
        store.write_all(keys.iter().map(write).collect()).await.unwrap();
    }
    let file = folder.path().join("objects.redb");
    let full = file.metadata().unwrap().len();
    assert!(full > 48 << 20, "{full}");
    for key in &keys[1..] {
        store.write(delete(key)).await.unwrap();
    }
    // The history forgets them with these.
    for number in 0..20 {
        store.write(put(&key("", "small"), number)).await.unwrap();
    }
    store.close().await;
    let small = file.metadata().unwrap().len();
    assert!(small < 16 << 20, "{small}");
    let store = Store::open(folder.path(), options).unwrap();
    let list = store.list(&all(), &Place::default(), 100).unwrap();
    assert_eq!(list.texts.iter().map(|text| parse(text)).collect::<Vec<_>>(), [(115, 19), (1, 1)]);
    store.close().await;
}
