//! Compiles `kernels/*.cu` with NVRTC and writes `kernels.rs`, the table of images that `src/cuda/images.rs` includes.
//! NVRTC is a library that comes with torch's CUDA wheels; it needs neither a GPU nor nvcc.

use anyhow::{bail, ensure, Context, Result};
use libloading::os::unix::{Library, Symbol, RTLD_GLOBAL, RTLD_LAZY, RTLD_NOW};
use std::ffi::{c_char, c_int, c_void, CStr, CString};
use std::fmt::Write;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// Cubins: each also serves later minor versions of its major version.
const ARCHS: [u32; 7] = [75, 80, 86, 89, 90, 100, 120];
/// PTX of this version serves whatever has no cubin and is newer.
const PTX: u32 = 90;

/// One run of the compiler.
struct Job {
    source: PathBuf,
    stem: String,
    arch: u32,
    ptx: bool,
}

/// Compiles everything into `out`. Without NVRTC the table is empty and the build goes on.
pub fn build(folder: &Path, out: &Path) -> Result<()> {
    for name in ["LYCORE_NVRTC", "LYCORE_CUDA_ARCHS"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    println!("cargo:rerun-if-changed={}", folder.display());
    let mut sources = Vec::new();
    for entry in std::fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        println!("cargo:rerun-if-changed={}", path.display());
        if path.extension().is_some_and(|e| e == "cu") {
            sources.push(path);
        }
    }
    sources.sort();
    let (mut version, mut images) = (String::new(), Vec::new());
    match Nvrtc::find()? {
        Some(nvrtc) => {
            version = nvrtc.version()?;
            images = nvrtc.compile_all(jobs(&nvrtc, &sources)?, folder, out)?;
        }
        None => println!(
            "cargo:warning=no NVRTC: the library is built without its CUDA kernels. Set LYCORE_NVRTC to libnvrtc.so or its \
             folder, or put the Python that holds torch's CUDA wheels on the PATH"
        ),
    }
    let mut table = String::new();
    writeln!(table, "pub(super) const NVRTC: &str = {version:?};")?;
    writeln!(table, "pub(super) static IMAGES: &[Image] = &[")?;
    for (job, name) in images {
        let Job { stem, arch, ptx, .. } = job;
        let bytes = format!("include_bytes!(concat!(env!(\"OUT_DIR\"), {:?}))", format!("/{name}"));
        writeln!(table, "    Image {{ file: {stem:?}, arch: {arch}, ptx: {ptx}, deflated: {bytes} }},")?;
    }
    writeln!(table, "];")?;
    std::fs::write(out.join("kernels.rs"), table).context("kernels.rs")
}

/// What to compile: every source for every architecture that is wanted and that this NVRTC knows.
fn jobs(nvrtc: &Nvrtc, sources: &[PathBuf]) -> Result<Vec<Job>> {
    let wanted = std::env::var("LYCORE_CUDA_ARCHS").unwrap_or_default();
    let mut targets: Vec<(u32, bool)> = Vec::new();
    for word in wanted.split(',').map(str::trim).filter(|w| !w.is_empty()) {
        let arch = word.parse().with_context(|| format!("LYCORE_CUDA_ARCHS: `{word}` is not like 90"))?;
        targets.push((arch, false));
    }
    if targets.is_empty() {
        targets = ARCHS.iter().map(|&arch| (arch, false)).chain([(PTX, true)]).collect();
    }
    let known = nvrtc.archs()?;
    targets.retain(|(arch, _)| {
        let found = known.contains(arch);
        if !found {
            println!(
                "cargo:warning=NVRTC {} does not know sm_{arch}: left out",
                nvrtc.version().unwrap_or_default()
            );
        }
        found
    });
    let mut jobs = Vec::new();
    for source in sources {
        let stem =
            source.file_stem().and_then(|s| s.to_str()).context("a kernel's file name is not UTF-8")?;
        jobs.extend(targets.iter().map(|&(arch, ptx)| {
            let (source, stem) = (source.clone(), stem.to_owned());
            Job { source, stem, arch, ptx }
        }));
    }
    Ok(jobs)
}

/// NVRTC, loaded for the life of the build script.
struct Nvrtc(Library);

type Program = *mut c_void;
type Sizer = unsafe extern "C" fn(Program, *mut usize) -> c_int;
type Getter = unsafe extern "C" fn(Program, *mut c_char) -> c_int;

