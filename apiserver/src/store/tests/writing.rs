use super::*;

#[tokio::test]
async fn a_write_is_read_with_its_revision_inside() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let made = store.write(put(&key("a", "x"), 1)).await.unwrap();
    assert_eq!(
        (made.revision, number(made.before.as_ref()), number(made.after.as_ref())),
        (1, None, Some(1))
    );
    let changed = store.write(put(&key("a", "x"), 2)).await.unwrap();
    assert_eq!(
        (changed.revision, number(changed.before.as_ref()), number(changed.after.as_ref())),
        (2, Some(1), Some(2))
    );
    let read = store.get(&key("a", "x")).unwrap().unwrap();
    assert_eq!(parse(read.json()), (2, 2));
    assert_eq!(store.get(&key("a", "y")).unwrap(), None);
    let gone = store.write(delete(&key("a", "x"))).await.unwrap();
    assert_eq!(
        (gone.revision, number(gone.before.as_ref()), number(gone.after.as_ref())),
        (3, Some(2), None)
    );
    assert_eq!(parse(&gone.gone()), (3, 2));
    assert_eq!(store.get(&key("a", "x")).unwrap(), None);
    assert_eq!(store.revision(), 3);
}

#[test]
fn a_draft_is_the_object_with_a_resource_version_in_its_place() {
    for text in [
        json!({}),
        json!({"metadata": null, "a": 1}),
        json!({"metadata": {}, "z": {"metadata": {"resourceVersion": "7"}}}),
        json!({"metadata": {"resourceVersion": "7", "name": "\"resourceVersion\":\"\"", "uid": "u", "z": {}}}),
        json!({"metadata": {"resourceVersion": 7, "a\"b": "\u{7}"}, "kind": "K", "\n": []}),
    ] {
        let mut object = text.as_object().unwrap().clone();
        let draft = Draft::new(&object).unwrap();
        for revision in [1, 9, 10, 12345, u64::MAX] {
            let text = draft.clone().at_revision(revision);
            object::metadata_mut(&mut object).insert("resourceVersion".into(), revision.to_string().into());
            assert_eq!(std::str::from_utf8(text.json()).unwrap(), serde_json::to_string(&object).unwrap());
            let stored = Text::from_stored(revision, &text.stored(), bytes::Bytes::copy_from_slice).unwrap();
            assert_eq!(stored, text);
            object::metadata_mut(&mut object).insert("resourceVersion".into(), "99".into());
            assert_eq!(stored.with_revision(99), serde_json::to_string(&object).unwrap());
        }
    }
    let large = Object::from_iter([("a".to_owned(), "x".repeat(TEXT_BYTES_MAX).into())]);
    assert!(matches!(Draft::new(&large), Err(Error::TooLarge { .. })));
}

#[test]
fn a_key_that_would_leave_its_range_is_refused() {
    for (resource, namespace, name) in [
        ("", "", "x"),
        ("r", "", ""),
        ("r\0", "", "x"),
        ("r", "a\0b", "x"),
        ("r", "a\u{1}", "x"),
        ("r", "", &"x".repeat(1100)),
    ] {
        assert!(
            matches!(Key::new(resource, namespace, name), Err(Error::Key(_))),
            "{resource:?} {namespace:?} {name:?}"
        );
    }
    let key = Key::new("g/r", "ns", "x").unwrap();
    assert_eq!((key.resource(), key.namespace(), key.name()), ("g/r", "ns", "x"));
    for (range, has) in [
        (Range::resource("g/r"), true),
        (Range::resource("g"), false),
        (Range::resource("g/r2"), false),
        (Range::namespace("g/r", "ns"), true),
        (Range::namespace("g/r", "n"), false),
        (Range::namespace("g/r", ""), false),
        (Ok(Range::object(&key)), true),
        (Ok(Range::object(&Key::new("g/r", "ns", "xy").unwrap())), false),
        (Ok(Range::object(&Key::new("g/r", "ns", "w").unwrap())), false),
    ] {
        let range = range.unwrap();
        assert_eq!(range.has(&key), has, "{range:?}");
    }
}

