//! DyLoRA in training: a LoRA of which every micro-step draws a prefix, so that every prefix of the file's ranks works by itself.
//!
//! Valipour et al. 2022, arXiv:2210.07558. The ranks are blocks of `block_size`; block j of n is drawn, each as often as the others. Ranks
//! 0 .. b - 1, b = (j + 1) * block_size, make `dW = alpha / b * up[:, ..b] @ down[..b]`: what [`super::lora`] reads from a file that is cut to
//! b ranks, since alpha stays. `nested` false: only the drawn block learns (the paper's FROZEN mode, LyCORIS, sd-scripts); true: all that take
//! part do (the paper). Outside of training there are all ranks.
//!
//! Others scale otherwise: LyCORIS trains with alpha / (j + 1), `block_size` times what its file says; sd-scripts lets all ranks take part,
//! with alpha / rank * sqrt(rank / b). Their files are read as what they say, and so are ours by them.

use super::draw::Purpose;
use super::factored::{Factored, Factors};
use super::lora::training::Training as Lora;
use super::training::{Begin, Pass, Rule, Trainable};
use crate::error::Result;
use tch::{Kind, Tensor};

pub(super) const BEGIN: Begin = Begin {
    names: &["dylora"],
    new: |layer, rule, _| {
        // A Tucker core mixes the ranks.
        let lora = Lora::new(layer, &Rule { tucker: false, ..rule.clone() });
        let source = Prefix { rank: rule.dim, block_size: rule.block_size, nested: rule.nested };
        Ok(Box::new(Factored { parameters: lora.parameters(), lora, source }))
    },
};

/// The drawn prefix, as a LoRA of all ranks.
#[derive(Debug)]
struct Prefix {
    rank: usize,
    block_size: usize,
    nested: bool,
}

impl Factors for Prefix {
    const NAME: &'static str = "DyLoRA";
    const PRODUCT: bool = true;

