//! Counters in the Prometheus text format: requests, errors and durations by route, bytes, uploads going on.

use std::fmt::{Display, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::cache::{Source, Sources};
use crate::migrate::{Mirror, Seen};
use crate::storage::quota::Usage;
use crate::store::{Kept, Stats};
use crate::tasks::Collected;

/// What a request is about; the label `route`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RouteLabel {
    Base,
    Blob,
    Upload,
    Manifest,
    Tags,
    Referrers,
    Catalog,
    Token,
    /// Those that look whether we live.
    Probe,
    Other,
}

const ROUTES: [(RouteLabel, &str); 10] = [
    (RouteLabel::Base, "base"),
    (RouteLabel::Blob, "blob"),
    (RouteLabel::Upload, "upload"),
    (RouteLabel::Manifest, "manifest"),
    (RouteLabel::Tags, "tags"),
    (RouteLabel::Referrers, "referrers"),
    (RouteLabel::Catalog, "catalog"),
    (RouteLabel::Token, "token"),
    (RouteLabel::Probe, "probe"),
    (RouteLabel::Other, "other"),
];
const METHODS: [&str; 7] = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "other"];
const CLASSES: [&str; 5] = ["1xx", "2xx", "3xx", "4xx", "5xx"];
/// Upper bounds of the duration buckets.
const BUCKETS_MS: [u64; 9] = [1, 3, 10, 30, 100, 300, 1_000, 10_000, 100_000];

/// All counters of one registry.
#[derive(Debug, Default)]
pub(crate) struct Metrics {
    requests: [[[AtomicU64; CLASSES.len()]; METHODS.len()]; ROUTES.len()],
    durations: [Histogram; ROUTES.len()],
    pub(crate) received_bytes: AtomicU64,
    pub(crate) sent_bytes: AtomicU64,
    pub(crate) uploads: AtomicU64,
    unauthorized: AtomicU64,
    denied: AtomicU64,
    pub(crate) rate_limited: AtomicU64,
    collections: AtomicU64,
    failed_collections: AtomicU64,
    freed_bytes: AtomicU64,
    collected_tags: AtomicU64,
    collected_manifests: AtomicU64,
    collected_blobs: AtomicU64,
    collected_uploads: AtomicU64,
    /// When the last collection ended well, seconds since 1970.
    last_collection: AtomicU64,
    /// How long the last one took, well or not, milliseconds.
    last_collection_ms: AtomicU64,
    /// Blobs that were there when the last one had ended well.
    blobs: AtomicU64,
}

#[derive(Debug, Default)]
struct Histogram {
    buckets: [AtomicU64; BUCKETS_MS.len()],
    count: AtomicU64,
    micros: AtomicU64,
}

impl Metrics {
    /// Counts an answered request; the duration ends with the answer's head.
    pub(crate) fn record(&self, route: RouteLabel, method: &str, status: u16, duration: Duration) {
        let method = METHODS.iter().position(|name| *name == method).unwrap_or(METHODS.len() - 1);
        let class = usize::from(status / 100).clamp(1, CLASSES.len()) - 1;
        self.requests[route as usize][method][class].fetch_add(1, Ordering::Relaxed);
        match status {
            401 => drop(self.unauthorized.fetch_add(1, Ordering::Relaxed)),
            403 => drop(self.denied.fetch_add(1, Ordering::Relaxed)),
            _ => {}
        }
        let histogram = &self.durations[route as usize];
        let bucket = BUCKETS_MS.iter().position(|bound| duration <= Duration::from_millis(*bound));
        if let Some(bucket) = bucket {
            histogram.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        }
        histogram.count.fetch_add(1, Ordering::Relaxed);
        let micros = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        histogram.micros.fetch_add(micros, Ordering::Relaxed);
    }

