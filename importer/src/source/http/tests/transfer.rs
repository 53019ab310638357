//! Bytes come out exact, or an error does, whatever happens to the connections.

use proptest::prelude::*;

use super::*;

const MIB: usize = 1 << 20;

/// A server that goes on only in company: the transfer ends only if a second connection comes.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_limits_each_connection_is_read_by_several() {
    let body = noise(8 * MIB, 1);
    let served = body.clone();
    let server = Server::start(move |asked| {
        let mut reply = Reply::file(asked, &served, "\"v1\"");
        if asked.n == 0 {
            reply.company = Some((256 << 10, 4));
        }
        reply
    })
    .await;
    let mut source = open(&server.url("a")).await.unwrap();
    let (bytes, outcome) = read(&mut source).await;
    outcome.unwrap();
    assert!(bytes == body);
    assert!((2..=CONNECTIONS_MAX).contains(&server.peak()), "{}", server.peak());
    assert!(server.asked()[1..].iter().all(|asked| asked.range.is_some()));
    assert_eq!(source.traffic().1, body.len() as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn each_of_many_slow_connections_brings_its_part() {
    let body = noise(6 * MIB, 2);
    let served = body.clone();
    let server =
        Server::start(move |asked| Reply { rate: Some(4 << 10), ..Reply::file(asked, &served, "\"v1\"") })
            .await;
    let mut source = open(&server.url("a")).await.unwrap();
    let (bytes, outcome) = read(&mut source).await;
    outcome.unwrap();
    assert!(bytes == body);
    assert!(server.peak() <= CONNECTIONS_MAX + 1, "{}", server.peak());
}

/// It reads only what is there already, so that it never waits for the source.
#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_is_slower_than_the_source_gets_one_connection() {
    let body = noise(2 * MIB, 3);
    let served = body.clone();
    let server = Server::start(move |asked| Reply::file(asked, &served, "\"v1\"")).await;
    let mut source = open(&server.url("a")).await.unwrap();
    let mut bytes = Vec::new();
    while bytes.len() < body.len() {
        while source.segments.front().is_some_and(|front| front.received_to() <= source.position) {
            tokio::task::yield_now().await;
        }
        bytes.extend_from_slice(&source.chunk().await.unwrap().unwrap());
    }
    assert!(source.chunk().await.unwrap().is_none());
    assert!(bytes == body);
    assert_eq!((server.peak(), server.asked().len()), (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_lets_in_one_at_a_time_is_read_by_one() {
    for status in ["429 Too Many Requests", "503 Service Unavailable"] {
        let body = noise(3 * MIB, 4);
        let served = body.clone();
        let server = Server::start(move |asked| match asked.open {
            1 => {
                // Until somebody was sent away.
                let company = asked.range.is_none().then_some((300 << 10, 2));
                Reply { company, ..Reply::file(asked, &served, "\"v1\"") }
            }
            _ => Reply::status(status).with("retry-after", "0"),
        })
        .await;
        let mut source = open(&server.url("a")).await.unwrap();
        let (bytes, outcome) = read(&mut source).await;
        outcome.unwrap_or_else(|e| panic!("{status}: {}", chain(&e)));
        assert!(bytes == body);
        assert!(server.peak() > 1, "a second connection was tried");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_says_it_has_ranges_and_ignores_them_is_read_by_one() {
    let body = noise(3 * MIB, 5);
    let served = body.clone();
    let server = Server::start(move |asked| {
        let whole = Asked { range: None, ..asked.clone() };
        let company = (asked.n == 0).then_some((300 << 10, 2));
        Reply { company, ..Reply::file(&whole, &served, "\"v1\"") }
    })
    .await;
    let mut source = open(&server.url("a")).await.unwrap();
    let (bytes, outcome) = read(&mut source).await;
    outcome.unwrap();
    assert!(bytes == body);
    assert_eq!(server.asked().len(), 2, "one try is enough");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_version_or_ranges_one_connection_reads_all() {
    let body = noise(MIB, 6);
    for (etag, ranges) in [("", true), ("W/\"weak\"", true), ("\"v1\"", false)] {
        let served = body.clone();
        let server = Server::start(move |asked| {
            let mut reply = Reply::file(&Asked { range: None, ..asked.clone() }, &served, etag);
            reply.headers.retain(|(name, _)| ranges || *name != "accept-ranges");
            Reply { rate: Some(16 << 10), ..reply }
        })
        .await;
        let mut source = open(&server.url("a")).await.unwrap();
        assert_eq!(source.version(), None);
        let (bytes, outcome) = read(&mut source).await;
        outcome.unwrap();
        assert!(bytes == body);
        assert_eq!(server.asked().len(), 1);
    }
}

/// What a server does that changes the file, or does not keep to what it says, in a part that is asked for.
#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_answer_for_a_part_is_an_error_that_says_so() {
    type Wrong = fn(Reply) -> Reply;
    let cases: [(&str, Wrong, ErrorKind, &str); 9] = [
        ("another version", |r| changed(r, "etag", "\"v2\""), ErrorKind::Changed, "changed"),
        ("no version", |r| changed(r, "etag", "W/\"v1\""), ErrorKind::Changed, "changed"),
        (
            "another total",
            |r| changed(r, "content-range", "bytes 300000-2097151/2097153"),
            ErrorKind::Changed,
            "changed",
        ),
        (
            "another begin",
            |r| changed(r, "content-range", "bytes 0-2097151/2097152"),
            ErrorKind::Source,
            "another range",
        ),
        (
            "an end before the begin",
            |r| changed(r, "content-range", "bytes 300000-1/2097152"),
            ErrorKind::Source,
            "another range",
        ),
        (
            "an end behind the total",
            |r| changed(r, "content-range", "bytes 300000-2097152/2097152"),
            ErrorKind::Source,
            "another range",
        ),
        ("no range", |r| changed(r, "content-range", "nonsense"), ErrorKind::Source, "another range"),
        ("another length", |r| Reply { length: Some(Some(7)), ..r }, ErrorKind::Source, "another range"),
        (
            "more than it says",
            |mut r| {
                r.body = [&r.body[..], b"more"].concat().into();
                Reply { length: Some(None), ..r }
            },
            ErrorKind::Source,
            "more bytes than it announced",
        ),
    ];
    for (what, wrong, kind, part) in cases {
        let body = noise(2 * MIB, 7);
        let served = body.clone();
        let server = Server::start(move |asked| {
            let reply = Reply::file(asked, &served, "\"v1\"");
            match asked.range {
                None => Reply { cut: Some(300_000), ..reply },
                Some(_) => wrong(reply),
            }
        })
        .await;
        let tuning = Tuning { connections_max: 1, ..small() };
        let mut source =
            HttpSource::open_tuned(&server.url("a"), &SourceOptions::default(), None, tuning).await.unwrap();
        let (bytes, outcome) = read(&mut source).await;
        let error = outcome.expect_err(what);
        assert_eq!(error.kind(), kind, "{what}: {}", chain(&error));
        assert!(error.to_string().contains(part), "{what}: {}", chain(&error));
        assert!(body.starts_with(&bytes), "{what}");
    }
}

/// The reply with another value of a header.
fn changed(mut reply: Reply, name: &'static str, value: &str) -> Reply {
    reply.headers.retain(|(known, _)| *known != name);
    reply.with(name, value)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_ends_early_is_never_an_end() {
    let body = noise(MIB, 8);
    for chunked in [false, true] {
        let served = body.clone();
        let server = Server::start(move |asked| {
            let mut reply = Reply::file(asked, &served, "");
            reply.length = chunked.then_some(None);
            Reply { cut: Some(MIB / 2), ..reply }
        })
        .await;
        let mut source = open(&server.url("a")).await.unwrap();
        let (bytes, outcome) = read(&mut source).await;
        let error = outcome.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Source);
        assert!(error.to_string().contains("broke off after 524288 bytes"), "{}", chain(&error));
        assert!(body.starts_with(&bytes));
    }
}

/// It may answer a part of the part; there is always more to ask for.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_gives_less_than_was_asked_for_is_asked_again() {
    let body = noise(MIB, 9);
    let served = body.clone();
    let server = Server::start(move |asked| {
        let mut asked = asked.clone();
        if let Some((first, last)) = &mut asked.range {
            *last = Some(last.unwrap_or(u64::MAX).min(*first + 99_999));
        }
        let cut = asked.range.is_none().then_some(1000);
        Reply { cut, ..Reply::file(&asked, &served, "\"v1\"") }
    })
    .await;
    let mut source = open(&server.url("a")).await.unwrap();
    let (bytes, outcome) = read(&mut source).await;
    outcome.unwrap();
    assert!(bytes == body);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_cut_of_a_large_body_costs_less_than_a_hundredth() {
    let body = noise(100 * MIB, 10);
    let served = body.clone();
    let server = Server::start(move |asked| {
        let cut = (asked.n == 0).then_some(61_234_567);
        Reply { cut, ..Reply::file(asked, &served, "\"v1\"") }
    })
    .await;
    let mut source = HttpSource::open(&server.url("a"), &SourceOptions::default(), None).await.unwrap();
    let (bytes, outcome) = read(&mut source).await;
    outcome.unwrap();
    assert!(bytes == body);
    let (received, delivered) = source.traffic();
    assert_eq!(delivered, body.len() as u64);
    assert!(received >= delivered && received - delivered < MIB as u64, "{received} for {delivered}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_never_comes_back_ends_the_transfer() {
    let body = noise(MIB, 11);
    let served = body.clone();
    let server = Server::start(move |asked| match asked.n {
        0 => Reply { cut: Some(MIB / 2), ..Reply::file(asked, &served, "\"v1\"") },
        _ => Reply::status("502 Bad Gateway"),
    })
    .await;
    let mut source = open(&server.url("a")).await.unwrap();
    let (bytes, outcome) = read(&mut source).await;
    let error = outcome.unwrap_err();
    assert!(error.to_string().contains("502"), "{}", chain(&error));
    assert!(body.starts_with(&bytes));
    assert_eq!(server.asked().len(), ATTEMPTS_MAX as usize, "the first, and the others in vain");
}

#[tokio::test(flavor = "multi_thread")]
async fn retry_after_is_followed_in_both_of_its_forms() {
    let body = noise(MIB, 12);
    let served = body.clone();
    let server = Server::start(move |asked| match asked.n {
        0 => Reply::status("503 Service Unavailable").with("retry-after", "0"),
        1 => Reply::status("429 Too Many Requests").with("retry-after", "Sun, 06 Nov 1994 08:49:37 GMT"),
        2 => Reply { cut: Some(MIB / 2), ..Reply::file(asked, &served, "\"v1\"") },
        3 => Reply::status("503 Service Unavailable").with("retry-after", "Sun, 06 Nov 1994 08:49:37 GMT"),
        _ => Reply::file(asked, &served, "\"v1\""),
    })
    .await;
    let mut source = open(&server.url("a")).await.unwrap();
    let (bytes, outcome) = read(&mut source).await;
    outcome.unwrap();
    assert!(bytes == body);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_asks_for_a_long_rest_is_believed_at_once() {
    for wait in ["86400", "Tue, 31 Dec 2199 23:59:59 GMT"] {
        let server =
            Server::start(move |_| Reply::status("429 Too Many Requests").with("retry-after", wait)).await;
        let error = open(&server.url("a")).await.err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Source);
        assert!(error.to_string().contains("429") && error.to_string().contains("Retry-After"), "{error}");
        assert_eq!(server.asked().len(), 1);
    }
}

/// As long as another connection reads, one that is sent away for long is one too many.
#[tokio::test(flavor = "multi_thread")]
async fn a_long_rest_for_one_connection_too_many_does_not_end_the_transfer() {
    let body = noise(MIB, 14);
    let server = Server::start(move |asked| Reply {
        company: Some((1000, usize::MAX)),
        ..Reply::file(asked, &body, "\"v1\"")
    })
    .await;
    let mut source = open(&server.url("a")).await.unwrap();
    let refused = || Error::new(ErrorKind::Source, "429");
    let day = Some(Duration::from_secs(86_400));
    for _ in 0..=ATTEMPTS_MAX {
        source.back_off(refused(), day, ATTEMPTS_MAX).unwrap();
    }
    assert!(source.not_before.is_none(), "nothing waits for a day");
    source.tasks.shutdown().await;
    assert!(source.back_off(refused(), day, ATTEMPTS_MAX).is_err());
}

/// What another process does that finds out how far the first one came.
#[tokio::test(flavor = "multi_thread")]
async fn a_source_goes_on_at_a_place_in_the_version_that_was_begun() {
    let body = noise(MIB, 13);
    let served = body.clone();
    let server = Server::start(move |asked| Reply::file(asked, &served, "\"v1\"")).await;
    let version = open(&server.url("a")).await.unwrap().version().unwrap();
    for position in [0, 1, 777_777, MIB as u64 - 1, MIB as u64] {
        let place = Place { position, validator: version.clone() };
        let options = SourceOptions::default();
        let mut source =
            HttpSource::open_tuned(&server.url("a"), &options, Some(&place), small()).await.unwrap();
        assert_eq!((source.len, source.version()), (Some(MIB as u64), Some(version.clone())));
        let (bytes, outcome) = read(&mut source).await;
        outcome.unwrap();
        assert!(bytes == body[position as usize..], "{position}");
    }
    let of_another = |tag: &str, len: usize| format!("{len} {tag}");
    for (position, validator) in [
        (777_777, of_another("\"v0\"", MIB)),
        (777_777, of_another("\"v1\"", MIB + 1)),
        (0, of_another("\"v0\"", MIB)),
        (2 * MIB as u64, version.clone()),
        (1, "nonsense".to_owned()),
        (1, "0 \"v1\"".to_owned()),
    ] {
        let place = Place { position, validator };
        let options = SourceOptions::default();
        let outcome = HttpSource::open_tuned(&server.url("a"), &options, Some(&place), small()).await;
        let error = outcome.err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Changed, "{place:?}: {}", chain(&error));
    }
    // A file that is shorter now, at a server that looks at the range first.
    let server = Server::start(|_| Reply::status("416 Range Not Satisfiable")).await;
    let place = Place { position: 777_777, validator: version };
    let outcome =
        HttpSource::open_tuned(&server.url("a"), &SourceOptions::default(), Some(&place), small()).await;
    assert_eq!(outcome.err().unwrap().kind(), ErrorKind::Changed);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Whatever the server does to its connections, the bytes that come out are those of the file.
    #[test]
    fn the_bytes_are_exact_whatever_happens_to_the_connections(
        len in 0usize..3_000_000,
        seed in any::<u64>(),
        segment_bytes in 10_000u64..300_000,
        ahead_bytes in 1u64..400_000,
        connections_max in 1usize..=CONNECTIONS_MAX,
        cuts in any::<bool>(),
        refusals in any::<bool>(),
        slow in any::<bool>(),
    ) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async {
            let body = noise(len, seed);
            let served = body.clone();
            let server = Server::start(move |asked| {
                let dice = noise(16, seed ^ (asked.n as u64 + 1).wrapping_mul(0x5851_f42d_4c95_7f2d));
                // Never twice in a row.
                if refusals && asked.n % 2 == 1 && dice[0] < 60 {
                    return Reply::status("503 Service Unavailable").with("retry-after", "0");
                }
                let reply = Reply::file(asked, &served, "\"v1\"");
                let at = usize::from(dice[1]) * 256 * usize::from(dice[2]) / 16 + 1;
                let cut = (cuts && dice[3] < 200).then_some(at);
                let rate = slow.then_some(4096 + 256 * usize::from(dice[4]));
                Reply { cut, rate, ..reply }
            })
            .await;
            let tuning = Tuning {
                segment_bytes, ahead_bytes, connections_max, tick: Duration::from_millis(2), ..small()
            };
            let mut source =
                HttpSource::open_tuned(&server.url("a"), &SourceOptions::default(), None, tuning).await.unwrap();
            let (bytes, outcome) = read(&mut source).await;
            outcome.unwrap_or_else(|e| panic!("{}", chain(&e)));
            assert!(bytes == body, "{} of {} bytes", bytes.len(), body.len());
            let (received, delivered) = source.traffic();
            assert!(delivered == len as u64 && received >= delivered, "{received} for {delivered}");
        });
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_not_available_may_be_later_and_one_that_refuses_may_not() {
    for (status, passes) in [
        ("408 Request Timeout", true),
        ("429 Too Many Requests", true),
        ("502 Bad Gateway", true),
        ("503 Service Unavailable", true),
        ("504 Gateway Timeout", true),
        ("401 Unauthorized", false),
        ("403 Forbidden", false),
        ("404 Not Found", false),
        ("500 Internal Server Error", false),
    ] {
        let server = Server::start(move |_| Reply::status(status)).await;
        let error = open(&server.url("a")).await.err().unwrap();
        assert!(error.is_passing() == passes && error.to_string().contains(status), "{error:?}");
    }
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    assert!(open(&format!("http://{nobody}/a")).await.err().unwrap().is_passing());
}
