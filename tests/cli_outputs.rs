//! What the program writes, and where: names that cannot be written or that meet, and streams that take nothing more.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn warpstep(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_warpstep")).args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Two tokens and two steps: no test here looks at what pictures show.
const QUICK: [&str; 7] =
    ["generate", "a circle", "--size=32x16", "--steps=2", "--seed=5", "--sm-count=4", "-o"];

/// The message of a command that fails with `code` before it loads a model: a load would be told on stderr.
fn refused(code: i32, arguments: &[&str]) -> String {
    let output = warpstep(arguments);
    let message = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {message}");
    assert!(message.lines().count() == 1 || code == 2, "{arguments:?}: {message}");
    assert!(!message.contains("MB of weights"), "{arguments:?} is refused after the load: {message}");
    message
}

fn names(dir: &Path) -> Vec<String> {
    let entry = |e: std::io::Result<std::fs::DirEntry>| e.unwrap().file_name().into_string().unwrap();
    let mut names: Vec<String> = std::fs::read_dir(dir).unwrap().map(entry).collect();
    names.sort();
    names
}

/// A folder that takes no files: by permission, or, for root, whom permissions do not stop, one of the kernel's.
fn read_only(dir: &Path) -> PathBuf {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o555)).unwrap();
    match std::fs::File::create(dir.join("probe")) {
        Err(_) => dir.to_path_buf(),
        Ok(_) => PathBuf::from("/proc/self"),
    }
}

#[test]
fn a_folder_that_takes_no_file_is_found_out_before_the_work_and_a_test_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let unwritable = read_only(folder.path()).join("x.png");
    for (path, expected) in [
        (unwritable.as_path(), "cannot write into directory"),
        (&dir.path().join("missing/x.png"), "missing: No such file or directory"),
        (&dir.path().join(""), "is a directory"),
        (Path::new("/dev/null"), "no regular file"),
    ] {
        let path = path.to_str().unwrap();
        for option in ["-o", "--preview", "--save-tokens"] {
            let fine = dir.path().join("fine.png");
            let arguments = [&QUICK[..], &[fine.to_str().unwrap(), option, path]].concat();
            let arguments = if option == "-o" { [&QUICK[..], &[path]].concat() } else { arguments };
            let message = refused(1, &arguments);
            assert!(message.contains(expected), "{option}: {message}");
        }
        let message = refused(1, &["kernels", "conformance", "--device", "emulated", "--out", path]);
        assert!(message.contains(expected), "{message}");
    }
    assert!(names(dir.path()).is_empty(), "{:?}", names(dir.path()));
}
