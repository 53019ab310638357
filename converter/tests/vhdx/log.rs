//! Files that were not closed cleanly: their log is replayed as qemu replays it, or they are refused.

use std::process::Command;
use std::sync::Arc;

use dvcr_converter::error::ErrorKind;
use dvcr_converter::format;
use dvcr_converter::io::Value;
use dvcr_converter::limits::Limits;
use proptest::prelude::*;

use crate::common::{failure, noise, path, temp_dir};
use crate::image::{
    BAT_REGION, Bytes, MIB, as_qemu_reads, make, qemu_opens, read_through, region, sample, seal,
    set_in_headers, u64_at,
};

const SECTOR: usize = 4096;
/// Sectors of the three blocks of the sample that have data.
const PAYLOAD_SECTORS: usize = 3 * MIB / SECTOR;
const GUID: [u8; 16] = *b"the log of today";

/// What an entry of the log asks for.
#[derive(Clone, Debug)]
enum Patch {
    Zeros { start: usize, len: usize },
    Data { start: usize, sector: Vec<u8> },
}

impl Patch {
    fn apply(&self, file: &mut Vec<u8>) {
        let (start, len) = match self {
            Patch::Zeros { start, len } => (*start, *len),
            Patch::Data { start, .. } => (*start, SECTOR),
        };
        if file.len() < start + len {
            file.resize(start + len, 0);
        }
        match self {
            Patch::Zeros { .. } => file[start..start + len].fill(0),
            Patch::Data { sector, .. } => file[start..start + len].copy_from_slice(sector),
        }
    }
}

/// The bytes of an entry.
fn entry(sequence: u64, tail: usize, file_bytes: (u64, u64), patches: &[Patch]) -> Vec<u8> {
    let mut entry = b"loge\0\0\0\0".to_vec();
    entry.extend([0; 4]);
    entry.extend((tail as u32).to_le_bytes());
    entry.extend(sequence.to_le_bytes());
    entry.extend((patches.len() as u64).to_le_bytes());
    entry.extend(GUID);
    entry.extend(file_bytes.0.to_le_bytes());
    entry.extend(file_bytes.1.to_le_bytes());
    let mut sectors = Vec::new();
    for patch in patches {
        match patch {
            Patch::Zeros { start, len } => {
                entry.extend(b"zero\0\0\0\0");
                entry.extend((*len as u64).to_le_bytes());
                entry.extend((*start as u64).to_le_bytes());
            }
            Patch::Data { start, sector } => {
                entry.extend(b"desc");
                entry.extend(&sector[SECTOR - 4..]);
                entry.extend(&sector[..8]);
                entry.extend((*start as u64).to_le_bytes());
                sectors.extend(b"data");
                sectors.extend(((sequence >> 32) as u32).to_le_bytes());
                sectors.extend(&sector[8..SECTOR - 4]);
                sectors.extend((sequence as u32).to_le_bytes());
            }
        }
        entry.extend(sequence.to_le_bytes());
    }
    entry.resize(entry.len().next_multiple_of(SECTOR), 0);
    entry.extend(sectors);
    let len = entry.len() as u32;
    entry[8..12].copy_from_slice(&len.to_le_bytes());
    seal(&mut entry);
    entry
}

/// The log of an image file, written like by one who opened it for writing.
struct Log {
    file: Vec<u8>,
    start: usize,
    len: usize,
    /// Where the next entry goes, in the log.
    at: usize,
    sequence: u64,
}

impl Log {
    fn open(mut file: Vec<u8>, at: usize) -> Self {
        let header = &file[64 << 10..];
        let (start, len) = (u64_at(header, 72) as usize, u64_at(header, 68) as u32 as usize);
        set_in_headers(&mut file, 48, &GUID);
        Self { file, start, len, at, sequence: 7 << 31 }
    }

    /// Puts bytes of an entry into the ring and returns where they begin.
    fn put(&mut self, entry: &[u8]) -> usize {
        let at = self.at;
        for (i, byte) in entry.iter().enumerate() {
            self.file[self.start + (at + i) % self.len] = *byte;
        }
        self.at = (at + entry.len()) % self.len;
        at
    }

    /// Writes the next entry, whose tail is `tail`, or itself.
    fn write(&mut self, tail: Option<usize>, patches: &[Patch]) -> usize {
        self.sequence += 1;
        let len = self.file.len() as u64;
        let entry = entry(self.sequence, tail.unwrap_or(self.at), (len, len), patches);
        self.put(&entry)
    }
}

