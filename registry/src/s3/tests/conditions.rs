//! What decides between two who write: conditions, and the time of a request.

use std::time::SystemTime;

use super::*;

#[tokio::test]
async fn one_of_many_who_create_an_object_wins() {
    // moto looks whether there is an object and makes it in two steps, between which others do the same.
    let fixture = Fixture::minio().await;
    let client = &fixture.client;
    let writes = (0..8).map(|writer| {
        let content = Bytes::from(format!("writer {writer}"));
        async move { client.put("lease", content.clone(), Put::new()).await.map(|etag| (etag, content)) }
    });
    let done = futures_util::future::join_all(writes).await;
    let (won, lost): (Vec<_>, Vec<_>) = done.into_iter().partition(|written| written.is_ok());
    let won: Vec<_> = won.into_iter().map(Result::unwrap).collect();
    let [(etag, content)] = &won[..] else { panic!("one writer wins, not {won:?}; the others: {lost:?}") };
    assert!(lost.into_iter().all(|lost| lost.unwrap_err().kind() == Kind::Precondition));
    let object = client.get("lease", 100).await.unwrap();
    assert_eq!((&object.content, &object.etag), (content, etag));
}

#[tokio::test]
async fn one_of_many_who_replace_an_object_wins() {
    let fixture = Fixture::minio().await;
    let client = &fixture.client;
    let mut etag = fixture.put("lease", b"first").await;
    for round in 0..3 {
        let writes = (0..8).map(|writer| {
            let (content, put) = (Bytes::from(format!("{round} {writer}")), Put::over(&*etag));
            client.put("lease", content, put)
        });
        let done = futures_util::future::join_all(writes).await;
        let mut won: Vec<_> = done.into_iter().filter_map(Result::ok).collect();
        assert_eq!(won.len(), 1);
        etag = won.remove(0);
        assert_eq!(client.head("lease").await.unwrap().etag, etag);
    }
    let error = client.put("none", Bytes::new(), Put::over(etag)).await.unwrap_err();
    assert!(matches!(error.kind(), Kind::NotFound | Kind::Precondition), "{error:?}");
}

#[tokio::test]
async fn a_request_after_its_time_is_refused_and_told_apart() {
    let fixture = Fixture::minio().await;
    let client = &fixture.client;
    let now = client.server_now().await.unwrap().earliest;
    let of = |from: SystemTime| Validity { from, lasts: Duration::from_secs(20) };
    let (valid, late) = (of(now), of(now - Duration::from_secs(60)));
    let put = |content: &'static str, put: Put| client.put("link", Bytes::from(content), put);

    put("valid", Put::new().valid(valid)).await.unwrap();
    let error = put("again", Put::new().valid(valid)).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Precondition);
    for late in [Put::default().valid(late), Put::new().valid(late)] {
        let error = put("late", late).await.unwrap_err();
        assert_eq!((error.kind(), error.is_uncertain()), (Kind::Expired, false), "{error:?}");
    }
    assert_eq!(client.delete("link", Some(late)).await.unwrap_err().kind(), Kind::Expired);
    let keys = ["link".to_owned()];
    let of_each = client.delete_many(&keys, Some(late)).await.unwrap();
    assert_eq!(
        of_each.iter().map(|(key, error)| (&**key, error.kind())).collect::<Vec<_>>(),
        [("link", Kind::Expired)]
    );
    assert_eq!(client.copy("link", "copy", Some(late)).await.unwrap_err().kind(), Kind::Expired);
    let upload = client.create_upload("parts", None).await.unwrap();
    let parts = [client.upload_part(&upload, 1, Bytes::from_static(b"x")).await.unwrap()];
    let ended = client.complete_upload(&upload, &parts, None, Some(late)).await;
    assert_eq!(ended.unwrap_err().kind(), Kind::Expired);
    assert_eq!(fixture.content("link").await, "valid");

    client.copy("link", "copy", Some(valid)).await.unwrap();
    client.complete_upload(&upload, &parts, Some(Condition::Absent), Some(valid)).await.unwrap();
    client.delete("link", Some(valid)).await.unwrap();
    assert!(client.head("link").await.unwrap_err().is_not_found());
}

#[tokio::test]
async fn who_may_not_is_told_so_and_not_that_it_came_late() {
    let fixture = Fixture::minio().await;
    let now = fixture.client.server_now().await.unwrap().earliest;
    let valid = Validity { from: now, lasts: Duration::from_secs(60) };
    let nobody = Settings {
        anonymous: true,
        access_key_file: None,
        secret_key_file: None,
        ..fixture.settings.clone()
    };
    let keys = temp_dir();
    let wrong = keys.path().join("wrong");
    std::fs::write(&wrong, "a wrong secret").unwrap();
    let wrong = Settings { secret_key_file: Some(wrong), ..fixture.settings.clone() };
    for (settings, validity) in [(nobody, None), (wrong.clone(), None), (wrong, Some(valid))] {
        let client = Client::open(settings).await.unwrap();
        let put = Put { validity, ..Put::default() };
        let error = client.put("key", Bytes::from_static(b"x"), put).await.unwrap_err();
        assert_eq!((error.kind(), error.is_uncertain()), (Kind::Denied, false), "{error:?}");
    }
    let missing = Settings { bucket: "missing".to_owned(), ..fixture.settings.clone() };
    let error = Client::open(missing).await.unwrap().get("key", 1).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Other, "{error:?}");
}

#[tokio::test]
async fn a_probe_tells_what_minio_honours() {
    let fixture = Fixture::minio().await;
    let found = fixture.client.probe().await.unwrap();
    for (name, finding) in found.all() {
        assert!(finding.is_honoured, "{name}: {}", finding.says);
    }
    assert!(found.is_safe_for_replicas());
    let left = fixture.client.list(Listing::default(), None).await.unwrap();
    assert!(left.objects.is_empty(), "{left:?}");
}

#[tokio::test]
async fn a_probe_says_that_moto_looks_neither_at_the_time_nor_at_signatures() {
    let fixture = Fixture::moto().await;
    let found = fixture.client.probe().await.unwrap();
    assert!(!found.expiry.is_honoured && !found.signature.is_honoured && !found.is_safe_for_replicas());
    assert!(found.expiry.says.contains("whose time is over"), "{found:?}");
    assert!(found.signature.says.contains("does not look at signatures"), "{found:?}");
    assert!(found.create.is_honoured && found.replace.is_honoured, "{found:?}");
    assert!(found.read.is_honoured && found.list.is_honoured, "{found:?}");
    let left = fixture.client.list(Listing::default(), None).await.unwrap();
    assert!(left.objects.is_empty(), "{left:?}");
}
