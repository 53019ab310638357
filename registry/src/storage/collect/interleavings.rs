//! A model of the collection beside pushes, mounts and deletions, small enough to try every interleaving.
//!
//! One blob, two repositories. Each actor is a list of steps that the others may come between; what the real code does
//! under a lock is several steps with the lock held. Times are told apart only as far as the collector does: before its
//! cutoff, or not. The promise: a manifest that was accepted, and not deleted, has its blob.

use std::collections::HashSet;

/// What is there, and as what it counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum File {
    Absent,
    Old,
    New,
}

/// The rules that hold the two sides apart. The proof is worth something because each of them is needed.
#[derive(Clone, Copy, Debug)]
struct Rules {
    /// A push holds the lock from the look at the blob until its manifest is placed.
    push_locks: bool,
    /// It makes the links it builds on new.
    push_touches: bool,
    /// A mount makes the blob new.
    mount_touches: bool,
    /// The collector looks once more, with the lock held, before it removes.
    looks_again: bool,
    /// It waits for running pushes before it begins.
    waits: bool,
    /// A link that is not removed keeps its blob.
    kept_links_count: bool,
}

const ALL: Rules = Rules {
    push_locks: true,
    push_touches: true,
    mount_touches: true,
    looks_again: true,
    waits: true,
    kept_links_count: true,
};

const REPOS: usize = 2;
const ACTORS: usize = 4;
/// The collector is the last actor.
const COLLECTOR: usize = 3;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    blob: File,
    links: [File; REPOS],
    manifests: [bool; REPOS],
    /// The repository that the collector begins with.
    first: usize,
    /// Where each actor is in its program; [`ENDED`] at its end.
    at: [u8; ACTORS],
    /// Holders of the lock for reading, and its holder for writing.
    readers: [bool; ACTORS],
    writing: bool,
    /// Whether the cutoff is set: what is touched from then on is new for sure.
    begun: bool,
    /// What the collector noted: a manifest in the repository at hand, its link to be removed, the blob in use.
    referenced: bool,
    doomed: bool,
    live: bool,
}

const ENDED: u8 = u8::MAX;

impl State {
    /// What is touched before the cutoff is set may be old by it.
    fn touched(&self) -> Vec<File> {
        if self.begun { vec![File::New] } else { vec![File::New, File::Old] }
    }

    fn read_lock(&mut self, actor: usize, wanted: bool) -> bool {
        if wanted && self.writing {
            return false;
        }
        self.readers[actor] = wanted;
        true
    }

    fn next(mut self, actor: usize) -> Self {
        self.at[actor] += 1;
        self
    }

    fn end(mut self, actor: usize) -> Self {
        self.at[actor] = ENDED;
        self.readers[actor] = false;
        self
    }

    /// The promise.
    fn is_kept(&self) -> bool {
        (0..REPOS).all(|repo| {
            !self.manifests[repo] || self.links[repo] != File::Absent && self.blob != File::Absent
        })
    }
}

/// All that may come of one step of an actor; nothing if it has to wait.
fn step(state: &State, actor: usize, rules: &Rules) -> Vec<State> {
    match actor {
        0 => push(state, actor, 0, rules),
        1 => mount_and_push(state, actor, rules),
        2 => delete(state, actor),
        _ => collect(state, rules),
    }
}

fn push(state: &State, actor: usize, repo: usize, rules: &Rules) -> Vec<State> {
    push_from(state, actor, repo, 0, rules)
}

/// The steps of a push; they begin at `first` of the actor's program.
fn push_from(state: &State, actor: usize, repo: usize, first: u8, rules: &Rules) -> Vec<State> {
    let mut state = state.clone();
    match state.at[actor] - first {
        0 => match state.read_lock(actor, rules.push_locks) {
            true => vec![state.next(actor)],
            false => Vec::new(),
        },
        // The link, then the blob: the client is told what is missing and pushes it, which is another story.
        1 if state.links[repo] == File::Absent => vec![state.end(actor)],
        1 => vec![state.next(actor)],
        2 if state.blob == File::Absent => vec![state.end(actor)],
        2 => vec![state.next(actor)],
        3 if rules.push_touches && state.links[repo] == File::Old => {
            let each = |link| {
                let mut state = state.clone();
                state.links[repo] = link;
                state.next(actor)
            };
            state.touched().into_iter().map(each).collect()
        }
        3 => vec![state.next(actor)],
        4 => {
            state.manifests[repo] = true;
            vec![state.next(actor)]
        }
        _ => vec![state.end(actor)],
    }
}

/// Gives the second repository the blob of the first, and pushes a manifest there.
fn mount_and_push(state: &State, actor: usize, rules: &Rules) -> Vec<State> {
    const PUSH: u8 = 5;
    let mut state = state.clone();
    let touched = state.touched();
    match state.at[actor] {
        0 => match state.read_lock(actor, true) {
            true => vec![state.next(actor)],
            false => Vec::new(),
        },
        1 if state.links[0] == File::Absent || state.blob == File::Absent => vec![state.end(actor)],
        1 => vec![state.next(actor)],
        2 if rules.mount_touches && state.blob == File::Old => {
            let each = |blob| State { blob, ..state.clone() }.next(actor);
            touched.into_iter().map(each).collect()
        }
        2 => vec![state.next(actor)],
        3 => {
            let each = |link| {
                let mut state = state.clone();
                state.links[1] = link;
                state.next(actor)
            };
            touched.into_iter().map(each).collect()
        }
        4 => {
            state.readers[actor] = false;
            vec![state.next(actor)]
        }
        _ => push_from(&state, actor, 1, PUSH, rules),
    }
}

