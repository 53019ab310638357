//! The client behind a proxy that misbehaves.

use std::collections::VecDeque;
use std::num::NonZeroU32;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use dvcr_tests::{Asked, Chaos, Fault, S3Proxy};

use super::*;

/// A client of the fixture's bucket by way of a proxy.
async fn through(
    fixture: &Fixture,
    attempts: u32,
    decide: impl FnMut(&Asked) -> Fault + Send + 'static,
) -> (Client, S3Proxy) {
    let proxy = S3Proxy::start(fixture.server.address(), decide).unwrap();
    let settings = Settings {
        endpoint: Some(proxy.endpoint()),
        attempts: NonZeroU32::new(attempts).unwrap(),
        request_timeout: Time(Duration::from_secs(5)),
        ..fixture.settings.clone()
    };
    (Client::open(settings).await.unwrap(), proxy)
}

/// These faults for the first requests, and none behind them.
fn script(faults: impl IntoIterator<Item = Fault>) -> impl FnMut(&Asked) -> Fault + Send + 'static {
    let mut faults: VecDeque<_> = faults.into_iter().collect();
    move |_| faults.pop_front().unwrap_or(Fault::None)
}

#[tokio::test]
async fn what_may_pass_is_tried_again_and_what_may_not_is_not() {
    let fixture = Fixture::minio().await;
    let passing = [
        Fault::Answer(503, "SlowDown"),
        Fault::Answer(500, "InternalError"),
        Fault::Answer(429, "TooManyRequests"),
        Fault::DropBefore,
        Fault::DropAfter,
        Fault::Answer(409, "ConditionalRequestConflict"),
    ];
    let (client, proxy) = through(&fixture, 7, script(passing)).await;
    client.put("key", Bytes::from_static(b"x"), Put::default()).await.unwrap();
    assert_eq!(proxy.seen().len(), 7);

    let (client, proxy) = through(&fixture, 3, |_| Fault::Answer(503, "SlowDown")).await;
    let error = client.head("key").await.unwrap_err();
    assert_eq!((error.kind(), error.is_uncertain(), proxy.seen().len()), (Kind::Unavailable, true, 3));
    for (status, code, kind) in [
        (403, "AccessDenied", Kind::Denied),
        (501, "NotImplemented", Kind::Other),
        (400, "InvalidArgument", Kind::Other),
        (404, "NoSuchBucket", Kind::Other),
        (404, "NoSuchKey", Kind::NotFound),
    ] {
        let (client, proxy) = through(&fixture, 3, move |_| Fault::Answer(status, code)).await;
        let error = client.get("key", 1).await.unwrap_err();
        assert_eq!((error.kind(), error.is_uncertain(), proxy.seen().len()), (kind, false, 1), "{error:?}");
    }
}

#[tokio::test]
async fn what_places_an_object_and_is_refused_is_sent_again_for_a_while() {
    let fixture = Fixture::minio().await;
    let refused = Fault::Answer(403, "AccessDenied");
    let (client, proxy) = through(&fixture, 5, script([refused, refused])).await;
    client.put("key", Bytes::from_static(b"x"), Put::new()).await.unwrap();
    assert_eq!(proxy.seen().len(), 3);
    let (client, proxy) = through(&fixture, 5, move |_| refused).await;
    let error = client.put("key", Bytes::from_static(b"x"), Put::default()).await.unwrap_err();
    assert_eq!((error.kind(), error.is_uncertain(), proxy.seen().len()), (Kind::Denied, false, 3));
}

#[tokio::test]
async fn a_store_that_does_not_answer_is_given_up_in_time() {
    let fixture = Fixture::minio().await;
    let proxy = S3Proxy::start(fixture.server.address(), |_| Fault::Delay(Duration::from_secs(600))).unwrap();
    let settings = Settings {
        endpoint: Some(proxy.endpoint()),
        attempts: NonZeroU32::new(2).unwrap(),
        request_timeout: Time(Duration::from_secs(1)),
        ..fixture.settings.clone()
    };
    let client = Client::open(settings).await.unwrap();
    let error = tokio::time::timeout(Duration::from_secs(30), client.head("key")).await.unwrap().unwrap_err();
    assert_eq!((error.kind(), proxy.seen().len()), (Kind::Unavailable, 2));
}

#[tokio::test]
async fn a_range_goes_on_where_its_answers_are_cut() {
    for fixture in Fixture::both().await {
        let content = noise(3 << 20);
        let etag = fixture.put("key", &content).await;
        let mut cuts = [0, 1, 100_000, 65_536, 0, 700_000, 3].into_iter().cycle();
        let mut count = 0;
        let decide = move |_: &Asked| {
            count += 1;
            if count > 14 { Fault::None } else { Fault::CutBody(cuts.next().unwrap()) }
        };
        let (client, proxy) = through(&fixture, 6, decide).await;
        let body = client.get_range("key", 1..(3 << 20) - 1, Some(&etag)).await.unwrap();
        assert!(read_all(body).await.unwrap() == content[1..content.len() - 1]);
        assert_eq!(proxy.seen().len(), 15);
        // The small ones are asked for again as a whole.
        let (client, _proxy) = through(&fixture, 6, script([Fault::CutBody(1000), Fault::CutBody(0)])).await;
        assert!(client.get("key", 3 << 20).await.unwrap().content == content);
    }
}

