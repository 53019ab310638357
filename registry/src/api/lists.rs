//! Lists: tags, repositories, referrers.

use std::ops::ControlFlow;
use std::sync::Arc;

use axum::response::Response;
use http::HeaderValue;
use http::header::{CONTENT_TYPE, HeaderName, LINK};
use http::request::Parts;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::{Value, json};

use super::error::{ApiError, Code};
use super::route::param;
use super::{Answer, App, blocking, header, json};
use crate::digest::Digest;
use crate::model;
use crate::names::RepoName;
use crate::store::{self, Page, Store};

/// Repositories in one answer, when no number or a greater one is asked for.
const CATALOG_NAMES_MAX: usize = 1000;

/// Descriptors in one list of referrers, bytes; what is left for the rest of a 4 MiB manifest is ample.
const REFERRERS_BYTES_MAX: usize = (4 << 20) - 1024;

const FILTERS_APPLIED: HeaderName = HeaderName::from_static("oci-filters-applied");

pub(super) async fn tags(app: Arc<App>, repo: RepoName, parts: &Parts) -> Answer {
    let (limit, after) = paging(parts)?;
    let path = format!("/v2/{repo}/tags/list");
    let store = Arc::clone(&app.store);
    let name = repo.clone();
    let page = blocking(move || store.tags(&name, after.as_deref(), limit.unwrap_or(usize::MAX))).await?;
    let Some(page) = page else {
        let error = ApiError::not_found(Code::NameUnknown, format!("there is no repository {repo}"));
        return Err(error.detail(json!({"name": repo.as_str()})));
    };
    let body = json!({"name": repo.as_str(), "tags": page.names}).to_string();
    Ok(linked(json(body), &path, &page, limit))
}

pub(super) async fn catalog(app: Arc<App>, parts: &Parts) -> Answer {
    let (limit, after) = paging(parts)?;
    let limit = limit.unwrap_or(CATALOG_NAMES_MAX).min(CATALOG_NAMES_MAX);
    let store = Arc::clone(&app.store);
    let page = blocking(move || store.repositories(after.as_deref(), limit)).await?;
    let body = json!({"repositories": page.names}).to_string();
    Ok(linked(json(body), "/v2/_catalog", &page, Some(limit)))
}

pub(super) async fn referrers(app: Arc<App>, repo: RepoName, subject: Digest, parts: &Parts) -> Answer {
    let wanted = param(parts.uri.query(), "artifactType");
    let after = param(parts.uri.query(), "last").and_then(|last| last.parse::<Digest>().ok());
    let filtered = wanted.is_some();
    let path = format!("/v2/{repo}/referrers/{subject}");
    let store = Arc::clone(&app.store);
    let (listed, next) =
        blocking(move || page_of_referrers(&*store, &repo, &subject, wanted, after.as_ref())).await?;
    let body = json!({"schemaVersion": 2, "mediaType": model::OCI_INDEX, "manifests": listed}).to_string();
    let mut response = json(body);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(model::OCI_INDEX));
    if let Some(query) = next {
        response.headers_mut().insert(LINK, header(format!("<{path}?{query}>; rel=\"next\"")));
    }
    if filtered {
        response.headers_mut().insert(FILTERS_APPLIED, HeaderValue::from_static("artifactType"));
    }
    Ok(response)
}

/// Describes the referrers behind `after`, as many as one answer takes, and makes the query of the next page.
fn page_of_referrers(
    store: &dyn Store,
    repo: &RepoName,
    subject: &Digest,
    wanted: Option<String>,
    after: Option<&Digest>,
) -> Result<(Vec<Value>, Option<String>), store::Error> {
    let (mut listed, mut bytes) = (Vec::new(), 0);
    let mut last: Option<Digest> = None;
    let mut has_more = false;
    store.referrers(repo, subject, after, &mut |manifest| {
        let Some(referrer) = model::referrer(&manifest.digest, &manifest.bytes) else {
            return ControlFlow::Continue(());
        };
        if wanted.is_some() && referrer.artifact_type != wanted {
            return ControlFlow::Continue(());
        }
        let described = json!(referrer);
        bytes += described.to_string().len() + 1;
        if last.is_some() && bytes > REFERRERS_BYTES_MAX {
            has_more = true;
            return ControlFlow::Break(());
        }
        listed.push(described);
        last = Some(manifest.digest.clone());
        ControlFlow::Continue(())
    })?;
    let next = last.filter(|_| has_more).map(|last| {
        let wanted = wanted.map(|wanted| format!("artifactType={}&", encoded(&wanted)));
        format!("{}last={}", wanted.unwrap_or_default(), encoded(last.as_str()))
    });
    Ok((listed, next))
}

/// Reads `n` and `last`.
fn paging(parts: &Parts) -> Result<(Option<usize>, Option<String>), ApiError> {
    let query = parts.uri.query();
    let limit = param(query, "n").map(|n| {
        n.parse().map_err(|_| {
            let message = format!("n is {n:?}; it must be a number of names, 0 or more");
            ApiError::bad_request(Code::PaginationNumberInvalid, message)
        })
    });
    Ok((limit.transpose()?, param(query, "last")))
}

/// Adds the link to the next page, if there is one.
fn linked(mut response: Response, path: &str, page: &Page, limit: Option<usize>) -> Response {
    if let (true, Some(limit), Some(last)) = (page.more, limit, page.names.last()) {
        let last = encoded(last);
        response.headers_mut().insert(LINK, header(format!("<{path}?n={limit}&last={last}>; rel=\"next\"")));
    }
    response
}

fn encoded(text: &str) -> percent_encoding::PercentEncode<'_> {
    utf8_percent_encode(text, NON_ALPHANUMERIC)
}