/// Deletes the manifest of the first repository.
fn delete(state: &State, actor: usize) -> Vec<State> {
    let mut state = state.clone();
    state.manifests[0] = false;
    vec![state.end(actor)]
}

/// Begins, goes through the two repositories, and sweeps.
fn collect(state: &State, rules: &Rules) -> Vec<State> {
    /// Steps per repository.
    const MARK: u8 = 5;
    const SWEEP: u8 = 1 + MARK * REPOS as u8;
    let mut state = state.clone();
    let at = state.at[COLLECTOR];
    let may_write = !state.readers.iter().any(|holds| *holds);
    if at == 0 {
        // The lock is taken and given back: nobody is in the midst of a push.
        if rules.waits && !may_write {
            return Vec::new();
        }
        state.begun = true;
        return vec![state.next(COLLECTOR)];
    }
    if at < SWEEP {
        let (turn, part) = (usize::from((at - 1) / MARK), (at - 1) % MARK);
        let repo = (state.first + turn) % REPOS;
        match part {
            0 => state.referenced = state.manifests[repo],
            1 => state.doomed = state.links[repo] == File::Old,
            2 => {
                // What is referred to, and what is new, keeps its blob.
                let kept = state.links[repo] != File::Absent && (state.referenced || !state.doomed);
                state.live |= kept;
                state.doomed &= !state.referenced;
            }
            3 if !state.doomed => {}
            3 if !may_write => return Vec::new(),
            3 => state.writing = true,
            _ if !state.doomed => {}
            _ => {
                match state.links[repo] {
                    File::New if rules.looks_again => state.live |= rules.kept_links_count,
                    _ => state.links[repo] = File::Absent,
                }
                state.writing = false;
                state.doomed = false;
            }
        }
        return vec![state.next(COLLECTOR)];
    }
    match at - SWEEP {
        // Whether it is in use is known; how old it is may change.
        0 if state.live || state.blob != File::Old => vec![state.end(COLLECTOR)],
        0 => vec![state.next(COLLECTOR)],
        1 if !may_write => Vec::new(),
        1 => {
            state.writing = true;
            vec![state.next(COLLECTOR)]
        }
        _ => {
            if !(rules.looks_again && state.blob == File::New) {
                state.blob = File::Absent;
            }
            state.writing = false;
            vec![state.end(COLLECTOR)]
        }
    }
}

/// Tries all interleavings from every beginning; returns how many states there are, or one that breaks the promise.
fn explore(rules: &Rules) -> Result<usize, State> {
    let mut seen = HashSet::new();
    let mut todo = Vec::new();
    for blob in [File::Old, File::New] {
        for first in [File::Old, File::New] {
            for second in [File::Absent, File::Old, File::New] {
                for manifests in [[false, false], [true, false], [false, true], [true, true]] {
                    if manifests[1] && second == File::Absent {
                        continue;
                    }
                    todo.extend((0..REPOS).map(|repo| State {
                        blob,
                        links: [first, second],
                        manifests,
                        first: repo,
                        at: [0; ACTORS],
                        readers: [false; ACTORS],
                        writing: false,
                        begun: false,
                        referenced: false,
                        doomed: false,
                        live: false,
                    }));
                }
            }
        }
    }
    while let Some(state) = todo.pop() {
        if !seen.insert(state.clone()) {
            continue;
        }
        if !state.is_kept() {
            return Err(state);
        }
        let running = (0..ACTORS).filter(|actor| state.at[*actor] != ENDED);
        let next: Vec<State> = running.clone().flat_map(|actor| step(&state, actor, rules)).collect();
        assert!(running.count() == 0 || !next.is_empty(), "all wait for each other: {state:?}");
        todo.extend(next);
    }
    Ok(seen.len())
}

#[test]
fn an_accepted_manifest_never_loses_its_blob_in_any_interleaving() {
    let states = explore(&ALL).unwrap_or_else(|state| panic!("lost: {state:?}"));
    assert!(states > 10_000, "{states}");
}

#[test]
fn each_rule_is_needed() {
    for (name, rules) in [
        ("push_locks", Rules { push_locks: false, ..ALL }),
        ("push_touches", Rules { push_touches: false, ..ALL }),
        ("mount_touches", Rules { mount_touches: false, ..ALL }),
        ("looks_again", Rules { looks_again: false, ..ALL }),
        ("waits", Rules { waits: false, ..ALL }),
        ("kept_links_count", Rules { kept_links_count: false, ..ALL }),
    ] {
        assert!(explore(&rules).is_err(), "{name} could go");
    }
}
