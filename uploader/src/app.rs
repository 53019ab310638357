//! The one target: which upload it has, and what it waits for.
//!
//! ```text
//!   Waiting ── an upload begins ──> Running ── a verdict ──> Over ── told, or not asked for ──> the process ends
//!      ^                              │
//!      └── idle, ended, started over ─┘
//! ```

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use dvcr_converter::progress::Progress;
use dvcr_importer::source::feed::feed;
use dvcr_importer::{Error, ErrorKind, ImportRequest, Source, SourceOptions, import};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, timeout};
use uuid::Uuid;

use crate::Config;
use crate::session::{New, Session, Verdict};

/// Times that another upload may get in first while one is replaced.
const REPLACEMENTS_MAX: u32 = 3;
/// How long an import may take to clear away what it has stored of an upload that is ended.
const DISCARD_TIMEOUT: Duration = Duration::from_secs(5);
/// How often an upload is looked at whether it is idle.
const IDLE_POLL: Duration = Duration::from_millis(100);

#[derive(Clone)]
pub(crate) enum Phase {
    /// Since when.
    Waiting(Instant),
    Running(Arc<Session>),
    /// It has its verdict.
    Over(Arc<Session>),
}

/// Why an upload cannot begin.
pub(crate) enum Taken {
    /// Another one runs.
    Busy(Arc<Session>),
    /// There was one, and one is all.
    Over(Arc<Session>),
}

pub(crate) struct App {
    pub(crate) config: Config,
    phase: Mutex<Phase>,
    /// Of the import that runs.
    progress: watch::Sender<Arc<Progress>>,
    /// The phase has changed.
    pub(crate) changed: Notify,
    /// A client has its verdict.
    pub(crate) told: Notify,
}

impl App {
    pub(crate) fn new(config: Config, progress: watch::Sender<Arc<Progress>>) -> Self {
        let phase = Mutex::new(Phase::Waiting(Instant::now()));
        Self { config, phase, progress, changed: Notify::new(), told: Notify::new() }
    }

    pub(crate) fn phase(&self) -> Phase {
        self.lock().clone()
    }

    /// Begins an upload; one that runs is ended first if `replaces` says so.
    pub(crate) async fn begin(
        self: &Arc<Self>,
        new: New,
        replaces: impl Fn(&Session) -> bool,
    ) -> Result<Arc<Session>, Taken> {
        let mut replacements = 0;
        loop {
            let old = {
                let mut phase = self.lock();
                match &*phase {
                    Phase::Over(old) => return Err(Taken::Over(Arc::clone(old))),
                    Phase::Running(old) => Arc::clone(old),
                    Phase::Waiting(_) => {
                        let session = self.start(new);
                        *phase = Phase::Running(Arc::clone(&session));
                        return Ok(session);
                    }
                }
            };
            if replacements == REPLACEMENTS_MAX || !replaces(&old) {
                return Err(Taken::Busy(old));
            }
            replacements += 1;
            self.discard(&old, "it was started over", false).await;
        }
    }

    /// Goes on with an upload that another process of ours began; `None` if nothing is left of it.
    pub(crate) async fn resume(self: &Arc<Self>, new: New) -> Result<Option<Arc<Session>>, Taken> {
        let session = self.begin(new, |_| false).await?;
        let begun = session.take().await.begin().await;
        if begun == Ok(0) {
            self.discard(&session, "nothing of it is left to go on with", false).await;
            return Ok(None);
        }
        if begun.is_err() {
            // Its verdict tells why.
            let _ = session.verdict().await;
        }
        Ok(Some(session))
    }

    /// Ends an upload before all of it is in; its place is free again. `keeps` says that the registry keeps what has come, for
    /// whoever comes back with the same id.
    pub(crate) async fn discard(&self, session: &Arc<Session>, why: &str, keeps: bool) {
        if session.is_storing() || session.concluded().is_some() {
            return;
        }
        tracing::info!(id = session.id, received = session.received(), why, "upload ended");
        // Whoever sends at the moment is displaced, and nobody else begins to.
        let mut seat = session.take().await;
        session.discarded.store(true, Ordering::SeqCst);
        if !keeps && let Some(feed) = seat.release() {
            let text = format!("the upload was ended: {why}");
            let failing = async {
                feed.fail(Error::new(ErrorKind::Invalid, text)).await;
                let _ = session.verdict().await;
            };
            let _ = timeout(DISCARD_TIMEOUT, failing).await;
        }
        session.progress.cancel();
        let _ = session.verdict().await;
    }

    /// Stops the import that runs, and waits until it has put things in order.
    pub(crate) async fn stop(&self) {
        if let Phase::Running(session) = self.phase() {
            session.progress.cancel();
            let _ = session.verdict().await;
        }
    }

