//! Factors on a device, in the layouts that the kernels take; made once per adapter and kept between merges.

use super::tables::{self, Format, Layout, Row};
use crate::cuda::{Arg, Buffer, Queue};
use crate::dtype::{byte_len, Float};
use crate::error::{Error, Result};
use crate::view::{Device, Tensor};
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

/// A factor in one layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    data: usize,
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
    layout: Layout,
    format: Format,
    /// Rows (up) or columns (down) of a block that lie before the factor's first.
    shift: u32,
    /// Of a down factor that acts on each tap of a kernel alike.
    taps: u32,
}

/// A factor that is wanted on the device.
pub(super) struct Wanted {
    pub key: Key,
    source: Tensor,
}

impl Wanted {
    /// Fragments of one side of a product. `start` is the region's first row or column in the weight.
    pub fn fragments(source: &Tensor, layout: Layout, format: Format, start: usize) -> Self {
        let block = if layout == Layout::Up { 16 } else { 32 };
        let mut wanted = Wanted::new(source, layout, format, (start % block) as u32);
        if layout == Layout::Right {
            // Its ranks are the rows of the fragments.
            let key = &mut wanted.key;
            std::mem::swap(&mut key.rows, &mut key.columns);
            std::mem::swap(&mut key.row_stride, &mut key.column_stride);
        }
        wanted
    }

    /// A down factor that acts on each of so many taps alike.
    pub fn for_taps(mut self, taps: usize) -> Self {
        self.key.taps = taps as u32;
        self
    }

    /// The matrix as it is in the file.
    pub fn plain(source: &Tensor) -> Self {
        Wanted::new(source, Layout::Plain, Format::Split, 0)
    }

    /// A vector in fp32, every value `times` times.
    pub fn repeated(source: &Tensor, times: usize) -> Self {
        let mut wanted = Wanted::new(source, Layout::Fp32, Format::Split, 0);
        let step = source.strides().last().copied().unwrap_or(1);
        (wanted.key.rows, wanted.key.columns) = (source.count(), times);
        (wanted.key.row_stride, wanted.key.column_stride) = (step, 0);
        wanted
    }

    fn new(source: &Tensor, layout: Layout, format: Format, shift: u32) -> Self {
        let (shape, strides) = (source.shape(), source.strides());
        let at = |list: &[usize], axis: usize| list.get(axis).copied().unwrap_or(1);
        let key = Key {
            data: source.data() as usize,
            rows: at(shape, 0),
            columns: at(shape, 1),
            row_stride: at(strides, 0),
            column_stride: at(strides, 1),
            layout,
            format,
            shift,
            taps: 1,
        };
        Wanted { key, source: source.clone() }
    }

    /// Blocks of rows or columns, and of ranks.
    fn blocks(&self) -> (usize, usize) {
        let Key { rows, columns, layout, shift, taps, .. } = self.key;
        let (shift, taps) = (shift as usize, taps as usize);
        match layout {
            Layout::Up => ((shift + rows).div_ceil(16), columns.div_ceil(16)),
            Layout::Right => (rows.div_ceil(16), columns.div_ceil(32) * 2),
            _ => ((shift + columns * taps).div_ceil(32), rows.div_ceil(16) * taps),
        }
    }

    /// Bytes that the result takes.
    fn size(&self) -> Option<usize> {
        let (blocks, ranks) = self.blocks();
        let parts = self.key.format.parts() as usize;
        match self.key.layout {
            // A warp of the fastest kernel reads two blocks of rows, also where the factor has but one left.
            Layout::Up | Layout::Right => {
                blocks.next_multiple_of(2).checked_mul(ranks)?.checked_mul(parts * 512)
            }
            Layout::Down => blocks.checked_mul(ranks)?.checked_mul(parts * 1024),
            Layout::Fp32 => self.key.rows.checked_mul(self.key.columns)?.checked_mul(4),
            Layout::Plain => byte_len(self.source.dtype(), self.source.shape()),
        }
    }
}

/// What is on the device.
#[derive(Default)]
pub(super) struct Factors {
    /// Address of every factor; its source is kept, so that its own address cannot come to mean another factor.
    placed: HashMap<Key, (u64, Tensor)>,
    memory: Vec<Arc<Buffer>>,
}

/// Alignment of everything that is placed.
const ALIGN: usize = crate::cuda::ALIGN;

