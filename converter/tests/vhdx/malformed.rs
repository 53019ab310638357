//! Files that are damaged, hostile, or ask for what we do not do: a clear error, soon, and never a panic.

use std::sync::Arc;

use dvcr_converter::error::ErrorKind;
use dvcr_converter::format::{self, Format};
use dvcr_converter::limits::Limits;
use proptest::prelude::*;

use crate::common::failure;
use crate::image::{
    BAT_REGION, Bytes, FILE_PARAMETERS, HEADERS, LOGICAL_SECTOR_SIZE, METADATA_REGION, MIB, REGION_TABLES,
    VIRTUAL_DISK_SIZE, make, metadata_entry, read_through, region, region_entry, sample, seal, seal_headers,
    set_in_headers, set_in_region_tables, set_metadata_item, u64_at,
};

fn assert_refused(bytes: Vec<u8>, kind: ErrorKind, says: &str) {
    let error = failure(read_through(bytes));
    assert_eq!(error.kind(), kind, "{error}");
    assert!(error.to_string().contains(says), "{error}");
}

/// The sample after a change.
fn changed(change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut bytes = sample();
    change(&mut bytes);
    bytes
}

#[test]
fn one_damaged_header_or_region_table_does_not_matter() {
    let whole = read_through(sample()).unwrap();
    for at in [HEADERS[0] + 100, HEADERS[1] + 100, REGION_TABLES[0] + 100, REGION_TABLES[1] + 100] {
        assert!(read_through(changed(|bytes| bytes[at] ^= 1)).unwrap() == whole);
    }
    let both = changed(|bytes| HEADERS.iter().for_each(|at| bytes[at + 100] ^= 1));
    assert_refused(both, ErrorKind::Corrupt, "neither VHDX header");
    let both = changed(|bytes| REGION_TABLES.iter().for_each(|at| bytes[at + 100] ^= 1));
    assert_refused(both, ErrorKind::Corrupt, "neither VHDX region table");
}

#[test]
fn the_header_with_the_higher_number_counts() {
    // The other one says that there is a log to replay.
    for (dirty, clean) in [(0, 1), (1, 0)] {
        let mut bytes = changed(|bytes| {
            bytes[HEADERS[dirty] + 48] = 1;
            bytes[HEADERS[dirty] + 8..][..8].copy_from_slice(&5u64.to_le_bytes());
            bytes[HEADERS[clean] + 8..][..8].copy_from_slice(&6u64.to_le_bytes());
            seal_headers(bytes);
        });
        assert!(read_through(bytes.clone()).is_ok());
        bytes[HEADERS[clean] + 8] = 4;
        seal_headers(&mut bytes);
        assert_refused(bytes.clone(), ErrorKind::Corrupt, "not closed cleanly");
        // Which one counts cannot be told.
        bytes[HEADERS[clean] + 8] = 5;
        seal_headers(&mut bytes);
        assert_refused(bytes, ErrorKind::Corrupt, "sequence number 5");
    }
    // Unless both say the same.
    let alike = changed(|bytes| {
        let first = bytes[HEADERS[0]..HEADERS[0] + 4096].to_vec();
        bytes[HEADERS[1]..HEADERS[1] + 4096].copy_from_slice(&first);
    });
    assert!(read_through(alike).is_ok());
}

#[test]
fn versions_and_logs_that_are_not_known_are_refused() {
    let version = changed(|bytes| set_in_headers(bytes, 66, &2u16.to_le_bytes()));
    assert_refused(version, ErrorKind::Unsupported, "version 2");
    let dirty = changed(|bytes| {
        set_in_headers(bytes, 48, &[1; 16]);
        set_in_headers(bytes, 64, &1u16.to_le_bytes());
    });
    assert_refused(dirty, ErrorKind::Unsupported, "log has version 1");
    let askew = changed(|bytes| set_in_headers(bytes, 72, &4096u64.to_le_bytes()));
    assert_refused(askew, ErrorKind::Corrupt, "boundaries");
    let beyond = changed(|bytes| {
        set_in_headers(bytes, 48, &[1; 16]);
        set_in_headers(bytes, 72, &(1u64 << 40).to_le_bytes());
    });
    assert_refused(beyond, ErrorKind::Corrupt, "beyond the end");
    let nowhere = changed(|bytes| {
        set_in_headers(bytes, 48, &[1; 16]);
        set_in_headers(bytes, 72, &(u64::MAX << 20).to_le_bytes());
    });
    assert_refused(nowhere, ErrorKind::Corrupt, "beyond the end");
}

