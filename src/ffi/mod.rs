//! The C ABI and nothing else: every function here checks what came from outside and calls one function of the crate.
//!
//! `boundary` is the door that each export goes through, `handle` keeps what the host holds, `status` numbers the errors; then one file per
//! chapter of the header. cbindgen turns this folder into `include/lycore.h`, which opens with the conventions (`cbindgen.toml`).

// The names are the header's.
#![allow(non_camel_case_types)]

mod boundary;
mod handle;

pub mod adapter;
pub mod checkpoint;
pub mod convert;
pub mod network;
pub mod network_files;
#[cfg(feature = "torch")]
mod operator;
pub mod progress;
pub mod stack;
pub mod status;
pub mod tensor;
pub mod tools;
pub mod version;
