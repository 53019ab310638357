//! Tells other programs what happens, in the envelope of CNCF distribution's notifications.
//!
//! One endpoint has one queue and one task that sends: events arrive in order, and again if it is not sure that they did.

use std::collections::VecDeque;
use std::fmt::{self, Write};
use std::io;
use std::net::IpAddr;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use chrono::{DateTime, SecondsFormat, Utc};
use http::header::{CONTENT_TYPE, LOCATION};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use reqwest::Url;
use serde::Serialize;
use tokio::sync::Notify;
use tokio::time::sleep;
use uuid::Uuid;

use super::config::Webhook;
use super::queue::{Batch, Queue, RECORD_BYTES_MAX};
use super::writer::{Store, Writer};
use super::{Action, Ending, Event, Kind, Recorder};
use crate::api::error::Chain;
use crate::metrics::head;
use crate::reload::{self, Reloaded};
use crate::{Error, Result};

/// What distribution 3 sends.
const MEDIA_TYPE: HeaderValue =
    HeaderValue::from_static("application/vnd.docker.distribution.events.v2+json");
/// Bytes of events in one request, about; one event may be longer.
const BATCH_BYTES_MAX: usize = 256 << 10;
/// Longest pause between two attempts, unless the first is longer.
const BACKOFF_MAX: Duration = Duration::from_secs(60);
/// How often the log tells of an endpoint that goes on failing.
const FAILURE_LOG_INTERVAL: Duration = Duration::from_secs(60);
/// Largest file with the value of a header, or with certificates, bytes.
const VALUE_BYTES_MAX: u64 = 16 << 10;
const CA_BYTES_MAX: u64 = 1 << 20;
/// Bytes of an answer that are read, so that its connection can be used again.
const ANSWER_BYTES_MAX: usize = 64 << 10;

/// An endpoint.
#[derive(Debug)]
pub(super) struct Hook {
    config: Webhook,
    writer: Writer,
    spool: Spool,
    target: Reloaded<Target>,
    sent: AtomicU64,
    failures: AtomicU64,
}

/// How the endpoint is reached.
struct Target {
    client: reqwest::Client,
    url: Url,
    headers: HeaderMap,
}

/// Events that wait, shared by the thread that writes and the task that sends.
#[derive(Clone, Debug)]
struct Spool(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    queue: Mutex<Queue>,
    arrived: Notify,
    /// As the queue has them; read by those who must not wait for it.
    pending: AtomicU64,
    dropped: AtomicU64,
}

impl Hook {
    /// Opens an endpoint's queue in `dir`. Blocks.
    pub(super) fn open(config: &Webhook, dir: &Path) -> Result<Self> {
        let (of, name) = (config.clone(), config.name.clone());
        let files = config.secret_headers.values().chain(&config.ca).cloned().collect();
        let target = Reloaded::open("headers and roots of a webhook", files, move || Target::load(&of))?;
        let cannot = |source| Error::Write { path: dir.to_owned(), source };
        let queue = Queue::open(dir, config.queue_bytes.0).map_err(cannot)?;
        let pending = AtomicU64::new(queue.pending());
        let (queue, arrived, dropped) = (Mutex::new(queue), Notify::new(), AtomicU64::new(0));
        let spool = Spool(Arc::new(Shared { queue, arrived, pending, dropped }));
        let writer =
            Writer::start(format!("the queue of the webhook {name}"), spool.clone()).map_err(cannot)?;
        let (sent, failures) = (AtomicU64::new(0), AtomicU64::new(0));
        Ok(Self { config: config.clone(), writer, spool, target, sent, failures })
    }

    pub(super) fn refresh(&self, force: bool) {
        self.target.refresh(force);
    }

    pub(super) fn writer(&self) -> &Writer {
        &self.writer
    }

    /// Puts into the queue what the endpoint wants to know of an event; never waits.
    pub(super) fn tell(&self, event: &Event, recorder: &Recorder) {
        let Some(action) = action(event) else { return };
        let Webhook { ignore, repositories, .. } = &self.config;
        if ignore.actions.iter().any(|ignored| ignored == action) {
            return;
        }
        let repository = event.repository.as_deref().unwrap_or_default();
        if !repositories.is_empty() && !repositories.iter().any(|pattern| pattern.matches(repository)) {
            return;
        }
        for notification in notifications(event, action, recorder) {
            if ignore.media_types.iter().any(|ignored| ignored == notification.target.media_type) {
                continue;
            }
            // A struct of bounded texts and numbers: always JSON, and never near the bound.
            let record = serde_json::to_vec(&notification).unwrap_or_default();
            if record.len() <= RECORD_BYTES_MAX {
                self.writer.write(record);
            }
        }
    }