/// The sector of the BAT that maps the sample's blocks, with the entries of some blocks changed.
fn bat_sector(file: &[u8], changes: &[(usize, u64)]) -> Patch {
    let start = region(file, &BAT_REGION).start;
    let mut sector = file[start..start + SECTOR].to_vec();
    for (block, entry) in changes {
        sector[block * 8..block * 8 + 8].copy_from_slice(&entry.to_le_bytes());
    }
    Patch::Data { start, sector }
}

/// Where the payload of the sample's blocks begins, which is as much as `PAYLOAD_SECTORS`.
fn payload(file: &[u8]) -> usize {
    u64_at(file, region(file, &BAT_REGION).start) as usize & !(MIB - 1)
}

fn assert_refused(file: Vec<u8>, kind: ErrorKind, says: &str) {
    let error = failure(read_through(file));
    assert_eq!(error.kind(), kind, "{error}");
    assert!(error.to_string().contains(says), "{error}");
}

/// A recipe for entries: for each the number of its first entry not yet applied, counted back, and its patches: which
/// of them, of what, where, how long.
type Recipe = Vec<(usize, Vec<(u8, usize, usize, u8)>)>;

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 30, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_dirty_log_is_replayed_as_qemu_replays_it(
        // With more than 126 descriptors qemu 7.2 reads all but the last sector of them wrong.
        recipe in proptest::collection::vec(
            (0usize..4, proptest::collection::vec((any::<u8>(), 0usize..PAYLOAD_SECTORS, 1usize..9, any::<u8>()), 0..100)), 1..5,
        ),
        at in 0usize..256, torn in any::<bool>(), stale in any::<bool>(),
    ) {
        let recipe: Recipe = recipe;
        let clean = sample();
        let (bat, payload) = (region(&clean, &BAT_REGION).start, payload(&clean));
        let mut log = Log::open(clean.clone(), at * SECTOR);
        let mut model = clean.clone();
        if stale {
            // Of an earlier round, well away from the entries that count.
            let old = entry(5, (at + 250) % 256 * SECTOR, (0, 0), &[Patch::Zeros { start: bat, len: SECTOR }]);
            let here = std::mem::replace(&mut log.at, (at + 250) % 256 * SECTOR);
            log.put(&old);
            log.at = here;
        }
        let mut begun = Vec::new();
        let mut tail = 0;
        let mut written: Vec<Vec<Patch>> = Vec::new();
        let mut sectors = 0;
        for (back, patches) in recipe {
            let patches: Vec<Patch> = patches
                .into_iter()
                .map(|(what, place, len, value)| match what % 8 {
                    // Blocks that vanish, and move.
                    0 => bat_sector(&clean, &[(place % 8, 2)]),
                    1 => {
                        let from = [0, 2, 7][place % 3];
                        bat_sector(&clean, &[(from, 0), (4, u64_at(&clean, bat + 8 * from))])
                    }
                    2 | 3 => {
                        let len = len.min(PAYLOAD_SECTORS - place);
                        Patch::Zeros { start: payload + place * SECTOR, len: len * SECTOR }
                    }
                    _ => {
                        let sector = if what % 2 == 0 { vec![value; SECTOR] } else { noise(SECTOR, value.into()) };
                        Patch::Data { start: payload + place * SECTOR, sector }
                    }
                })
                .collect();
            // The ring has 256 sectors; a few stay free.
            let data = patches.iter().filter(|patch| matches!(patch, Patch::Data { .. })).count();
            sectors += data + (64 + 32 * patches.len()).div_ceil(SECTOR);
            if sectors > 230 {
                break;
            }
            // The entries before the tail were applied by the writer.
            tail = written.len().saturating_sub(back);
            begun.push(log.at);
            let at = begun[tail];
            let _ = log.write(Some(at), &patches);
            for applied in written.iter().take(tail).flatten() {
                applied.apply(&mut log.file);
            }
            written.push(patches);
        }
        prop_assume!(!written.is_empty());
        for patch in written.iter().flatten() {
            patch.apply(&mut model);
        }
        if torn {
            // The entry that was being written when the light went out.
            log.sequence += 1;
            let len = log.file.len() as u64;
            let mut half = entry(log.sequence, log.at, (len, len), &[Patch::Zeros { start: bat, len: SECTOR }]);
            half[100] ^= 1;
            log.put(&half);
        }
        let ours = read_through(log.file.clone()).unwrap();
        prop_assert!(ours == read_through(model).unwrap(), "as one reads who knows what was meant");
        // Where some begin behind the end of the ring qemu leaves out the others.
        if begun[tail..].is_sorted() {
            prop_assert!(ours == as_qemu_reads(&log.file), "as qemu reads");
        }
    }
}

