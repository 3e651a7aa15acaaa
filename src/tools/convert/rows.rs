//! The tensors of one module, cut to some of the rows of its weight, or put together from modules of parts of it. Values are copied,
//! never computed; only a LoRA of parts gets zeros between them and an alpha for its new rank.

use crate::adapter::Module;
use crate::dtype::byte_len;
use crate::view::Tensor;

pub(super) const ALPHA: &str = "alpha";
pub(super) const UP: &str = "lora_up.weight";
pub(super) const DOWN: &str = "lora_down.weight";
pub(super) const MID: &str = "lora_mid.weight";
pub(super) const UP_BIAS: &str = "lora_up.bias";
pub(super) const MAGNITUDE: &str = "dora_scale";
pub(super) const PEFT_MAGNITUDE: &str = "lora_magnitude_vector";

/// One module's tensors, without alpha.
#[derive(Clone, Debug)]
pub(super) struct Group {
    /// The algorithm's name.
    pub algorithm: &'static str,
    pub tensors: Vec<(&'static str, Tensor)>,
    /// As the file has it.
    pub alpha: Option<Tensor>,
    pub rank: Option<usize>,
    /// The file's own factor on the delta: alpha / rank.
    pub scale: f64,
}

/// How a tensor goes with the rows of the module's weight.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Share {
    /// Its first axis, each entry for so many rows.
    Rows(usize),
    /// Its second axis.
    Columns,
    /// It serves every row alike.
    All,
    /// Not to be cut; the reason.
    Never(&'static str),
}

const TURNED: &str = "it turns rows of several parts together";

impl Group {
    pub fn of(module: &Module) -> Self {
        let algorithm = &module.algorithm;
        let mut tensors: Vec<_> = algorithm.tensors().into_iter().map(|(n, t)| (n, t.clone())).collect();
        let alpha = tensors.iter().position(|(name, _)| *name == ALPHA).map(|at| tensors.remove(at).1);
        let rank = algorithm.rank();
        let scale = match (algorithm.alpha().filter(|a| *a != 0.0), rank) {
            (Some(alpha), Some(rank)) => f64::from(alpha) / rank as f64,
            // A LoKr of whole halves: PEFT's configuration may scale it all the same.
            (_, None) if algorithm.name() == "LoKr" => whole_scale(module),
            _ => 1.0,
        };
        Group { algorithm: algorithm.name(), tensors, alpha, rank, scale }
    }

    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.tensors.iter().find(|(n, _)| *n == name).map(|(_, t)| t)
    }

    pub fn take(&mut self, name: &str) -> Option<Tensor> {
        self.tensors.iter().position(|(n, _)| *n == name).map(|at| self.tensors.remove(at).1)
    }

    /// The alpha that means this scale at a rank. Files keep fp32: what is one up to the rounding of f64 is that one.
    pub fn alpha_at(&self, rank: usize) -> f64 {
        let alpha = self.scale * rank as f64;
        let short = f64::from(alpha as f32);
        if (short - alpha).abs() <= 4.0 * f64::EPSILON * alpha.abs() {
            short
        } else {
            alpha
        }
    }

    /// One of LoRA, LoCon and their DoRA.
    pub fn is_lora(&self) -> bool {
        self.get(UP).is_some()
    }

