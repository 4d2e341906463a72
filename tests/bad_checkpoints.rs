//! Checkpoint bytes that must be refused: each kind of damage is one test with the error it must give, tried both
//! on mapped and on read files. Files are built byte by byte; none of them may be believed before it is checked.
//! The items are those of the list of bad inputs that the engine promises to survive.

use std::path::{Path, PathBuf};
use tempfile::TempDir;
use warpstep::weights::{Checkpoint, OpenOptions};
use warpstep::{Error, Result};

/// A directory with one `model.safetensors`.
struct File {
    dir: TempDir,
}

impl File {
    fn new(bytes: &[u8]) -> File {
        let file = File { dir: tempfile::tempdir().unwrap() };
        std::fs::write(file.path(), bytes).unwrap();
        file
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("model.safetensors")
    }

    /// Opens the file both ways, which must agree.
    fn open(&self) -> Result<Checkpoint> {
        let [mapped, read] =
            [true, false].map(|mmap| Checkpoint::open(self.dir.path(), OpenOptions { mmap }));
        let outcome = |result: &Result<Checkpoint>| match result {
            Ok(checkpoint) => format!("{checkpoint:?}"),
            Err(error) => error.to_string(),
        };
        assert_eq!(outcome(&mapped), outcome(&read));
        mapped
    }
}

/// Opens bytes that are no checkpoint and returns the reason.
#[track_caller]
fn refused(bytes: &[u8]) -> String {
    reason(File::new(bytes).open())
}

#[track_caller]
fn reason(result: Result<Checkpoint>) -> String {
    match result {
        Err(Error::Checkpoint { reason, .. }) => {
            assert!(!reason.contains(char::is_control), "unescaped: {reason:?}");
            assert!(reason.len() < 1000, "{} bytes of message", reason.len());
            reason
        }
        other => panic!("expected a Checkpoint error, got {other:?}"),
    }
}

#[track_caller]
fn assert_refused(bytes: &[u8], expected: &str) {
    let reason = refused(bytes);
    assert!(reason.contains(expected), "{reason}");
}

fn file(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

fn entry(name: &str, dtype: &str, shape: &str, offsets: &str) -> String {
    format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}"#)
}

/// A file of `data` zero bytes with one tensor `t`.
fn one(dtype: &str, shape: &str, offsets: &str, data: usize) -> Vec<u8> {
    file(&format!("{{{}}}", entry("t", dtype, shape, offsets)), &vec![0; data])
}

// Item 1: the length.

#[test]
fn empty_file() {
    assert_refused(b"", "0 bytes: too short");
}

#[test]
fn seven_bytes() {
    assert_refused(&[0; 7], "7 bytes: too short");
}

#[test]
fn header_length_zero() {
    assert_refused(&[0; 8], "does not start with {");
    assert_refused(&[0; 64], "does not start with {");
}

#[test]
fn header_length_beyond_the_file() {
    assert_refused(&[&9u64.to_le_bytes()[..], b"{}"].concat(), "header of 9 bytes in a file of 10");
}

#[test]
fn header_length_u64_max() {
    assert_refused(&[&u64::MAX.to_le_bytes()[..], b"{}"].concat(), "header of 18446744073709551615 bytes");
}

#[test]
fn header_length_above_the_formats_limit() {
    let broken = File::new(&100_000_001u64.to_le_bytes());
    // The file is long enough, but nobody should look.
    std::fs::File::options().write(true).open(broken.path()).unwrap().set_len(200_000_000).unwrap();
    assert!(reason(broken.open()).contains("header of 100000001 bytes"));
}

// Item 2: the text.

#[test]
fn header_not_utf8() {
    assert_refused(&[&4u64.to_le_bytes()[..], b"{\"\xff\xff"].concat(), "not UTF-8");
}

#[test]
fn header_not_json() {
    assert_refused(&file("{tensors}", &[]), "not a safetensors header");
    assert_refused(&file("{}}", &[]), "not a safetensors header");
}

#[test]
fn header_json_array() {
    assert_refused(&file("[]", &[]), "does not start with {");
}

