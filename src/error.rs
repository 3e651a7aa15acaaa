//! Every way a call can fail, in groups. A message says what, where (tensor, file), with which numbers;
//! [`Error::hint`] says what to do.

use std::fmt;
use std::path::{Path, PathBuf};

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong. The variants are the groups of `lycore_status` (`ffi/status.rs`).
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// The call itself is wrong: NULL, an index past the end, options that contradict each other.
    Argument {
        /// What is wrong, with the offending value.
        what: String,
        /// What to do; empty when the message says it all.
        hint: String,
    },
    /// The file cannot be read or written, or lies about its content.
    File {
        /// The file; `<memory>` for bytes that the caller passed.
        path: PathBuf,
        /// How it fails.
        fault: FileFault,
    },
    /// A key of an adapter or a name of a target does not fit.
    Key {
        /// The key or name.
        key: String,
        /// The file it stands in, when it stands in one.
        file: Option<PathBuf>,
        /// What is wrong with it.
        what: String,
        /// What to do.
        hint: String,
    },
    /// Two shapes that must agree do not.
    Shape {
        /// The tensor or module.
        tensor: String,
        /// What was being done.
        what: String,
        /// What fits.
        expected: Vec<usize>,
        /// What came.
        got: Vec<usize>,
    },
    /// A dtype that this operation does not take.
    Dtype {
        /// The tensor.
        tensor: String,
        /// What came.
        got: String,
        /// What is taken, comma separated.
        supported: &'static str,
    },
    /// A device that is not there or that this build cannot use.
    Device {
        /// What is wrong.
        what: String,
        /// What to do.
        hint: String,
    },
    /// Training cannot go on.
    Train {
        /// What is wrong.
        what: String,
        /// What to do.
        hint: String,
    },
    /// This build or this version cannot do it.
    Unsupported {
        /// What is not supported.
        what: String,
        /// What can be used instead.
        hint: String,
    },
    /// The caller's progress callback or cancel flag asked to stop; nothing was left half done.
    Cancelled,
    /// libtorch or the operating system failed underneath; the text is theirs.
    Backend(String),
}

/// One variant per way a file can fail or lie.
#[derive(Debug)]
#[non_exhaustive]
pub enum FileFault {
    /// The operating system's word.
    Io(std::io::Error),
    /// Fewer than the 8 bytes of the header length.
    TooShort {
        /// File size in bytes.
        size: u64,
    },
    /// The header is said to be longer than the file.
    HeaderPastEnd {
        /// Claimed header length in bytes.
        claimed: u64,
        /// File size in bytes.
        size: u64,
    },
    /// The header is longer than any real one.
    HeaderTooLarge {
        /// Claimed header length in bytes.
        claimed: u64,
        /// Limit in bytes.
        limit: u64,
    },
    /// The header is not UTF-8.
    HeaderNotUtf8 {
        /// First byte that is not.
        at: usize,
    },
    /// The header is not JSON of the safetensors form.
    HeaderNotJson {
        /// The parser's word.
        why: String,
    },
    /// A name stands twice in the header.
    DuplicateKey {
        /// The name.
        key: String,
    },
    /// `__metadata__` holds something else than text.
    BadMetadata {
        /// What it holds.
        why: String,
    },
    /// A tensor's entry lacks a field, or holds one that cannot be read.
    BadEntry {
        /// The tensor.
        tensor: String,
        /// What is wrong.
        why: String,
    },
    /// A dtype that the format does not define.
    UnknownDtype {
        /// The tensor.
        tensor: String,
        /// The name in the file.
        dtype: String,
    },
    /// Shape times element size does not fit in 64 bits.
    SizeOverflow {
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// The shape needs another number of bytes than the offsets give.
    SizeMismatch {
        /// The tensor.
        tensor: String,
        /// Bytes that dtype and shape need.
        need: u64,
        /// Bytes between the offsets.
        got: u64,
    },
    /// The end offset lies before the begin offset.
    OffsetsReversed {
        /// The tensor.
        tensor: String,
        /// Begin offset.
        begin: u64,
        /// End offset.
        end: u64,
    },
    /// The tensor ends after the file.
    PastEnd {
        /// The tensor.
        tensor: String,
        /// Where it ends, counted from the end of the header.
        end: u64,
        /// Bytes that the file has there.
        have: u64,
    },
    /// Two tensors share bytes.
    Overlap {
        /// The earlier tensor.
        first: String,
        /// The later one.
        second: String,
    },
    /// Bytes between two tensors that belong to none.
    Gap {
        /// The tensor after the gap.
        tensor: String,
        /// Size of the gap in bytes.
        bytes: u64,
    },
    /// Bytes after the last tensor.
    TrailingBytes {
        /// How many.
        bytes: u64,
    },
    /// Sub-byte elements that do not fill whole bytes.
    PartialByte {
        /// The tensor.
        tensor: String,
    },
    /// A file of `torch.save` that is damaged, or holds something else than tensors under names.
    Pickle {
        /// What is wrong.
        why: String,
    },
    /// A pickle that asks for something that could run code.
    PickledCode {
        /// The function or class that it names.
        global: String,
        /// Offset of the request in the pickle.
        at: usize,
    },
    /// A readable file without a single adapter module.
    NoAdapter {
        /// How many keys it holds.
        keys: usize,
        /// The first of them, as a lead.
        example: String,
    },
    /// Not the kind of file this call expects (for example a state file of another network).
    WrongKind {
        /// What was found and what was expected.
        why: String,
    },
}

impl fmt::Display for FileFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use FileFault::*;
        match self {
            Io(e) => write!(f, "{e}"),
            TooShort { size } => write!(f, "is {size} bytes long; a safetensors file has at least 8"),
            HeaderPastEnd { claimed, size } => {
                write!(f, "claims a header of {claimed} bytes but is {size} bytes long: cut off, or not safetensors")
            }
            HeaderTooLarge { claimed, limit } => {
                write!(f, "claims a header of {claimed} bytes; the limit is {limit}")
            }
            HeaderNotUtf8 { at } => write!(f, "header is not UTF-8 (byte {at})"),
            HeaderNotJson { why } => write!(f, "header is not safetensors JSON: {why}"),
            DuplicateKey { key } => write!(f, "names `{key}` twice"),
            BadMetadata { why } => write!(f, "__metadata__ is not a map of text to text: {why}"),
            BadEntry { tensor, why } => write!(f, "tensor `{tensor}`: {why}"),
            UnknownDtype { tensor, dtype } => write!(f, "tensor `{tensor}`: unknown dtype `{dtype}`"),
            SizeOverflow { tensor, shape } => {
                write!(f, "tensor `{tensor}`: shape {shape:?} needs more bytes than 64 bits can count")
            }
            SizeMismatch { tensor, need, got } => {
                write!(f, "tensor `{tensor}`: shape and dtype need {need} bytes, its offsets hold {got}")
            }
            OffsetsReversed { tensor, begin, end } => {
                write!(f, "tensor `{tensor}`: begins at {begin} but ends at {end}")
            }
            PastEnd { tensor, end, have } => {
                write!(f, "tensor `{tensor}`: ends at byte {end} of the data, the file holds {have}: cut off")
            }
            Overlap { first, second } => write!(f, "tensors `{first}` and `{second}` share bytes"),
            Gap { tensor, bytes } => write!(f, "{bytes} bytes before tensor `{tensor}` belong to no tensor"),
            TrailingBytes { bytes } => write!(f, "{bytes} bytes after the last tensor belong to no tensor"),
            PartialByte { tensor } => write!(f, "tensor `{tensor}`: its elements do not fill whole bytes"),
            Pickle { why } => write!(f, "{why}"),
            PickledCode { global, at } => {
                write!(f, "asks for `{global}` (byte {at} of its pickle): refused, for a file that asks for more than ")?;
                f.write_str("tensors, numbers and text could run code")
            }
            NoAdapter { keys, example } => {
                write!(f, "holds {keys} keys but no adapter module that this version knows (first key: `{example}`)")
            }
            WrongKind { why } => write!(f, "{why}"),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Argument { what, .. }
            | Error::Device { what, .. }
            | Error::Train { what, .. }
            | Error::Unsupported { what, .. } => f.write_str(what),
            Error::File { path, fault } => write!(f, "{}: {fault}", path.display()),
            Error::Key { key, file: Some(file), what, .. } => {
                write!(f, "{}: `{key}`: {what}", file.display())
            }
            Error::Key { key, file: None, what, .. } => write!(f, "`{key}`: {what}"),
            Error::Shape { tensor, what, expected, got } => {
                write!(f, "`{tensor}`: {what}: expected shape {expected:?}, got {got:?}")
            }
            Error::Dtype { tensor, got, supported } => {
                write!(f, "`{tensor}`: dtype {got} is not supported here; supported: {supported}")
            }
            Error::Cancelled => f.write_str("cancelled"),
            Error::Backend(text) => f.write_str(text),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::File { fault: FileFault::Io(e), .. } => Some(e),
            _ => None,
        }
    }
}

