//! Measures the store: `cargo run --example store -p dvcr-apiserver -- FOLDER [OBJECTS [JOURNAL_BYTES]]`.
//!
//! It writes OBJECTS objects (100,000) of about 2 KiB into an empty folder, and prints durable writes per second at 1, 16 and 64
//! writers, percentiles of get and of a page of 500, how long a list of all takes, how long 200 watchers wait for an event, the memory
//! of the process, the size on disk, and how long it takes to open the file, after a clean end and after none.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use dvcr_apiserver::store::{Draft, Expect, Key, Options, Place, Range, Store, Write};
use serde_json::json;

type Error = Box<dyn std::error::Error + Send + Sync>;

const RESOURCE: &str = "virtualization.deckhouse.io/virtualimages";
const WATCHERS: usize = 200;

fn write(index: u64, round: u64) -> Result<Write, Error> {
    let (namespace, name) = (format!("project-{}", index % 20), format!("image-{index:06}"));
    let text: String = (0..20u64)
        .map(|i| format!("{:x} ", (index + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(i as u32)))
        .collect();
    let object = json!({
        "apiVersion": "virtualization.deckhouse.io/v1alpha2",
        "kind": "VirtualImage",
        "metadata": {
            "name": name, "namespace": namespace, "uid": format!("{index:032x}"), "generation": round,
            "creationTimestamp": "2026-01-01T00:00:00Z", "labels": {"app": "bench", "index": format!("{index}")},
            "annotations": {"text": text},
            "managedFields": [{"manager": "bench", "operation": "Update", "fieldsV1": {"f:spec": {"f:dataSource": {"f:http": {"f:url": {}}}}}}],
        },
        "spec": {"storage": "ContainerRegistry", "dataSource": {"type": "HTTP", "http": {"url": format!("https://example.com/{text}")}}},
        "status": {"phase": "Ready", "size": {"stored": "1Gi", "unpacked": "10Gi"}, "conditions": [
            {"type": "Ready", "status": "True", "reason": "Ready", "message": text, "lastTransitionTime": "2026-01-01T00:00:00Z"}]},
    });
    let object = object.as_object().ok_or("no object")?;
    Ok(Write {
        key: Key::new(RESOURCE, &namespace, &name)?,
        expect: Expect::Any,
        value: Some(Draft::new(object)?),
    })
}

fn memory() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = |name: &str| {
        status.lines().find(|line| line.starts_with(name)).unwrap_or_default().replace(['\t', ' '], "")
    };
    format!("{} {}", line("VmRSS"), line("VmHWM"))
}

fn disk(folder: &Path) -> Result<String, Error> {
    let (file, journal) = (folder.join("objects.redb").metadata()?, folder.join("journal").metadata()?);
    let blocks = file.blocks() + journal.blocks();
    Ok(format!("{} MiB long, {} MiB on disk with the journal", file.len() >> 20, (blocks * 512) >> 20))
}

fn percentiles(what: &str, mut times: Vec<Duration>) {
    times.sort();
    let at = |share: usize| times.get(times.len() * share / 1000).copied().unwrap_or_default();
    println!("{what}: p50 {:?}, p99 {:?}, p99.9 {:?}", at(500), at(990), at(999));
}

async fn writers(store: &Store, count: u64, objects: u64, seconds: u64) -> Result<(), Error> {
    let before = store.stats();
    let start = Instant::now();
    let tasks: Vec<_> = (0..count)
        .map(|writer| {
            let store = store.clone();
            tokio::spawn(async move {
                let mut times = Vec::new();
                let mut index = writer;
                while start.elapsed() < Duration::from_secs(seconds) {
                    index = (index
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1_442_695_040_888_963_407))
                        >> 1;
                    let write = write(index % objects, 2)?;
                    let start = Instant::now();
                    store.write(write).await?;
                    times.push(start.elapsed());
                }
                Ok::<_, Error>(times)
            })
        })
        .collect();
    let mut times = Vec::new();
    for task in tasks {
        times.extend(task.await??);
    }
    let (took, after) = (start.elapsed().as_secs_f64(), store.stats());
    let transactions = after.transactions - before.transactions;
    println!(
        "{count} writers: {:.0} writes/s, {:.0} transactions/s",
        times.len() as f64 / took,
        transactions as f64 / took
    );
    percentiles("  a write", times);
    Ok(())
}

