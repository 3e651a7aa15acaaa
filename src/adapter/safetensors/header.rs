//! The header of a safetensors file: from bytes to entries that are proven consistent, and back.
//!
//! A file is hostile until its header is proven. So nothing here allocates in proportion to what a number in the file
//! claims, only to the bytes that are there, and every lie has its own fault.

use super::Entry;
use crate::dtype::{self, Dtype};
use crate::error::FileFault;
use serde::de::value::StrDeserializer;
use serde::de::{self, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::ser::{SerializeMap, Serializer};
use serde::{Deserialize, Serialize};
use serde_json::error::Category;
use std::collections::{BTreeMap, BTreeSet};
use std::{fmt, mem};

/// Bytes of the header length, and what the data section is aligned to.
pub(super) const ALIGN: usize = 8;
/// The largest header that readers of the format accept.
pub(super) const MAX_HEADER: u64 = 100_000_000;
/// More axes than any framework's tensors have. Without it the shapes of a header could take four times its bytes.
const MAX_AXES: usize = 64;
/// The one name that is not a tensor.
pub(super) const METADATA: &str = "__metadata__";

type Fault<T> = std::result::Result<T, FileFault>;

/// What a header says, proven: names differ, and the entries tile the data section without gap or overlap.
#[derive(Debug, Default)]
pub(super) struct Header {
    pub metadata: BTreeMap<String, String>,
    /// In order of offset.
    pub entries: Vec<Entry>,
    /// Indices into `entries`, in order of name.
    pub by_name: Vec<usize>,
}

/// Length of the header of a file that is `size` bytes long and starts with `start`.
pub(super) fn length(start: &[u8], size: u64) -> Fault<usize> {
    let Some(field) = start.first_chunk::<ALIGN>() else { return Err(FileFault::TooShort { size }) };
    let claimed = u64::from_le_bytes(*field);
    if claimed > MAX_HEADER {
        return Err(FileFault::HeaderTooLarge { claimed, limit: MAX_HEADER });
    }
    if claimed > size - ALIGN as u64 {
        return Err(FileFault::HeaderPastEnd { claimed, size });
    }
    Ok(claimed as usize)
}

/// Reads a header that `data` bytes of data follow.
pub(super) fn parse(header: &[u8], data: u64) -> Fault<Header> {
    let text = std::str::from_utf8(header).map_err(|e| FileFault::HeaderNotUtf8 { at: e.valid_up_to() })?;
    // The format demands it; it also keeps a file from being two formats at once.
    match text.chars().next() {
        Some('{') => {}
        Some(c) => {
            return Err(FileFault::HeaderNotJson {
                why: format!("it does not start with `{{` but with `{c}`"),
            })
        }
        None => return Err(FileFault::HeaderNotJson { why: "it is empty".into() }),
    }
    let mut parser = Parser::default();
    let mut json = serde_json::Deserializer::from_str(text);
    let result = json.deserialize_map(&mut parser).and_then(|()| json.end());
    if let Err(e) = result {
        return Err(parser.fault_of(e));
    }
    let mut header =
        Header { metadata: parser.metadata.unwrap_or_default(), entries: parser.entries, by_name: vec![] };
    header.index()?;
    header.check_layout(data)?;
    Ok(header)
}

impl Header {
    pub fn get(&self, name: &str) -> Option<&Entry> {
        let at = self.by_name.binary_search_by(|&i| self.entries[i].name.as_str().cmp(name)).ok()?;
        Some(&self.entries[self.by_name[at]])
    }

    /// Sorts by offset and by name; finds names that stand twice.
    fn index(&mut self) -> Fault<()> {
        // Stable: empty tensors at one offset stay in the order of the header.
        self.entries.sort_by_key(|e| (e.begin, e.end));
        let entries = &self.entries;
        self.by_name = (0..entries.len()).collect();
        self.by_name.sort_unstable_by_key(|&i| entries[i].name.as_str());
        match self.by_name.windows(2).find(|w| entries[w[0]].name == entries[w[1]].name) {
            Some(w) => Err(FileFault::DuplicateKey { key: entries[w[0]].name.clone() }),
            None => Ok(()),
        }
    }

    /// Proves that every tensor has the bytes that it needs and every byte has one tensor.
    fn check_layout(&self, data: u64) -> Fault<()> {
        self.entries.iter().try_for_each(|entry| check_entry(entry, data))?;
        let mut end = 0;
        for (i, entry) in self.entries.iter().enumerate() {
            if entry.begin < end {
                let first = self.entries[i - 1].name.clone();
                return Err(FileFault::Overlap { first, second: entry.name.clone() });
            }
            if entry.begin > end {
                return Err(FileFault::Gap { tensor: entry.name.clone(), bytes: entry.begin - end });
            }
            end = entry.end;
        }
        match data - end {
            0 => Ok(()),
            bytes => Err(FileFault::TrailingBytes { bytes }),
        }
    }
}

fn check_entry(entry: &Entry, data: u64) -> Fault<()> {
    let &Entry { begin, end, .. } = entry;
    let tensor = || entry.name.clone();
    if begin > end {
        return Err(FileFault::OffsetsReversed { tensor: tensor(), begin, end });
    }
    if end > data {
        return Err(FileFault::PastEnd { tensor: tensor(), end, have: data });
    }
    let need = need(entry.dtype, &entry.shape).map_err(|e| match e {
        Uncountable::PartialByte => FileFault::PartialByte { tensor: tensor() },
        Uncountable::Overflow => FileFault::SizeOverflow { tensor: tensor(), shape: entry.shape.clone() },
    })?;
    let got = end - begin;
    if need != got {
        return Err(FileFault::SizeMismatch { tensor: tensor(), need, got });
    }
    Ok(())
}

/// Why a tensor has no number of bytes.
pub(super) enum Uncountable {
    PartialByte,
    Overflow,
}

/// Bytes that a tensor needs.
pub(super) fn need(dtype: Dtype, shape: &[usize]) -> Result<u64, Uncountable> {
    match (dtype::byte_len(dtype, shape), dtype::element_count(shape)) {
        (Some(bytes), _) => Ok(bytes as u64),
        (None, Some(n)) if n <= usize::MAX / dtype.bitsize() => Err(Uncountable::PartialByte),
        _ => Err(Uncountable::Overflow),
    }
}

/// Where the parser stands: a value of the wrong type is another fault in each place.
#[derive(Default)]
enum Place {
    #[default]
    Top,
    Metadata,
    Tensor(String),
}

#[derive(Default)]
struct Parser {
    place: Place,
    /// A lie that is not one of JSON. Set before the visitor gives up with an error that nobody reads.
    fault: Option<FileFault>,
    metadata: Option<BTreeMap<String, String>>,
    entries: Vec<Entry>,
}

impl Parser {
    fn lie<T, E: de::Error>(&mut self, fault: FileFault) -> Result<T, E> {
        self.fault = Some(fault);
        Err(E::custom(""))
    }

    fn fault_of(self, e: serde_json::Error) -> FileFault {
        let why = e.to_string();
        match (self.fault, e.classify(), self.place) {
            (Some(fault), ..) => fault,
            (None, Category::Data, Place::Metadata) => FileFault::BadMetadata { why },
            (None, Category::Data, Place::Tensor(tensor)) => FileFault::BadEntry { tensor, why },
            _ => FileFault::HeaderNotJson { why },
        }
    }
}

impl<'de> Visitor<'de> for &mut Parser {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(name) = map.next_key::<String>()? {
            if name == METADATA {
                if self.metadata.is_some() {
                    return self.lie(FileFault::DuplicateKey { key: name });
                }
                self.place = Place::Metadata;
                self.metadata = Some(map.next_value_seed(Texts(self))?);
            } else {
                self.place = Place::Tensor(name);
                let Fields { dtype, shape, begin, end } = map.next_value_seed(EntryFields(self))?;
                if let Place::Tensor(name) = mem::take(&mut self.place) {
                    self.entries.push(Entry { name, dtype, shape, begin, end });
                }
            }
            self.place = Place::Top;
        }
        Ok(())
    }
}

