//! The CPU executor against the formula in f64: random shapes, slices along both axes, several terms, every dtype, in place and not.

use crate::random::{packed, ulp, unpacked, view, Random};
use lycore::dtype::{Dtype, Float};
use lycore::merge::bypass::{self, Geometry};
use lycore::merge::cpu;
use lycore::merge::ops::{Dense, Hadamard, Kron, LowRank, Op, Scale, Term};
use lycore::view::{Device, Slice, Tensor, View};

/// A random op for a weight of [rows, channels, kernel], its delta at strength 1 in f64, and the size of what was summed for it.
fn any_op(random: &mut Random, shape: &[usize; 3], base: &[f64]) -> (Op, Vec<f64>, Vec<f64>) {
    let &[rows, channels, kernel] = shape;
    let cols = channels * kernel;
    let scale = f64::from(random.value());
    let tensor = |values: &[f32], rows: usize| Tensor::of_f32(values.to_vec(), &[rows, values.len() / rows]);
    let pair = |random: &mut Random| {
        let rank = 1 + random.below(20);
        let (up, down) = (random.values(rows * rank), random.values(rank * cols));
        let sum = |sign: fn(f64) -> f64| -> Vec<f64> {
            let at = |i: usize, k: usize| {
                sign(f64::from(up[i / cols * rank + k]) * f64::from(down[k * cols + i % cols]))
            };
            (0..rows * cols).map(|i| (0..rank).map(|k| at(i, k)).sum()).collect()
        };
        ((tensor(&up, rows), tensor(&down, rank)), sum(|v| v), sum(f64::abs))
    };
    let scaled = |values: Vec<f64>| values.into_iter().map(|v| v * scale).collect::<Vec<f64>>();
    let sizes = |values: Vec<f64>| values.into_iter().map(|v| (v * scale).abs()).collect::<Vec<f64>>();
    let wide = |values: &[f32]| values.iter().map(|v| f64::from(*v)).collect::<Vec<f64>>();
    match random.below(5) {
        0 => {
            let ((up, down), delta, size) = pair(random);
            (Op::LowRank(LowRank { up, down, scale }), scaled(delta), sizes(size))
        }
        1 => {
            let ((one, left, left_size), (two, right, right_size)) = (pair(random), pair(random));
            let both =
                |a: Vec<f64>, b: Vec<f64>| a.into_iter().zip(b).map(|(a, b)| a * b).collect::<Vec<f64>>();
            let op = Op::Hadamard(Hadamard { pairs: [one, two], scale });
            (op, scaled(both(left, right)), sizes(both(left_size, right_size)))
        }
        2 => {
            let divisor = |random: &mut Random, n: usize| {
                let all: Vec<usize> = (1..=n).filter(|d| n % d == 0).collect();
                all[random.below(all.len())]
            };
            let (a, b) = (divisor(random, rows), divisor(random, channels));
            let (c, d) = (rows / a, cols / b);
            let (w1, w2) = (random.values(a * b), random.values(c * d));
            let at = |i: usize| {
                let (r, k) = (i / cols, i % cols);
                f64::from(w1[r / c * b + k / d]) * f64::from(w2[r % c * d + k % d])
            };
            let delta: Vec<f64> = (0..rows * cols).map(at).collect();
            let op = Op::Kron(Kron { w1: tensor(&w1, a), w2: tensor(&w2, c), scale });
            (op, scaled(delta.clone()), sizes(delta))
        }
        3 => {
            let diff = random.values(rows * cols);
            let size = wide(&diff).into_iter().map(f64::abs).collect();
            (Op::Dense(Dense { diff: tensor(&diff, rows), scale: 1.0 }), wide(&diff), size)
        }
        _ => {
            let axis = random.below(2);
            let v = random.values([rows, channels][axis]);
            let factor = |i: usize| f64::from(v[if axis == 0 { i / cols } else { i % cols / kernel }]);
            let delta: Vec<f64> = base.iter().enumerate().map(|(i, w)| w * factor(i)).collect();
            let size = delta.iter().map(|d| d.abs()).collect();
            (Op::Scale(Scale { v: Tensor::of_f32(v.clone(), &[v.len()]), axis }), delta, size)
        }
    }
}

