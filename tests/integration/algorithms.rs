//! Every algorithm, from the bytes of a file to a weight, against its formula in f64: merged, unmerged and reloaded agree, strength 0 is the
//! base bit for bit. Random layers, ranks, alphas, dtypes and strengths; the formulas here are written from the papers, element by element.

use crate::random::{packed, ulp, unpacked, view, Random};
use lycore::adapter::Adapter;
use lycore::dtype::Float;
use lycore::merge::bypass::{self, Geometry};
use lycore::merge::cpu;
use lycore::merge::ops::Term;
use safetensors::tensor::{Dtype, TensorView};

/// A matrix in f64.
#[derive(Clone)]
struct M {
    rows: usize,
    cols: usize,
    v: Vec<f64>,
}

impl M {
    fn of(rows: usize, cols: usize, at: impl Fn(usize, usize) -> f64) -> M {
        M { rows, cols, v: (0..rows * cols).map(|i| at(i / cols, i % cols)).collect() }
    }

    fn one(n: usize) -> M {
        M::of(n, n, |i, j| f64::from(u8::from(i == j)))
    }

    fn at(&self, i: usize, j: usize) -> f64 {
        self.v[i * self.cols + j]
    }

    fn t(&self) -> M {
        M::of(self.cols, self.rows, |i, j| self.at(j, i))
    }

    fn mul(&self, b: &M) -> M {
        assert_eq!(self.cols, b.rows);
        M::of(self.rows, b.cols, |i, j| (0..self.cols).map(|k| self.at(i, k) * b.at(k, j)).sum())
    }

    fn zip(&self, b: &M, f: impl Fn(f64, f64) -> f64) -> M {
        assert_eq!((self.rows, self.cols), (b.rows, b.cols));
        M { v: self.v.iter().zip(&b.v).map(|(a, b)| f(*a, *b)).collect(), ..*self }
    }

    fn add(&self, b: &M) -> M {
        self.zip(b, |a, b| a + b)
    }

    fn sub(&self, b: &M) -> M {
        self.zip(b, |a, b| a - b)
    }

    fn times(&self, s: f64) -> M {
        M { v: self.v.iter().map(|v| v * s).collect(), ..*self }
    }

    fn abs(&self) -> M {
        M { v: self.v.iter().map(|v| v.abs()).collect(), ..*self }
    }

    fn norm(&self) -> f64 {
        self.v.iter().map(|v| v * v).sum::<f64>().sqrt()
    }

    fn max(&self) -> f64 {
        self.v.iter().fold(0.0, |m, v| m.max(v.abs()))
    }

    fn kron(&self, b: &M) -> M {
        M::of(self.rows * b.rows, self.cols * b.cols, |i, j| {
            self.at(i / b.rows, j / b.cols) * b.at(i % b.rows, j % b.cols)
        })
    }

    /// Gauss-Jordan with pivots.
    fn inverse(&self) -> M {
        let n = self.rows;
        let (mut a, mut b) = (self.clone(), M::one(n));
        for c in 0..n {
            let p = (c..n).max_by(|&x, &y| a.at(x, c).abs().total_cmp(&a.at(y, c).abs())).unwrap();
            for m in [&mut a, &mut b] {
                (0..n).for_each(|j| m.v.swap(c * n + j, p * n + j));
            }
            let d = a.at(c, c);
            for m in [&mut a, &mut b] {
                (0..n).for_each(|j| m.v[c * n + j] /= d);
            }
            for r in (0..n).filter(|&r| r != c) {
                let f = a.at(r, c);
                for m in [&mut a, &mut b] {
                    (0..n).for_each(|j| m.v[r * n + j] -= f * m.v[c * n + j]);
                }
            }
        }
        b
    }
}

/// A layer's weight.
struct Layer {
    shape: Vec<usize>,
    out: usize,
    inner: usize,
    taps: usize,
}

