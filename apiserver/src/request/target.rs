//! The path of a request: the API's own pages, or a resource.

use std::fmt;

use percent_encoding::percent_decode_str;

use crate::status::{Reason, Result, Status};

/// Longest path, bytes, and most segments of it that are looked at.
const PATH_BYTES_MAX: usize = 4096;
const SEGMENTS_MAX: usize = 16;

/// What RBAC calls what is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verb {
    Get,
    List,
    Watch,
    Create,
    Update,
    Patch,
    Delete,
    DeleteCollection,
}

impl Verb {
    /// Its name in rules and messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Get => "get",
            Self::List => "list",
            Self::Watch => "watch",
            Self::Create => "create",
            Self::Update => "update",
            Self::Patch => "patch",
            Self::Delete => "delete",
            Self::DeleteCollection => "deletecollection",
        }
    }
}

impl fmt::Display for Verb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A resource, or one object of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Where {
    /// Empty for the core group.
    pub group: String,
    pub version: String,
    /// Empty for resources of the cluster, and for all namespaces together.
    pub namespace: String,
    /// By its plural name.
    pub resource: String,
    /// Empty for all of them.
    pub name: String,
    /// Segments behind the name joined by `/`; empty for the object itself.
    pub subresource: String,
}

impl Where {
    /// `resource.group`, as messages have it.
    pub fn qualified(&self) -> String {
        match self.group.as_str() {
            "" => self.resource.clone(),
            group => format!("{}.{group}", self.resource),
        }
    }

    /// The verb of an HTTP method; a GET of all objects is a list or a watch.
    ///
    /// # Errors
    /// [`Reason::MethodNotAllowed`] for methods that no resource knows.
    pub fn verb(&self, method: &str, watches: bool) -> Result<Verb> {
        match (method, self.name.is_empty()) {
            ("GET" | "HEAD", true) if watches => Ok(Verb::Watch),
            ("GET" | "HEAD", true) => Ok(Verb::List),
            ("GET" | "HEAD", false) => Ok(Verb::Get),
            ("POST", _) => Ok(Verb::Create),
            ("PUT", false) => Ok(Verb::Update),
            ("PATCH", false) => Ok(Verb::Patch),
            ("DELETE", true) => Ok(Verb::DeleteCollection),
            ("DELETE", false) => Ok(Verb::Delete),
            _ => Err(Status::new(
                Reason::MethodNotAllowed,
                "the server does not allow this method on the requested resource",
            )),
        }
    }
}

/// What a path leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    Resource(Box<Where>),
    /// `/api` or `/apis`.
    Groups {
        legacy: bool,
    },
    /// `/apis/GROUP`.
    Group(String),
    /// `/api/v1` or `/apis/GROUP/VERSION`.
    Resources {
        group: String,
        version: String,
    },
    /// Anything else, such as `/version`, with its path.
    Page(String),
}

/// Takes a path apart (Kubernetes API concepts, "Resource URIs").
///
/// # Errors
/// [`Reason::BadRequest`] for a path that is too long, or has a segment that could be none of ours.
pub fn target(path: &str) -> Result<Target> {
    if path.len() > PATH_BYTES_MAX {
        let text = format!("the path has {} bytes, at most {PATH_BYTES_MAX} are read", path.len());
        return Err(Status::bad_request(text));
    }
    let mut segments = Vec::new();
    for segment in path.split('/').filter(|segment| !segment.is_empty()) {
        if segments.len() == SEGMENTS_MAX {
            return Err(Status::bad_request(format!("the path has more than {SEGMENTS_MAX} segments")));
        }
        segments.push(decoded(segment)?);
    }
    let segments: Vec<&str> = segments.iter().map(String::as_str).collect();
    Ok(match *segments.as_slice() {
        ["api"] => Target::Groups { legacy: true },
        ["apis"] => Target::Groups { legacy: false },
        ["apis", group] => Target::Group(group.to_owned()),
        ["api", version] => Target::Resources { group: String::new(), version: version.to_owned() },
        ["apis", group, version] => {
            Target::Resources { group: group.to_owned(), version: version.to_owned() }
        }
        ["api", version, ref rest @ ..] => Target::Resource(Box::new(resource("", version, rest))),
        ["apis", group, version, ref rest @ ..] => Target::Resource(Box::new(resource(group, version, rest))),
        _ => Target::Page(format!("/{}", segments.join("/"))),
    })
}

/// A segment without its escapes. What could lead out of its place is refused.
fn decoded(segment: &str) -> Result<String> {
    let text = percent_decode_str(segment).decode_utf8();
    let text = text.map_err(|_| Status::bad_request("the path is not UTF-8"))?;
    let is_odd = |c: char| c == '/' || c == '%' || c.is_control();
    if text == "." || text == ".." || text.contains(is_odd) {
        return Err(Status::bad_request(format!("the path has the segment {text:?}, which names nothing")));
    }
    Ok(text.into_owned())
}