#[test]
fn a_differencing_disk_is_refused_by_the_name_of_its_parent() {
    let parent = |bytes: &mut Vec<u8>| {
        set_metadata_item(bytes, &FILE_PARAMETERS, &[0, 0, 0x10, 0, 2, 0, 0, 0]);
    };
    assert_refused(changed(parent), ErrorKind::ForeignFile, "differencing");
    let named = changed(|bytes| {
        parent(bytes);
        // A sixth item: the locator, with one path.
        let start = region(bytes, &METADATA_REGION).start;
        bytes[start + 10] = 6;
        let item = 100 << 10;
        let entry = start + 32 + 5 * 32;
        let id =
            [0x2d, 0x5f, 0xd3, 0xa8, 0x0b, 0xb3, 0x4d, 0x45, 0xab, 0xf7, 0xd3, 0xd8, 0x48, 0x34, 0xab, 0x0c];
        bytes[entry..entry + 16].copy_from_slice(&id);
        bytes[entry + 16..entry + 20].copy_from_slice(&(item as u32).to_le_bytes());
        bytes[entry + 20..entry + 24].copy_from_slice(&200u32.to_le_bytes());
        bytes[entry + 24] = 4;
        let wide = |text: &str| text.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<u8>>();
        let (key, value) = (wide("relative_path"), wide("..\\base.vhdx"));
        let mut locator = vec![0; 16];
        locator.extend([0, 0, 1, 0]);
        locator.extend(32u32.to_le_bytes());
        locator.extend((32 + key.len() as u32).to_le_bytes());
        locator.extend((key.len() as u16).to_le_bytes());
        locator.extend((value.len() as u16).to_le_bytes());
        locator.extend(key);
        locator.extend(value);
        bytes[start + item..start + item + locator.len()].copy_from_slice(&locator);
    });
    assert_refused(named, ErrorKind::ForeignFile, "base.vhdx");
}

#[test]
fn unknown_regions_and_items_are_refused_if_they_are_required() {
    let third = |flags: u8| {
        changed(|bytes| {
            let at = region_entry(bytes, &METADATA_REGION) + 32;
            let mut entry = [9; 32];
            let end = (bytes.len() as u64).to_le_bytes();
            entry[16..24].copy_from_slice(&end);
            entry[24..28].copy_from_slice(&(1u32 << 20).to_le_bytes());
            entry[28..].copy_from_slice(&[flags, 0, 0, 0]);
            set_in_region_tables(bytes, at, &entry);
            set_in_region_tables(bytes, REGION_TABLES[0] + 8, &[3]);
        })
    };
    assert!(read_through(third(0)).is_ok());
    assert_refused(third(1), ErrorKind::Unsupported, "unknown region 09090909-0909-0909-0909-090909090909");

    let sixth = |flags: u8| {
        changed(|bytes| {
            let start = region(bytes, &METADATA_REGION).start;
            bytes[start + 10] = 6;
            bytes[start + 192..start + 208].fill(9);
            bytes[start + 216] = flags;
        })
    };
    assert!(read_through(sixth(0)).is_ok());
    assert!(read_through(sixth(1)).is_ok());
    assert_refused(sixth(4), ErrorKind::Unsupported, "unknown metadata item 09090909");
    assert_refused(sixth(5), ErrorKind::Unsupported, "unknown metadata item");
}

#[test]
fn regions_that_cannot_be_are_refused() {
    for (field, value, says) in [
        (16, 4096u64 << 20 | 1, "boundaries"),
        (16, 0, "overlap"),
        (16, MIB as u64, "overlap"),
        (16, 1 << 40, "beyond the end"),
        (16, u64::MAX << 20, "boundaries"),
        (24, 1 << 32, "boundaries"),
    ] {
        for id in [BAT_REGION, METADATA_REGION] {
            let bytes = changed(|bytes| {
                let at = region_entry(bytes, &id) + field;
                set_in_region_tables(bytes, at, &value.to_le_bytes());
            });
            assert_refused(bytes, ErrorKind::Corrupt, says);
        }
    }
    let same = changed(|bytes| {
        let (bat, metadata) = (region_entry(bytes, &BAT_REGION), region_entry(bytes, &METADATA_REGION));
        let place = bytes[bat + 16..bat + 28].to_vec();
        set_in_region_tables(bytes, metadata + 16, &place);
    });
    assert_refused(same, ErrorKind::Corrupt, "overlap");
    let twice = changed(|bytes| {
        let (bat, metadata) = (region_entry(bytes, &BAT_REGION), region_entry(bytes, &METADATA_REGION));
        let id = bytes[bat..bat + 16].to_vec();
        set_in_region_tables(bytes, metadata, &id);
    });
    assert_refused(twice, ErrorKind::Corrupt, "twice");
    let none = changed(|bytes| set_in_region_tables(bytes, REGION_TABLES[0] + 8, &[1]));
    assert_refused(none, ErrorKind::Corrupt, "no metadata region");
    let many = changed(|bytes| set_in_region_tables(bytes, REGION_TABLES[0] + 8, &2048u32.to_le_bytes()));
    assert_refused(many, ErrorKind::Corrupt, "neither VHDX region table");
}

