//! What the specification's main branch asks for beyond 1.1, and what it asks for at 1.1, tried with every kind of content.
//!
//! The conformance program of version 1.1 is run in `main.rs`. The one of the main branch (`OCI_VERSION=dev`) cannot be
//! had as a Go module, so its questions are asked here: every way to push a blob, by both digests; every shape of manifest
//! pushed, listed, looked at, pulled, found by its subject, and deleted.

use crate::support::{
    Client, OCI_INDEX, OCI_MANIFEST, Reply, descriptor_of, digest, digest_512, noise, with_digest,
};
use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use dvcr_tests::{Registry, temp_dir};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::{Value, json};
use std::collections::BTreeMap;

const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const NONDISTRIBUTABLE: &str = "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip";
const EMPTY: &str = "application/vnd.oci.empty.v1+json";
const ARTIFACT: &str = "application/vnd.example.artifact.v1";
const OTHER_ARTIFACT: &str = "application/vnd.example.artifact.v2";

/// Where manifests may be sparse.
const SPARSE_REPO: &str = "sparse/repo";
/// So many questions are asked; less means that some were lost.
const CHECKS_MIN: usize = 1300;

type Hash = fn(&Bytes) -> String;

#[tokio::test(flavor = "multi_thread")]
async fn what_the_specification_asks_for_is_answered() -> Result<()> {
    let dir = temp_dir();
    let registry = Registry::start_with(dir.path(), &["--allow-sparse-manifests", "sparse/**"])?;
    let mut report = Report::default();
    let client = Client::new(&registry.url());
    report.add("ping", client.get("/v2/").await?.expect(200).map(drop));
    for (algorithm, hash) in [("sha256", digest as Hash), ("sha512", digest_512)] {
        blobs(&client, &mut report, algorithm, hash).await?;
    }
    for data in all_data() {
        let repo = if data.name.starts_with("sparse") { SPARSE_REPO } else { "conformance/repo" };
        let name = data.name;
        push(&client, &mut report, repo, &data).await.with_context(|| format!("push of {name}"))?;
        list(&client, &mut report, repo, &data).await.with_context(|| format!("tags of {name}"))?;
        pull(&client, &mut report, repo, &data).await.with_context(|| format!("pull of {name}"))?;
        referrers(&client, &mut report, repo, &data).await.with_context(|| format!("referrers of {name}"))?;
        delete(&client, &mut report, repo, &data).await.with_context(|| format!("deletion of {name}"))?;
    }
    errors(&client, &mut report).await?;
    report.end()
}

#[derive(Default)]
struct Report {
    checks: usize,
    failures: Vec<String>,
}

impl Report {
    fn add(&mut self, what: impl std::fmt::Display, answer: Result<()>) {
        self.checks += 1;
        if let Err(error) = answer {
            self.failures.push(format!("{what}: {error:#}"));
        }
    }

    fn end(self) -> Result<()> {
        ensure!(
            self.failures.is_empty(),
            "{} of {}:\n{}",
            self.failures.len(),
            self.checks,
            self.failures.join("\n")
        );
        ensure!(self.checks >= CHECKS_MIN, "only {} questions were asked", self.checks);
        println!("{} questions answered", self.checks);
        Ok(())
    }
}

/// The ways to push a blob.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    PostOnly,
    PostPut,
    Stream,
    /// In chunks; whether the last one comes with the closing PUT, and each is preceded by one that does not fit.
    Chunks {
        put_last: bool,
        out_of_order: bool,
    },
}

const WAYS: [Way; 7] = [
    Way::PostOnly,
    Way::PostPut,
    Way::Stream,
    Way::Chunks { put_last: false, out_of_order: false },
    Way::Chunks { put_last: true, out_of_order: false },
    Way::Chunks { put_last: false, out_of_order: true },
    Way::Chunks { put_last: true, out_of_order: true },
];

