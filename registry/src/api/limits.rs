//! Keeps one client from asking more often than its share.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use http::HeaderValue;
use http::header::RETRY_AFTER;

use super::error::ApiError;

/// Clients known at a time; those that find no place share one.
const CLIENTS_MAX: usize = 16_384;
/// A client that was quiet may ask at once for what it may ask in so many seconds.
const BURST_SECONDS: u64 = 10;
/// How often the clients that were quiet long enough are forgotten.
const CLEANING_INTERVAL: Duration = Duration::from_secs(1);

/// Where a request comes from; an extension of the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Address(pub(crate) SocketAddr);

/// How often clients may ask.
#[derive(Debug)]
pub(crate) struct Rates {
    begun: Instant,
    /// Time that one request takes of a client's share.
    each: Duration,
    clients: Mutex<Clients>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Client {
    User(Box<str>),
    Address(IpAddr),
}

/// When, since the beginning, each client has its whole share again.
#[derive(Debug, Default)]
struct Clients {
    known: HashMap<Client, Duration>,
    others: Duration,
    cleaned: Duration,
}

impl Rates {
    pub(crate) fn new(per_second: u32) -> Self {
        let each = Duration::from_secs(1) / per_second.max(1);
        Self { begun: Instant::now(), each, clients: Mutex::default() }
    }

    /// Counts a request of a user, or, if there is none, of an address.
    ///
    /// # Errors
    /// 429 with `Retry-After` when the client has asked too often.
    pub(crate) fn check(&self, user: Option<&str>, from: Option<Address>) -> Result<(), ApiError> {
        let client = match (user, from) {
            (Some(user), _) => Client::User(user.into()),
            (None, Some(Address(address))) => Client::Address(network(address.ip())),
            (None, None) => return Ok(()),
        };
        self.take(client, self.begun.elapsed()).map_err(|wait| {
            let seconds = wait.as_secs().saturating_add(1);
            ApiError::too_many("too many requests; ask less often")
                .with(RETRY_AFTER, HeaderValue::from(seconds))
        })
    }

    /// Takes one request off a client's share, or tells how long it has to wait.
    fn take(&self, client: Client, now: Duration) -> Result<(), Duration> {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        let Clients { known, others, cleaned } = &mut *clients;
        if known.len() >= CLIENTS_MAX
            && !known.contains_key(&client)
            && now.saturating_sub(*cleaned) >= CLEANING_INTERVAL
        {
            known.retain(|_, whole| *whole > now);
            *cleaned = now;
        }
        let whole = match known.len() < CLIENTS_MAX || known.contains_key(&client) {
            true => known.entry(client).or_default(),
            false => others,
        };
        let next = (*whole).max(now) + self.each;
        let burst = Duration::from_secs(BURST_SECONDS).max(self.each);
        match (next - now).checked_sub(burst).filter(|wait| !wait.is_zero()) {
            Some(wait) => Err(wait),
            None => {
                *whole = next;
                Ok(())
            }
        }
    }
}

/// What one client has of the address space: of IPv6, a network of 64 bits.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() & !u128::from(u64::MAX))),
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn user(name: &str) -> Client {
        Client::User(name.into())
    }

    #[test]
    fn a_client_may_ask_for_ten_seconds_at_once_and_then_at_the_rate() {
        let rates = Rates::new(5);
        let mut now = SECOND;
        for _ in 0..50 {
            rates.take(user("a"), now).unwrap();
        }
        assert_eq!(rates.take(user("a"), now), Err(SECOND / 5));
        rates.take(user("b"), now).unwrap();
        for _ in 0..20 {
            now += SECOND / 5;
            rates.take(user("a"), now).unwrap();
            rates.take(user("a"), now).unwrap_err();
        }
    }

    #[test]
    fn clients_are_bounded_and_those_that_were_quiet_are_forgotten() {
        let rates = Rates::new(1);
        for n in 0..CLIENTS_MAX {
            rates.take(user(&n.to_string()), SECOND).unwrap();
        }
        for _ in 0..BURST_SECONDS {
            rates.take(user("late"), SECOND).unwrap();
        }
        rates.take(user("later"), SECOND).unwrap_err();
        rates.take(user("0"), SECOND).unwrap();
        rates.take(user("later"), SECOND * 20).unwrap();
        assert_eq!(rates.clients.lock().unwrap().known.len(), 1);
    }

    #[test]
    fn addresses_of_one_network_are_one_client() {
        let same = |a: &str, b: &str| network(a.parse().unwrap()) == network(b.parse().unwrap());
        assert!(same("2001:db8::1", "2001:db8::ffff:0:1"));
        assert!(!same("2001:db8::1", "2001:db8:0:1::1"));
        assert!(same("::ffff:10.0.0.1", "10.0.0.1") && !same("10.0.0.2", "10.0.0.1"));
    }
}