#[test]
fn metadata_that_cannot_be_is_refused() {
    let item = |id: &[u8; 4], value: &[u8]| changed(|bytes| set_metadata_item(bytes, id, value));
    for block in [0u32, 4096, 3 << 20, 512 << 20, u32::MAX] {
        let bytes = item(&FILE_PARAMETERS, &block.to_le_bytes());
        assert_refused(bytes, ErrorKind::Corrupt, &format!("block size {block}"));
    }
    for sector in [0u32, 513, 1024, u32::MAX] {
        assert_refused(item(&LOGICAL_SECTOR_SIZE, &sector.to_le_bytes()), ErrorKind::Corrupt, "512 or 4096");
    }
    assert_refused(
        item(&VIRTUAL_DISK_SIZE, &1000u64.to_le_bytes()),
        ErrorKind::Corrupt,
        "does not end at a sector",
    );
    assert_refused(item(&VIRTUAL_DISK_SIZE, &(65u64 << 40).to_le_bytes()), ErrorKind::Limit, "limit");
    assert_refused(item(&VIRTUAL_DISK_SIZE, &u64::MAX.to_le_bytes()), ErrorKind::Limit, "limit");
    // A disk that the BAT of 1 MiB cannot map.
    assert_refused(item(&VIRTUAL_DISK_SIZE, &(1u64 << 40).to_le_bytes()), ErrorKind::Corrupt, "BAT has room");

    let entry = |field: usize, value: u32| {
        changed(|bytes| {
            let at = metadata_entry(bytes, &FILE_PARAMETERS) + field;
            bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        })
    };
    assert_refused(entry(16, 0), ErrorKind::Corrupt, "outside its region");
    assert_refused(entry(16, u32::MAX), ErrorKind::Corrupt, "outside its region");
    assert_refused(entry(20, u32::MAX), ErrorKind::Corrupt, "outside its region");
    assert_refused(entry(20, 4), ErrorKind::Corrupt, "no file parameters");
    let start = region(&sample(), &METADATA_REGION).start;
    assert_refused(changed(|bytes| bytes[start] = 0), ErrorKind::Corrupt, "signature");
    assert_refused(changed(|bytes| bytes[start + 11] = 8), ErrorKind::Corrupt, "entries");
    assert_refused(changed(|bytes| bytes[start + 10] = 4), ErrorKind::Corrupt, "metadata has no");
    let twice = changed(|bytes| {
        let (at, other) =
            (metadata_entry(bytes, &FILE_PARAMETERS), metadata_entry(bytes, &LOGICAL_SECTOR_SIZE));
        bytes.copy_within(at..at + 16, other);
    });
    assert_refused(twice, ErrorKind::Corrupt, "twice");
    // An item far behind the table is found all the same.
    let far = changed(|bytes| {
        let at = metadata_entry(bytes, &VIRTUAL_DISK_SIZE);
        bytes[at + 16..at + 20].copy_from_slice(&900_000u32.to_le_bytes());
        bytes[start + 900_000..][..8].copy_from_slice(&(8u64 << 20).to_le_bytes());
    });
    assert!(read_through(far).unwrap() == read_through(sample()).unwrap());
}

#[test]
fn blocks_that_cannot_be_are_refused() {
    let bat = region(&sample(), &BAT_REGION);
    let metadata = region(&sample(), &METADATA_REGION);
    let file_bytes = sample().len() as u64;
    let entry = |block: usize, entry: u64| {
        changed(|bytes| bytes[bat.start + 8 * block..][..8].copy_from_slice(&entry.to_le_bytes()))
    };
    for (value, says) in [
        (6, "overlap the metadata of the file"),
        (MIB as u64 | 6, "overlap the metadata of the file"),
        (bat.start as u64 | 6, "overlap the metadata of the file"),
        (metadata.start as u64 | 6, "overlap the metadata of the file"),
        (file_bytes | 6, "beyond the end"),
        (!0xf_ffff | 6, "beyond the end"),
        (u64_at(&sample(), bat.start), "another block too"),
        (4, "state 4"),
        (7, "parent"),
    ] {
        assert_refused(entry(1, value), ErrorKind::Corrupt, says);
    }
    // Every way to say that nothing is there.
    for state in [0, 1, 2, 3, 5] {
        let all = read_through(entry(0, state)).unwrap();
        assert!(all[..MIB].iter().all(|&b| b == 0), "{state}");
        // A place without content means nothing.
        assert!(read_through(entry(0, file_bytes << 3 | state)).unwrap() == all);
    }
}