impl Factors {
    /// The address of a factor that was loaded.
    pub fn address(&self, key: &Key) -> Result<u64> {
        let found = self.placed.get(key).map(|(address, _)| *address);
        found.ok_or_else(|| Error::Backend("a factor was not loaded".into()))
    }

    /// What they lie in.
    pub fn memory(&self) -> &[Arc<Buffer>] {
        &self.memory
    }

    /// Brings what is missing to the device, and packs it in one launch.
    pub fn load(&mut self, queue: &Queue, wanted: impl Iterator<Item = Wanted>) -> Result<()> {
        let mut seen = HashSet::new();
        let missing: Vec<Wanted> =
            wanted.filter(|w| !self.placed.contains_key(&w.key) && seen.insert(w.key)).collect();
        if missing.is_empty() {
            return Ok(());
        }
        let too_large = || Error::Backend("the factors do not fit in an address space".into());
        let mut total = 0usize;
        let mut places = Vec::with_capacity(missing.len());
        for w in &missing {
            places.push(total);
            let size = w.size().ok_or_else(too_large)?.next_multiple_of(ALIGN);
            total = total.checked_add(size).ok_or_else(too_large)?;
        }
        let memory = queue.alloc_large(total)?;
        let at = |place: usize| memory.ptr() + place as u64;
        // Of host tensors those that are packed go to scratch memory first, the others to their places.
        let staged = |w: &&Wanted| w.source.device() == Device::Cpu && w.key.layout != Layout::Plain;
        let raw_size: usize =
            missing.iter().filter(|w| staged(w)).map(|w| w.source.byte_len().next_multiple_of(ALIGN)).sum();
        let raw = queue.alloc_large(raw_size)?;
        let (mut used, mut table, mut parts) = (0usize, Vec::new(), Vec::with_capacity(missing.len()));
        for (w, &place) in missing.iter().zip(&places) {
            let from = match w.source.device() {
                Device::Cuda(index) if index == queue.gpu().index() => w.source.data() as u64,
                Device::Cuda(index) => {
                    let what =
                        format!("a factor is on cuda:{index}, its weight on cuda:{}", queue.gpu().index());
                    return Err(Error::argument(what, "both must be on one device"));
                }
                Device::Cpu => {
                    let bytes = w.source.bytes().ok_or_else(|| {
                        Error::argument("a factor is not contiguous", "call .contiguous() on it")
                    })?;
                    let to = if w.key.layout == Layout::Plain {
                        at(place)
                    } else {
                        let first = used;
                        used += bytes.len().next_multiple_of(ALIGN);
                        raw.ptr() + first as u64
                    };
                    parts.push((to, bytes));
                    to
                }
            };
            if w.key.layout == Layout::Plain {
                if w.source.device() != Device::Cpu {
                    if !w.source.is_contiguous() {
                        return Err(Error::argument(
                            "a factor is not contiguous",
                            "call .contiguous() on it",
                        ));
                    }
                    // SAFETY: the host promised the source until the enqueued work is done; the place is this long.
                    unsafe { queue.copy(from, at(place), w.source.byte_len())? };
                }
                continue;
            }
            let (blocks, ranks) = w.blocks();
            table.push(tables::Factor {
                from,
                to: at(place),
                row: w.key.row_stride as u64,
                column: w.key.column_stride as u64,
                dtype: tables::dtype(Float::require(w.source.dtype(), "a factor")?),
                layout: w.key.layout as u32,
                format: w.key.format as u32,
                rows: w.key.rows as u32,
                columns: w.key.columns as u32,
                shift: w.key.shift,
                blocks: blocks as u32,
                ranks: ranks as u32,
                taps: w.key.taps,
                unused: 0,
            });
        }
        // SAFETY: the places were counted for these bytes above; between them is only what makes up for the alignment.
        unsafe { queue.upload_parts(&parts)? };
        // A launch takes so many rows of blocks.
        for table in table.chunks(65_535) {
            let rows = queue.upload_new(Row::bytes(table))?;
            let grid = [64, table.len() as u32, 1];
            // SAFETY: the table describes the sources and places above, all of which live until the stream has passed here.
            unsafe { queue.launch("pack", "pack", grid, 256, 0, &[Arg::from(&rows)])? };
        }
        let places: Vec<u64> = places.into_iter().map(at).collect();
        self.placed.extend(missing.into_iter().zip(places).map(|(w, place)| (w.key, (place, w.source))));
        self.memory.push(Arc::new(memory));
        Ok(())
    }
}