/// `__metadata__`: a map of text to text.
struct Texts<'a>(&'a mut Parser);

impl<'de> DeserializeSeed<'de> for Texts<'_> {
    type Value = BTreeMap<String, String>;

    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<Self::Value, D::Error> {
        d.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Texts<'_> {
    type Value = BTreeMap<String, String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map of text to text")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut texts = BTreeMap::new();
        while let Some(key) = map.next_key::<String>()? {
            if texts.contains_key(&key) {
                return self.0.lie(FileFault::DuplicateKey { key: format!("{METADATA}.{key}") });
            }
            texts.insert(key, map.next_value()?);
        }
        Ok(texts)
    }
}

/// One tensor's entry.
struct EntryFields<'a>(&'a mut Parser);

struct Fields {
    dtype: Dtype,
    shape: Vec<usize>,
    begin: u64,
    end: u64,
}

impl EntryFields<'_> {
    fn tensor(&self) -> String {
        match &self.0.place {
            Place::Tensor(name) => name.clone(),
            _ => String::new(),
        }
    }
}

impl<'de> DeserializeSeed<'de> for EntryFields<'_> {
    type Value = Fields;

    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<Fields, D::Error> {
        d.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for EntryFields<'_> {
    type Value = Fields;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map of dtype, shape and data_offsets")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
        let (mut dtype, mut shape, mut offsets) = (None, None, None);
        // Fields that a later version of the format may add are skipped, as other readers do, but not if they lie, too.
        let mut unknown = BTreeSet::new();
        while let Some(field) = map.next_key::<String>()? {
            let seen = match field.as_str() {
                "dtype" => dtype.replace(map.next_value::<String>()?).is_some(),
                "shape" => shape.replace(map.next_value_seed(Numbers { max: MAX_AXES })?).is_some(),
                "data_offsets" => offsets.replace(map.next_value_seed(Numbers { max: 2 })?).is_some(),
                _ => {
                    map.next_value::<IgnoredAny>()?;
                    !unknown.insert(field.clone())
                }
            };
            if seen {
                let key = format!("{}.{field}", self.tensor());
                return self.0.lie(FileFault::DuplicateKey { key });
            }
        }
        let dtype = dtype.ok_or_else(|| de::Error::missing_field("dtype"))?;
        let shape = shape.ok_or_else(|| de::Error::missing_field("shape"))?;
        let offsets = offsets.ok_or_else(|| de::Error::missing_field("data_offsets"))?;
        let &[begin, end] = offsets.as_slice() else {
            return Err(de::Error::invalid_length(offsets.len(), &"two data_offsets"));
        };
        match Dtype::deserialize(StrDeserializer::<de::value::Error>::new(&dtype)) {
            Ok(dtype) => Ok(Fields { dtype, shape, begin: begin as u64, end: end as u64 }),
            Err(_) => {
                let tensor = self.tensor();
                self.0.lie(FileFault::UnknownDtype { tensor, dtype })
            }
        }
    }
}

