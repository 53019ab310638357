//! Lists: tags and repositories in pages, referrers with and without a filter.

use serde_json::json;

use crate::support::{OCI_INDEX, OCI_MANIFEST, Reply, Served, descriptor, image, index, referrer, sha256};

/// The path of the next page, by the `Link` header.
fn next(reply: &Reply) -> Option<String> {
    let link = reply.headers.get("link")?.to_str().unwrap();
    let path = link.strip_prefix('<').unwrap().strip_suffix(">; rel=\"next\"").unwrap();
    Some(path.to_owned())
}

fn names(reply: &Reply, key: &str) -> Vec<String> {
    serde_json::from_value(reply.json()[key].clone()).unwrap()
}

#[tokio::test]
async fn pages_of_tags_are_slices_of_the_sorted_list() {
    let served = Served::new().await;
    let mut tags = ["v10", "v9", "V1", "_a", "a.b", "a-b", "a", "latest", "0", "Z"];
    for tag in tags {
        served.push_image("team/a", tag, 1).await;
    }
    tags.sort_unstable();
    let all = served.get("/v2/team/a/tags/list").await.expect(200);
    assert_eq!(all.json(), json!({"name": "team/a", "tags": tags}));
    assert_eq!(next(&all), None);
    let behinds = ["", "0", "V1", "a-", "nonexistent", "zzz", "a%2Db", "~"];
    for n in 0..=tags.len() + 1 {
        for last in tags.into_iter().chain(behinds) {
            let reply = served.get(&format!("/v2/team/a/tags/list?n={n}&last={last}")).await.expect(200);
            let last = last.replace("%2D", "-");
            let behind: Vec<_> = tags.into_iter().filter(|tag| last.is_empty() || *tag > &*last).collect();
            let page = &behind[..behind.len().min(n)];
            assert_eq!(names(&reply, "tags"), page, "n={n}, last={last}");
            // A page of no tags has no last one to go on from.
            assert_eq!(next(&reply).is_some(), n > 0 && page.len() < behind.len(), "n={n}, last={last}");
        }
        let mut seen = Vec::new();
        let mut path = (n > 0).then(|| format!("/v2/team/a/tags/list?n={n}"));
        while let Some(now) = path {
            let reply = served.get(&now).await.expect(200);
            seen.extend(names(&reply, "tags"));
            path = next(&reply);
        }
        assert!(n == 0 || seen == tags, "n={n}: {seen:?}");
    }
}

#[tokio::test]
async fn a_list_is_of_a_repository_that_exists() {
    let served = Served::new().await;
    served.push_blob("blobs/only", b"x").await;
    served.push_image("vi/ns/disk", "1", 1).await;
    assert_eq!(names(&served.get("/v2/blobs/only/tags/list").await.expect(200), "tags"), [""; 0]);
    // A directory on the way to repositories is none itself.
    for none in ["nobody", "vi", "vi/ns", "vi/ns/disk/more"] {
        let reply = served.get(&format!("/v2/{none}/tags/list")).await.expect_error(404, "NAME_UNKNOWN");
        assert_eq!(reply.json()["errors"][0]["detail"]["name"], none);
    }
    for bad in ["-1", "x", "1.5", "99999999999999999999999"] {
        let path = format!("/v2/vi/ns/disk/tags/list?n={bad}");
        served.get(&path).await.expect_error(400, "PAGINATION_NUMBER_INVALID");
    }
}

#[tokio::test]
async fn repositories_are_listed_in_pages() {
    let served = Served::new().await;
    assert_eq!(names(&served.get("/v2/_catalog").await.expect(200), "repositories"), [""; 0]);
    let mut repos = ["b", "a/b/c", "a", "a-b", "a.b/c", "vi/x/y"];
    for repo in repos {
        served.push_blob(repo, b"x").await;
    }
    served.begin("not/yet").await;
    repos.sort_unstable();
    assert_eq!(names(&served.get("/v2/_catalog").await.expect(200), "repositories"), repos);
    for n in 1..=repos.len() + 1 {
        let mut seen = Vec::new();
        let mut path = Some(format!("/v2/_catalog?n={n}"));
        while let Some(now) = path {
            let reply = served.get(&now).await.expect(200);
            let page = names(&reply, "repositories");
            assert!(page.len() <= n);
            seen.extend(page);
            path = next(&reply);
        }
        assert_eq!(seen, repos, "n={n}");
    }
}