async fn measure(folder: &Path, objects: u64, options: Options) -> Result<(), Error> {
    let start = Instant::now();
    let store = Store::open(folder, options)?;
    println!("made in {:?}, {}", start.elapsed(), memory());
    let start = Instant::now();
    for first in (0..objects).step_by(500) {
        let writes: Result<Vec<_>, _> =
            (first..objects.min(first + 500)).map(|index| write(index, 1)).collect();
        store.write_all(writes?).await?;
    }
    println!(
        "{objects} objects of {} bytes in {:?}",
        store.stats().state.object_bytes / objects,
        start.elapsed()
    );
    println!("{}, {}", memory(), disk(folder)?);
    for count in [1, 16, 64] {
        writers(&store, count, objects, 5).await?;
    }
    let (range, page) = (Range::resource(RESOURCE)?, Range::namespace(RESOURCE, "project-7")?);
    let times: Result<Vec<_>, Error> = (0..20_000u64)
        .map(|index| {
            let key = write(index * 7919 % objects, 1)?.key;
            let start = Instant::now();
            store.get(&key)?.ok_or("it is not there")?;
            Ok(start.elapsed())
        })
        .collect();
    percentiles("get", times?);
    let times: Result<Vec<_>, Error> = (0..500)
        .map(|_| {
            let start = Instant::now();
            store.list(&page, &Place::default(), 500)?;
            Ok(start.elapsed())
        })
        .collect();
    percentiles("list of 500", times?);
    let (start, mut count, mut next) = (Instant::now(), 0, Some(Place::default()));
    while let Some(place) = next {
        let list = store.list(&range, &place, 500)?;
        count += list.texts.len();
        next = list.next;
    }
    println!("list of all {count} by pages of 500: {:?}, {}", start.elapsed(), memory());

    let watchers: Vec<_> = (0..WATCHERS)
        .map(|_| {
            let mut watch = store.watch(&range, store.revision())?;
            Ok(tokio::spawn(async move {
                let mut seen = Vec::new();
                while seen.len() < 200 {
                    match watch.next().await {
                        Ok(event) => seen.push((event.revision, Instant::now())),
                        Err(_) => break,
                    }
                }
                seen
            }))
        })
        .collect::<Result<_, Error>>()?;
    let mut written = std::collections::HashMap::new();
    for index in 0..200 {
        let event = store.write(write(index, 3)?).await?;
        written.insert(event.revision, Instant::now());
    }
    let mut times = Vec::new();
    for watcher in watchers {
        for (revision, seen) in watcher.await? {
            times.push(
                written
                    .get(&revision)
                    .map_or(Duration::ZERO, |written| seen.saturating_duration_since(*written)),
            );
        }
    }
    println!("{} events to {WATCHERS} watchers, {}", times.len(), memory());
    percentiles("  an event, behind the answer to its writer", times);
    println!("{:?}, {}", store.stats(), disk(folder)?);
    store.close().await;
    drop(store);
    let start = Instant::now();
    let store = Store::open(folder, options)?;
    println!("opened again in {:?}", start.elapsed());
    drop(store.write(write(1, 4)?).await?);
    // As a process that is killed leaves it: the copy was never closed.
    let copy = folder.join("copy");
    std::fs::create_dir(&copy)?;
    for file in ["objects.redb", "journal"] {
        std::fs::copy(folder.join(file), copy.join(file))?;
    }
    let start = Instant::now();
    let killed = Store::open(&copy, options)?;
    println!("opened after a kill in {:?}, {}", start.elapsed(), memory());
    killed.close().await;
    store.close().await;
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), Error> {
    let mut arguments = std::env::args_os().skip(1);
    let folder = arguments.next().ok_or("a folder that is empty is needed")?;
    let mut number = || arguments.next().and_then(|number| number.to_str()?.parse().ok());
    let objects = number().unwrap_or(100_000);
    let mut options = Options::default();
    options.journal_bytes = number().unwrap_or(options.journal_bytes);
    measure(Path::new(&folder), objects, options).await
}
