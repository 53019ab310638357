//! What an answer is written as: the `Accept` header against what is offered.
//!
//! Offered are JSON and YAML, and JSON alone for the events of a watch. Protobuf is not: clients that name it
//! first name JSON too.
//!
//! Source: RFC 9110, section 12.5.1, and the parameters `as`, `g` and `v` of
//! <https://kubernetes.io/docs/reference/using-api/api-concepts/#alternate-representations-of-resources>.

use crate::status::{Reason, Result, Status};

/// The longest `Accept` header that is read. Longer ones are 406.
pub const ACCEPT_BYTES_MAX: usize = 8 << 10;

/// How an answer is encoded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MediaType {
    #[default]
    Json,
    Yaml,
}

impl MediaType {
    /// The value of `Content-Type`.
    pub fn text(self) -> &'static str {
        match self {
            Self::Json => "application/json",
            Self::Yaml => "application/yaml",
        }
    }
}

/// A kind that an answer can be transformed into, instead of what was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    pub group: &'static str,
    pub version: &'static str,
    pub kind: &'static str,
}

/// What objects and lists of them can be transformed into.
pub const OBJECT_TARGETS: &[Target] = &[
    Target { group: "meta.k8s.io", version: "v1", kind: "Table" },
    Target { group: "meta.k8s.io", version: "v1", kind: "PartialObjectMetadata" },
    Target { group: "meta.k8s.io", version: "v1", kind: "PartialObjectMetadataList" },
    Target { group: "meta.k8s.io", version: "v1beta1", kind: "Table" },
    Target { group: "meta.k8s.io", version: "v1beta1", kind: "PartialObjectMetadata" },
    Target { group: "meta.k8s.io", version: "v1beta1", kind: "PartialObjectMetadataList" },
];

/// What the documents of discovery can be transformed into.
pub const DISCOVERY_TARGETS: &[Target] = &[
    Target { group: "apidiscovery.k8s.io", version: "v2", kind: "APIGroupDiscoveryList" },
    Target { group: "apidiscovery.k8s.io", version: "v2beta1", kind: "APIGroupDiscoveryList" },
];

/// What an answer is written as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Accepted {
    pub media_type: MediaType,
    pub target: Option<Target>,
    /// With line breaks and indentation.
    pub is_pretty: bool,
}

/// Chooses what an answer is written as: of what the header names the most preferred that is offered, and
/// before it what is named in full. Without a header it is JSON.
///
/// # Errors
///
/// NotAcceptable if nothing is offered that the header names.
pub fn negotiate(accept: &str, targets: &[Target], is_watch: bool) -> Result<Accepted> {
    if accept.is_empty() {
        return Ok(Accepted::default());
    }
    let offered: &[MediaType] =
        if is_watch { &[MediaType::Json] } else { &[MediaType::Json, MediaType::Yaml] };
    let mut clauses: Vec<Clause<'_>> = match accept.len() {
        0..=ACCEPT_BYTES_MAX => accept.split(',').filter_map(Clause::read).collect(),
        _ => Vec::new(),
    };
    clauses.sort_by_key(|clause| (std::cmp::Reverse(clause.quality), clause.wildcards()));
    let accepted =
        clauses.iter().find_map(|clause| offered.iter().find_map(|&offer| clause.accept(offer, targets)));
    accepted.ok_or_else(|| {
        let suffix = if is_watch { ";stream=watch" } else { "" };
        let offered: Vec<_> = offered.iter().map(|offer| format!("{}{suffix}", offer.text())).collect();
        let message = format!("only the following media types are accepted: {}", offered.join(", "));
        Status::new(Reason::NotAcceptable, message)
    })
}

/// One of the header's media ranges.
struct Clause<'a> {
    main: &'a str,
    sub: &'a str,
    /// In thousandths.
    quality: u16,
    parameters: &'a str,
}

impl<'a> Clause<'a> {
    /// `None` for what is no media range, and for what is not wanted (`q=0`).
    fn read(text: &'a str) -> Option<Self> {
        let (range, parameters) = text.split_once(';').unwrap_or((text, ""));
        let (main, sub) = match range.split_once('/') {
            Some((main, sub)) => (main.trim(), sub.trim()),
            None if range.trim() == "*" => ("*", "*"),
            None => return None,
        };
        let mut clause = Self { main, sub, quality: 1000, parameters };
        if let Some((_, quality)) = clause.parameters().find(|(key, _)| *key == "q") {
            clause.quality = thousandths(quality);
        }
        (clause.quality > 0).then_some(clause)
    }

    fn parameters(&self) -> impl Iterator<Item = (&'a str, &'a str)> + use<'a> {
        self.parameters
            .split(';')
            .filter_map(|parameter| parameter.split_once('='))
            .map(|(key, value)| (key.trim(), value.trim()))
    }

    fn wildcards(&self) -> usize {
        usize::from(self.main == "*") + usize::from(self.sub == "*")
    }

    /// How this clause takes an offer, if it does.
    fn accept(&self, offer: MediaType, targets: &[Target]) -> Option<Accepted> {
        let (main, sub) = offer.text().split_once('/')?;
        let is_named = (self.main == main && (self.sub == sub || self.sub == "*"))
            || (self.main == "*" && self.sub == "*");
        if !is_named {
            return None;
        }
        let (mut group, mut version, mut kind) = (None, None, None);
        let mut is_pretty = false;
        for (key, value) in self.parameters() {
            match key {
                "as" => kind = Some(value),
                "g" => group = Some(value),
                "v" => version = Some(value),
                "pretty" => is_pretty = value == "1",
                "stream" if !value.is_empty() && (value != "watch" || offer != MediaType::Json) => {
                    return None;
                }
                "sv" if !value.is_empty() && value != "v1" => return None,
                _ => {}
            }
        }
        let target = match (group, version, kind) {
            (None, None, None) => None,
            named => {
                let is_named =
                    |target: &&Target| (Some(target.group), Some(target.version), Some(target.kind)) == named;
                Some(*targets.iter().find(is_named)?)
            }
        };
        Some(Accepted { media_type: offer, target, is_pretty })
    }
}