impl Layer {
    fn any(random: &mut Random) -> Layer {
        let axes = [0, 0, 0, 1, 2, 2, 3][random.below(7)];
        let kernel: Vec<usize> = (0..axes).map(|_| [1, 1, 2, 3][random.below(4)]).collect();
        // Rotations need sizes that have divisors, the others any.
        let size = |r: &mut Random| if r.below(2) == 0 { 4 * (1 + r.below(4)) } else { 1 + r.below(13) };
        let (out, inner) = (size(random), size(random));
        let taps = kernel.iter().product();
        Layer { shape: [vec![out, inner], kernel].concat(), out, inner, taps }
    }

    fn kernel(&self) -> &[usize] {
        &self.shape[2..]
    }

    fn cols(&self) -> usize {
        self.inner * self.taps
    }

    /// [1, ..] as many as the kernel has axes.
    fn ones(&self) -> Vec<usize> {
        vec![1; self.kernel().len()]
    }
}

/// What a module does to W at a strength.
type Change = Box<dyn Fn(&M, f64) -> M>;

/// One module: its tensors, and W' - W by the formula, with the largest magnitude that was summed on the way.
struct Module {
    tensors: Vec<(&'static str, Vec<usize>, Vec<f32>)>,
    change: Change,
    size: f64,
}

/// Makes tensors whose values are exact in the file's dtype.
struct Maker<'a> {
    random: &'a mut Random,
    float: Float,
    tensors: Vec<(&'static str, Vec<usize>, Vec<f32>)>,
}

impl Maker<'_> {
    fn tensor(&mut self, name: &'static str, shape: &[usize], by: f32) -> M {
        let n = shape.iter().product();
        let values: Vec<f32> = self.random.values(n).into_iter().map(|v| v * by).collect();
        let values = unpacked(self.float, &packed(self.float, &values));
        self.tensors.push((name, shape.to_vec(), values.clone()));
        M { rows: shape[0], cols: n / shape[0].max(1), v: values.into_iter().map(f64::from).collect() }
    }

    fn number(&mut self, name: &'static str, value: f32) -> f64 {
        let value = unpacked(self.float, &packed(self.float, &[value]))[0];
        self.tensors.push((name, vec![], vec![value]));
        f64::from(value)
    }

    /// alpha / rank, with alpha missing, zero or any.
    fn scale(&mut self, rank: usize) -> f64 {
        match self.random.below(4) {
            0 => 1.0,
            1 => {
                self.number("alpha", 0.0);
                1.0
            }
            _ => {
                let alpha = self.random.value() * 4.0;
                let alpha = self.number("alpha", alpha);
                if alpha == 0.0 {
                    1.0
                } else {
                    alpha / rank as f64
                }
            }
        }
    }

    fn divisor(&mut self, n: usize) -> usize {
        let all: Vec<usize> = (1..=n).filter(|d| n % d == 0).collect();
        all[self.random.below(all.len())]
    }
}

/// dW and the same of the factors' magnitudes.
type Delta = (M, f64);

fn fixed(maker: Maker<'_>, (delta, size): Delta) -> Module {
    Module { tensors: maker.tensors, size: size + delta.max(), change: Box::new(move |_, s| delta.times(s)) }
}

/// [p, i * k] = sum_q core[p, q, k] inner[q, i]
fn fold(core: &M, inner: &M, taps: usize) -> M {
    let q = inner.rows;
    M::of(core.rows, inner.cols * taps, |p, at| {
        (0..q).map(|j| core.at(p, j * taps + at % taps) * inner.at(j, at / taps)).sum()
    })
}

fn lora(maker: &mut Maker<'_>, l: &Layer) -> Delta {
    let rank = 1 + maker.random.below(9);
    let tucker = !l.kernel().is_empty() && maker.random.below(3) == 0;
    let up = maker.tensor("lora_up.weight", &[&[l.out, rank][..], &l.ones()].concat(), 1.0);
    let (down, small) = if tucker {
        let down = maker.tensor("lora_down.weight", &[&[rank, l.inner][..], &l.ones()].concat(), 1.0);
        let mid = maker.tensor("lora_mid.weight", &[&[rank, rank][..], l.kernel()].concat(), 1.0);
        (fold(&mid, &down, l.taps), fold(&mid.abs(), &down.abs(), l.taps))
    } else {
        let down = maker.tensor("lora_down.weight", &[&[rank, l.inner][..], l.kernel()].concat(), 1.0);
        (down.clone(), down.abs())
    };
    let scale = maker.scale(rank);
    (up.mul(&down).times(scale), up.abs().mul(&small).max() * scale.abs())
}