#[test]
fn a_log_that_moves_a_block_is_honoured_and_told() {
    let clean = sample();
    let bat = region(&clean, &BAT_REGION).start;
    let (first, third) = (u64_at(&clean, bat), u64_at(&clean, bat + 16));
    let mut log = Log::open(clean.clone(), 0);
    // Blocks 0 and 2 change places, in two entries that belong together.
    let tail = log.write(None, &[bat_sector(&clean, &[(0, third)])]);
    log.write(Some(tail), &[bat_sector(&clean, &[(0, third), (2, first)])]);

    let image = format::open(Arc::new(Bytes(log.file.clone())), &Limits::default()).unwrap();
    assert_eq!(image.info.details.dirty, Some(true));
    assert!(image.info.details.specific.contains(&("subformat", Value::from("dynamic"))));
    // What the log holds is not at its place in the file.
    assert_eq!(image.disk.extent_at(0).unwrap().host, None);
    let (ours, before) = (read_through(log.file.clone()).unwrap(), read_through(clean).unwrap());
    assert!(ours[..MIB] == before[2 * MIB..3 * MIB] && ours[2 * MIB..3 * MIB] == before[..MIB]);
    assert!(ours == as_qemu_reads(&log.file));
}

#[test]
fn an_entry_may_have_many_descriptors_and_go_over_the_end_of_the_log() {
    let clean = sample();
    let payload = payload(&clean);
    let patches: Vec<Patch> = (0..400usize)
        .map(|n| match n % 4 {
            0 => Patch::Data { start: payload + n * SECTOR, sector: noise(SECTOR, n as u64) },
            _ => Patch::Zeros { start: payload + n * SECTOR, len: SECTOR },
        })
        .collect();
    let mut model = clean.clone();
    for patch in &patches {
        patch.apply(&mut model);
    }
    for at in [0, 200, 254, 255] {
        let mut log = Log::open(clean.clone(), at * SECTOR);
        log.write(None, &patches);
        assert!(read_through(log.file).unwrap() == read_through(model.clone()).unwrap(), "{at}");
    }
}

/// The sequence is that in which the tail of its last entry is (MS-VHDX, 2.3.2), wherever the ring ends.
///
/// qemu (7.2 to 10) looks for it from the first sector of the log on, and asks for no tail. It finds the entries there first,
/// takes them for a sequence of their own, and prefers it to the whole one, as that begins with a lower number. So it leaves out
/// what comes before the end of the ring.
#[test]
fn entries_that_go_on_at_the_start_of_the_log_are_replayed_from_their_tail() {
    let clean = sample();
    let payload = payload(&clean);
    let patch = |n: usize| Patch::Data { start: payload + n * SECTOR, sector: noise(SECTOR, n as u64) };
    let (first, second, third) = ((0..38).map(patch).collect::<Vec<_>>(), [patch(38)], [patch(39)]);
    let mut model = clean.clone();
    for patch in first.iter().chain(&second).chain(&third) {
        patch.apply(&mut model);
    }
    // The first has 39 sectors of the 256, and the second two: one of them ends with the ring, or goes over its end.
    for at in [215, 216, 217, 218, 255] {
        let mut log = Log::open(clean.clone(), at * SECTOR);
        let tail = log.write(None, &first);
        log.write(Some(tail), &second);
        let begun = log.write(Some(tail), &third);
        assert!(begun < tail);
        assert!(read_through(log.file).unwrap() == read_through(model.clone()).unwrap(), "{at}");
    }
}

/// qemu is stopped by an error between its write of the log and that of the BAT.
#[test]
fn a_log_that_qemu_left_behind_is_replayed_as_qemu_replays_it() {
    let dir = temp_dir();
    let image = dir.path().join("image");
    for options in ["block_size=1M", "block_size=2M,block_state_zero=off"] {
        std::fs::write(&image, make(options, "16M")).unwrap();
        let bat = region(&std::fs::read(&image).unwrap(), &BAT_REGION).start;
        let file = format!(
            "driver=vhdx,file.driver=blkdebug,file.image.driver=file,file.image.filename={},\
             file.inject-error.0.event=none,file.inject-error.0.iotype=write,file.inject-error.0.sector={}",
            path(&image),
            bat / 512
        );
        let output =
            Command::new("qemu-io").args(["-c", "write -P 9 4M 1M", "--image-opts", &file]).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(text.contains("Input/output error"), "{text}{}", String::from_utf8_lossy(&output.stderr));
        assert!(!qemu_opens(&image), "qemu left no log behind");
        let bytes = std::fs::read(&image).unwrap();
        let ours = read_through(bytes.clone()).unwrap();
        assert!(ours[4 * MIB..5 * MIB].iter().all(|&b| b == 9));
        assert!(ours == as_qemu_reads(&bytes));
        // Only read.
        assert!(bytes == std::fs::read(&image).unwrap());
        let raw = dir.path().join("raw");
        crate::common::to_raw(&image, &raw, &Default::default()).unwrap();
        assert!(ours == std::fs::read(&raw).unwrap());
    }
}

