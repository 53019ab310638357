//! A gate stands in the way of everything that a registry leads to: names, token services, storage.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by a panic")]

mod common;

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::extract::Request;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use dvcr_client::{ClientOptions, ErrorKind, Forbidden, Gate, Network, Repository, Result, digest};
use url::Url;

/// Lets pass what its list names, and remembers what it was asked.
#[derive(Debug, Default)]
struct List {
    hosts: Vec<String>,
    addresses: Vec<IpAddr>,
    asked: Mutex<Vec<String>>,
}

impl Gate for List {
    fn admit_url(&self, url: &Url) -> Result<(), Forbidden> {
        let host = url.host_str().unwrap().to_owned();
        self.asked.lock().unwrap().push(host.clone());
        if self.hosts.contains(&host) { Ok(()) } else { Err(Forbidden(format!("{host} is not on the list"))) }
    }

    fn admit_address(&self, host: &str, address: IpAddr) -> Result<(), Forbidden> {
        self.asked.lock().unwrap().push(format!("{host} {address}"));
        match self.addresses.contains(&address) {
            true => Ok(()),
            false => Err(Forbidden(format!("{address} of {host} is not on the list"))),
        }
    }
}

fn list(hosts: &[&str], addresses: &[&str]) -> Arc<List> {
    let hosts = hosts.iter().map(|host| (*host).to_owned()).collect();
    let addresses = addresses.iter().map(|address| address.parse().unwrap()).collect();
    Arc::new(List { hosts, addresses, ..List::default() })
}

fn open(host: &str, address: SocketAddr, gate: &Arc<List>) -> Repository {
    let network = Network { gate: Some(Arc::clone(gate) as _), ..Network::default() };
    let options = ClientOptions { network, ..ClientOptions::default() };
    Repository::open(&format!("{host}:{}/a", address.port()).parse().unwrap(), &options).unwrap()
}

/// A registry that answers every request alike, and counts them.
async fn registry(
    answer: impl Fn() -> Response + Clone + Send + Sync + 'static,
) -> (SocketAddr, Arc<AtomicUsize>) {
    let count = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&count);
    let router = Router::new().fallback(move |_: Request| {
        counted.fetch_add(1, Ordering::SeqCst);
        let response = answer();
        async move { response }
    });
    (common::serve(router).await, count)
}

async fn blob_size(repository: &Repository) -> Result<Option<u64>> {
    repository.blob_size(&digest::sha256(b"x").unwrap()).await
}

#[tokio::test]
async fn a_host_that_the_gate_does_not_admit_is_not_asked() {
    let (address, count) = registry(|| StatusCode::OK.into_response()).await;
    let gate = list(&[], &[]);
    let error = blob_size(&open("127.0.0.1", address, &gate)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Forbidden);
    assert!(error.to_string().contains("127.0.0.1 is not on the list"), "{error}");
    assert_eq!(count.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn addresses_are_asked_about_once_names_are_resolved() {
    let (address, count) = registry(|| StatusCode::NOT_FOUND.into_response()).await;
    let gate = list(&["localhost"], &[]);
    let error = blob_size(&open("localhost", address, &gate)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Forbidden);
    assert!(error.to_string().contains("of localhost is not on the list"), "{error}");
    assert_eq!(count.load(Ordering::SeqCst), 0, "and nothing is tried again");
    assert_eq!(gate.asked.lock().unwrap().iter().filter(|asked| *asked == "localhost").count(), 1);
    let gate = list(&["localhost"], &["127.0.0.1"]);
    assert_eq!(blob_size(&open("localhost", address, &gate)).await.unwrap(), None);
}

#[tokio::test]
async fn storage_and_token_services_are_asked_about_too() {
    let redirect =
        || (StatusCode::TEMPORARY_REDIRECT, [("location", "http://127.0.0.2:1/blob")]).into_response();
    let challenge = || {
        let bearer = "Bearer realm=\"http://127.0.0.2:1/token\",service=\"r\"";
        (StatusCode::UNAUTHORIZED, [("www-authenticate", bearer)]).into_response()
    };
    let answers: [fn() -> Response; 2] = [redirect, challenge];
    for answer in answers {
        let (address, count) = registry(answer).await;
        let error = blob_size(&open("127.0.0.1", address, &list(&["127.0.0.1"], &[]))).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Forbidden, "{error}");
        assert!(error.to_string().contains("127.0.0.2 is not on the list"), "{error}");
        assert_eq!(count.load(Ordering::SeqCst), 1);
    }
}
