//! The U-Net of Stable Diffusion 1, 2 and XL: names of the checkpoint (`input_blocks.4.1.proj_in`) and of diffusers
//! (`down_blocks.1.attentions.0.proj_in`). kohya flattens the latter for SD1 and the former for SDXL.
//!
//! With `n` resnets per down block and `s = n + 1`:
//!
//! | diffusers | checkpoint |
//! |---|---|
//! | `down_blocks.i.{resnets,attentions}.j` | `input_blocks.{s i + j + 1}.{0,1}` |
//! | `down_blocks.i.downsamplers.0.conv` | `input_blocks.{s (i + 1)}.0.op` |
//! | `mid_block.resnets.j`, `mid_block.attentions.0` | `middle_block.{2 j}`, `middle_block.1` |
//! | `up_blocks.i.{resnets,attentions}.j` | `output_blocks.{s i + j}.{0,1}` |
//! | `up_blocks.i.upsamplers.0.conv` | `output_blocks.{s i + n}.2.conv`; `.1.conv` where the block has no attention |
//!
//! Inside attentions both layouts agree.

use super::guess::{Guess, Module, Verdict};
use super::{rename, reversed};
use std::collections::BTreeSet;

/// Outside the blocks: diffusers, checkpoint.
const STEM: &[(&str, &str)] = &[
    ("conv_in", "input_blocks.0.0"),
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("add_embedding.linear_1", "label_emb.0.0"),
    ("add_embedding.linear_2", "label_emb.0.2"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
];

/// Inside a resnet.
const RESNET: &[(&str, &str)] = &[
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
];

/// The block arithmetic of one model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Checkpoint blocks per diffusers block: resnets per down block and one.
    stride: usize,
    /// The up blocks that have attention.
    attentive_up: BTreeSet<usize>,
}

/// What tells the families of U-Nets apart: the columns of the weights that read the text, which is its width.
const TEXT_WIDTHS: &[(usize, &str)] =
    &[(768, "SD 1.x"), (1024, "SD 2.x"), (1280, "SDXL refiner"), (2048, "SDXL")];

/// How the U-Net's blocks begin.
const BLOCKS: [&str; 6] =
    ["down_blocks", "mid_block", "up_blocks", "input_blocks", "middle_block", "output_blocks"];

