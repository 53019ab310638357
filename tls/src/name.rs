//! The names in a certificate's subject.

use rustls::pki_types::CertificateDer;
use webpki::EndEntityCert;

/// The name of a subject, 2.5.4.3.
const COMMON_NAME: &[u8] = &[0x55, 0x04, 0x03];
/// What it belongs to, 2.5.4.10.
const ORGANIZATION: &[u8] = &[0x55, 0x04, 0x0a];

/// Returns the common name in a certificate that was verified; `None` if there is none, or more than one.
pub fn common_name(certificate: &CertificateDer<'_>) -> Option<String> {
    name_of(EndEntityCert::try_from(certificate).ok()?.subject())
}

/// Returns the organizations in a certificate that was verified, as they follow each other; `None` if one of them cannot be read.
pub fn organizations(certificate: &CertificateDer<'_>) -> Option<Vec<String>> {
    values(EndEntityCert::try_from(certificate).ok()?.subject(), ORGANIZATION).into_iter().map(text).collect()
}

/// Finds the common name in a subject.
fn name_of(subject: &[u8]) -> Option<String> {
    match values(subject, COMMON_NAME).as_slice() {
        [name] => text(*name),
        _ => None,
    }
}

/// The values of one type in a subject: sets of sequences of type and value.
fn values<'a>(subject: &'a [u8], of: &[u8]) -> Vec<(u8, &'a [u8])> {
    let mut values = Vec::new();
    let mut subject = Der(subject);
    while let Some((SET, set)) = subject.next() {
        let mut set = Der(set);
        while let Some((SEQUENCE, attribute)) = set.next() {
            let mut attribute = Der(attribute);
            if let (Some((OID, kind)), Some(value)) = (attribute.next(), attribute.next())
                && kind == of
            {
                values.push(value);
            }
        }
    }
    values
}

/// A string that is not empty.
fn text((tag, value): (u8, &[u8])) -> Option<String> {
    match tag {
        UTF8_STRING | PRINTABLE_STRING | IA5_STRING if !value.is_empty() => {
            String::from_utf8(value.to_vec()).ok()
        }
        _ => None,
    }
}

const OID: u8 = 0x06;
const UTF8_STRING: u8 = 0x0c;
const PRINTABLE_STRING: u8 = 0x13;
const IA5_STRING: u8 = 0x16;
const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;

/// Values one behind the other in DER.
struct Der<'a>(&'a [u8]);

impl<'a> Iterator for Der<'a> {
    type Item = (u8, &'a [u8]);

    /// The next tag and value; `None` at the end, and at what is malformed.
    fn next(&mut self) -> Option<Self::Item> {
        let (tag, rest) = self.0.split_first()?;
        let (first, rest) = rest.split_first()?;
        let (length, rest) = match first {
            0..=0x7f => (usize::from(*first), rest),
            0x81 => rest.split_first().map(|(length, rest)| (usize::from(*length), rest))?,
            0x82 => {
                let (length, rest) = rest.split_first_chunk::<2>()?;
                (usize::from(u16::from_be_bytes(*length)), rest)
            }
            _ => return None,
        };
        let (value, rest) = rest.split_at_checked(length)?;
        self.0 = rest;
        Some((*tag, value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn der(tag: u8, value: &[u8]) -> Vec<u8> {
        [&[tag, u8::try_from(value.len()).unwrap()], value].concat()
    }

    fn attribute(oid: &[u8], tag: u8, value: &[u8]) -> Vec<u8> {
        der(SET, &der(SEQUENCE, &[der(OID, oid), der(tag, value)].concat()))
    }

    #[test]
    fn organizations_are_all_there_or_nobody_is_told_any() {
        let organization = |tag, value: &str| attribute(ORGANIZATION, tag, value.as_bytes());
        let found =
            |subject: &[u8]| values(subject, ORGANIZATION).into_iter().map(text).collect::<Option<Vec<_>>>();
        let (a, b) = (organization(UTF8_STRING, "system:masters"), organization(PRINTABLE_STRING, "dev"));
        let name = attribute(COMMON_NAME, UTF8_STRING, b"admin");
        assert_eq!(found(&[a.clone(), name.clone(), b].concat()).unwrap(), ["system:masters", "dev"]);
        assert_eq!(found(&name).unwrap(), Vec::<String>::new());
        assert_eq!(found(&[a, organization(0x1e, "x")].concat()), None);
    }

    #[test]
    fn a_subject_has_one_common_name_or_none() {
        let name = |tag, value: &str| attribute(COMMON_NAME, tag, value.as_bytes());
        let organization = attribute(&[0x55, 0x04, 0x0a], UTF8_STRING, b"admin");
        for (subject, found) in [
            (name(UTF8_STRING, "admin"), Some("admin")),
            (name(PRINTABLE_STRING, "node-7"), Some("node-7")),
            ([organization.clone(), name(UTF8_STRING, "x")].concat(), Some("x")),
            (organization.clone(), None),
            ([name(UTF8_STRING, "admin"), name(UTF8_STRING, "admin")].concat(), None),
            ([name(UTF8_STRING, "x"), organization].concat(), Some("x")),
            (name(UTF8_STRING, ""), None),
            // A BMPString.
            (name(0x1e, "a"), None),
            (attribute(COMMON_NAME, UTF8_STRING, b"\xff"), None),
            (Vec::new(), None),
            (vec![SET], None),
            (vec![SET, 0x82, 0xff, 0xff], None),
        ] {
            assert_eq!(name_of(&subject).as_deref(), found, "{subject:02x?}");
        }
        let whole = name(UTF8_STRING, "admin");
        for end in 0..whole.len() {
            assert_eq!(name_of(&whole[..end]), None);
        }
    }
}