    /// Counts a collection of garbage.
    pub(crate) fn collected(&self, done: &Collected, is_ok: bool) {
        let count = |counter: &AtomicU64, by| counter.fetch_add(by, Ordering::Relaxed);
        count(&self.collections, 1);
        count(&self.failed_collections, u64::from(!is_ok));
        count(&self.freed_bytes, done.freed_bytes);
        count(&self.collected_tags, done.removed_tags);
        count(&self.collected_manifests, done.removed_manifests);
        count(&self.collected_blobs, done.removed_blobs);
        count(&self.collected_uploads, done.removed_uploads);
        // The rest of a float that has no place in an integer is no loss.
        self.last_collection_ms.store((done.seconds * 1000.0) as u64, Ordering::Relaxed);
        if is_ok {
            self.blobs.store(done.blobs.saturating_sub(done.removed_blobs), Ordering::Relaxed);
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
            self.last_collection.store(now, Ordering::Relaxed);
        }
    }

    /// Writes everything as text.
    pub(crate) fn render(&self, stats: &Stats, cache: Option<&Sources>, mirror: Option<&Mirror>) -> String {
        let mut out = String::new();
        // Writing to a string does not fail.
        let _ = self
            .write(&mut out)
            .and_then(|()| write_stats(&mut out, stats))
            .and_then(|()| cache.map_or(Ok(()), |sources| write_cache(&mut out, sources)))
            .and_then(|()| mirror.map_or(Ok(()), |mirror| write_mirror(&mut out, mirror.seen())));
        out
    }

    fn write(&self, out: &mut String) -> std::fmt::Result {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        head(
            out,
            "dvcr_registry_requests_total",
            "counter",
            "Requests answered, by the class of the status.",
        )?;
        for (route, name) in ROUTES {
            for (method, counters) in METHODS.iter().zip(&self.requests[route as usize]) {
                for (class, counter) in CLASSES.iter().zip(counters).filter(|(_, counter)| get(counter) > 0) {
                    writeln!(
                        out,
                        "dvcr_registry_requests_total{{route=\"{name}\",method=\"{method}\",status=\"{class}\"}} {}",
                        get(counter)
                    )?;
                }
            }
        }
        let histogram = "dvcr_registry_request_duration_seconds";
        head(out, histogram, "histogram", "Time to the head of the answer.")?;
        for (route, name) in ROUTES {
            let durations = &self.durations[route as usize];
            if get(&durations.count) == 0 {
                continue;
            }
            let mut sum = 0;
            for (bound, bucket) in BUCKETS_MS.iter().zip(&durations.buckets) {
                sum += get(bucket);
                let le = Duration::from_millis(*bound).as_secs_f64();
                writeln!(out, "{histogram}_bucket{{route=\"{name}\",le=\"{le}\"}} {sum}")?;
            }
            let count = get(&durations.count).max(sum);
            writeln!(out, "{histogram}_bucket{{route=\"{name}\",le=\"+Inf\"}} {count}")?;
            let seconds = Duration::from_micros(get(&durations.micros)).as_secs_f64();
            writeln!(out, "{histogram}_sum{{route=\"{name}\"}} {seconds}")?;
            writeln!(out, "{histogram}_count{{route=\"{name}\"}} {count}")?;
        }
        for (name, kind, help, counter) in [
            ("received_bytes_total", "counter", "Bytes of content received.", &self.received_bytes),
            ("sent_bytes_total", "counter", "Bytes of content sent.", &self.sent_bytes),
            ("uploads_in_progress", "gauge", "Requests that bring content just now.", &self.uploads),
            ("unauthorized_total", "counter", "Requests without valid credentials.", &self.unauthorized),
            ("denied_total", "counter", "Requests of known callers without the right.", &self.denied),
            (
                "rate_limited_total",
                "counter",
                "Requests of clients that asked too often.",
                &self.rate_limited,
            ),
            ("gc_runs_total", "counter", "Collections of garbage.", &self.collections),
            (
                "gc_failures_total",
                "counter",
                "Collections that were stopped or failed.",
                &self.failed_collections,
            ),
            ("gc_freed_bytes_total", "counter", "Bytes that collections freed.", &self.freed_bytes),
            ("gc_removed_tags_total", "counter", "Tags that collections removed.", &self.collected_tags),
            (
                "gc_removed_manifests_total",
                "counter",
                "Manifests that collections removed.",
                &self.collected_manifests,
            ),
            ("gc_removed_blobs_total", "counter", "Blobs that collections removed.", &self.collected_blobs),
            (
                "gc_removed_uploads_total",
                "counter",
                "Unfinished uploads that collections removed.",
                &self.collected_uploads,
            ),
            (
                "gc_last_success_timestamp_seconds",
                "gauge",
                "When the last collection ended well; 0 for none since the start.",
                &self.last_collection,
            ),
            (
                "blobs",
                "gauge",
                "Blobs there when the last collection had ended well; 0 for none since the start.",
                &self.blobs,
            ),
        ] {
            single(out, name, kind, help, get(counter))?;
        }
        let seconds = Duration::from_millis(get(&self.last_collection_ms)).as_secs_f64();
        single(out, "gc_last_duration_seconds", "gauge", "How long the last collection took.", seconds)
    }
}

