//! Makes the checksums of a damaged file right, so that the damage is seen by what comes after them. Each
//! tells whether they were wrong.

/// VHD: the footer at the end, its copy at the beginning, and the header of a dynamic disk.
pub fn vpc(file: &mut [u8]) -> bool {
    let mut changed = false;
    const FOOTER_BYTES: usize = 512;
    const HEADER_BYTES: usize = 1024;
    let mut header = None;
    for footer in [Some(0), file.len().checked_sub(FOOTER_BYTES)].into_iter().flatten() {
        if let Some(footer) = file.get_mut(footer..footer + FOOTER_BYTES)
            && footer.starts_with(b"conectix")
        {
            changed |= complement(footer, 64);
            header = header.or_else(|| footer[16..].first_chunk().map(|at| u64::from_be_bytes(*at)));
        }
    }
    let header = header.and_then(|at| usize::try_from(at).ok());
    if let Some(header) = header.and_then(|at| file.get_mut(at..)?.get_mut(..HEADER_BYTES)) {
        changed |= complement(header, 36);
    }
    changed
}

/// The ones' complement of the sum of all bytes but the four at `at`, which take it.
fn complement(bytes: &mut [u8], at: usize) -> bool {
    let before = bytes[at..at + 4].to_vec();
    bytes[at..at + 4].fill(0);
    let sum = bytes.iter().fold(0u32, |sum, &byte| sum.wrapping_add(byte.into()));
    bytes[at..at + 4].copy_from_slice(&(!sum).to_be_bytes());
    before != (!sum).to_be_bytes()
}

/// VHDX: both headers, both region tables, and every entry of the log that a header names.
pub fn vhdx(file: &mut [u8]) -> bool {
    let mut changed = false;
    const HEADERS: [usize; 2] = [64 << 10, 128 << 10];
    const REGION_TABLES: [usize; 2] = [192 << 10, 256 << 10];
    const LOG_SECTOR_BYTES: usize = 4096;
    const LOG_ENTRIES_MAX: usize = 256;
    let mut logs = Vec::new();
    for at in HEADERS {
        if let Some(header) = file.get_mut(at..at + 4096) {
            changed |= crc32c(header);
            let number = |at: usize| header[at..].first_chunk().map_or(0, |n| u64::from_le_bytes(*n));
            let log_bytes = number(68) & u64::from(u32::MAX);
            logs.extend(usize::try_from(number(72)).ok().zip(usize::try_from(log_bytes).ok()));
        }
    }
    for at in REGION_TABLES {
        if let Some(table) = file.get_mut(at..at + (64 << 10)) {
            changed |= crc32c(table);
        }
    }
    for (at, bytes) in logs {
        let Some(log) = file.get_mut(at..).map(|rest| rest.split_at_mut(bytes.min(rest.len())).0) else {
            continue;
        };
        let mut entries = 0;
        for start in (0..log.len()).step_by(LOG_SECTOR_BYTES) {
            if !log[start..].starts_with(b"loge") || entries == LOG_ENTRIES_MAX {
                continue;
            }
            entries += 1;
            let len = log.get(start + 8..).and_then(<[u8]>::first_chunk).map_or(0, |n| u32::from_le_bytes(*n))
                as usize;
            // An entry that goes round the end of the log is left alone.
            if let Some(entry) = log[start..].get_mut(..len).filter(|entry| entry.len() >= 64) {
                changed |= crc32c(entry);
            }
        }
    }
    changed
}

/// The CRC-32C of all bytes but the four at 4, which take it.
fn crc32c(bytes: &mut [u8]) -> bool {
    let before = bytes[4..8].to_vec();
    bytes[4..8].fill(0);
    let crc = crc32c::crc32c(bytes).to_le_bytes();
    bytes[4..8].copy_from_slice(&crc);
    before != crc
}

/// tar: the header of every member.
pub fn tar(file: &mut [u8]) -> bool {
    let mut changed = false;
    let mut at = 0;
    while let Some(header) = file.get_mut(at..at + 512) {
        let magic = header[257..].starts_with(b"ustar");
        if magic {
            let before = header[148..156].to_vec();
            header[148..156].fill(b' ');
            let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
            header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            changed |= before != header[148..156];
        }
        let digits = header[124..136].iter().take_while(|byte| matches!(byte, b'0'..=b'7'));
        let bytes = digits.fold(0usize, |n, digit| n * 8 + usize::from(digit - b'0'));
        at += 512 + if magic { bytes.next_multiple_of(512) } else { 0 };
    }
    changed
}
