//! A model of a collection in a bucket beside pushes, mounts, uploads and deletions on other replicas, small enough to try
//! every interleaving of them, with requests that are late, replicas that stand still, and a second one that takes over.
//!
//! One blob, two repositories. A request that places a link or removes something is sent in one step and lands in another,
//! or never; it is refused once it has expired by the server's clock. One whose answer is lost is sent again, and may still
//! land behind the other. An actor that takes no further step is one that was killed, or stands still. A run has two rounds: links,
//! and then the blob if no link is left. The promise: a manifest that was accepted, and not deleted, has its link and its blob.

use std::collections::HashSet;
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};

/// For how long a request is valid, in ticks of the server's clock.
const VALID: u8 = 1;
/// What is so old has expired, and is as good as older.
const AGE_MAX: u8 = VALID + 1;
const RUNS_MAX: u8 = 2;

/// The rules of `docs/decisions/0004-a-registry-in-a-bucket.md`. Each of them is needed.
#[derive(Clone, Copy, Debug)]
struct Rules {
    /// Requests that place a link expire.
    links_expire: bool,
    /// So do those that remove.
    removals_expire: bool,
    /// The holder waits when it has announced the run.
    waits_to_mark: bool,
    /// Whoever knows of a run leaves a claim,
    claims: bool,
    /// and then looks at the state of the run again.
    looks_again: bool,
    /// What is condemned is not there.
    condemned_is_absent: bool,
    /// For how long a lease is held that is not renewed: as long as a removal is valid that was signed with it.
    lease: u8,
    /// The state of the run is replaced only by who knows what it replaces,
    state_is_replaced: bool,
    /// and by everybody who takes the lease, so that the one before can end nothing any more.
    adopts: bool,
    /// Who takes the lease sees that it still has it when it has read the state.
    confirms: bool,
    /// The holder waits before it writes the next state, when an answer to a removal was lost.
    waits_for_strays: bool,
    /// Claims belong to a run.
    claims_have_a_run: bool,
}

const ALL: Rules = Rules {
    links_expire: true,
    removals_expire: true,
    waits_to_mark: true,
    claims: true,
    looks_again: true,
    condemned_is_absent: true,
    lease: VALID,
    state_is_replaced: true,
    adopts: true,
    confirms: true,
    waits_for_strays: true,
    claims_have_a_run: true,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Phase {
    None,
    Marking,
    Condemned(Round),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Round {
    Links,
    Blob,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Link {
    Absent,
    Old,
    New,
}

/// What a request does when it lands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Effect {
    PutLink(usize),
    PutManifest(usize),
    RemoveLink(usize),
    RemoveBlob,
}

/// A request on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Request {
    effect: Effect,
    /// Ticks since the time it is signed with.
    age: u8,
}

/// What a replica knows of the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct View {
    /// Ticks since it was true.
    age: u8,
    phase: Phase,
    run: u8,
    /// Whether the blob, and the link of the repository at hand, are condemned.
    condemned: bool,
}

const NOTHING: View = View { age: 0, phase: Phase::None, run: 0, condemned: false };