#[test]
fn header_nested_deep() {
    for (open, close) in [("[", "]"), ("{\"a\":", "}")] {
        let nested = open.repeat(10_000) + "1" + &close.repeat(10_000);
        assert_refused(&file(&format!(r#"{{"t":{nested}}}"#), &[]), "not a safetensors header");
        // As a value that is not looked at.
        let info = format!(r#"{{"dtype":"F32","shape":[],"data_offsets":[0,4],"more":{nested}}}"#);
        let _ = File::new(&file(&format!(r#"{{"t":{info}}}"#), &[0; 4])).open();
    }
}

#[test]
fn header_open_brace_and_spaces() {
    assert_refused(&file(&format!("{{{}", " ".repeat(100)), &[]), "not a safetensors header");
    assert_refused(&file("   {}", &[]), "does not start with {");
}

#[test]
fn header_with_nul() {
    assert_refused(&file("{}\0", &[]), "not a safetensors header");
    assert_refused(&file("{\"a\0b\":1}", &[]), "not a safetensors header");
}

#[test]
fn header_with_byte_order_mark() {
    assert_refused(&file("\u{feff}{}", &[]), "does not start with {");
}

// Item 3: names.

#[test]
fn duplicate_name_in_one_file() {
    // The second spelling is the first one escaped: equal once parsed.
    for second in ["t", "\\u0074"] {
        let header = [entry("t", "F32", "[1]", "[0,4]"), entry(second, "F32", "[1]", "[4,8]")].join(",");
        match File::new(&file(&format!("{{{header}}}"), &[0; 8])).open() {
            Err(Error::DuplicateTensor { tensor, first, second }) => {
                assert_eq!((&*tensor, first), ("t", second));
            }
            other => panic!("{other:?}"),
        }
    }
}

// Item 4: offsets.

#[test]
fn offsets_reversed() {
    assert_refused(&one("F32", "[1]", "[4,0]", 4), "reversed");
}

#[test]
fn offsets_negative() {
    assert_refused(&one("F32", "[1]", "[-4,0]", 4), "not a safetensors header");
}

#[test]
fn offsets_float() {
    assert_refused(&one("F32", "[1]", "[0,4.0]", 4), "not a safetensors header");
}

#[test]
fn offsets_string() {
    assert_refused(&one("F32", "[1]", r#"["0",4]"#, 4), "not a safetensors header");
}

#[test]
fn offsets_one_or_three() {
    assert_refused(&one("F32", "[1]", "[0]", 4), "not a safetensors header");
    assert_refused(&one("F32", "[1]", "[0,4,8]", 4), "not a safetensors header");
}

fn two(first: &str, second: &str, data: usize) -> Vec<u8> {
    let header = [entry("a", "F32", "[1]", first), entry("b", "F32", "[1]", second)].join(",");
    file(&format!("{{{header}}}"), &vec![0; data])
}

#[test]
fn offsets_overlapping() {
    assert_refused(&two("[0,4]", "[2,6]", 6), "an overlap of 2 bytes before tensor b");
    assert_refused(&two("[0,4]", "[0,4]", 4), "an overlap of 4 bytes");
}

#[test]
fn offsets_with_a_hole() {
    assert_refused(&two("[0,4]", "[8,12]", 12), "a hole of 4 bytes before tensor b");
    assert_refused(&one("F32", "[1]", "[4,8]", 8), "a hole of 4 bytes before tensor t");
}

#[test]
fn offsets_past_the_end() {
    assert_refused(&one("F32", "[2]", "[0,8]", 4), "truncated");
}

#[test]
fn offsets_u64_max() {
    let (max, below) = (u64::MAX, u64::MAX - 4);
    assert_refused(&one("F32", "[1]", &format!("[{below},{max}]"), 4), "overflow 64 bits");
    assert_refused(&one("F32", "[1]", &format!("[0,{max}]"), 4), "takes 4 bytes");
    assert_refused(&one("F32", "[1]", "[0,18446744073709551616]", 4), "not a safetensors header");
}

// Item 5: shapes.

#[test]
fn shape_product_overflows() {
    let half = 1u64 << 32;
    assert_refused(&one("F32", &format!("[{half},{half}]"), "[0,0]", 0), "overflows 64 bits");
}

#[test]
fn shape_overflows_by_the_element_size_only() {
    assert_refused(&one("F32", &format!("[{}]", 1u64 << 62), "[0,0]", 0), "overflows 64 bits");
}

#[test]
fn shape_dimension_2_63() {
    assert_refused(&one("BF16", &format!("[{}]", 1u64 << 63), "[0,0]", 0), "overflows 64 bits");
    assert_refused(&one("BF16", "[18446744073709551616]", "[0,0]", 0), "not a safetensors header");
}

#[test]
fn shape_zero_hides_a_huge_dimension() {
    // 0 elements, in an order that overflows before the zero is reached.
    let half = 1u64 << 32;
    assert_refused(&one("F32", &format!("[{half},{half},0]"), "[0,0]", 0), "overflows 64 bits");
}

#[test]
fn shape_scalar_and_empty_are_legal() {
    let scalar = File::new(&one("F32", "[]", "[0,4]", 4)).open().unwrap();
    assert_eq!(scalar.get("t").unwrap().elements(), 1);
    let empty = File::new(&one("F32", "[3,0]", "[0,0]", 0)).open().unwrap();
    assert_eq!(empty.get("t").unwrap().bytes().unwrap().len(), 0);
}

#[test]
fn shape_rank() {
    let ones = |rank: usize| format!("[{}]", vec!["1"; rank].join(","));
    assert!(File::new(&one("F32", &ones(64), "[0,4]", 4)).open().is_ok());
    assert_refused(&one("F32", &ones(65), "[0,4]", 4), "rank 65, more than 64");
    assert_refused(&one("F32", &ones(1_000_000), "[0,4]", 4), "rank 1000000");
}

// Item 6: element types.

#[test]
fn dtype_unknown_or_unwanted() {
    for dtype in ["F64", "I64", "I8", "U8", "BOOL", "F8_E4M3", "F4", "f32", "", "F32\\n"] {
        match File::new(&one(dtype, "[3]", "[0,24]", 24)).open() {
            Err(Error::UnsupportedDtype { tensor, found, .. }) => {
                assert_eq!((&*tensor, &*found), ("t", dtype));
            }
            other => panic!("{dtype}: {other:?}"),
        }
    }
}

#[test]
fn dtype_missing_field() {
    assert_refused(&file(r#"{"t":{"shape":[],"data_offsets":[0,4]}}"#, &[0; 4]), "missing field `dtype`");
    let twice = r#"{"t":{"dtype":"F32","dtype":"F32","shape":[],"data_offsets":[0,4]}}"#;
    assert_refused(&file(twice, &[0; 4]), "duplicate field");
}

#[test]
fn bf16_at_an_odd_offset_is_read() {
    // Legal, and unaligned in memory: an odd header length puts every element on an odd address.
    let mut header = format!("{{{}}}", entry("t", "BF16", "[2]", "[0,4]"));
    if header.len().is_multiple_of(2) {
        header.push(' ');
    }
    let checkpoint = File::new(&file(&header, &[0x80, 0x3f, 0x00, 0xc0])).open().unwrap();
    let values = warpstep::weights::convert::to_f32(&checkpoint.get("t").unwrap()).unwrap();
    assert_eq!(values, [1.0, -2.0]);
}

// Item 7: file sizes.

#[test]
fn truncated_after_the_header() {
    assert_refused(&one("F32", "[2]", "[0,8]", 0), "truncated");
}

#[test]
fn one_byte_short() {
    assert_refused(&one("F32", "[2]", "[0,8]", 7), "truncated");
}

#[test]
fn one_byte_long() {
    assert_refused(&one("F32", "[2]", "[0,8]", 9), "trailing bytes");
}

fn stretch(file: &File, len: u64) {
    std::fs::File::options().write(true).open(file.path()).unwrap().set_len(len).unwrap();
}

#[test]
fn sparse_terabyte() {
    const TERABYTE: u64 = 1 << 40;
    let zeros = File::new(b"");
    stretch(&zeros, TERABYTE);
    assert!(reason(zeros.open()).contains("does not start with {"));

    let trailing = File::new(&one("F32", "[2]", "[0,8]", 8));
    stretch(&trailing, TERABYTE);
    assert!(reason(trailing.open()).contains("trailing bytes"));

    // A terabyte that the header accounts for is legal; opening it must not read or allocate it.
    let header = format!("{{{}}}", entry("t", "F32", "[274877906944]", &format!("[0,{TERABYTE}]")));
    let honest = File::new(&file(&header, &[]));
    stretch(&honest, TERABYTE + 8 + header.len() as u64);
    let checkpoint = Checkpoint::open(honest.dir.path(), OpenOptions { mmap: false }).unwrap();
    let mut piece = [1u8; 8];
    let view = checkpoint.get("t").unwrap();
    let last = view.elements() - 4..view.elements();
    warpstep::weights::convert::write_range_as(&view, last, warpstep::weights::Dtype::Bf16, &mut piece)
        .unwrap();
    assert_eq!(piece, [0; 8]);
}

// Item 8: names again.

#[test]
fn a_million_tiny_tensors() {
    let mut header = String::from("{");
    for i in 0..1_000_000 {
        let offsets = format!("[{},{}]", 2 * i, 2 * i + 2);
        header.push_str(if i == 0 { "" } else { "," });
        header.push_str(&entry(&format!("t{i}"), "BF16", "[1]", &offsets));
    }
    header.push('}');
    let many = File::new(&file(&header, &vec![0; 2_000_000]));
    let start = std::time::Instant::now();
    let checkpoint = many.open().unwrap();
    // A few seconds on one shared core; quadratic code would take hours.
    assert!(start.elapsed().as_secs() < 60, "{:?}", start.elapsed());
    assert_eq!(checkpoint.len(), 1_000_000);
    assert_eq!(checkpoint.get("t999999").unwrap().shape(), [1]);
}

#[test]
fn a_name_of_a_million_characters() {
    let name = "x".repeat(1_000_000);
    let checkpoint =
        File::new(&file(&format!("{{{}}}", entry(&name, "F32", "[1]", "[0,4]")), &[0; 4])).open().unwrap();
    assert!(checkpoint.get(&name).is_ok());
    let bad = File::new(&file(&format!("{{{}}}", entry(&name, "F32", "[2]", "[0,4]")), &[0; 4]));
    assert!(reason(bad.open()).contains("(1000000 characters)"));
}

#[test]
fn names_that_would_act_on_a_terminal_or_a_path() {
    // As written in the header, and as it must appear in the error.
    for (name, shown) in [
        ("/../etc/passwd", "/../etc/passwd"),
        ("a\\nb", "a\\nb"),
        ("\\u001b[2J", "\\u{1b}[2J"),
        ("\\u202etxt", "\\u{202e}txt"),
    ] {
        let bytes = file(&format!("{{{}}}", entry(name, "F32", "[2]", "[0,4]")), &[0; 4]);
        assert_refused(&bytes, &format!("tensor {shown}:"));
        // Legal as such: names are keys, not paths.
        let bytes = file(&format!("{{{}}}", entry(name, "F32", "[1]", "[0,4]")), &[0; 4]);
        assert!(File::new(&bytes).open().is_ok());
    }
}

// Item 10: files that change, and things that are no files.

#[test]
fn unlinked_while_open() {
    for mmap in [true, false] {
        let gone = File::new(&one("F32", "[2]", "[0,8]", 8));
        let checkpoint = Checkpoint::open(gone.dir.path(), OpenOptions { mmap }).unwrap();
        std::fs::remove_file(gone.path()).unwrap();
        assert_eq!(&*checkpoint.get("t").unwrap().bytes().unwrap(), &[0; 8]);
    }
}

#[test]
fn truncated_while_read() {
    let shrunk = File::new(&one("F32", "[2]", "[0,8]", 8));
    let checkpoint = Checkpoint::open(shrunk.dir.path(), OpenOptions { mmap: false }).unwrap();
    stretch(&shrunk, 20);
    match checkpoint.get("t").unwrap().bytes() {
        Err(Error::Checkpoint { reason, .. }) => assert!(reason.contains("past the end"), "{reason}"),
        other => panic!("{other:?}"),
    }
}

fn mkfifo(path: &Path) {
    assert!(std::process::Command::new("mkfifo").arg(path).status().unwrap().success());
}

#[test]
fn weights_that_are_no_regular_file() {
    let place = |make: &dyn Fn(&Path)| {
        let dir = tempfile::tempdir().unwrap();
        make(&dir.path().join("model.safetensors"));
        reason(Checkpoint::open(dir.path(), OpenOptions::default()))
    };
    assert!(place(&|path| std::fs::create_dir(path).unwrap()).contains("found a directory"));
    assert!(place(&mkfifo).contains("found a FIFO"));
    assert!(place(&|path| std::os::unix::fs::symlink("/dev/zero", path).unwrap()).contains("found a device"));
}

#[test]
fn no_weights_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let found = reason(Checkpoint::open(dir.path(), OpenOptions::default()));
    assert!(found.contains("model.safetensors.index.json"), "{found}");
    let absent = Checkpoint::open(dir.path().join("absent"), OpenOptions::default());
    assert!(matches!(absent, Err(Error::Io { .. })));
}
