//! Builds the C++ bridge to libtorch's collectives and the kernels, and makes binaries start
//! without `LD_LIBRARY_PATH`.

use std::path::{Path, PathBuf};
use std::{env, fs, io};

/// The one release that `tch` and the bridge are written against.
const TORCH_VERSION: &str = "2.13.0";

/// Gloo's headers that `ProcessGroupGloo.hpp` includes and PyTorch's wheel
/// leaves out; each is made to mean `gloo_declarations.hpp`.
const GLOO_HEADERS: [&str; 5] = [
    "gloo/algorithm.h",
    "gloo/common/error.h",
    "gloo/context.h",
    "gloo/rendezvous/store.h",
    "gloo/transport/device.h",
];

/// libtorch's libraries for GPUs; they bring CUDA's own and NCCL.
const CUDA_LIBRARIES: [&str; 2] = ["torch_cuda", "c10_cuda"];

/// Where the wheels that torch names keep the headers of CUDA and NCCL.
const CUDA_INCLUDES: [&str; 2] = ["nvidia/cu13/include", "nvidia/nccl/include"];

fn main() {
    if let Err(reason) = build() {
        println!("cargo::error={reason}");
    }
}

fn build() -> Result<(), String> {
    println!("cargo::rerun-if-env-changed=LIBTORCH");
    let torch = libtorch()?;
    for directory in library_directories(&torch) {
        println!("cargo::rustc-link-arg=-Wl,-rpath,{}", directory.display());
    }
    compile_bridge(&torch)?;
    compile_kernels(&torch)?;
    if cuda() {
        // The bridge names symbols of theirs, and is linked before them, so the linker keeps them: a
        // plain binary would lose them, and GPUs would be silently absent.
        println!("cargo::rustc-link-search=native={}", torch.join("lib").display());
        for library in CUDA_LIBRARIES {
            println!("cargo::rustc-link-lib=dylib={library}");
        }
    }
    Ok(())
}

/// Whether the feature `cuda` is on.
fn cuda() -> bool {
    env::var_os("CARGO_FEATURE_CUDA").is_some()
}

/// The directory of libtorch, checked to be of the right version.
fn libtorch() -> Result<PathBuf, String> {
    let torch = env::var_os("LIBTORCH").map(PathBuf::from).ok_or(
        "LIBTORCH is not set: build inside the workspace, where .cargo/config.toml sets it, \
         or set it to the `torch` directory of a PyTorch wheel",
    )?;
    let version_file = torch.join("version.py");
    println!("cargo::rerun-if-changed={}", version_file.display());
    let text = fs::read_to_string(&version_file).map_err(|e| {
        format!(
            "read {}: {e}; run `make setup`, which installs PyTorch {TORCH_VERSION}",
            version_file.display()
        )
    })?;
    let found = text
        .lines()
        .find_map(|line| line.strip_prefix("__version__ = '")?.strip_suffix('\''))
        .ok_or_else(|| {
            format!(
                "{} has no line `__version__ = '…'`; run `make setup`, which installs PyTorch \
                 {TORCH_VERSION}",
                version_file.display()
            )
        })?;
    if found.split('+').next() != Some(TORCH_VERSION) {
        return Err(format!(
            "{} says PyTorch {found}, and this needs {TORCH_VERSION}; run `make setup`, which \
             installs it",
            version_file.display()
        ));
    }
    Ok(torch)
}

/// Where the loader finds libtorch, and what the wheel's CUDA build leans on.
fn library_directories(torch: &Path) -> Vec<PathBuf> {
    let mut directories = vec![torch.join("lib")];
    // `LIBTORCH` may be a link into the wheel; its neighbours are found from where it points.
    let wheel = fs::canonicalize(torch).unwrap_or_else(|_| torch.to_path_buf());
    let packages =
        wheel.parent().map(|site| site.join("nvidia")).and_then(|d| fs::read_dir(d).ok());
    let mut nvidia: Vec<PathBuf> = packages
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path().join("lib")))
        .filter(|lib| lib.is_dir())
        .collect();
    nvidia.sort();
    directories.extend(nvidia);
    directories
}

fn compile_bridge(torch: &Path) -> Result<(), String> {
    let source = Path::new("src/collective");
    for file in ["bridge.cpp", "gloo_declarations.hpp", "handles.hpp", "nccl.cpp"] {
        println!("cargo::rerun-if-changed={}", source.join(file).display());
    }

    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set: run through cargo")?);
    let stand_ins = out.join("gloo_headers");
    for header in GLOO_HEADERS {
        write_stand_in(&stand_ins.join(header)).map_err(|e| format!("write {header}: {e}"))?;
    }

    let mut bridge = against(torch);
    bridge
        .define("USE_C10D_GLOO", None)
        .include(source)
        .include(&stand_ins)
        .file(source.join("bridge.cpp"));
    if cuda() {
        bridge.define("USE_C10D_NCCL", None).file(source.join("nccl.cpp"));
        for directory in cuda_includes(torch)? {
            bridge.flag("-isystem").flag(&directory);
        }
    }
    bridge
        .try_compile("drift_collective")
        .map_err(|e| format!("compile src/collective/*.cpp (a C++20 compiler is needed): {e}"))
}

/// A build of C++ against libtorch.
fn against(torch: &Path) -> cc::Build {
    let include = torch.join("include");
    let mut build = cc::Build::new();
    build.cpp(true).std("c++20");
    // As system headers: their warnings are not ours to mend.
    for directory in [include.clone(), include.join("torch/csrc/api/include")] {
        build.flag("-isystem").flag(&directory);
    }
    build
}

fn compile_kernels(torch: &Path) -> Result<(), String> {
    let source = Path::new("src/kernels");
    println!("cargo::rerun-if-changed={}", source.display());
    let mut kernels = against(torch);
    kernels
        .opt_level(3)
        .debug(false)
        // libtorch's threads are OpenMP's.
        .flag("-fopenmp")
        // A square root is then one instruction.
        .flag("-fno-math-errno")
        // Vectors never cross a function that is compiled by itself.
        .flag_if_supported("-Wno-psabi")
        .file(source.join("kernels.cpp"))
        // Nothing refers to them: they register themselves as the program starts.
        .link_lib_modifier("+whole-archive")
        .try_compile("drift_kernels")
        .map_err(|e| format!("compile src/kernels/*.cpp (a C++20 compiler is needed): {e}"))?;
    println!("cargo::rustc-link-lib=dylib=gomp");
    Ok(())
}

/// CUDA's and NCCL's headers, which lie beside libtorch in the wheel.
fn cuda_includes(torch: &Path) -> Result<Vec<PathBuf>, String> {
    let wheel = fs::canonicalize(torch).unwrap_or_else(|_| torch.to_path_buf());
    let site = wheel.parent().ok_or("LIBTORCH has no parent directory")?;
    let directories = CUDA_INCLUDES.map(|path| site.join(path));
    // The last of them to come, from the package that torch itself does not name.
    let crt = directories[0].join("crt/host_defines.h");
    match directories.iter().find(|directory| !directory.is_dir()) {
        Some(missing) => Err(format!(
            "{} is missing: the feature `cuda` needs PyTorch's CUDA wheel; run `make setup`",
            missing.display()
        )),
        None if !crt.is_file() => Err(format!(
            "{} is missing; run `make setup`, which installs nvidia-cuda-crt",
            crt.display()
        )),
        None => Ok(directories.into()),
    }
}

fn write_stand_in(path: &Path) -> io::Result<()> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    fs::write(path, "#include \"gloo_declarations.hpp\"\n")
}
