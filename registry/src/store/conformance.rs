//! What every [`Store`] keeps, as tests: the same for a directory and for what else there is.
//!
//! An implementation has a function that makes a fresh [`Place`], and says `conformance!(that_function)` in its tests.

mod place;

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use uuid::Uuid;

use super::collect::{Counts, Options};
pub(crate) use place::*;

use super::{ChangeError, Content, Ending, Manifest, Page, Removed, Store, UploadError};
use crate::digest::{Algorithm, Digest};
use crate::model;
use crate::names::{Reference, RepoName};
use crate::rules::Rules;

/// Makes a test of each promise, for the places that a function makes.
macro_rules! conformance {
    ($place:path) => {
        $crate::store::conformance::conformance! { $place:
            a_blob_comes_back_whole_and_in_every_part
            a_blob_is_that_of_the_repositories_that_have_it
            content_of_another_digest_is_refused_and_its_session_ends
            a_blob_may_be_called_by_another_hash_than_its_session_ran
            an_upload_goes_on_where_the_last_chunk_ended
            a_session_is_held_once_and_belongs_to_its_repository
            a_body_that_broke_off_is_kept_to_its_last_byte
            a_body_that_does_not_count_is_taken_back
            a_cancelled_upload_is_gone
            an_acknowledged_chunk_outlives_a_crash
            an_upload_goes_on_after_a_crash_while_bytes_came
            an_upload_goes_on_after_a_crash_before_its_commit
            what_was_committed_outlives_a_crash
            a_session_that_was_only_begun_outlives_an_orderly_end
            one_digest_may_be_committed_by_many_at_once
            a_mount_gives_what_the_other_repository_has
            a_deleted_blob_is_gone_from_one_repository_alone
            a_manifest_is_refused_without_what_it_refers_to
            a_sparse_manifest_is_taken_where_that_is_allowed
            a_tag_moves_and_what_it_named_stays
            a_deleted_manifest_takes_its_tags_along
            a_tag_that_never_changes_neither_moves_nor_goes
            of_many_who_put_a_tag_that_never_changes_one_does
            tags_come_in_pages_in_lexical_order
            repositories_come_in_pages_in_lexical_order
            what_a_repository_has_comes_in_pages_in_the_order_of_digests
            referrers_come_in_the_order_of_their_digests
            a_session_of_a_known_id_is_found_without_a_note
            a_client_finds_what_it_left_with_its_session
            where_all_has_gone_outlives_the_process
            garbage_goes_when_it_is_old_and_nothing_else_does
            pushes_beside_collections_lose_nothing
            a_store_that_works_says_so
        }
    };
    ($place:path: $($promise:ident)*) => {
        $(
            #[test]
            fn $promise() {
                $crate::store::conformance::$promise(&$place());
            }
        )*
    };
}
pub(crate) use conformance;

/// How long something may take that is waited for.
const PATIENCE: Duration = Duration::from_secs(60);
pub(crate) fn a_blob_comes_back_whole_and_in_every_part(place: &Place) {
    let process = place.start();
    let r = repo("a/b");
    for (seed, length) in [0, 1, 999, 4096, 1 << 20, (3 << 20) + 17].into_iter().enumerate() {
        let content = content(length, seed as u32);
        let digest = process.push_blob(&r, &content);
        assert_eq!(process.store.claim_blob(&r, &digest).unwrap(), Some(length as u64));
        assert!(process.read(&r, &digest).as_ref() == Some(&content), "{length} bytes");
        for (first, end) in
            [(0, 1), (length / 2, length), (length / 3, length / 2), (length.max(1) - 1, length)]
                .into_iter()
                .filter(|_| length > 0)
        {
            let blob = process.store().open_blob(&r, &digest).unwrap().unwrap();
            let part = process.part(blob, first as u64, end as u64);
            assert!(part == content[first..end], "{first} to {end} of {length} bytes");
        }
    }
}

pub(crate) fn a_blob_is_that_of_the_repositories_that_have_it(place: &Place) {
    let process = place.start();
    let digest = process.push_blob(&repo("a"), b"ours");
    for other in ["b", "a/b", "a-b"].map(repo) {
        assert_eq!(process.store.claim_blob(&other, &digest).unwrap(), None);
        assert_eq!(process.read(&other, &digest), None);
    }
    assert_eq!(process.store.claim_blob(&repo("a"), &sha256(b"another")).unwrap(), None);
}

