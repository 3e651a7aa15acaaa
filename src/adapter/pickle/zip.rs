//! The zip archive that `torch.save` writes: stored entries, found through the central directory.
//!
//! Only what that needs: no compression, no encryption, one disk; zip64 for files past 4 GiB. Every entry is proven to
//! lie inside the file, apart from all others, before one byte of it is used.

use super::{bad, Fault};
use std::collections::BTreeMap;
use std::ops::Range;

/// What the first entry of an archive starts with.
pub(super) const LOCAL: &[u8] = b"PK\x03\x04";
const CENTRAL: &[u8] = b"PK\x01\x02";
const END: &[u8] = b"PK\x05\x06";
const END64: &[u8] = b"PK\x06\x06";
const LOCATOR64: &[u8] = b"PK\x06\x07";
/// Sizes of the fixed part of each record.
const LOCAL_LEN: usize = 30;
const CENTRAL_LEN: usize = 46;
const END_LEN: usize = 22;
const LOCATOR64_LEN: usize = 20;

/// Where each entry's bytes lie, by name.
pub(super) type Entries = BTreeMap<String, Range<usize>>;

/// Little-endian fields at offsets from the start of a record; `None` past its end.
#[derive(Clone, Copy)]
struct Record<'a>(&'a [u8]);

impl<'a> Record<'a> {
    /// The record with this signature at `at`.
    fn at(bytes: &'a [u8], at: usize, signature: &[u8]) -> Option<Self> {
        bytes.get(at..).filter(|rest| rest.starts_with(signature)).map(Record)
    }

    fn u16(self, at: usize) -> Option<u16> {
        Some(u16::from_le_bytes(*self.0.get(at..)?.first_chunk()?))
    }

    fn u32(self, at: usize) -> Option<u32> {
        Some(u32::from_le_bytes(*self.0.get(at..)?.first_chunk()?))
    }

    /// Eight bytes that must count something in this file, so that `usize` holds them.
    fn u64(self, at: usize) -> Option<usize> {
        usize::try_from(u64::from_le_bytes(*self.0.get(at..)?.first_chunk()?)).ok()
    }

    fn part(self, at: usize, len: usize) -> Option<&'a [u8]> {
        self.0.get(at..at.checked_add(len)?)
    }
}

/// Reads the central directory and proves every entry.
pub(super) fn entries(bytes: &[u8]) -> Fault<Entries> {
    let Some((directory, count)) = directory(bytes) else {
        return bad("is a zip archive without its directory: cut off");
    };
    let mut entries = Entries::new();
    let mut spans = Vec::new();
    let mut at = directory.start;
    for i in 0..count {
        let Some(entry) = bytes.get(at..directory.end).and_then(Central::read) else {
            return bad(format!("the zip directory ends before its entry {i} of {count}"));
        };
        let name = entry.name.as_str();
        if entry.encrypted {
            return bad(format!("zip entry `{name}` is encrypted"));
        }
        if entry.method != 0 {
            return bad(format!(
                "zip entry `{name}` is compressed (method {}); torch.save stores without compression",
                entry.method
            ));
        }
        if entry.packed != entry.size {
            return bad(format!(
                "zip entry `{name}` is stored, but claims {} bytes in the file and {} outside",
                entry.packed, entry.size
            ));
        }
        let Some(data) = data(bytes, &entry).filter(|data| data.end <= directory.start) else {
            return bad(format!(
                "zip entry `{name}` does not lie inside the file, or not where the directory says"
            ));
        };
        spans.push((entry.offset, data.end, name.to_owned()));
        at += entry.len;
        if entries.insert(entry.name.clone(), data).is_some() {
            return bad(format!("the zip archive names `{}` twice", entry.name));
        }
    }
    if at != directory.end {
        return bad(format!("the zip directory holds more than the {count} entries that it counts"));
    }
    spans.sort();
    for pair in spans.windows(2) {
        if let [(_, end, first), (begin, _, second)] = pair {
            if begin < end {
                return bad(format!("zip entries `{first}` and `{second}` share bytes"));
            }
        }
    }
    Ok(entries)
}

