//! Compiles the kernels (`build/kernels.rs`) and, with the feature `torch`, the C++ beside `src/torch_ext` against the libtorch
//! that tch found.

#[path = "build/kernels.rs"]
mod kernels;

use anyhow::{Context, Result};

fn main() -> Result<()> {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=build/kernels.rs");
    println!("cargo:rerun-if-changed=src/torch_ext/torch_ext.cpp");
    // Cargo gives a cdylib no SONAME; without one a program that links it records the path of the build folder.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,liblycore.so");
    // tch and its dependencies mark C functions for export; two libraries with a tch inside must not bind each other's.
    println!("cargo:rustc-cdylib-link-arg=-Wl,--exclude-libs,ALL");
    let folder = |name| std::env::var_os(name).map(std::path::PathBuf::from).context(name);
    kernels::build(&folder("CARGO_MANIFEST_DIR")?.join("kernels"), &folder("OUT_DIR")?)?;
    if std::env::var_os("CARGO_FEATURE_TORCH").is_none() {
        println!("cargo:rustc-env=LYCORE_TORCH_VERSION=");
        return Ok(());
    }
    // torch-sys (links = "tch") tells where libtorch's libraries are; the headers lie beside them.
    let lib = std::env::var_os("DEP_TCH_LIBTORCH_LIB")
        .context("torch-sys did not say where libtorch is; build with the Python that holds torch on the PATH (see README)")?;
    let lib = std::path::PathBuf::from(lib);
    let include = lib.parent().map(|root| root.join("include")).unwrap_or_default();
    println!("cargo:rustc-env=LYCORE_TORCH_VERSION={}", torch_version(&include)?);
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .includes([include.clone(), include.join("torch/csrc/api/include")])
        // libtorch's headers warn; ours must not.
        .flag_if_supported("-Wno-unused-parameter")
        .file("src/torch_ext/torch_ext.cpp")
        .compile("lycore_torch_ext");
    println!("cargo:rustc-link-lib=dylib=torch_cpu");
    println!("cargo:rustc-link-lib=dylib=c10");
    println!("cargo:rustc-link-search=native={}", lib.display());
    Ok(())
}

/// The version that libtorch's headers define; they have moved between releases.
fn torch_version(include: &std::path::Path) -> Result<String> {
    let mut text = String::new();
    for header in ["torch/headeronly/version.h", "torch/version.h", "torch/csrc/api/include/torch/version.h"]
    {
        let path = include.join(header);
        if path.exists() {
            println!("cargo:rerun-if-changed={}", path.display());
            text += &std::fs::read_to_string(path).unwrap_or_default();
        }
    }
    let number = |name: &str| {
        let at = text.find(&format!("#define TORCH_VERSION_{name} "))?;
        text[at..].split_whitespace().nth(2).map(str::to_owned)
    };
    let parts: Option<Vec<String>> = ["MAJOR", "MINOR", "PATCH"].into_iter().map(number).collect();
    Ok(parts
        .with_context(|| format!("no TORCH_VERSION in the headers under {}", include.display()))?
        .join("."))
}