async fn blobs(client: &Client, report: &mut Report, algorithm: &str, hash: Hash) -> Result<()> {
    const REPO: &str = "conformance/blobs";
    let missing = hash(&noise(512, 1));
    let got = client.get(&format!("/v2/{REPO}/blobs/{missing}")).await?;
    report.add(format!("{algorithm}: a missing blob"), got.expect(404).map(drop));
    let contents = [
        ("large", noise(3 * (1 << 20) - 5, 2)),
        ("small", noise(512, 3)),
        ("an object", Bytes::from_static(b"{}")),
        ("nothing", Bytes::new()),
    ];
    for (way, n) in WAYS.iter().zip(0..) {
        for (name, bytes) in &contents {
            // Each way begins without the blob.
            let what = format!("{algorithm}: {name} by {way:?}");
            let expected = hash(bytes);
            let pushed = push_blob(client, REPO, *way, &expected, bytes)
                .await
                .and_then(|reply| created(reply, &expected));
            let location = pushed.as_ref().map(|location| location.clone()).unwrap_or_default();
            report.add(&what, pushed.map(drop));
            report.add(format!("{what}: location"), is_pulled(client, &location, &expected, bytes).await);
            let path = format!("/v2/{REPO}/blobs/{expected}");
            report.add(format!("{what}: HEAD"), is_there(client, &path, &expected, bytes, None).await);
            report.add(format!("{what}: GET"), is_pulled(client, &path, &expected, bytes).await);
            report.add(format!("{what}: DELETE"), is_deleted(client, &path).await);
        }
        let (bytes, wrong) = (noise(3 * 1024 - 5, 10 + n), hash(&noise(10, 10 + n)));
        let refused = push_blob(client, REPO, *way, &wrong, &bytes).await.and_then(|reply| reply.expect(400));
        report.add(format!("{algorithm}: a wrong digest by {way:?}"), refused.map(drop));
        let got = client.get(&format!("/v2/{REPO}/blobs/{wrong}")).await?;
        report.add(format!("{algorithm}: after a wrong digest by {way:?}"), got.expect(404).map(drop));
    }
    mounts(client, report, algorithm, hash).await?;
    ranges(client, report, algorithm, hash).await?;

    let session = client.begin(REPO).await?;
    let cancelled = client.send("DELETE", &session, &[], Bytes::new()).await?;
    report.add(format!("{algorithm}: an upload is cancelled"), cancelled.expect(204).map(drop));
    let put = client.send("PUT", &with_digest(&session, &missing), &[], noise(512, 1)).await?;
    report.add(format!("{algorithm}: a cancelled upload is gone"), put.expect(404).map(drop));
    Ok(())
}

async fn mounts(client: &Client, report: &mut Report, algorithm: &str, hash: Hash) -> Result<()> {
    let (bytes, from, to) = (noise(512, 4), "conformance/from", "conformance/to");
    let expected = hash(&bytes);
    let path = format!("/v2/{to}/blobs/{expected}");
    let mount = async |query: &str| {
        let post = format!("/v2/{to}/blobs/uploads/?mount={expected}{query}");
        client.send("POST", &post, &[], Bytes::new()).await
    };
    let missing = mount(&format!("&from={from}")).await?;
    report.add(format!("{algorithm}: a mount of what is missing"), missing.expect(202).map(drop));
    created(push_blob(client, from, Way::PostPut, &expected, &bytes).await?, &expected)?;
    let mounted = mount(&format!("&from={from}")).await.and_then(|reply| created(reply, &expected));
    report.add(format!("{algorithm}: a mount"), mounted.map(drop));
    report.add(format!("{algorithm}: a mounted blob"), is_pulled(client, &path, &expected, &bytes).await);
    report.add(format!("{algorithm}: a mounted blob is deleted"), is_deleted(client, &path).await);
    // Without a source the registry may look for one or begin an upload.
    let anonymous = mount("").await?.expect(202)?;
    let put = with_digest(anonymous.header("location"), &expected);
    let put = client.send("PUT", &put, &[], bytes.clone()).await.and_then(|reply| created(reply, &expected));
    report.add(format!("{algorithm}: a mount from nowhere in particular"), put.map(drop));
    is_deleted(client, &path).await?;
    is_deleted(client, &format!("/v2/{from}/blobs/{expected}")).await
}