fn write_stats(out: &mut String, stats: &Stats) -> std::fmt::Result {
    for (name, kind, help, value) in [
        ("scrub_blobs_total", "counter", "Blobs read to find damage.", Some(stats.scrubbed_blobs)),
        ("scrub_bytes_total", "counter", "Bytes read to find damage.", Some(stats.scrubbed_bytes)),
        ("scrub_damaged_blobs_total", "counter", "Blobs found damaged.", Some(stats.damaged_blobs)),
        (
            "scrub_last_pass_timestamp_seconds",
            "gauge",
            "When all blobs had been read; 0 for never since the start.",
            Some(stats.scrub_finished),
        ),
        (
            "quarantined_blobs",
            "gauge",
            "Damaged blobs that nobody has pushed again.",
            Some(stats.quarantined_blobs),
        ),
        ("volume_bytes", "gauge", "Size of the volume.", stats.volume_bytes),
        ("free_bytes", "gauge", "Free on the volume, the reserve included.", stats.free_bytes),
        ("reserved_bytes", "gauge", "Free bytes that uploads leave.", Some(stats.reserved_bytes)),
    ] {
        if let Some(value) = value {
            single(out, name, kind, help, value)?;
        }
    }
    if let Some(Kept { hits, misses, bytes }) = &stats.kept {
        for (name, kind, help, value) in [
            (
                "read_cache_hits_total",
                "counter",
                "Pulls of blobs that were read from this replica's disk.",
                hits,
            ),
            ("read_cache_misses_total", "counter", "Pulls of blobs that were read from the bucket.", misses),
            ("read_cache_bytes", "gauge", "Bytes of the blobs that are kept on this replica's disk.", bytes),
        ] {
            single(out, name, kind, help, *value)?;
        }
    }
    if stats.quotas.is_empty() {
        return Ok(());
    }
    head(out, "dvcr_registry_quota_limit_bytes", "gauge", "What the repositories below a prefix may have.")?;
    for Usage { prefix, limit, .. } in &stats.quotas {
        writeln!(out, "dvcr_registry_quota_limit_bytes{{prefix=\"{prefix}\"}} {limit}")?;
    }
    head(out, "dvcr_registry_quota_used_bytes", "gauge", "What the repositories below a prefix have.")?;
    for Usage { prefix, used, .. } in &stats.quotas {
        if let Some(used) = used {
            writeln!(out, "dvcr_registry_quota_used_bytes{{prefix=\"{prefix}\"}} {used}")?;
        }
    }
    Ok(())
}

