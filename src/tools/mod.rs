//! Tools that make an adapter file from others: `resize` (fewer ranks), `combine` (several into one), `extract` (from two checkpoints),
//! `convert` (another spelling).
//!
//! All of them see a module as a `delta`: thin factors where the algorithm has them or can be written so exactly, else the whole matrix.
//! `svd` cuts one to a rank, `rule` picks the rank, `sparse` are the merging methods that work on whole matrices. `source` reads a file
//! module by module and gives its pages back, `sheet` holds what one output file gets; `options` reads the JSON of the C ABI.
//!
//! Modules are worked on in parallel, a few at a time, and written in their order; the output appears whole or not at all.

pub mod combine;
pub mod convert;
mod delta;
pub mod extract;
mod matching;
pub mod naming;
pub mod options;
mod recipe;
pub mod resize;
pub mod rule;
mod sheet;
mod source;
mod sparse;
mod svd;
#[cfg(test)]
mod tests;

use crate::error::Result;
use crate::merge::gemm::{on_pool, threads};
use crate::progress::Progress;
use rayon::prelude::*;

/// Does `work` on every item, a few at a time on all threads, and hands the results to `take` in their order on this thread. Progress
/// counts items.
fn each<T: Sync, R: Send>(
    items: &[T],
    progress: &mut Progress<'_>,
    work: impl Fn(&T) -> Result<R> + Sync,
    mut take: impl FnMut(&T, R) -> Result<()>,
) -> Result<()> {
    let (mut done, total) = (0, items.len() as u64);
    progress.at(0, total)?;
    // Enough that the threads seldom wait for the largest of a batch, few enough that a cancel is heard soon.
    for batch in items.chunks(4 * threads()) {
        let results: Vec<Result<R>> = on_pool(|| batch.par_iter().map(&work).collect());
        for (item, result) in batch.iter().zip(results) {
            take(item, result?)?;
            done += 1;
            progress.at(done, total)?;
        }
    }
    Ok(())
}
