//! Adapters in files of `torch.save` (`.pt`, `.ckpt`, `.bin`), read without running what they say.
//!
//! A pickle is a program, and such files have carried malware. So the program goes through a machine (`machine`) that
//! only knows containers, numbers, text and tensors, and refuses a file that asks for anything else. Where a tensor's
//! bytes lie is read from the zip archive (`zip`) or the format before it (`legacy`) and proven here; they stay in the
//! mapped file, unless the tensor is strided and must be packed.

mod heap;
mod legacy;
mod machine;
mod zip;

use crate::adapter::safetensors;
use crate::dtype;
use crate::error::{Error, FileFault, Result};
use crate::view::Tensor;
use heap::{Heap, Value};
use machine::Loaded;
use std::any::Any;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

type Fault<T> = std::result::Result<T, FileFault>;
type Keep = Arc<dyn Any + Send + Sync>;

/// More axes than a weight has. With [`MAX_TENSORS`] it bounds what shapes take in memory.
const MAX_AXES: usize = 8;
/// More tensors than an adapter has.
const MAX_TENSORS: usize = 1 << 16;
/// Deepest nesting of dicts around the one with the tensors.
const MAX_DEPTH: usize = 16;

/// What a pickled file holds.
#[derive(Debug, Default)]
pub struct Pickled {
    /// Every tensor, in the order of the file. A number under `alpha` counts as one.
    pub tensors: Vec<(String, Tensor)>,
    /// Text that stands beside them.
    pub metadata: BTreeMap<String, String>,
}

/// Whether these bytes begin like a file of `torch.save` (a zip archive or the older format), rather than safetensors.
/// 24 bytes are enough.
pub fn is_pickle(head: &[u8]) -> bool {
    // A safetensors header of 64 MiB could begin with the archive's signature; its JSON sets it apart.
    let zip = head.starts_with(zip::LOCAL) && head.get(8) != Some(&b'{');
    zip || legacy::after_magic(head).is_some()
}

/// Maps the file and reads it. It must not be written in place while a tensor of it lives.
pub fn open(path: &Path) -> Result<Pickled> {
    let map = Arc::new(safetensors::map(path)?);
    read(&map, map.clone()).map_err(|fault| Error::File { path: path.to_owned(), fault })
}

/// Reads a file that is already in memory.
pub fn from_bytes(bytes: Vec<u8>) -> Result<Pickled> {
    let bytes = Arc::new(bytes);
    read(&bytes, bytes.clone()).map_err(|fault| Error::File { path: "<memory>".into(), fault })
}

fn bad<T>(why: impl Into<String>) -> Fault<T> {
    Err(FileFault::Pickle { why: why.into() })
}

fn read(bytes: &[u8], keep: Keep) -> Fault<Pickled> {
    let (loaded, storages) = match legacy::after_magic(bytes) {
        Some(start) => legacy::read(bytes, start)?,
        None if bytes.starts_with(zip::LOCAL) => read_zip(bytes)?,
        None => return bad("does not begin like a file of torch.save"),
    };
    let mut reader = Reader {
        bytes,
        keep,
        heap: &loaded.heap,
        storages,
        spare: bytes.len(),
        spare_text: bytes.len(),
        made: HashMap::new(),
    };
    reader.read(loaded.top)
}

/// The object of an archive and where each of its storages lies.
fn read_zip(bytes: &[u8]) -> Fault<(Loaded, BTreeMap<String, Range<usize>>)> {
    let entries = zip::entries(bytes)?;
    let mut roots = entries.keys().filter_map(|name| name.strip_suffix("/data.pkl"));
    let (Some(root), None) = (roots.next(), roots.next()) else {
        return bad("is a zip archive, but not one of torch.save: it has no data.pkl, or several");
    };
    let content = |name: &str| bytes.get(entries.get(&format!("{root}/{name}"))?.clone());
    // Files from before torch 2.1 do not say; they are little-endian.
    if content("byteorder").is_some_and(|order| order != b"little") {
        return bad("was written by a big-endian machine");
    }
    let loaded = machine::load(content("data.pkl").unwrap_or(&[]), 0)?;
    let prefix = format!("{root}/data/");
    let storages = entries
        .iter()
        .filter_map(|(name, range)| Some((name.strip_prefix(&prefix)?.to_owned(), range.clone())))
        .collect();
    Ok((loaded, storages))
}

/// From what the pickle says to tensors.
struct Reader<'a> {
    bytes: &'a [u8],
    keep: Keep,
    heap: &'a Heap,
    storages: BTreeMap<String, Range<usize>>,
    /// Bytes that packed copies may still take: all of them together no more than the file, or a small file could
    /// repeat one element until memory ends.
    spare: usize,
    /// The same for text.
    spare_text: usize,
    /// Tensors by their index on the heap: one that stands under two names is packed once.
    made: HashMap<usize, Tensor>,
}