/// The family of U-Net that some modules are of.
pub(super) fn judge(modules: &[Module<'_>]) -> Option<Verdict> {
    let ours = |module: &&Module<'_>| BLOCKS.iter().any(|block| module.path.starts_with(block));
    let read = modules.iter().filter(ours).count();
    let mut widths = modules.iter().filter(ours).filter_map(|module| {
        let path = module.path.replace('.', "_");
        let reads_text = path.ends_with("_attn2_to_k") || path.ends_with("_attn2_to_v");
        Some((module.name, *module.shape.get(1).filter(|_| reads_text)?))
    });
    let (name, width) = widths.next()?;
    // A U-Net of video, or a mixture.
    if widths.any(|(_, other)| other != width) || 2 * read < modules.len() {
        return None;
    }
    let (_, family) = TEXT_WIDTHS.iter().find(|(w, _)| *w == width)?;
    let reason = format!("`{name}` reads text of width {width}");
    Some(Verdict { guess: Guess { family, reason }, read, votes: 1 })
}

impl Layout {
    /// The arithmetic of a published family; `None` for what is not a U-Net of this kind.
    pub(super) fn published(family: &str) -> Option<Self> {
        let attentive_up = match family {
            "SD 1.x" | "SD 2.x" => 1..=3,
            "SDXL" => 0..=1,
            "SDXL refiner" => 1..=2,
            _ => return None,
        };
        Some(Layout { stride: 3, attentive_up: attentive_up.collect() })
    }

    /// The same with the resnets per block of every published model.
    pub(super) fn of_published_depth(self) -> Self {
        Layout { stride: 3, ..self }
    }

    /// Deduces the arithmetic from the paths inside the U-Net, in either layout; other names do no harm.
    ///
    /// Resnets per down block: in diffusers' layout the highest `j` of `down_blocks.i.{resnets,attentions}.j` and one. In the
    /// checkpoint's, the first block behind `input_blocks.0` that holds no resnet is the downsampler, or the end of a model of one
    /// level; when no resnet is listed, the first `input_blocks.N.0.op`. Two when nothing tells, as every published model has.
    pub fn of<'a>(paths: impl Iterator<Item = &'a str>) -> Self {
        let (mut resnets, mut op, mut per_down) = (BTreeSet::new(), None, None);
        let (mut up, mut output) = (BTreeSet::new(), BTreeSet::new());
        for path in paths {
            if let Some((n, inner)) = numbered(path, "input_blocks.") {
                match inner.strip_prefix("0.") {
                    Some("op") => op = Some(op.map_or(n, |op: usize| op.min(n))),
                    Some(part) if rename(part, reversed(RESNET)).is_some() => drop(resnets.insert(n)),
                    _ => {}
                }
            } else if let Some((n, inner)) = numbered(path, "output_blocks.") {
                if inner.strip_prefix("1.").is_some_and(|part| !is_part(part, "conv")) {
                    output.insert(n);
                }
            } else if let Some((_, inner)) = numbered(path, "down_blocks.") {
                let j =
                    numbered(inner, "resnets.").or_else(|| numbered(inner, "attentions.")).map(|(j, _)| j);
                per_down = per_down.max(j);
            } else if let Some((i, inner)) = numbered(path, "up_blocks.") {
                if inner.starts_with("attentions.") {
                    up.insert(i);
                }
            }
        }
        let first_gap = || (2..).find(|n| !resnets.contains(n)).filter(|_| resnets.contains(&1));
        let stride =
            per_down.map(|j| j.saturating_add(2)).or_else(first_gap).or(op.filter(|&n| n > 1)).unwrap_or(3);
        up.extend(output.into_iter().map(|n| n / stride));
        Layout { stride, attentive_up: up }
    }

    /// The checkpoint's name as diffusers has it; both without the model's prefix. What follows a module (`.bias`) is kept.
    pub fn to_diffusers(&self, path: &str) -> Option<String> {
        if let Some(name) = rename(path, reversed(STEM)) {
            return Some(name);
        }
        if let Some((n, inner)) = numbered(path, "input_blocks.") {
            let (i, j) = (n.checked_sub(1)? / self.stride, (n - 1) % self.stride);
            if j + 1 < self.stride {
                return Some(format!("down_blocks.{i}.{}", leaf_to_diffusers(inner, j)?));
            }
            let tail = inner.strip_prefix("0.").filter(|part| is_part(part, "op"))?;
            return Some(format!("down_blocks.{i}.downsamplers.0.conv{}", &tail["op".len()..]));
        }
        if let Some((n, inner)) = numbered(path, "output_blocks.") {
            let (i, j) = (n / self.stride, n % self.stride);
            let part = inner
                .strip_prefix("1.")
                .or_else(|| inner.strip_prefix("2."))
                .filter(|part| is_part(part, "conv"));
            if let Some(part) = part {
                let last = j + 1 == self.stride;
                return last.then(|| format!("up_blocks.{i}.upsamplers.0.{part}"));
            }
            return Some(format!("up_blocks.{i}.{}", leaf_to_diffusers(inner, j)?));
        }
        match numbered(path, "middle_block.")? {
            (1, inner) => Some(format!("mid_block.attentions.0.{inner}")),
            (n @ (0 | 2), inner) => {
                Some(format!("mid_block.resnets.{}.{}", n / 2, rename(inner, reversed(RESNET))?))
            }
            _ => None,
        }
    }

    /// Diffusers' name as the checkpoint has it; the inverse of [`Layout::to_diffusers`].
    pub fn to_checkpoint(&self, path: &str) -> Option<String> {
        if let Some(name) = rename(path, STEM.iter().copied()) {
            return Some(name);
        }
        let resnets = self.stride - 1;
        // The numbers come from a file: the arithmetic must not overflow on absurd ones.
        let block = |i: usize, j: usize| self.stride.checked_mul(i)?.checked_add(j);
        if let Some((i, inner)) = numbered(path, "down_blocks.") {
            if let Some(tail) = inner.strip_prefix("downsamplers.0.conv") {
                let n = block(i, self.stride)?;
                return is_tail(tail).then(|| format!("input_blocks.{n}.0.op{tail}"));
            }
            let (j, inner) = leaf_to_checkpoint(inner)?;
            return (j < resnets)
                .then_some(())
                .and_then(|()| Some(format!("input_blocks.{}.{inner}", block(i, j + 1)?)));
        }
        if let Some((i, inner)) = numbered(path, "up_blocks.") {
            if let Some(tail) = inner.strip_prefix("upsamplers.0.conv") {
                let place = if self.attentive_up.contains(&i) { 2 } else { 1 };
                let n = block(i, resnets)?;
                return is_tail(tail).then(|| format!("output_blocks.{n}.{place}.conv{tail}"));
            }
            let (j, inner) = leaf_to_checkpoint(inner)?;
            return (j <= resnets)
                .then_some(())
                .and_then(|()| Some(format!("output_blocks.{}.{inner}", block(i, j)?)));
        }
        let inner = path.strip_prefix("mid_block.")?;
        if let Some(inner) = inner.strip_prefix("attentions.0.") {
            return Some(format!("middle_block.1.{inner}"));
        }
        let (j, inner) = numbered(inner, "resnets.").filter(|(j, _)| *j < 2)?;
        Some(format!("middle_block.{}.{}", 2 * j, rename(inner, RESNET.iter().copied())?))
    }
}