fn loha(maker: &mut Maker<'_>, l: &Layer) -> Delta {
    let rank = 1 + maker.random.below(6);
    let tucker = !l.kernel().is_empty() && maker.random.below(2) == 0;
    let mut half = |a: &'static str, b: &'static str, t: &'static str| {
        if tucker {
            let a = maker.tensor(a, &[rank, l.out], 1.0);
            let b = maker.tensor(b, &[rank, l.inner], 1.0);
            let t = maker.tensor(t, &[&[rank, rank][..], l.kernel()].concat(), 1.0);
            // sum_ij t[i, j, k] a[i, p] b[j, q]
            (a.t().mul(&fold(&t, &b, l.taps)), a.abs().t().mul(&fold(&t.abs(), &b.abs(), l.taps)))
        } else {
            let (a, b) = (maker.tensor(a, &[l.out, rank], 1.0), maker.tensor(b, &[rank, l.cols()], 1.0));
            (a.mul(&b), a.abs().mul(&b.abs()))
        }
    };
    let (one, one_size) = half("hada_w1_a", "hada_w1_b", "hada_t1");
    let (two, two_size) = half("hada_w2_a", "hada_w2_b", "hada_t2");
    let scale = maker.scale(rank);
    (one.zip(&two, |a, b| a * b).times(scale), one_size.zip(&two_size, |a, b| a * b).max() * scale.abs())
}

fn lokr(maker: &mut Maker<'_>, l: &Layer) -> Delta {
    let (a, b) = (maker.divisor(l.out), maker.divisor(l.inner));
    let (c, d) = (l.out / a, l.inner / b);
    let rank = 1 + maker.random.below(4);
    let (w1, small1, thin1) = if maker.random.below(2) == 0 {
        let w = maker.tensor("lokr_w1", &[a, b], 1.0);
        (w.clone(), w.abs(), false)
    } else {
        let (x, y) = (maker.tensor("lokr_w1_a", &[a, rank], 1.0), maker.tensor("lokr_w1_b", &[rank, b], 1.0));
        (x.mul(&y), x.abs().mul(&y.abs()), true)
    };
    let (w2, small2, thin2) = match maker.random.below(3) {
        0 => {
            let w = maker.tensor("lokr_w2", &[&[c, d][..], l.kernel()].concat(), 1.0);
            (w.clone(), w.abs(), false)
        }
        1 if !l.kernel().is_empty() => {
            let x = maker.tensor("lokr_w2_a", &[rank, c], 1.0);
            let y = maker.tensor("lokr_w2_b", &[rank, d], 1.0);
            let t = maker.tensor("lokr_t2", &[&[rank, rank][..], l.kernel()].concat(), 1.0);
            let product = |x: &M, y: &M, t: &M| x.t().mul(&fold(t, y, l.taps));
            (product(&x, &y, &t), product(&x.abs(), &y.abs(), &t.abs()), true)
        }
        _ => {
            let x = maker.tensor("lokr_w2_a", &[c, rank], 1.0);
            let y = maker.tensor("lokr_w2_b", &[rank, d * l.taps], 1.0);
            (x.mul(&y), x.abs().mul(&y.abs()), true)
        }
    };
    let scale = if thin1 || thin2 {
        maker.scale(rank)
    } else {
        // LyCORIS' alpha of no meaning.
        maker.number("alpha", 7.0);
        1.0
    };
    (w1.kron(&w2).times(scale), small1.kron(&small2).max() * scale.abs())
}