#[test]
fn merge_is_the_formula_rounded_once() {
    let mut random = Random(11);
    for case in 0..400 {
        let float = [Float::F32, Float::F16, Float::BF16][case % 3];
        let (rows, channels, kernel) =
            (1 + random.below(300), 1 + random.below(40), [1, 3, 9][random.below(3)]);
        let shape = [rows, channels, kernel];
        let cols = channels * kernel;
        let base = packed(float, &random.values(rows * cols));
        let pristine = unpacked(float, &base);
        let mut want: Vec<f64> = pristine.iter().map(|v| f64::from(*v)).collect();
        let mut size: Vec<f64> = want.iter().map(|v| v.abs()).collect();
        let mut touched = vec![false; want.len()];
        let mut parts = Vec::new();
        for _ in 0..random.below(4) {
            let slice = match random.below(3) {
                0 => None,
                axis => {
                    let total = if axis == 1 { rows } else { channels };
                    let start = random.below(total);
                    Some(Slice { axis: axis - 1, start, len: 1 + random.below(total - start) })
                }
            };
            let pick =
                |axis, total| slice.filter(|s| s.axis == axis).map_or((0, total), |s| (s.start, s.len));
            let ((r0, rn), (c0, cn)) = (pick(0, rows), pick(1, channels));
            let strength = f64::from(random.value()) * 2.0;
            let region: Vec<f64> = (0..rn)
                .flat_map(|r| (0..cn * kernel).map(move |c| (r0 + r) * cols + c0 * kernel + c))
                .map(|at| f64::from(pristine[at]))
                .collect();
            let (op, delta, magnitude) = any_op(&mut random, &[rn, cn, kernel], &region);
            for r in 0..rn {
                for c in 0..cn * kernel {
                    let (at, own) = ((r0 + r) * cols + c0 * kernel + c, r * cn * kernel + c);
                    touched[at] = true;
                    want[at] += strength * delta[own];
                    size[at] += strength.abs() * magnitude[own];
                }
            }
            parts.push((op, strength, slice));
        }
        let terms: Vec<Term<'_>> = parts
            .iter()
            .map(|(op, strength, slice)| Term { op, strength: *strength, slice: *slice })
            .collect();
        let (mut from, mut to) = (base.clone(), vec![0xff; base.len()]);
        cpu::merge(
            "w",
            &view(&mut from, float, &shape),
            &view(&mut to, float, &shape),
            &Default::default(),
            &terms,
        )
        .expect("merge");
        assert_eq!(from, base, "the base of a merge elsewhere is only read");
        let target = view(&mut from, float, &shape);
        cpu::merge("w", &target, &target, &Default::default(), &terms).expect("merge in place");
        assert_eq!(from, to, "in place and elsewhere are the same bits");
        for (i, got) in unpacked(float, &to).into_iter().enumerate() {
            if !touched[i] {
                let bits = i * float.size()..(i + 1) * float.size();
                assert_eq!(to[bits.clone()], base[bits], "case {case}: untouched element {i} keeps its bits");
                continue;
            }
            // Half a step of the result's dtype, and the sums' own rounding: at most 64 additions of f32.
            let bound = 0.5 * ulp(float, want[i]) + 64.0 * 2f64.powi(-24) * size[i];
            assert!(
                (f64::from(got) - want[i]).abs() <= bound,
                "case {case}, element {i}: {got} for {}",
                want[i]
            );
        }
    }
}

#[test]
fn strength_zero_keeps_every_bit() {
    // A negative zero and a NaN with a payload would not survive an addition.
    let bits: [u16; 4] = [0x8000, 0x7fc1, 0x0001, 0x3f80];
    let mut bytes: Vec<u8> = bits.iter().flat_map(|b| b.to_le_bytes()).collect();
    let op = Op::LowRank(LowRank {
        up: Tensor::of_f32(vec![1.0; 2], &[2, 1]),
        down: Tensor::of_f32(vec![1.0; 2], &[1, 2]),
        scale: 1.0,
    });
    let target = view(&mut bytes, Float::BF16, &[2, 2]);
    cpu::merge("w", &target, &target, &Default::default(), &[Term { op: &op, strength: 0.0, slice: None }])
        .expect("merge");
    assert_eq!(bytes, bits.iter().flat_map(|b| b.to_le_bytes()).collect::<Vec<u8>>());
}