    /// Sends what is in the queue, for as long as it is polled.
    pub(super) async fn deliver(self: Arc<Self>) {
        let mut batch_max = self.config.batch;
        let mut failures = 0_u32;
        let mut told: Option<Instant> = None;
        loop {
            let why = match self.next(batch_max).await {
                Ok(batch) => match self.post(&batch.records).await {
                    Ok(()) => {
                        let count = batch.records.len() as u64;
                        self.taken(batch).await;
                        self.sent.fetch_add(count, Ordering::Relaxed);
                        if told.take().is_some() {
                            tracing::info!(webhook = self.config.name, failures, "events are taken again");
                        }
                        failures = 0;
                        batch_max = batch_max.saturating_mul(2).min(self.config.batch);
                        continue;
                    }
                    Err(Refused::TooLarge) if batch.records.len() > 1 => {
                        batch_max = batch.records.len() / 2;
                        continue;
                    }
                    Err(why) => why.to_string(),
                },
                Err(error) => format!("the queue cannot be read: {error}"),
            };
            self.failures.fetch_add(1, Ordering::Relaxed);
            failures = failures.saturating_add(1);
            if told.is_none_or(|told| told.elapsed() >= FAILURE_LOG_INTERVAL) {
                told = Some(Instant::now());
                let pending = self.spool.0.pending.load(Ordering::Relaxed);
                tracing::warn!(
                    webhook = self.config.name,
                    pending,
                    failures,
                    why,
                    "events are not taken; they wait"
                );
            }
            sleep(pause(self.config.backoff.0, failures, Uuid::new_v4().as_u64_pair().0)).await;
        }
    }

    /// Waits for events.
    async fn next(&self, records_max: usize) -> io::Result<Batch> {
        loop {
            let spool = self.spool.clone();
            let read = blocking(move || spool.with(|queue| queue.read(records_max, BATCH_BYTES_MAX))).await?;
            match read {
                Some(batch) => return Ok(batch),
                None => self.spool.0.arrived.notified().await,
            }
        }
    }

    /// Notes that a batch has arrived.
    async fn taken(&self, batch: Batch) {
        let spool = self.spool.clone();
        if let Err(error) = blocking(move || spool.with(|queue| queue.ack(&batch))).await {
            let webhook = &self.config.name;
            tracing::error!(webhook, %error, "it cannot be noted which events were taken; after a restart they come again");
        }
    }

    async fn post(&self, records: &[Vec<u8>]) -> Result<(), Refused> {
        let target = self.target.get();
        let request = target.client.post(target.url.clone()).headers(target.headers.clone());
        let request = request.header(CONTENT_TYPE, MEDIA_TYPE).body(envelope(records));
        let mut response = request.send().await.map_err(|error| Refused::Failed(error.without_url()))?;
        let status = response.status();
        let mut left = ANSWER_BYTES_MAX;
        while let Ok(Some(bytes)) = response.chunk().await {
            match left.checked_sub(bytes.len()) {
                Some(rest) => left = rest,
                None => break,
            }
        }
        match status.as_u16() {
            200..=299 => Ok(()),
            // The same request should go elsewhere, so it has not been taken.
            301 | 302 | 307 | 308 if response.headers().contains_key(LOCATION) => Err(Refused::Moved(status)),
            300..=399 => Ok(()),
            413 => Err(Refused::TooLarge),
            _ => Err(Refused::Status(status)),
        }
    }
}

/// Why events were not taken; tells nothing of the address.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("{}", Chain(.0))]
    Failed(reqwest::Error),
    #[error("the answer is {0}")]
    Status(StatusCode),
    #[error("the answer is {0}: redirects are not followed; configure the new address")]
    Moved(StatusCode),
    #[error("the answer is that one event is too large")]
    TooLarge,
}