/// V o m / |V| - W for additive deltas.
fn dora(maker: &mut Maker<'_>, l: &Layer, (delta, size): Delta) -> (Change, f64) {
    let input = maker.random.below(3) == 0;
    let flat = !input && maker.random.below(3) == 0;
    let shape = match (input, flat) {
        (true, _) => [&[1, l.inner][..], &l.ones()].concat(),
        (_, true) => vec![l.out],
        _ => [&[l.out, 1][..], &l.ones()].concat(),
    };
    // A lone value says nothing about its axis.
    let input = input && !(l.inner == 1 && l.out == 1);
    let m = maker.tensor("dora_scale", &shape, 1.0);
    let taps = l.taps;
    let most = m.max();
    let change = move |w: &M, s: f64| {
        let v = w.add(&delta);
        let group = |i: usize, j: usize| if input { j / taps } else { i };
        let mut squares = vec![0f64; m.v.len()];
        for i in 0..v.rows {
            for j in 0..v.cols {
                squares[group(i, j)] += v.at(i, j).powi(2);
            }
        }
        let new = M::of(v.rows, v.cols, |i, j| {
            let g = group(i, j);
            if squares[g] > 0.0 {
                v.at(i, j) * m.v[g] / squares[g].sqrt()
            } else {
                0.0
            }
        });
        new.sub(w).times(s)
    };
    (Box::new(change), size + most)
}

/// (I + Q)(I - Q)^-1 of every block of B - B^T, shrunk together to `limit`.
fn cayley(blocks: &[M], limit: f64) -> Vec<M> {
    let skew: Vec<M> = blocks.iter().map(|b| b.sub(&b.t())).collect();
    let norm = skew.iter().map(|q| q.norm().powi(2)).sum::<f64>().sqrt();
    let by = if limit > 0.0 && norm > limit { limit / norm } else { 1.0 };
    skew.iter()
        .map(|q| {
            let (q, one) = (q.times(by), M::one(q.rows));
            one.add(&q).mul(&one.sub(&q).inverse())
        })
        .collect()
}

fn blocks_of(all: &M, b: usize) -> Vec<M> {
    all.v.chunks_exact(b * b).map(|v| M { rows: b, cols: b, v: v.to_vec() }).collect()
}

fn block_diagonal(blocks: &[M]) -> M {
    let b = blocks[0].rows;
    M::of(b * blocks.len(), b * blocks.len(), |i, j| {
        if i / b == j / b {
            blocks[i / b].at(i % b, j % b)
        } else {
            0.0
        }
    })
}

fn oft(maker: &mut Maker<'_>, l: &Layer) -> (Change, f64) {
    let b = maker.divisor(l.out);
    let n = l.out / b;
    let rotations = match maker.random.below(3) {
        0 => blocks_of(&maker.tensor("oft_diag", &[n, b, b], 1.0), b),
        constrained => {
            let blocks = blocks_of(&maker.tensor("oft_blocks", &[n, b, b], 0.5), b);
            let alpha = if constrained == 1 { maker.number("alpha", 0.05) } else { 0.0 };
            cayley(&blocks, alpha * l.out as f64)
        }
    };
    let turn = block_diagonal(&rotations).t();
    let rescale = (maker.random.below(2) == 0)
        .then(|| maker.tensor("rescale", &[&[l.out, 1][..], &l.ones()].concat(), 1.0));
    let size = 2.0 + turn.abs().max() * b as f64;
    let change = move |w: &M, s: f64| {
        let turned = turn.mul(w);
        let factor = |i: usize| rescale.as_ref().map_or(1.0, |r| r.v[i]);
        M::of(w.rows, w.cols, |i, j| s * (factor(i) * turned.at(i, j) - w.at(i, j)))
    };
    (Box::new(change), size)
}