#[test]
fn a_log_grows_the_file_it_was_written_for() {
    let clean = sample();
    let end = clean.len() as u64;
    let mut log = Log::open(clean.clone(), 0);
    log.sequence += 1;
    // Block 4 is to lie behind the end; one sector of it is in the log too.
    let patches = [
        bat_sector(&clean, &[(4, end | 6)]),
        Patch::Data { start: clean.len() + 5 * SECTOR, sector: vec![3; SECTOR] },
    ];
    let entry = entry(log.sequence, 0, (end, end + MIB as u64), &patches);
    log.put(&entry);
    let ours = read_through(log.file).unwrap();
    let mut expected = read_through(clean).unwrap();
    expected[4 * MIB + 5 * SECTOR..4 * MIB + 6 * SECTOR].fill(3);
    assert!(ours == expected);
}

#[test]
fn a_file_shorter_than_its_log_knows_is_refused() {
    let clean = sample();
    let mut log = Log::open(clean.clone(), 0);
    log.sequence += 1;
    let end = clean.len() as u64;
    let entry = entry(log.sequence, 0, (end + 1, end + 1), &[]);
    log.put(&entry);
    assert_refused(log.file, ErrorKind::Corrupt, "cut short");
}

#[test]
fn a_dirty_file_without_a_valid_sequence_is_refused() {
    // Nothing at all.
    assert_refused(Log::open(sample(), 0).file, ErrorKind::Corrupt, "no valid sequence");
    // Entries of another day.
    let mut log = Log::open(sample(), 0);
    log.write(None, &[]);
    let mut other = log.file.clone();
    set_in_headers(&mut other, 48, b"the log of later");
    assert_refused(other, ErrorKind::Corrupt, "no valid sequence");
    // The entry where the last one's tail is was overwritten.
    let mut log = Log::open(sample(), 0);
    let first = log.write(None, &[Patch::Zeros { start: 8 * MIB, len: SECTOR }]);
    log.write(Some(first), &[]);
    let start = log.start;
    log.file[start + 80] ^= 1;
    assert_refused(log.file, ErrorKind::Corrupt, "no valid sequence");
}

#[test]
fn an_entry_that_is_not_valid_ends_the_sequence() {
    let clean = sample();
    let bat = region(&clean, &BAT_REGION).start;
    let before = read_through(clean.clone()).unwrap();
    let gone = Patch::Zeros { start: bat, len: SECTOR };
    let zeros = |len: usize| vec![Patch::Zeros { start: bat, len }];
    let half = Patch::Data { start: bat, sector: vec![0; SECTOR] };
    type Change = fn(&mut Vec<u8>);
    let changes: [(&str, Vec<Patch>, Change); 9] = [
        ("tail", zeros(SECTOR), |e| e[12] = 1),
        ("tail beyond the log", zeros(SECTOR), |e| e[12..16].copy_from_slice(&(64u32 << 20).to_le_bytes())),
        ("length", zeros(SECTOR), |e| e[8..12].copy_from_slice(&u32::MAX.to_le_bytes())),
        ("no length", zeros(SECTOR), |e| e[8..12].fill(0)),
        ("descriptors", zeros(SECTOR), |e| e[24..28].copy_from_slice(&u32::MAX.to_le_bytes())),
        ("descriptor's number", zeros(SECTOR), |e| e[64 + 24] ^= 1),
        ("place in the file", zeros(SECTOR), |e| e[64 + 16] ^= 1),
        ("length of zeros", zeros(SECTOR), |e| e[64 + 8] ^= 1),
        ("data sector's number", vec![half], |e| *e.last_mut().unwrap() ^= 1),
    ];
    for (name, patches, change) in changes {
        let mut log = Log::open(clean.clone(), 3 * SECTOR);
        let tail = log.write(None, &[]);
        log.sequence += 1;
        let len = clean.len() as u64;
        let mut bad = entry(log.sequence, tail, (len, len), &patches);
        change(&mut bad);
        let sound_length = bad.len() as u32 == u32::from_le_bytes(bad[8..12].try_into().unwrap());
        if sound_length {
            seal(&mut bad);
        }
        log.put(&bad);
        assert!(read_through(log.file).unwrap() == before, "{name}");
    }
    // The same, sound, does change the disk.
    let mut log = Log::open(clean, 3 * SECTOR);
    let tail = log.write(None, &[]);
    log.write(Some(tail), &[gone]);
    assert!(read_through(log.file).unwrap() != before);
}