/// One who pushes: what it is about to do, what it knows, and its request that is on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Pusher {
    step: Push,
    view: View,
    request: Option<Request>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Push {
    /// Has not begun, or begins again.
    Look(Goal),
    Claim(Goal),
    LookAgain(Goal),
    Check(Goal),
    Wait(Goal),
    Ended,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Goal {
    /// Brings the blob, which then lies there without a link.
    Blob,
    /// Links the blob it has brought.
    Commit,
    /// Links the blob of the other repository.
    Mount,
    Manifest,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Holder {
    step: Collect,
    /// Ticks since it began to wait.
    age: u8,
    run: u8,
    /// Whether the state of the run is as we have read or written it.
    knows: bool,
    /// What the marking found: which repositories refer to the blob, and whether their links are old.
    referenced: [bool; 2],
    links: [Link; 2],
    request: Option<Request>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Collect {
    Idle,
    Read,
    Confirm(Phase),
    Announce,
    /// Goes on with the round that the one before had begun, which is then the last of the run.
    Adopt(Round),
    AwaitMarking,
    Links,
    Manifests,
    Condemn(Round),
    Spare(Stage),
    /// Sends the removal of an item, signed with the lease.
    Send(Stage, u8),
    Wait(Stage, u8),
    End,
    Clear,
    Ended,
}

/// A round, and whether another one may follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Stage {
    round: Round,
    is_last: bool,
}

impl Stage {
    fn after(self) -> Collect {
        if self.is_last { Collect::End } else { Collect::Condemn(Round::Blob) }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    blob: bool,
    links: [Link; 2],
    manifests: [bool; 2],
    phase: Phase,
    run: u8,
    condemned_links: [bool; 2],
    condemned_blob: bool,
    /// By the run.
    claims: [bool; RUNS_MAX as usize + 1],
    /// Who took the lease, and how many ticks ago.
    lease: (usize, u8),
    pusher: Pusher,
    holders: [Holder; 2],
    /// A removal whose answer was lost, and who sent it.
    stray: Option<(usize, Request)>,
}

impl State {
    /// The promise.
    fn is_kept(&self) -> bool {
        (0..2).all(|repo| !self.manifests[repo] || self.links[repo] != Link::Absent && self.blob)
    }

    /// Lands or loses a request; tells whether it landed.
    fn land(&mut self, request: Request, rules: &Rules) -> bool {
        let expires = match request.effect {
            Effect::PutLink(_) | Effect::PutManifest(_) => rules.links_expire,
            Effect::RemoveLink(_) | Effect::RemoveBlob => rules.removals_expire,
        };
        if expires && request.age > VALID {
            return false;
        }
        match request.effect {
            Effect::PutLink(repo) => self.links[repo] = Link::New,
            Effect::PutManifest(repo) => self.manifests[repo] = true,
            Effect::RemoveLink(repo) => self.links[repo] = Link::Absent,
            Effect::RemoveBlob => self.blob = false,
        }
        true
    }

    fn view(&self, repo: usize, goal: Goal) -> View {
        let source = goal == Goal::Mount && self.condemned_links[1 - repo];
        let condemned = self.condemned_blob || self.condemned_links[repo] || source;
        View { age: 0, phase: self.phase, run: self.run, condemned }
    }

    /// The server's clock goes on.
    fn tick(&self) -> Self {
        let older = |age: &mut u8| *age = (*age + 1).min(AGE_MAX);
        let mut state = self.clone();
        older(&mut state.pusher.view.age);
        state.lease.1 = (state.lease.1 + 1).min(AGE_MAX);
        for request in [&mut state.pusher.request]
            .into_iter()
            .chain(state.holders.iter_mut().map(|holder| &mut holder.request))
        {
            request.iter_mut().for_each(|request| older(&mut request.age));
        }
        state.stray.iter_mut().for_each(|(_, request)| older(&mut request.age));
        state.holders.iter_mut().for_each(|holder| older(&mut holder.age));
        state
    }

    /// Forgets what no step looks at any more, so that states which differ in nothing else are one.
    fn forget(mut self, rules: &Rules) -> Self {
        let pusher = &mut self.pusher;
        if matches!(pusher.step, Push::Look(_) | Push::Wait(_) | Push::Ended) {
            pusher.view = NOTHING;
        }
        for holder in &mut self.holders {
            if holder.step != Collect::AwaitMarking {
                holder.age = 0;
            }
            let marks = match holder.step {
                Collect::Manifests | Collect::Condemn(_) => true,
                Collect::Spare(stage) | Collect::Send(stage, _) | Collect::Wait(stage, _) => !stage.is_last,
                _ => false,
            };
            if !marks {
                (holder.referenced, holder.links) = ([false; 2], [Link::Absent; 2]);
            }
            if matches!(holder.step, Collect::Idle | Collect::Read | Collect::Announce | Collect::Ended) {
                holder.run = 0;
            }
            if matches!(holder.step, Collect::Idle | Collect::Read | Collect::Clear | Collect::Ended) {
                holder.knows = false;
            }
        }
        if self.stray.is_some_and(|(_, request)| request.age > VALID) && rules.removals_expire {
            self.stray = None;
        }
        // The two who collect are alike.
        if self.holders[0] > self.holders[1] {
            self.holders.swap(0, 1);
            self.lease.0 = 1 - self.lease.0;
            self.stray.iter_mut().for_each(|(sender, _)| *sender = 1 - *sender);
        }
        self
    }

    /// Replaces the state of the run; tells whether it was what we know.
    fn replace(&mut self, who: usize, phase: Phase, rules: &Rules) -> bool {
        if rules.state_is_replaced && !self.holders[who].knows {
            return false;
        }
        self.phase = phase;
        if !matches!(phase, Phase::Condemned(_)) {
            (self.condemned_links, self.condemned_blob) = ([false; 2], false);
        }
        self.holders[1 - who].knows = false;
        self.holders[who].knows = true;
        true
    }

    /// Renews the lease, unless another has taken it; one that ran out and that nobody took is still good.
    fn renew(&mut self, who: usize) -> bool {
        let is_ours = self.lease.0 == who;
        if is_ours {
            self.lease.1 = 0;
        }
        is_ours
    }
}

/// All that may come of one step of who pushes to a repository.
fn push(state: &State, repo: usize, rules: &Rules) -> Vec<State> {
    let mut state = state.clone();
    let pusher = state.pusher;
    let to = |state: &State, step| {
        let mut state = state.clone();
        state.pusher.step = step;
        state
    };
    match pusher.step {
        Push::Look(goal) => {
            state.pusher.view = state.view(repo, goal);
            let view = state.pusher.view;
            let is_claimed = state.claims[usize::from(view.run)] && rules.claims_have_a_run;
            match view.phase {
                Phase::None => vec![to(&state, Push::Check(goal))],
                // It has not forgotten what it claimed before it looked.
                _ if rules.claims && is_claimed => {
                    vec![to(&state, Push::Claim(goal)), to(&state, Push::Check(goal))]
                }
                _ if rules.claims => vec![to(&state, Push::Claim(goal))],
                _ => vec![to(&state, Push::Check(goal))],
            }
        }
        Push::Claim(goal) => {
            let run = if rules.claims_have_a_run { pusher.view.run } else { 0 };
            state.claims[usize::from(run)] = true;
            vec![to(&state, if rules.looks_again { Push::LookAgain(goal) } else { Push::Check(goal) })]
        }
        Push::LookAgain(goal) => {
            let view = state.view(repo, goal);
            let same = view.phase == Phase::None || view.run == pusher.view.run;
            state.pusher.view = view;
            vec![to(&state, if same { Push::Check(goal) } else { Push::Claim(goal) })]
        }
        Push::Check(goal) => {
            if pusher.view.condemned && rules.condemned_is_absent {
                return vec![match goal {
                    // It waits for the end of the round.
                    Goal::Blob | Goal::Commit if state.view(repo, goal).condemned => return Vec::new(),
                    Goal::Blob | Goal::Commit => to(&state, Push::Look(Goal::Blob)),
                    Goal::Mount | Goal::Manifest => to(&state, Push::Ended),
                }];
            }
            let is_there = match goal {
                Goal::Blob => true,
                Goal::Commit => state.blob,
                Goal::Mount => state.links[1 - repo] != Link::Absent && state.blob,
                Goal::Manifest => state.links[repo] != Link::Absent && state.blob,
            };
            vec![match (is_there, goal) {
                (true, Goal::Blob) => {
                    state.blob = true;
                    to(&state, Push::Look(Goal::Commit))
                }
                (true, goal) => {
                    let effect = match goal {
                        Goal::Manifest => Effect::PutManifest(repo),
                        _ => Effect::PutLink(repo),
                    };
                    state.pusher.request = Some(Request { effect, age: pusher.view.age });
                    to(&state, Push::Wait(goal))
                }
                (false, Goal::Commit) => to(&state, Push::Look(Goal::Blob)),
                (false, _) => to(&state, Push::Ended),
            }]
        }
        Push::Wait(goal) => {
            let Some(request) = pusher.request else { return Vec::new() };
            state.pusher.request = None;
            vec![match (state.land(request, rules), goal) {
                (false, goal) => to(&state, Push::Look(goal)),
                (true, Goal::Manifest) => to(&state, Push::Ended),
                (true, _) => to(&state, Push::Look(Goal::Manifest)),
            }]
        }
        Push::Ended => Vec::new(),
    }
}

/// All that may come of one step of the replica that collects, or of the one that takes over.
fn collect(state: &State, who: usize, rules: &Rules) -> Vec<State> {
    let mut state = state.clone();
    let holder = state.holders[who];
    let is_ours = state.lease.0 == who;
    let has_stray = state.stray.is_some_and(|(sender, _)| sender == who);
    let next = |state: &State, step| {
        let mut state = state.clone();
        state.holders[who].step = step;
        vec![state]
    };
    match holder.step {
        Collect::Idle => {
            if !is_ours && state.lease.1 <= rules.lease {
                return Vec::new();
            }
            state.lease = (who, 0);
            next(&state, Collect::Read)
        }
        Collect::Read => {
            state.holders[who].knows = true;
            state.holders[who].run = state.run;
            let phase = state.phase;
            next(&state, Collect::Confirm(phase))
        }
        Collect::Confirm(_) if rules.confirms && !state.renew(who) => next(&state, Collect::Ended),
        // The list of the one before is in the bucket.
        Collect::Confirm(Phase::Condemned(round)) => next(&state, Collect::Adopt(round)),
        Collect::Confirm(_) => next(&state, Collect::Announce),
        Collect::Adopt(round) => {
            let is_replaced = !rules.adopts || state.replace(who, Phase::Condemned(round), rules);
            match is_replaced {
                true => next(&state, Collect::Spare(Stage { round, is_last: true })),
                false => next(&state, Collect::Ended),
            }
        }
        Collect::Announce => {
            if state.run == RUNS_MAX || !state.replace(who, Phase::Marking, rules) {
                return next(&state, Collect::Ended);
            }
            state.run += 1;
            state.holders[who].run = state.run;
            state.holders[who].age = 0;
            next(&state, Collect::AwaitMarking)
        }
        Collect::AwaitMarking if rules.waits_to_mark && holder.age <= VALID => Vec::new(),
        Collect::AwaitMarking if !state.renew(who) => next(&state, Collect::Ended),
        Collect::AwaitMarking => next(&state, Collect::Links),
        Collect::Links => {
            state.holders[who].links = state.links;
            next(&state, Collect::Manifests)
        }
        Collect::Manifests => {
            state.holders[who].referenced = state.manifests;
            next(&state, Collect::Condemn(Round::Links))
        }
        // Until what was lost has landed, or is refused.
        Collect::Condemn(_) | Collect::End if rules.waits_for_strays && has_stray => Vec::new(),
        Collect::Condemn(round) => {
            // What the first round has spared is referred to since.
            let goes = |repo: usize| holder.links[repo] == Link::Old && !holder.referenced[repo];
            let stays = |repo: usize| holder.links[repo] != Link::Absent && !goes(repo);
            let (links, blob) = match round {
                Round::Links => ([goes(0), goes(1)], false),
                Round::Blob => ([false; 2], !stays(0) && !stays(1)),
            };
            if links == [false; 2] && !blob {
                let after = if round == Round::Links { Collect::Condemn(Round::Blob) } else { Collect::End };
                return next(&state, after);
            }
            if !state.replace(who, Phase::Condemned(round), rules) {
                return next(&state, Collect::Ended);
            }
            (state.condemned_links, state.condemned_blob) = (links, blob);
            next(&state, Collect::Spare(Stage { round, is_last: round == Round::Blob }))
        }
        Collect::Spare(stage) => {
            let run = if rules.claims_have_a_run { holder.run } else { 0 };
            match state.claims[usize::from(run)] {
                true => {
                    state.holders[who].referenced = [true; 2];
                    next(&state, stage.after())
                }
                false => next(&state, Collect::Send(stage, 0)),
            }
        }
        Collect::Send(..) if !state.renew(who) => next(&state, Collect::Ended),
        Collect::Send(stage, item) => {
            let effect = match (stage.round, item) {
                (Round::Links, 0) if state.condemned_links[0] => Effect::RemoveLink(0),
                (Round::Links, 0 | 1) if state.condemned_links[1] => Effect::RemoveLink(1),
                (Round::Blob, 0) if state.condemned_blob => Effect::RemoveBlob,
                _ => return next(&state, stage.after()),
            };
            let item = if effect == Effect::RemoveLink(1) { 1 } else { item };
            state.holders[who].request = Some(Request { effect, age: 0 });
            next(&state, Collect::Wait(stage, item))
        }
        Collect::Wait(stage, item) => {
            let Some(request) = holder.request else { return Vec::new() };
            state.holders[who].request = None;
            let mut all = Vec::new();
            if state.stray.is_none() {
                // No answer comes, and it is sent again.
                let lost = State { stray: Some((who, request)), ..state.clone() };
                all.extend(next(&lost, Collect::Send(stage, item)));
            }
            let landed = state.land(request, rules);
            all.extend(next(&state, Collect::Send(stage, item + u8::from(landed))));
            all
        }
        Collect::End if !state.replace(who, Phase::None, rules) => next(&state, Collect::Ended),
        Collect::End => next(&state, Collect::Clear),
        // The claims go when everybody can know that the run is over; meanwhile there may be another.
        Collect::Clear => {
            let run = if rules.claims_have_a_run { holder.run } else { 0 };
            state.claims[usize::from(run)] = false;
            if state.lease.0 == who {
                state.lease.1 = AGE_MAX;
            }
            next(&state, Collect::Idle)
        }
        Collect::Ended => Vec::new(),
    }
}

/// What comes of a removal whose answer was lost.
fn stray(state: &State, rules: &Rules) -> Vec<State> {
    let Some((_, request)) = state.stray else { return Vec::new() };
    let mut state = State { stray: None, ..state.clone() };
    state.land(request, rules);
    vec![state]
}

/// Tries all interleavings of one who pushes to a repository, one who deletes the manifest of the first, and two who collect;
/// returns how many states there are, or one that breaks the promise.
fn explore((repo, goal): (usize, Goal), rules: &Rules) -> Result<usize, Box<State>> {
    let holder = Holder {
        step: Collect::Idle,
        age: 0,
        run: 0,
        knows: false,
        referenced: [false; 2],
        links: [Link::Absent; 2],
        request: None,
    };
    let begin = |manifest| State {
        blob: true,
        links: [Link::Old, Link::Absent],
        manifests: [manifest, false],
        phase: Phase::None,
        run: 0,
        condemned_links: [false; 2],
        condemned_blob: false,
        claims: [false; RUNS_MAX as usize + 1],
        lease: (0, AGE_MAX),
        pusher: Pusher { step: Push::Look(goal), view: NOTHING, request: None },
        holders: [holder; 2],
        stray: None,
    };
    let mut todo = vec![begin(false), begin(true)];
    // Of millions of states two may have one hash, once in a million years.
    let hasher = BuildHasherDefault::<DefaultHasher>::default();
    let mut seen: HashSet<u64> = todo.iter().map(|state| hasher.hash_one(state)).collect();
    while let Some(state) = todo.pop() {
        if !state.is_kept() {
            return Err(Box::new(state));
        }
        let mut next = push(&state, repo, rules);
        next.extend((0..2).flat_map(|who| collect(&state, who, rules)));
        next.extend(stray(&state, rules));
        next.push(state.tick());
        next.push(State { manifests: [false, state.manifests[1]], ..state });
        for state in next.into_iter().map(|state| state.forget(rules)) {
            if seen.insert(hasher.hash_one(&state)) {
                todo.push(state);
            }
        }
    }
    Ok(seen.len())
}

const GOALS: [(usize, Goal); 4] = [(0, Goal::Manifest), (0, Goal::Blob), (1, Goal::Mount), (1, Goal::Blob)];

fn holds(pusher: (usize, Goal)) {
    let states = explore(pusher, &ALL).unwrap_or_else(|state| panic!("lost: {state:#?}"));
    assert!(states > 100_000, "{states}");
}

#[test]
fn an_accepted_manifest_never_loses_its_blob_in_any_interleaving() {
    holds((0, Goal::Manifest));
}

#[test]
fn nor_does_one_whose_blob_was_mounted() {
    holds((1, Goal::Mount));
}

#[test]
fn nor_does_one_whose_blob_was_pushed_where_it_was() {
    holds((0, Goal::Blob));
}

#[test]
fn nor_does_one_whose_blob_was_pushed_elsewhere() {
    holds((1, Goal::Blob));
}

#[test]
fn each_rule_is_needed() {
    for (name, rules) in [
        ("links_expire", Rules { links_expire: false, ..ALL }),
        ("removals_expire", Rules { removals_expire: false, ..ALL }),
        ("waits_to_mark", Rules { waits_to_mark: false, ..ALL }),
        ("claims", Rules { claims: false, ..ALL }),
        ("looks_again", Rules { looks_again: false, ..ALL }),
        ("condemned_is_absent", Rules { condemned_is_absent: false, ..ALL }),
        ("lease", Rules { lease: VALID - 1, ..ALL }),
        ("state_is_replaced", Rules { state_is_replaced: false, ..ALL }),
        ("confirms", Rules { confirms: false, ..ALL }),
        ("adopts", Rules { adopts: false, ..ALL }),
        ("waits_for_strays", Rules { waits_for_strays: false, ..ALL }),
        ("claims_have_a_run", Rules { claims_have_a_run: false, ..ALL }),
    ] {
        let broken = GOALS.iter().any(|goal| explore(*goal, &rules).is_err());
        assert!(broken, "{name} could go");
    }
}