/// The butterfly as LyCORIS reshapes it: (c g k) -> (c k g), in groups of b, and back.
fn boft(maker: &mut Maker<'_>, l: &Layer) -> Option<(Change, f64)> {
    let b = [2, 4].into_iter().filter(|b| l.out % b == 0).nth(maker.random.below(2))?;
    let n = l.out / b;
    let most = (0..4).take_while(|m| l.out % ((1 << m) * b) == 0).count();
    let m = 1 + maker.random.below(most);
    let all = maker.tensor("oft_blocks", &[m, n, b, b], 0.5);
    let alpha = if maker.random.below(2) == 0 { maker.number("alpha", 0.05) } else { 0.0 };
    let rotations = cayley(&blocks_of(&all, b), alpha * l.out as f64);
    let rescale = (maker.random.below(2) == 0)
        .then(|| maker.tensor("rescale", &[&[l.out, 1][..], &l.ones()].concat(), 1.0));
    let change = move |w: &M, s: f64| {
        let mut x = w.clone();
        for i in 0..m {
            let (g, k) = (2, (1 << i) * b / 2);
            // Row of x that stands at position t after unflatten(c, g, k).transpose.flatten.
            let place = |t: usize| {
                let (c, rest) = (t / (g * k), t % (g * k));
                let (kk, gg) = (rest / g, rest % g);
                c * g * k + gg * k + kk
            };
            let gathered = M::of(x.rows, x.cols, |t, j| x.at(place(t), j));
            let stage: Vec<M> =
                rotations[i * n..][..n].iter().map(|r| r.times(s).add(&M::one(b).times(1.0 - s))).collect();
            let turned = block_diagonal(&stage).mul(&gathered);
            let mut out = x.clone();
            for t in 0..x.rows {
                for j in 0..x.cols {
                    out.v[place(t) * x.cols + j] = turned.at(t, j);
                }
            }
            x = out;
        }
        let factor = |i: usize| rescale.as_ref().map_or(1.0, |r| 1.0 + s * (r.v[i] - 1.0));
        M::of(w.rows, w.cols, |i, j| factor(i) * x.at(i, j) - w.at(i, j))
    };
    // At |s| = 2 a stage grows by 2 |R| + 3 at most.
    Some((Box::new(change), 4f64.powi(m as i32) * 6.0))
}

fn glora(maker: &mut Maker<'_>, l: &Layer) -> (Change, f64) {
    let rank = 1 + maker.random.below(5);
    let ones = l.ones();
    let wide = |a: usize, b: usize, rest: &[usize]| [&[a, b][..], rest].concat();
    let old = maker.random.below(2) == 0 && l.taps == 1 && rank != l.inner;
    let (a1, a2, b1, b2) = if old {
        let a1 = maker.tensor("a1.weight", &wide(rank, l.inner, &ones), 1.0);
        let a2 = maker.tensor("a2.weight", &wide(l.inner, rank, &ones), 1.0);
        let b1 = maker.tensor("b1.weight", &wide(rank, l.inner, &ones), 1.0);
        let b2 = maker.tensor("b2.weight", &wide(l.out, rank, &ones), 1.0);
        (a2, a1, b2, b1)
    } else {
        let a1 = maker.tensor("a1.weight", &wide(l.inner, rank, &ones), 1.0);
        let a2 = maker.tensor("a2.weight", &wide(rank, l.inner, &ones), 1.0);
        let b1 = maker.tensor("b1.weight", &wide(l.out, rank, &ones), 1.0);
        let b2 = maker.tensor("b2.weight", &wide(rank, l.inner, l.kernel()), 1.0);
        (a1, a2, b1, b2)
    };
    let scale = maker.scale(rank);
    let size = scale.abs() * (a1.abs().mul(&a2.abs()).max() * l.inner as f64 + b1.abs().mul(&b2.abs()).max());
    let (right, fixed, taps, inner) = (a1.mul(&a2), b1.mul(&b2), l.taps, l.inner);
    let change = move |w: &M, s: f64| {
        M::of(w.rows, w.cols, |o, at| {
            let own: f64 = (0..inner).map(|i| w.at(o, i * taps + at % taps) * right.at(i, at / taps)).sum();
            s * scale * (own + fixed.at(o, at))
        })
    };
    (Box::new(change), size)
}

const KINDS: &[&str] = &[
    "LoRA",
    "LoHa",
    "LoKr",
    "full",
    "norm",
    "set",
    "(IA)^3",
    "GLoRA",
    "OFT",
    "BOFT",
    "DoRA",
    "DoRA (LoHa)",
    "DoRA (LoKr)",
    "scalar",
];

