//! Training: gradients to a file.
//!
//! A [`Network`] is a set of modules in training that any host can drive: the host registers weights by name, calls forward and backward
//! per layer from its own graph, and `step` does the rest. LyCore owns parameters, formulas, optimizer, schedule, state and files; the
//! host owns the model, so there is no second copy of it.
//!
//! All parameters live in one flat buffer ([`params`]), so that clipping, the optimizer, a check for NaN, an all-reduce and a resume file
//! are each one operation. Formulas are those of [`crate::algo`].

pub mod checkpoint;
pub mod config;
mod file;
mod fused;
mod init;
pub mod keep;
mod metadata;
mod modules;
pub mod network;
mod norms;
pub mod optim;
pub mod params;
mod reader;
pub mod schedule;
mod schedule_options;
pub mod state;
#[cfg(test)]
mod tests;
mod text;
mod update;

pub use checkpoint::Files;
pub use config::Config;
pub use keep::Moment;
pub use network::Network;
pub use update::Step;