#[test]
fn bypass_is_the_convolution_of_the_delta() {
    let mut random = Random(5);
    for case in 0..120 {
        let groups = [1, 1, 2][random.below(3)];
        let (channels, out) = (1 + random.below(5), groups * (1 + random.below(5)));
        let axes = 1 + random.below(3);
        let dims = |r: &mut Random, low: usize, range: usize| {
            (0..axes).map(|_| low + r.below(range)).collect::<Vec<_>>()
        };
        let (kernel, stride) = (dims(&mut random, 1, 3), dims(&mut random, 1, 2));
        let (padding, dilation) = (dims(&mut random, 0, 3), dims(&mut random, 1, 2));
        let input = dims(&mut random, 6, 4);
        let output: Vec<usize> = (0..axes)
            .map(|a| (input[a] + 2 * padding[a] - dilation[a] * (kernel[a] - 1) - 1) / stride[a] + 1)
            .collect();
        let taps: usize = kernel.iter().product();
        let weight = random.values(out * channels * taps);
        let wide: Vec<f64> = weight.iter().map(|v| f64::from(*v)).collect();
        let (op, delta, _) = any_op(&mut random, &[out, channels, taps], &wide);
        let x_shape = [vec![2, channels * groups], input.clone()].concat();
        let y_shape = [vec![2, out], output.clone()].concat();
        let (x, y) = (random.values(x_shape.iter().product()), random.values(y_shape.iter().product()));

        let mut want: Vec<f64> = y.iter().map(|v| f64::from(*v)).collect();
        let (pixels_in, pixels) = (input.iter().product::<usize>(), output.iter().product::<usize>());
        let at = |mut index: usize, sizes: &[usize]| {
            let mut place = vec![0; sizes.len()];
            for a in (0..sizes.len()).rev() {
                place[a] = index % sizes[a];
                index /= sizes[a];
            }
            place
        };
        for n in 0..2 {
            for o in 0..out {
                let group = o / (out / groups);
                for p in 0..pixels {
                    let place = at(p, &output);
                    for tap in 0..taps {
                        let shift = at(tap, &kernel);
                        let from: Option<usize> = (0..axes).try_fold(0, |sum, a| {
                            let i =
                                (place[a] * stride[a] + shift[a] * dilation[a]).checked_sub(padding[a])?;
                            (i < input[a]).then_some(sum * input[a] + i)
                        });
                        let Some(from) = from else { continue };
                        for c in 0..channels {
                            let weight = delta[(o * channels + c) * taps + tap];
                            let pixel = x[((n * groups + group) * channels + c) * pixels_in + from];
                            want[(n * out + o) * pixels + p] += 0.7 * weight * f64::from(pixel);
                        }
                    }
                }
            }
        }

        let (mut x, mut y) = (packed(Float::F32, &x), packed(Float::F32, &y));
        let mut base = packed(Float::F32, &weight);
        let base = view(&mut base, Float::F32, &[vec![out, channels], kernel].concat());
        let geometry = Geometry { stride, padding, dilation, groups };
        let (x, target) = (view(&mut x, Float::F32, &x_shape), view(&mut y, Float::F32, &y_shape));
        bypass::forward("w", &base, &geometry, &x, &target, &[Term { op: &op, strength: 0.7, slice: None }])
            .expect("forward");
        for (i, (got, want)) in unpacked(Float::F32, &y).into_iter().zip(&want).enumerate() {
            // Sums of a few hundred f32 products of numbers below 1.
            assert!((f64::from(got) - want).abs() < 2e-5, "case {case}, element {i}: {got} for {want}");
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let mut bytes = vec![0u8; 24];
    let target = view(&mut bytes, Float::F32, &[2, 3]);
    let op = Op::LowRank(LowRank {
        up: Tensor::of_f32(vec![1.0; 3], &[3, 1]),
        down: Tensor::of_f32(vec![1.0; 3], &[1, 3]),
        scale: 1.0,
    });
    let error = cpu::merge(
        "w",
        &target,
        &target,
        &Default::default(),
        &[Term { op: &op, strength: 1.0, slice: None }],
    )
    .unwrap_err();
    assert!(error.to_string().contains("[2, 3]") && error.to_string().contains("[3, 3]"), "{error}");
    // SAFETY: nothing is read from a view that is refused for its dtype.
    let ints = unsafe { View::from_raw(bytes.as_mut_ptr(), Device::Cpu, Dtype::I32, &[2, 3], None) }
        .expect("a good view");
    let error = cpu::merge("ids", &ints, &ints, &Default::default(), &[]).unwrap_err();
    assert!(error.to_string().contains("ids") && error.to_string().contains("I32"), "{error}");
}
