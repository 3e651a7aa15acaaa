//! What `torch.save` wrote before torch 1.6 and still writes on request: five pickles in a row (a magic number, the
//! protocol, facts of the machine, the object, the keys of its storages), then the storages in the order of the keys.

use super::heap::Value;
use super::machine::{self, Loaded};
use super::{bad, Fault};
use crate::dtype;
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

/// The magic number, as the opcode that pushes ten bytes of integer, and the end of its pickle.
const MAGIC: &[u8] = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.";
const PROTOCOL: i64 = 1001;

/// Where the second pickle begins, if these bytes begin with the first.
pub(super) fn after_magic(head: &[u8]) -> Option<usize> {
    let at = match head {
        [0x80, 2 | 3, ..] => 2,
        // Protocols 4 and 5 put the pickle into a frame of eight bytes of length.
        [0x80, 4 | 5, 0x95, ..] => 11,
        _ => return None,
    };
    head.get(at..)?.starts_with(MAGIC).then_some(at + MAGIC.len())
}

/// The object and where each of its storages lies.
pub(super) fn read(bytes: &[u8], start: usize) -> Fault<(Loaded, BTreeMap<String, Range<usize>>)> {
    let protocol = machine::load(bytes, start)?;
    if protocol.top != Value::Int(PROTOCOL) {
        return bad(format!("is not of torch's protocol {PROTOCOL}"));
    }
    let system = machine::load(bytes, protocol.end)?;
    if system.heap.get(system.top, "little_endian") != Some(Value::Bool(true)) {
        return bad("was written by a big-endian machine, or does not say by which");
    }
    let object = machine::load(bytes, system.end)?;
    let keys = machine::load(bytes, object.end)?;
    let types: HashMap<&str, _> =
        object.heap.storages.iter().filter_map(|s| Some((object.heap.text(s.key)?, s.dtype))).collect();
    let mut storages = BTreeMap::new();
    let mut at = keys.end;
    for &key in keys.heap.items(keys.top).unwrap_or(&[]) {
        let Some((key, &dtype)) = keys.heap.text(key).and_then(|key| types.get_key_value(key)) else {
            return bad("lists a storage that no tensor uses");
        };
        let range = bytes
            .get(at..)
            .and_then(|rest| rest.first_chunk())
            .and_then(|count| usize::try_from(u64::from_le_bytes(*count)).ok())
            .and_then(|count| dtype::byte_len(dtype, &[count]))
            .and_then(|len| Some(at.checked_add(8)?..at.checked_add(8)?.checked_add(len)?))
            .filter(|range| range.end <= bytes.len());
        let Some(range) = range else {
            return bad(format!("storage `{key}` ends after the file: cut off"));
        };
        at = range.end;
        if storages.insert((*key).to_owned(), range).is_some() {
            return bad(format!("lists storage `{key}` twice"));
        }
    }
    match bytes.len() - at {
        0 => Ok((object, storages)),
        more => bad(format!("{more} bytes after the last storage belong to none")),
    }
}
