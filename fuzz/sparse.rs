//! Inputs for formats whose smallest file is megabytes of zeros: the parts that are not zero, and where they go.
//!
//! | bytes | |
//! | --- | --- |
//! | 8 | `dvcrspar` |
//! | 4 | length of the file, in sectors of 512 bytes |
//! | 4 | bytes that the last sector lacks |
//! | each part: 4 | where it goes, in sectors |
//! | 4 | its length in bytes, a multiple of 8 |
//! | | its bytes |
//!
//! All numbers are little-endian, and words of a file are as aligned here as there. An input without these first bytes is the file itself.

const MAGIC: &[u8; 8] = b"dvcrspar";

/// Longest file, sectors: 64 MiB.
const SECTORS_MAX: u32 = 64 << 11;

/// Longest part, bytes.
const PART_BYTES_MAX: usize = 32 << 10;

/// Makes the file of an input. A part that does not fit is cut off; anything is an input.
pub fn expand(input: &[u8]) -> Vec<u8> {
    let parts = || {
        let rest = input.strip_prefix(MAGIC)?;
        let (sectors, rest) = rest.split_first_chunk::<4>()?;
        let (lacking, rest) = rest.split_first_chunk::<4>()?;
        let len = u32::from_le_bytes(*sectors).min(SECTORS_MAX) as usize * 512;
        Some((len.saturating_sub(u32::from_le_bytes(*lacking) as usize), rest))
    };
    let Some((len, mut rest)) = parts() else { return input.to_vec() };
    let mut file = vec![0; len];
    while let Some((sector, after)) = rest.split_first_chunk::<4>()
        && let Some((bytes, after)) = after.split_first_chunk::<4>()
    {
        let at = u32::from_le_bytes(*sector) as usize * 512;
        let (part, after) = after.split_at(after.len().min(u32::from_le_bytes(*bytes) as usize));
        let room = file.get_mut(at..).unwrap_or_default();
        let fits = part.len().min(room.len());
        room[..fits].copy_from_slice(&part[..fits]);
        rest = after;
    }
    file
}

/// Makes the input for a file; zeros at the end of a sector are left out.
pub fn squeeze(file: &[u8]) -> Vec<u8> {
    let lacking = file.len().next_multiple_of(512) - file.len();
    let mut input = MAGIC.to_vec();
    input.extend((file.len().div_ceil(512) as u32).to_le_bytes());
    input.extend((lacking as u32).to_le_bytes());
    let sectors: Vec<&[u8]> = file.chunks(512).collect();
    let mut first = 0;
    while first < sectors.len() {
        let is_zero = |sector: &&[u8]| sector.iter().all(|&b| b == 0);
        let run = sectors[first..].iter().take(PART_BYTES_MAX / 512).take_while(|s| !is_zero(s)).count();
        if run > 0 {
            let part = sectors[first..first + run].concat();
            let used = part.iter().rposition(|&b| b != 0).map_or(0, |last| last + 1);
            let part = &part[..used.next_multiple_of(8).min(part.len())];
            input.extend((first as u32).to_le_bytes());
            input.extend((part.len() as u32).to_le_bytes());
            input.extend(part);
        }
        first += run.max(1);
    }
    input
}
