//! What a module's tensors are called in the words of another spelling, and what has no word there.

use super::rows::{output_axis, Group, DOWN, MAGNITUDE, MID, PEFT_MAGNITUDE, UP, UP_BIAS};
use super::Spelling;
use crate::dtype::Float;
use crate::view::Tensor;

const SCALAR: &str = "scalar";
const BIAS: &str = "diff_b";
const IA3: &str = "weight";
const IA3_INPUT: &str = "on_input";
const IA3_PEFT: &str = "ia3_l";

/// Rewrites the words of a group for a spelling. `lacks_bias`: whether the layer is known to have no bias.
pub(super) fn respell(group: &mut Group, to: Spelling, lacks_bias: bool) -> Result<(), String> {
    match to {
        Spelling::Kohya | Spelling::Comfyui => to_kohya(group, to, lacks_bias),
        Spelling::Peft | Spelling::Diffusers => to_peft(group, to, lacks_bias),
    }
}

fn to_kohya(group: &mut Group, to: Spelling, lacks_bias: bool) -> Result<(), String> {
    for (slot, _) in &group.tensors {
        let method = match *slot {
            "lora_embedding_A" | "lora_embedding_B" => "a LoRA of an embedding",
            "oft_R.weight" | "boft_R" | "boft_s" | "oft_r" | "oft_s" => "a rotation of inputs",
            "vera_A" | "vera_B" | "vera_lambda_b" | "vera_lambda_d" => "VeRA",
            _ => continue,
        };
        return Err(format!("{method} stands in PEFT's files only"));
    }
    if let Some(l) = group.take(IA3_PEFT) {
        let on_input = matches!(*l.shape(), [1, n] if n != 1);
        if l.shape().len() > 2 {
            return Err("PEFT's (IA)^3 of a convolution does not say which channels it scales".into());
        }
        if !on_input && !lacks_bias {
            return Err("PEFT's (IA)^3 scales the layer's bias with its output, LyCORIS' does not".into());
        }
        let w = shifted(&l, -1.0, &[l.count()])?;
        let flag = Tensor::of_f32(vec![f32::from(u8::from(on_input))], &[]);
        group.tensors.extend([(IA3, w), (IA3_INPUT, flag)]);
    }
    if to == Spelling::Comfyui && group.get(IA3).is_some() {
        return Err("behind a dotted name (IA)^3's `weight` is the model's own".into());
    }
    let axes = group.get(DOWN).map_or(2, |t| t.shape().len());
    if let Some(m) = group.take(PEFT_MAGNITUDE) {
        group.tensors.push((MAGNITUDE, reshaped(&m, &padded(m.count(), axes))?));
    }
    move_bias(group, UP_BIAS, BIAS)?;
    // Both halves of a LoKr whole: LyCORIS' scale is 1 then, whatever alpha says.
    if group.rank.is_none() && group.scale != 1.0 {
        return Err(format!("its scale is {}, and a LoKr without rank has no alpha to hold it", group.scale));
    }
    Ok(())
}