impl Target {
    fn load(config: &Webhook) -> Result<Self> {
        let bad = |why: &str| Error::Invalid { why: format!("webhook {}: {why}", config.name) };
        // Messages do not show it: it may hold secrets.
        let url = Url::parse(&config.url).ok().filter(|url| ["http", "https"].contains(&url.scheme()));
        let url = url.ok_or_else(|| bad("url is not of the form https://host/path"))?;
        let mut headers = HeaderMap::new();
        for (name, value) in &config.headers {
            headers.insert(
                header_name(name).ok_or_else(|| bad("a name of a header is none"))?,
                header_value(value.as_bytes()).ok_or_else(|| bad("a value of a header cannot be one"))?,
            );
        }
        for (name, path) in &config.secret_headers {
            let bytes = reload::read(path, VALUE_BYTES_MAX)?;
            let line = bytes.strip_suffix(b"\n").unwrap_or(&bytes);
            let value = header_value(line.strip_suffix(b"\r").unwrap_or(line)).ok_or_else(|| {
                Error::Secret { path: path.clone(), why: "holds no value of a header on one line" }
            })?;
            headers.insert(header_name(name).ok_or_else(|| bad("a name of a header is none"))?, value);
        }
        let mut client = reqwest::Client::builder()
            .user_agent(concat!("dvcr/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            .timeout(config.timeout.0)
            .http1_only();
        if is_loopback(&url) {
            client = client.no_proxy();
        }
        if let Some(path) = &config.ca {
            let unusable =
                |source: Box<dyn std::error::Error + Send + Sync>| Error::Tls { path: path.clone(), source };
            let roots = reqwest::Certificate::from_pem_bundle(&reload::read(path, CA_BYTES_MAX)?)
                .map_err(|error| unusable(error.into()))?;
            if roots.is_empty() {
                return Err(unusable("it has no certificate in PEM".into()));
            }
            client = client.tls_certs_only(roots);
        } else if url.scheme() == "http" {
            // The system's roots are not wanted, and take time and memory.
            client = client.tls_certs_only([]);
        }
        let client =
            client.build().map_err(|error| bad(&format!("no client can be made: {}", Chain(&error))))?;
        Ok(Self { client, url, headers })
    }
}

fn header_name(name: &str) -> Option<HeaderName> {
    name.parse().ok()
}

fn header_value(bytes: &[u8]) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_bytes(bytes).ok().filter(|value| !value.is_empty())?;
    value.set_sensitive(true);
    Some(value)
}

fn is_loopback(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default();
    let address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    host == "localhost" || address.is_ok_and(|address| address.is_loopback())
}

/// The pause behind so many failures in a row: it doubles, and is cut by up to a half at random.
fn pause(first: Duration, failures: u32, random: u64) -> Duration {
    let doublings = failures.saturating_sub(1).min(16);
    let whole = first.saturating_mul(1 << doublings).min(BACKOFF_MAX.max(first));
    let half = whole / 2;
    half + half.mul_f64(random as f64 / u64::MAX as f64)
}

/// Puts events, each in JSON already, into one request.
fn envelope(records: &[Vec<u8>]) -> Vec<u8> {
    [br#"{"events":["#.as_slice(), &records.join(&b','), b"]}"].concat()
}

impl Spool {
    fn with<T>(&self, work: impl FnOnce(&mut Queue) -> T) -> T {
        let mut queue: MutexGuard<'_, Queue> = self.0.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let done = work(&mut queue);
        self.0.pending.store(queue.pending(), Ordering::Relaxed);
        let dropped = queue.dropped();
        let before = self.0.dropped.swap(dropped, Ordering::Relaxed);
        drop(queue);
        if before == 0 && dropped > 0 {
            tracing::error!(
                "a webhook takes less than happens, and its queue is full: the oldest events are dropped"
            );
        }
        done
    }
}

impl Store for Spool {
    const SYNC_INTERVAL: Duration = Duration::from_millis(200);

    fn put(&mut self, records: &mut VecDeque<Vec<u8>>) -> io::Result<()> {
        let done = self.with(|queue| {
            while let Some(record) = records.front() {
                queue.append(record)?;
                records.pop_front();
            }
            Ok(())
        });
        self.0.arrived.notify_one();
        done
    }

    fn sync(&mut self) -> io::Result<()> {
        self.with(Queue::unsynced).map_or(Ok(()), |file| file.sync_data())
    }

    fn gap(&self, _: u64) -> Option<Vec<u8>> {
        None
    }
}

impl fmt::Debug for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Target").finish_non_exhaustive()
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

type Value<'a> = &'a dyn Fn(&Hook) -> u64;

pub(super) fn write_metrics(hooks: &[Arc<Hook>], out: &mut String) -> fmt::Result {
    if hooks.is_empty() {
        return Ok(());
    }
    let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let dropped = |hook: &Hook| get(&hook.spool.0.dropped) + get(&hook.writer.counts().lost);
    let rows: [(_, _, _, Value); 4] = [
        ("pending_events", "gauge", "Events that wait on disk.", &|hook| get(&hook.spool.0.pending)),
        ("sent_events_total", "counter", "Events that were taken.", &|hook| get(&hook.sent)),
        ("failures_total", "counter", "Attempts that failed.", &|hook| get(&hook.failures)),
        ("dropped_events_total", "counter", "Events that found no room, or made room.", &dropped),
    ];
    for (name, kind, help, value) in rows {
        let name = format!("dvcr_registry_webhook_{name}");
        head(out, &name, kind, help)?;
        for hook in hooks {
            writeln!(out, "{name}{{webhook=\"{}\"}} {}", hook.config.name, value(hook))?;
        }
    }
    Ok(())
}

/// An event on the wire; the names are distribution's.
#[derive(Serialize)]
struct Notification<'a> {
    id: String,
    timestamp: String,
    action: &'a str,
    target: TargetRecord<'a>,
    request: RequestRecord<'a>,
    actor: ActorRecord<'a>,
    source: SourceRecord,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct TargetRecord<'a> {
    media_type: &'a str,
    digest: &'a str,
    size: u64,
    #[serde(skip_serializing_if = "is_zero")]
    length: u64,
    #[serde(skip_serializing_if = "str::is_empty")]
    repository: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    from_repository: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    url: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tag: Option<&'a str>,
}

#[derive(Serialize)]
struct RequestRecord<'a> {
    id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    addr: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    host: Option<&'a str>,
    method: &'a str,
    useragent: &'a str,
}

