//! Every operation, on both servers.

use super::*;
use crate::digest::{Algorithm, Digest};
use crate::s3::object::DELETE_KEYS_MAX;

#[tokio::test]
async fn an_object_is_written_looked_at_read_and_removed() {
    for fixture in Fixture::both().await {
        let client = &fixture.client;
        let etag = fixture.put("a/b", b"content").await;
        let head = client.head("a/b").await.unwrap();
        assert_eq!((head.bytes, &head.etag), (7, &etag));
        let object = client.get("a/b", 7).await.unwrap();
        assert_eq!(
            (&object.content[..], &object.etag, object.modified),
            (&b"content"[..], &etag, head.modified)
        );
        let now = client.server_now().await.unwrap();
        assert!(head.modified <= now.latest && now.earliest <= now.latest);
        assert!(now.latest.duration_since(head.modified).unwrap() < Duration::from_secs(60));

        let error = client.get("a/b", 6).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Other);
        client.delete("a/b", None).await.unwrap();
        client.delete("a/b", None).await.unwrap();
        for error in [client.head("a/b").await.unwrap_err(), client.get("a/b", 7).await.unwrap_err()] {
            assert_eq!((error.kind(), error.is_uncertain()), (Kind::NotFound, false));
            let bucket = &fixture.settings.bucket;
            assert!(
                error.to_string().contains(&format!("\"some/root/a/b\" in bucket \"{bucket}\"")),
                "{error}"
            );
        }
        fixture.put("empty", b"").await;
        assert_eq!(fixture.content("empty").await.len(), 0);
    }
}

#[tokio::test]
async fn content_that_changed_on_its_way_is_refused() {
    let fixture = Fixture::minio().await;
    let hash = |content: &[u8]| Some(Digest::of(Algorithm::Sha256, content).hex().to_owned());
    let put = |content: &Bytes, sha256| {
        fixture.client.put("key", content.clone(), Put { sha256, ..Put::default() })
    };
    for content in [Bytes::from_static(b"short"), noise(100_000)] {
        assert_eq!(put(&content, hash(b"another")).await.unwrap_err().kind(), Kind::Other);
        put(&content, hash(&content)).await.unwrap();
        put(&content, None).await.unwrap();
        assert!(fixture.content("key").await == content);
    }
}

#[tokio::test]
async fn a_range_gives_exactly_what_was_asked_for() {
    for fixture in Fixture::both().await {
        let (client, content) = (&fixture.client, noise(300_000));
        let etag = fixture.put("key", &content).await;
        for range in [0..1, 0..300_000, 70_000..200_001, 299_999..300_000, 5..5, 300_000..300_000] {
            let body = client.get_range("key", range.clone(), Some(&etag)).await.unwrap();
            assert_eq!(body.remaining(), range.end - range.start);
            let asked = &content[range.start as usize..range.end as usize];
            assert!(read_all(body).await.unwrap() == asked, "{range:?}");
        }
        for bad in [0..300_001, 300_000..300_001, 300_001..300_001] {
            assert_eq!(client.get_range("key", bad, None).await.unwrap_err().kind(), Kind::Other);
        }
        fixture.put("key", b"another").await;
        let error = client.get_range("key", 0..7, Some(&etag)).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Precondition);
        assert_eq!(client.get_range("none", 0..7, None).await.unwrap_err().kind(), Kind::NotFound);
    }
}

#[tokio::test]
async fn the_start_of_an_object_comes_with_its_length() {
    for fixture in Fixture::both().await {
        let (client, content) = (&fixture.client, noise(300_000));
        fixture.put("key", &content).await;
        for bytes in [1, 299_999, 300_000, 300_001] {
            let (head, body) = client.get_start("key", bytes).await.unwrap();
            assert_eq!(head, client.head("key").await.unwrap());
            assert!(read_all(body).await.unwrap() == content[..300_000.min(bytes as usize)], "{bytes}");
        }
        fixture.put("empty", b"").await;
        let (head, body) = client.get_start("empty", 10).await.unwrap();
        assert_eq!((head.bytes, read_all(body).await.unwrap().len()), (0, 0));
        assert_eq!(client.get_start("none", 10).await.unwrap_err().kind(), Kind::NotFound);
    }
}