async fn ranges(client: &Client, report: &mut Report, algorithm: &str, hash: Hash) -> Result<()> {
    let bytes = noise(2048, 5);
    let expected = hash(&bytes);
    push_blob(client, "conformance/blobs", Way::PostPut, &expected, &bytes).await?.expect(201)?;
    let path = format!("/v2/conformance/blobs/blobs/{expected}");
    for (range, part) in [
        ("500-1499", Some(500..1500)),
        ("500-", Some(500..2048)),
        ("-500", Some(1548..2048)),
        ("2000-5000", Some(2000..2048)),
        ("500-0", None),
        ("5000-10000", None),
    ] {
        let got = client.send("GET", &path, &[("range", &format!("bytes={range}"))], Bytes::new()).await?;
        let answer = match part {
            None => got.expect(416).map(drop),
            Some(part) => got.expect(206).and_then(|got| {
                let content_range = format!("bytes {}-{}/2048", part.start, part.end - 1);
                ensure!(got.header("content-range") == content_range, "{}", got.header("content-range"));
                ensure!(got.header("content-length") == part.len().to_string());
                ensure!(got.body == bytes[part], "other bytes");
                Ok(())
            }),
        };
        report.add(format!("{algorithm}: range {range}"), answer);
    }
    is_deleted(client, &path).await
}

async fn push_blob(client: &Client, repo: &str, way: Way, digest: &str, bytes: &Bytes) -> Result<Reply> {
    let octets = [("content-type", "application/octet-stream")];
    let uploads = format!("/v2/{repo}/blobs/uploads/");
    let close = async |session: &str, rest: Bytes, range: Option<&str>| {
        let headers: Vec<_> = octets.into_iter().chain(range.map(|range| ("content-range", range))).collect();
        client.send("PUT", &with_digest(session, digest), &headers, rest).await
    };
    match way {
        Way::PostOnly => {
            client.send("POST", &format!("{uploads}?digest={digest}"), &octets, bytes.clone()).await
        }
        Way::PostPut => close(&client.begin(repo).await?, bytes.clone(), None).await,
        Way::Stream => {
            let session = client.begin(repo).await?;
            let patched = client.send("PATCH", &session, &octets, bytes.clone()).await?.expect(202)?;
            close(patched.header("location"), Bytes::new(), None).await
        }
        Way::Chunks { put_last, out_of_order } => {
            let begun = client.send("POST", &uploads, &[], Bytes::new()).await?.expect(202)?;
            let least: usize =
                begun.header("oci-chunk-min-length").parse().context("OCI-Chunk-Min-Length")?;
            let mut session = begun.header("location").to_owned();
            let mut came = 0;
            while came < bytes.len() {
                let end = (came + least).min(bytes.len());
                if out_of_order {
                    let wrong = if end == bytes.len() { came + 1 } else { end };
                    let refused =
                        client.patch(&session, wrong, Bytes::from_static(b"x")).await?.expect(416)?;
                    let state = client.get(refused.header("location")).await?.expect(204)?;
                    let range = format!("0-{}", came.saturating_sub(1));
                    ensure!(state.header("range") == range, "{}, not {range}", state.header("range"));
                    session = state.header("location").to_owned();
                }
                if put_last && end == bytes.len() {
                    let range = format!("{came}-{}", end - 1);
                    return close(&session, bytes.slice(came..), Some(&range)).await;
                }
                let patched = client.patch(&session, came, bytes.slice(came..end)).await?.expect(202)?;
                ensure!(patched.header("range") == format!("0-{}", end - 1), "{}", patched.header("range"));
                session = patched.header("location").to_owned();
                came = end;
            }
            close(&session, Bytes::new(), None).await
        }
    }
}

