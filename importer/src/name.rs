//! The name of the disk's file in the layer.

use dvcr_converter::format::Format;
use dvcr_converter::wrapper::Wrapper;
use dvcr_image::tar::FILE_NAME_BYTES_MAX;

/// Makes a file name of what the source calls itself: one path component, without the extensions of the wrappers
/// that were taken off, and with that of qcow2 where a raw disk became one. Falls back to `disk.<format>`.
pub(crate) fn file_name(own: Option<&str>, wrappers: &[Wrapper], stored: Format, re_encoded: bool) -> String {
    let own = own.unwrap_or_default();
    let own = own.rsplit(['/', '\\']).next().unwrap_or_default();
    let printable: String = own.chars().filter(|c| !c.is_control()).collect();
    // A leading dot hides a file, and `.wh.` means a deletion in a layer.
    let mut name = printable.trim().trim_start_matches('.').to_owned();
    for wrapper in wrappers {
        let extensions: &[&str] = match wrapper {
            Wrapper::Gzip => &[".gz", ".gzip"],
            Wrapper::Xz => &[".xz"],
            Wrapper::Zstd => &[".zst", ".zstd"],
            Wrapper::Bzip2 => &[".bz2", ".bzip2"],
            Wrapper::Lz4 => &[".lz4"],
        };
        strip_extension(&mut name, extensions);
    }
    let mut extension = String::new();
    if re_encoded {
        strip_extension(&mut name, &[".raw", ".img", ".bin", ".vhd", ".qcow2"]);
        extension = ".qcow2".to_owned();
    } else if let Some(at) = name.rfind('.').filter(|at| name.len() - at <= 8) {
        extension = name.split_off(at);
    }
    let mut end = FILE_NAME_BYTES_MAX.saturating_sub(extension.len()).min(name.len());
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    name.truncate(end);
    match name.is_empty() {
        true => format!("disk.{stored}"),
        false => name + &extension,
    }
}

fn strip_extension(name: &mut String, extensions: &[&str]) {
    let lower = name.to_ascii_lowercase();
    if let Some(extension) = extensions.iter().find(|extension| lower.ends_with(**extension)) {
        name.truncate(name.len() - extension.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_kept_as_far_as_it_is_a_name() {
        let kept = |own: &str| file_name(Some(own), &[], Format::Qcow2, false);
        assert_eq!(kept("debian-12.qcow2"), "debian-12.qcow2");
        assert_eq!(kept("Имя диска.img"), "Имя диска.img");
        assert_eq!(kept("../../etc/passwd"), "passwd");
        assert_eq!(kept("a\\b\n.img"), "b.img");
        assert_eq!(kept(".wh.x"), "wh.x");
        for nothing in ["", ".", "..", "a/", "\n"] {
            assert_eq!(kept(nothing), "disk.qcow2", "{nothing:?}");
        }
        assert_eq!(file_name(None, &[], Format::Iso, false), "disk.iso");
    }

    #[test]
    fn extensions_follow_what_is_stored() {
        let gz = [Wrapper::Gzip];
        assert_eq!(file_name(Some("a.qcow2.GZ"), &gz, Format::Qcow2, false), "a.qcow2");
        assert_eq!(file_name(Some("a.raw.gz"), &gz, Format::Qcow2, true), "a.qcow2");
        assert_eq!(file_name(Some("a.vhd.gz"), &gz, Format::Qcow2, true), "a.qcow2");
        assert_eq!(file_name(Some("a.img"), &[], Format::Qcow2, true), "a.qcow2");
        assert_eq!(file_name(Some("sda"), &[], Format::Qcow2, true), "sda.qcow2");
        assert_eq!(file_name(Some(".raw"), &[], Format::Qcow2, true), "raw.qcow2");
        assert_eq!(file_name(Some("x.xz.gz"), &[Wrapper::Gzip, Wrapper::Xz], Format::Iso, false), "x");
    }

    #[test]
    fn a_long_name_keeps_its_extension() {
        let name = file_name(Some(&format!("{}.qcow2", "ж".repeat(90))), &[], Format::Qcow2, false);
        assert!(name.len() <= FILE_NAME_BYTES_MAX && name.ends_with("ж.qcow2"), "{name}");
    }
}
