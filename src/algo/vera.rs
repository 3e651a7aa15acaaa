//! VeRA: `dW = diag(lambda_b) @ B[:O] @ diag(lambda_d) @ A[:, :I]`, A and B frozen and shared by all modules of the file.
//!
//! Kopiczko et al. 2023, arXiv:2310.11454; PEFT. A file without the projections (`save_projection = False`) cannot be applied: they would have to
//! be drawn again by torch's generator.
//!
//! | tensor | shape |
//! |---|---|
//! | `vera_lambda_b` | O |
//! | `vera_lambda_d` | r |
//! | `vera_A`, once per file | r, at least the largest I |
//! | `vera_B`, once per file | at least the largest O, r |

use super::{malformed, required, Algorithm, Group, Recipe, ALPHA};
use crate::error::{Error, Result};
use crate::merge::ops::{LowRank, Op};
use crate::view::Tensor;

const LAMBDA_B: &str = "vera_lambda_b";
const LAMBDA_D: &str = "vera_lambda_d";
pub(super) const SHARED: [&str; 2] = ["vera_A", "vera_B"];

pub(super) const RECIPE: Recipe = Recipe {
    name: "VeRA",
    marks: &[LAMBDA_B, LAMBDA_D],
    knows: &[LAMBDA_B, LAMBDA_D, SHARED[0], SHARED[1], ALPHA],
    read,
};

/// One module.
#[derive(Debug)]
struct Vera {
    lambda_b: Tensor,
    lambda_d: Tensor,
    a: Tensor,
    b: Tensor,
}

fn read(module: &str, group: &Group) -> Result<Box<dyn Algorithm>> {
    let (lambda_b, lambda_d) = (required(module, group, LAMBDA_B)?, required(module, group, LAMBDA_D)?);
    if let Some(missing) = SHARED.into_iter().find(|name| group.get(name).is_none()) {
        return Err(Error::Unsupported {
            what: format!("`{module}`: the file lacks the shared projection `{missing}`"),
            hint: "save it with save_projection=True".into(),
        });
    }
    let (a, b) = (required(module, group, SHARED[0])?, required(module, group, SHARED[1])?);
    let rank = lambda_d.count();
    let fits = a.shape().len() == 2
        && b.shape().len() == 2
        && a.shape()[0] == rank
        && b.shape()[1] == rank
        && b.shape()[0] >= lambda_b.count();
    if !fits {
        let what = format!(
            "factors do not fit together: lambda_b {:?}, lambda_d {:?}, A {:?}, B {:?}",
            lambda_b.shape(),
            lambda_d.shape(),
            a.shape(),
            b.shape()
        );
        return Err(malformed(module, what));
    }
    let [lambda_b, lambda_d, a, b] = [lambda_b, lambda_d, a, b].map(Clone::clone);
    Ok(Box::new(Vera { lambda_b, lambda_d, a, b }))
}

impl Algorithm for Vera {
    fn name(&self) -> &'static str {
        "VeRA"
    }

    fn rank(&self) -> Option<usize> {
        Some(self.lambda_d.count())
    }

    fn shape(&self) -> Option<Vec<usize>> {
        None
    }

    fn lower(&self, module: &str, target: &[usize]) -> Result<Vec<Op>> {
        let (rank, rows, width) = (self.lambda_d.count(), self.lambda_b.count(), self.a.shape()[1]);
        let cols: usize = target.iter().skip(1).product();
        if target.first() != Some(&rows) || cols > width {
            return Err(Error::Shape {
                tensor: module.to_owned(),
                what: "the module does not fit the weight (module's rows and most columns first)".into(),
                expected: vec![rows, width],
                got: target.to_vec(),
            });
        }
        let (lambda_b, lambda_d) = (self.lambda_b.to_f32(module)?, self.lambda_d.to_f32(module)?);
        let (a, b) = (self.a.to_f32(module)?, self.b.to_f32(module)?);
        let up = (0..rows * rank).map(|i| lambda_b[i / rank] * b[i]).collect();
        let down = (0..rank * cols).map(|i| lambda_d[i / cols] * a[i / cols * width + i % cols]).collect();
        let (up, down) = (Tensor::of_f32(up, &[rows, rank]), Tensor::of_f32(down, &[rank, cols]));
        Ok(vec![Op::LowRank(LowRank { up, down, scale: 1.0 })])
    }

    fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        vec![
            (LAMBDA_B, &self.lambda_b),
            (LAMBDA_D, &self.lambda_d),
            (SHARED[0], &self.a),
            (SHARED[1], &self.b),
        ]
    }
}
