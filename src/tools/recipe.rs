//! One module of a combined file: which tensors it will have, known before anything is computed, and their values.

use super::combine::{Method, Options};
use super::delta::{self, Pair};
use super::matching::Member;
use super::sheet::Part;
use super::sparse;
use super::svd::{balance, Decomposition};
use crate::adapter::keys::Dialect;
use crate::dtype::{Dtype, Float};
use crate::error::{Error, Result};
use crate::linalg::Matrix;
use crate::merge::ops::{Op, Term};
use crate::view::Tensor;
use serde_json::{json, Value};

/// The plan of one module.
pub struct Recipe<'a> {
    members: &'a [Member<'a>],
    form: Form,
    /// As it was read or made: the shape of the layer's weight; empty without one.
    shape: Vec<usize>,
    /// Per member, the ops on its weight and on its bias.
    ops: Vec<(Vec<Op>, Vec<Op>)>,
    float: Float,
    /// The tensors, in the order in which `make` gives them.
    pub layout: Vec<(String, Dtype, Vec<usize>)>,
}

/// How the result is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// Bit for bit.
    Copied,
    /// The same tensors; the weight in alpha where there is one.
    Scaled,
    /// All factors, one behind the other.
    Product(usize),
    /// Factors of PEFT's `linear`.
    Linear(usize),
    /// The sum, cut to a rank; whether its parts are thin.
    Cut { rank: usize, thin: bool },
    /// The whole difference.
    Whole,
    /// Only a bias.
    Bias,
}

/// Slots that a factor on the delta may simply multiply.
const LINEAR_SLOTS: &[&str] = &["diff", "diff_b", "w_norm", "b_norm"];
/// Where it goes when there is no alpha to carry it.
const CARRIERS: &[&str] = &["lora_up.weight", "lora_up.bias", "hada_w1_a", "lokr_w1", "lokr_w1_a"];