#[derive(Serialize)]
struct ActorRecord<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct SourceRecord {
    addr: String,
    #[serde(rename = "instanceID")]
    instance_id: String,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// What distribution calls it; `None` of what it does not tell.
fn action(event: &Event) -> Option<&'static str> {
    match (event.action, event.status, event.ending) {
        (Action::Pull | Action::Head, 200 | 206, Ending::Whole) => Some("pull"),
        (Action::Push, 201, _) => Some("push"),
        (Action::Mount, 201, _) => Some("mount"),
        (Action::Delete, 202, _) => Some("delete"),
        _ => None,
    }
}

/// Makes one event of each tag that a push brings, and otherwise one; and one more of each tag that goes with its manifest.
fn notifications<'a>(
    event: &'a Event,
    action: &'a str,
    recorder: &'a Recorder,
) -> impl Iterator<Item = Notification<'a>> {
    let digest = event.digest.as_deref();
    let itself = event.tags.is_empty() || action == "delete" && digest.is_some();
    let of_tag = digest.filter(|_| action != "delete").unwrap_or_default();
    let itself = itself.then_some((digest.unwrap_or_default(), None));
    let parts = itself.into_iter().chain(event.tags.iter().map(move |tag| (of_tag, Some(tag.as_str()))));
    parts.map(move |(digest, tag)| notification(event, action, digest, tag, recorder))
}

fn notification<'a>(
    event: &'a Event,
    action: &'a str,
    digest: &'a str,
    tag: Option<&'a str>,
    recorder: &'a Recorder,
) -> Notification<'a> {
    let asked = &event.asked;
    let repository = event.repository.as_deref().unwrap_or_default();
    let (media_type, size) =
        event.stored.as_ref().map_or(("", 0), |stored| (&*stored.media_type, stored.bytes));
    let kind = match event.kind {
        Some(Kind::Manifest) => "manifests",
        _ => "blobs",
    };
    let url = asked.base_url.as_ref().filter(|_| event.action != Action::Delete);
    let addr = match recorder.listening.get() {
        Some(address) => format!("{}:{}", recorder.machine, address.port()),
        None => recorder.machine.clone(),
    };
    Notification {
        id: recorder.ids.next().to_string(),
        timestamp: DateTime::<Utc>::from(SystemTime::now()).to_rfc3339_opts(SecondsFormat::Nanos, true),
        action,
        target: TargetRecord {
            media_type,
            digest,
            size,
            length: size,
            repository,
            from_repository: event.from.as_deref(),
            url: url.map(|base| format!("{base}/v2/{repository}/{kind}/{digest}")),
            tag,
        },
        request: RequestRecord {
            id: asked.id.to_string(),
            addr: asked.address.map(|address| address.to_string()),
            host: asked.host.as_deref(),
            method: asked.method.as_str(),
            useragent: asked.user_agent.as_deref().unwrap_or_default(),
        },
        actor: ActorRecord { name: event.who.name() },
        source: SourceRecord { addr, instance_id: recorder.instance.to_string() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_minute_and_are_never_the_same_for_all() {
        let second = Duration::from_secs(1);
        assert_eq!(pause(second, 1, u64::MAX), second);
        assert_eq!(pause(second, 1, 0), second / 2);
        assert_eq!(pause(second, 4, u64::MAX), second * 8);
        assert_eq!(pause(second, u32::MAX, u64::MAX), BACKOFF_MAX);
        assert_eq!(pause(BACKOFF_MAX * 2, 5, u64::MAX), BACKOFF_MAX * 2);
    }

    #[test]
    fn an_envelope_holds_events_as_they_are() {
        assert_eq!(envelope(&[b"1".to_vec()]), br#"{"events":[1]}"#);
        assert_eq!(envelope(&[b"1".to_vec(), b"2".to_vec()]), br#"{"events":[1,2]}"#);
    }

    #[test]
    fn an_address_that_is_none_is_not_shown() {
        for url in ["", "ftp://secret.example", "https://", "secret"] {
            let hook = Webhook { name: "ci".to_owned(), url: url.to_owned(), ..Webhook::default() };
            let error = Target::load(&hook).unwrap_err().to_string();
            assert!(error.contains("ci") && !error.contains("secret"), "{error}");
        }
    }
}