    fn share(&self, slot: &str, tensor: &Tensor) -> Share {
        let size = |name: &str, axis: usize| self.get(name).and_then(|t| t.shape().get(axis).copied());
        match slot {
            UP | UP_BIAS | "diff" | "diff_b" | "w_norm" | "b_norm" | "set_weight" | "boft_s" => {
                Share::Rows(1)
            }
            MAGNITUDE | PEFT_MAGNITUDE => match output_axis(slot, tensor, size(UP, 0)) {
                Some(0) => Share::Rows(1),
                Some(_) => Share::Columns,
                None => Share::Never("its norms run over all rows of the weight"),
            },
            "hada_w1_a" | "hada_w2_a" if self.get("hada_t1").is_some() => Share::Columns,
            "hada_w1_a" | "hada_w2_a" => Share::Rows(1),
            "lokr_w1" | "lokr_w1_a" => {
                let inner = match self.get("lokr_t2") {
                    Some(_) => size("lokr_w2_a", 1),
                    None => size("lokr_w2", 0).or(size("lokr_w2_a", 0)),
                };
                inner.map_or(Share::Never("its second half is missing"), Share::Rows)
            }
            "weight" => match self.get("on_input").and_then(|t| t.scalar()) {
                Some(flag) if flag != 0.0 => Share::All,
                _ if tensor.shape().len() > 1 => Share::Columns,
                _ => Share::Rows(1),
            },
            "ia3_l" => match *tensor.shape() {
                [_, 1] => Share::Rows(1),
                [1, _] => Share::All,
                _ => Share::Never("its shape does not tell which channels it scales"),
            },
            "a1.weight" | "a2.weight" | "b1.weight" | "b2.weight" => self.share_of_glora(slot),
            "oft_blocks" | "oft_diag" => match *tensor.shape() {
                // A constraint is a norm over all blocks.
                [_, b, _] if slot == "oft_diag" || self.constraint() <= 0.0 => Share::Rows(b),
                _ => Share::Never(TURNED),
            },
            "rescale" => Share::Rows(1),
            "oft_blocks.0" | "oft_blocks.1" | "oft_blocks.2" | "oft_blocks.3" => Share::Never(TURNED),
            "q_layer.weight" | "p_layer.weight" | "lambda_layer" => {
                Share::Never("it needs the singular values of the whole weight")
            }
            "reshape_weight" => Share::Never("it makes the whole weight grow"),
            "vera_A" | "vera_B" | "vera_lambda_b" | "vera_lambda_d" => {
                Share::Never("its projections stand once in the file for all modules")
            }
            _ => Share::All,
        }
    }

    fn constraint(&self) -> f64 {
        self.alpha.as_ref().and_then(|t| t.scalar()).unwrap_or(0.0)
    }

    /// b1 holds the rows today, b2 did before; square factors do not tell.
    fn share_of_glora(&self, slot: &str) -> Share {
        let size = |name: &str, axis: usize| self.get(name).and_then(|t| t.shape().get(axis).copied());
        let [a1, a2, b1, b2] = ["a1.weight", "a2.weight", "b1.weight", "b2.weight"];
        let now = [size(a1, 1), size(a2, 0), size(b1, 1), size(b2, 0)];
        let before = [size(a1, 0), size(a2, 1), size(b1, 0), size(b2, 1)];
        let alike = |sizes: [Option<usize>; 4]| sizes.windows(2).all(|w| w[0] == w[1]);
        match (alike(now), alike(before), slot) {
            (true, true, _) => Share::Never("both layouts of GLoRA fit its factors"),
            (true, _, "b1.weight") | (_, true, "b2.weight") => Share::Rows(1),
            _ => Share::All,
        }
    }

    /// How many rows its weight has, if its tensors tell.
    pub fn rows(&self) -> Option<usize> {
        self.tensors.iter().find_map(|(slot, t)| match self.share(slot, t) {
            Share::Rows(each) => t.shape().first()?.checked_mul(each),
            Share::Columns => t.shape().get(1).copied(),
            Share::All | Share::Never(_) => None,
        })
    }

    /// The module of these rows alone.
    pub fn cut(&self, start: usize, len: usize) -> Result<Group, String> {
        let mut cut = self.clone();
        for (slot, tensor) in &mut cut.tensors {
            let packed = || format!("`{slot}` is not packed in host memory");
            *tensor = match self.share(slot, tensor) {
                Share::All => continue,
                Share::Never(why) => return Err(format!("its weight is split, and {why}")),
                Share::Columns => columns(tensor, start, len).ok_or_else(packed)?,
                Share::Rows(each) if each > 0 && start % each == 0 && len % each == 0 => {
                    tensor.rows(start / each..(start + len) / each).ok_or_else(packed)?
                }
                Share::Rows(each) => {
                    return Err(format!(
                        "its weight is split at row {start}, inside a block of {each} rows of `{slot}`"
                    ));
                }
            };
        }
        Ok(cut)
    }
}

fn whole_scale(module: &Module) -> f64 {
    let shape = module.algorithm.shape().unwrap_or_default();
    let ops = module.algorithm.lower(&module.name, &shape).unwrap_or_default();
    ops.first().map_or(1.0, |op| op.scale())
}

/// The axis of a magnitude that lies along the output channels; `None` when it lies along the input's.
pub(super) fn output_axis(slot: &str, tensor: &Tensor, rows: Option<usize>) -> Option<usize> {
    let shape = tensor.shape();
    let long: Vec<usize> = (0..shape.len()).filter(|&i| shape[i] != 1).collect();
    match (slot, long[..].first()) {
        (PEFT_MAGNITUDE, _) if shape.len() > 1 => Some(1),
        (_, Some(&0)) => Some(0),
        (_, None) if shape.len() < 2 || rows == Some(1) => Some(0),
        _ => None,
    }
}

