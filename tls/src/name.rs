//! The common name in a certificate's subject.

use rustls::pki_types::CertificateDer;
use webpki::EndEntityCert;

/// The name of a subject, 2.5.4.3.
const COMMON_NAME: &[u8] = &[0x55, 0x04, 0x03];

/// Returns the common name in a certificate that was verified; `None` if there is none, or more than one.
pub fn common_name(certificate: &CertificateDer<'_>) -> Option<String> {
    name_of(EndEntityCert::try_from(certificate).ok()?.subject())
}

/// Finds the common name in a subject: sets of sequences of type and value.
fn name_of(subject: &[u8]) -> Option<String> {
    let mut names = Vec::new();
    let mut subject = Der(subject);
    while let Some((SET, set)) = subject.next() {
        let mut set = Der(set);
        while let Some((SEQUENCE, attribute)) = set.next() {
            let mut attribute = Der(attribute);
            if let (Some((OID, COMMON_NAME)), Some(value)) = (attribute.next(), attribute.next()) {
                names.push(value);
            }
        }
    }
    match names.as_slice() {
        [(UTF8_STRING | PRINTABLE_STRING | IA5_STRING, name)] if !name.is_empty() => {
            String::from_utf8(name.to_vec()).ok()
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
