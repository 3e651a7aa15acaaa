//! The unmerged forward on the CPU: `y += s * up(down(x))`, for bases that cannot or should not be changed.
//!
//! The same primitives as a merge, applied to activations. A convolution is a matrix product over gathered patches, so groups and
//! dilation need nothing special.

use super::cpu;
use super::gemm::{add_product, on_pool, Mat};
use super::ops::Term;
use crate::dtype::Float;
use crate::error::{Error, Result};
use crate::view::{Device, Rows, View};

/// How a layer slides its weight over its input. For a Linear layer: the default.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Step per spatial axis; one value serves all axes.
    pub stride: Vec<usize>,
    /// Zeros added on both sides, per spatial axis.
    pub padding: Vec<usize>,
    /// Distance between the kernel's taps, per spatial axis.
    pub dilation: Vec<usize>,
    /// Independent groups of channels.
    pub groups: usize,
}

impl Default for Geometry {
    fn default() -> Self {
        Geometry { stride: vec![1], padding: vec![0], dilation: vec![1], groups: 1 }
    }
}

/// What a layer's input and output look like, after checking them against the weight and the geometry.
pub struct Layout {
    /// Samples (all leading axes of a Linear input).
    pub batch: usize,
    /// Input channels per group.
    pub channels: usize,
    /// Spatial sizes of the input; empty for Linear.
    pub input: Vec<usize>,
    /// Spatial sizes of the output; empty for Linear.
    pub output: Vec<usize>,
    /// Kernel sizes; empty for Linear.
    pub kernel: Vec<usize>,
    /// One value per spatial axis.
    pub stride: Vec<usize>,
    /// One value per spatial axis.
    pub padding: Vec<usize>,
    /// One value per spatial axis.
    pub dilation: Vec<usize>,
    /// Independent groups of channels.
    pub groups: usize,
}

impl Layout {
    /// Checks `x` and `y` of a layer with this weight. Linear: x [.., I], y [.., O]; conv: x [N, I, spatial..], y [N, O, spatial..].
    pub fn check(
        name: &str,
        weight: &[usize],
        geometry: &Geometry,
        x: &[usize],
        y: &[usize],
    ) -> Result<Layout> {
        let wrong = |what: &str, expected: Vec<usize>, got: &[usize]| Error::Shape {
            tensor: name.to_owned(),
            what: what.to_owned(),
            expected,
            got: got.to_vec(),
        };
        let axes = weight.len().saturating_sub(2);
        let spread = |values: &[usize], what: &str| match values.len() {
            1 => Ok(vec![values[0]; axes]),
            n if n == axes => Ok(values.to_vec()),
            n => Err(Error::argument(
                format!("`{name}`: {n} values of {what} for {axes} spatial axes"),
                "pass one, or one per axis",
            )),
        };
        let (stride, padding) = (spread(&geometry.stride, "stride")?, spread(&geometry.padding, "padding")?);
        let dilation = spread(&geometry.dilation, "dilation")?;
        let groups = geometry.groups;
        if weight.len() < 2
            || groups == 0
            || weight[0] % groups != 0
            || stride.contains(&0)
            || dilation.contains(&0)
        {
            return Err(Error::argument(
                format!("`{name}`: weight {weight:?} with {groups} groups, stride {stride:?}, dilation {dilation:?} is no layer"),
                "groups divide the output channels; stride and dilation are at least 1",
            ));
        }
        let (channels, kernel) = (weight[1], weight[2..].to_vec());
        if axes == 0 {
            let (Some((&last, lead)), true) = (x.split_last(), groups == 1) else {
                return Err(wrong("input of a Linear layer", vec![channels], x));
            };
            if last != channels {
                return Err(wrong("input of a Linear layer", vec![channels], &[last]));
            }
            let mut expected = lead.to_vec();
            expected.push(weight[0]);
            if y != expected {
                return Err(wrong("output of a Linear layer", expected, y));
            }
            let batch = lead.iter().product();
            return Ok(Layout {
                batch,
                channels,
                input: vec![],
                output: vec![],
                kernel,
                stride,
                padding,
                dilation,
                groups,
            });
        }
        if x.len() != axes + 2 || x[1] != channels * groups {
            return Err(wrong(
                "input of a convolution: [batch, channels, spatial..]",
                vec![0, channels * groups],
                x,
            ));
        }
        let mut expected = vec![x[0], weight[0]];
        for axis in 0..axes {
            let reach = dilation[axis].checked_mul(kernel[axis].max(1) - 1).and_then(|n| n.checked_add(1));
            let padded = padding[axis].checked_mul(2).and_then(|n| n.checked_add(x[axis + 2]));
            let (Some(reach), Some(padded)) = (reach, padded) else {
                let what =
                    format!("`{name}`: dilation {dilation:?} or padding {padding:?} is beyond any size");
                return Err(Error::argument(what, ""));
            };
            if padded < reach {
                return Err(wrong("input smaller than the kernel", kernel, &x[2..]));
            }
            expected.push((padded - reach) / stride[axis] + 1);
        }
        if y != expected {
            return Err(wrong("output of a convolution", expected, y));
        }
        let (input, output) = (x[2..].to_vec(), y[2..].to_vec());
        Ok(Layout { batch: x[0], channels, input, output, kernel, stride, padding, dilation, groups })
    }
}