#[tokio::test]
async fn a_range_that_cannot_go_on_is_an_error_and_never_short() {
    let fixture = Fixture::minio().await;
    let content = noise(1 << 20);
    fixture.put("key", &content).await;
    let (client, proxy) = through(&fixture, 3, |_| Fault::CutBody(0)).await;
    let body = client.get_range("key", 0..1 << 20, None).await.unwrap();
    let error = read_all(body).await.unwrap_err();
    assert_eq!((error.kind(), proxy.seen().len()), (Kind::Unavailable, 3));
    // Another object has taken its place when it goes on.
    let (client, _proxy) = through(&fixture, 3, script([Fault::CutBody(1000)])).await;
    let body = client.get_range("key", 0..1 << 20, None).await.unwrap();
    fixture.put("key", &noise(2 << 20)).await;
    assert_eq!(read_all(body).await.unwrap_err().kind(), Kind::Precondition);
}

#[tokio::test]
async fn a_conditional_write_knows_itself_when_its_answer_was_lost() {
    let fixture = Fixture::minio().await;
    let (client, _proxy) = through(&fixture, 3, script([Fault::DropAfter, Fault::None])).await;
    let etag = client.put("lease", Bytes::from_static(b"mine"), Put::new()).await.unwrap();
    assert_eq!(fixture.client.head("lease").await.unwrap().etag, etag);
    let (client, _proxy) = through(&fixture, 3, script([Fault::DropAfter, Fault::None])).await;
    let etag = client.put("lease", Bytes::from_static(b"mine too"), Put::over(etag)).await.unwrap();
    assert_eq!(fixture.client.head("lease").await.unwrap().etag, etag);

    // Another's is not taken for it.
    let (client, _proxy) = through(&fixture, 3, script([Fault::DropBefore, Fault::None])).await;
    let error = client.put("lease", Bytes::from_static(b"not mine"), Put::new()).await.unwrap_err();
    assert_eq!((error.kind(), error.is_uncertain()), (Kind::Precondition, true));
    assert_eq!(fixture.content("lease").await, "mine too");
}

#[tokio::test]
async fn a_request_that_is_held_up_beyond_its_time_does_nothing() {
    let fixture = Fixture::minio().await;
    // Held behind its first and only attempt, until the test lets time pass.
    let (client, proxy) = through(&fixture, 1, |asked| match asked.method.as_str() {
        "PUT" => Fault::Hold(Duration::from_secs(4)),
        _ => Fault::None,
    })
    .await;
    let now = client.server_now().await.unwrap().earliest;
    let put = Put::new().valid(Validity { from: now, lasts: Duration::from_secs(2) });
    let error = client.put("link", Bytes::from_static(b"late"), put).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Expired, "{error:?}");
    assert!(fixture.client.head("link").await.unwrap_err().is_not_found());
    assert!(proxy.seen().iter().any(|(_, fault)| matches!(fault, Fault::Hold(_))));
}

#[tokio::test]
async fn a_clock_far_from_the_servers_is_made_up_for() {
    let fixture = Fixture::minio().await;
    let client = &fixture.client;
    // As if this machine's clock were an hour ahead: the answer that refuses it tells the time.
    let moment = clock::Moment::now();
    let ahead = std::time::SystemTime::now() + Duration::from_secs(3600);
    let ahead = ahead.duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    client.clock().note(i64::try_from(ahead).unwrap(), moment, moment);
    let put = client.put("key", Bytes::from_static(b"x"), Put::new()).await;
    put.unwrap();
}

#[tokio::test]
async fn by_chance_and_long_everything_is_as_it_would_be_without_faults() {
    let fixture = Fixture::minio().await;
    let chaos = Chaos { seed: 5, each_per_mille: 50, delay_ms: 1..100, cut_bytes: 0..200_000 };
    let quiet = Arc::new(AtomicBool::new(false));
    let chaos = Mutex::new(chaos.decide());
    let is_quiet = Arc::clone(&quiet);
    let decide = move |asked: &Asked| match is_quiet.load(Ordering::Relaxed) {
        true => Fault::None,
        false => (chaos.lock().unwrap())(asked),
    };
    let (client, _proxy) = through(&fixture, 12, decide).await;
    let content = noise(400_000);
    for round in 0..15 {
        let key = format!("key-{round}");
        let etag = client.put(&key, content.clone(), Put::new()).await.unwrap();
        let etag = client.put(&key, content.slice(1..), Put::over(etag)).await.unwrap();
        assert_eq!(client.head(&key).await.unwrap().etag, etag);
        let body = client.get_range(&key, 10..399_000, Some(&etag)).await.unwrap();
        assert!(read_all(body).await.unwrap() == content[11..399_001]);
        let listed = client.list(Listing { prefix: &key, ..Listing::default() }, None).await.unwrap();
        assert!(listed.objects.iter().any(|(found, _)| *found == key));
        if round % 2 == 0 {
            client.delete(&key, None).await.unwrap();
        }
    }
    quiet.store(true, Ordering::Relaxed);
    let left = fixture.client.list(Listing::default(), None).await.unwrap();
    assert_eq!(left.objects.len(), 7);
}
