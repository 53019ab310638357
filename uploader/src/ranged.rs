//! Parts of an image by PUT with `Content-Range` (RFC 9110, 14.4), answered as resumable upload services do: 308 with the
//! `Range` that has come, until all has.

use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::extract::Request;
use axum::response::Response;
use http::StatusCode;
use http::header::{CONTENT_LENGTH, CONTENT_RANGE, RANGE};
use tokio::time::timeout;

use crate::api::{self, Wanted, broken, concluded, is_left_behind, number, text};
use crate::app::{App, Phase, Taken, new_id};
use crate::body::{Coding, Incoming};
use crate::session::{New, Poured, Seat, Session};
use crate::{answer, tus};

/// What `Content-Range` says of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ContentRange {
    /// `bytes */TOTAL`: how far is it?
    Query(Option<u64>),
    /// `bytes FIRST-LAST/TOTAL`, the total `*` if it is not known yet.
    Part { first: u64, last: u64, total: Option<u64> },
}

impl FromStr for ContentRange {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (range, total) = text.strip_prefix("bytes ").and_then(|rest| rest.split_once('/')).ok_or(())?;
        let number = |text: &str| match text.bytes().all(|b| b.is_ascii_digit()) {
            true => text.parse::<u64>().map_err(drop),
            false => Err(()),
        };
        let total = if total == "*" { None } else { Some(number(total)?) };
        if range == "*" {
            return Ok(Self::Query(total));
        }
        let (first, last) = range.split_once('-').ok_or(())?;
        let (first, last) = (number(first)?, number(last)?);
        match first <= last && last < total.unwrap_or(u64::MAX) {
            true => Ok(Self::Part { first, last, total }),
            false => Err(()),
        }
    }
}

/// Answers a PUT or POST with `Content-Range`.
pub(crate) async fn answer(app: &Arc<App>, request: Request) -> Response {
    let headers = request.headers();
    let Some(range) = text(headers, &CONTENT_RANGE).and_then(|text| text.parse().ok()) else {
        let why = "Content-Range is `bytes FIRST-LAST/TOTAL`, or `bytes */TOTAL` to ask how far an upload is";
        return answer::refused(StatusCode::BAD_REQUEST, why);
    };
    if api::coding(headers) != Some(Coding::Identity) {
        return answer::refused(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "parts with a Content-Range are not coded",
        );
    }
    let wanted = Wanted::of(request.uri());
    match range {
        ContentRange::Query(total) => match find(app, &wanted, total).await {
            Ok(Some(session)) => query(&session, &wanted).await,
            Ok(None) => progress(0),
            Err(taken) => answer::taken(&taken, StatusCode::SERVICE_UNAVAILABLE),
        },
        ContentRange::Part { first, last, total } => {
            let announced = number(headers, &CONTENT_LENGTH);
            if announced.is_some_and(|len| len != last - first + 1) {
                let why = format!("Content-Length is not that of the range {first}-{last}");
                return answer::refused(StatusCode::BAD_REQUEST, why);
            }
            part(app, request, &wanted, (first, last, total)).await
        }
    }
}

/// Tells how far an upload is; of one whose bytes are all there, what became of it.
async fn query(session: &Arc<Session>, wanted: &Wanted) -> Response {
    if session.is_storing() || session.concluded().is_some() {
        return held(session).await;
    }
    if wanted.id.is_some() {
        // The connection that still seems to send is not its client's any more.
        drop(session.take().await);
    } else if session.is_taken() {
        return busy(session);
    }
    session.touch();
    progress(session.offset())
}

async fn part(
    app: &Arc<App>,
    request: Request,
    wanted: &Wanted,
    (first, last, total): (u64, u64, Option<u64>),
) -> Response {
    let session = match find(app, wanted, total).await {
        Ok(Some(session)) => session,
        Ok(None) if first > 0 => return out_of_place(0),
        Ok(None) => match app.begin(new(wanted, total), is_left_behind).await {
            Ok(session) => session,
            Err(taken) => return turned_away(&taken),
        },
        Err(taken) => match taken {
            Taken::Busy(other) if first == 0 && is_left_behind(&other) => {
                match app.begin(new(wanted, total), is_left_behind).await {
                    Ok(session) => session,
                    Err(taken) => return turned_away(&taken),
                }
            }
            taken => return turned_away(&taken),
        },
    };
    if session.is_storing() || session.concluded().is_some() {
        drop(request);
        return held(&session).await;
    }
    let seat = match wanted.id {
        Some(_) => Some(session.take().await),
        None => session.try_take(),
    };
    let Some(seat) = seat else { return busy(&session) };
    session.resumable.store(true, Ordering::Relaxed);
    take(&session, seat, request, (first, last, total)).await
}

