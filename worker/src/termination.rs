//! The message that a pod leaves for who reads its status: `/dev/termination-log`.

use std::fs::OpenOptions;
use std::io::{ErrorKind, Write};
use std::path::Path;
use std::time::Duration;

use serde::Serialize;

/// Where the container runtime reads the message, unless the pod says otherwise.
pub const PATH: &str = "/dev/termination-log";
/// Longest message that is read, bytes.
pub const MESSAGE_BYTES_MAX: usize = 4096;

/// What an import into the registry tells; zero values are left out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Report {
    /// Bytes of the source as it was transferred.
    #[serde(skip_serializing_if = "is_zero")]
    pub source_image_size: u64,
    /// Bytes that a guest sees.
    #[serde(skip_serializing_if = "is_zero")]
    pub source_image_virtual_size: u64,
    /// Format of the stored file.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub source_image_format: String,
    /// Bytes per second.
    #[serde(skip_serializing_if = "is_zero")]
    pub average_speed: u64,
    /// Nanoseconds.
    #[serde(skip_serializing_if = "is_zero")]
    pub duration: u64,
    /// Why it failed.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub error_message: String,
}

fn is_zero(value: &u64) -> bool {
    *value == 0
}

impl Report {
    /// The report of a failure; what makes it too long is cut off.
    pub fn failure(message: &str) -> Self {
        let mut error_message = message.to_owned();
        let room = |text: &str| Self { error_message: text.to_owned(), ..Self::default() }.text().len();
        // Escaping makes some characters longer than they are here.
        while room(&error_message) > MESSAGE_BYTES_MAX && error_message.pop().is_some() {}
        Self { error_message, ..Self::default() }
    }

    /// The report as JSON.
    pub fn text(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }
}

/// What a worker tells of a volume that it has filled, as CDI's importer does.
pub fn import_complete() -> String {
    let (preallocated, message) = (false, "Import Complete");
    serde_json::json!({ "preallocationApplied": preallocated, "message": message }).to_string()
}

/// What a worker tells of a volume that it could not fill, as CDI's importer does; what makes it too long is cut off.
pub fn unable_to_process(message: &str) -> String {
    let mut text = format!("Unable to process data: {message}");
    text.truncate(text.floor_char_boundary(MESSAGE_BYTES_MAX));
    text
}

/// Nanoseconds, as much as fit.
pub fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Leaves a message in the file `path`, which whoever reads it has made. Where there is none nobody asks for it; one that cannot be
/// written to is logged.
pub fn leave(path: &Path, message: &str) {
    let file = OpenOptions::new().write(true).truncate(true).open(path);
    match file.and_then(|mut file| file.write_all(message.as_bytes())) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            tracing::warn!(path = %path.display(), %error, "the termination message cannot be written");
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_leaves_out_what_is_zero() {
        let report = Report {
            source_image_size: 7,
            source_image_virtual_size: 9,
            source_image_format: "qcow2".into(),
            duration: nanoseconds(Duration::from_millis(1)),
            ..Report::default()
        };
        let text = r#"{"source-image-size":7,"source-image-virtual-size":9,"source-image-format":"qcow2","duration":1000000}"#;
        assert_eq!(report.text(), text);
        assert_eq!(Report::failure("no \"space\"").text(), r#"{"error-message":"no \"space\""}"#);
    }

    #[test]
    fn a_long_failure_fits_what_is_read() {
        for message in ["x".repeat(5000), "\"".repeat(5000), "ж\n".repeat(3000)] {
            let report = Report::failure(&message);
            assert!(report.text().len() <= MESSAGE_BYTES_MAX);
            assert!(message.starts_with(&report.error_message) && report.error_message.len() > 1000);
        }
    }

    #[test]
    fn a_volume_is_told_of_in_the_words_that_operators_know() {
        let done: serde_json::Value = serde_json::from_str(&import_complete()).unwrap();
        assert_eq!(done, serde_json::json!({"preallocationApplied": false, "message": "Import Complete"}));
        assert_eq!(unable_to_process("no space"), "Unable to process data: no space");
        let long = unable_to_process(&"ж".repeat(5000));
        assert!(long.len() > MESSAGE_BYTES_MAX - 4 && long.len() <= MESSAGE_BYTES_MAX && long.ends_with('ж'));
    }

    #[test]
    fn the_message_replaces_the_one_before_and_makes_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        leave(&path, "nobody asks");
        assert!(!path.exists());
        std::fs::write(&path, "").unwrap();
        leave(&path, "longer than the next");
        leave(&path, "short");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "short");
    }
}