/// A random module of a kind for a layer; `None` where the kind has none for this layer.
fn module(kind: &str, random: &mut Random, l: &Layer, float: Float) -> Option<Module> {
    let mut maker = Maker { random, float, tensors: Vec::new() };
    let (change, size) = match kind {
        "LoRA" => {
            let delta = lora(&mut maker, l);
            return Some(fixed(maker, delta));
        }
        "LoHa" => {
            let delta = loha(&mut maker, l);
            return Some(fixed(maker, delta));
        }
        "LoKr" => {
            let delta = lokr(&mut maker, l);
            return Some(fixed(maker, delta));
        }
        "scalar" => {
            let (delta, size) = match maker.random.below(3) {
                0 => lora(&mut maker, l),
                1 => loha(&mut maker, l),
                _ => lokr(&mut maker, l),
            };
            let scalar = maker.random.value() * 2.0;
            let scalar = maker.number("scalar", scalar);
            return Some(fixed(maker, (delta.times(scalar), size * scalar.abs())));
        }
        "full" => {
            let diff = maker.tensor("diff", &l.shape, 1.0);
            return Some(fixed(maker, (diff, 1.0)));
        }
        "norm" if l.shape.len() == 2 => {
            let diff = maker.tensor("w_norm", &l.shape, 1.0);
            return Some(fixed(maker, (diff, 1.0)));
        }
        "set" => {
            let value = maker.tensor("set_weight", &l.shape, 1.0);
            (Box::new(move |w: &M, s: f64| value.sub(w).times(s)) as Change, 2.0)
        }
        "(IA)^3" => {
            let on_input = maker.random.below(2);
            let count = [l.out, l.inner][on_input];
            let shape =
                if l.kernel().is_empty() { vec![count] } else { [&[1, count][..], &l.ones()].concat() };
            let v = maker.tensor("weight", &shape, 1.0);
            maker.number("on_input", on_input as f32);
            let taps = l.taps;
            let change = move |w: &M, s: f64| {
                M::of(w.rows, w.cols, |i, j| s * w.at(i, j) * v.v[if on_input == 0 { i } else { j / taps }])
            };
            (Box::new(change) as Change, 1.0)
        }
        "GLoRA" => glora(&mut maker, l),
        "OFT" => oft(&mut maker, l),
        "BOFT" => boft(&mut maker, l)?,
        "DoRA" => {
            let delta = lora(&mut maker, l);
            dora(&mut maker, l, delta)
        }
        "DoRA (LoHa)" => {
            let delta = loha(&mut maker, l);
            dora(&mut maker, l, delta)
        }
        "DoRA (LoKr)" => {
            let delta = lokr(&mut maker, l);
            dora(&mut maker, l, delta)
        }
        _ => return None,
    };
    Some(Module { tensors: maker.tensors, change, size })
}

const NAME: &str = "lora_unet_layer";

/// The bytes of a file with this module.
fn file(module: &Module, float: Float) -> Vec<u8> {
    let dtype = match float {
        Float::F32 => Dtype::F32,
        Float::F16 => Dtype::F16,
        Float::BF16 => Dtype::BF16,
        Float::E4M3 => Dtype::F8_E4M3,
        Float::E5M2 => Dtype::F8_E5M2,
    };
    let bytes: Vec<_> = module
        .tensors
        .iter()
        .map(|(slot, shape, values)| (format!("{NAME}.{slot}"), shape.clone(), packed(float, values)))
        .collect();
    let views = bytes.iter().map(|(name, shape, bytes)| {
        (name.clone(), TensorView::new(dtype, shape.clone(), bytes).expect("a tensor"))
    });
    safetensors::serialize(views, None).expect("a file")
}