impl Reader<'_> {
    fn read(&mut self, top: Value) -> Fault<Pickled> {
        if self.heap.pairs(top).is_none() {
            return bad("does not hold a dict of tensors");
        }
        let Some(path) = self.find(top, &mut HashSet::new(), 0)? else {
            return bad("holds no tensor under a name");
        };
        let mut out = Pickled::default();
        // Text of the inner dict goes over text of the outer ones.
        for &dict in path.iter().rev() {
            for &(key, value) in self.heap.pairs(dict).unwrap_or(&[]) {
                if let (Some(key), Some(value)) = (self.heap.text(key), self.heap.text(value)) {
                    // One text may stand under every key: all copies together no more than the file.
                    let Some(spare) = self.spare_text.checked_sub(key.len() + value.len()) else {
                        return bad("repeats more text than the file has bytes");
                    };
                    self.spare_text = spare;
                    out.metadata.insert(key.to_owned(), value.to_owned());
                }
            }
        }
        let mut names = HashSet::new();
        for &(key, value) in path.first().and_then(|&dict| self.heap.pairs(dict)).unwrap_or(&[]) {
            let Some(name) = self.heap.text(key) else {
                match value {
                    Value::Tensor(_) => return bad("holds a tensor under something else than a name"),
                    _ => continue,
                }
            };
            if !names.insert(name) {
                return Err(FileFault::DuplicateKey { key: name.to_owned() });
            }
            let is_alpha = name == "alpha" || name.ends_with(".alpha");
            let tensor = match value {
                Value::Tensor(index) => self.tensor(name, index)?,
                Value::Int(number) if is_alpha => Tensor::of_f32(vec![number as f32], &[]),
                Value::Float(number) if is_alpha => Tensor::of_f32(vec![number as f32], &[]),
                _ => continue,
            };
            if out.tensors.len() == MAX_TENSORS {
                return bad(format!("holds more than {MAX_TENSORS} tensors"));
            }
            out.tensors.push((name.to_owned(), tensor));
        }
        Ok(out)
    }

    /// The dict with the tensors and those around it, innermost first: what `state_dict` leads to, else this one, else
    /// the only one inside that has any.
    fn find(&self, dict: Value, seen: &mut HashSet<usize>, depth: usize) -> Fault<Option<Vec<Value>>> {
        let (Value::Dict(index), Some(pairs)) = (dict, self.heap.pairs(dict)) else { return Ok(None) };
        // Each dict once: one that holds itself ends, and one that many hold is not searched for each of them.
        if !seen.insert(index) {
            return Ok(None);
        }
        if depth == MAX_DEPTH {
            return bad(format!("nests dicts more than {MAX_DEPTH} deep"));
        }
        let around = |mut path: Vec<Value>| {
            path.push(dict);
            Some(path)
        };
        if let Some(inner) = self.heap.get(dict, "state_dict") {
            if let Some(path) = self.find(inner, seen, depth + 1)? {
                return Ok(around(path));
            }
        }
        if pairs.iter().any(|(_, value)| matches!(value, Value::Tensor(_))) {
            return Ok(Some(vec![dict]));
        }
        let mut found: Option<(Value, Vec<Value>)> = None;
        for &(key, value) in pairs {
            let Some(path) = self.find(value, seen, depth + 1)? else { continue };
            if let Some((first, _)) = found {
                let name = |key| self.heap.text(key).unwrap_or("(no name)").to_owned();
                let (first, second) = (name(first), name(key));
                return bad(format!(
                    "holds several dicts of tensors (`{first}`, `{second}`) and none called `state_dict`"
                ));
            }
            found = Some((key, path));
        }
        Ok(found.and_then(|(_, path)| around(path)))
    }

    fn tensor(&mut self, name: &str, index: usize) -> Fault<Tensor> {
        if let Some(tensor) = self.made.get(&index) {
            return Ok(tensor.clone());
        }
        let tensor = self.make(name, index)?;
        self.made.insert(index, tensor.clone());
        Ok(tensor)
    }

    /// Proves what the file says about a tensor.
    fn make(&mut self, name: &str, index: usize) -> Fault<Tensor> {
        let wrong = |why: String| FileFault::BadEntry { tensor: name.to_owned(), why };
        let spec = self.heap.tensor(Value::Tensor(index));
        let storage = spec.and_then(|spec| self.heap.storages.get(spec.storage));
        let (Some(spec), Some(storage)) = (spec, storage) else { return Err(wrong("has no storage".into())) };
        let Some(range) = self.heap.text(storage.key).and_then(|key| self.storages.get(key)).cloned() else {
            let key = self.heap.text(storage.key).unwrap_or_default();
            return Err(wrong(format!("its storage `{key}` is not in the file")));
        };
        let got = range.len();
        if dtype::byte_len(storage.dtype, &[storage.count]) != Some(got) {
            let (count, dtype) = (storage.count, storage.dtype);
            return Err(wrong(format!("its storage holds {got} bytes, not the {count} elements of {dtype}")));
        }
        let sizes = |value| -> Option<Vec<usize>> {
            let items = self.heap.items(value).filter(|items| items.len() <= MAX_AXES)?;
            items.iter().map(|&item| size(item)).collect()
        };
        let (Some(offset), Some(shape), Some(strides)) =
            (size(spec.offset), sizes(spec.shape), sizes(spec.strides))
        else {
            let why = format!("its shape, strides and offset are not up to {MAX_AXES} numbers from 0 on");
            return Err(wrong(why));
        };
        if shape.len() != strides.len() {
            return Err(wrong(format!("has {} axes and {} strides", shape.len(), strides.len())));
        }
        let (Some(count), Some(len), Some(item)) = (
            dtype::element_count(&shape),
            dtype::byte_len(spec.dtype, &shape),
            dtype::byte_len(spec.dtype, &[1]),
        ) else {
            return Err(FileFault::SizeOverflow { tensor: name.to_owned(), shape });
        };
        if count == 0 {
            return self.over(&range, 0, 0, spec.dtype, &shape).ok_or_else(|| wrong("cannot be made".into()));
        }
        // One past the last byte that any index reaches.
        let reach = shape.iter().zip(&strides).try_fold(offset, |reach, (&dim, &stride)| {
            reach.checked_add(stride.checked_mul(dim.saturating_sub(1))?)
        });
        let reach = reach.and_then(|last| last.checked_add(1)?.checked_mul(item)).filter(|&end| end <= got);
        if reach.is_none() {
            let why = format!(
                "shape {shape:?} with strides {strides:?} from element {offset} on reaches past its {got} bytes"
            );
            return Err(wrong(why));
        }
        let packed = shape.iter().zip(&strides).zip(crate::view::row_major(&shape));
        let tensor = if packed.into_iter().all(|((&dim, &stride), r)| dim == 1 || stride == r) {
            self.over(&range, offset * item, len, spec.dtype, &shape)
        } else {
            let Some(spare) = self.spare.checked_sub(len) else {
                return Err(wrong(format!(
                    "strides {strides:?} repeat more elements than the file has bytes"
                )));
            };
            self.spare = spare;
            let storage = self.bytes.get(range).unwrap_or(&[]);
            let bytes = Arc::new(pack(storage, offset, &shape, &strides, item));
            // SAFETY: the vector is never changed, and the tensor keeps it.
            unsafe { Tensor::of_bytes(&bytes, spec.dtype, &shape, bytes.clone()) }
        };
        tensor.ok_or_else(|| wrong("cannot be made".into()))
    }

    /// A tensor over `len` bytes of the file, `skip` bytes into `range`.
    fn over(
        &self,
        range: &Range<usize>,
        skip: usize,
        len: usize,
        dtype: dtype::Dtype,
        shape: &[usize],
    ) -> Option<Tensor> {
        let bytes = self.bytes.get(range.clone())?.get(skip..)?.get(..len)?;
        // SAFETY: the bytes are those of the mapping or vector that `keep` owns, and nobody changes them.
        unsafe { Tensor::of_bytes(bytes, dtype, shape, self.keep.clone()) }
    }
}

