//! Metrics of one transfer, in the text format of Prometheus, over TLS with a certificate that is made at the start.
//!
//! Whoever scrapes knows the address from the pod, and has nothing to check a certificate by.

use std::fmt::Write;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use axum::routing::get;
use dvcr_converter::progress::Progress;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

/// Connections served at a time; more wait.
const CONNECTIONS_MAX: usize = 16;
/// Longest time a connection may take from its first byte to the last.
const CONNECTION_TIME_MAX: Duration = Duration::from_secs(10);
/// How often the current speed is taken.
const SAMPLE_INTERVAL: Duration = Duration::from_secs(1);

/// The names that the reference's dashboards ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// A transfer into a registry: `registry_progress`, `registry_average_speed`, `registry_current_speed`.
    Registry,
    /// A transfer onto a volume: `kubevirt_cdi_import_progress_total`.
    Volume,
}

/// What is told of one transfer.
#[derive(Debug)]
pub struct Metrics {
    family: Family,
    owner_uid: String,
    transfer: Mutex<Transfer>,
    sample: Mutex<Sample>,
    /// The largest share of a volume that was told, thousandths: one that is begun anew does not go back.
    told: AtomicU64,
}

#[derive(Clone, Debug)]
struct Transfer {
    progress: Arc<Progress>,
    begun: Instant,
}

#[derive(Debug)]
struct Sample {
    at: Instant,
    bytes: u64,
    /// Bytes per second in the last interval.
    speed: f64,
}

impl Metrics {
    /// Begins to count the time of a transfer for the object `owner_uid`.
    pub fn new(family: Family, owner_uid: &str, progress: Arc<Progress>) -> Arc<Self> {
        let begun = Instant::now();
        let sample = Mutex::new(Sample { at: begun, bytes: 0, speed: 0.0 });
        let (owner_uid, transfer) = (owner_uid.to_owned(), Mutex::new(Transfer { progress, begun }));
        Arc::new(Self { family, owner_uid, transfer, sample, told: AtomicU64::new(0) })
    }

    /// Tells of another transfer from now on: one that begins now, and whose time counts from now.
    pub fn follow(&self, progress: Arc<Progress>) {
        *self.transfer.lock().unwrap_or_else(|e| e.into_inner()) =
            Transfer { progress, begun: Instant::now() };
    }

    fn transfer(&self) -> Transfer {
        self.transfer.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }

    fn progress(&self) -> Arc<Progress> {
        self.transfer().progress
    }

    /// Bytes that were transferred here: what an earlier worker had brought does not count.
    fn bytes(&self) -> u64 {
        let progress = self.progress();
        progress.done().saturating_sub(progress.skipped())
    }

    /// Bytes per second since the beginning.
    pub fn average_speed(&self) -> f64 {
        self.bytes() as f64 / self.elapsed().as_secs_f64().max(1e-9)
    }

    /// Time since the beginning.
    pub fn elapsed(&self) -> Duration {
        self.transfer().begun.elapsed()
    }

    /// The share that is done, percent; below 100 until the transfer has ended, 0 while its size is unknown.
    fn percent(&self) -> f64 {
        let progress = self.progress();
        let (done, total) = (progress.done(), progress.total());
        match total {
            0 => 0.0,
            _ => (100.0 * done.min(total) as f64 / total as f64).min(99.9),
        }
    }

    fn never_less(&self, percent: f64) -> f64 {
        let share = (percent * 1000.0) as u64;
        self.told.fetch_max(share, Ordering::Relaxed).max(share) as f64 / 1000.0
    }

    fn take_sample(&self, now: Instant) {
        let bytes = self.bytes();
        let mut sample = self.sample.lock().unwrap_or_else(|e| e.into_inner());
        let seconds = now.saturating_duration_since(sample.at).as_secs_f64().max(1e-9);
        let speed = bytes.saturating_sub(sample.bytes) as f64 / seconds;
        *sample = Sample { at: now, bytes, speed };
    }

    /// The metrics as text.
    pub fn render(&self) -> String {
        let speed = self.sample.lock().unwrap_or_else(|e| e.into_inner()).speed;
        let (progress, percent) = (self.progress(), self.percent());
        let mut text = String::new();
        let mut gauge = |name: &str, help: &str, labels: &str, value: f64| {
            let owner = escaped(&self.owner_uid);
            // Writing to a String cannot fail.
            let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} gauge");
            let _ = writeln!(text, "{name}{{ownerUID=\"{owner}\"{labels}}} {value}");
        };
        match self.family {
            Family::Registry => {
                gauge("registry_progress", "Share of the transfer that is done, percent", "", percent);
                let average = self.average_speed();
                gauge("registry_average_speed", "Bytes per second since the beginning", "", average);
                gauge("registry_current_speed", "Bytes per second in the last second", "", speed);
            }
            Family::Volume => {
                let help = "Share of the disk that is written, percent";
                gauge("kubevirt_cdi_import_progress_total", help, "", self.never_less(percent));
            }
        }
        gauge("dvcr_worker_done_bytes", "Bytes done", "", progress.done() as f64);
        gauge("dvcr_worker_total_bytes", "Bytes in all; 0 while unknown", "", progress.total() as f64);
        let help = "Bytes that an earlier worker had brought";
        gauge("dvcr_worker_resumed_bytes", help, "", progress.skipped() as f64);
        let phase = format!(",phase=\"{}\"", escaped(progress.phase()));
        gauge("dvcr_worker_phase", "1 for the phase the transfer is in", &phase, 1.0);
        text
    }
}