#[tokio::test]
async fn a_list_is_in_order_and_in_pages() {
    for fixture in Fixture::both().await {
        let client = &fixture.client;
        let keys = ["a", "b/1", "b/2/x", "b/2/y", "b/3", "b-4", "c"];
        for key in keys {
            fixture.put(key, key.as_bytes()).await;
        }
        let all = |listing: Listing<'static>| async move {
            let (mut keys, mut prefixes, mut next, mut pages) = (Vec::new(), Vec::new(), None, 0);
            loop {
                let page = client.list(listing, next.as_deref()).await.unwrap();
                pages += 1;
                for (key, head) in page.objects {
                    assert_eq!(head.bytes, key.len() as u64);
                    keys.push(key);
                }
                prefixes.extend(page.prefixes);
                next = page.next;
                if next.is_none() {
                    return (keys, prefixes, pages);
                }
            }
        };
        let mut sorted = keys;
        sorted.sort_unstable();
        assert_eq!(all(Listing::default()).await, (sorted.map(str::to_owned).to_vec(), vec![], 1));
        let pages = Listing { page_entries_max: Some(2), ..Listing::default() };
        let (found, _, count) = all(pages).await;
        assert_eq!((found.len(), count), (7, 4));
        let below = Listing { prefix: "b/", delimiter: Some('/'), ..Listing::default() };
        let strings = |keys: &[&str]| keys.iter().map(|key| (*key).to_owned()).collect::<Vec<_>>();
        assert_eq!(all(below).await, (strings(&["b/1", "b/3"]), strings(&["b/2/"]), 1));
        let after = Listing { start_after: Some("b/2/x"), ..Listing::default() };
        assert_eq!(all(after).await.0, strings(&["b/2/y", "b/3", "c"]));
        let none = Listing { prefix: "d", ..Listing::default() };
        assert_eq!(all(none).await.0, strings(&[]));
    }
}

#[tokio::test]
async fn many_are_removed_at_once_and_only_they() {
    for fixture in Fixture::both().await {
        let client = &fixture.client;
        for key in ["a", "b", "c"] {
            fixture.put(key, b"x").await;
        }
        let keys = |keys: &[&str]| keys.iter().map(|key| (*key).to_owned()).collect::<Vec<_>>();
        let failed = client.delete_many(&keys(&["a", "c", "none"]), None).await.unwrap();
        assert!(failed.is_empty(), "{failed:?}");
        let left = client.list(Listing::default(), None).await.unwrap().objects;
        assert_eq!(left.into_iter().map(|(key, _)| key).collect::<Vec<_>>(), keys(&["b"]));
        assert!(client.delete_many(&[], None).await.unwrap().is_empty());
        let too_many = vec!["x".to_owned(); DELETE_KEYS_MAX + 1];
        assert_eq!(client.delete_many(&too_many, None).await.unwrap_err().kind(), Kind::Other);
        let now = client.server_now().await.unwrap().earliest;
        let valid = Validity { from: now, lasts: Duration::from_secs(20) };
        assert!(client.delete_many(&keys(&["b"]), Some(valid)).await.unwrap().is_empty());
        assert!(client.head("b").await.unwrap_err().is_not_found());
    }
}