#[tokio::test]
async fn referrers_are_listed_and_filtered_by_artifact_type() {
    let served = Served::new().await;
    served.push_blob("a", b"{}").await;
    let subject = image(OCI_MANIFEST, b"{}", &[]);
    let digest = sha256(subject.to_string().as_bytes());
    let path = format!("/v2/a/referrers/{digest}");
    let listed = async |query: &str| {
        let reply = served.get(&format!("{path}{query}")).await.expect(200);
        assert_eq!(reply.header("content-type"), OCI_INDEX);
        let filtered = reply.header("oci-filters-applied");
        assert_eq!(filtered, if query.is_empty() { "" } else { "artifactType" });
        let list = reply.json();
        assert_eq!((&list["schemaVersion"], &list["mediaType"]), (&json!(2), &json!(OCI_INDEX)));
        let mut notes: Vec<String> = Vec::new();
        for manifest in list["manifests"].as_array().unwrap() {
            notes.push(manifest["annotations"]["note"].as_str().unwrap().to_owned());
            // What is listed can be pulled, and is what it says.
            let digest = manifest["digest"].as_str().unwrap();
            let pulled = served.get(&format!("/v2/a/manifests/{digest}")).await.expect(200);
            assert_eq!(manifest["size"], pulled.body.len());
            assert_eq!(manifest["mediaType"], pulled.header("content-type"));
        }
        notes.sort_unstable();
        notes.join(" ")
    };
    // Of a subject that is not there, and of a repository that is not there.
    assert_eq!(listed("").await, "");
    served.get(&format!("/v2/nobody/referrers/{digest}")).await.expect(200);

    // Referrers may come before their subject.
    let sbom = referrer(&subject, Some("application/sbom"), "sbom");
    let bytes = sbom.to_string();
    let put = served.send("PUT", "/v2/a/manifests/sbom", &[("content-type", OCI_MANIFEST)], bytes).await;
    assert_eq!(put.expect(201).header("oci-subject"), digest);
    served.push_manifest("a", "subject", &subject).await;
    for (artifact_type, note) in
        [(Some("application/sbom"), "other"), (Some("application/signature+x"), "signed"), (None, "config")]
    {
        served.push_manifest("a", note, &referrer(&subject, artifact_type, note)).await;
    }
    let mut list = index(OCI_INDEX, &[&subject]);
    list["subject"] = descriptor(OCI_MANIFEST, subject.to_string().as_bytes());
    list["annotations"] = json!({"note": "index"});
    served.push_manifest("a", "index", &list).await;
    served.push_manifest("a", "unrelated", &referrer(&list, Some("application/sbom"), "unrelated")).await;

    assert_eq!(listed("").await, "config index other sbom signed");
    assert_eq!(listed("?artifactType=application/sbom").await, "other sbom");
    assert_eq!(listed("?artifactType=application%2Fsignature%2Bx").await, "signed");
    // An image without artifactType counts by the type of its config.
    assert_eq!(listed("?artifactType=application/vnd.oci.image.config.v1%2Bjson").await, "config");
    assert_eq!(listed("?artifactType=application/none").await, "");

    served
        .ask("DELETE", &format!("/v2/a/manifests/{}", sha256(sbom.to_string().as_bytes())))
        .await
        .expect(202);
    assert_eq!(listed("?artifactType=application/sbom").await, "other");
    // A tag is not what refers.
    served.ask("DELETE", "/v2/a/manifests/other").await.expect(202);
    assert_eq!(listed("?artifactType=application/sbom").await, "other");
    // Nor does the subject have to stay.
    served.ask("DELETE", &format!("/v2/a/manifests/{digest}")).await.expect(202);
    assert_eq!(listed("").await, "config index other signed");
}

#[tokio::test]
async fn long_lists_of_referrers_come_in_pages_no_larger_than_a_manifest() {
    let served = Served::new().await;
    served.push_blob("a", b"{}").await;
    let subject = image(OCI_MANIFEST, b"{}", &[]);
    let mut pushed = Vec::new();
    for n in 0..6 {
        let note = n.to_string() + &"x".repeat(1 << 20);
        let manifest = referrer(&subject, Some(if n == 0 { "a/b" } else { "c+d" }), &note);
        pushed.push(served.push_manifest("a", &format!("t{n}"), &manifest).await);
    }
    let path = format!("/v2/a/referrers/{}", sha256(subject.to_string().as_bytes()));
    for (query, mut wanted) in [("", pushed.clone()), ("?artifactType=c%2Bd", pushed[1..].to_vec())] {
        let (mut seen, mut pages) = (Vec::new(), 0);
        let mut page = Some(format!("{path}{query}"));
        while let Some(now) = page {
            let reply = served.get(&now).await.expect(200);
            assert!(reply.body.len() <= 4 << 20);
            for manifest in reply.json()["manifests"].as_array().unwrap() {
                seen.push(manifest["digest"].as_str().unwrap().to_owned());
            }
            pages += 1;
            page = next(&reply);
        }
        wanted.sort_unstable();
        assert_eq!((seen, pages), (wanted, 2), "{query}");
    }
}