    fn factors(&self, pass: &Pass) -> Result<[Tensor; 2]> {
        let (down, up) = (&pass.parameters[0], &pass.parameters[1]);
        let Some(draw) = pass.draw else { return Ok([down.shallow_clone(), up.shallow_clone()]) };
        let size = self.block_size as f64;
        let block = draw.uniform(Purpose::Own, &[])?.f_mul_scalar((self.rank / self.block_size) as f64)?;
        let first = block.f_floor()?.f_mul_scalar(size)?;
        let count = first.f_add_scalar(size)?;
        // The shape of the ranks beside each factor's other axes.
        let mut ranks = vec![1i64; down.dim()];
        ranks[0] = down.size()[0];
        let index = Tensor::f_arange(ranks[0], (Kind::Float, down.device()))?.f_reshape(&ranks[..])?;
        let (mut down, mut up) = (down.shallow_clone(), up.shallow_clone());
        if !self.nested {
            let drawn = index.f_ge_tensor(&first)?;
            down = down.f_where_self(&drawn, &down.f_detach()?)?;
            up = up.f_where_self(&drawn.f_transpose(0, 1)?, &up.f_detach()?)?;
        }
        // alpha / count out of alpha / rank. In fp32, so that the scale has all its digits.
        let factor =
            index.f_lt_tensor(&count)?.f_mul(&count.f_reciprocal()?.f_mul_scalar(self.rank as f64)?)?;
        Ok([down.f_mul(&factor)?.f_to_kind(pass.compute)?, up])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::algo::draw::{Draw, Dropout};
    use crate::algo::training::{long, Layer};
    use crate::algo::training_tests::{rule, wave};
    use crate::algo::Group;
    use crate::merge::bypass::Geometry;
    use crate::merge::ops::Op;
    use crate::view::Tensor as Numbers;

    /// Blocks of this size in a rank of 6.
    fn module(layer: &Layer, block_size: usize, nested: bool) -> Box<dyn Trainable> {
        (BEGIN.new)(layer, &Rule { dim: 6, block_size, nested, ..rule() }, None).unwrap()
    }

    /// The factors, stored as 8 ranks.
    fn leaves(layer: &Layer) -> Vec<Tensor> {
        let kernel = long(&layer.weight[2..]);
        let down = wave(&[&[8, layer.weight[1] as i64], &kernel[..]].concat(), 0.3);
        let up = wave(&[&[layer.weight[0] as i64, 8], &vec![1; kernel.len()][..]].concat(), 1.1);
        let _ = (down.narrow(0, 6, 2).zero_(), up.narrow(1, 6, 2).zero_());
        [down, up].map(|t| t.set_requires_grad(true)).into()
    }

    /// What a pass that draws differs in from one that does not.
    fn pass<'a>(layer: &'a Layer, parameters: &'a [Tensor], draw: &'a Draw) -> Pass<'a> {
        Pass { layer, parameters, weight: None, draw: Some(draw), ranks: None, compute: Kind::Double }
    }

    fn layers() -> [Layer; 2] {
        let sliding =
            |weight: &[usize]| Layer::sliding("layer", weight, &Geometry::default(), false).unwrap();
        [sliding(&[8, 5]), sliding(&[8, 5, 3, 3])]
    }

    /// dW of the file that is cut to so many ranks.
    fn of_the_file(layer: &Layer, leaves: &[Tensor], ranks: usize) -> Tensor {
        let numbers = |t: &Tensor| {
            let shape: Vec<usize> = t.size().iter().map(|&d| d as usize).collect();
            let values = Vec::<f32>::try_from(t.detach().to_kind(Kind::Float).contiguous().reshape([-1]));
            Numbers::of_f32(values.unwrap(), &shape)
        };
        let mut group = Group::default();
        group.tensors.push(("lora_down.weight", numbers(&leaves[0].narrow(0, 0, 6))));
        group.tensors.push(("lora_up.weight", numbers(&leaves[1].narrow(1, 0, 6))));
        group.tensors.push(("alpha", Numbers::of_f32(vec![1.7], &[])));
        let cut = crate::algo::read("layer", group).unwrap().prefix("layer", ranks).unwrap().unwrap();
        let ops = cut.lower("layer", &layer.weight).unwrap();
        let [Op::LowRank(op)] = &ops[..] else { panic!("{ops:?}") };
        let matrix = |t: &Numbers| Tensor::from_slice(&t.to_f32("").unwrap()).reshape(long(t.shape()));
        (matrix(&op.up).matmul(&matrix(&op.down)) * op.scale)
            .reshape(long(&layer.weight))
            .to_kind(Kind::Double)
    }

    #[test]
    fn what_is_drawn_is_the_file_cut_there() {
        for layer in layers() {
            let (module, leaves) = (module(&layer, 2, false), leaves(&layer));
            let want = [2, 4, 6].map(|ranks| of_the_file(&layer, &leaves, ranks));
            let mut counts = [0; 3];
            for step in 0..300i64 {
                let draw = Draw::new(&Tensor::from(step), 5, Dropout::default());
                let delta = module.delta(&pass(&layer, &leaves, &draw)).unwrap().detach();
                let near =
                    |w: &Tensor| (&delta - w).norm().double_value(&[]) <= 1e-6 * w.norm().double_value(&[]);
                counts[want.iter().position(near).expect("no prefix")] += 1;
            }
            // Five standard deviations of a binomial distribution: 5 * sqrt(300 * 2 / 9) = 41.
            assert!(counts.iter().all(|&n: &i32| (n - 100).abs() < 41), "{counts:?}");
        }
    }

    #[test]
    fn the_drawn_block_learns_or_all_up_to_it() {
        for layer in layers() {
            let leaves = leaves(&layer);
            let x = wave(&[2, 5, 5, 5], 3.0);
            let y = layer.apply(&x, &wave(&long(&layer.weight), 0.0)).unwrap();
            let grad_y = wave(&y.size(), 5.0);
            for step in 0..10i64 {
                let draw = Draw::new(&Tensor::from(step), 5, Dropout::default());
                let pass = pass(&layer, &leaves, &draw);
                let run = |nested| {
                    tch::no_grad(|| {
                        let into: Vec<Tensor> = leaves.iter().map(Tensor::zeros_like).collect();
                        let input =
                            module(&layer, 2, nested).accumulate(&pass, &x, &grad_y, true, &into).unwrap();
                        (into, input.unwrap())
                    })
                };
                let (own, all) = (run(false), run(true));
                let near = |a: &Tensor, b: &Tensor| (a - b).norm().double_value(&[]) <= 1e-12;
                assert!(near(&own.1, &all.1));
                // The last rank with a gradient tells the block.
                let ranks = |t: &Tensor, axis: i64| {
                    let t = t.transpose(0, axis).contiguous().reshape([8, -1]);
                    Vec::<bool>::try_from(t.abs().sum_dim_intlist(&[1i64][..], false, Kind::Double).gt(0.0))
                        .unwrap()
                };
                for (axis, (own, all)) in own.0.iter().zip(&all.0).enumerate() {
                    let last = ranks(all, axis as i64).iter().rposition(|&r| r).unwrap();
                    assert!([1, 3, 5].contains(&last), "{last}");
                    assert_eq!(ranks(all, axis as i64), [0, 1, 2, 3, 4, 5, 6, 7].map(|r| r <= last));
                    assert_eq!(
                        ranks(own, axis as i64),
                        [0, 1, 2, 3, 4, 5, 6, 7].map(|r| r == last - 1 || r == last)
                    );
                    let (first, axis) = (last as i64 - 1, axis as i64);
                    assert!(near(&own.narrow(axis, first, 2), &all.narrow(axis, first, 2)));
                }
            }
        }
    }
}