#[tokio::test]
async fn an_upload_in_parts_becomes_an_object() {
    for fixture in Fixture::both().await {
        let client = &fixture.client;
        let upload = client.create_upload("big", Some("application/octet-stream")).await.unwrap();
        let other = client.create_upload("other", None).await.unwrap();
        let content = noise(6 << 20);
        let (first, last) = (content.slice(..5 << 20), content.slice(5 << 20..));
        client.upload_part(&upload, 2, first.clone()).await.unwrap();
        let parts = [
            client.upload_part(&upload, 1, first).await.unwrap(),
            client.upload_part(&upload, 2, last).await.unwrap(),
        ];
        let begun = client.uploads("", None).await.unwrap();
        let mut found: Vec<_> = begun.uploads.into_iter().map(|(upload, _)| upload).collect();
        found.sort_by(|a, b| a.key.cmp(&b.key));
        // MinIO tells of the uploads to one key alone, and only if it is named whole.
        if !found.is_empty() {
            assert_eq!(found, [upload.clone(), other.clone()]);
        }
        let begun = client.uploads("big", None).await.unwrap().uploads;
        assert_eq!(
            begun.into_iter().map(|(upload, _)| upload).collect::<Vec<_>>(),
            std::slice::from_ref(&upload)
        );

        assert!(client.head("big").await.unwrap_err().is_not_found());
        let etag = client.complete_upload(&upload, &parts, None, None).await.unwrap();
        assert_eq!(client.head("big").await.unwrap().etag, etag);
        assert!(fixture.content("big").await == content);
        client.abort_upload(&other).await.unwrap();
        client.abort_upload(&other).await.unwrap();
        for ended in [&upload, &other] {
            // moto fails inside when a part comes to an upload that has ended.
            if !fixture.is_moto {
                let late = client.upload_part(ended, 1, Bytes::from_static(b"late")).await;
                assert_eq!(late.unwrap_err().kind(), Kind::NotFound);
            }
        }
        assert!(client.uploads("big", None).await.unwrap().uploads.is_empty());
    }
}

#[tokio::test]
async fn a_copy_has_the_bytes_in_one_piece_and_in_parts() {
    for fixture in Fixture::both().await {
        let content = noise(12 << 20);
        fixture.put("from + with %", &content).await;
        for limit in [64 << 20, 5 << 20] {
            let client = Client::open_with(fixture.settings.clone(), limit).await.unwrap();
            let to = format!("to-{limit}");
            let etag = client.copy("from + with %", &to, None).await.unwrap();
            let parts = etag.trim_matches('"').split_once('-').map(|(_, parts)| parts.to_owned());
            assert_eq!(parts, (limit == 5 << 20).then(|| "3".to_owned()));
            assert!(fixture.content(&to).await == content);
            assert_eq!(client.copy("none", &to, None).await.unwrap_err().kind(), Kind::NotFound);
        }
    }
}

#[tokio::test]
async fn what_the_store_is_to_encrypt_with_is_asked_for() {
    let fixture = Fixture::minio().await;
    for encryption in [Encryption::Aes256, Encryption::Kms] {
        let kms_key_id = (encryption == Encryption::Kms).then(|| "tests".to_owned());
        let settings = Settings { encryption: Some(encryption), kms_key_id, ..fixture.settings.clone() };
        let client = Client::open(settings).await.unwrap();
        client.put("key", Bytes::from_static(b"secret"), Put::new()).await.unwrap();
        let upload = client.create_upload("parts", None).await.unwrap();
        let part = client.upload_part(&upload, 1, Bytes::from_static(b"secret")).await.unwrap();
        client.complete_upload(&upload, &[part], None, None).await.unwrap();
        client.copy("key", "copy", None).await.unwrap();
        for key in ["key", "parts", "copy"] {
            let request = client.s3().head_object().bucket(client.bucket()).key(client.full(key));
            let told = request.send().await.unwrap().server_side_encryption;
            assert_eq!(told, client.encryption(), "{key}");
            client.delete(key, None).await.unwrap();
        }
    }
}

#[tokio::test]
async fn what_a_client_does_can_be_done_on_any_thread() {
    let fixture = Fixture::minio().await;
    let client = fixture.client.clone();
    let work = tokio::spawn(async move {
        client.put("key", Bytes::from_static(b"x"), Put::new()).await?;
        client.copy("key", "copy", None).await?;
        let mut body = client.get_range("copy", 0..1, None).await?;
        body.next().await?;
        client.probe().await
    });
    work.await.unwrap().unwrap();
}
