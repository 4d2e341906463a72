//! Kernel images and the functions in them, loaded when a node first asks for one.

use super::shared::Shared;
use super::sys::{
    Driver, FUNCTION_MAX_DYNAMIC_SHARED_BYTES, FUNCTION_NON_PORTABLE_CLUSTER,
    FUNCTION_SHARED_CARVEOUT_PERCENT, Function, Module,
};
use crate::device::{KernelId, Node, cubins};
use crate::error::{Error, Result};
use std::collections::HashMap;
use std::ffi::CString;
use std::io::ErrorKind;
use std::path::Path;

/// Loaded modules and functions of one context.
#[derive(Default)]
pub(super) struct Modules {
    modules: HashMap<&'static str, Module>,
    functions: HashMap<KernelId, Loaded>,
}

struct Loaded {
    function: Function,
    params_bytes: usize,
    /// Dynamic shared memory that launches may ask for so far.
    shared_bytes: u32,
    non_portable_cluster: bool,
}

/// Blocks of a cluster that every Hopper GPU can place; more must be asked for.
const PORTABLE_CLUSTER_BLOCKS: u32 = 8;

impl Modules {
    /// The function that `node` launches, allowed to use the shared memory and cluster that it asks for. The
    /// context must be current.
    pub fn function(&mut self, shared: &Shared, node: &Node) -> Result<Function> {
        let symbol = node.kernel.symbol;
        if !self.functions.contains_key(&node.kernel) {
            let loaded = self.load(shared, node.kernel)?;
            self.functions.insert(node.kernel, loaded);
        }
        let Some(loaded) = self.functions.get_mut(&node.kernel) else {
            return Err(Error::Internal(format!("{symbol} was loaded and is not there")));
        };
        let found = node.params.as_slice().len();
        if found != loaded.params_bytes {
            return Err(Error::Launch {
                kernel: symbol.into(),
                reason: format!(
                    "{}: parameter struct of {found} bytes, the kernel takes {}",
                    node.label, loaded.params_bytes
                ),
            });
        }
        let wanted = node.geometry.shared_bytes;
        if wanted > loaded.shared_bytes {
            // Above 48 KiB, static memory included, a launch needs the function's consent.
            let value = i32::try_from(wanted).unwrap_or(i32::MAX);
            // SAFETY: a function of this context.
            let status = unsafe {
                shared.driver.cuFuncSetAttribute(loaded.function, FUNCTION_MAX_DYNAMIC_SHARED_BYTES, value)
            };
            shared.check_launch(status, symbol)?;
            loaded.shared_bytes = wanted;
        }
        let cluster: u64 = node.geometry.cluster.iter().map(|&blocks| u64::from(blocks)).product();
        if cluster > u64::from(PORTABLE_CLUSTER_BLOCKS) && !loaded.non_portable_cluster {
            // SAFETY: as above.
            let status = unsafe {
                shared.driver.cuFuncSetAttribute(loaded.function, FUNCTION_NON_PORTABLE_CLUSTER, 1)
            };
            shared.check_launch(status, symbol)?;
            loaded.non_portable_cluster = true;
        }
        Ok(loaded.function)
    }

    fn load(&mut self, shared: &Shared, kernel: KernelId) -> Result<Loaded> {
        let module = match self.modules.get(kernel.module) {
            Some(&module) => module,
            None => {
                let module = load_module(shared, kernel)?;
                self.modules.insert(kernel.module, module);
                module
            }
        };
        let name = CString::new(kernel.symbol)
            .map_err(|_| Error::Internal(format!("symbol {:?} holds a zero byte", kernel.symbol)))?;
        let mut function = Function::NULL;
        // SAFETY: a module of this context, a terminated name, and a place for the answer.
        let status = unsafe { shared.driver.cuModuleGetFunction(&mut function, module, name.as_ptr()) };
        shared.check_launch(status, kernel.symbol)?;
        if let Some(percent) = shared.options.shared_carveout {
            // SAFETY: a function of this context.
            let status = unsafe {
                shared.driver.cuFuncSetAttribute(function, FUNCTION_SHARED_CARVEOUT_PERCENT, percent.into())
            };
            shared.check_launch(status, kernel.symbol)?;
        }
        let (mut offset, mut params_bytes) = (0, 0);
        // SAFETY: a function of this context, and two places for the answers.
        let status = unsafe { shared.driver.cuFuncGetParamInfo(function, 0, &mut offset, &mut params_bytes) };
        shared.check_launch(status, kernel.symbol)?;
        Ok(Loaded { function, params_bytes, shared_bytes: 0, non_portable_cluster: false })
    }

    /// Unloads everything; errors change nothing. The context should be current.
    pub fn unload(&mut self, driver: &Driver) {
        self.functions.clear();
        for (_, module) in self.modules.drain() {
            // SAFETY: loaded in this context and unloaded once; graphs and launches of it are gone with the streams.
            let _ = unsafe { driver.cuModuleUnload(module) };
        }
    }
}