/// A part of a weight: the tensors for it, and its rows in the whole.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub group: Group,
    pub start: usize,
    pub len: usize,
}

/// One module from those of its parts, which do not overlap.
pub(super) fn join(mut parts: Vec<Part>, total: usize) -> Result<Group, String> {
    parts.sort_by_key(|p| p.start);
    let Some(first) = parts.first().map(|p| p.group.clone()) else { return Err("it has no parts".into()) };
    if parts.len() == 1 && parts.iter().all(|p| p.start == 0 && p.len == total) {
        return Ok(first);
    }
    let slots = |g: &Group| {
        let mut slots: Vec<_> = g.tensors.iter().map(|(n, _)| *n).collect();
        slots.sort_unstable();
        slots
    };
    let mut end = 0;
    for part in &parts {
        let g = &part.group;
        if part.start < end {
            return Err("two modules change the same rows".into());
        }
        end = part.start + part.len;
        if slots(g) != slots(&first) {
            return Err(format!(
                "its parts have different tensors ({} and {})",
                first.algorithm, g.algorithm
            ));
        }
        if g.scale != first.scale {
            return Err(format!("its parts have different scales ({} and {})", first.scale, g.scale));
        }
        if let Some((slot, _)) =
            g.tensors.iter().find(|(n, t)| first.get(n).is_none_or(|f| f.dtype() != t.dtype()))
        {
            return Err(format!("its parts have `{slot}` in different dtypes"));
        }
    }
    let complete = parts.iter().map(|p| p.len).sum::<usize>() == total;
    // What a missing part would have to hold to change nothing.
    let zero = |slot: &str| {
        !matches!(
            slot,
            MAGNITUDE | PEFT_MAGNITUDE | "set_weight" | "ia3_l" | "rescale" | "oft_diag" | "boft_s"
        )
    };
    if let Some((slot, _)) = first.tensors.iter().find(|(slot, t)| {
        !complete && (!zero(slot) || *slot == "weight" && first.share(slot, t) == Share::All)
    }) {
        return Err(format!("a part of its weight is missing, which `{slot}` cannot leave alone"));
    }
    let differ = |slot: &str| {
        parts.iter().any(|p| p.group.get(slot).zip(first.get(slot)).is_some_and(|(a, b)| !same(a, b)))
    };
    // LoRAs that read the input each their own way.
    let diagonal = first.is_lora() && first.get(MID).is_none() && differ(DOWN);
    let mut joined = first.clone();
    for (slot, tensor) in &mut joined.tensors {
        if diagonal && matches!(*slot, UP | DOWN) {
            continue;
        }
        let shares: Vec<Share> =
            parts.iter().filter_map(|p| p.group.get(slot).map(|t| p.group.share(slot, t))).collect();
        let pieces: Vec<(&Tensor, usize, usize)> =
            parts.iter().filter_map(|p| Some((p.group.get(slot)?, p.start, p.len))).collect();
        let packed = || format!("`{slot}` cannot be put together");
        *tensor = match shares.first().copied() {
            Some(share) if shares.iter().any(|s| *s != share) => return Err(packed()),
            Some(Share::Rows(each))
                if each > 0
                    && total % each == 0
                    && pieces.iter().all(|(_, s, l)| s % each == 0 && l % each == 0) =>
            {
                let pieces: Vec<_> = pieces.iter().map(|(t, s, l)| (*t, s / each, l / each)).collect();
                stack(&pieces, total / each).ok_or_else(packed)?
            }
            Some(Share::Columns) => side_by_side(&pieces, total).ok_or_else(packed)?,
            Some(Share::All) if differ(slot) => {
                let what = first.algorithm;
                return Err(format!(
                    "{what} of separate weights is not one of the whole: their `{slot}` differ"
                ));
            }
            Some(Share::All) => continue,
            Some(Share::Never(why)) => return Err(why.into()),
            _ => return Err(packed()),
        };
    }
    if diagonal {
        return block_diagonal(&parts, joined, total);
    }
    Ok(joined)
}

fn same(a: &Tensor, b: &Tensor) -> bool {
    a.shape() == b.shape() && a.bytes() == b.bytes()
}