/// `0.in_layers.2` to `resnets.j.conv1`, `1.proj_in` to `attentions.j.proj_in`.
fn leaf_to_diffusers(inner: &str, j: usize) -> Option<String> {
    if let Some(inner) = inner.strip_prefix("1.") {
        return Some(format!("attentions.{j}.{inner}"));
    }
    Some(format!("resnets.{j}.{}", rename(inner.strip_prefix("0.")?, reversed(RESNET))?))
}

/// The other way, with `j`.
fn leaf_to_checkpoint(inner: &str) -> Option<(usize, String)> {
    if let Some((j, inner)) = numbered(inner, "attentions.") {
        return Some((j, format!("1.{inner}")));
    }
    let (j, inner) = numbered(inner, "resnets.")?;
    Some((j, format!("0.{}", rename(inner, RESNET.iter().copied())?)))
}

/// `root` + number + `.` + inner.
fn numbered<'a>(path: &'a str, root: &str) -> Option<(usize, &'a str)> {
    let (number, inner) = path.strip_prefix(root)?.split_once('.')?;
    // A sign or leading zero would not come back.
    let plain = number == "0" || number.starts_with(|c: char| matches!(c, '1'..='9'));
    Some((number.parse().ok().filter(|_| plain)?, inner))
}

fn is_tail(tail: &str) -> bool {
    tail.is_empty() || tail.starts_with('.')
}