/// Merges `adapter`'s only module, and runs the layer unmerged, on a base of this dtype.
fn apply(
    adapter: &Adapter,
    l: &Layer,
    base: &[u8],
    float: Float,
    strength: f64,
    x: &[f32],
) -> (Vec<u8>, Vec<f32>) {
    let ops = adapter.modules()[0].algorithm.lower(NAME, &l.shape);
    let ops = ops.unwrap_or_else(|e| panic!("{e}: {:?}", adapter.modules()[0]));
    let terms: Vec<Term<'_>> = ops.iter().map(|op| Term { op, strength, slice: None }).collect();
    let mut merged = base.to_vec();
    let target = view(&mut merged, float, &l.shape);
    cpu::merge("w", &target, &target, &Default::default(), &terms).expect("merge");
    // An input as large as the kernel: one output, the sum over the whole weight.
    let (x_shape, y_shape) = match l.kernel().is_empty() {
        true => (vec![2, l.inner], vec![2, l.out]),
        false => ([&[2, l.inner][..], l.kernel()].concat(), [&[2, l.out][..], &l.ones()].concat()),
    };
    let (mut own, mut x, mut y) = (base.to_vec(), packed(Float::F32, x), vec![0; 2 * l.out * 4]);
    let (weight, x) = (view(&mut own, float, &l.shape), view(&mut x, Float::F32, &x_shape));
    let target = view(&mut y, Float::F32, &y_shape);
    bypass::forward("w", &weight, &Geometry::default(), &x, &target, &terms).expect("forward");
    (merged, unpacked(Float::F32, &y))
}

#[test]
fn merged_unmerged_and_reloaded_are_the_formula() {
    let cases = 20_000;
    let folder = tempfile::tempdir().expect("a folder");
    let mut random = Random(2026);
    let mut counts = vec![0usize; KINDS.len()];
    let mut worst = vec![0f64; KINDS.len()];
    let floats = [Float::F32, Float::F16, Float::BF16];
    for case in 0..cases {
        let l = Layer::any(&mut random);
        let kind = case % KINDS.len();
        let stored = floats[random.below(3)];
        let Some(module) = module(KINDS[kind], &mut random, &l, stored) else { continue };
        counts[kind] += 1;
        let what = || format!("case {case}: {} on {:?} of {:?}", KINDS[kind], l.shape, module.tensors);
        let adapter =
            Adapter::from_bytes(file(&module, stored)).unwrap_or_else(|e| panic!("{}: {e}", what()));
        let float = floats[random.below(3)];
        let base = packed(float, &random.values(l.out * l.cols()));
        let w = unpacked(float, &base).into_iter().map(f64::from).collect();
        let w = M { rows: l.out, cols: l.cols(), v: w };
        let strength = f64::from(random.value()) * 2.0;
        let x = random.values(2 * l.cols());
        let (merged, y) = apply(&adapter, &l, &base, float, strength, &x);
        let change = (module.change)(&w, strength);
        let want = w.add(&change);
        // Sums of at most some hundred products in f32, relative to the largest that is summed.
        let rounding = 3e-6 * (1.0 + module.size * strength.abs().max(1.0));
        for (i, got) in unpacked(float, &merged).into_iter().enumerate() {
            let off = (f64::from(got) - want.v[i]).abs();
            assert!(
                off <= 0.5 * ulp(float, want.v[i]) * (1.0 + 1e-3) + rounding,
                "{}, element {i}: {got} for {}",
                what(),
                want.v[i]
            );
            if float == Float::F32 {
                worst[kind] = worst[kind].max(off / (1.0 + module.size * strength.abs().max(1.0)));
            }
        }
        for n in 0..2 {
            for o in 0..l.out {
                let want: f64 = (0..l.cols()).map(|k| change.at(o, k) * f64::from(x[n * l.cols() + k])).sum();
                let got = f64::from(y[n * l.out + o]);
                assert!(
                    (got - want).abs() <= rounding * l.cols() as f64,
                    "{}, unmerged output {o}: {got} for {want}",
                    what()
                );
            }
        }
        let (untouched, silent) = apply(&adapter, &l, &base, float, 0.0, &x);
        assert!(untouched == base && silent.iter().all(|y| *y == 0.0), "{}: strength 0", what());
        if case % 10 == 0 {
            let path = folder.path().join("again.safetensors");
            adapter.save(&path).expect("save");
            let again = Adapter::open(&path).unwrap_or_else(|e| panic!("{}: saved: {e}", what()));
            let result = apply(&again, &l, &base, float, strength, &x);
            assert!(result == (merged, y), "{}: reloaded", what());
        }
    }
    for (kind, (count, worst)) in KINDS.iter().zip(counts.iter().zip(&worst)) {
        println!("{kind}: {count} cases, worst {worst:.1e} of what was summed");
        assert!(*count > 100, "{kind}: only {count} cases");
    }
}
