//! All integration tests in one binary, by subject:
//!
//! - `header`: include/lycore.h is what cbindgen makes of src/ffi
//! - `algorithms`: every algorithm from file to weight against its formula in f64
//! - `merge`: the CPU executor and the bypass against the formula in f64
//! - `malformed`: one small file per way a file can lie (tests/malformed)
//!
//! The C ABI itself is tested from C and C++ (tests/c) and from Python (tests/python), where the oracles are.

mod algorithms;
mod alloc;
mod header;
mod malformed;
mod merge;
mod random;