/// A list of at most `max` non-negative integers.
struct Numbers {
    max: usize,
}

impl<'de> DeserializeSeed<'de> for Numbers {
    type Value = Vec<usize>;

    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<Vec<usize>, D::Error> {
        d.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Numbers {
    type Value = Vec<usize>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a list of at most {} integers", self.max)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<usize>, A::Error> {
        let mut numbers = Vec::new();
        while let Some(number) = list.next_element()? {
            if numbers.len() == self.max {
                return Err(de::Error::invalid_length(self.max + 1, &self));
            }
            numbers.push(number);
        }
        // A header holds one list per tensor; what growing left over would add up.
        numbers.shrink_to_fit();
        Ok(numbers)
    }
}

/// One tensor as it is written.
#[derive(Serialize)]
pub(super) struct Row<'a> {
    #[serde(skip)]
    pub name: &'a str,
    pub dtype: Dtype,
    pub shape: &'a [usize],
    pub data_offsets: [u64; 2],
}

/// The length field and the header: metadata first, its keys sorted, tensors as they come, padded so that the data
/// starts aligned. Equal input gives equal bytes.
pub(super) fn encode(rows: &[Row], metadata: &BTreeMap<String, String>) -> serde_json::Result<Vec<u8>> {
    let mut bytes = vec![0; ALIGN];
    let mut json = serde_json::Serializer::new(&mut bytes);
    let mut map = json.serialize_map(None)?;
    if !metadata.is_empty() {
        map.serialize_entry(METADATA, metadata)?;
    }
    for row in rows {
        map.serialize_entry(row.name, row)?;
    }
    map.end()?;
    bytes.resize(bytes.len().next_multiple_of(ALIGN), b' ');
    let length = (bytes.len() - ALIGN) as u64;
    bytes[..ALIGN].copy_from_slice(&length.to_le_bytes());
    Ok(bytes)
}
