//! The tables that the kernels read: `kernels/*.cuh` and `kernels/*.cu` have the same structs, field for field.

use crate::dtype::Float;

/// Element types by the kernels' numbers.
pub(super) fn dtype(float: Float) -> u32 {
    match float {
        Float::F32 => 0,
        Float::F16 => 1,
        Float::BF16 => 2,
        Float::E4M3 => 3,
        Float::E5M2 => 4,
    }
}

/// As the kernels' names spell it.
pub(super) fn name(float: Float) -> &'static str {
    match float {
        Float::F32 => "f32",
        Float::F16 => "f16",
        Float::BF16 => "bf16",
        Float::E4M3 => "e4m3",
        Float::E5M2 => "e5m2",
    }
}

/// How a factor's numbers stand in fragments.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Format {
    BF16 = 0,
    F16 = 1,
    /// Three bf16 numbers whose sum is the fp32 one.
    Split = 2,
}

impl Format {
    /// bf16 numbers of one number.
    pub fn parts(self) -> u32 {
        if self == Format::Split {
            3
        } else {
            1
        }
    }
}

/// How the numbers of a pair of factors stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pair {
    BF16 = 0,
    F16 = 1,
    /// Both split.
    Split = 2,
    /// Up split, down as it is: what the other parts of bf16 numbers would add is nothing.
    UpSplit = 3,
}

impl Pair {
    /// The cheapest that is exact.
    pub fn of(up: Float, down: Float) -> Self {
        match (up, down) {
            (Float::BF16, Float::BF16) => Pair::BF16,
            (Float::F16, Float::F16) => Pair::F16,
            (_, Float::BF16) => Pair::UpSplit,
            _ => Pair::Split,
        }
    }

    pub fn up(self) -> Format {
        match self {
            Pair::BF16 => Format::BF16,
            Pair::F16 => Format::F16,
            Pair::Split | Pair::UpSplit => Format::Split,
        }
    }

    pub fn down(self) -> Format {
        match self {
            Pair::BF16 | Pair::UpSplit => Format::BF16,
            Pair::F16 => Format::F16,
            Pair::Split => Format::Split,
        }
    }
}

/// What a term does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    LowRank = 0,
    Hadamard = 1,
    Kron = 2,
    Dense = 3,
    ScaleRows = 4,
    ScaleColumns = 5,
    Replace = 6,
}

