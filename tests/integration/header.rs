//! The header in the repository is the one that the sources give.

use std::path::Path;

#[test]
fn header_is_fresh() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_root_or_default(root);
    let mut made = Vec::new();
    let sources = [
        "status",
        "progress",
        "tensor",
        "version",
        "adapter",
        "stack",
        "checkpoint",
        "convert",
        "network",
        "network_files",
        "tools",
    ];
    let mut builder = cbindgen::Builder::new().with_config(config);
    for name in sources {
        builder = builder.with_src(root.join("src/ffi").join(name).with_extension("rs"));
    }
    builder.generate().expect("cbindgen").write(&mut made);
    let made = String::from_utf8(made).expect("UTF-8");
    let path = root.join("include/lycore.h");
    if std::env::var_os("LYCORE_UPDATE_HEADER").is_some() {
        std::fs::write(&path, &made).expect("write the header");
        return;
    }
    let stored = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(stored == made, "include/lycore.h is stale: run `make header` and commit it");
}