/// Takes the bytes of a part.
async fn take(
    session: &Arc<Session>,
    mut seat: Seat<'_>,
    request: Request,
    (first, last, total): (u64, u64, Option<u64>),
) -> Response {
    let mut incoming = Incoming::new(request.into_body(), Coding::Identity);
    let Ok(position) = seat.begin().await else {
        drop((seat, incoming));
        return concluded(session).await;
    };
    if position != first {
        return out_of_place(position);
    }
    if total.is_some_and(|total| !session.set_len(total)) {
        return answer::refused(StatusCode::BAD_REQUEST, "the total is not the one that was told before");
    }
    let Some(end) = last.checked_add(1) else { return out_of_place(position) };
    let poured = seat.pour(&mut incoming, Some(end)).await;
    match poured {
        Poured::All | Poured::Broke(_) | Poured::Displaced if session.is_whole() => {
            seat.finish();
            held(session).await
        }
        Poured::All if session.received() != end => {
            broken(Poured::Broke(format!("{} of {end} bytes are here", session.received())))
        }
        Poured::All => progress(end),
        Poured::Concluded => {
            drop((seat, incoming));
            concluded(session).await
        }
        poured => broken(poured),
    }
}

/// The upload that a request means: by its id if it has one, else the one that runs if that is as long. One that another
/// process of ours began is gone on with.
async fn find(app: &Arc<App>, wanted: &Wanted, total: Option<u64>) -> Result<Option<Arc<Session>>, Taken> {
    let is_meant = |session: &Session| match (&wanted.id, session.len(), total) {
        (Some(id), ..) => session.id == *id,
        (None, Some(len), Some(total)) => len == total,
        _ => true,
    };
    match app.phase() {
        Phase::Running(session) | Phase::Over(session) if is_meant(&session) => {
            session.settle().await;
            Ok(Some(session))
        }
        Phase::Running(session) => Err(Taken::Busy(session)),
        Phase::Over(session) => Err(Taken::Over(session)),
        Phase::Waiting(_) if wanted.id.is_some() => app.resume(new(wanted, total)).await,
        Phase::Waiting(_) => Ok(None),
    }
}

fn new(wanted: &Wanted, total: Option<u64>) -> New {
    let id = wanted.id.clone().unwrap_or_else(new_id);
    New { id, len: total.or(wanted.len), name: wanted.name.clone(), metadata: None, resumable: true }
}

/// Waits for the verdict as long as a proxy does; then the last byte has to be sent again.
async fn held(session: &Session) -> Response {
    match timeout(tus::VERDICT_HOLD, concluded(session)).await {
        Ok(response) => response,
        Err(_) => progress(session.offset()),
    }
}

fn busy(session: &Arc<Session>) -> Response {
    answer::taken(&Taken::Busy(Arc::clone(session)), StatusCode::SERVICE_UNAVAILABLE)
}

fn turned_away(taken: &Taken) -> Response {
    answer::taken(taken, StatusCode::SERVICE_UNAVAILABLE)
}

/// Asks for more.
fn progress(received: u64) -> Response {
    with_range(answer::empty(StatusCode::PERMANENT_REDIRECT), received)
}

/// Refuses a part that is not the next one.
fn out_of_place(received: u64) -> Response {
    let why = format!("the next byte to come is {received}");
    with_range(answer::refused(StatusCode::RANGE_NOT_SATISFIABLE, why), received)
}

fn with_range(response: Response, received: u64) -> Response {
    match received.checked_sub(1) {
        Some(last) => answer::with(response, RANGE, &format!("bytes=0-{last}")),
        None => response,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_content_range_is_a_part_or_a_question() {
        let part = |first, last, total| Ok(ContentRange::Part { first, last, total });
        assert_eq!("bytes 0-9/10".parse(), part(0, 9, Some(10)));
        assert_eq!("bytes 5-9/*".parse(), part(5, 9, None));
        assert_eq!("bytes */10".parse(), Ok(ContentRange::Query(Some(10))));
        assert_eq!("bytes */*".parse(), Ok(ContentRange::Query(None)));
        for bad in
            ["", "bytes 0-9", "bytes 9-0/10", "bytes 0-10/10", "bytes +0-9/10", "items 0-9/10", "bytes -/1"]
        {
            assert_eq!(bad.parse::<ContentRange>(), Err(()), "{bad}");
        }
        let max = u64::MAX;
        assert!(format!("bytes 0-{max}/*").parse::<ContentRange>().is_err());
    }
}