fn to_peft(group: &mut Group, to: Spelling, lacks_bias: bool) -> Result<(), String> {
    if let Some(scalar) = group.take(SCALAR) {
        let factor = scalar.scalar().unwrap_or(f64::NAN);
        if !factor.is_finite() {
            return Err(format!("`{SCALAR}` is not a number"));
        }
        group.scale *= factor;
    }
    if let Some(w) = group.take(IA3) {
        let on_input = group.take(IA3_INPUT).and_then(|t| t.scalar()).unwrap_or(0.0) != 0.0;
        if !on_input && !lacks_bias {
            return Err("PEFT's (IA)^3 scales the layer's bias with its output, LyCORIS' does not".into());
        }
        let (n, axes) = (w.count(), w.shape().len());
        let shape = match (axes, on_input) {
            (3.., _) => [&[1, n][..], &vec![1; axes - 2]].concat(),
            (_, true) => vec![1, n],
            (_, false) => vec![n, 1],
        };
        group.tensors.push((IA3_PEFT, shifted(&w, 1.0, &shape)?));
    }
    if group.get(MID).is_some() {
        return Err("PEFT's LoRA has no Tucker core".into());
    }
    if let Some(m) = group.take(MAGNITUDE) {
        let rows = group.get(UP).and_then(|t| t.shape().first().copied());
        if !group.is_lora() {
            return Err("PEFT has DoRA around LoRA only".into());
        }
        if output_axis(MAGNITUDE, &m, rows).is_none() {
            return Err("PEFT's DoRA has magnitudes of outputs, these are of inputs".into());
        }
        let axes = group.get(DOWN).map_or(2, |t| t.shape().len());
        let shape = match axes {
            ..=2 => vec![m.count()],
            _ => [&[1, m.count()][..], &vec![1; axes - 2]].concat(),
        };
        group.tensors.push((PEFT_MAGNITUDE, reshaped(&m, &shape)?));
    }
    if group.is_lora() {
        move_bias(group, BIAS, UP_BIAS)?;
    }
    let peft =
        |slot: &str| crate::adapter::keys::join(crate::adapter::keys::Dialect::Peft, "x", slot).is_some();
    if let Some((slot, _)) = group.tensors.iter().find(|(slot, _)| !peft(slot)) {
        let what = group.algorithm;
        return Err(format!("PEFT has no word for `{slot}` ({what})"));
    }
    let method = Method::of(group);
    match method {
        None => {
            let what = group.algorithm;
            Err(format!(
                "{what} needs the configuration that it was trained with, which is not written again"
            ))
        }
        Some(Method::Lora | Method::Lokr) => Ok(()),
        Some(method) if to == Spelling::Diffusers => {
            Err(format!("diffusers loads no {} adapters", method.name()))
        }
        Some(_) => Ok(()),
    }
}

/// The methods of PEFT that are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Method {
    Lora,
    Loha,
    Lokr,
    Ia3,
}

impl Method {
    /// Of a group in PEFT's words.
    pub fn of(group: &Group) -> Option<Self> {
        let has = |slots: &[&str]| slots.iter().any(|s| group.get(s).is_some());
        Some(match () {
            () if has(&[UP]) => Method::Lora,
            () if has(&["hada_w1_a"]) => Method::Loha,
            () if has(&["lokr_w1", "lokr_w1_a"]) => Method::Lokr,
            () if has(&[IA3_PEFT]) => Method::Ia3,
            () => return None,
        })
    }

    /// As `peft_type` says it.
    pub fn name(self) -> &'static str {
        match self {
            Method::Lora => "LORA",
            Method::Loha => "LOHA",
            Method::Lokr => "LOKR",
            Method::Ia3 => "IA3",
        }
    }
}

/// PEFT's bias is scaled like the delta, the other one is not: with scale 1 they are the same numbers.
fn move_bias(group: &mut Group, from: &'static str, to: &'static str) -> Result<(), String> {
    let Some(bias) = group.take(from) else { return Ok(()) };
    if group.scale != 1.0 {
        return Err(format!(
            "its bias is `{from}`, which as `{to}` would be other numbers (scale {})",
            group.scale
        ));
    }
    group.tensors.push((to, bias));
    Ok(())
}

/// [n, 1, ..] with so many axes.
fn padded(n: usize, axes: usize) -> Vec<usize> {
    let mut shape = vec![1; axes.max(1)];
    shape[0] = n;
    shape
}

fn reshaped(tensor: &Tensor, shape: &[usize]) -> Result<Tensor, String> {
    tensor.reshape(shape).ok_or_else(|| "its magnitude is not packed in host memory".into())
}

/// Every value plus `by`, in fp32, when that is exact.
fn shifted(tensor: &Tensor, by: f64, shape: &[usize]) -> Result<Tensor, String> {
    Float::require(tensor.dtype(), IA3).map_err(|e| e.to_string())?;
    let values = tensor.to_f32(IA3).map_err(|e| e.to_string())?;
    let moved: Vec<f32> = values.iter().map(|v| (f64::from(*v) + by) as f32).collect();
    // The sum of a float and 1 in f64 rounds too where the float is tiny: so the way back is tried.
    let exact =
        |(v, m): (&f32, &f32)| f64::from(*m) - by == f64::from(*v) && (f64::from(*m) - f64::from(*v)) == by;
    match values.iter().zip(&moved).find(|pair| !exact(*pair)) {
        Some((v, _)) => {
            Err(format!("PEFT's (IA)^3 holds 1 + w, LyCORIS' w; for {v} that is no exact fp32 number"))
        }
        None => Ok(Tensor::of_f32(moved, shape)),
    }
}
