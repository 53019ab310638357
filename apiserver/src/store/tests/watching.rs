use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_watchers_get_every_event_in_order() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let of = |namespace: u64| format!("n{}", namespace % 4);
    store.write(put(&key("n0", "first"), 0)).await.unwrap();
    let watchers: Vec<_> = (0..200u64)
        .map(|index| {
            let namespace = of(index);
            // Half of them see all, some from the history.
            let range = if index < 100 { all() } else { Range::namespace(RESOURCE, &namespace).unwrap() };
            let mut watch = store.watch(&range, index % 2).unwrap();
            tokio::spawn(async move {
                let mut seen = Vec::new();
                loop {
                    let event = watch.next().await.unwrap();
                    if event.key.name() == "last" && event.key.namespace() == namespace {
                        return (range, index % 2, seen);
                    }
                    seen.push((event.revision, number(event.after.as_ref())));
                }
            })
        })
        .collect();
    let writers: Vec<_> = (0..16u64)
        .map(|writer| {
            let (store, namespace) = (store.clone(), of(writer));
            tokio::spawn(async move {
                let mut made = Vec::new();
                for number in 0..20 {
                    let key = key(&namespace, &format!("w{writer}-{}", number % 3));
                    let write = if number % 5 == 4 { delete(&key) } else { put(&key, number) };
                    if let Ok(event) = store.write(write).await {
                        made.push(event);
                    }
                }
                made
            })
        })
        .collect();
    let mut made = vec![(1, key("n0", "first"), Some(0))];
    for writer in writers {
        let events = writer.await.unwrap();
        made.extend(
            events.iter().map(|event| (event.revision, event.key.clone(), number(event.after.as_ref()))),
        );
    }
    made.sort();
    // In this order, so that each watcher ends behind all.
    for namespace in 0..4 {
        store.write(put(&key(&of(namespace), "last"), 0)).await.unwrap();
    }
    for watcher in watchers {
        let (range, from, seen) = watcher.await.unwrap();
        let seen: Vec<_> = seen.into_iter().filter(|(revision, _)| *revision <= made.len() as u64).collect();
        let expected = made.iter().filter(|(revision, key, _)| *revision > from && range.has(key));
        assert_eq!(seen, expected.map(|(revision, _, number)| (*revision, *number)).collect::<Vec<_>>());
    }
}

#[tokio::test]
async fn a_slow_watcher_is_ended_alone_and_goes_on_where_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let mut slow = store.watch(&all(), 0).unwrap();
    let mut elsewhere = store.watch(&Range::namespace(RESOURCE, "b").unwrap(), 0).unwrap();
    let mut quick = store.watch(&all(), 0).unwrap();
    let large = Object::from_iter([("spec".to_owned(), json!({"number": 5, "text": "x".repeat(2 << 20)}))]);
    let large = Write { value: Some(Draft::new(&large).unwrap()), ..put(&key("a", "x"), 0) };
    // Each event has the text before and the one after, but for the first.
    for _ in 0..8 {
        let event = store.write(large.clone()).await.unwrap();
        assert_eq!(quick.next().await.unwrap().revision, event.revision);
    }
    assert_eq!(store.stats().watches, 2);
    store.write(put(&key("b", "y"), 1)).await.unwrap();
    assert_eq!(quick.next().await.unwrap().revision, 9);
    assert_eq!(elsewhere.next().await.unwrap().revision, 9);
    let mut last = 0;
    let end = loop {
        match slow.next().await {
            Ok(event) => {
                assert_eq!(event.revision, last + 1);
                last = event.revision;
            }
            Err(end) => break end,
        }
    };
    assert!(matches!(end, End::Slow), "{end:?}");
    assert!(matches!(slow.next().await, Err(End::Slow)));
    assert_eq!(slow.revision(), last);
    assert!((1..8).contains(&last));
    let mut again = store.watch(&all(), slow.revision()).unwrap();
    for revision in last + 1..=9 {
        assert_eq!(again.next().await.unwrap().revision, revision);
    }
}

#[tokio::test]
async fn a_watcher_with_too_many_events_is_ended() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let mut slow = store.watch(&all(), 0).unwrap();
    for round in 0..=(QUEUE_EVENTS_MAX / 512) as u64 {
        let writes = (0..512).map(|name| put(&key("a", &format!("x{name}")), round)).collect();
        store.write_all(writes).await.unwrap();
    }
    assert_eq!(store.stats().watches, 0);
    for revision in 1..=QUEUE_EVENTS_MAX as u64 {
        assert_eq!(slow.next().await.unwrap().revision, revision);
    }
    assert!(matches!(slow.next().await, Err(End::Slow)));
}

#[tokio::test]
async fn a_bookmark_is_never_ahead_of_the_events() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let mut watch = store.watch(&Range::namespace(RESOURCE, "a").unwrap(), 0).unwrap();
    store.write(put(&key("b", "x"), 1)).await.unwrap();
    assert_eq!(watch.revision(), 1, "what is elsewhere was seen");
    store.write(put(&key("a", "x"), 1)).await.unwrap();
    store.write(put(&key("b", "x"), 1)).await.unwrap();
    assert!(watch.revision() < 2, "the event of 2 was not handed out");
    assert_eq!(watch.next().await.unwrap().revision, 2);
    assert_eq!(watch.revision(), 3);
    let late = store.watch(&Range::namespace(RESOURCE, "a").unwrap(), 0).unwrap();
    assert!(late.revision() < 2, "the history was not handed out");
}

#[tokio::test]
async fn events_are_shared_by_their_watchers() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let (mut one, mut other) = (store.watch(&all(), 0).unwrap(), store.watch(&all(), 0).unwrap());
    store.write(put(&key("a", "x"), 1)).await.unwrap();
    store.write(delete(&key("a", "x"))).await.unwrap();
    for _ in 0..2 {
        let (one, other) = (one.next().await.unwrap(), other.next().await.unwrap());
        assert!(Arc::ptr_eq(&one, &other));
        assert_eq!(one.gone().as_ptr(), other.gone().as_ptr());
    }
}

#[tokio::test]
async fn who_waits_for_a_revision_waits_until_it_is_there() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let waiting = tokio::spawn({
        let store = store.clone();
        async move {
            store.wait_for(2).await;
            store.snapshot().unwrap().revision()
        }
    });
    store.write(put(&key("a", "x"), 1)).await.unwrap();
    store.write(put(&key("a", "x"), 2)).await.unwrap();
    assert!(waiting.await.unwrap() >= 2);
}

#[tokio::test]
async fn a_history_beyond_its_bounds_is_forgotten() {
    let trims = async |options: Options| {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path(), options).unwrap();
        for number in 0..100 {
            store.write(put(&key("a", &format!("x{}", number % 10)), number)).await.unwrap();
        }
        let state = store.stats().state;
        let too_old = store.watch(&all(), state.trimmed.saturating_sub(1));
        assert_eq!(too_old.is_err(), state.trimmed > 0);
        let at = Place { revision: Some(state.trimmed), ..Place::default() };
        assert_eq!(store.list(&all(), &at, 100).unwrap().texts.len() as u64, state.trimmed.min(10));
        state
    };
    assert_eq!(trims(Options::default()).await.trimmed, 0);
    assert_eq!(trims(Options { history_events_max: 30, ..Options::default() }).await.trimmed, 70);
    let bytes = trims(Options { history_bytes_max: 2000, ..Options::default() }).await;
    assert!(bytes.history_bytes <= 2000 && bytes.trimmed > 80, "{bytes:?}");
}