pub(crate) fn content_of_another_digest_is_refused_and_its_session_ends(place: &Place) {
    let process = place.start();
    let r = repo("r");
    let wrong = sha256(b"what was said");
    let refused = |done: Result<(), UploadError>| match done {
        Err(UploadError::Digest { actual }) => assert_eq!(actual, sha256(b"what came")),
        other => panic!("{other:?}"),
    };
    let id = process.acknowledged(&r, b"what ca");
    let session = process.take(process.open(&r, id).unwrap(), b"me", Some(&wrong), Ending::Committed);
    refused(session.commit(&wrong));
    assert!(process.open(&r, id).is_none());
    let session = process.store().start_upload(&r, Algorithm::Sha256).unwrap();
    let id = session.id();
    refused(session.commit_small(b"what came", &wrong));
    assert!(process.open(&r, id).is_none());
    for digest in [wrong, sha256(b"what came")] {
        assert_eq!(process.store.claim_blob(&r, &digest).unwrap(), None);
    }
}

pub(crate) fn a_blob_may_be_called_by_another_hash_than_its_session_ran(place: &Place) {
    let process = place.start();
    let r = repo("r");
    let content = content(200_000, 1);
    let digest = Digest::of(Algorithm::Sha512, &content);
    let id = process.acknowledged(&r, &content[..150_000]);
    let session = process.open(&r, id).unwrap();
    process.take(session, &content[150_000..], Some(&digest), Ending::Committed).commit(&digest).unwrap();
    assert!(process.read(&r, &digest) == Some(content));
    let small = Digest::of(Algorithm::Sha512, b"small");
    process.store().start_upload(&r, Algorithm::Sha512).unwrap().commit_small(b"small", &small).unwrap();
    assert_eq!(process.read(&r, &small).unwrap(), b"small");
}

pub(crate) fn an_upload_goes_on_where_the_last_chunk_ended(place: &Place) {
    let process = place.start();
    let r = repo("r");
    let content = content(2_500_000, 2);
    let id = process.acknowledged(&r, &content[..10]);
    for (first, end) in [(10, 1_000_000), (1_000_000, 1_000_001), (1_000_001, 2_400_000)] {
        assert_eq!(process.store.upload_offset(&r, id).unwrap(), Some(first as u64));
        let session = process.open(&r, id).unwrap();
        assert!(!session.is_fresh());
        assert_eq!(session.offset(), first as u64);
        let session = process.take(session, &content[first..end], None, Ending::Acknowledged);
        assert_eq!(process.store.upload_offset(&r, id).unwrap(), Some(end as u64), "while it is held");
        drop(session);
    }
    process.finish(&r, id, &content);
    assert_eq!(process.store.upload_offset(&r, id).unwrap(), None);
}

pub(crate) fn a_session_is_held_once_and_belongs_to_its_repository(place: &Place) {
    let process = place.start();
    let r = repo("a/b");
    let fresh = process.store.begin_upload(&r, Algorithm::Sha256).unwrap();
    for id in [fresh, process.acknowledged(&r, b"some")] {
        let held = process.open(&r, id).unwrap();
        assert!(matches!(process.store().open_upload(&r, id), Err(UploadError::Busy)));
        drop(held);
        assert!(process.open(&repo("other"), id).is_none());
        assert_eq!(process.store.upload_offset(&repo("other"), id).unwrap(), None);
        assert_eq!(process.open(&r, id).unwrap().id(), id);
    }
    assert!(process.open(&r, Uuid::new_v4()).is_none());
}

pub(crate) fn a_body_that_broke_off_is_kept_to_its_last_byte(place: &Place) {
    let process = place.start();
    let r = repo("r");
    let content = content(1_300_000, 3);
    let id = process.acknowledged(&r, &content[..100]);
    let session = process.open(&r, id).unwrap();
    let session = process.take(session, &content[100..1_200_001], None, Ending::BrokenOff);
    assert_eq!(session.offset(), 1_200_001);
    drop(session);
    assert_eq!(process.store.upload_offset(&r, id).unwrap(), Some(1_200_001));
    process.finish(&r, id, &content);
}

