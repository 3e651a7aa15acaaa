//! What an output file gets: tensors that are copied from the mapped input, and new ones.

use crate::adapter::keys::{self, Dialect};
use crate::adapter::safetensors::Writer;
use crate::dtype::{byte_len, Dtype, Float};
use crate::error::{Error, Result};
use crate::view::Tensor;
use std::collections::BTreeMap;
use std::path::Path;

/// One tensor of an output file.
#[derive(Debug)]
pub struct Part {
    /// Its key.
    pub key: String,
    /// Its element type.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
    content: Content,
}

#[derive(Debug)]
enum Content {
    Kept(Tensor),
    Made(Vec<u8>),
}

impl Part {
    /// A tensor as it is.
    pub fn kept(key: String, tensor: &Tensor) -> Self {
        let (dtype, shape) = (tensor.dtype(), tensor.shape().to_vec());
        Part { key, dtype, shape, content: Content::Kept(tensor.clone()) }
    }

    /// New values, rounded to nearest even. One that does not fit into the dtype is an error.
    pub fn made(key: String, float: Float, shape: Vec<usize>, values: &[f32]) -> Result<Self> {
        if values.iter().any(|v| !v.is_finite()) {
            return Err(super::delta::not_finite(&key));
        }
        let mut bytes = vec![0u8; values.len() * float.size()];
        float.write(values, &mut bytes);
        if float != Float::F32 {
            // Only the half types can turn a number into an infinity.
            let largest = values.iter().fold(0f32, |m, v| m.max(v.abs()));
            let mut back = [0f32];
            let mut one = vec![0u8; float.size()];
            float.write(&[largest], &mut one);
            float.read(&one, &mut back);
            if !back[0].is_finite() {
                let what = format!("`{key}`: the value {largest:e} does not fit into {}", float.dtype());
                return Err(Error::argument(what, "ask for dtype bf16 or fp32"));
            }
        }
        Ok(Part { key, dtype: float.dtype(), shape, content: Content::Made(bytes) })
    }

    /// An alpha. Always f32: a ratio of ranks seldom is a number of fewer bits, and it scales the whole module.
    pub fn alpha(key: String, shape: &[usize], value: f64) -> Result<Self> {
        let short = value as f32;
        // An alpha of 0 means the rank: too small a number would become a scale of 1.
        if short == 0.0 || !short.is_finite() {
            return Err(Error::argument(
                format!("`{key}`: an alpha of {value:e} is beyond fp32"),
                "1 is the usual weight",
            ));
        }
        let content = Content::Made(short.to_le_bytes().to_vec());
        Ok(Part { key, dtype: Dtype::F32, shape: shape.to_vec(), content })
    }

    /// The bytes to write.
    pub fn bytes(&self) -> Result<&[u8]> {
        match &self.content {
            Content::Made(bytes) => Ok(bytes),
            Content::Kept(tensor) => tensor.bytes().ok_or_else(|| {
                Error::argument(
                    format!("`{}` is not packed in host memory", self.key),
                    "copy it to the CPU first",
                )
            }),
        }
    }

    /// How many bytes.
    pub fn len(&self) -> usize {
        byte_len(self.dtype, &self.shape).unwrap_or(0)
    }

    /// Its line of the file's layout.
    pub fn row(&self) -> (String, Dtype, Vec<usize>) {
        (self.key.clone(), self.dtype, self.shape.clone())
    }
}

/// Writes a file of parts that are all there.
pub fn write(path: &Path, parts: &[Part], metadata: &BTreeMap<String, String>) -> Result<()> {
    let layout: Vec<_> = parts.iter().map(Part::row).collect();
    let mut writer = Writer::create(path, &layout, metadata)?;
    for part in parts {
        writer.write(part.bytes()?)?;
    }
    writer.finish()
}

/// How a dialect spells a module's tensor. What it has no word for is written the kohya way, which every reader takes.
pub fn key(dialect: Dialect, module: &str, slot: &str) -> String {
    keys::join(dialect, module, slot).unwrap_or_else(|| format!("{module}.{slot}"))
}

/// What a new file says about itself: the metadata of its origin without what is not true any more, and how it was made.
pub fn metadata(
    origin: &BTreeMap<String, String>,
    ranks: Option<(String, String)>,
    how: (&str, serde_json::Value),
) -> BTreeMap<String, String> {
    let mut metadata = origin.clone();
    // Hashes of the tensors' bytes.
    metadata.retain(|key, _| {
        !matches!(key.as_str(), "sshs_model_hash" | "sshs_legacy_hash" | "modelspec.hash_sha256")
    });
    if let Some((rank, alpha)) = ranks.filter(|_| metadata.contains_key("ss_network_dim")) {
        metadata.insert("ss_network_dim".into(), rank);
        metadata.insert("ss_network_alpha".into(), alpha);
    }
    metadata.insert(how.0.to_owned(), how.1.to_string());
    metadata
}