/// A label's value as the text format has it.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// A server of metrics; it ends when this is dropped.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    /// Ends its tasks with itself.
    _tasks: JoinSet<()>,
}

impl Server {
    /// Serves `metrics` at `address` by HTTPS, under `/metrics`.
    ///
    /// # Errors
    /// When the address cannot be had, or no certificate can be made.
    pub async fn start(address: SocketAddr, metrics: Arc<Metrics>) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        let acceptor = self_signed()?;
        let answer = async |State(metrics): State<Arc<Metrics>>| {
            ([(CONTENT_TYPE, "text/plain; version=0.0.4")], metrics.render()).into_response()
        };
        let routes = Router::new().route("/metrics", get(answer)).with_state(metrics.clone());
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut ticks = tokio::time::interval(SAMPLE_INTERVAL);
            loop {
                let now = ticks.tick().await;
                metrics.take_sample(now.into_std());
            }
        });
        tasks.spawn(async move {
            let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
            // Its tasks end with it.
            let mut connections = JoinSet::new();
            loop {
                while connections.try_join_next().is_some() {}
                let Ok(place) = places.clone().acquire_owned().await else { return };
                let Ok((socket, _)) = listener.accept().await else {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                };
                let (acceptor, routes) = (acceptor.clone(), routes.clone());
                connections.spawn(async move {
                    let _place = place;
                    if let Ok(Err(error)) =
                        timeout(CONNECTION_TIME_MAX, connection(acceptor, socket, routes)).await
                    {
                        tracing::debug!(%error, "a connection to the metrics failed");
                    }
                });
            }
        });
        Ok(Self { address, _tasks: tasks })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

async fn connection(acceptor: TlsAcceptor, socket: TcpStream, routes: Router) -> io::Result<()> {
    let stream = acceptor.accept(socket).await?;
    let service = TowerToHyperService::new(routes);
    let serving = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    serving.await.map_err(io::Error::other)
}

/// Makes a certificate that proves nothing, for a connection that is encrypted all the same.
fn self_signed() -> io::Result<TlsAcceptor> {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).map_err(io::Error::other)?;
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()));
    let config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .map_err(io::Error::other)?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn half_done(family: Family) -> Arc<Metrics> {
        let progress = Arc::new(Progress::default());
        progress.set_phase("transfer");
        progress.set_total(1000);
        progress.skip_to(300);
        progress.reach(500);
        Metrics::new(family, "a\"b\\c", progress)
    }

    #[test]
    fn a_transfer_is_told_by_the_names_that_dashboards_know() {
        let text = half_done(Family::Registry).render();
        for line in [
            r#"registry_progress{ownerUID="a\"b\\c"} 50"#,
            r#"registry_current_speed{ownerUID="a\"b\\c"} 0"#,
            r#"dvcr_worker_done_bytes{ownerUID="a\"b\\c"} 500"#,
            r#"dvcr_worker_resumed_bytes{ownerUID="a\"b\\c"} 300"#,
            r#"dvcr_worker_phase{ownerUID="a\"b\\c",phase="transfer"} 1"#,
        ] {
            assert!(text.lines().any(|found| found == line), "{line}: {text}");
        }
        assert!(text.contains("registry_average_speed{") && !text.contains("kubevirt"));
        let text = half_done(Family::Volume).render();
        assert!(text.contains("kubevirt_cdi_import_progress_total{") && !text.contains("registry_"));
    }

    #[test]
    fn the_current_speed_leaves_out_what_an_earlier_worker_brought() {
        let metrics = half_done(Family::Registry);
        metrics.take_sample(metrics.transfer().begun + Duration::from_secs(2));
        assert!(metrics.render().contains("registry_current_speed{ownerUID=\"a\\\"b\\\\c\"} 100\n"));
        metrics.take_sample(metrics.transfer().begun + Duration::from_secs(3));
        assert!(metrics.render().contains("registry_current_speed{ownerUID=\"a\\\"b\\\\c\"} 0\n"));
    }

    #[test]
    fn all_is_not_told_before_the_end() {
        let metrics = half_done(Family::Registry);
        metrics.progress().reach(1000);
        assert!(metrics.render().contains("registry_progress{ownerUID=\"a\\\"b\\\\c\"} 99.9\n"));
    }

    #[test]
    fn a_volume_that_is_begun_anew_does_not_go_back() {
        let metrics = half_done(Family::Volume);
        let share = |metrics: &Metrics| {
            let text = metrics.render();
            let line = text.lines().find(|line| line.starts_with("kubevirt_cdi_import_progress_total{"));
            line.unwrap().rsplit_once(' ').unwrap().1.to_owned()
        };
        assert_eq!(share(&metrics), "50");
        metrics.progress().restart();
        assert_eq!(share(&metrics), "50");
        metrics.progress().set_total(1000);
        metrics.progress().reach(625);
        assert_eq!(share(&metrics), "62.5");
    }

    #[tokio::test]
    async fn metrics_are_served_by_https_and_nothing_else_is() {
        let metrics = half_done(Family::Registry);
        let server = Server::start(([127, 0, 0, 1], 0).into(), metrics).await.unwrap();
        let client = reqwest::Client::builder().tls_danger_accept_invalid_certs(true).build().unwrap();
        let url = format!("https://{}", server.address());
        let answer = client.get(format!("{url}/metrics")).send().await.unwrap();
        assert_eq!(answer.status(), 200);
        assert!(answer.text().await.unwrap().contains("registry_progress"));
        assert_eq!(client.get(&url).send().await.unwrap().status(), 404);
        assert!(reqwest::get(format!("http://{}/metrics", server.address())).await.is_err());
    }
}