/// Checks the answer to a push and returns the location.
fn created(reply: Reply, digest: &str) -> Result<String> {
    let reply = reply.expect(201)?;
    ensure!(
        reply.header("docker-content-digest") == digest,
        "digest {}",
        reply.header("docker-content-digest")
    );
    ensure!(!reply.header("location").is_empty(), "no location");
    Ok(reply.header("location").to_owned())
}

async fn is_pulled(client: &Client, path: &str, digest: &str, bytes: &Bytes) -> Result<()> {
    let got = client.get(path).await?.expect(200)?;
    ensure!(got.header("docker-content-digest") == digest, "digest {}", got.header("docker-content-digest"));
    ensure!(got.header("content-length") == bytes.len().to_string(), "{}", got.header("content-length"));
    ensure!(got.body == bytes, "other bytes");
    Ok(())
}

async fn is_there(
    client: &Client,
    path: &str,
    digest: &str,
    bytes: &Bytes,
    media_type: Option<&str>,
) -> Result<()> {
    let head = client.send("HEAD", path, &[], Bytes::new()).await?.expect(200)?;
    ensure!(
        head.header("docker-content-digest") == digest,
        "digest {}",
        head.header("docker-content-digest")
    );
    ensure!(head.header("content-length") == bytes.len().to_string(), "{}", head.header("content-length"));
    ensure!(media_type.is_none_or(|expected| head.header("content-type") == expected));
    ensure!(head.body.is_empty(), "a body");
    Ok(())
}

/// Deletes, and sees that it is gone at once.
async fn is_deleted(client: &Client, path: &str) -> Result<()> {
    client.delete(path).await?;
    client.send("HEAD", path, &[], Bytes::new()).await?.expect(404)?;
    client.send("DELETE", path, &[], Bytes::new()).await?.expect(404).map(drop)
}

/// What is pushed together.
struct Data {
    name: &'static str,
    hash: Hash,
    blobs: BTreeMap<String, Bytes>,
    /// In an order in which they can be pushed.
    manifests: Vec<Manifest>,
    /// Tags come with the push by digest.
    by_params: bool,
}

struct Manifest {
    digest: String,
    bytes: Bytes,
    tags: Vec<String>,
    value: Value,
}

impl Manifest {
    fn media_type(&self) -> &str {
        self.value["mediaType"].as_str().unwrap_or_default()
    }

    fn subject(&self) -> Option<&str> {
        self.value["subject"]["digest"].as_str()
    }

    /// The entry in the list of its subject's referrers.
    fn as_referrer(&self) -> Value {
        let mut entry =
            json!({"mediaType": self.media_type(), "digest": self.digest, "size": self.bytes.len()});
        let own = self.value.get("artifactType").or_else(|| self.value.get("config")?.get("mediaType"));
        if let Some(own) = own {
            entry["artifactType"] = own.clone();
        }
        if let Some(annotations) = self.value.get("annotations") {
            entry["annotations"] = annotations.clone();
        }
        entry
    }
}

impl Data {
    fn new(name: &'static str, hash: Hash) -> Self {
        Self { name, hash, blobs: BTreeMap::new(), manifests: Vec::new(), by_params: false }
    }

    /// Adds a blob and returns its descriptor.
    fn blob(&mut self, media_type: &str, bytes: Bytes) -> Value {
        let digest = (self.hash)(&bytes);
        self.blobs.insert(digest.clone(), bytes.clone());
        descriptor_of(media_type, digest, &bytes)
    }

    /// Adds a layer of its own.
    fn layer(&mut self) -> Value {
        let seed = self.name.bytes().map(u64::from).sum::<u64>() * 100 + self.blobs.len() as u64;
        self.blob(LAYER, noise(700, seed))
    }