/// A quality such as `0.75`; what is none is 0, as Kubernetes reads it.
fn thousandths(quality: &str) -> u16 {
    let quality: f32 = quality.parse().unwrap_or(0.0);
    // The cast saturates, and makes 0 of what is no number.
    (quality.clamp(0.0, 1.0) * 1000.0) as u16
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn objects(accept: &str) -> Option<(MediaType, Option<(&'static str, &'static str)>)> {
        let accepted = negotiate(accept, OBJECT_TARGETS, false).ok()?;
        Some((accepted.media_type, accepted.target.map(|target| (target.kind, target.version))))
    }

    #[test]
    fn the_most_preferred_of_what_is_offered_is_chosen() {
        let (json, yaml) = (Some((MediaType::Json, None)), Some((MediaType::Yaml, None)));
        let as_kind = |kind, version| Some((MediaType::Json, Some((kind, version))));
        for (accept, expected) in [
            ("", json),
            ("*/*", json),
            ("*", json),
            ("application/*", json),
            ("application/json", json),
            ("application/yaml", yaml),
            ("application/json, */*", json),
            ("application/yaml,application/json", yaml),
            ("application/yaml;q=0.5,application/json;q=0.9", json),
            ("*/*;q=0.1, application/yaml;q=0.1", yaml),
            ("application/vnd.kubernetes.protobuf,application/json", json),
            ("application/vnd.kubernetes.protobuf", None),
            ("text/html", None),
            ("application/json;q=0", None),
            ("application", None),
            (",;=", None),
            (
                "application/json;as=Table;v=v1;g=meta.k8s.io,application/json;as=Table;v=v1beta1;g=meta.k8s.io,application/json",
                as_kind("Table", "v1"),
            ),
            ("application/json;as=Table;v=v9;g=meta.k8s.io,application/json", json),
            ("application/json;as=Table;g=meta.k8s.io;v=v9", None),
            ("application/json;as=Pod;g=meta.k8s.io;v=v1", None),
            (
                "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1;q=0.9,application/json;q=0.1",
                as_kind("PartialObjectMetadataList", "v1"),
            ),
            (
                "application/json ; as=PartialObjectMetadata ; g=meta.k8s.io ; v=v1beta1",
                as_kind("PartialObjectMetadata", "v1beta1"),
            ),
            ("application/json;stream=watch", json),
            ("application/json;stream=other", None),
            ("application/json;charset=utf-8", json),
        ] {
            assert_eq!(objects(accept), expected, "{accept}");
        }
        assert!(negotiate("application/json;pretty=1", OBJECT_TARGETS, false).unwrap().is_pretty);
        let discovery =
            "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList,application/json;q=0.9";
        assert_eq!(
            negotiate(discovery, DISCOVERY_TARGETS, false).unwrap().target,
            Some(DISCOVERY_TARGETS[0])
        );
        assert_eq!(negotiate(discovery, OBJECT_TARGETS, false).unwrap().target, None);
    }

    #[test]
    fn what_is_not_offered_is_406_and_told() {
        let error = negotiate("text/html", OBJECT_TARGETS, false).unwrap_err();
        assert_eq!(error.reason, Reason::NotAcceptable);
        assert_eq!(
            error.message,
            "only the following media types are accepted: application/json, application/yaml"
        );
        let error = negotiate("application/yaml", OBJECT_TARGETS, true).unwrap_err();
        assert_eq!(
            error.message,
            "only the following media types are accepted: application/json;stream=watch"
        );
        let long = "application/json,".repeat(ACCEPT_BYTES_MAX / 8);
        assert_eq!(negotiate(&long, OBJECT_TARGETS, false).unwrap_err().reason, Reason::NotAcceptable);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn any_header_is_answered(accept in "\\PC{0,60}|(application|\\*|text)/(json|yaml|\\*)(;(q|as|g|v|stream)=[a-zA-Z0-9.-]{0,8}){0,4}(,[a-z/*;=.0-9]{0,20}){0,4}") {
            for is_watch in [false, true] {
                match negotiate(&accept, OBJECT_TARGETS, is_watch) {
                    Ok(accepted) => prop_assert!(!is_watch || accepted.media_type == MediaType::Json),
                    Err(error) => prop_assert_eq!(error.reason, Reason::NotAcceptable),
                }
            }
        }

        #[test]
        fn a_higher_quality_is_preferred(json in 1..=1000_u16, yaml in 1..=1000_u16) {
            let accept = format!("application/json;q={},application/yaml;q={}", f32::from(json) / 1000.0, f32::from(yaml) / 1000.0);
            let chosen = negotiate(&accept, OBJECT_TARGETS, false).unwrap().media_type;
            // Qualities that differ by less than a thousandth may be taken as equal.
            if json.abs_diff(yaml) > 1 {
                prop_assert_eq!(chosen, if json > yaml { MediaType::Json } else { MediaType::Yaml });
            }
        }
    }
}
