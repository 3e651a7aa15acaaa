//! An adapter in another spelling.

use super::adapter::{held, lycore_adapter};
use super::boundary::{self, c_text, Failure, Outcome};
use super::handle;
use super::progress::{self, lycore_progress};
use super::status::lycore_status::LYCORE_BAD_ARGUMENT;
use super::status::{lycore_error, lycore_status};
use crate::tools::convert::{convert, Options, Spelling};
use serde_json::{Map, Value};
use std::ffi::c_char;
use std::path::Path;

/// Writes an adapter in the spelling of another program. Values stay the same to the bit, metadata is kept; alphas go where the spelling keeps
/// them. Weights that one layout has in one piece and the other in several are cut and put together by rows. What the spelling cannot say is
/// LYCORE_UNSUPPORTED with every such module in the message, and nothing is written. `output` appears whole or not at all and may be the
/// adapter's own file.
///
/// `options` is JSON: {"to": "kohya" | "comfyui" | "diffusers" | "peft" (required), "family": the model's family as lycore_adapter_convert
/// reports it (default: told from the names), "component": "unet" | "transformer" | "text_encoder" | "text_encoder_2" | "text_encoder_3"
/// (writes only this model's modules; required for "peft" when the file has several), "skip": true (leaves out what cannot be said and lists
/// it in the report)}. For "peft" `output` is a file, or a folder that gets adapter_model.safetensors; adapter_config.json is written beside it
/// and never over that of another adapter. Progress counts modules.
/// `report` may be NULL; it becomes JSON {"input", "output", "config": path or null, "to", "family": {"name", "reason"} or null, "summary":
/// {"modules", "written", "tensors", "split", "fused", "left_out"}, "modules": [{"module", "becomes": [text]}], "left_out": [{"module",
/// "reason"}]}, freed with lycore_text_free.
///
/// # Safety
/// The texts are NUL-terminated UTF-8; `progress` is NULL or as described; `report` and `error` are NULL or may be written.
#[no_mangle]
pub unsafe extern "C" fn lycore_adapter_convert(
    adapter: *const lycore_adapter,
    output: *const c_char,
    options: *const c_char,
    progress: *const lycore_progress,
    report: *mut *mut c_char,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises.
    unsafe {
        boundary::run(error, || {
            let adapter = held(adapter)?;
            let (output, options) = (boundary::text(output, "output")?, boundary::text(options, "options")?);
            let json: Value = serde_json::from_str(options).map_err(|e| bad(format!("not JSON: {e}")))?;
            let map = json.as_object().ok_or_else(|| bad("not a JSON object".into()))?;
            let options = read(map)?;
            let done = progress::with(progress, |progress| {
                Ok(convert(&adapter.adapter, Path::new(output), &options, progress)?)
            })?;
            if let Some(report) = report.as_mut() {
                *report = handle::new_text(c_text(&done.to_string()));
            }
            Ok(())
        })
    }
}

fn bad(what: String) -> Failure {
    Failure::boundary(LYCORE_BAD_ARGUMENT, format!("`options`: {what}"))
}

fn read(map: &Map<String, Value>) -> Outcome<Options<'_>> {
    let (mut to, mut family, mut component, mut skip) = (None, None, None, false);
    let mut problems = Vec::new();
    for (key, value) in map {
        match (key.as_str(), value) {
            ("to", Value::String(text)) if Spelling::parse(text).is_some() => to = Spelling::parse(text),
            ("to", _) => problems.push(format!("to is {value}, it must be one of {}", spellings())),
            ("family" | "component", Value::Null) => {}
            ("family", Value::String(text)) => family = Some(text.as_str()),
            ("component", Value::String(text)) => component = Some(text.as_str()),
            ("family" | "component", _) => problems.push(format!("{key} is {value}, it must be a text")),
            ("skip", Value::Bool(flag)) => skip = *flag,
            ("skip", _) => problems.push(format!("skip is {value}, it must be true or false")),
            _ => problems.push(format!("unknown key `{key}`; the keys are to, family, component and skip")),
        }
    }
    match (to, problems.is_empty()) {
        (Some(to), true) => Ok(Options { to, family, component, skip }),
        (None, true) => Err(bad(format!("to is missing; it is one of {}", spellings()))),
        _ => Err(bad(problems.join("; "))),
    }
}

fn spellings() -> String {
    Spelling::ALL.map(Spelling::name).join(", ")
}
