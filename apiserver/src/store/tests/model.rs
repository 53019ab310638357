//! Random writes, reads, watches and restarts, beside a model that remembers everything.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const HISTORY: u64 = 25;

#[derive(Clone, Debug)]
enum Step {
    Put(u8, u64),
    Delete(u8),
    Together(Vec<(u8, Option<u64>)>),
    /// A list of a range, so many revisions ago, by pages, with writes between them.
    List {
        range: u8,
        back: u64,
        page: usize,
        write: Option<(u8, u64)>,
    },
    Watch {
        range: u8,
        back: u64,
    },
    Look,
    Restart,
    /// What a process that is killed leaves.
    Crash,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let key = 0..12u8;
    let step = prop_oneof![
        6 => (key.clone(), any::<u64>()).prop_map(|(key, number)| Step::Put(key, number)),
        3 => key.clone().prop_map(Step::Delete),
        2 => proptest::collection::vec((key.clone(), any::<Option<u64>>()), 1..5).prop_map(Step::Together),
        3 => (0..6u8, 0..35u64, 1..5usize, any::<Option<(u8, u64)>>()).prop_map(|(range, back, page, write)| {
            Step::List { range, back, page, write: write.map(|(key, number)| (key % 12, number)) }
        }),
        2 => (0..6u8, 0..35u64).prop_map(|(range, back)| Step::Watch { range, back }),
        2 => Just(Step::Look),
        1 => Just(Step::Restart),
        2 => Just(Step::Crash),
    ];
    proptest::collection::vec(step, 1..60)
}

/// Twelve objects in three namespaces, one of which is the beginning of another's name.
fn key_of(index: u8) -> Key {
    key(["", "a", "a-b"][usize::from(index % 3)], &format!("x{}", index / 3))
}

fn range_of(index: u8) -> Range {
    match index {
        0 => all(),
        1..4 => Range::namespace(RESOURCE, ["", "a", "a-b"][usize::from(index - 1)]).unwrap(),
        4 => Range::object(&key_of(4)),
        _ => Range::resource("example.com/thing").unwrap(),
    }
}

type Entry = (u64, Key, Option<u64>, Option<u64>);

/// Every write that there was.
#[derive(Default)]
struct Model {
    log: Vec<Entry>,
}

impl Model {
    fn newest(&self) -> u64 {
        self.log.len() as u64
    }

    /// Revision and number of each object, as of a revision.
    fn at(&self, revision: u64, range: &Range) -> BTreeMap<Key, (u64, u64)> {
        let mut state = BTreeMap::new();
        for (at, key, _, after) in self.log.iter().take_while(|entry| entry.0 <= revision) {
            match after {
                Some(number) => state.insert(key.clone(), (*at, *number)),
                None => state.remove(key),
            };
        }
        state.retain(|key, _| range.has(key));
        state
    }

    fn write(&mut self, key: &Key, after: Option<u64>) {
        let before = self.at(self.newest(), &Range::object(key)).get(key).map(|(_, number)| *number);
        self.log.push((self.newest() + 1, key.clone(), before, after));
    }

    fn events(&self, range: &Range, after: u64) -> Vec<Entry> {
        self.log.iter().filter(|entry| entry.0 > after && range.has(&entry.1)).cloned().collect()
    }
}

async fn write(store: &Store, model: &mut Model, writes: &[(u8, Option<u64>)]) {
    let now = model.at(model.newest(), &all());
    let mut keys: Vec<_> = writes.iter().map(|(index, _)| key_of(*index)).collect();
    let impossible =
        writes.iter().any(|(index, number)| number.is_none() && !now.contains_key(&key_of(*index)));
    let asked = writes.iter().map(|(index, number)| match number {
        // What the model knows is what the store has to expect.
        Some(number) => {
            let expect =
                now.get(&key_of(*index)).map_or(Expect::Absent, |(revision, _)| Expect::Revision(*revision));
            Write { expect, ..put(&key_of(*index), *number) }
        }
        None => delete(&key_of(*index)),
    });
    let result = store.write_all(asked.collect()).await;
    keys.sort();
    keys.dedup();
    if keys.len() < writes.len() || impossible {
        assert!(matches!(result, Err(Error::Twice(_) | Error::Conflict { .. })), "{result:?}");
        return;
    }
    let from = model.newest();
    for (index, number) in writes {
        model.write(&key_of(*index), *number);
    }
    let told: Vec<Entry> = result
        .unwrap()
        .iter()
        .map(|event| {
            (event.revision, event.key.clone(), number(event.before.as_ref()), number(event.after.as_ref()))
        })
        .collect();
    assert_eq!(told, model.events(&all(), from));
}

