//! The primitives of `dev.cuh`: the emulated device against the PTX manual, and against what real GPUs left.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use warpstep::conformance::{Outputs, UNITS, VERIFIED_ON};
use warpstep::device::emulated::{AsyncCopies, EmulatedDevice, EmulatedOptions, Order};

fn devices() -> Vec<EmulatedDevice> {
    let schedule =
        |order, async_copies, seed| EmulatedOptions { order, async_copies, seed, ..Default::default() };
    let options = [
        schedule(Order::InOrder, AsyncCopies::Late, 0),
        schedule(Order::Reverse, AsyncCopies::AtOnce, 0),
        schedule(Order::Random, AsyncCopies::Random, 3),
    ];
    options.into_iter().map(|options| EmulatedDevice::new(options).unwrap()).collect()
}

fn outputs(device: &EmulatedDevice) -> Outputs {
    let run = |unit: &warpstep::conformance::Unit| (unit.name.to_string(), unit.run(device).unwrap());
    Outputs { device: "emulated".into(), units: UNITS.iter().map(run).collect() }
}

#[test]
fn every_unit_is_as_the_manual_says() {
    for device in devices() {
        for unit in UNITS {
            let words = unit.run(&device).unwrap();
            assert_eq!(unit.check(&words), None, "{}", unit.name);
        }
    }
}

#[test]
fn a_wrong_word_is_found() {
    let device = EmulatedDevice::new(EmulatedOptions::default()).unwrap();
    for unit in UNITS {
        let right = unit.run(&device).unwrap();
        for at in [0, right.len() / 2, right.len() - 1] {
            let mut wrong = right.clone();
            // The sign and the lowest bit of the exponent: no tolerance covers both.
            wrong[at] ^= 0x8080_0000;
            let found = unit.check(&wrong).unwrap_or_else(|| panic!("{}: word {at}", unit.name));
            assert_eq!((found.at, found.count), (at, 1), "{}", unit.name);
            assert!(unit.compare(&wrong, &right).is_some(), "{}", unit.name);
        }
        assert!(unit.check(&right[1..]).is_some(), "{}", unit.name);
    }
}

#[test]
fn the_sign_of_an_e4m3_nan_is_the_hardwares_own_affair_and_nothing_else_is() {
    let device = EmulatedDevice::new(EmulatedOptions::default()).unwrap();
    let unit = warpstep::conformance::find("e4m3").unwrap();
    let right = unit.run(&device).unwrap();
    // The codes of the inputs come after the numbers of all codes; the last two are those of a NaN and of its negative.
    for (at, code) in right.iter().enumerate().skip(256) {
        let mut other = right.clone();
        other[at] ^= 0x80;
        let nan = at >= right.len() - 2;
        assert_eq!(nan, code & 0x7f == 0x7f, "{at}: {code:#x}");
        assert_eq!(unit.check(&other).is_none(), nan, "{at}: {code:#x}");
        assert_eq!(unit.compare(&other, &right).is_none(), nan && unit.compare(&right, &other).is_none());
        other[at] = if nan { 0x7e } else { 0x7f };
        assert!(unit.check(&other).is_some(), "{at}: {code:#x}");
    }
}

#[test]
fn every_primitive_belongs_to_a_unit() {
    let source =
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels/dev.cuh")).unwrap();
    let gpu_side = source.split("#else\n#include \"emulator").next().unwrap();
    let name = |line: &str| -> Option<String> {
        let rest = line.strip_prefix("DEV ")?;
        let head = &rest[..rest.find('(')?];
        head.rsplit([' ', '*']).next().map(str::to_string)
    };
    let mut primitives: BTreeSet<String> = gpu_side.lines().filter_map(name).collect();
    assert!(primitives.len() > 60, "{primitives:?}");
    // Only used by the others here.
    primitives.remove("smem_u32");
    let shown: BTreeSet<String> =
        UNITS.iter().flat_map(|unit| unit.primitives).map(|name| name.to_string()).collect();
    let missing: Vec<_> = primitives.difference(&shown).collect();
    assert!(missing.is_empty(), "no unit shows {missing:?}");
}

fn kept_files() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/conformance");
    let Ok(entries) = std::fs::read_dir(folder) else {
        return Vec::new();
    };
    let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

/// What real GPUs left, bit for bit. With no file kept, nothing is verified, and the program says so.
#[test]
fn the_emulated_device_does_what_kept_gpus_did() {
    let files = kept_files();
    let stems: Vec<_> = files.iter().map(|f| f.file_stem().unwrap().to_str().unwrap()).collect();
    assert_eq!(stems, VERIFIED_ON, "VERIFIED_ON names the files in tests/golden/conformance");
    let device = EmulatedDevice::new(EmulatedOptions::default()).unwrap();
    let ours = outputs(&device);
    for file in files {
        let theirs = Outputs::load(&file).unwrap();
        for (unit, ((_, ours), (_, theirs))) in UNITS.iter().zip(ours.units.iter().zip(&theirs.units)) {
            assert_eq!(unit.compare(ours, theirs), None, "{} on {}", unit.name, theirs.len());
        }
    }
}

#[test]
fn outputs_survive_a_file() {
    let device = EmulatedDevice::new(EmulatedOptions::default()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("emulated.safetensors");
    let before = outputs(&device);
    before.save(&path).unwrap();
    assert_eq!(Outputs::load(&path).unwrap(), before);
    std::fs::write(&path, b"not a file").unwrap();
    assert!(Outputs::load(&path).is_err());
}