#[test]
fn a_log_that_writes_over_headers_or_itself_is_refused() {
    for (start, len) in
        [(0, SECTOR), (64 << 10, SECTOR), (188 << 10, 8192), (MIB, SECTOR), (MIB + (200 << 10), MIB)]
    {
        let mut log = Log::open(sample(), 0);
        log.write(None, &[Patch::Zeros { start, len }]);
        assert_refused(log.file, ErrorKind::Corrupt, "over the headers or the log");
    }
}

#[test]
fn zeros_without_end_are_refused() {
    for start in [8 * MIB, usize::MAX - 4095] {
        let mut log = Log::open(sample(), 0);
        log.write(None, &[Patch::Zeros { start, len: usize::MAX - 4095 }]);
        assert_refused(log.file, ErrorKind::Corrupt, "beyond any file");
    }
    // As far as numbers go: the account of such a file does not fit.
    let mut log = Log::open(sample(), 0);
    log.write(None, &[Patch::Zeros { start: 8 * MIB, len: 1 << 62 }]);
    assert_refused(log.file, ErrorKind::Limit, "too large");
}

/// A few KiB of file that claim much: what they add reads as a hole, and costs nothing.
#[test]
fn blocks_that_only_the_log_brings_are_holes() {
    let clean = make("block_size=256M", "4T");
    let bat = region(&clean, &BAT_REGION).start;
    let end = (clean.len() as u64).next_multiple_of(1 << 20);
    let mut log = Log::open(clean.clone(), 0);
    log.sequence += 1;
    let sectors = (0..16usize).map(|n| {
        let entries = (0..512u64).map(|i| (end + (n as u64 * 512 + i) * (256 << 20)) | 6);
        Patch::Data { start: bat + n * SECTOR, sector: entries.flat_map(u64::to_le_bytes).collect() }
    });
    let entry = entry(log.sequence, 0, (0, end + (4 << 40)), &sectors.collect::<Vec<_>>());
    log.put(&entry);
    let disk = format::open(Arc::new(Bytes(log.file)), &Limits::default()).unwrap().disk;
    let mut at = 0;
    let mut extents = 0;
    while at < disk.virtual_size() {
        let extent = disk.extent_at(at).unwrap();
        assert!(!extent.is_data(), "{extent:?}");
        at = extent.end();
        extents += 1;
    }
    assert!(extents < 20_000, "{extents}");
}

#[test]
fn a_log_too_large_to_be_replayed_is_told() {
    let limits = Limits { table_bytes_max: 1 << 20, ..Limits::default() };
    let mut log = Log::open(sample(), 0);
    log.write(None, &[]);
    let error = failure(format::open(Arc::new(Bytes(log.file)), &limits));
    assert_eq!(error.kind(), ErrorKind::Limit);
    assert!(error.to_string().contains("qemu-img check"), "{error}");
}

#[test]
fn entries_nested_in_each_other_end_soon() {
    let file = make("block_size=1M,log_size=8M", "8M");
    let mut log = Log::open(file, 0);
    // Every sector begins an entry that goes to the end of the log, and each has the right checksum.
    let sectors = log.len / SECTOR;
    for first in (0..sectors).rev() {
        let at = log.start + first * SECTOR;
        let len = (sectors - first) * SECTOR;
        let mut header = entry(1 + first as u64, 0, (0, 0), &[]);
        header[8..12].copy_from_slice(&(len as u32).to_le_bytes());
        log.file[at..at + SECTOR].copy_from_slice(&header);
        // Sealing all of them is what takes long here.
        if first % 64 == 0 {
            seal(&mut log.file[at..at + len]);
        }
    }
    let begun = std::time::Instant::now();
    assert_refused(log.file, ErrorKind::Corrupt, "overlap each other");
    assert!(begun.elapsed().as_secs() < 10);
}