/// The pages of a list, with a write behind the first.
async fn list(
    store: &Store,
    model: &mut Model,
    range: &Range,
    back: u64,
    page: usize,
    between: Option<(u8, u64)>,
) {
    let Some(revision) = model.newest().checked_sub(back) else {
        let place = Place { revision: Some(model.newest() + 1), ..Place::default() };
        assert!(matches!(store.list(range, &place, page), Err(Error::TooNew { .. })));
        return;
    };
    let expected = model.at(revision, range);
    let mut place = Place { revision: (back > 0).then_some(revision), ..Place::default() };
    let mut texts = Vec::new();
    let mut between = between;
    loop {
        let trimmed = store.stats().state.trimmed;
        let list = match store.list(range, &place, page) {
            Err(Error::TooOld { oldest, .. }) => {
                assert!(oldest == trimmed && trimmed > revision, "{trimmed} {revision}");
                return;
            }
            list => list.unwrap(),
        };
        assert!(trimmed <= revision);
        assert_eq!(list.revision, revision);
        assert!(list.texts.len() <= page);
        texts.extend(list.texts.iter().map(|text| parse(text)));
        let Some(next) = list.next else { break };
        assert_eq!(next.left, Some((expected.len() - texts.len()) as u64));
        place = next;
        if let Some((index, number)) = between.take() {
            write(store, model, &[(index, Some(number))]).await;
        }
    }
    assert_eq!(texts, expected.values().copied().collect::<Vec<_>>());
}

async fn run(steps: Vec<Step>) {
    let mut folder = tempfile::tempdir().unwrap();
    // Room for three small groups, so that the journal begins anew often.
    let options = Options { history_events_max: HISTORY, journal_bytes: 3 * 4096, ..Options::default() };
    let mut store = Store::open(folder.path(), options).unwrap();
    let mut model = Model::default();
    let mut watches: Vec<(Range, u64, Watch)> = Vec::new();
    for step in steps {
        match step {
            Step::Put(index, number) => write(&store, &mut model, &[(index, Some(number))]).await,
            Step::Delete(index) => write(&store, &mut model, &[(index, None)]).await,
            Step::Together(writes) => write(&store, &mut model, &writes).await,
            Step::List { range, back, page, write } => {
                list(&store, &mut model, &range_of(range), back, page, write).await;
            }
            Step::Watch { range, back } => {
                let (range, from) = (range_of(range), model.newest().saturating_sub(back));
                match store.watch(&range, from) {
                    Ok(watch) => watches.push((range, from, watch)),
                    Err(Error::TooOld { .. }) => assert!(model.newest() > from + HISTORY),
                    Err(error) => panic!("{error}"),
                }
            }
            Step::Look => look(&store, &model, &mut watches).await,
            Step::Restart | Step::Crash => {
                look(&store, &model, &mut watches).await;
                let copy = tempfile::tempdir().unwrap();
                for file in ["objects.redb", "journal"] {
                    std::fs::copy(folder.path().join(file), copy.path().join(file)).unwrap();
                }
                store.close().await;
                if matches!(step, Step::Crash) {
                    folder = copy;
                }
                store = Store::open(folder.path(), options).unwrap();
                for (range, from, watch) in &mut watches {
                    assert!(matches!(watch.next().await, Err(End::Closed)));
                    *watch = store.watch(range, *from).unwrap();
                }
            }
        }
        let state = store.stats().state;
        assert_eq!((state.revision, store.revision()), (model.newest(), model.newest()));
        assert_eq!(state.trimmed, model.newest().saturating_sub(HISTORY));
        for index in 0..6 {
            let range = range_of(index);
            let count = store.snapshot().unwrap().count(&range).unwrap();
            assert_eq!(count, model.at(model.newest(), &range).len() as u64);
        }
    }
    look(&store, &model, &mut watches).await;
    assert_no_text_is_left(&store, &model);
    store.close().await;
}

/// Every watch has what the model says that it gets, since it was last looked at.
async fn look(store: &Store, model: &Model, watches: &mut Vec<(Range, u64, Watch)>) {
    let mut kept = Vec::new();
    for (range, from, mut watch) in watches.drain(..) {
        match drain(store, &mut watch).await {
            Ok(seen) => {
                assert_eq!(seen, model.events(&range, from));
                kept.push((range, model.newest(), watch));
            }
            // What it wanted from the history was forgotten before it was read.
            Err(End::Failed(Error::TooOld { .. })) => assert!(model.newest() > from + HISTORY),
            Err(end) => panic!("{end}"),
        }
    }
    *watches = kept;
}

/// The file has the texts of the objects and of the history, and no others.
fn assert_no_text_is_left(store: &Store, model: &Model) {
    use redb::ReadableTableMetadata;
    let befores =
        model.log.iter().rev().take(HISTORY as usize).filter(|(_, _, before, _)| before.is_some()).count();
    let objects = model.at(model.newest(), &all()).len();
    let texts = store.shared.with(|db| Ok(db.begin_read()?.open_table(tables::TEXTS)?.len()?)).unwrap();
    assert_eq!(texts, (befores + objects) as u64);
    let bytes = store.list(&all(), &Place::default(), 100).unwrap();
    let keys = model.at(model.newest(), &all());
    let bytes = bytes
        .texts
        .iter()
        .zip(keys.keys())
        .map(|(text, key)| text.len() + 4 + key.stored().len())
        .sum::<usize>();
    assert_eq!(store.stats().state.object_bytes, bytes as u64);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, max_shrink_iters: 30, ..ProptestConfig::default() })]

    #[test]
    fn the_store_is_what_a_model_that_forgets_nothing_says(steps in steps()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(run(steps));
    }
}
