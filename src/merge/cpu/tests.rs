use super::*;
use crate::dtype::{Dtype, Float, Rounding};

/// Values without a pattern, about 1.
fn noise(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed * 2 + 1;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

fn tensor(shape: &[usize], seed: u64) -> Tensor {
    Tensor::of_f32(noise(shape.iter().product(), seed), shape)
}

fn low_rank(rows: usize, cols: usize, rank: usize, seed: u64) -> Op {
    Op::LowRank(LowRank {
        up: tensor(&[rows, rank], seed),
        down: tensor(&[rank, cols], seed + 1),
        scale: 0.5,
    })
}

fn stored(float: Float, values: &[f32], shape: &[usize]) -> Tensor {
    let mut bytes = vec![0u8; values.len() * float.size()];
    float.write(values, &mut bytes);
    Tensor::of_vec(bytes, float.dtype(), shape).unwrap()
}

fn merged(base: &Tensor, dtype: Dtype, storage: &Storage, terms: &[Term<'_>]) -> Vec<f32> {
    let size = crate::dtype::byte_len(dtype, base.shape()).unwrap();
    let out = Tensor::of_vec(vec![0xaa; size], dtype, base.shape()).unwrap();
    merge("w", base, &out, storage, terms).unwrap();
    out.to_f32("w").unwrap()
}

/// `sum` of the terms in f64.
fn sum(shape: [usize; 2], terms: &[Term<'_>]) -> Vec<f64> {
    let mut sum = vec![0f64; shape[0] * shape[1]];
    for term in terms {
        let Op::LowRank(op) = term.op else { panic!("only thin products") };
        let region = Region::of("w", &shape, term.slice).unwrap();
        let (up, down) = (op.up.to_f32("w").unwrap(), op.down.to_f32("w").unwrap());
        let (rank, width) = (op.up.shape()[1], region.cols.len());
        for (i, r) in region.rows.clone().enumerate() {
            for (j, c) in region.cols.clone().enumerate() {
                let dot: f64 =
                    (0..rank).map(|k| f64::from(up[i * rank + k]) * f64::from(down[k * width + j])).sum();
                sum[r * shape[1] + c] += term.strength * op.scale * dot;
            }
        }
    }
    sum
}

#[test]
fn tiles_of_every_size_give_the_formula() {
    for (rows, cols, rank) in
        [(1, 1, 1), (5, 7, 3), (12, 32, 4), (13, 33, 32), (320, 36, 160), (24, 500, 400), (8, 9, 0)]
    {
        let (base, op) = (tensor(&[rows, cols], 1), low_rank(rows, cols, rank, 2));
        let other = low_rank(rows, cols, 5, 9);
        let terms = [&op, &other].map(|op| Term { op, strength: 0.75, slice: None });
        let want = sum([rows, cols], &terms);
        let got = merged(&base, Dtype::F32, &Storage::default(), &terms);
        for ((got, w), s) in got.iter().zip(base.to_f32("w").unwrap()).zip(&want) {
            let (want, bound) = (f64::from(w) + s, 1e-6 * (rank + 5) as f64);
            assert!((f64::from(*got) - want).abs() <= bound, "{rows} x {cols}, {rank}: {got} for {want}");
        }
        // In place as out of place.
        let own = stored(Float::F32, &base.to_f32("w").unwrap(), &[rows, cols]);
        merge("w", &own, &own, &Storage::default(), &terms).unwrap();
        assert_eq!(own.to_f32("w").unwrap(), got);
    }
}

#[test]
fn slices_touch_their_part_and_leave_the_rest_to_the_bit() {
    use crate::view::Slice;
    let base = stored(Float::F32, &vec![-0.0; 40 * 50], &[40, 50]);
    let (one, two, three) = (low_rank(17, 50, 3, 1), low_rank(20, 50, 4, 5), low_rank(40, 21, 2, 7));
    let slice = |axis, start, len| Some(Slice { axis, start, len });
    let terms = [
        Term { op: &one, strength: 1.0, slice: slice(0, 3, 17) },
        Term { op: &two, strength: 0.5, slice: slice(0, 10, 20) },
        Term { op: &three, strength: -1.0, slice: slice(1, 20, 21) },
    ];
    let want = sum([40, 50], &terms);
    let got = merged(&base, Dtype::F32, &Storage::default(), &terms);
    for (got, want) in got.iter().zip(&want) {
        assert!((f64::from(*got) - want).abs() < 1e-5);
        assert!(*want != 0.0 || got.to_bits() == (-0f32).to_bits());
    }
    let nothing = merged(&base, Dtype::F32, &Storage::default(), &[]);
    assert!(nothing.iter().all(|w| w.to_bits() == (-0f32).to_bits()));
}

#[test]
fn every_kernel_of_this_machine_gives_the_product() {
    for (kernel, depth) in
        Kernel::all().iter().flat_map(|kernel| [1, 16, 17, 32, 37].map(|depth| (kernel, depth)))
    {
        let (a, b) = (noise(depth * kernel.rows, 3), noise(depth * kernel.cols, 4));
        for rows in 1..=kernel.rows {
            let stride = kernel.cols + 3;
            let base = noise(kernel.rows * stride + 1, 5);
            let mut out = vec![7f32; kernel.rows * stride];
            let tile = Tile {
                depth,
                a: a.as_ptr(),
                b: b.as_ptr(),
                base: base[1..].as_ptr(),
                base_stride: stride,
                out: out.as_mut_ptr(),
                out_stride: stride,
                rows,
                stream: false,
                ahead: base.as_ptr(),
            };
            // SAFETY: the vectors hold what the tile says.
            unsafe { kernel.run(&tile) };
            for (i, got) in out.iter().enumerate() {
                let (r, c) = (i / stride, i % stride);
                let dot = |k: usize| f64::from(a[k * kernel.rows + r]) * f64::from(b[k * kernel.cols + c]);
                let inside = r < rows && c < kernel.cols;
                let want =
                    if inside { f64::from(base[i + 1]) + (0..depth).map(dot).sum::<f64>() } else { 7.0 };
                assert!((f64::from(*got) - want).abs() < 1e-4, "{}: {got} for {want}", kernel.name);
            }
        }
    }
}

#[test]
fn a_deep_product_is_no_single_chain_of_additions() {
    let depth = 160;
    for kernel in Kernel::all() {
        let (height, width) = (kernel.rows, kernel.cols);
        let (a, b) = (noise(depth * height, 3), noise(depth * width, 4));
        let (zeros, mut out) = (vec![0f32; width], vec![0f32; height * width]);
        let tile = Tile {
            depth,
            a: a.as_ptr(),
            b: b.as_ptr(),
            base: zeros.as_ptr(),
            base_stride: 0,
            out: out.as_mut_ptr(),
            out_stride: width,
            rows: height,
            stream: false,
            ahead: zeros.as_ptr(),
        };
        // SAFETY: the vectors hold what the tile says.
        unsafe { kernel.run(&tile) };
        let (mut blocks, mut chain) = (0.0, 0.0);
        for (i, got) in out.iter().enumerate() {
            let factors = |k: usize| (a[k * height + i / width], b[k * width + i % width]);
            let exact: f64 = (0..depth).map(factors).map(|(x, y)| f64::from(x) * f64::from(y)).sum();
            let one = (0..depth).map(factors).fold(0f32, |sum, (x, y)| x.mul_add(y, sum));
            blocks += (f64::from(*got) - exact).powi(2);
            chain += (f64::from(one) - exact).powi(2);
        }
        // Blocks of 16: sqrt(160 * 16 / 2 + 16 * 54) of a rounding against sqrt(160 * 160 / 2), 0.41.
        let ratio = (blocks / chain).sqrt();
        assert!(ratio < 0.6, "{}: {ratio} of the error of one chain", kernel.name);
    }
}

#[test]
fn a_result_does_not_depend_on_what_is_merged_beside_it() {
    let shapes = [(700, 900), (64, 64), (1300, 330)];
    let weights: Vec<Tensor> = shapes.iter().map(|&(r, c)| tensor(&[r, c], 3)).collect();
    let ops: Vec<Op> = shapes.iter().map(|&(r, c)| low_rank(r, c, 9, 6)).collect();
    let terms: Vec<[Term<'_>; 1]> = ops.iter().map(|op| [Term { op, strength: 0.3, slice: None }]).collect();
    let outs: Vec<Tensor> =
        shapes.iter().map(|&(r, c)| stored(Float::F32, &vec![0.0; r * c], &[r, c])).collect();
    let job = |i: usize| Work {
        pristine: None,
        name: "w",
        base: &weights[i],
        out: &outs[i],
        storage: Storage::default(),
        terms: &terms[i],
    };
    let jobs: Vec<Work<'_>> = (0..3).map(job).collect();
    let mut heard = Vec::new();
    merge_all(&jobs, &mut |done| {
        heard.push(done);
        Ok(())
    })
    .unwrap();
    assert_eq!(heard, [0, 1, 2]);
    for (i, out) in outs.iter().enumerate() {
        let alone = merged(&weights[i], Dtype::F32, &Storage::default(), &terms[i]);
        assert_eq!(alone, out.to_f32("w").unwrap());
    }
}

#[test]
fn a_scale_belongs_to_the_stored_numbers() {
    let (shape, scale) = ([20, 70], 0.02f32);
    let op = low_rank(20, 70, 3, 4);
    let dense = Op::Dense(super::super::ops::Dense { diff: tensor(&shape, 8), scale: 0.25 });
    let set = Op::Replace(super::super::ops::Replace { value: tensor(&shape, 9) });
    for float in [Float::F32, Float::BF16, Float::E4M3, Float::E5M2] {
        let base = stored(float, &noise(1400, 2), &shape);
        let codes = base.to_f32("w").unwrap();
        for rounding in [Rounding::Nearest, Rounding::Stochastic { seed: 99 }] {
            let storage = Storage { scale, rounding };
            for others in [vec![], vec![&dense], vec![&set]] {
                let ops = [vec![&op], others].concat();
                let terms: Vec<Term<'_>> =
                    ops.iter().map(|op| Term { op, strength: 0.01, slice: None }).collect();
                // The same on the real values, in f32.
                let real: Vec<f32> = codes.iter().map(|v| scale * v).collect();
                let real = Tensor::of_f32(real, &shape);
                let sums = merged(&real, Dtype::F32, &Storage::default(), &terms);
                let want: Vec<f32> = sums.iter().map(|w| w / scale).collect();
                let mut bytes = vec![0u8; 1400 * float.size()];
                float.write_rounded(&want, &mut bytes, rounding, 0);
                let want = Tensor::of_vec(bytes, float.dtype(), &shape).unwrap().to_f32("w").unwrap();
                assert_eq!(merged(&base, float.dtype(), &storage, &terms), want, "{float:?} {rounding:?}");
            }
        }
    }
}

#[test]
fn weights_of_8_bits_keep_every_code_where_nothing_is_added() {
    let zero = Op::LowRank(LowRank {
        up: Tensor::of_f32(vec![0.0; 16 * 2], &[16, 2]),
        down: tensor(&[2, 16], 1),
        scale: 1.0,
    });
    for float in [Float::E4M3, Float::E5M2] {
        let all: Vec<u8> = (0..=255).collect();
        let base = Tensor::of_vec(all.clone(), float.dtype(), &[16, 16]).unwrap();
        let out = Tensor::of_vec(vec![1; 256], float.dtype(), &[16, 16]).unwrap();
        for rounding in [Rounding::Nearest, Rounding::Stochastic { seed: 3 }] {
            let storage = Storage { scale: 0.3, rounding };
            let terms = [Term { op: &zero, strength: 1.0, slice: None }];
            merge("w", &base, &out, &storage, &terms).unwrap();
            assert_eq!(out.bytes().unwrap(), all);
        }
    }
}
