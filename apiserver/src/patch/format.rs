//! What kind of patch a request has, and in whose name it is made.

use crate::status::{Reason, Result, Status};

/// Bytes of a manager's name that are kept of a user agent.
const MANAGER_MAX_BYTES: usize = 128;

/// The kind of a patch, by the media type of the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Json,
    Merge,
    Strategic,
    Apply,
}

impl Format {
    const ALL: [Self; 4] = [Self::Json, Self::Merge, Self::Strategic, Self::Apply];

    fn media_type(self) -> &'static str {
        match self {
            Self::Json => "application/json-patch+json",
            Self::Merge => "application/merge-patch+json",
            Self::Strategic => "application/strategic-merge-patch+json",
            Self::Apply => "application/apply-patch+yaml",
        }
    }

    /// Reads the header `Content-Type`. Custom resources have no strategic merge patch: their schemas know no patch strategies.
    ///
    /// # Errors
    /// `UnsupportedMediaType` with the types that this resource takes.
    pub fn negotiate(content_type: &str, is_custom: bool) -> Result<Self> {
        let essence = content_type.split(';').next().unwrap_or_default().trim();
        let mut accepted = Self::ALL.into_iter().filter(|format| !(is_custom && *format == Self::Strategic));
        let found = accepted.clone().find(|format| essence.eq_ignore_ascii_case(format.media_type()));
        found.ok_or_else(|| {
            let first = accepted.next().map_or("", Self::media_type).to_owned();
            let types = accepted.fold(first, |types, format| types + ", " + format.media_type());
            let message = format!(
                "the body of the request was in an unknown format - accepted media types include: {types}"
            );
            Status::new(Reason::UnsupportedMediaType, message)
        })
    }
}

/// The manager of a write: `fieldManager` of the request, else the user agent up to its version.
pub fn manager_of(field_manager: &str, user_agent: &str) -> String {
    if !field_manager.is_empty() {
        return field_manager.to_owned();
    }
    let program = user_agent.split('/').next().unwrap_or_default();
    let mut name = String::new();
    for c in program.chars().filter(|c| !c.is_control()) {
        if name.len() + c.len_utf8() > MANAGER_MAX_BYTES {
            break;
        }
        name.push(c);
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_media_type_decides_whatever_its_parameters_and_case() {
        assert_eq!(Format::negotiate("application/json-patch+json", true), Ok(Format::Json));
        assert_eq!(Format::negotiate("Application/Merge-Patch+JSON; charset=utf-8", true), Ok(Format::Merge));
        assert_eq!(Format::negotiate("application/strategic-merge-patch+json", false), Ok(Format::Strategic));
        assert_eq!(Format::negotiate("application/apply-patch+yaml", true), Ok(Format::Apply));
    }

    #[test]
    fn a_strategic_merge_patch_of_a_custom_resource_is_refused_with_what_is_taken() {
        let status = Format::negotiate("application/strategic-merge-patch+json", true).unwrap_err();
        assert_eq!(status.reason.code(), 415);
        assert_eq!(
            status.message,
            "the body of the request was in an unknown format - accepted media types include: \
             application/json-patch+json, application/merge-patch+json, application/apply-patch+yaml"
        );
        assert_eq!(Format::negotiate("", false).unwrap_err().reason, Reason::UnsupportedMediaType);
    }

    #[test]
    fn a_write_without_a_manager_is_made_by_the_program_of_its_user_agent() {
        assert_eq!(manager_of("me", "kubectl/v1.37"), "me");
        assert_eq!(manager_of("", "kubectl/v1.37 (linux/amd64)"), "kubectl");
        assert_eq!(manager_of("", &"ä".repeat(100)), "ä".repeat(64));
        assert_eq!(manager_of("", ""), "");
    }
}
