//! Which library this is and what it can do here.

use super::boundary::{self, c_text};
use super::handle;
use super::status::{lycore_error, lycore_status};
use serde_json::json;
use std::ffi::{c_char, CStr};

/// Major version of the header: calls may go away when it changes.
pub const LYCORE_VERSION_MAJOR: u32 = 0;
/// Minor version of the header: calls may be added when it changes (while the major version is 0: also changed).
pub const LYCORE_VERSION_MINOR: u32 = 1;
/// Patch version of the header.
pub const LYCORE_VERSION_PATCH: u32 = 0;

const VERSION: &CStr = match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
    Ok(text) => text,
    Err(_) => c"",
};

/// Set by the build script from the headers that it compiled against.
const TORCH_VERSION: &CStr =
    match CStr::from_bytes_with_nul(concat!(env!("LYCORE_TORCH_VERSION"), "\0").as_bytes()) {
        Ok(text) => text,
        Err(_) => c"",
    };

/// The library's version as one number: major * 1000000 + minor * 1000 + patch. Compare with the header's LYCORE_VERSION_* .
#[no_mangle]
pub extern "C" fn lycore_version_number() -> u32 {
    LYCORE_VERSION_MAJOR * 1_000_000 + LYCORE_VERSION_MINOR * 1000 + LYCORE_VERSION_PATCH
}

/// The library's version, "major.minor.patch". Static.
#[no_mangle]
pub extern "C" fn lycore_version() -> *const c_char {
    VERSION.as_ptr()
}

/// The libtorch that this build needs in its process, "2.11.0" for example; "" for the build without libtorch. Static.
#[no_mangle]
pub extern "C" fn lycore_torch_version() -> *const c_char {
    TORCH_VERSION.as_ptr()
}

/// What this build can do on this machine, as JSON:
/// {"version": "0.1.0", "torch": "2.11.0" or null, "training": bool, "cuda": {"devices": n, "why": text when n is 0},
///  "threads": n, "algorithms": [text]}.
/// `json` becomes a text that the caller frees with lycore_text_free. May start CUDA in the process.
///
/// # Safety
/// `json` may be written. `error` is NULL or may be written.
#[no_mangle]
pub unsafe extern "C" fn lycore_capabilities(
    json: *mut *mut c_char,
    error: *mut *mut lycore_error,
) -> lycore_status {
    // SAFETY: the caller's promises.
    unsafe {
        boundary::run(error, || {
            let out = boundary::out(json, "json")?;
            *out = handle::new_text(c_text(&capabilities().to_string()));
            Ok(())
        })
    }
}

fn capabilities() -> serde_json::Value {
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "torch": TORCH_VERSION.to_str().ok().filter(|text| !text.is_empty()),
        "training": cfg!(feature = "torch"),
        "cuda": cuda(),
        "threads": crate::merge::gemm::threads(),
        "algorithms": crate::algo::ALL.iter().map(|recipe| recipe.name).collect::<Vec<_>>(),
    })
}

/// Merging asks the driver alone; training, and merging without kernels, asks libtorch.
fn cuda() -> serde_json::Value {
    let devices = crate::cuda::devices();
    #[cfg(feature = "torch")]
    let devices = devices
        .or_else(|_| crate::torch_ext::require_cuda().map(|()| tch::Cuda::device_count().max(0) as usize));
    match devices {
        Ok(devices) => json!({"devices": devices}),
        Err(e) => json!({"devices": 0, "why": format!("{e}; {}", e.hint())}),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_version_is_one_in_all_places() {
        let (major, minor, patch) =
            (super::LYCORE_VERSION_MAJOR, super::LYCORE_VERSION_MINOR, super::LYCORE_VERSION_PATCH);
        assert_eq!(env!("CARGO_PKG_VERSION"), format!("{major}.{minor}.{patch}"));
        assert_eq!(super::VERSION.to_str(), Ok(env!("CARGO_PKG_VERSION")));
        assert_eq!(super::lycore_version_number(), 1000 * minor + 1_000_000 * major + patch);
    }
}
