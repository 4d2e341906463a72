//! Archives built record by record: what torch writes in unusual but legal ways, and what nobody should write.

use super::super::pickle::tests::{pickle_dict, tensor};
use crate::error::{Error, Result};
use crate::weights::{Checkpoint, Dtype, OpenOptions, convert};
use std::io::Write;
use std::path::PathBuf;
use zip::write::{SimpleFileOptions, ZipWriter};

/// A `.pt` file in a directory of its own.
struct Archive {
    dir: tempfile::TempDir,
}

impl Archive {
    fn of_bytes(bytes: &[u8]) -> Archive {
        let archive = Archive { dir: tempfile::tempdir().unwrap() };
        std::fs::write(archive.path(), bytes).unwrap();
        archive
    }

    fn new(records: &[(&str, &[u8])]) -> Archive {
        Archive::of_bytes(&zip_bytes(records))
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("checkpoint.pt")
    }

    fn open(&self) -> Result<Checkpoint> {
        let read = Checkpoint::open(self.dir.path(), OpenOptions { mmap: false });
        let mapped = Checkpoint::open(self.dir.path(), OpenOptions { mmap: true });
        let outcome = |result: &Result<Checkpoint>| match result {
            Ok(checkpoint) => format!("{checkpoint:?}"),
            Err(error) => error.to_string(),
        };
        assert_eq!(outcome(&read), outcome(&mapped));
        mapped
    }

    fn refused(&self) -> String {
        match self.open() {
            Err(Error::Checkpoint { reason, .. }) => reason,
            other => panic!("expected a Checkpoint error, got {other:?}"),
        }
    }
}

fn zip_bytes(records: &[(&str, &[u8])]) -> Vec<u8> {
    let mut writer = ZipWriter::new(std::io::Cursor::new(Vec::new()));
    for (name, bytes) in records {
        writer.start_file(format!("archive/{name}"), SimpleFileOptions::default()).unwrap();
        writer.write_all(bytes).unwrap();
    }
    writer.finish().unwrap().into_inner()
}

fn f32s(values: &[f32]) -> &[u8] {
    bytemuck::cast_slice(values)
}

const STORAGE: [f32; 8] = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0];

/// An archive with one tensor `t` on a storage of the eight floats 0 to 7.
fn window(offset: u64, shape: &[u64], stride: &[u64]) -> Archive {
    let pickle = pickle_dict(&[("t", tensor("FloatStorage", "0", 8, offset, shape, stride))]);
    Archive::new(&[("data.pkl", &pickle), ("data/0", f32s(&STORAGE))])
}