impl Error {
    /// What the caller can do about it; empty when the message says it all.
    pub fn hint(&self) -> &str {
        match self {
            Error::Argument { hint, .. }
            | Error::Key { hint, .. }
            | Error::Device { hint, .. }
            | Error::Train { hint, .. }
            | Error::Unsupported { hint, .. } => hint,
            Error::File { fault, .. } => match fault {
                FileFault::Io(_) => "check the path and the permissions",
                FileFault::NoAdapter { .. } => {
                    "is this a checkpoint? An adapter has keys like `….lora_up.weight`"
                }
                FileFault::Pickle { .. } => {
                    "save it again with torch.save as a dict of tensors, or as safetensors"
                }
                FileFault::PickledCode { .. } => "convert it to safetensors with a program that you trust",
                FileFault::WrongKind { .. } => "",
                _ => "the file is damaged or incomplete: download or save it again",
            },
            Error::Shape { .. } => "the adapter was made for another model",
            Error::Dtype { .. } => "convert the tensor first",
            Error::Cancelled | Error::Backend(_) => "",
        }
    }

    /// The tensor, module or key concerned, if there is one.
    pub fn key(&self) -> Option<&str> {
        match self {
            Error::Key { key, .. } => Some(key),
            Error::Shape { tensor, .. } | Error::Dtype { tensor, .. } => Some(tensor),
            _ => None,
        }
    }

    /// The file concerned, if there is one.
    pub fn file(&self) -> Option<&Path> {
        match self {
            Error::File { path, .. } => Some(path),
            Error::Key { file, .. } => file.as_deref(),
            _ => None,
        }
    }

    /// A wrong call.
    pub fn argument(what: impl Into<String>, hint: impl Into<String>) -> Self {
        Error::Argument { what: what.into(), hint: hint.into() }
    }

    /// The operating system's error on `path`.
    pub fn io(path: &Path, e: std::io::Error) -> Self {
        Error::File { path: path.to_owned(), fault: FileFault::Io(e) }
    }
}

#[cfg(feature = "torch")]
impl From<tch::TchError> for Error {
    fn from(e: tch::TchError) -> Self {
        // libtorch appends a C++ backtrace to its sentence; the caller needs the sentence.
        let text = e.to_string();
        let head = text.split("\nException raised from").next().unwrap_or(&text);
        Error::Backend(format!("libtorch: {}", head.trim()))
    }
}