/// One block of the file for every block of a large disk, or one that reaches into the next.
#[test]
fn blocks_that_overlap_each_other_are_refused() {
    let bytes = make("block_size=4M", "16M");
    let bat = region(&bytes, &BAT_REGION).start;
    for shift in [0, 1, 2, 3] {
        let mut bytes = bytes.clone();
        let first = u64_at(&bytes, bat);
        bytes.resize(bytes.len() + 8 * MIB, 0);
        bytes[bat + 16..bat + 24].copy_from_slice(&(first + (shift << 20)).to_le_bytes());
        assert_refused(bytes, ErrorKind::Corrupt, "another block too");
    }
}

#[test]
fn the_last_block_may_be_short_but_not_missing() {
    let mut bytes = make("block_size=4M", "9M");
    let bat = region(&bytes, &BAT_REGION).start;
    let end = (bytes.len() as u64).next_multiple_of(1 << 20);
    bytes.resize(end as usize + MIB, 7);
    bytes[bat + 16..bat + 24].copy_from_slice(&(end | 6).to_le_bytes());
    assert!(read_through(bytes.clone()).unwrap()[8 * MIB..].iter().all(|&b| b == 7));
    bytes.pop();
    assert_refused(bytes, ErrorKind::Corrupt, "beyond the end");
}

#[test]
fn a_file_of_another_version_of_the_signature_is_raw() {
    let image = format::open(Arc::new(Bytes(b"vhdxfilf".repeat(100))), &Limits::default()).unwrap();
    assert_eq!(image.info.format, Format::Raw);
    assert_refused(b"vhdxfile".repeat(100), ErrorKind::Corrupt, "header section");
}

/// What becomes of a file that ends anywhere.
#[test]
fn a_file_cut_short_anywhere_is_refused() {
    let whole = sample();
    let last = region(&whole, &BAT_REGION).start;
    let needed = (0..8).map(|block| u64_at(&whole, last + 8 * block)).max().unwrap() >> 20 << 20;
    for len in
        [8, 64 << 10, 192 << 10, MIB - 1, MIB, 2 * MIB, 3 * MIB, needed as usize, needed as usize + MIB - 1]
    {
        assert_refused(whole[..len].to_vec(), ErrorKind::Corrupt, "");
    }
}

/// The places worth damaging.
fn places(bytes: &[u8]) -> Vec<std::ops::Range<usize>> {
    let (bat, metadata) = (region(bytes, &BAT_REGION).start, region(bytes, &METADATA_REGION).start);
    vec![
        0..16,
        HEADERS[0]..HEADERS[0] + 80,
        HEADERS[1]..HEADERS[1] + 80,
        REGION_TABLES[0]..REGION_TABLES[0] + 80,
        metadata..metadata + 200,
        metadata + (64 << 10)..metadata + (64 << 10) + 40,
        bat..bat + 64,
        0..bytes.len(),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damage_never_panics_and_ends_soon(
        damage in proptest::collection::vec((0usize..8, 0.0..1.0f64, any::<u8>(), 1usize..9), 1..6),
        cut in proptest::option::weighted(0.2, 0.0..1.0f64), sealed in any::<bool>(),
    ) {
        let mut bytes = sample();
        let places = places(&bytes);
        for (place, at, value, run) in damage {
            let place = &places[place];
            let at = place.start + (at * place.len() as f64) as usize;
            let end = (at + run).min(bytes.len());
            bytes[at.min(end)..end].fill(value);
        }
        if sealed {
            seal_headers(&mut bytes);
            for table in REGION_TABLES {
                seal(&mut bytes[table..table + (64 << 10)]);
            }
        }
        if let Some(cut) = cut {
            bytes.truncate((cut * bytes.len() as f64) as usize);
        }
        let begun = std::time::Instant::now();
        let _ = read_through(bytes);
        prop_assert!(begun.elapsed().as_secs() < 20);
    }
}