    fn start(self: &Arc<Self>, new: New) -> Arc<Session> {
        let (writer, source) = feed(new.len, new.name.clone(), new.id.clone());
        let request = ImportRequest {
            source: Source::Feed(source),
            destination: self.config.destination.clone(),
            checksums: self.config.checksums.clone(),
            source_options: SourceOptions::default(),
            if_changed: false,
            keep_after: self.config.keep_after,
            client: self.config.client.clone(),
            limits: self.config.limits.clone(),
        };
        let progress = Arc::new(Progress::default());
        self.progress.send_replace(Arc::clone(&progress));
        let (tell, verdict) = watch::channel(None);
        tracing::info!(id = new.id, name = new.name, total = new.len, "upload begun");
        let session = Arc::new(Session::new(new, writer, progress, verdict, self.config.idle_timeout));
        tokio::spawn(Arc::clone(self).run(Arc::clone(&session), request, tell));
        tokio::spawn(Arc::clone(self).watch(Arc::clone(&session)));
        session
    }

    /// Imports what is sent.
    async fn run(
        self: Arc<Self>,
        session: Arc<Session>,
        request: ImportRequest,
        tell: watch::Sender<Option<Verdict>>,
    ) {
        let outcome = tokio::spawn(import(request, Arc::clone(&session.progress))).await;
        let ended = |e| Error::with(ErrorKind::Registry, "the import ended early", e);
        let verdict: Verdict = outcome.map_err(ended).flatten().map(Arc::new).map_err(Arc::new);
        *self.lock() = match session.discarded.load(Ordering::SeqCst) {
            true => Phase::Waiting(Instant::now()),
            false => Phase::Over(Arc::clone(&session)),
        };
        tell.send_replace(Some(verdict));
        self.changed.notify_one();
        // Lets go of the source thread, should it still wait for bytes.
        session.fail(Error::new(ErrorKind::Cancelled, "the import has ended")).await;
    }

    /// Ends an upload whose client stays away.
    async fn watch(self: Arc<Self>, session: Arc<Session>) {
        let limit = self.config.idle_timeout;
        while session.concluded().is_none() {
            if session.idle().is_some_and(|idle| idle >= limit) {
                let why = format!("nothing came for {} s", limit.as_secs_f32());
                return self.discard(&session, &why, true).await;
            }
            tokio::time::sleep(IDLE_POLL.min(limit)).await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Phase> {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A name that no other upload has.
pub(crate) fn new_id() -> String {
    Uuid::new_v4().simple().to_string()
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use axum::extract::{Request, State};
    use dvcr_image::ClientOptions;
    use futures_util::FutureExt;

    use super::*;
    use crate::api;

    /// A target whose one upload, `a`, was refused.
    fn refused() -> Arc<App> {
        let config = Config {
            destination: "r.example/a:1".parse().unwrap(),
            checksums: Vec::new(),
            client: ClientOptions::default(),
            limits: Default::default(),
            start_timeout: None,
            idle_timeout: Duration::from_secs(600),
            keep_after: Duration::from_secs(60),
        };
        let app = Arc::new(App::new(config, watch::channel(Arc::default()).0));
        let new = New { id: "a".into(), len: Some(9), name: None, metadata: None, resumable: true };
        let (writer, _) = feed(new.len, None, new.id.clone());
        let error = Error::new(ErrorKind::Checksum, "another file");
        let verdict = watch::channel(Some(Err(Arc::new(error)))).1;
        let session = Session::new(new, writer, Arc::default(), verdict, Duration::from_secs(600));
        *app.lock() = Phase::Over(Arc::new(session));
        app
    }

    #[tokio::test]
    async fn a_client_that_learns_the_verdict_by_any_way_is_not_waited_for() {
        let (tus, range) = (("tus-resumable", "1.0.0"), ("content-range", "bytes */9"));
        let patch = [tus, ("content-type", "application/offset+octet-stream"), ("upload-offset", "3")];
        for (method, path, headers, tells) in [
            ("GET", "/upload", &[][..], true),
            ("HEAD", "/upload?upload=a", &[tus], true),
            ("HEAD", "/upload?upload=b", &[tus], true),
            ("PATCH", "/upload?upload=a", &patch, true),
            ("POST", "/upload", &[tus, ("upload-length", "9")], true),
            ("PUT", "/upload", &[range], true),
            ("PUT", "/upload", &[], true),
            ("OPTIONS", "/upload", &[], false),
            ("DELETE", "/upload", &[], false),
            ("GET", "/healthz", &[], false),
        ] {
            let app = refused();
            let mut request = Request::builder().method(method).uri(path);
            for (name, value) in headers {
                request = request.header(*name, *value);
            }
            let request = request.body(Body::from("x")).unwrap();
            let status = api::answer(State(Arc::clone(&app)), request).await.status();
            assert_eq!(
                app.told.notified().now_or_never().is_some(),
                tells,
                "{method} {path} {headers:?}: {status}"
            );
        }
    }
}