impl Nvrtc {
    /// The first that loads, in the order of `folders`, then by soname.
    fn find() -> Result<Option<Self>> {
        if let Some(given) = std::env::var_os("LYCORE_NVRTC").filter(|v| !v.is_empty()).map(PathBuf::from) {
            let file = if given.is_dir() { in_folder(&given, "libnvrtc.so") } else { Some(given.clone()) };
            let file =
                file.with_context(|| format!("LYCORE_NVRTC: no libnvrtc.so* in {}", given.display()))?;
            return Self::open(&file).map(Some).with_context(|| format!("LYCORE_NVRTC: {}", file.display()));
        }
        let files = folders().into_iter().filter_map(|folder| in_folder(&folder, "libnvrtc.so"));
        for file in files.chain(["libnvrtc.so.13".into(), "libnvrtc.so.12".into()]) {
            if let Ok(found) = Self::open(&file) {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    fn open(file: &Path) -> Result<Self> {
        // NVRTC opens its builtins by name, which finds those of a wheel only when they are loaded already.
        if let Some(builtins) = file.parent().and_then(|folder| in_folder(folder, "libnvrtc-builtins.so")) {
            // SAFETY: NVIDIA's libraries have no initialisers with conditions.
            std::mem::forget(unsafe { Library::open(Some(builtins), RTLD_NOW | RTLD_GLOBAL) }?);
        }
        // SAFETY: likewise.
        Ok(Nvrtc(unsafe { Library::open(Some(file), RTLD_LAZY) }?))
    }

    /// Looks a function up.
    ///
    /// # Safety
    /// `F` is the type that nvrtc.h gives `name`.
    unsafe fn function<F>(&self, name: &str) -> Result<Symbol<F>> {
        // SAFETY: the caller's promise.
        unsafe { self.0.get::<F>(name) }.with_context(|| format!("NVRTC has no {name}"))
    }

    fn version(&self) -> Result<String> {
        type F = unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int;
        let (mut major, mut minor) = (0, 0);
        // SAFETY: the type is nvrtc.h's; both pointers are to live integers.
        let code = unsafe { self.function::<F>("nvrtcVersion")?(&mut major, &mut minor) };
        ensure!(code == 0, "nvrtcVersion failed");
        Ok(format!("{major}.{minor}"))
    }

    fn archs(&self) -> Result<Vec<u32>> {
        type F = unsafe extern "C" fn(*mut c_int) -> c_int;
        let mut count = 0;
        // SAFETY: the type is nvrtc.h's; the pointer is to a live integer.
        let code = unsafe { self.function::<F>("nvrtcGetNumSupportedArchs")?(&mut count) };
        ensure!(code == 0, "nvrtcGetNumSupportedArchs failed");
        let mut archs = vec![0; count as usize];
        // SAFETY: likewise; the vector has the room that NVRTC asked for.
        let code = unsafe { self.function::<F>("nvrtcGetSupportedArchs")?(archs.as_mut_ptr()) };
        ensure!(code == 0, "nvrtcGetSupportedArchs failed");
        Ok(archs.into_iter().map(|a| a as u32).collect())
    }

    /// Runs the jobs on as many threads as Cargo allows (NVRTC may be called from several), and says which file each wrote.
    fn compile_all(&self, jobs: Vec<Job>, folder: &Path, out: &Path) -> Result<Vec<(Job, String)>> {
        let threads = std::env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1usize);
        let (queue, done) = (Mutex::new(jobs.into_iter()), Mutex::new(Vec::new()));
        let next = || queue.lock().ok().and_then(|mut jobs| jobs.next());
        std::thread::scope(|scope| {
            let worker = || -> Result<()> {
                while let Some(job) = next() {
                    let name = format!("{}.{}.{}", job.stem, job.arch, if job.ptx { "ptx" } else { "cubin" });
                    // Deflated: images of all architectures would be most of the library.
                    let image = self.compile_once(&job, folder)?;
                    let bytes = miniz_oxide::deflate::compress_to_vec(&image, 9);
                    std::fs::write(out.join(&name), bytes).with_context(|| name.clone())?;
                    done.lock().expect("no worker panics while it holds this").push((job, name));
                }
                Ok(())
            };
            let workers: Vec<_> = (0..threads.max(1)).map(|_| scope.spawn(worker)).collect();
            workers.into_iter().try_for_each(|w| w.join().expect("a worker returns its errors"))
        })?;
        let mut done = done.into_inner().expect("no worker panics while it holds this");
        done.sort_by(|(_, a), (_, b)| a.cmp(b));
        Ok(done)
    }

    /// As `compile`, from `target/kernels` where that has the result of the same text: the builds with and without libtorch share it.
    fn compile_once(&self, job: &Job, folder: &Path) -> Result<Vec<u8>> {
        let target = folder.with_file_name("target");
        if !target.is_dir() {
            return self.compile(job, folder);
        }
        // Deterministic, other than the hashes of a HashMap.
        let mut hash = std::hash::DefaultHasher::new();
        (self.version()?, job.arch, job.ptx, std::fs::read(&job.source)?).hash(&mut hash);
        let mut headers: Vec<_> = std::fs::read_dir(folder)?.flatten().map(|entry| entry.path()).collect();
        headers.sort();
        for header in headers.iter().filter(|path| path.extension().is_some_and(|e| e == "cuh")) {
            std::fs::read(header)?.hash(&mut hash);
        }
        let kept = target.join("kernels").join(format!("{}.{}.{:016x}", job.stem, job.arch, hash.finish()));
        if let Ok(bytes) = std::fs::read(&kept) {
            return Ok(bytes);
        }
        let bytes = self.compile(job, folder)?;
        // Another build may write the same; each sees all of it or none. Without the copy the build goes on.
        let own = kept.with_extension(std::process::id().to_string());
        let written = std::fs::create_dir_all(target.join("kernels"))
            .and_then(|()| std::fs::write(&own, &bytes))
            .and_then(|()| std::fs::rename(&own, &kept));
        if let Err(e) = written {
            println!("cargo:warning={}: {e}", kept.display());
        }
        Ok(bytes)
    }

    fn compile(&self, job: &Job, folder: &Path) -> Result<Vec<u8>> {
        type Create = unsafe extern "C" fn(
            *mut Program,
            *const c_char,
            *const c_char,
            c_int,
            *const *const c_char,
            *const *const c_char,
        ) -> c_int;
        type Compile = unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int;
        type Destroy = unsafe extern "C" fn(*mut Program) -> c_int;
        let name = job.source.display().to_string();
        let text = CString::new(std::fs::read(&job.source).with_context(|| name.clone())?)?;
        // Images shall not depend on where the sources lie.
        let title = CString::new(job.stem.as_str())?;
        let kind = if job.ptx { "compute" } else { "sm" };
        let options = [
            format!("--gpu-architecture={kind}_{}", job.arch),
            "--std=c++17".to_owned(),
            format!("--include-path={}", folder.display()),
            "-default-device".to_owned(),
        ];
        let options = options.map(|o| CString::new(o).expect("paths hold no NUL"));
        let pointers: Vec<_> = options.iter().map(|o| o.as_ptr()).collect();
        let mut program: Program = std::ptr::null_mut();
        let none = std::ptr::null();
        // SAFETY: the types are nvrtc.h's; every string lives until the program is destroyed, at the end of this function.
        let code = unsafe {
            let create = self.function::<Create>("nvrtcCreateProgram")?;
            create(&mut program, text.as_ptr(), title.as_ptr(), 0, none, none)
        };
        ensure!(code == 0, "{name}: nvrtcCreateProgram failed with {code}");
        // SAFETY: likewise; `pointers` has as many strings as are announced.
        let code = unsafe {
            let compile = self.function::<Compile>("nvrtcCompileProgram")?;
            compile(program, pointers.len() as c_int, pointers.as_ptr())
        };
        let log = self.read(program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog")?;
        let log = CStr::from_bytes_until_nul(&log).unwrap_or_default().to_string_lossy().into_owned();
        if code != 0 {
            bail!("{name} for {kind}_{} (NVRTC error {code}):\n{log}", job.arch);
        }
        for line in log.lines() {
            println!("cargo:warning={line}");
        }
        let image = match job.ptx {
            true => self.read(program, "nvrtcGetPTXSize", "nvrtcGetPTX"),
            false => self.read(program, "nvrtcGetCUBINSize", "nvrtcGetCUBIN"),
        };
        // SAFETY: the program is NVRTC's and not used again.
        unsafe { self.function::<Destroy>("nvrtcDestroyProgram")?(&mut program) };
        image
    }

    /// What a pair of NVRTC's functions (how long, then the bytes) says of a program.
    fn read(&self, program: Program, size: &str, get: &str) -> Result<Vec<u8>> {
        let mut bytes = 0;
        // SAFETY: all functions of this form have the type `Sizer`.
        let code = unsafe { self.function::<Sizer>(size)?(program, &mut bytes) };
        ensure!(code == 0, "{size} failed with {code}");
        let mut into = vec![0u8; bytes];
        // SAFETY: all functions of this form have the type `Getter`; the vector has the room that NVRTC asked for.
        let code = unsafe { self.function::<Getter>(get)?(program, into.as_mut_ptr().cast()) };
        ensure!(code == 0, "{get} failed with {code}");
        Ok(into)
    }
}

/// Where NVRTC may lie, best first: the wheels of the Python on the PATH, then an installed toolkit.
fn folders() -> Vec<PathBuf> {
    for name in ["PATH", "CUDA_HOME", "CUDA_PATH"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    let ask = "import site; print(*site.getsitepackages(), site.getusersitepackages(), sep='\\n')";
    let python = std::process::Command::new("python3").args(["-c", ask]).output();
    let places = python.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
    let mut folders = Vec::new();
    for nvidia in places.lines().map(|place| Path::new(place).join("nvidia")) {
        folders.extend(["cu13/lib", "cuda_nvrtc/lib"].map(|sub| nvidia.join(sub)));
        let others = std::fs::read_dir(&nvidia).into_iter().flatten().flatten();
        folders.extend(others.map(|entry| entry.path().join("lib")));
    }
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(std::env::var_os).map(PathBuf::from);
    folders.extend(homes.chain(["/usr/local/cuda".into()]).map(|home| home.join("lib64")));
    folders
}

/// The file of `folder` whose name begins so.
fn in_folder(folder: &Path, prefix: &str) -> Option<PathBuf> {
    let files = std::fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path());
    files.filter(|f| f.file_name().is_some_and(|n| n.to_string_lossy().starts_with(prefix))).max()
}