fn write_mirror(out: &mut String, seen: Seen) -> std::fmt::Result {
    let Seen { lag_seconds, pending, complete_seconds, blobs, bytes, failures, damaged } = seen;
    let lag = "How long the oldest change waits that the mirror lacks; 0 if it lacks none.";
    single(out, "mirror_lag_seconds", "gauge", lag, lag_seconds)?;
    let pending_help = "Changes that are not in the mirror yet.";
    single(out, "mirror_pending_changes", "gauge", pending_help, pending)?;
    if let Some(seconds) = complete_seconds {
        let complete = "Since all was last compared with the mirror.";
        single(out, "mirror_compared_seconds", "gauge", complete, seconds)?;
    }
    for (name, kind, help, value) in [
        ("mirror_blobs_total", "counter", "Blobs copied to the mirror.", blobs),
        ("mirror_bytes_total", "counter", "Bytes of blobs copied to the mirror.", bytes),
        ("mirror_failures_total", "counter", "Attempts to copy to the mirror that failed.", failures),
        ("mirror_damaged_blobs", "gauge", "Damaged blobs that the mirror lacks.", damaged),
    ] {
        single(out, name, kind, help, value)?;
    }
    Ok(())
}

/// Writes a metric that has one value.
fn single(out: &mut String, name: &str, kind: &str, help: &str, value: impl Display) -> std::fmt::Result {
    let name = format!("dvcr_registry_{name}");
    head(out, &name, kind, help)?;
    writeln!(out, "{name} {value}")
}

fn write_cache(out: &mut String, sources: &Sources) -> std::fmt::Result {
    type Value = fn(&Source) -> u64;
    fn get(counter: &AtomicU64) -> u64 {
        counter.load(Ordering::Relaxed)
    }
    let metrics: [(&str, &str, &str, Value); 8] = [
        ("hits_total", "counter", "Requests answered from what is stored.", |of| get(&of.counters.hits)),
        ("misses_total", "counter", "Requests that needed the upstream.", |of| get(&of.counters.misses)),
        ("stale_total", "counter", "Questions about tags the upstream gave no answer to.", |of| {
            get(&of.counters.stale)
        }),
        ("failures_total", "counter", "Requests to the upstream that failed.", |of| {
            get(&of.counters.failures)
        }),
        ("fetched_bytes_total", "counter", "Bytes of content that came from the upstream.", |of| {
            get(&of.counters.fetched_bytes)
        }),
        ("evicted_bytes_total", "counter", "Bytes taken out that were not used for longest.", |of| {
            get(&of.counters.evicted_bytes)
        }),
        ("fetches_in_progress", "gauge", "Blobs that are being fetched.", |of| get(&of.counters.in_flight)),
        ("stored_bytes", "gauge", "Bytes that are stored, as far as is known.", Source::stored_bytes),
    ];
    for (name, kind, help, value) in metrics {
        let name = format!("dvcr_registry_cache_{name}");
        head(out, &name, kind, help)?;
        for source in sources.all() {
            writeln!(out, "{name}{{prefix=\"{}\"}} {}", source.prefix(), value(source))?;
        }
    }
    Ok(())
}

pub(crate) fn head(out: &mut String, name: &str, kind: &str, help: &str) -> std::fmt::Result {
    writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routes_are_indexed_by_their_own_number() {
        for (at, (route, _)) in ROUTES.iter().enumerate() {
            assert_eq!(*route as usize, at);
        }
    }

    #[test]
    fn buckets_are_cumulative() {
        let metrics = Metrics::default();
        for ms in [0, 2, 2, 1_000_000] {
            metrics.record(RouteLabel::Blob, "GET", 200, Duration::from_millis(ms));
        }
        let text = metrics.render(&Stats::default(), None, None);
        assert!(text.contains("requests_total{route=\"blob\",method=\"GET\",status=\"2xx\"} 4\n"), "{text}");
        assert!(text.contains("_bucket{route=\"blob\",le=\"0.001\"} 1\n"), "{text}");
        assert!(text.contains("_bucket{route=\"blob\",le=\"100\"} 3\n"), "{text}");
        assert!(text.contains("_bucket{route=\"blob\",le=\"+Inf\"} 4\n"), "{text}");
    }
}