pub(crate) fn a_body_that_does_not_count_is_taken_back(place: &Place) {
    let process = place.start();
    let r = repo("r");
    let content = content(1_300_000, 4);
    let id = process.acknowledged(&r, &content[..700_000]);
    let other = vec![7; 1_200_000];
    let session = process.take(process.open(&r, id).unwrap(), &other, None, Ending::TakenBack);
    assert_eq!(session.offset(), 700_000);
    drop(session);
    assert_eq!(process.store.upload_offset(&r, id).unwrap(), Some(700_000));
    process.finish(&r, id, &content);
}

pub(crate) fn a_cancelled_upload_is_gone(place: &Place) {
    let process = place.start();
    let r = repo("r");
    let fresh = process.store.begin_upload(&r, Algorithm::Sha256).unwrap();
    for id in [fresh, process.acknowledged(&r, b"some")] {
        process.open(&r, id).unwrap().cancel().unwrap();
        assert!(process.open(&r, id).is_none());
        assert_eq!(process.store.upload_offset(&r, id).unwrap(), None);
    }
}

pub(crate) fn an_acknowledged_chunk_outlives_a_crash(place: &Place) {
    let r = repo("r");
    let content = content(2_200_000, 5);
    let process = place.start();
    let id = process.acknowledged(&r, &content[..1_100_001]);
    drop(process);
    let process = place.start();
    assert_eq!(process.store.upload_offset(&r, id).unwrap(), Some(1_100_001));
    process.finish(&r, id, &content);
}

pub(crate) fn an_upload_goes_on_after_a_crash_while_bytes_came(place: &Place) {
    let r = repo("r");
    let content = content(5_000_000, 6);
    for acknowledged in [0, 1_234_567] {
        let process = place.start();
        let id = process.acknowledged(&r, &content[..acknowledged]);
        let mut intake = process.receive(process.open(&r, id).unwrap(), None);
        process.push(&mut *intake, &content[acknowledged..4_500_000]);
        drop((intake, process));
        let process = place.start();
        let offset = process.store.upload_offset(&r, id).unwrap().unwrap();
        assert!((acknowledged as u64..=4_500_000).contains(&offset), "{offset}");
        process.finish(&r, id, &content);
    }
}

pub(crate) fn an_upload_goes_on_after_a_crash_before_its_commit(place: &Place) {
    let r = repo("r");
    let content = content(1_500_000, 7);
    let process = place.start();
    let id = process.acknowledged(&r, &content[..300]);
    let digest = sha256(&content);
    drop(process.take(process.open(&r, id).unwrap(), &content[300..], Some(&digest), Ending::Committed));
    drop(process);
    let process = place.start();
    assert_eq!(process.store.claim_blob(&r, &digest).unwrap(), None);
    process.finish(&r, id, &content);
}

pub(crate) fn what_was_committed_outlives_a_crash(place: &Place) {
    let (a, b) = (repo("a"), repo("b/c"));
    let large = content(1_100_000, 8);
    let process = place.start();
    let (config, layer) = (process.push_blob(&a, b"config"), process.push_blob(&a, &large));
    let manifest = process.put(&a, &image("image", &config, std::slice::from_ref(&layer)), &["v1", "v2"]);
    process.store.mount_blob(&a, &b, &layer).unwrap().unwrap();
    process.remove(&a, Some(by_tag("v2")));
    drop(process);
    let process = place.start();
    assert_eq!(process.read(&a, &config).unwrap(), b"config");
    for repo in [&a, &b] {
        assert!(process.read(repo, &layer).as_ref() == Some(&large));
    }
    assert_eq!((process.tagged(&a, "v1"), process.tagged(&a, "v2")), (Some(manifest), None));
}

pub(crate) fn a_session_that_was_only_begun_outlives_an_orderly_end(place: &Place) {
    let r = repo("r");
    let process = place.start();
    let id = process.store.begin_upload(&r, Algorithm::Sha512).unwrap();
    process.store.close();
    drop(process);
    let process = place.start();
    assert_eq!(process.store.upload_offset(&r, id).unwrap(), Some(0));
    process.finish(&r, id, b"something");
}

pub(crate) fn one_digest_may_be_committed_by_many_at_once(place: &Place) {
    let process = place.start();
    let repos = ["a", "a", "b", "b/c", "a", "b"].map(repo);
    for content in [content(500, 9), content(1_200_000, 10)] {
        thread::scope(|scope| {
            for repo in &repos {
                scope.spawn(|| process.push_blob(repo, &content));
            }
        });
        for repo in &repos {
            assert!(process.read(repo, &sha256(&content)).as_ref() == Some(&content));
        }
    }
}