/// f32 that a block of gathered patches may take.
const BLOCK: usize = 1 << 20;

/// `y += sum of terms applied to x`; sums in f32, one rounding into y's dtype. Both row-major in host memory. `base` is the pristine weight; only
/// terms that multiply it read it.
pub fn forward(
    name: &str,
    base: &View,
    geometry: &Geometry,
    x: &View,
    y: &View,
    terms: &[Term<'_>],
) -> Result<()> {
    let weight = base.shape();
    let layout = Layout::check(name, weight, geometry, x.shape(), y.shape())?;
    if x.device() != Device::Cpu || y.device() != Device::Cpu {
        return Err(Error::Device {
            what: format!(
                "`{name}`: input on {}, output on {}; this executor needs host memory",
                x.device(),
                y.device()
            ),
            hint: "use the build with libtorch for tensors on a GPU".into(),
        });
    }
    let (x_float, y_float) = (Float::require(x.dtype(), name)?, Float::require(y.dtype(), name)?);
    let (Some(input), true) = (x.bytes(), y.is_contiguous()) else {
        return Err(Error::argument(
            format!("`{name}`: input and output must be row-major"),
            "call .contiguous() first",
        ));
    };
    if y.count() == 0 || weight.contains(&0) || terms.iter().all(|t| t.strength == 0.0) {
        return Ok(());
    }
    // SAFETY: y is row-major host memory that the caller lent for writing (`View::from_raw`).
    let output = unsafe { std::slice::from_raw_parts_mut(y.data(), y.byte_len()) };
    let weight_rows = Rows::of(base, name)?;
    let mut factors = Vec::new();
    for term in terms.iter().filter(|t| t.strength != 0.0) {
        check_slice(name, &layout, term)?;
        let ready = cpu::prepare(name, &weight_rows, weight, term)?;
        let rows = ready.rows.clone();
        let (up, down, scale) = on_pool(|| ready.into_factors(&weight_rows));
        factors.push(Factors { up, down, scale, rows });
    }
    on_pool(|| {
        if layout.kernel.is_empty() {
            linear(&layout, weight[0], (x_float, input), (y_float, output), &factors);
        } else {
            convolution(&layout, weight[0], (x_float, input), (y_float, output), &factors);
        }
    });
    Ok(())
}

/// The bypass works on slices of the output only, and not across groups.
pub(super) fn check_slice(name: &str, layout: &Layout, term: &Term<'_>) -> Result<()> {
    match term.slice {
        None => Ok(()),
        Some(s) if s.axis == 0 && layout.groups == 1 => Ok(()),
        Some(_) => Err(Error::Unsupported {
            what: format!("`{name}`: a bypass on a slice of the input is not supported"),
            hint: "merge it, or slice along axis 0".into(),
        }),
    }
}

/// `scale * up @ down`, or `down` alone as the whole delta, on these rows of the weight.
struct Factors {
    up: Option<Vec<f32>>,
    down: Vec<f32>,
    scale: f32,
    rows: std::ops::Range<usize>,
}

fn linear(l: &Layout, out: usize, x: (Float, &[u8]), y: (Float, &mut [u8]), factors: &[Factors]) {
    let rows = (BLOCK / l.channels.max(out).max(1)).max(1);
    let ((x_float, x), (y_float, y)) = (x, y);
    let blocks = x.chunks(rows * l.channels * x_float.size()).zip(y.chunks_mut(rows * out * y_float.size()));
    for (x, y) in blocks {
        let n = y.len() / (out * y_float.size());
        let (mut input, mut sum) = (vec![0f32; n * l.channels], vec![0f32; n * out]);
        x_float.read(x, &mut input);
        y_float.read(y, &mut sum);
        let mut delta = vec![0f32; n * out];
        for f in factors {
            let rank = f.down.len() / l.channels;
            let (x, down) = (Mat::new(&input, n, l.channels), Mat::new(&f.down, rank, l.channels));
            let Some(up) = &f.up else {
                add_product(&mut delta, out, f.rows.start, f.scale, x, down.t(), true);
                continue;
            };
            let mut t = vec![0f32; n * rank];
            add_product(&mut t, rank, 0, 1.0, x, down.t(), true);
            let (t, up) = (Mat::new(&t, n, rank), Mat::new(up, f.rows.len(), rank));
            add_product(&mut delta, out, f.rows.start, f.scale, t, up.t(), true);
        }
        sum.iter_mut().zip(&delta).for_each(|(y, d)| *y += d);
        y_float.write(&sum, y);
    }
}

fn convolution(l: &Layout, out: usize, x: (Float, &[u8]), y: (Float, &mut [u8]), factors: &[Factors]) {
    let ((x_float, x), (y_float, y)) = (x, y);
    let (pixels_in, pixels) = (l.input.iter().product::<usize>(), l.output.iter().product::<usize>());
    let taps = l.channels * l.kernel.iter().product::<usize>();
    let per_group = out / l.groups;
    let block = (BLOCK / taps.max(per_group).max(1)).clamp(1, pixels.max(1));
    let mut input = vec![0f32; l.channels * pixels_in];
    for sample in 0..l.batch {
        for group in 0..l.groups {
            let at = (sample * l.groups + group) * l.channels * pixels_in * x_float.size();
            x_float.read(&x[at..][..input.len() * x_float.size()], &mut input);
            for start in (0..pixels).step_by(block) {
                let n = block.min(pixels - start);
                let patches = gather(l, &input, start, n);
                let mut delta = vec![0f32; per_group * n];
                for f in factors {
                    let rank = f.down.len() / taps;
                    // With groups a module covers all rows, and this group's are some of them; with a slice there is one group.
                    let (own, first) = match l.groups {
                        1 => (0..f.rows.len(), f.rows.start),
                        _ => (group * per_group..(group + 1) * per_group, 0),
                    };
                    let (patches, delta) = (Mat::new(&patches, taps, n), &mut delta[first * n..]);
                    let Some(up) = &f.up else {
                        let down = Mat::new(&f.down[own.start * taps..], own.len(), taps);
                        add_product(delta, n, 0, f.scale, down, patches, true);
                        continue;
                    };
                    let mut t = vec![0f32; rank * n];
                    add_product(&mut t, n, 0, 1.0, Mat::new(&f.down, rank, taps), patches, true);
                    let up = Mat::new(&up[own.start * rank..], own.len(), rank);
                    add_product(delta, n, 0, f.scale, up, Mat::new(&t, rank, n), true);
                }
                let mut row = vec![0f32; n];
                for (o, delta) in delta.chunks_exact(n).enumerate() {
                    let at = ((sample * out + group * per_group + o) * pixels + start) * y_float.size();
                    let y = &mut y[at..][..n * y_float.size()];
                    y_float.read(y, &mut row);
                    row.iter_mut().zip(delta).for_each(|(y, d)| *y += d);
                    y_float.write(&row, y);
                }
            }
        }
    }
}

/// The patches under the kernel at output positions `start .. start + n`, as [channels * kernel, n].
fn gather(l: &Layout, input: &[f32], start: usize, n: usize) -> Vec<f32> {
    let axes = l.kernel.len();
    let taps: usize = l.kernel.iter().product();
    let pixels_in: usize = l.input.iter().product();
    // For each tap and position: where it reads in one channel; `None` in the padding.
    let mut from = vec![None; taps * n];
    for tap in 0..taps {
        for p in 0..n {
            let (mut tap_rest, mut out_rest, mut offset, mut step, mut inside) = (tap, start + p, 0, 1, true);
            for axis in (0..axes).rev() {
                let k = tap_rest % l.kernel[axis];
                let o = out_rest % l.output[axis];
                tap_rest /= l.kernel[axis];
                out_rest /= l.output[axis];
                let i = (o * l.stride[axis] + k * l.dilation[axis]).checked_sub(l.padding[axis]);
                match i.filter(|&i| i < l.input[axis]) {
                    Some(i) => offset += i * step,
                    None => inside = false,
                }
                step *= l.input[axis];
            }
            from[tap * n + p] = inside.then_some(offset);
        }
    }
    let mut patches = vec![0f32; l.channels * taps * n];
    for (channel, out) in patches.chunks_exact_mut(taps * n).enumerate() {
        let pixels = &input[channel * pixels_in..][..pixels_in];
        for (o, f) in out.iter_mut().zip(&from) {
            if let Some(offset) = f {
                *o = pixels[*offset];
            }
        }
    }
    patches
}