/// Offset, shape, strides and the values that they select.
type Window = (u64, &'static [u64], &'static [u64], &'static [f32]);

#[test]
fn windows_on_a_storage() {
    let cases: [Window; 8] = [
        (0, &[2, 4], &[4, 1], &STORAGE),
        (3, &[2, 2], &[2, 1], &[3.0, 4.0, 5.0, 6.0]),
        // transposed
        (0, &[4, 2], &[1, 4], &[0.0, 4.0, 1.0, 5.0, 2.0, 6.0, 3.0, 7.0]),
        // every other element, a size-1 dimension of any stride, an expanded one, a scalar, nothing
        (1, &[3], &[2], &[1.0, 3.0, 5.0]),
        (2, &[1, 3], &[999, 1], &[2.0, 3.0, 4.0]),
        (7, &[3], &[0], &[7.0, 7.0, 7.0]),
        (5, &[], &[], &[5.0]),
        (8, &[0, 7], &[7, 1], &[]),
    ];
    for (offset, shape, stride, expected) in cases {
        let checkpoint = window(offset, shape, stride).open().unwrap();
        let view = checkpoint.get("t").unwrap();
        assert_eq!(convert::to_f32(&view).unwrap(), expected, "{shape:?} {stride:?}");
        assert_eq!(view.shape().iter().map(|&dim| dim as u64).collect::<Vec<_>>(), shape);
    }
}

#[test]
fn windows_outside_the_storage() {
    let huge = u64::MAX / 2;
    let cases: [(u64, &[u64], &[u64]); 8] = [
        (1, &[2, 4], &[4, 1]),
        (8, &[1], &[1]),
        (9, &[0], &[1]),
        (0, &[2], &[8]),
        (0, &[huge, huge], &[0, 0]),
        (0, &[2, 2], &[huge, huge]),
        (huge, &[1], &[1]),
        (0, &[2, 2], &[1]),
    ];
    for (offset, shape, stride) in cases {
        let reason = window(offset, shape, stride).refused();
        assert!(reason.contains("tensor t"), "{reason}");
    }
    // Within the storage, but expanded beyond what is worth copying.
    assert!(window(0, &[1 << 40], &[0]).refused().contains("bytes of strided tensors"));
}

#[test]
fn element_types() {
    let pickle = |class| pickle_dict(&[("t", tensor(class, "0", 2, 0, &[2], &[1]))]);
    let half: [u16; 2] = [0x3c00, 0xc000];
    let bf16: [u16; 2] = [0x3f80, 0xc000];
    for (class, dtype, bytes) in [
        ("FloatStorage", Dtype::F32, f32s(&[1.0, -2.0])),
        ("HalfStorage", Dtype::F16, bytemuck::cast_slice(&half)),
        ("BFloat16Storage", Dtype::Bf16, bytemuck::cast_slice(&bf16)),
    ] {
        let checkpoint = Archive::new(&[("data.pkl", &pickle(class)), ("data/0", bytes)]).open().unwrap();
        let view = checkpoint.get("t").unwrap();
        assert_eq!(view.dtype(), dtype);
        assert_eq!(convert::to_f32(&view).unwrap(), [1.0, -2.0]);
    }
    for class in ["DoubleStorage", "LongStorage", "NoSuchStorage"] {
        let archive = Archive::new(&[("data.pkl", &pickle(class)), ("data/0", &[0; 16])]);
        match archive.open() {
            Err(Error::UnsupportedDtype { tensor, found, .. }) => {
                assert_eq!((&*tensor, &*found), ("t", class))
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn two_tensors_share_a_storage() {
    let pickle = pickle_dict(&[
        ("a", tensor("FloatStorage", "k", 8, 0, &[4], &[1])),
        ("b", tensor("FloatStorage", "k", 8, 2, &[4], &[1])),
    ]);
    let checkpoint = Archive::new(&[("data.pkl", &pickle), ("data/k", f32s(&STORAGE))]).open().unwrap();
    assert_eq!(convert::to_f32(&checkpoint.get("b").unwrap()).unwrap(), [2.0, 3.0, 4.0, 5.0]);
}

#[test]
fn the_same_tensor_twice() {
    let one = tensor("FloatStorage", "0", 8, 0, &[8], &[1]);
    let pickle = pickle_dict(&[("t", one.clone()), ("t", one)]);
    let archive = Archive::new(&[("data.pkl", &pickle), ("data/0", f32s(&STORAGE))]);
    assert!(matches!(archive.open(), Err(Error::DuplicateTensor { .. })));
}

#[test]
fn storages_that_do_not_fit_their_records() {
    let pickle = pickle_dict(&[("t", tensor("FloatStorage", "0", 8, 0, &[8], &[1]))]);
    let reason = Archive::new(&[("data.pkl", &pickle), ("data/0", f32s(&STORAGE[..7]))]).refused();
    assert!(reason.contains("storage of 8 f32 in a record of 28 bytes"), "{reason}");
    let reason = Archive::new(&[("data.pkl", &pickle), ("data/1", f32s(&STORAGE))]).refused();
    assert!(reason.contains("data/0 is not in the archive"), "{reason}");
    let pickle = pickle_dict(&[("t", tensor("FloatStorage", "../0\u{1b}", 8, 0, &[8], &[1]))]);
    let reason = Archive::new(&[("data.pkl", &pickle), ("data/0", f32s(&STORAGE))]).refused();
    assert!(reason.contains("data/../0\\u{1b}"), "{reason}");
}

#[test]
fn byte_order() {
    let pickle = pickle_dict(&[("t", tensor("FloatStorage", "0", 8, 0, &[8], &[1]))]);
    let with = |order: &[u8]| {
        Archive::new(&[("data.pkl", &pickle), ("byteorder", order), ("data/0", f32s(&STORAGE))])
    };
    assert!(with(b"little").open().is_ok());
    assert!(with(b"big").refused().contains("\"big\""));
    assert!(with(&[b'x'; 1000]).refused().contains("1000 bytes"));
}

#[test]
fn a_pickle_that_would_run_code() {
    // What pickle.dumps makes of an object whose __reduce__ is (os.system, ("...",)).
    let pickle = b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R.";
    let reason = Archive::new(&[("data.pkl", pickle)]).refused();
    assert!(reason.contains("posix.system"), "{reason}");
}

#[test]
fn not_one_pickle() {
    let pickle = pickle_dict(&[]);
    assert!(Archive::new(&[("data/0", b"")]).refused().contains("exactly one data.pkl"));
    let two = Archive::new(&[("data.pkl", &pickle), ("inner/data.pkl", &pickle)]);
    assert!(two.refused().contains("exactly one data.pkl"));
}

#[test]
fn not_an_archive_of_torch() {
    assert!(Archive::of_bytes(b"").refused().contains("neither a zip archive"));
    assert!(Archive::of_bytes(b"PK").refused().contains("neither a zip archive"));
    assert!(Archive::of_bytes(b"\x80\x02\x8a\x0alF").refused().contains("old pickle format"));
    assert!(Archive::of_bytes(b"PK\x03\x04 and then nothing").refused().contains("zip archive"));
}

#[test]
fn a_pickle_beyond_the_limit() {
    let large = vec![b'('; super::MAX_PICKLE_BYTES as usize + 1];
    assert!(Archive::new(&[("data.pkl", &large)]).refused().contains("at most 16777216"));
}

#[test]
fn archives_with_changed_directories() {
    let pickle = pickle_dict(&[("t", tensor("FloatStorage", "0", 8, 0, &[8], &[1]))]);
    let good = zip_bytes(&[("data.pkl", &pickle), ("data/0", f32s(&STORAGE))]);
    assert!(Archive::of_bytes(&good).open().is_ok());

    // The archive's directory describes data/0 last.
    let record = good.windows(4).rposition(|window| window == b"PK\x01\x02").unwrap();
    assert!(good[record + 46..].starts_with(b"archive/data/0"));
    // Marked as deflated; encrypted; larger than the file; two records of one name.
    let mut deflated = good.clone();
    deflated[record + 10] = 8;
    assert!(Archive::of_bytes(&deflated).refused().contains("compressed"));
    let mut encrypted = good.clone();
    encrypted[record + 8] |= 1;
    assert!(Archive::of_bytes(&encrypted).refused().contains("encrypted"));
    let mut large = good.clone();
    for size in [record + 20, record + 24] {
        large[size..size + 4].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
    }
    assert!(Archive::of_bytes(&large).refused().contains("past the end"));

    let mut twice =
        zip_bytes(&[("data.pkl", &pickle), ("data/0", f32s(&STORAGE)), ("data/1", f32s(&STORAGE))]);
    let renamed = b"archive/data/1";
    while let Some(at) = twice.windows(renamed.len()).position(|window| window == renamed) {
        twice[at + renamed.len() - 1] = b'0';
    }
    assert!(Archive::of_bytes(&twice).refused().contains("3 records of 2 different names"));

    for length in (0..good.len()).step_by(7) {
        Archive::of_bytes(&good[..length]).refused();
    }
}