fn is_part(path: &str, part: &str) -> bool {
    path.strip_prefix(part).is_some_and(is_tail)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::lists::{Unet, SD15, SDXL, TINY};
    use std::collections::HashSet;

    fn layout(names: &[String]) -> Layout {
        Layout::of(names.iter().map(String::as_str))
    }

    #[test]
    fn the_lists_have_the_published_size() {
        assert_eq!(SD15.modules(false).len(), 282);
        assert_eq!(SDXL.modules(false).len(), 794);
    }

    #[test]
    fn every_module_goes_there_and_back() {
        for unet in [SD15, SDXL, TINY] {
            let diffusers = unet.modules(true);
            let there = layout(&diffusers);
            let checkpoint: Vec<_> = diffusers
                .iter()
                .map(|name| there.to_checkpoint(name).unwrap_or_else(|| panic!("{name}")))
                .collect();
            assert_eq!(
                checkpoint.iter().collect::<HashSet<_>>().len(),
                diffusers.len(),
                "two names became one"
            );
            let back = layout(&checkpoint);
            assert_eq!(there, back, "the two layouts deduce different arithmetic");
            for (name, other) in diffusers.iter().zip(&checkpoint) {
                assert_eq!(back.to_diffusers(other).as_ref(), Some(name), "{other}");
                let bias = back.to_diffusers(&format!("{other}.bias"));
                assert_eq!(bias, Some(format!("{name}.bias")));
            }
        }
    }

    #[test]
    fn names_as_published() {
        let check = |unet: Unet, pairs: &[(&str, &str)]| {
            let layout = layout(&unet.modules(false));
            for (diffusers, checkpoint) in pairs {
                assert_eq!(layout.to_checkpoint(diffusers).as_deref(), Some(*checkpoint), "{diffusers}");
            }
        };
        check(
            SD15,
            &[
                ("conv_in", "input_blocks.0.0"),
                ("conv_out", "out.2"),
                ("time_embedding.linear_2", "time_embed.2"),
                (
                    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
                    "input_blocks.1.1.transformer_blocks.0.attn1.to_q",
                ),
                ("down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"),
                ("down_blocks.3.resnets.1.conv2", "input_blocks.11.0.out_layers.3"),
                ("mid_block.resnets.1.time_emb_proj", "middle_block.2.emb_layers.1"),
                ("mid_block.attentions.0.proj_in", "middle_block.1.proj_in"),
                ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.1.conv"),
                ("up_blocks.1.upsamplers.0.conv", "output_blocks.5.2.conv"),
                ("up_blocks.1.resnets.0.conv_shortcut", "output_blocks.3.0.skip_connection"),
                ("up_blocks.3.attentions.2.proj_out", "output_blocks.11.1.proj_out"),
            ],
        );
        check(
            SDXL,
            &[
                ("add_embedding.linear_2", "label_emb.0.2"),
                (
                    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
                    "input_blocks.4.1.transformer_blocks.0.attn1.to_q",
                ),
                ("down_blocks.1.downsamplers.0.conv", "input_blocks.6.0.op"),
                ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.2.conv"),
                ("up_blocks.1.upsamplers.0.conv", "output_blocks.5.2.conv"),
            ],
        );
        check(
            TINY,
            &[
                ("down_blocks.0.resnets.0.conv1", "input_blocks.1.0.in_layers.2"),
                ("down_blocks.0.downsamplers.0.conv", "input_blocks.2.0.op"),
                ("down_blocks.1.attentions.0.proj_in", "input_blocks.3.1.proj_in"),
                ("up_blocks.0.upsamplers.0.conv", "output_blocks.1.2.conv"),
                ("up_blocks.1.resnets.1.conv1", "output_blocks.3.0.in_layers.2"),
            ],
        );
    }

    #[test]
    fn the_arithmetic_is_deduced_from_a_part_of_the_names() {
        let stride = |names: &[&str]| Layout::of(names.iter().copied()).stride;
        // Linear layers only: no downsampler, but the resnets' embeddings leave its gap.
        assert_eq!(
            stride(&[
                "input_blocks.1.0.emb_layers.1",
                "input_blocks.2.0.emb_layers.1",
                "input_blocks.4.0.emb_layers.1"
            ]),
            3
        );
        assert_eq!(stride(&["input_blocks.1.0.emb_layers.1", "input_blocks.3.0.emb_layers.1"]), 2);
        // One level.
        assert_eq!(
            stride(&["input_blocks.0.0", "input_blocks.1.0.in_layers.2", "output_blocks.1.0.in_layers.2"]),
            2
        );
        assert_eq!(stride(&["input_blocks.4.0.op", "input_blocks.8.0.op"]), 4);
        // Attention only.
        assert_eq!(stride(&["input_blocks.4.1.proj_in", "input_blocks.5.1.proj_in"]), 3);
        assert_eq!(stride(&["down_blocks.1.attentions.1.proj_in"]), 3);
        assert_eq!(stride(&["blocks.0.attn.qkv"]), 3);
    }

    #[test]
    fn other_names_are_refused() {
        let layout = layout(&SD15.modules(false));
        for name in [
            "input_blocks.1.0.in_layers.20",
            "input_blocks.1.2.proj_in",
            "input_blocks.3.1.proj_in",
            "input_blocks.x.0.op",
            "input_blocks.01.0.in_layers.2",
            "output_blocks.1.1.conv",
            "middle_block.3.in_layers.2",
            "out.1",
            "down_blocks.0.attentions.0.proj_in",
        ] {
            assert_eq!(layout.to_diffusers(name), None, "{name}");
        }
        for name in [
            "down_blocks.0.resnets.2.conv1",
            "down_blocks.0.downsamplers.0.conv2",
            "down_blocks.18446744073709551615.resnets.0.conv1",
            "down_blocks.99999999999999999999.resnets.0.conv1",
            "up_blocks.0.resnets.3.conv1",
            "mid_block.resnets.2.conv1",
            "conv_inner",
        ] {
            assert_eq!(layout.to_checkpoint(name), None, "{name}");
        }
    }
}