#[tokio::test]
async fn what_is_not_as_expected_is_not_written() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let x = key("", "x");
    let with = |expect, value: Option<u64>| Write {
        expect,
        value: value.and_then(|n| put(&x, n).value),
        key: x.clone(),
    };
    let refused = async |write: Write| match store.write(write).await {
        Err(Error::Conflict { current, .. }) => current,
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(with(Expect::Present, Some(1))).await, None);
    assert_eq!(refused(with(Expect::Revision(1), Some(1))).await, None);
    assert_eq!(refused(with(Expect::Any, None)).await, None);
    assert_eq!(store.stats().transactions, 0, "nothing was written, so nothing is synced");
    store.write(with(Expect::Absent, Some(1))).await.unwrap();
    assert_eq!(refused(with(Expect::Absent, Some(2))).await, Some(1));
    assert_eq!(refused(with(Expect::Revision(7), Some(2))).await, Some(1));
    assert_eq!(refused(with(Expect::Revision(7), None)).await, Some(1));
    store.write(with(Expect::Revision(1), Some(2))).await.unwrap();
    store.write(with(Expect::Present, Some(3))).await.unwrap();
    store.write(with(Expect::Revision(3), None)).await.unwrap();
    assert_eq!(store.revision(), 4);
}

#[tokio::test]
async fn the_errors_are_told_as_kubernetes_tells_them() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let x = key("", "x");
    let tell = async |expect| {
        let status: crate::status::Status =
            store.write(Write { expect, ..put(&x, 1) }).await.unwrap_err().into();
        (status.reason.code(), status.message)
    };
    assert_eq!(tell(Expect::Revision(4)).await, (404, "things.example.com \"x\" not found".to_owned()));
    store.write(put(&x, 1)).await.unwrap();
    assert_eq!(tell(Expect::Absent).await, (409, "things.example.com \"x\" already exists".to_owned()));
    let text = "Operation cannot be fulfilled on things.example.com \"x\": the object has been modified; \
                please apply your changes to the latest version and try again";
    assert_eq!(tell(Expect::Revision(4)).await, (409, text.to_owned()));
    let at = |revision| Place { revision: Some(revision), ..Place::default() };
    let status: crate::status::Status = store.list(&all(), &at(9), 1).unwrap_err().into();
    assert_eq!(
        (status.reason.code(), status.message.as_str()),
        (504, "Timeout: Too large resource version: 9, current: 1")
    );
    assert_eq!(status.details.causes[0].reason, "ResourceVersionTooLarge");
    let status: crate::status::Status = Error::TooOld { revision: 3, oldest: 9 }.into();
    assert_eq!((status.reason.code(), status.message.as_str()), (410, "too old resource version: 3 (9)"));
}

#[tokio::test]
async fn writes_together_are_all_there_or_none() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let (x, y, z) = (key("", "x"), key("", "y"), key("", "z"));
    let events = store.write_all(vec![put(&y, 1), put(&x, 2)]).await.unwrap();
    assert_eq!(
        events.iter().map(|event| (event.revision, event.key.name())).collect::<Vec<_>>(),
        [(1, "y"), (2, "x")]
    );
    let refused = store.write_all(vec![put(&z, 3), Write { expect: Expect::Absent, ..put(&x, 4) }]).await;
    assert!(matches!(refused, Err(Error::Conflict { current: Some(2), .. })), "{refused:?}");
    assert_eq!(store.get(&z).unwrap(), None);
    let twice = store.write_all(vec![put(&z, 3), delete(&z)]).await;
    assert!(matches!(twice, Err(Error::Twice(_))), "{twice:?}");
    assert_eq!(store.revision(), 2);
    let large = Object::from_iter([("a".to_owned(), "x".repeat(TEXT_BYTES_MAX - 100).into())]);
    let write =
        |i: u32| Write { value: Some(Draft::new(&large).unwrap()), ..put(&key("", &format!("{i}")), 0) };
    let many = store.write_all((0..6).map(write).collect()).await;
    assert!(matches!(many, Err(Error::TooLarge { .. })), "{many:?}");
}

#[tokio::test]
async fn writes_that_wait_are_committed_together() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let writers: Vec<_> = (0..64)
        .map(|writer| {
            let store = store.clone();
            tokio::spawn(async move {
                let mut last = 0;
                for number in 0..8 {
                    let event = store.write(put(&key("", &format!("w{writer}")), number)).await.unwrap();
                    assert!(event.revision > last);
                    last = event.revision;
                }
            })
        })
        .collect();
    for writer in writers {
        writer.await.unwrap();
    }
    let stats = store.stats();
    assert_eq!((stats.writes, stats.state.revision), (512, 512));
    // 64 wait for each sync; that so many find another transaction would be a queue that is not grouped.
    assert!(stats.transactions < 256, "{stats:?}");
}