impl<'a> Recipe<'a> {
    /// Decides the form of a module and its tensors.
    pub fn plan(members: &'a [Member<'a>], options: &Options) -> Result<Self> {
        let float = options.dtype.unwrap_or_else(|| {
            let tensors: Vec<_> = members.iter().flat_map(|m| m.module.algorithm.tensors()).collect();
            delta::float_of(tensors.iter().map(|(_, t)| *t))
        });
        let mut recipe = Recipe {
            members,
            form: Form::Copied,
            shape: Vec::new(),
            ops: Vec::new(),
            float,
            layout: Vec::new(),
        };
        if let ([member], Method::Concat | Method::Linear) = (members, options.method) {
            // What cannot be computed with can still be handed on.
            let as_it_is = options.dtype.is_none() || additive(member).is_err();
            if member.weight == 1.0 && as_it_is && recipe.holds_all(member) {
                recipe.layout = recipe.copied()?.iter().map(Part::row).collect();
                return Ok(recipe);
            }
        }
        for member in members {
            recipe.ops.push(additive(member)?);
        }
        recipe.shape = shape(members)?;
        // Shapes first: every op must fit the one shape.
        for (member, (ops, _)) in members.iter().zip(&mut recipe.ops) {
            if !ops.is_empty() {
                *ops = member.module.algorithm.lower(&member.module.name, &recipe.shape)?;
            }
        }
        recipe.form = recipe.pick(options)?;
        if recipe.form == Form::Whole {
            recipe.float = recipe.whole_float(options);
        }
        recipe.layout = match recipe.form {
            Form::Scaled => recipe.scaled()?.iter().map(Part::row).collect(),
            _ => recipe.rows(),
        };
        Ok(recipe)
    }

    /// Its name in the output.
    pub fn name(&self) -> &str {
        self.members.first().map_or("", |m| &m.module.name)
    }

    /// Its modules.
    pub fn members(&self) -> &[Member<'a>] {
        self.members
    }

    /// The rank of the result.
    pub fn rank(&self) -> Option<usize> {
        match self.form {
            Form::Copied | Form::Scaled => self.members.first()?.module.algorithm.rank(),
            Form::Product(rank) | Form::Linear(rank) | Form::Cut { rank, .. } => Some(rank),
            Form::Whole | Form::Bias => None,
        }
    }

    /// Whether every tensor of the module is its own in the file (VeRA's projections are not).
    fn holds_all(&self, member: &Member<'_>) -> bool {
        let Some(group) = member.source.group(&member.module.name) else { return false };
        member
            .module
            .algorithm
            .tensors()
            .iter()
            .all(|(slot, _)| *slot == "alpha" || member.source.holds(group, slot))
    }

    fn pick(&self, options: &Options) -> Result<Form> {
        let weights: Vec<(&Member<'_>, &Op)> = self.weight_ops().collect();
        if weights.is_empty() {
            return Ok(Form::Bias);
        }
        let exact = matches!(options.method, Method::Concat | Method::Linear);
        if let ([member], true) = (self.members, exact) {
            let simple = matches!(
                member.module.algorithm.name(),
                "LoRA" | "LoCon" | "LoHa" | "LoKr" | "full" | "norm" | "bias"
            );
            if simple && self.holds_all(member) {
                return Ok(Form::Scaled);
            }
        }
        let (rows, cols) = match &self.shape[..] {
            [rows, rest @ ..] if !rest.is_empty() => (*rows, rest.iter().product::<usize>()),
            _ => return Ok(Form::Whole),
        };
        let ranks: Option<Vec<usize>> =
            weights.iter().map(|(m, op)| delta::exact_rank(m.module, op)).collect();
        let total = ranks.as_ref().and_then(|r| r.iter().try_fold(0usize, |sum, r| sum.checked_add(*r)));
        let side = rows.min(cols);
        let limit = options.limit(self.shape.len() > 2);
        Ok(match (options.method, limit, total) {
            (Method::Linear, ..) => {
                let thin = weights.iter().all(|(_, op)| matches!(op, Op::LowRank(_)));
                match ranks.as_deref() {
                    Some([first, rest @ ..]) if thin && rest.iter().all(|r| r == first) => {
                        Form::Linear(*first)
                    }
                    _ => return Err(self.unequal(&weights)),
                }
            }
            (Method::Concat, _, Some(total))
                if total.saturating_mul((rows + cols) * self.float.size())
                    <= rows * cols * self.whole_float(options).size() =>
            {
                Form::Product(total)
            }
            (Method::Concat, ..) | (Method::Sparse(_), None, _) => Form::Whole,
            (Method::Svd, limit, Some(total)) if total < side => {
                Form::Cut { rank: limit.unwrap_or(total).min(total), thin: true }
            }
            (Method::Svd | Method::Sparse(_), limit, _) => {
                Form::Cut { rank: limit.unwrap_or(side).min(side), thin: false }
            }
        })
    }

    /// The dtype of a whole difference. The sum of products has more digits than a half type's factors had: an exact sum keeps them.
    fn whole_float(&self, options: &Options) -> Float {
        let thin = self.weight_ops().any(|(m, op)| delta::exact_rank(m.module, op).is_some());
        let exact = options.method == Method::Concat && thin;
        options.dtype.unwrap_or(if exact { Float::F32 } else { self.float })
    }

    fn unequal(&self, weights: &[(&Member<'_>, &Op)]) -> Error {
        let kinds: Vec<String> = weights
            .iter()
            .map(|(m, _)| {
                format!("{} of rank {:?}", m.module.algorithm.name(), m.module.algorithm.rank().unwrap_or(0))
            })
            .collect();
        Error::Unsupported {
            what: format!(
                "`{}`: linear adds factors of equal ranks, these are {}",
                self.name(),
                kinds.join(", ")
            ),
            hint: "concat or svd take any ranks and algorithms".into(),
        }
    }

    fn weight_ops(&self) -> impl Iterator<Item = (&Member<'a>, &Op)> {
        self.members.iter().zip(&self.ops).flat_map(|(m, (ops, _))| ops.iter().map(move |op| (m, op)))
    }

    fn key(&self, slot: &str) -> String {
        match self.members.first() {
            Some(m) => m.source.key(m.module, slot),
            None => slot.to_owned(),
        }
    }

    /// Whether the result has its alpha among its tensors. Diffusers refuses a file of its own words that has one; a PEFT file's is for
    /// LyCore, which else would take that of the configuration beside it.
    fn tells_alpha(&self) -> bool {
        self.members.first().is_none_or(|m| {
            m.module.dialect == Dialect::Kohya
                || m.source.group(&m.module.name).is_some_and(|group| m.source.holds(group, "alpha"))
                || self.key("alpha").starts_with("base_model.model.")
        })
    }

    fn is_norm(&self) -> bool {
        self.members.iter().all(|m| m.module.algorithm.name() == "norm")
    }

    /// The layout of a result that is computed.
    fn rows(&self) -> Vec<(String, Dtype, Vec<usize>)> {
        let float = self.float.dtype();
        let mut rows = Vec::new();
        match self.form {
            Form::Product(rank) | Form::Linear(rank) | Form::Cut { rank, .. } => {
                let ones = vec![1; self.shape.len().saturating_sub(2)];
                rows.push((self.key("lora_down.weight"), float, [&[rank][..], &self.shape[1..]].concat()));
                rows.push((self.key("lora_up.weight"), float, [vec![self.shape[0], rank], ones].concat()));
                if self.tells_alpha() {
                    rows.push((self.key("alpha"), Dtype::F32, Vec::new()));
                }
            }
            Form::Whole => rows.push((
                self.key(if self.is_norm() { "w_norm" } else { "diff" }),
                float,
                self.shape.clone(),
            )),
            Form::Copied | Form::Scaled | Form::Bias => {}
        }
        if let Some(shape) = self.bias_shape() {
            rows.push((self.key(if self.is_norm() { "b_norm" } else { "diff_b" }), float, shape));
        }
        rows
    }

    fn bias_shape(&self) -> Option<Vec<usize>> {
        self.ops
            .iter()
            .flat_map(|(_, bias)| bias)
            .next()
            .and_then(delta::size)
            .map(|[rows, cols]| vec![rows * cols])
    }

    /// The tensors, and the report's line.
    pub fn make(&self, options: &Options) -> Result<(Vec<Part>, Value)> {
        let from: Vec<usize> = self.members.iter().map(|m| m.number).collect();
        let mut entry = json!({"module": self.name(), "from": from, "rank": self.rank()});
        let form = match self.form {
            Form::Copied => "copied",
            Form::Scaled => "scaled",
            Form::Product(_) => "concatenated",
            Form::Linear(_) => "linear",
            Form::Cut { .. } => "cut",
            Form::Whole => "whole",
            Form::Bias => "bias",
        };
        entry["form"] = json!(form);
        let mut parts = match self.form {
            Form::Copied => return Ok((self.copied()?, entry)),
            Form::Scaled => return Ok((self.scaled()?, entry)),
            Form::Bias => Vec::new(),
            Form::Product(rank) => {
                let (pair, scale) = self.concatenated(true)?;
                self.thin(pair, rank, scale)?
            }
            Form::Linear(rank) => self.thin(self.linear()?, rank, 1.0)?,
            Form::Whole => {
                let sum = match options.method {
                    Method::Sparse(method) if self.shape.len() > 1 => self.sparse(method, options)?,
                    _ => self.sum()?,
                };
                let key = self.key(if self.is_norm() { "w_norm" } else { "diff" });
                vec![Part::made(key, self.float, self.shape.clone(), &sum.values)?]
            }
            Form::Cut { rank, thin } => {
                let svd = match (options.method, thin) {
                    (_, true) => Decomposition::product(self.name(), self.concatenated(false)?.0)?,
                    (Method::Sparse(method), _) => {
                        Decomposition::whole(self.name(), &self.sparse(method, options)?, rank, false)?
                    }
                    _ => Decomposition::whole(self.name(), &self.sum()?, rank, false)?,
                };
                let mut pair = svd.cut(rank);
                if self.float == Float::F16 {
                    balance(&mut pair);
                }
                entry["error"] = json!(svd.error(&pair, self.float));
                self.thin(pair, rank, 1.0)?
            }
        };
        if let Some(shape) = self.bias_shape() {
            let terms: Vec<Term<'_>> = self.terms(|(_, bias)| bias);
            let sum = delta::sum(self.name(), &shape, &terms, None)?;
            let key = self.key(if self.is_norm() { "b_norm" } else { "diff_b" });
            parts.push(Part::made(key, self.float, shape, &sum.values)?);
        }
        Ok((parts, entry))
    }

    fn copied(&self) -> Result<Vec<Part>> {
        let Some(Member { source, module, .. }) = self.members.first() else { return Ok(Vec::new()) };
        source.group(&module.name).map_or(Ok(Vec::new()), |group| source.copied(group))
    }

    /// The tensors of one module at a weight: in alpha where the file's dialect has one, so that no factor is rounded.
    fn scaled(&self) -> Result<Vec<Part>> {
        let Some(Member { source, module, weight, .. }) = self.members.first() else { return Ok(Vec::new()) };
        let tensors = module.algorithm.tensors();
        let scalar =
            tensors.iter().find(|(slot, _)| *slot == "scalar").and_then(|(_, t)| t.scalar()).unwrap_or(1.0);
        // The file's own, not one of a configuration: PEFT and diffusers read no alpha among the tensors.
        let has_alpha = source.group(&module.name).is_some_and(|group| source.holds(group, "alpha"));
        let rank = module.algorithm.rank();
        let own = module.algorithm.alpha().filter(|a| *a != 0.0).map(f64::from);
        let in_alpha = rank.is_some() && (has_alpha || module.dialect == Dialect::Kohya);
        // A scale that no tensor tells (PEFT's, of a LoKr of whole halves) goes into the factor too.
        let untold = match (rank, self.ops.first().and_then(|(ops, _)| ops.first())) {
            (None, Some(op @ Op::Kron(_))) if scalar != 0.0 => op.scale() / scalar,
            _ => 1.0,
        };
        // Without an alpha in the file the scale goes into the factor as well.
        let told = match (rank, own) {
            (Some(rank), Some(own)) if !self.tells_alpha() => own / rank as f64,
            _ => 1.0,
        };
        let mut parts = Vec::with_capacity(tensors.len() + 1);
        for (slot, tensor) in &tensors {
            let factor = if LINEAR_SLOTS.contains(slot) {
                *weight
            } else if !in_alpha && CARRIERS.contains(slot) {
                weight * untold * told
            } else {
                1.0
            };
            if *slot != "alpha" {
                parts.push(self.multiplied(self.key(slot), tensor, factor)?);
            }
        }
        if let Some(rank) = rank.filter(|_| self.tells_alpha()) {
            let alpha = own.unwrap_or(rank as f64) * if in_alpha { *weight } else { 1.0 };
            parts.push(Part::alpha(self.key("alpha"), &[], alpha)?);
        }
        Ok(parts)
    }

    fn multiplied(&self, key: String, tensor: &Tensor, factor: f64) -> Result<Part> {
        if factor == 1.0
            && (Float::of(tensor.dtype()) == Some(self.float) || Float::wide(tensor.dtype()).is_none())
        {
            return Ok(Part::kept(key, tensor));
        }
        let mut values = tensor.to_f32(&key)?;
        values.iter_mut().for_each(|v| *v = (f64::from(*v) * factor) as f32);
        Part::made(key, self.float, tensor.shape().to_vec(), &values)
    }

    /// up, down and alpha, for a delta of `scale * up @ down`.
    fn thin(&self, (mut up, down): Pair, rank: usize, scale: f64) -> Result<Vec<Part>> {
        let mut alpha = scale * rank as f64;
        if self.members.first().is_none_or(|m| m.module.dialect != Dialect::Kohya) {
            // Hosts that read these dialects may not look at an alpha.
            up.values.iter_mut().for_each(|v| *v = (f64::from(*v) * scale) as f32);
            alpha = rank as f64;
        }
        let ones = vec![1; self.shape.len().saturating_sub(2)];
        let down_shape = [&[rank][..], &self.shape[1..]].concat();
        let mut parts = vec![
            Part::made(self.key("lora_down.weight"), self.float, down_shape, &down.values)?,
            Part::made(
                self.key("lora_up.weight"),
                self.float,
                [vec![self.shape[0], rank], ones].concat(),
                &up.values,
            )?,
        ];
        if self.tells_alpha() {
            parts.push(Part::alpha(self.key("alpha"), &[], alpha)?);
        }
        Ok(parts)
    }

    /// All factors behind each other, and the scale that is left outside: the largest coefficient with `outside`, else 1.
    fn concatenated(&self, outside: bool) -> Result<(Pair, f64)> {
        let coefficients: Vec<f64> = self.weight_ops().map(|(m, op)| m.weight * op.scale()).collect();
        let scale = if outside { coefficients.iter().fold(0f64, |m, c| m.max(c.abs())) } else { 1.0 };
        let scale = if scale > 0.0 { scale } else { 1.0 };
        let mut pairs = Vec::with_capacity(coefficients.len());
        for ((member, op), coefficient) in self.weight_ops().zip(&coefficients) {
            let mut pair = delta::factors(member.module, op)?;
            if self.float == Float::F16 && !matches!(op, Op::LowRank(_)) {
                balance(&mut pair);
            }
            let factor = (coefficient / scale) as f32;
            if factor != 1.0 {
                pair.0.values.iter_mut().for_each(|v| *v *= factor);
            }
            pairs.push(pair);
        }
        let (rows, cols) = (self.shape[0], self.shape.iter().skip(1).product());
        let rank: usize = pairs.iter().map(|(up, _)| up.cols).sum();
        let mut up = Matrix::zeros(rows, rank);
        for (r, row) in up.values.chunks_exact_mut(rank.max(1)).enumerate() {
            let mut at = 0;
            for (part, _) in &pairs {
                row[at..at + part.cols].copy_from_slice(&part.values[r * part.cols..][..part.cols]);
                at += part.cols;
            }
        }
        let down = pairs.into_iter().flat_map(|(_, down)| down.values).collect();
        Ok(((up, Matrix::new(down, rank, cols)), scale))
    }

    /// PEFT's `linear`; the sign of a coefficient goes to `up`.
    fn linear(&self) -> Result<Pair> {
        let mut sum: Option<Pair> = None;
        for (member, op) in self.weight_ops() {
            let (mut up, mut down) = delta::factors(member.module, op)?;
            let coefficient = member.weight * op.scale();
            let root = coefficient.abs().sqrt() as f32;
            let signed = root * coefficient.signum() as f32;
            up.values.iter_mut().for_each(|v| *v *= signed);
            down.values.iter_mut().for_each(|v| *v *= root);
            let add =
                |to: &mut Matrix, m: &Matrix| to.values.iter_mut().zip(&m.values).for_each(|(t, v)| *t += v);
            match &mut sum {
                Some((u, d)) => {
                    add(u, &up);
                    add(d, &down);
                }
                None => sum = Some((up, down)),
            }
        }
        sum.ok_or_else(|| Error::Backend(format!("`{}`: nothing to add", self.name())))
    }

    fn terms<'s>(&'s self, of: impl Fn(&'s (Vec<Op>, Vec<Op>)) -> &'s Vec<Op>) -> Vec<Term<'s>> {
        let pairs = self.members.iter().zip(&self.ops);
        pairs
            .flat_map(|(m, ops)| of(ops).iter().map(|op| Term { op, strength: m.weight, slice: None }))
            .collect()
    }

    fn sum(&self) -> Result<Matrix> {
        delta::sum(self.name(), &self.shape, &self.terms(|(ops, _)| ops), None)
    }

    fn sparse(&self, method: sparse::Sparse, options: &Options) -> Result<Matrix> {
        let mut parts = Vec::with_capacity(self.members.len());
        for (member, (ops, _)) in self.members.iter().zip(&self.ops).filter(|(_, (ops, _))| !ops.is_empty()) {
            let terms: Vec<Term<'_>> = ops.iter().map(|op| Term { op, strength: 1.0, slice: None }).collect();
            let sum = delta::sum(self.name(), &self.shape, &terms, None)?;
            if sum.values.iter().any(|v| !v.is_finite()) {
                return Err(delta::not_finite(self.name()));
            }
            parts.push((sum, member.weight));
        }
        let seed = sparse::seed_of(options.seed, self.name());
        Ok(sparse::merge(method, parts, options.density, seed))
    }
}

/// The ops of a module on its weight and on its bias, if they can be added up without the weight.
fn additive(member: &Member<'_>) -> Result<(Vec<Op>, Vec<Op>)> {
    let (module, algorithm) = (member.module, &member.module.algorithm);
    let refused = |why: &str| Error::Unsupported {
        what: format!(
            "{}: `{}`: {} {why}",
            member.source.adapter.path().display(),
            module.name,
            algorithm.name()
        ),
        hint: "merge it into a checkpoint, then extract the difference".into(),
    };
    if algorithm.grown().is_some() {
        return Err(refused("changes the shape of its weight, which cannot be combined"));
    }
    let changes = algorithm.changes();
    let ops = match changes.weight {
        true => algorithm.lower(&module.name, &delta::shape_of(module)?)?,
        false => Vec::new(),
    };
    let bias = match changes.bias {
        true => {
            let tensors = algorithm.tensors();
            let bias = tensors.iter().find(|(slot, _)| crate::algo::is_bias(slot));
            let rows =
                bias.map(|(_, t)| t.count()).or_else(|| ops.first().and_then(delta::size).map(|s| s[0]));
            algorithm.lower_bias(&module.name, &[rows.unwrap_or(0)])?
        }
        false => Vec::new(),
    };
    if ops.iter().chain(&bias).any(Op::reads_weight) {
        return Err(refused(
            "depends on the weight that it changes, so it can be neither scaled nor added without it",
        ));
    }
    Ok((ops, bias))
}

/// The shape that says most: that with a kernel, where factors are flattened in some files.
fn shape(members: &[Member<'_>]) -> Result<Vec<usize>> {
    let changing = members.iter().filter(|m| m.module.algorithm.changes().weight);
    let shapes = changing.map(|m| delta::shape_of(m.module)).collect::<Result<Vec<_>>>()?;
    // `max_by_key` would take the last of equals.
    Ok(shapes.into_iter().rev().max_by_key(Vec::len).unwrap_or_default())
}
