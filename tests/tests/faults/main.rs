//! Every fault with every kind of source: an import, an upload and a disk end right, or with an error that names the cause.
//!
//! ```text
//!  http      file server ──┐
//!  registry  docker://   ──┤ relay                    relay
//!  upload    dvcr upload ──┴───────> dvcr import ─────────────> dvcr registry
//!  disk      a file, a volume        uploader, populate
//! ```
//!
//! Each test is a cell of the table: it does the fault, looks that nothing half-made is visible, that the same command ends well
//! once the fault is over, and how many bytes passed again. The places of faults are random; `DVCR_FAULTS_SEED` repeats them.
//! Disks that are full are tmpfs mounts of their own, for which the tests have to run as root.

mod bench;
mod disk;
mod http;
mod registry;
mod tls;
mod upload;

/// Makes a module per fault, a test per cell that is `tested`, and the table of them all.
macro_rules! matrix {
    ($($fault:ident { $($source:ident: $cell:tt),* $(,)? })*) => {
        $(mod $fault { $(cell!($fault $source $cell);)* })*

        const CELLS: &[(&str, &[(&str, &str)])] =
            &[$((stringify!($fault), &[$((stringify!($source), reason!($cell))),*])),*];
    };
}

macro_rules! cell {
    ($fault:ident $source:ident tested) => {
        #[test]
        fn $source() -> anyhow::Result<()> {
            crate::$source::$fault()
        }
    };
    ($fault:ident $source:ident $reason:literal) => {};
}

macro_rules! reason {
    (tested) => {
        ""
    };
    ($reason:literal) => {
        $reason
    };
}

// A text says why the fault cannot happen there. "Server" is who is read from, and of an upload the uploader; "importer" is
// `dvcr import` or `dvcr populate`, and of an upload the client, `dvcr upload`.
matrix! {
    connection_cut         { http: tested, registry: tested, upload: tested, disk: tested }
    server_killed          { http: tested, registry: tested, upload: tested, disk: "no server stands between a disk and who reads it" }
    registry_killed        { http: tested, registry: tested, upload: tested, disk: tested }
    importer_killed        { http: tested, registry: tested, upload: tested, disk: tested }
    disk_full              { http: tested, registry: tested, upload: tested, disk: tested }
    slow_link              { http: tested, registry: tested, upload: tested, disk: tested }
    wrong_length           { http: tested, registry: tested, upload: tested, disk: tested }
    wrong_checksum         { http: tested, registry: tested, upload: tested, disk: tested }
    changed_in_the_middle  { http: tested, registry: tested, upload: tested, disk: tested }
    certificate_expired    { http: tested, registry: tested, upload: tested, disk: tested }
    redirect_loop          { http: tested, registry: tested, upload: tested, disk: "nothing leads from one disk to another" }
    come_back_later        { http: tested, registry: tested, upload: tested, disk: tested }
}

#[test]
fn the_table_has_every_fault_with_every_source() {
    assert_eq!(CELLS.len(), 12);
    for (fault, cells) in CELLS {
        let sources = cells.iter().map(|(source, _)| *source).collect::<Vec<_>>();
        assert_eq!(sources, ["http", "registry", "upload", "disk"], "{fault}");
    }
    let untested = CELLS.iter().flat_map(|(_, cells)| *cells).filter(|(_, reason)| !reason.is_empty());
    assert_eq!(untested.count(), 2);
}