/// Where a factor goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Layout {
    /// Fragments of the left factor of a product.
    Up = 0,
    /// Fragments of the right one.
    Down = 1,
    /// Packed, in fp32.
    Fp32 = 2,
    /// Packed, as it is.
    Plain = 3,
    /// Fragments of `kernels/right.cu`'s factor.
    Right = 4,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Target {
    pub base: u64,
    pub out: u64,
    pub base_columns: u64,
    pub out_columns: u64,
    pub base_row: u64,
    pub out_row: u64,
    pub rows: u32,
    pub columns: u32,
    pub first: u32,
    pub count: u32,
    pub scale: f32,
    pub seed: u32,
    pub stochastic: u32,
    pub dtype: u32,
    pub axis: u32,
    pub products: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Term {
    pub a: u64,
    pub b: u64,
    pub a2: u64,
    pub b2: u64,
    pub gain: u64,
    pub coefficient: f32,
    pub kind: u32,
    pub format: u32,
    pub format2: u32,
    pub ranks: u32,
    pub ranks2: u32,
    pub row: u32,
    pub rows: u32,
    pub column: u32,
    pub columns: u32,
    pub gain_axis: u32,
    pub inner_rows: u32,
    pub inner_columns: u32,
    pub outer_columns: u32,
    pub plain: u32,
    pub carry: f32,
}

impl Term {
    /// Whether it is made of products of fragments; those come first among a target's terms.
    pub fn is_product(&self) -> bool {
        self.kind <= Kind::Hadamard as u32
    }

    /// Whether its first pair has factors in parts.
    pub fn is_split(&self) -> bool {
        self.format >= Pair::Split as u32
    }

    /// Fragments of a product's up factors in a block of rows.
    pub fn fragments(&self) -> usize {
        let of = |format: u32, ranks: u32| {
            if format >= Pair::Split as u32 {
                3 * ranks as usize
            } else {
                ranks as usize
            }
        };
        of(self.format, self.ranks) + of(self.format2, self.ranks2)
    }
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Strip {
    pub target: u32,
    pub row_tile: u32,
    pub column_tile: u32,
    pub count: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Factor {
    pub from: u64,
    pub to: u64,
    pub row: u64,
    pub column: u64,
    pub dtype: u32,
    pub layout: u32,
    pub format: u32,
    pub rows: u32,
    pub columns: u32,
    pub shift: u32,
    pub blocks: u32,
    pub ranks: u32,
    pub taps: u32,
    pub unused: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Norm {
    pub partial: u64,
    pub magnitude: u64,
    pub gain: u64,
    pub less: u64,
    pub count: u32,
    pub parts: u32,
    pub stride: u32,
    pub taps: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Right {
    pub base: u64,
    pub base_columns: u64,
    pub a1: u64,
    pub out: u64,
    pub base_row: u64,
    pub rows: u32,
    pub channels: u32,
    pub taps: u32,
    pub ranks: u32,
    pub dtype: u32,
    pub format: u32,
    pub shift: u32,
    pub plain: u32,
    pub scale: f32,
    pub unused: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Tile {
    pub job: u32,
    pub tile: u32,
}

/// Blocks of one size at consecutive positions of a stage of a rotation.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Part {
    pub blocks: u64,
    pub order: u64,
    pub first: u32,
    pub count: u32,
    pub size: u32,
    pub stage: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Rotation {
    pub base: u64,
    pub out: u64,
    pub base_columns: u64,
    pub out_columns: u64,
    pub base_row: u64,
    pub out_row: u64,
    pub parts: u64,
    pub rescale: u64,
    pub scratch: u64,
    pub element: u64,
    pub pitch: u32,
    pub rows: u32,
    pub columns: u32,
    pub count: u32,
    pub stages: u32,
    pub scale: f32,
    pub seed: u32,
    pub stochastic: u32,
    pub dtype: u32,
    pub strength: f32,
    pub interpolate: u32,
    pub axis: u32,
    pub delta: u32,
    pub vectors: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct RotationTile {
    pub rotation: u32,
    pub first: u32,
    pub count: u32,
    pub from: u32,
    pub width: u32,
    pub step: u32,
    pub resident: u32,
    pub part: u32,
}

/// Tables of plain numbers, as bytes.
///
/// # Safety
/// `T` has no padding.
unsafe fn bytes_of<T: Copy>(rows: &[T]) -> &[u8] {
    // SAFETY: any initialised memory without padding is bytes.
    unsafe { std::slice::from_raw_parts(rows.as_ptr().cast(), std::mem::size_of_val(rows)) }
}

/// A struct of the kernels, whose bytes go to the device.
pub(super) trait Row: Copy {
    fn bytes(rows: &[Self]) -> &[u8];
}

macro_rules! rows {
    ($($row:ty: $size:literal),*) => {$(
        const _: () = assert!(std::mem::size_of::<$row>() == $size);
        impl Row for $row {
            fn bytes(rows: &[Self]) -> &[u8] {
                // SAFETY: only numbers, 8 bytes wide before 4 bytes wide; the size above leaves no room for padding.
                unsafe { bytes_of(rows) }
            }
        }
    )*};
}

rows!(
    Target: 88, Term: 104, Strip: 16, Factor: 72, Norm: 48, Right: 80, Tile: 8, Part: 32, Rotation: 136, RotationTile: 32
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pair_is_split_no_further_than_its_numbers_need() {
        let parts = |up, down| {
            let pair = Pair::of(up, down);
            (pair.up().parts(), pair.down().parts())
        };
        for (up, down, wanted) in [
            (Float::BF16, Float::BF16, (1, 1)),
            (Float::F16, Float::F16, (1, 1)),
            (Float::F32, Float::BF16, (3, 1)),
            (Float::F16, Float::BF16, (3, 1)),
            (Float::BF16, Float::F32, (3, 3)),
            (Float::F16, Float::F32, (3, 3)),
        ] {
            assert_eq!(parts(up, down), wanted, "{up:?} {down:?}");
        }
        let two_bytes = [Float::F16, Float::BF16].map(|float| Pair::of(float, float));
        assert_eq!(
            two_bytes.map(|pair| (pair.up(), pair.down())),
            [(Format::F16, Format::F16), (Format::BF16, Format::BF16)]
        );
    }
}