pub(crate) fn a_mount_gives_what_the_other_repository_has(place: &Place) {
    let process = place.start();
    let (a, b) = (repo("a"), repo("b"));
    let digest = process.push_blob(&a, b"shared");
    let mount =
        |from: &RepoName, to: &RepoName, digest: &Digest| process.store.mount_blob(from, to, digest).unwrap();
    assert_eq!(mount(&b, &a, &digest), None);
    assert_eq!(mount(&a, &b, &sha256(b"nobody's")), None);
    assert_eq!(process.store.claim_blob(&b, &digest).unwrap(), None);
    for _again in 0..2 {
        assert_eq!(mount(&a, &b, &digest), Some(6));
        assert_eq!(process.read(&b, &digest).unwrap(), b"shared");
    }
}

pub(crate) fn a_deleted_blob_is_gone_from_one_repository_alone(place: &Place) {
    let process = place.start();
    let (a, b) = (repo("a"), repo("b"));
    let digest = process.push_blob(&a, b"shared");
    process.store.mount_blob(&a, &b, &digest).unwrap().unwrap();
    let open = process.store().open_blob(&a, &digest).unwrap().unwrap();
    assert!(process.store.delete_blob(&a, &digest).unwrap());
    assert!(!process.store.delete_blob(&a, &digest).unwrap());
    assert_eq!(process.part(open, 0, 6), b"shared", "whoever has it open reads on");
    assert_eq!(process.read(&a, &digest), None);
    assert_eq!(process.read(&b, &digest).unwrap(), b"shared");
    process.push_blob(&a, b"shared");
    assert_eq!(process.read(&a, &digest).unwrap(), b"shared");
}

pub(crate) fn a_manifest_is_refused_without_what_it_refers_to(place: &Place) {
    let process = place.start();
    let r = repo("r");
    let there = process.push_blob(&r, b"there");
    let absent = process.push_blob(&repo("elsewhere"), b"absent here");
    let refused = |bytes: &str, lacks: &[Digest]| {
        match put(&*process.store, &r, bytes, &["v1"], &Rules::default()) {
            Err(ChangeError::Missing(missing)) => assert_eq!(missing, lacks),
            other => panic!("{other:?}"),
        }
        assert_eq!(process.tagged(&r, "v1"), None);
        assert!(!process.has_manifest(&r, &sha256(bytes.as_bytes())));
    };
    let bytes = image("image", &there, std::slice::from_ref(&absent));
    refused(&bytes, std::slice::from_ref(&absent));
    let above = json!({
        "schemaVersion": 2, "mediaType": model::OCI_INDEX,
        "manifests": [{"mediaType": model::OCI_MANIFEST, "digest": sha256(bytes.as_bytes()).as_str(), "size": 1}],
    });
    refused(&above.to_string(), &[sha256(bytes.as_bytes())]);
    process.push_blob(&r, b"absent here");
    process.put(&r, &bytes, &[]);
    let above = process.put(&r, &above.to_string(), &["v1"]);
    assert_eq!(process.tagged(&r, "v1"), Some(above));
}

pub(crate) fn a_sparse_manifest_is_taken_where_that_is_allowed(place: &Place) {
    let process = place.start();
    let rules = Rules { sparse_manifests: vec!["mirror/**".parse().unwrap()], ..Rules::default() };
    let there = process.push_blob(&repo("mirror/a"), b"there");
    process.push_blob(&repo("other"), b"there");
    let absent = sha256(b"absent");
    let bytes = image("image", &there, std::slice::from_ref(&absent));
    let missing = accept(&*process.store, &repo("mirror/a"), &bytes, &["v1"], &rules).unwrap();
    assert_eq!(missing, [absent]);
    assert_eq!(process.tagged(&repo("mirror/a"), "v1"), Some(sha256(bytes.as_bytes())));
    let refused = accept(&*process.store, &repo("other"), &bytes, &["v1"], &rules);
    assert!(matches!(refused, Err(ChangeError::Missing(_))), "{refused:?}");
}