    /// Adds a manifest and returns its descriptor.
    fn manifest(&mut self, value: Value, tags: &[&str]) -> Value {
        let bytes = Bytes::from(value.to_string());
        let digest = (self.hash)(&bytes);
        let described =
            descriptor_of(value["mediaType"].as_str().unwrap_or_default(), digest.clone(), &bytes);
        let tags = tags.iter().map(|&tag| tag.to_owned()).collect();
        self.manifests.push(Manifest { digest, bytes, tags, value });
        described
    }

    /// Adds an image with two layers, or as it is changed.
    fn image(&mut self, tags: &[&str], change: impl FnOnce(&mut Self, &mut Value)) -> Value {
        let layers = [self.layer(), self.layer()];
        let config = json!({
            "architecture": "amd64",
            "os": "linux",
            "author": format!("{} {}", self.name, self.manifests.len()),
            "rootfs": {"type": "layers", "diff_ids": layers.iter().map(|layer| &layer["digest"]).collect::<Vec<_>>()},
        });
        let config = self.blob(CONFIG, config.to_string().into());
        let mut value =
            json!({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": layers});
        change(self, &mut value);
        self.manifest(value, tags)
    }

    fn artifact(
        &mut self,
        tags: &[&str],
        artifact_type: &str,
        change: impl FnOnce(&mut Self, &mut Value),
    ) -> Value {
        let config = self.blob(EMPTY, Bytes::from_static(b"{}"));
        let mut layer = self.layer();
        layer["mediaType"] = artifact_type.into();
        let mut value = json!({
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "artifactType": artifact_type,
            "config": config,
            "layers": [layer],
            "annotations": {"org.example.hello": format!("number {}", self.manifests.len())},
        });
        change(self, &mut value);
        self.manifest(value, tags)
    }

    /// Adds an index over manifests, for a platform each.
    fn index(&mut self, tags: &[&str], manifests: Vec<Value>, change: impl FnOnce(&mut Value)) -> Value {
        let platforms = ["amd64", "arm64"].into_iter().cycle();
        let with_platform = |(mut manifest, architecture): (Value, &str)| {
            manifest["platform"] = json!({"os": "linux", "architecture": architecture});
            manifest
        };
        let manifests: Vec<_> = manifests.into_iter().zip(platforms).map(with_platform).collect();
        let mut value = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests});
        change(&mut value);
        self.manifest(value, tags)
    }

    /// Adds an index over two images.
    fn full_index(&mut self, tags: &[&str]) -> Value {
        let images = vec![self.image(&[], |_, _| ()), self.image(&[], |_, _| ())];
        self.index(tags, images, |_| ())
    }
}