fn resource(group: &str, version: &str, rest: &[&str]) -> Where {
    let of = |namespace: &str, rest: &[&str]| Where {
        group: group.to_owned(),
        version: version.to_owned(),
        namespace: namespace.to_owned(),
        resource: rest.first().copied().unwrap_or_default().to_owned(),
        name: rest.get(1).copied().unwrap_or_default().to_owned(),
        subresource: rest.get(2..).unwrap_or_default().join("/"),
    };
    match *rest {
        // A namespace is an object as well, and lies in itself.
        ["namespaces", name, "status" | "finalize"] | ["namespaces", name] => of(name, rest),
        ["namespaces", name, ref rest @ ..] => of(name, rest),
        _ => of("", rest),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(path: &str) -> Where {
        match target(path).unwrap() {
            Target::Resource(place) => *place,
            other => panic!("{path}: {other:?}"),
        }
    }

    fn parts(place: &Where) -> [&str; 6] {
        [&place.group, &place.version, &place.namespace, &place.resource, &place.name, &place.subresource]
    }

    #[test]
    fn a_path_names_a_resource_an_object_or_a_part_of_it() {
        for (path, expected) in [
            ("/api/v1/pods", ["", "v1", "", "pods", "", ""]),
            ("/api/v1/namespaces/d/pods", ["", "v1", "d", "pods", "", ""]),
            ("/api/v1/namespaces/d/pods/p/log", ["", "v1", "d", "pods", "p", "log"]),
            ("/api/v1/namespaces", ["", "v1", "", "namespaces", "", ""]),
            ("/api/v1/namespaces/d", ["", "v1", "d", "namespaces", "d", ""]),
            ("/api/v1/namespaces/d/finalize", ["", "v1", "d", "namespaces", "d", "finalize"]),
            ("/apis/g.io/v1/things/t/status", ["g.io", "v1", "", "things", "t", "status"]),
            ("/apis/g.io/v1/namespaces/d/things/", ["g.io", "v1", "d", "things", "", ""]),
            ("/apis/g.io/v1/namespaces/d/things/t/a/b", ["g.io", "v1", "d", "things", "t", "a/b"]),
            ("/apis/g.io/v1/things/a%3Ab", ["g.io", "v1", "", "things", "a:b", ""]),
        ] {
            assert_eq!(parts(&place(path)), expected, "{path}");
        }
    }

    #[test]
    fn other_paths_are_pages_of_the_api() {
        assert_eq!(target("/api").unwrap(), Target::Groups { legacy: true });
        assert_eq!(target("/apis/").unwrap(), Target::Groups { legacy: false });
        assert_eq!(target("/apis/g.io").unwrap(), Target::Group("g.io".into()));
        let resources = Target::Resources { group: "g.io".into(), version: "v1".into() };
        assert_eq!(target("/apis/g.io/v1").unwrap(), resources);
        assert_eq!(target("/openapi//v3/").unwrap(), Target::Page("/openapi/v3".into()));
        assert_eq!(target("/").unwrap(), Target::Page("/".into()));
    }

    #[test]
    fn a_path_that_leads_elsewhere_is_refused() {
        let long = format!("/{}", "a".repeat(PATH_BYTES_MAX));
        let deep = "/a".repeat(SEGMENTS_MAX + 1);
        for path in [
            "/api/v1/namespaces/..",
            "/api/v1/pods/%2e%2e",
            "/api/v1/pods/a%2Fb",
            "/api/v1/pods/%25",
            "/api/v1/pods/a%00",
            "/api/v1/pods/%ff",
            &long,
            &deep,
        ] {
            assert_eq!(target(path).unwrap_err().reason, Reason::BadRequest, "{path}");
        }
    }

    #[test]
    fn a_method_is_a_verb() {
        let (all, one) = (place("/api/v1/pods"), place("/api/v1/namespaces/d/pods/p"));
        for (place, method, watches, verb) in [
            (&all, "GET", false, Verb::List),
            (&all, "GET", true, Verb::Watch),
            (&one, "GET", true, Verb::Get),
            (&all, "POST", false, Verb::Create),
            (&one, "POST", false, Verb::Create),
            (&one, "PUT", false, Verb::Update),
            (&one, "PATCH", false, Verb::Patch),
            (&one, "DELETE", false, Verb::Delete),
            (&all, "DELETE", false, Verb::DeleteCollection),
        ] {
            assert_eq!(place.verb(method, watches).unwrap(), verb, "{method}");
        }
        for (place, method) in [(&all, "PUT"), (&all, "PATCH"), (&one, "TRACE")] {
            assert_eq!(place.verb(method, false).unwrap_err().reason, Reason::MethodNotAllowed);
        }
    }
}
