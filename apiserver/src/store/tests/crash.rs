//! A process that writes is killed again and again; what it was told is there.

use std::collections::{BTreeMap, HashSet};
use std::io::{BufRead, BufReader, Write as _};
use std::process::{Command, Stdio};

use super::*;

const FOLDER: &str = "DVCR_TEST_STORE_FOLDER";
const TEST: &str = "store::tests::crash::nothing_acknowledged_is_lost_when_the_process_is_killed";
const KILLS: usize = 20;
const WRITERS: u64 = 8;

/// Writes without an end, and tells what was acknowledged: revision, name and number, where a deletion has none.
fn write_until_killed(folder: &Path) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        // A short journal, so that the kills meet syncs of the database, too.
        let store = Store::open(folder, Options { journal_bytes: 256 << 10, ..Options::default() }).unwrap();
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| {
                let store = store.clone();
                tokio::spawn(async move {
                    for number in 1.. {
                        let key = key("", &format!("w{writer}-{}", number % 5));
                        let write = if number % 7 == 0 { delete(&key) } else { put(&key, number) };
                        let event = match store.write(write).await {
                            Ok(event) => event,
                            Err(Error::Conflict { current: None, .. }) => continue,
                            Err(error) => panic!("{error}"),
                        };
                        let number = event.after.as_ref().map_or(0, |_| number);
                        let line = format!("acknowledged {} {} {number}\n", event.revision, key.name());
                        std::io::stdout().lock().write_all(line.as_bytes()).unwrap();
                    }
                })
            })
            .collect();
        for writer in writers {
            writer.await.unwrap();
        }
    });
}

#[test]
fn nothing_acknowledged_is_lost_when_the_process_is_killed() {
    if let Some(folder) = std::env::var_os(FOLDER) {
        return write_until_killed(Path::new(&folder));
    }
    let folder = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (mut seen, mut known) = (0, HashSet::new());
    let mut objects: BTreeMap<String, (u64, u64)> = BTreeMap::new();
    for round in 0..KILLS {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([TEST, "--exact", "--nocapture", "--test-threads=1"])
            .env(FOLDER, folder.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        let mut acknowledged = Vec::new();
        let enough = 1 + (round * 97) % 300;
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut killed = false;
        for line in lines {
            // The last line may be torn, and was then not told to anybody.
            let line = line.unwrap();
            let words: Vec<_> = line.split(' ').collect();
            let ["acknowledged", revision, name, number] = words[..] else { continue };
            acknowledged.push((
                revision.parse::<u64>().unwrap(),
                name.to_owned(),
                number.parse::<u64>().unwrap(),
            ));
            if acknowledged.len() >= enough && !killed {
                child.kill().unwrap();
                killed = true;
            }
        }
        child.wait().unwrap();
        assert!(killed, "the writer ended by itself");
        runtime.block_on(async {
            let store = open(folder.path());
            // The watch of before goes on: every revision once, and all that was acknowledged.
            let mut watch = store.watch(&all(), seen).unwrap();
            let events = drain(&store, &mut watch).await.unwrap();
            let revisions: Vec<_> = events.iter().map(|event| event.0).collect();
            assert_eq!(revisions, (seen + 1..=store.revision()).collect::<Vec<_>>());
            let events: BTreeMap<_, _> = events.into_iter().map(|event| (event.0, event)).collect();
            for (revision, name, number) in &acknowledged {
                assert!(known.insert(*revision), "revision {revision} was given twice");
                let (_, key, _, after) = &events[revision];
                assert_eq!((key.name(), after.unwrap_or(0)), (name.as_str(), *number));
            }
            for (revision, key, before, after) in events.values() {
                let had = match after {
                    Some(number) => objects.insert(key.name().to_owned(), (*revision, *number)),
                    None => objects.remove(key.name()),
                };
                assert_eq!(had.map(|(_, number)| number), *before);
            }
            let list = store.list(&all(), &Place::default(), usize::MAX).unwrap();
            let listed: Vec<_> = list.texts.iter().map(|text| parse(text)).collect();
            assert_eq!(listed, objects.values().copied().collect::<Vec<_>>());
            seen = store.revision();
            store.close().await;
        });
    }
    assert!(known.len() >= KILLS);
}