/// Makes every kind of content.
fn all_data() -> Vec<Data> {
    let mut all = Vec::new();
    let mut add = |name, hash: Hash, fill: &dyn Fn(&mut Data)| {
        let mut data = Data::new(name, hash);
        fill(&mut data);
        all.push(data);
    };
    let as_is = |_: &mut Data, _: &mut Value| ();
    add("image", digest, &|data| drop(data.image(&["image", "image-too"], as_is)));
    add("large manifest", digest, &|data| {
        let annotations: BTreeMap<_, _> =
            (0..390).map(|n| (format!("large-{n}"), "A".repeat(10_000))).collect();
        data.image(&["large"], |_, value| value["annotations"] = json!(annotations));
    });
    add("index", digest, &|data| drop(data.full_index(&["index"])));
    add("nested index", digest, &|data| {
        let inner = vec![data.full_index(&[]), data.full_index(&[])];
        data.index(&["nested"], inner, |_| ());
    });
    add("empty index", digest, &|data| drop(data.index(&["empty"], Vec::new(), |_| ())));
    add("artifact", digest, &|data| drop(data.artifact(&["artifact"], ARTIFACT, as_is)));
    add("artifact without layers", digest, &|data| {
        data.artifact(&["bare"], ARTIFACT, |data, value| {
            value["layers"] = json!([data.blob(EMPTY, Bytes::from_static(b"{}"))]);
        });
    });
    add("artifact index", digest, &|data| {
        let artifacts = vec![data.artifact(&[], ARTIFACT, as_is), data.artifact(&[], ARTIFACT, as_is)];
        data.index(&["artifact-index"], artifacts, |value| value["artifactType"] = ARTIFACT.into());
    });
    add("artifacts with a subject", digest, &|data| {
        let subject = data.image(&["subject"], as_is);
        let refer = |_: &mut Data, value: &mut Value| value["subject"] = subject.clone();
        data.image(&[], refer);
        data.artifact(&["one"], ARTIFACT, refer);
        data.artifact(&["two"], OTHER_ARTIFACT, refer);
    });
    add("index with a subject", digest, &|data| {
        let subject = data.full_index(&["subject-index"]);
        let images = vec![data.artifact(&[], ARTIFACT, as_is)];
        data.index(&["referring"], images, |value| {
            value["artifactType"] = OTHER_ARTIFACT.into();
            value["subject"] = subject.clone();
        });
        data.index(&[], Vec::new(), |value| value["subject"] = subject.clone());
    });
    add("missing subject", digest, &|data| {
        let missing = descriptor_of(OCI_MANIFEST, digest(&noise(9, 9)), &noise(123, 9));
        data.artifact(&["orphan"], ARTIFACT, |_, value| value["subject"] = missing);
    });
    add("data in descriptors", digest, &|data| {
        data.image(&["data"], |_, value| value["config"]["data"] = "e30=".into());
    });
    add("layers that are elsewhere", digest, &|data| {
        data.image(&["elsewhere"], |data, value| {
            let bytes = noise(100, 77);
            let mut elsewhere = descriptor_of(NONDISTRIBUTABLE, (data.hash)(&bytes), &bytes);
            elsewhere["urls"] = json!(["https://store.example.com/layer"]);
            value["layers"] = json!([elsewhere, value["layers"][0].clone()]);
        });
    });
    add("fields of others", digest, &|data| {
        let image = data.image(&[], |_, value| {
            value["org.example.field"] = json!({"a": [1, 2]});
            value["config"]["org.example.field"] = "b".into();
        });
        data.index(&["fields"], vec![image], |value| value["org.example.field"] = json!(null));
    });
    add("no layers", digest, &|data| {
        drop(data.image(&["no-layers"], |_, value| value["layers"] = json!([])))
    });
    add("sparse image and index", digest, &|data| {
        let image = data.image(&["sparse-image"], as_is);
        let missing = data.manifests[0].value["layers"][0]["digest"].as_str().unwrap_or_default().to_owned();
        data.blobs.remove(&missing);
        let elsewhere = descriptor_of(OCI_MANIFEST, digest(&noise(10, 8)), &noise(1024, 8));
        data.index(&["sparse-index"], vec![image, elsewhere], |_| ());
    });
    // No tag is pushed by such a digest but as a parameter.
    add("sha512", digest_512, &|data| drop(data.full_index(&[])));
    for (name, hash) in [("tags by parameters", digest as Hash), ("tags by parameters, sha512", digest_512)] {
        add(name, hash, &|data| {
            data.by_params = true;
            let images = vec![data.image(&["first"], as_is), data.image(&["second"], as_is)];
            data.index(&["third", "third-too", "third.3"], images, |_| ());
        });
    }
    all
}

