//! LyCore loads, merges, scales and trains LoRA / LyCORIS adapters.
//!
//! The data goes one way. [`adapter`] turns the bytes of a file into modules: it proves the file consistent, reads every dialect's keys,
//! and keeps a report of each. A module is one of [`algo`]'s algorithms, which knows its formula and lowers it to a few primitives.
//! [`names`] finds the weight that a module means, whatever the host calls it. [`merge`] plans which primitives change which weight, runs
//! them on the CPU, by fused kernels on CUDA or through libtorch, and can take everything back to the bit; [`report`] says what became of
//! every key. `train` (with the feature `torch`) runs the same algorithms the other way, from gradients to a file.
//!
//! Underneath: [`dtype`] (element types, rounding), [`view`] (borrowed memory, bounds proven when made), [`progress`] (how far, stop),
//! [`error`], and [`cuda`], the door to the CUDA driver: streams, device memory and the kernels of `kernels/`. On top: [`ffi`], the C ABI
//! of `include/lycore.h`, the only door for hosts in other languages.
//!
//! The numeric contract, which every executor keeps: `W' = W + sum of strength_i * delta_i(W)` with every delta computed on the pristine W;
//! products accumulate in f32; one rounding into W's dtype, to nearest even; strength 0 and restore give W back bit for bit.

pub mod adapter;
pub mod algo;
pub mod cuda;
pub mod dtype;
pub mod error;
pub mod ffi;
mod linalg;
pub mod merge;
pub mod names;
pub mod progress;
pub mod report;
pub mod tools;
#[cfg(feature = "torch")]
pub mod torch_ext;
#[cfg(feature = "torch")]
pub mod train;
pub mod view;