pub(crate) fn a_tag_moves_and_what_it_named_stays(place: &Place) {
    let process = place.start();
    let r = repo("r");
    let (one, two) = (index("one", None), index("two", None));
    let first = process.put(&r, &one, &["latest", "v1"]);
    let second = process.put(&r, &two, &["latest"]);
    assert_eq!(process.tagged(&r, "latest").as_ref(), Some(&second));
    assert_eq!(process.tagged(&r, "v1").as_ref(), Some(&first));
    let found = process.store.find_manifest(&r, &Reference::Digest(first)).unwrap().unwrap();
    assert_eq!((&*found.bytes, &*found.media_type), (one.as_bytes(), model::OCI_INDEX));
    process.put(&r, &one, &["latest"]);
    assert_eq!(process.tagged(&r, "latest"), process.tagged(&r, "v1"));
    assert!(process.has_manifest(&r, &second));
    assert_eq!(process.tagged(&repo("other"), "latest"), None);
}

pub(crate) fn a_deleted_manifest_takes_its_tags_along(place: &Place) {
    let process = place.start();
    let r = repo("r");
    let one = process.put(&r, &index("one", None), &["a", "b"]);
    let two = process.put(&r, &index("two", None), &["c"]);
    assert_eq!(process.remove(&r, Some(by_tag("a"))), Removed { count: 1, tags: vec![] });
    assert_eq!(process.remove(&r, Some(by_tag("a"))), Removed::default());
    assert!(process.has_manifest(&r, &one));
    let gone = process.remove(&r, Some(Reference::Digest(one.clone())));
    assert_eq!(gone, Removed { count: 1, tags: vec![tag("b")] });
    assert_eq!(process.remove(&r, Some(Reference::Digest(one.clone()))), Removed::default());
    assert!(!process.has_manifest(&r, &one));
    assert_eq!(process.tags(&r), ["c"]);
    assert_eq!(process.remove(&r, None).count, 2);
    assert!(!process.has_manifest(&r, &two) && process.tags(&r).is_empty());
    process.put(&r, &index("one", None), &["a"]);
    assert_eq!(process.tagged(&r, "a"), Some(one));
}

pub(crate) fn a_tag_that_never_changes_neither_moves_nor_goes(place: &Place) {
    let process = place.start();
    let (r, rules) = (repo("r"), never_changing("v*"));
    let (one, two) = (index("one", None), index("two", None));
    let first = put(&*process.store, &r, &one, &["v1", "latest"], &rules).unwrap();
    let is_kept = |refused: ChangeError| match refused {
        ChangeError::Immutable { tag, names } => assert_eq!((tag.as_str(), &names), ("v1", &first)),
        other => panic!("{other:?}"),
    };
    is_kept(put(&*process.store, &r, &two, &["latest", "v1"], &rules).unwrap_err());
    assert_eq!(process.tagged(&r, "latest").as_ref(), Some(&first), "a push that is refused moves no tag");
    put(&*process.store, &r, &one, &["v1"], &rules).unwrap();
    let manifest = Reference::Digest(first.clone());
    for reference in [Some(&by_tag("v1")), Some(&manifest), None] {
        is_kept(process.store.remove(&r, reference, &rules).unwrap_err());
    }
    let second = put(&*process.store, &r, &two, &["latest"], &rules).unwrap();
    for reference in [by_tag("v9"), by_tag("latest"), Reference::Digest(second)] {
        process.store.remove(&r, Some(&reference), &rules).unwrap();
    }
    assert_eq!(process.tags(&r), ["v1"]);
}