/// The LoRA of the whole weight: ranks one after the other, each for its own rows.
fn block_diagonal(parts: &[Part], mut whole: Group, total: usize) -> Result<Group, String> {
    let unequal = || "its parts read inputs of different shape".to_owned();
    let factors: Vec<(&Part, &Tensor, &Tensor)> =
        parts.iter().filter_map(|p| Some((p, p.group.get(UP)?, p.group.get(DOWN)?))).collect();
    let ranks: usize = factors.iter().filter_map(|(_, _, down)| down.shape().first()).sum();
    let mut at = 0;
    let mut downs = Vec::new();
    for (_, _, down) in &factors {
        let rank = down.shape().first().copied().unwrap_or(0);
        downs.push((*down, at, rank));
        at += rank;
    }
    let down = stack(&downs, ranks).ok_or_else(unequal)?;
    let (_, up, _) = factors.first().ok_or_else(unequal)?;
    let size = byte_len(up.dtype(), &[1]).ok_or_else(unequal)?;
    let mut shape = up.shape().to_vec();
    (shape[0], shape[1]) = (total, ranks);
    let mut bytes = vec![0u8; byte_len(up.dtype(), &shape).ok_or_else(unequal)?];
    for ((part, up, _), (_, first, rank)) in factors.iter().zip(&downs) {
        let from = up.bytes().ok_or_else(unequal)?;
        for (row, values) in from.chunks_exact((rank * size).max(1)).enumerate() {
            let at = ((part.start + row) * ranks + first) * size;
            bytes.get_mut(at..at + values.len()).ok_or_else(unequal)?.copy_from_slice(values);
        }
    }
    let up = Tensor::of_vec(bytes, up.dtype(), &shape).ok_or_else(unequal)?;
    for (slot, tensor) in &mut whole.tensors {
        match *slot {
            UP => *tensor = up.clone(),
            DOWN => *tensor = down.clone(),
            _ => {}
        }
    }
    whole.rank = Some(ranks);
    whole.alpha = Some(Tensor::of_f32(vec![whole.alpha_at(ranks) as f32], &[]));
    Ok(whole)
}

/// One above the other, each from its row on; zeros elsewhere.
fn stack(pieces: &[(&Tensor, usize, usize)], total: usize) -> Option<Tensor> {
    let (first, ..) = pieces.first()?;
    let inner = first.shape().get(1..)?;
    let row = byte_len(first.dtype(), inner)?;
    let shape = [&[total], inner].concat();
    let mut bytes = vec![0u8; byte_len(first.dtype(), &shape)?];
    for (tensor, start, len) in pieces {
        let from = tensor.bytes()?;
        if tensor.shape().get(1..)? != inner || tensor.shape().first() != Some(len) {
            return None;
        }
        bytes.get_mut(start * row..(start + len) * row)?.copy_from_slice(from);
    }
    Tensor::of_vec(bytes, first.dtype(), &shape)
}

/// Size of an element, of what lies behind the second axis, and the axis.
fn second_axis(tensor: &Tensor) -> Option<(usize, usize)> {
    let (_, inner) = tensor.shape().split_first()?;
    let (&width, behind) = inner.split_first()?;
    Some((width, byte_len(tensor.dtype(), behind)?))
}

/// Some of a tensor's second axis.
fn columns(tensor: &Tensor, start: usize, len: usize) -> Option<Tensor> {
    let ((width, size), bytes) = (second_axis(tensor)?, tensor.bytes()?);
    if start.checked_add(len)? > width {
        return None;
    }
    let rows = bytes.chunks_exact((width * size).max(1));
    let cut = rows.flat_map(|row| &row[start * size..(start + len) * size]).copied().collect();
    let mut shape = tensor.shape().to_vec();
    shape[1] = len;
    Tensor::of_vec(cut, tensor.dtype(), &shape)
}

/// The reverse of [`columns`]; zeros elsewhere.
fn side_by_side(pieces: &[(&Tensor, usize, usize)], total: usize) -> Option<Tensor> {
    let (first, ..) = pieces.first()?;
    let (_, size) = second_axis(first)?;
    let mut shape = first.shape().to_vec();
    shape[1] = total;
    let mut bytes = vec![0u8; byte_len(first.dtype(), &shape)?];
    for (tensor, start, len) in pieces {
        if tensor.shape().first() != shape.first() || second_axis(tensor)? != (*len, size) {
            return None;
        }
        let rows = tensor.bytes()?.chunks_exact((len * size).max(1));
        for (to, from) in bytes.chunks_exact_mut((total * size).max(1)).zip(rows) {
            to.get_mut(start * size..(start + len) * size)?.copy_from_slice(from);
        }
    }
    Tensor::of_vec(bytes, first.dtype(), &shape)
}