fn size(value: Value) -> Option<usize> {
    match value {
        Value::Int(number) => usize::try_from(number).ok(),
        _ => None,
    }
}

/// The elements of a strided tensor, row-major. The caller has proven that every index lies inside `storage`, so that no
/// sum or product below can pass its size.
fn pack(storage: &[u8], offset: usize, shape: &[usize], strides: &[usize], item: usize) -> Vec<u8> {
    match item {
        1 => pack_items::<1>(storage, offset, shape, strides),
        2 => pack_items::<2>(storage, offset, shape, strides),
        4 => pack_items::<4>(storage, offset, shape, strides),
        _ => pack_items::<8>(storage, offset, shape, strides),
    }
}

fn pack_items<const N: usize>(storage: &[u8], offset: usize, shape: &[usize], strides: &[usize]) -> Vec<u8> {
    let item = |at: usize| storage.get(at * N..).and_then(|rest| rest.first_chunk()).unwrap_or(&[0; N]);
    // A tensor without axes has one row of one element.
    let (&row, outer) = shape.split_last().unwrap_or((&1, &[]));
    let (&step, outer_strides) = strides.split_last().unwrap_or((&1, &[]));
    let rows: usize = outer.iter().product();
    let mut out: Vec<[u8; N]> = Vec::with_capacity(rows * row);
    let mut index = vec![0usize; outer.len()];
    let mut at = offset;
    for _ in 0..rows {
        out.extend((0..row).map(|i| item(at + i * step)));
        // The next row: the last axis turns fastest, and one at its end goes back to 0.
        for ((i, &dim), &stride) in index.iter_mut().zip(outer).zip(outer_strides).rev() {
            if *i + 1 < dim {
                *i += 1;
                at += stride;
                break;
            }
            at -= *i * stride;
            *i = 0;
        }
    }
    out.into_flattened()
}

#[cfg(test)]
mod tests;