pub(crate) fn of_many_who_put_a_tag_that_never_changes_one_does(place: &Place) {
    let process = place.start();
    let (r, rules) = (repo("r"), never_changing("v*"));
    for round in 0..8 {
        let name = format!("v{round}");
        let done: Vec<_> = thread::scope(|scope| {
            let put = |n: usize| put(&*process.store, &r, &index(&format!("{n}"), None), &[&name], &rules);
            let threads: Vec<_> = (0..4).map(|n| scope.spawn(move || put(n))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let winners: Vec<_> = done.iter().flatten().collect();
        assert_eq!(winners.len(), 1, "{done:?}");
        assert_eq!(process.tagged(&r, &name).as_ref(), Some(winners[0]));
        let losers = done.iter().filter_map(|done| done.as_ref().err());
        losers.for_each(|error| assert!(matches!(error, ChangeError::Immutable { .. }), "{error:?}"));
    }
}

/// Checks that pages of every size together are what a sorted set holds.
fn assert_pages(all: &BTreeSet<String>, page: impl Fn(Option<&str>, usize) -> Page) {
    let nothing = page(None, 0);
    assert_eq!((nothing.names.len(), nothing.more), (0, !all.is_empty()));
    for limit in [1, 3, all.len(), all.len() + 1] {
        let mut listed: Vec<String> = Vec::new();
        loop {
            let Page { names, more } = page(listed.last().map(String::as_str), limit);
            assert!(names.len() <= limit && (names.len() == limit || !more));
            listed.extend(names);
            if !more {
                break;
            }
        }
        assert!(listed.iter().eq(all), "in pages of {limit}: {listed:?}");
    }
    for after in ["", "0", "b", "v1", "zzz"] {
        let behind: Vec<_> = all.iter().filter(|name| name.as_str() > after).cloned().collect();
        assert_eq!(page(Some(after), usize::MAX), Page { names: behind, more: false }, "behind {after:?}");
    }
}

pub(crate) fn tags_come_in_pages_in_lexical_order(place: &Place) {
    let process = place.start();
    let r = repo("r");
    assert_eq!(process.store.tags(&r, None, 10).unwrap(), None);
    let names = ["v1", "v1.0", "v10", "v2", "V1", "_x", "1", "b", "b-c", "a.b"];
    process.put(&r, &index("one", None), &names[..5]);
    process.put(&r, &index("two", None), &names[3..]);
    process.put(&repo("r/below"), &index("two", None), &["below"]);
    let names = names.into_iter().map(str::to_owned).collect();
    assert_pages(&names, |after, limit| process.store.tags(&r, after, limit).unwrap().unwrap());
    process.push_blob(&repo("blobs-only"), b"a blob");
    let none = process.store.tags(&repo("blobs-only"), None, 10).unwrap();
    assert_eq!(none, Some(Page::default()), "a repository without tags is one");
}

pub(crate) fn repositories_come_in_pages_in_lexical_order(place: &Place) {
    let process = place.start();
    assert_eq!(process.store.repositories(None, 10).unwrap(), Page::default());
    let names = ["a", "a-b", "a.b", "a/b", "a/b/c", "a/b-c", "a0", "b/c/d", "z/y/x"];
    for (n, name) in names.iter().enumerate() {
        match n % 2 {
            0 => drop(process.push_blob(&repo(name), b"blob")),
            _ => drop(process.put(&repo(name), &index(name, None), &["v1"])),
        }
    }
    process.acknowledged(&repo("only-uploads"), b"some");
    let names = names.into_iter().map(str::to_owned).collect();
    assert_pages(&names, |after, limit| process.store.repositories(after, limit).unwrap());
}

pub(crate) fn what_a_repository_has_comes_in_pages_in_the_order_of_digests(place: &Place) {
    let process = place.start();
    let (r, store) = (repo("r"), &process.store);
    let mut blobs: Vec<_> = (0..23_u32).map(|n| process.push_blob(&r, &n.to_le_bytes())).collect();
    let mut manifests: Vec<_> = (0..7).map(|n| process.put(&r, &index(&n.to_string(), None), &[])).collect();
    process.push_blob(&repo("r/s"), b"another's");
    process.remove(&r, Some(Reference::Digest(manifests.swap_remove(3))));
    assert!(store.delete_blob(&r, &blobs.swap_remove(5)).unwrap());
    for (of, all) in [(Content::Blobs, &mut blobs), (Content::Manifests, &mut manifests)] {
        all.sort();
        for limit in [1, 4, all.len(), 1000] {
            let mut listed: Vec<Digest> = Vec::new();
            loop {
                let page = store.digests(&r, of, listed.last(), limit).unwrap();
                assert!(page.len() <= limit);
                let is_last = page.len() < limit;
                listed.extend(page);
                if is_last {
                    break;
                }
            }
            assert_eq!(listed, *all, "{of:?} by {limit}");
        }
        assert!(store.digests(&repo("none"), of, None, 10).unwrap().is_empty());
    }
}

pub(crate) fn a_session_of_a_known_id_is_found_without_a_note(place: &Place) {
    let (r, id, whole) = (repo("r"), Uuid::from_u128(7 << 100), content(5000, 1));
    {
        let process = place.start();
        assert!(process.open(&r, id).is_none());
        process.store.begin_upload_as(&r, id, Algorithm::Sha256).unwrap();
        process.take(process.open(&r, id).unwrap(), &whole[..3000], None, Ending::Acknowledged);
    }
    place.start().finish(&r, id, &whole);
}

pub(crate) fn a_client_finds_what_it_left_with_its_session(place: &Place) {
    let (r, id, whole) = (repo("r"), Uuid::from_u128(9 << 100), content(5000, 1));
    {
        let process = place.start();
        assert_eq!(process.store.upload_note(&r, id).unwrap(), None);
        process.store.begin_upload_as(&r, id, Algorithm::Sha256).unwrap();
        assert_eq!(process.store.upload_note(&r, id).unwrap(), None);
        for (note, part) in [("at 0", &whole[..2000]), ("at 2000", &whole[2000..3000])] {
            let mut session = process.open(&r, id).unwrap();
            session.leave_note(note.into());
            process.take(session, part, None, Ending::Acknowledged);
            assert_eq!(process.store.upload_note(&r, id).unwrap().as_deref(), Some(note));
        }
        process.take(process.open(&r, id).unwrap(), &whole[3000..4000], None, Ending::Acknowledged);
        assert_eq!(process.store.upload_note(&repo("s"), id).unwrap(), None);
    }
    let process = place.start();
    assert_eq!(process.store.upload_note(&r, id).unwrap().as_deref(), Some("at 2000"));
    process.finish(&r, id, &whole);
    assert_eq!(process.store.upload_note(&r, id).unwrap(), None);
}

pub(crate) fn where_all_has_gone_outlives_the_process(place: &Place) {
    {
        let process = place.start();
        assert_eq!(process.store.moved().unwrap(), None);
        process.store.freeze(Duration::from_secs(60)).unwrap();
        assert_eq!(process.store.moved().unwrap(), None);
        process.store.note_moved(Some("the moon")).unwrap();
    }
    let process = place.start();
    assert_eq!(process.store.moved().unwrap().as_deref(), Some("the moon"));
    process.store.note_moved(None).unwrap();
    process.store.note_moved(None).unwrap();
    assert_eq!(process.store.moved().unwrap(), None);
    process.push_blob(&repo("r"), b"back");
}

pub(crate) fn referrers_come_in_the_order_of_their_digests(place: &Place) {
    let process = place.start();
    let r = repo("r");
    let subject = sha256(b"it need not be there");
    let mut all: Vec<Digest> =
        (0..7).map(|n| process.put(&r, &index(&format!("signature {n}"), Some(&subject)), &[])).collect();
    process.put(&r, &index("of another", Some(&all[0])), &[]);
    process.put(&repo("other"), &index("elsewhere", Some(&subject)), &[]);
    let list = |after: Option<&Digest>, most: usize| {
        let mut seen = Vec::new();
        let mut visit = |manifest: &Manifest| {
            seen.push(manifest.digest.clone());
            if seen.len() == most { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        process.store.referrers(&r, &subject, after, &mut visit).unwrap();
        seen
    };
    all.sort();
    assert_eq!(list(None, usize::MAX), all);
    assert_eq!(list(None, 3), all[..3]);
    assert_eq!(list(Some(&all[2]), usize::MAX), all[3..]);
    process.remove(&r, Some(Reference::Digest(all.remove(4))));
    assert_eq!(list(None, usize::MAX), all);
}

/// How garbage is collected, as fast as it goes.
pub(crate) fn collecting() -> Options {
    Options { rules: Arc::default(), upload_age: LONG, dry_run: false, removals_per_second: u32::MAX }
}

fn collect(store: &dyn Store, dry_run: bool) -> Counts {
    let options = Options { dry_run, ..collecting() };
    let counts = Counts::default();
    store.collect(&options, &counts, &AtomicBool::new(false)).unwrap().expect("no other runs");
    counts
}

pub(crate) fn garbage_goes_when_it_is_old_and_nothing_else_does(place: &Place) {
    let process = place.start();
    let (a, b) = (repo("a"), repo("b"));
    let (config, layer) = (process.push_blob(&a, b"config"), process.push_blob(&a, b"layer"));
    let manifest = process.put(&a, &image("image", &config, std::slice::from_ref(&layer)), &["v1"]);
    let loose = process.push_blob(&a, b"loose");
    process.store.mount_blob(&a, &b, &loose).unwrap().unwrap();
    let upload = process.acknowledged(&a, b"some");
    collect(&*process.store, false);
    let is_there = |process: &Process, repo: &RepoName, digest: &Digest| process.read(repo, digest).is_some();
    assert!(is_there(&process, &a, &loose), "it is new");
    drop(process);

    let process = place.start_with(Duration::ZERO);
    let deadline = Instant::now() + PATIENCE;
    while collect(&*process.store, true).removed_blobs.load(Ordering::Relaxed) == 0 {
        assert!(Instant::now() < deadline, "a loose blob never becomes garbage");
        thread::sleep(Duration::from_millis(20));
    }
    assert!(is_there(&process, &a, &loose), "that was a dry run");
    while is_there(&process, &a, &loose) || is_there(&process, &b, &loose) {
        assert!(Instant::now() < deadline, "a loose blob stays");
        collect(&*process.store, false);
    }
    for digest in [&config, &layer] {
        assert!(is_there(&process, &a, digest));
    }
    assert_eq!(process.tagged(&a, "v1").as_ref(), Some(&manifest));
    assert_eq!(process.store.upload_offset(&a, upload).unwrap(), Some(4));
    process.remove(&a, None);
    while is_there(&process, &a, &config) || is_there(&process, &a, &layer) {
        assert!(Instant::now() < deadline, "blobs stay whose manifest is gone");
        collect(&*process.store, false);
    }
    // What is garbage may be pushed again.
    process.push_blob(&a, b"config");
    assert!(is_there(&process, &a, &config));
}

pub(crate) fn pushes_beside_collections_lose_nothing(place: &Place) {
    let process = place.start_with(Duration::ZERO);
    let repos = ["a", "b"].map(repo);
    let done = AtomicBool::new(false);
    let accepted: Vec<(&RepoName, Vec<u8>, Digest)> = thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                collect(&*process.store, false);
            }
        });
        let pushers: Vec<_> = repos
            .iter()
            .map(|repo| {
                let process = &process;
                scope.spawn(move || {
                    let mut accepted = Vec::new();
                    for n in 0..40 {
                        // Both push the same, and the blobs of the one before are garbage by and by.
                        let layer = content(2000, n / 4);
                        let digest = sha256(&layer);
                        let bytes = image("image", &digest, std::slice::from_ref(&digest));
                        if process.store.claim_blob(repo, &digest).unwrap().is_none() {
                            process.push_blob(repo, &layer);
                        }
                        match put(&*process.store, repo, &bytes, &["v1"], &Rules::default()) {
                            Ok(manifest) if n % 4 == 3 => accepted.push((repo, layer, manifest)),
                            Ok(manifest) => drop(process.remove(repo, Some(Reference::Digest(manifest)))),
                            // It was slower than the grace period.
                            Err(ChangeError::Missing(_)) => {}
                            Err(error) => panic!("{error:?}"),
                        }
                    }
                    accepted
                })
            })
            .collect();
        let accepted = pushers.into_iter().flat_map(|pusher| pusher.join().unwrap()).collect();
        done.store(true, Ordering::Relaxed);
        accepted
    });
    collect(&*process.store, false);
    for (repo, layer, manifest) in accepted {
        assert!(process.has_manifest(repo, &manifest));
        assert!(process.read(repo, &sha256(&layer)).as_ref() == Some(&layer), "{manifest} lacks its blob");
    }
}

pub(crate) fn a_store_that_works_says_so(place: &Place) {
    let process = place.start();
    process.store.probe().unwrap();
    assert_eq!(process.store.stats().damaged_blobs, 0);
    let id = process.store.begin_upload(&repo("r"), Algorithm::Sha256).unwrap();
    let mut session = process.open(&repo("r"), id).unwrap();
    assert!(session.is_fresh());
    session.admit(Some(10), Some(&sha256(b"ten bytes."))).unwrap();
    session.commit_small(b"ten bytes.", &sha256(b"ten bytes.")).unwrap();
    assert_eq!(process.read(&repo("r"), &sha256(b"ten bytes.")).unwrap(), b"ten bytes.");
}