async fn push(client: &Client, report: &mut Report, repo: &str, data: &Data) -> Result<()> {
    for ((digest, bytes), way) in data.blobs.iter().zip(WAYS.into_iter().cycle()) {
        let pushed =
            push_blob(client, repo, way, digest, bytes).await.and_then(|reply| created(reply, digest));
        report.add(format!("{}: a blob by {way:?}", data.name), pushed.map(drop));
    }
    for manifest in &data.manifests {
        let put = async |reference: &str| -> Result<Reply> {
            let reply = client.put_manifest(repo, reference, manifest.media_type(), &manifest.bytes).await?;
            ensure!(reply.header("oci-subject") == manifest.subject().unwrap_or_default(), "OCI-Subject");
            Ok(reply)
        };
        let params = manifest.tags.iter().filter(|_| data.by_params).map(|tag| format!("tag={tag}"));
        let query = params.collect::<Vec<_>>().join("&");
        let pushed = put(&format!("{}?{query}", manifest.digest)).await.and_then(|reply| {
            let told: Vec<_> =
                reply.headers("oci-tag").iter().flat_map(|value| value.split(',')).map(str::trim).collect();
            let asked: &[String] = if data.by_params { &manifest.tags } else { &[] };
            ensure!(told == asked, "OCI-Tag: {told:?}");
            created(reply, &manifest.digest)
        });
        let location = pushed.as_ref().map(|location| location.clone()).unwrap_or_default();
        report.add(format!("{}: push by digest", data.name), pushed.map(drop));
        let pulled = is_pulled(client, &location, &manifest.digest, &manifest.bytes).await;
        report.add(format!("{}: location", data.name), pulled);
        for tag in manifest.tags.iter().filter(|_| !data.by_params) {
            let pushed = put(tag).await.and_then(|reply| created(reply, &manifest.digest));
            report.add(format!("{}: push by tag", data.name), pushed.map(drop));
        }
    }
    // The same with a byte too many is another manifest.
    if let Some(manifest) = data.manifests.first() {
        let wrong = Bytes::from([&manifest.bytes, b" ".as_slice()].concat());
        let refused = client.put_manifest(repo, &manifest.digest, manifest.media_type(), &wrong).await?;
        report.add(format!("{}: a wrong digest", data.name), refused.expect(400).map(drop));
    }
    Ok(())
}

async fn list(client: &Client, report: &mut Report, repo: &str, data: &Data) -> Result<()> {
    let names = async |query: &str| -> Result<Vec<String>> {
        let reply = client.get(&format!("/v2/{repo}/tags/list?{query}")).await?.expect(200)?;
        let list: Value = serde_json::from_slice(&reply.body)?;
        Ok(serde_json::from_value(list["tags"].clone())?)
    };
    let all = names("").await?;
    let is_listed = |tag: &String| all.contains(tag);
    let complete =
        data.manifests.iter().flat_map(|manifest| &manifest.tags).all(is_listed) && all.is_sorted();
    report.add(format!("{}: tags", data.name), complete.then_some(()).with_context(|| format!("{all:?}")));
    for (last, at) in all.iter().zip(1..) {
        let rest = names(&format!("last={last}")).await?;
        report.add(format!("{}: tags behind", data.name), same(&rest, &all[at..]));
        let one = names(&format!("n=1&last={last}")).await?;
        report.add(format!("{}: one tag behind", data.name), same(&one, &all[at..(at + 1).min(all.len())]));
    }
    report.add(format!("{}: no tags", data.name), same(&names("n=0").await?, &[]));
    Ok(())
}

fn same(found: &[String], expected: &[String]) -> Result<()> {
    ensure!(found == expected, "{found:?}, not {expected:?}");
    Ok(())
}

async fn pull(client: &Client, report: &mut Report, repo: &str, data: &Data) -> Result<()> {
    for manifest in &data.manifests {
        for reference in manifest.tags.iter().chain([&manifest.digest]) {
            let path = format!("/v2/{repo}/manifests/{reference}");
            let (digest, bytes) = (&manifest.digest, &manifest.bytes);
            let head = is_there(client, &path, digest, bytes, Some(manifest.media_type())).await;
            report.add(format!("{}: HEAD {reference}", data.name), head);
            report.add(
                format!("{}: GET {reference}", data.name),
                is_pulled(client, &path, digest, bytes).await,
            );
        }
    }
    for (digest, bytes) in &data.blobs {
        let path = format!("/v2/{repo}/blobs/{digest}");
        report.add(format!("{}: HEAD blob", data.name), is_there(client, &path, digest, bytes, None).await);
        report.add(format!("{}: GET blob", data.name), is_pulled(client, &path, digest, bytes).await);
    }
    Ok(())
}

