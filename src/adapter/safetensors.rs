//! The safetensors format: 8 bytes of header length, a JSON header, the tensors' bytes.
//!
//! The `safetensors` crate reads a whole buffer and keeps no order; hosts bring files of many gigabytes whose bytes are
//! wanted one tensor at a time, without a copy, and every way in which a file can lie must reach the user as its own
//! sentence. So the header is parsed here (`header`), the crate stays as the source of the dtypes and as the oracle of
//! the tests, and files are written as streams (`writer`).

mod header;
mod writer;

use crate::adapter::atomic;
use crate::dtype::Dtype;
use crate::error::{Error, FileFault, Result};
use crate::view::Tensor;
use header::Header;
use memmap2::Mmap;
use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use writer::{header, to_vec, Writer};

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its name, unique in the file.
    pub name: String,
    /// Type of its elements.
    pub dtype: Dtype,
    /// Its shape; empty for a scalar.
    pub shape: Vec<usize>,
    /// Where its bytes begin, counted from the start of the data section.
    pub begin: u64,
    /// Where they end.
    pub end: u64,
}

/// A file that is proven consistent: every tensor lies inside it with exactly the bytes that its dtype and shape need.
/// A clone shares the mapping, which lives until the last one is dropped.
#[derive(Clone)]
pub struct File(Arc<Inner>);

struct Inner {
    path: PathBuf,
    bytes: Bytes,
    /// Where the data section starts.
    data: usize,
    header: Header,
}

enum Bytes {
    Mapped(Mmap),
    Owned(Vec<u8>),
}

impl std::ops::Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Bytes::Mapped(map) => map,
            Bytes::Owned(bytes) => bytes,
        }
    }
}

impl File {
    /// Maps a file read-only and proves it consistent; the tensors' bytes are not read.
    ///
    /// The file may be replaced (renamed over) or deleted while it is open. It must not be written in place: tensors
    /// would change under the reader, and if another process cuts it short, reading the lost part kills this process
    /// (SIGBUS), which no library can prevent. Copy the bytes and use [`File::from_bytes`] where others write in place.
    pub fn open(path: &Path) -> Result<Self> {
        Self::new(path.to_owned(), Bytes::Mapped(map(path)?))
    }

    /// A file that is already in memory. Its [`path`](File::path) is `<memory>`.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self> {
        Self::new("<memory>".into(), Bytes::Owned(bytes))
    }

    fn new(path: PathBuf, bytes: Bytes) -> Result<Self> {
        match prove(&bytes) {
            Ok((header, data)) => Ok(File(Arc::new(Inner { path, bytes, data, header }))),
            Err(fault) => Err(Error::File { path, fault }),
        }
    }

    /// Where the file was opened.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// The text that the file carries beside its tensors.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.0.header.metadata
    }

    /// Every tensor, in order of offset.
    pub fn entries(&self) -> &[Entry] {
        &self.0.header.entries
    }

    /// The tensor of this name.
    pub fn get(&self, name: &str) -> Option<&Entry> {
        self.0.header.get(name)
    }

    /// One of this file's tensors, which keeps the file. `None` when its bytes do not fit its shape.
    pub fn tensor(&self, entry: &Entry) -> Option<Tensor> {
        // SAFETY: the bytes live as long as the file, which the tensor holds, and nobody writes them.
        unsafe { Tensor::of_bytes(self.bytes(entry), entry.dtype, &entry.shape, self.0.clone()) }
    }

    /// The bytes of one of this file's tensors: little-endian, row-major, aligned to nothing.
    ///
    /// # Panics
    ///
    /// If the entry is another file's and does not fit into this one.
    pub fn bytes(&self, entry: &Entry) -> &[u8] {
        &self.0.bytes[self.0.data..][entry.begin as usize..entry.end as usize]
    }

    /// Size of the file in bytes.
    #[allow(clippy::len_without_is_empty, reason = "a file without bytes does not open")]
    pub fn len(&self) -> u64 {
        self.0.bytes.len() as u64
    }

    /// Gives the memory behind a range of the data section back to the system, so that to stream through a large file
    /// does not grow the process. The bytes stay readable and come back from the file when they are touched again.
    ///
    /// Memory goes by pages. One that the range shares with what follows it is kept; one that it shares with what
    /// precedes it goes, so that tensors released one after another leave nothing behind.
    pub fn release(&self, begin: u64, end: u64) {
        #[cfg(unix)]
        if let Bytes::Mapped(map) = &self.0.bytes {
            // A multiple of every page size in use.
            const PAGE: u64 = 1 << 16;
            let floor = |offset: u64| {
                let at = offset.saturating_add(self.0.data as u64).min(map.len() as u64);
                (at - at % PAGE) as usize
            };
            let (begin, end) = (floor(begin), floor(end));
            if begin < end {
                // SAFETY: the range lies inside the mapping, which is shared, read-only and backed by a file: its pages
                // come back with the file's bytes, never as zeros, and a reader on another thread notices nothing.
                let advised = unsafe {
                    map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, begin, end - begin)
                };
                // Advice: a system that does not take it keeps the pages until it needs them.
                let _ = advised;
            }
        }
        #[cfg(not(unix))]
        let _ = (begin, end);
    }
}

/// Maps a regular file read-only. What [`File::open`] says about writing in place holds for the bytes.
pub(super) fn map(path: &Path) -> Result<Mmap> {
    let io = |e| Error::io(path, e);
    // Asked before opening: to open a pipe is to wait for its writer.
    if !fs::metadata(path).map_err(io)?.is_file() {
        return Err(io(atomic::not_regular()));
    }
    let file = fs::File::open(path).map_err(io)?;
    // SAFETY: the mapping is read-only. Its bytes are only handed out as `&[u8]`, for which any value is valid, and
    // nothing proven depends on their staying the same: text is copied before it is checked and used. That nobody
    // writes the file in place meanwhile is the caller's part, said above.
    unsafe { Mmap::map(&file) }.map_err(io)
}

/// Reads the header and where the data section starts.
fn prove(bytes: &[u8]) -> std::result::Result<(Header, usize), FileFault> {
    let size = bytes.len() as u64;
    let length = header::length(bytes, size)?;
    let data = header::ALIGN + length;
    // A copy, because the bytes of a mapped file can change between the check for UTF-8 and the use as text.
    let text = bytes[header::ALIGN..data].to_vec();
    Ok((header::parse(&text, size - data as u64)?, data))
}

impl fmt::Debug for File {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "File({}, {} tensors)", self.path().display(), self.entries().len())
    }
}

#[cfg(test)]
mod tests;
