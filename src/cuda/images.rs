//! The compiled kernels: which image serves which device, and the functions in it.

use super::{check, sys, Gpu};
use crate::error::{Error, Result};
use std::collections::HashMap;
use std::ffi::CString;

/// What NVRTC made of one file for one architecture.
pub(super) struct Image {
    file: &'static str,
    arch: u32,
    ptx: bool,
    deflated: &'static [u8],
}

// NVRTC's version (empty without one) and IMAGES, the table; written by build/kernels.rs.
include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

impl Image {
    /// Cubins run on the same major version, from their minor version on; the driver compiles PTX for everything newer.
    pub(super) fn serves(&self, arch: u32) -> bool {
        self.arch <= arch && (self.ptx || self.arch / 10 == arch / 10)
    }

    /// The image itself, in words, as an ELF file's headers must be aligned; zeros fill the last one.
    fn words(&self) -> Result<Vec<u64>> {
        let bytes = miniz_oxide::inflate::decompress_to_vec(self.deflated).map_err(|e| {
            Error::Backend(format!("the kernels of {}.cu in this library are damaged: {e}", self.file))
        })?;
        let word = |bytes: &[u8]| {
            let mut word = [0; 8];
            word[..bytes.len()].copy_from_slice(bytes);
            u64::from_ne_bytes(word)
        };
        Ok(bytes.chunks(8).map(word).collect())
    }
}

/// The best image of `file` for `arch`: a cubin before PTX, the newest before older ones.
fn choose<'a>(images: &'a [Image], file: &str, arch: u32) -> Option<&'a Image> {
    let fitting = images.iter().filter(|i| i.file == file && i.serves(arch));
    fitting.max_by_key(|i| (!i.ptx, i.arch))
}

/// The files that have been loaded, by stem.
#[derive(Default)]
pub(super) struct Modules(HashMap<String, Module>);

struct Module {
    handle: sys::CUmodule,
    functions: HashMap<String, Function>,
}

struct Function {
    handle: sys::CUfunction,
    /// The dynamic shared memory that it may have, in bytes.
    shared: usize,
}

/// What every kernel may have without being asked for, its own variables included.
const SHARED: usize = 48 << 10;

impl Gpu {
    /// A kernel that may be launched with `shared` bytes of dynamic shared memory. The context is current.
    pub(super) fn function(&self, file: &str, kernel: &str, shared: usize) -> Result<sys::CUfunction> {
        let modules = &mut self.modules.lock().0;
        if !modules.contains_key(file) {
            modules.insert(file.to_owned(), Module { handle: self.load(file)?, functions: HashMap::new() });
        }
        let module = modules.get_mut(file).expect("inserted above");
        if !module.functions.contains_key(kernel) {
            let name =
                CString::new(kernel).map_err(|_| Error::argument("a kernel's name holds a NUL", ""))?;
            let mut handle = std::ptr::null_mut();
            // SAFETY: the module is never unloaded; the name ends with NUL; the pointer is to a live handle.
            let code = unsafe { sys::cuModuleGetFunction(&mut handle, module.handle, name.as_ptr()) };
            self.check(code, || format!("looking for the kernel {kernel} in {file}.cu"))?;
            let (mut own, size) = (0, sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES);
            // SAFETY: the function was found above; the pointer is to a live integer.
            let code = unsafe { sys::cuFuncGetAttribute(&mut own, size, handle) };
            self.check(code, || format!("asking for the shared memory of {file}::{kernel}"))?;
            let shared = SHARED.saturating_sub(own as usize);
            module.functions.insert(kernel.to_owned(), Function { handle, shared });
        }
        let function = module.functions.get_mut(kernel).expect("inserted above");
        if shared > function.shared {
            if shared > self.shared_memory {
                return Err(Error::Device {
                    what: format!(
                        "cuda:{}: {file}::{kernel} needs {shared} bytes of shared memory a block; the device has {}",
                        self.index, self.shared_memory
                    ),
                    hint: String::new(),
                });
            }
            let limit = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function belongs to a loaded module.
            let code = unsafe { sys::cuFuncSetAttribute(function.handle, limit, shared as i32) };
            self.check(code, || format!("giving {file}::{kernel} {shared} bytes of shared memory"))?;
            function.shared = shared;
        }
        Ok(function.handle)
    }

    fn load(&self, file: &str) -> Result<sys::CUmodule> {
        let image = choose(IMAGES, file, self.architecture).ok_or_else(|| Error::Device {
            what: format!("cuda:{}: this library has no {file}.cu for sm_{}", self.index, self.architecture),
            hint: "merge on the CPU or through libtorch".into(),
        })?;
        let mut module = std::ptr::null_mut();
        let words = image.words()?;
        // SAFETY: the image is a whole cubin, or PTX with the NUL that NVRTC ends it with; the driver copies what it needs.
        let code = unsafe { sys::cuModuleLoadData(&mut module, words.as_ptr().cast()) };
        let form = if image.ptx { "PTX" } else { "cubin" };
        check(code, || format!("cuda:{}: loading {file}.cu ({form} for sm_{})", self.index, image.arch))?;
        Ok(module)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(arch: u32) -> Option<(u32, bool)> {
        let image = |arch, ptx| Image { file: "merge", arch, ptx, deflated: &[] };
        let mut images: Vec<_> = [75, 80, 86, 89, 90, 100, 120].map(|arch| image(arch, false)).into();
        images.insert(0, image(90, true));
        images.push(Image { file: "pack", ..image(121, false) });
        choose(&images, "merge", arch).map(|i| (i.arch, i.ptx))
    }

    #[test]
    fn the_nearest_cubin_of_the_same_major_version() {
        for (device, cubin) in
            [(75, 75), (80, 80), (87, 86), (89, 89), (90, 90), (103, 100), (120, 120), (121, 120)]
        {
            assert_eq!(chosen(device), Some((cubin, false)), "sm_{device}");
        }
    }

    #[test]
    fn ptx_where_no_cubin_fits_and_nothing_for_older_devices() {
        assert_eq!(chosen(110), Some((90, true)));
        assert_eq!(chosen(130), Some((90, true)));
        assert_eq!(chosen(70), None);
        assert_eq!(chosen(61), None);
    }

    #[test]
    fn images_are_whole() {
        for image in IMAGES {
            let bytes: Vec<u8> = image.words().unwrap().into_iter().flat_map(u64::to_ne_bytes).collect();
            match image.ptx {
                true => assert_eq!(bytes.last(), Some(&0), "{}.cu", image.file),
                false => assert!(bytes.starts_with(b"\x7fELF"), "{}.cu", image.file),
            }
        }
    }
}