/// Where the central directory lies and how many entries it counts.
fn directory(bytes: &[u8]) -> Option<(Range<usize>, usize)> {
    // The end record is the last thing in the file, but for a comment of at most 65535 bytes.
    let last = bytes.len().checked_sub(END_LEN)?;
    let first = last.saturating_sub(usize::from(u16::MAX));
    let (at, end) = (first..=last).rev().find_map(|at| {
        let end = Record::at(bytes, at, END)?;
        (END_LEN.checked_add(end.u16(20)?.into())? == end.0.len()).then_some((at, end))
    })?;
    let (count, size, offset) = (end.u16(10)?, end.u32(12)?, end.u32(16)?);
    let mut found = (usize::from(count), size as usize, offset as usize);
    let mut limit = at;
    if count == u16::MAX || size == u32::MAX || offset == u32::MAX {
        let locator = Record::at(bytes, at.checked_sub(LOCATOR64_LEN)?, LOCATOR64)?;
        limit = locator.u64(8)?;
        let end = Record::at(bytes.get(..at)?, limit, END64)?;
        // A field that fits is the truth; one of all ones stands in the longer record.
        if count == u16::MAX {
            found.0 = end.u64(32)?;
        }
        if size == u32::MAX {
            found.1 = end.u64(40)?;
        }
        if offset == u32::MAX {
            found.2 = end.u64(48)?;
        }
    }
    let (count, size, offset) = found;
    let stop = offset.checked_add(size).filter(|&stop| stop <= limit)?;
    Some((offset..stop, count))
}

/// One entry of the central directory.
struct Central {
    name: String,
    encrypted: bool,
    method: u16,
    packed: usize,
    size: usize,
    /// Where its local header lies.
    offset: usize,
    /// Bytes of this record.
    len: usize,
}

impl Central {
    fn read(bytes: &[u8]) -> Option<Self> {
        let record = Record::at(bytes, 0, CENTRAL)?;
        let (name_len, extra_len, comment_len) = (record.u16(28)?, record.u16(30)?, record.u16(32)?);
        let name = record.part(CENTRAL_LEN, name_len.into())?.to_vec();
        let extra_at = CENTRAL_LEN.checked_add(name_len.into())?;
        let extra = record.part(extra_at, extra_len.into())?;
        let len = extra_at.checked_add(extra_len.into())?.checked_add(comment_len.into())?;
        record.part(0, len)?;
        let mut long = zip64(extra);
        let mut wide = |field: u32| match field {
            // The longer fields stand in the order of the short ones that they replace.
            u32::MAX => {
                let (value, rest) = long?.0.split_at_checked(8)?;
                long = Some(Record(rest));
                Record(value).u64(0)
            }
            field => Some(field as usize),
        };
        Some(Central {
            name: String::from_utf8(name).ok()?,
            encrypted: record.u16(8)? & 1 != 0,
            method: record.u16(10)?,
            size: wide(record.u32(24)?)?,
            packed: wide(record.u32(20)?)?,
            offset: wide(record.u32(42)?)?,
            len,
        })
    }
}

/// The extra field that holds what 32 bits cannot.
fn zip64(mut extra: &[u8]) -> Option<Record<'_>> {
    loop {
        let field = Record(extra);
        let (id, len) = (field.u16(0)?, field.u16(2)?);
        let content = field.part(4, len.into())?;
        if id == 1 {
            return Some(Record(content));
        }
        extra = extra.get(4..)?.get(usize::from(len)..)?;
    }
}

/// Where an entry's bytes lie, if its local header tells the same story.
fn data(bytes: &[u8], entry: &Central) -> Option<Range<usize>> {
    let local = Record::at(bytes, entry.offset, LOCAL)?;
    let (flags, method, name_len, extra_len) = (local.u16(6)?, local.u16(8)?, local.u16(26)?, local.u16(28)?);
    let same = flags & 1 == 0
        && method == entry.method
        && local.part(LOCAL_LEN, name_len.into())? == entry.name.as_bytes();
    let begin = entry.offset.checked_add(LOCAL_LEN + usize::from(name_len) + usize::from(extra_len))?;
    let end = begin.checked_add(entry.size)?;
    (same && end <= bytes.len()).then_some(begin..end)
}