async fn referrers(client: &Client, report: &mut Report, repo: &str, data: &Data) -> Result<()> {
    let mut expected: BTreeMap<&str, Vec<Value>> = BTreeMap::new();
    for manifest in &data.manifests {
        // Also of what has none.
        expected.entry(&manifest.digest).or_default();
        if let Some(subject) = manifest.subject() {
            expected.entry(subject).or_default().push(manifest.as_referrer());
        }
    }
    for (subject, mut entries) in expected {
        let types = [None, Some(ARTIFACT), Some(OTHER_ARTIFACT), Some(CONFIG), Some("application/none")];
        for wanted in types {
            let query = wanted
                .map(|wanted| format!("?artifactType={}", utf8_percent_encode(wanted, NON_ALPHANUMERIC)));
            let path = format!("/v2/{repo}/referrers/{subject}{}", query.unwrap_or_default());
            let got = client.get(&path).await?.expect(200)?;
            let list: Value = serde_json::from_slice(&got.body)?;
            entries.sort_by_key(|entry| entry["digest"].to_string());
            let chosen: Vec<_> = entries
                .iter()
                .filter(|entry| wanted.is_none_or(|wanted| entry["artifactType"] == wanted))
                .collect();
            let check = || {
                ensure!(got.header("content-type") == OCI_INDEX, "{}", got.header("content-type"));
                ensure!(list["mediaType"] == OCI_INDEX && list["schemaVersion"] == 2, "{list}");
                let applied = if wanted.is_some() { "artifactType" } else { "" };
                ensure!(got.header("oci-filters-applied") == applied, "OCI-Filters-Applied");
                ensure!(list["manifests"] == json!(chosen), "{}", list["manifests"]);
                Ok(())
            };
            report.add(format!("{}: referrers of type {wanted:?}", data.name), check());
        }
    }
    Ok(())
}

async fn delete(client: &Client, report: &mut Report, repo: &str, data: &Data) -> Result<()> {
    for manifest in data.manifests.iter().rev() {
        for reference in manifest.tags.iter().chain([&manifest.digest]) {
            let gone = is_deleted(client, &format!("/v2/{repo}/manifests/{reference}")).await;
            report.add(format!("{}: DELETE {reference}", data.name), gone);
        }
    }
    for digest in data.blobs.keys() {
        let gone = is_deleted(client, &format!("/v2/{repo}/blobs/{digest}")).await;
        report.add(format!("{}: DELETE blob", data.name), gone);
    }
    Ok(())
}

async fn errors(client: &Client, report: &mut Report) -> Result<()> {
    const REPO: &str = "conformance/repo";
    const WRONG: &str = "sha256:baddigeststring";
    let missing = digest(&noise(1024, 99));
    let referrers = client.get(&format!("/v2/conformance/nothing/referrers/{missing}")).await?.expect(200)?;
    let list: Value = serde_json::from_slice(&referrers.body)?;
    report.add(
        "referrers in no repository",
        if list["manifests"] == json!([]) { Ok(()) } else { bail!("{list}") },
    );
    for (path, status) in [
        ("/v2/conformance/nothing/tags/list".to_owned(), 404),
        (format!("/v2/{REPO}/manifests/{missing}"), 404),
        (format!("/v2/{REPO}/manifests/missing"), 404),
        (format!("/v2/{REPO}/manifests/{WRONG}"), 400),
        (format!("/v2/{REPO}/blobs/{WRONG}"), 400),
        (format!("/v2/{REPO}/referrers/{WRONG}"), 400),
    ] {
        report.add(&path, client.get(&path).await?.expect(status).map(drop));
    }
    let bytes = Bytes::from_static(b"{}");
    let put = client.put_manifest(REPO, WRONG, OCI_MANIFEST, &bytes).await?;
    report.add("PUT by no digest", put.expect(400).map(drop));
    Ok(())
}
