//! Writing safetensors files: to disk as a stream of any size, or to memory.

use super::header::{self, Row, MAX_HEADER, METADATA};
use crate::adapter::atomic::AtomicFile;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Streams a file: the header from a layout that is known beforehand, then the tensors' bytes in its order. Nothing is
/// visible at the path before [`finish`](Writer::finish), and nothing at all without it.
#[derive(Debug)]
pub struct Writer {
    file: AtomicFile,
    path: PathBuf,
    /// Bytes of the data section that are still to come.
    left: u64,
}

impl Writer {
    /// Starts a file at `path` with these tensors. A name that stands twice or a size that cannot be counted is refused
    /// before anything is written.
    pub fn create(
        path: &Path,
        layout: &[(String, Dtype, Vec<usize>)],
        metadata: &BTreeMap<String, String>,
    ) -> Result<Self> {
        let tensors = layout.iter().map(|(name, dtype, shape)| (name.as_str(), *dtype, shape.as_slice()));
        let (header, left) = encode(tensors, metadata)?;
        let mut file = AtomicFile::create(path)?;
        file.write_all(&header).map_err(|e| Error::io(path, e))?;
        Ok(Writer { file, path: path.to_owned(), left })
    }

    /// Writes the next bytes of the data section; chunks need not end where tensors do. More than the layout needs is
    /// refused as a whole.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let n = bytes.len() as u64;
        let Some(left) = self.left.checked_sub(n) else {
            let what = format!("{}: {n} bytes to write where {} are left", self.path.display(), self.left);
            return Err(Error::argument(what, "write the bytes that the layout names, in its order"));
        };
        self.file.write_all(bytes).map_err(|e| Error::io(&self.path, e))?;
        self.left = left;
        Ok(())
    }

    /// Puts the file in its place. Refused while bytes are missing; then nothing is left behind.
    pub fn finish(self) -> Result<()> {
        if self.left > 0 {
            let what = format!("{}: {} bytes of the layout were not written", self.path.display(), self.left);
            return Err(Error::argument(what, "write every tensor of the layout before finishing"));
        }
        self.file.commit()
    }
}

/// The bytes of a whole file.
pub fn to_vec(
    tensors: &[(String, Dtype, Vec<usize>, Vec<u8>)],
    metadata: &BTreeMap<String, String>,
) -> Result<Vec<u8>> {
    let rows = tensors.iter().map(|(name, dtype, shape, _)| (name.as_str(), *dtype, shape.as_slice()));
    let (mut bytes, data) = encode(rows, metadata)?;
    for (name, dtype, shape, content) in tensors {
        let need = size(name, *dtype, shape)?;
        if content.len() as u64 != need {
            let what = format!("{dtype} of shape {shape:?} takes {need} bytes, {} came", content.len());
            return Err(refused(name, what, "pass the tensor's bytes contiguous and whole"));
        }
    }
    bytes.reserve_exact(data as usize);
    tensors.iter().for_each(|(.., content)| bytes.extend_from_slice(content));
    Ok(bytes)
}

/// The bytes before the data section of a file.
pub fn header<'a>(
    tensors: impl Iterator<Item = (&'a str, Dtype, &'a [usize])>,
    metadata: &BTreeMap<String, String>,
) -> Result<Vec<u8>> {
    encode(tensors, metadata).map(|(header, _)| header)
}

/// The header's bytes and the size of the data section.
fn encode<'a>(
    tensors: impl Iterator<Item = (&'a str, Dtype, &'a [usize])>,
    metadata: &BTreeMap<String, String>,
) -> Result<(Vec<u8>, u64)> {
    let (mut rows, mut names, mut end) = (Vec::new(), BTreeSet::from([METADATA]), 0u64);
    for (name, dtype, shape) in tensors {
        if !names.insert(name) {
            let what = if name == METADATA { "is no name for a tensor" } else { "stands twice" };
            return Err(refused(name, what.into(), "give every tensor a name of its own"));
        }
        let begin = end;
        end = begin.checked_add(size(name, dtype, shape)?).ok_or_else(|| {
            refused(name, "all tensors together pass 64 bits".into(), "write several files")
        })?;
        rows.push(Row { name, dtype, shape, data_offsets: [begin, end] });
    }
    let header = header::encode(&rows, metadata).map_err(|e| Error::Backend(format!("serde_json: {e}")))?;
    if (header.len() - header::ALIGN) as u64 > MAX_HEADER {
        let what = format!("a safetensors header of {} bytes; the limit is {MAX_HEADER}", header.len());
        return Err(Error::argument(what, "shorten the metadata or write several files"));
    }
    Ok((header, end))
}

fn size(name: &str, dtype: Dtype, shape: &[usize]) -> Result<u64> {
    header::need(dtype, shape).map_err(|e| {
        let why = match e {
            header::Uncountable::PartialByte => "does not fill whole bytes",
            header::Uncountable::Overflow => "needs more bytes than 64 bits can count",
        };
        refused(name, format!("{dtype} of shape {shape:?} {why}"), "")
    })
}

fn refused(name: &str, what: String, hint: &str) -> Error {
    Error::Key { key: name.to_owned(), file: None, what, hint: hint.to_owned() }
}
