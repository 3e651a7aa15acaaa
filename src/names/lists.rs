//! The published U-Nets, name by name, for tests: generated from the architecture, not from the tables under test.

/// What decides the names of a U-Net.
pub struct Unet {
    pub channels: &'static [usize],
    /// Transformer blocks per attention, by level; 0 for no attention.
    pub depth: &'static [usize],
    pub resnets: usize,
    pub add_embedding: bool,
}

pub const SD15: Unet =
    Unet { channels: &[320, 640, 1280, 1280], depth: &[1, 1, 1, 0], resnets: 2, add_embedding: false };
pub const SDXL: Unet =
    Unet { channels: &[320, 640, 1280], depth: &[0, 2, 10], resnets: 2, add_embedding: true };
/// One resnet per block, no attention on the first level.
pub const TINY: Unet = Unet { channels: &[32, 64], depth: &[0, 1], resnets: 1, add_embedding: false };

impl Unet {
    /// Linear layers and convolutions, and the norms when asked for, as diffusers names them.
    pub fn modules(&self, norms: bool) -> Vec<String> {
        let mut names: Vec<String> =
            ["conv_in", "time_embedding.linear_1", "time_embedding.linear_2", "conv_out"]
                .map(String::from)
                .into();
        if self.add_embedding {
            names.extend(["add_embedding.linear_1", "add_embedding.linear_2"].map(String::from));
        }
        if norms {
            names.push("conv_norm_out".into());
        }
        let levels = self.channels.len();
        for level in 0..levels {
            let down = format!("down_blocks.{level}");
            for j in 0..self.resnets {
                let shortcut = j == 0 && level > 0 && self.channels[level - 1] != self.channels[level];
                resnet(&mut names, &format!("{down}.resnets.{j}"), shortcut, norms);
                attention(&mut names, &format!("{down}.attentions.{j}"), self.depth[level], norms);
            }
            let up = format!("up_blocks.{}", levels - 1 - level);
            for j in 0..=self.resnets {
                resnet(&mut names, &format!("{up}.resnets.{j}"), true, norms);
                attention(&mut names, &format!("{up}.attentions.{j}"), self.depth[level], norms);
            }
            if level + 1 < levels {
                names.push(format!("{down}.downsamplers.0.conv"));
            }
            if level > 0 {
                names.push(format!("{up}.upsamplers.0.conv"));
            }
        }
        for j in 0..2 {
            resnet(&mut names, &format!("mid_block.resnets.{j}"), false, norms);
        }
        let deepest = self.depth.iter().copied().max().unwrap_or(0);
        attention(&mut names, "mid_block.attentions.0", deepest, norms);
        names
    }
}

fn resnet(names: &mut Vec<String>, root: &str, shortcut: bool, norms: bool) {
    let parts = ["conv1", "conv2", "time_emb_proj"].into_iter();
    let extra = [("conv_shortcut", shortcut), ("norm1", norms), ("norm2", norms)];
    let extra = extra.into_iter().filter(|(_, there)| *there).map(|(part, _)| part);
    names.extend(parts.chain(extra).map(|part| format!("{root}.{part}")));
}

fn attention(names: &mut Vec<String>, root: &str, depth: usize, norms: bool) {
    if depth == 0 {
        return;
    }
    names.extend(["proj_in", "proj_out"].map(|part| format!("{root}.{part}")));
    if norms {
        names.push(format!("{root}.norm"));
    }
    for block in 0..depth {
        let root = format!("{root}.transformer_blocks.{block}");
        for attn in ["attn1", "attn2"] {
            names.extend(["to_q", "to_k", "to_v", "to_out.0"].map(|part| format!("{root}.{attn}.{part}")));
        }
        names.extend(["ff.net.0.proj", "ff.net.2"].map(|part| format!("{root}.{part}")));
        if norms {
            names.extend(["norm1", "norm2", "norm3"].map(|part| format!("{root}.{part}")));
        }
    }
}