fn load_module(shared: &Shared, kernel: KernelId) -> Result<Module> {
    let read;
    let image = match &shared.options.cubins {
        Some(folder) => {
            let path = folder.join(kernel.module).with_extension("cubin");
            match std::fs::read(&path) {
                // The folder holds what was changed.
                Err(error) if error.kind() == ErrorKind::NotFound => embedded(kernel)?,
                file => {
                    read = file.map_err(Error::io(&path))?;
                    check_image(&path, &read)?;
                    read.as_slice()
                }
            }
        }
        None => embedded(kernel)?,
    };
    let mut module = Module::NULL;
    // SAFETY: `image` is a whole ELF image, as the driver finds its end from its own header; the driver copies it.
    let status = unsafe { shared.driver.cuModuleLoadData(&mut module, image.as_ptr().cast()) };
    shared.check_launch(status, kernel.symbol)?;
    Ok(module)
}

fn embedded(kernel: KernelId) -> Result<&'static [u8]> {
    cubins::cubin(kernel.module).ok_or_else(|| Error::Launch {
        kernel: kernel.symbol.into(),
        reason: format!("this build embeds no GPU image of kernels/{}.cu", kernel.module),
    })
}

/// Refuses a folder in which no image is one of this program's.
pub fn check_folder(folder: &Path) -> Result<()> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(Error::io(folder))? {
        let path = entry.map_err(Error::io(folder))?.path();
        if path.extension().is_some_and(|ending| ending == "cubin") {
            found.extend(path.file_stem().map(|stem| stem.to_string_lossy().into_owned()));
        }
    }
    // A build without nvcc knows none.
    let known = |name: &String| cubins::CUBINS.is_empty() || cubins::cubin(name).is_some();
    match found.iter().any(known) {
        true => Ok(()),
        false => {
            Err(invalid(folder, format!("holds no MODULE.cubin of this program's kernels, but {found:?}")))
        }
    }
}

fn invalid(path: &Path, reason: String) -> Error {
    Error::Io { path: path.into(), cause: std::io::Error::new(ErrorKind::InvalidData, reason) }
}

/// The driver is given an address and no length, so that a file cut short would be read past its end.
fn check_image(path: &Path, image: &[u8]) -> Result<()> {
    let field = |at: usize, bytes: usize| {
        let field = image.get(at..at + bytes)?;
        Some(field.iter().rev().fold(0u64, |value, &byte| value << 8 | u64::from(byte)))
    };
    // Of a 64-bit little-endian ELF header: offset, entry size and count of the program and section headers.
    let table = |offset, size, count| {
        field(offset, 8)?
            .checked_add(field(size, 2)? * field(count, 2)?)
            .filter(|&end| end <= image.len() as u64)
    };
    let whole = image.starts_with(b"\x7fELF\x02\x01")
        && image.len() >= 64
        && table(0x20, 0x36, 0x38).is_some()
        && table(0x28, 0x3a, 0x3c).is_some();
    if !whole {
        return Err(invalid(path, "not a whole cubin (64-bit ELF image)".into()));
    }
    // Structs of the same size with other fields would have kernels write anywhere.
    let tag = cubins::params_tag();
    let holds = |text: &str| image.windows(text.len()).any(|bytes| bytes == text.as_bytes());
    match holds(&tag) {
        true => Ok(()),
        false if holds(cubins::PARAMS_TAG) => {
            Err(invalid(path, format!("compiled with another kernels/params.h; this program's is {tag:?}")))
        }
        false => Err(invalid(path, format!("does not say {tag:?}, so it was not compiled from kernels/"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cubin_cut_short_is_refused_before_the_driver_sees_it() {
        let check = |image: &[u8]| check_image(Path::new("x.cubin"), image).is_ok();
        let mut header = vec![0u8; 64];
        let with_tag = |image: &[u8]| [image, cubins::params_tag().as_bytes()].concat();
        header[..6].copy_from_slice(b"\x7fELF\x02\x01");
        assert!(check(&with_tag(&header)));
        assert!(!check(&header[..63]) && !check(b"\x7fELF") && !check(b"") && !check(&[0; 64]));
        // One section header of 64 bytes at offset 64, which is the end.
        (header[0x28], header[0x3a], header[0x3c]) = (64, 64, 1);
        assert!(!check(&header));
        header.resize(128, 0);
        assert!(check(&with_tag(&header)));
        // Of other structs, or of none that are known.
        let other = [&header[..], cubins::PARAMS_TAG.as_bytes(), b"0123456789abcdef"].concat();
        let refused = |image: &[u8]| check_image(Path::new("x.cubin"), image).unwrap_err().to_string();
        assert!(refused(&other).contains("another kernels/params.h"), "{}", refused(&other));
        assert!(refused(&header).contains("not compiled from kernels/"), "{}", refused(&header));
        for (module, image) in cubins::CUBINS {
            assert!(check(image), "{module}");
            assert!(!check(&image[..image.len() - 1]), "{module}");
        }
    }
}
