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
        (&dir.path().join(""), "names a directory"),
        (&dir.path().join("new/"), "names a directory"),
        (dir.path(), "is a directory"),
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

#[test]
fn a_write_protected_file_is_kept() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.png");
    std::fs::write(&path, "old").unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o444)).unwrap();
    let message = refused(1, &[&QUICK[..], &[path.to_str().unwrap()]].concat());
    assert!(message.contains("write-protected"), "{message}");
    assert_eq!(std::fs::read(&path).unwrap(), b"old");
}

#[test]
fn two_outputs_of_one_name_are_refused_whatever_the_name_looks_like() {
    let dir = tempfile::tempdir().unwrap();
    let name = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (out, again) = (name("out.png"), name("./out.png"));
    std::fs::write(dir.path().join("two.txt"), "a circle\na star\n").unwrap();
    std::os::unix::fs::symlink(name("linked.png"), name("link.png")).unwrap();
    std::fs::write(name("linked.png"), "old").unwrap();
    let prompts = ["generate", "--prompts", &name("two.txt"), "--size=32x16", "--steps=2", "-o"];
    let refuse = |arguments: &[&[&str]]| {
        let message = refused(2, &arguments.concat());
        assert!(message.contains("is the name of another output too"), "{message}");
    };
    refuse(&[&QUICK, &[&out, "--preview", &again]]);
    refuse(&[&QUICK, &[&out, "--save-tokens", &out]]);
    refuse(&[
        &QUICK,
        &[&out, "-n2", "--preview", &name("preview-1.png"), "--save-tokens", &name("out-0.png")],
    ]);
    refuse(&[&QUICK, &[&out, "-n2", "--save-tokens", &name("out-1.png")]]);
    refuse(&[&QUICK, &[&name("link.png"), "--preview", &name("linked.png")]]);
    refuse(&[&prompts, &[&out, "--preview", &name("out-1.png")]]);
    refuse(&[&prompts, &[&out, "--save-tokens", &out]]);
    let message = refused(2, &[&prompts[..], &[&out, "--preview", &name("two.txt")]].concat());
    assert!(message.contains("is read by this command too"), "{message}");
    assert_eq!(names(dir.path()), ["link.png", "linked.png", "two.txt"]);

    // A later picture is not replaced before it is read.
    for name in ["a.png", "out-0.png"] {
        let picture = warpstep::image::RgbImage::new(16, 16, vec![9; 16 * 16 * 3]).unwrap();
        warpstep::image::write_png(&dir.path().join(name), &picture, None).unwrap();
    }
    let message = refused(2, &["reconstruct", &name("a.png"), &name("out-0.png"), "-o", &out]);
    assert!(message.contains("is read by this command too"), "{message}");
}

#[test]
fn pictures_of_two_cases_of_one_name_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("new");
    let verify = |folder: &Path| {
        ["verify", "a/x.bin", "b/x.bin", "--pictures", folder.to_str().unwrap()].map(str::to_owned)
    };
    let message = refused(2, &verify(&folder).each_ref().map(String::as_str));
    assert!(message.contains("x.png is the name of another output too"), "{message}");
    refused(1, &verify("/proc/self".as_ref()).each_ref().map(String::as_str));
}

/// Such a name is no JSON.
#[test]
fn a_name_that_is_not_utf8_is_written_and_told() {
    use std::os::unix::ffi::OsStrExt;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join(std::ffi::OsStr::from_bytes(b"\xff.png"));
    let made =
        Command::new(env!("CARGO_BIN_EXE_warpstep")).args(QUICK).arg(&file).arg("--json").output().unwrap();
    assert!(made.status.success() && file.is_file(), "{}", text(&made.stderr));
    let json: serde_json::Value = serde_json::from_slice(&made.stdout).unwrap();
    assert!(json["files"][0].as_str().unwrap().ends_with("\u{fffd}.png"), "{json}");
    let out = dir.path().join("r.png");
    let made = Command::new(env!("CARGO_BIN_EXE_warpstep"))
        .args(["reconstruct", "--json", "-o"])
        .args([&out, &file])
        .output()
        .unwrap();
    assert!(made.status.success() && !made.stdout.is_empty(), "{}", text(&made.stderr));
}

#[test]
fn tokens_get_the_ending_of_their_format() {
    let dir = tempfile::tempdir().unwrap();
    let name = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(dir.path().join("p.txt"), "a circle\n").unwrap();
    let made = warpstep(&[&QUICK[..], &[&name("x"), "--save-tokens", &name("x")]].concat());
    assert!(made.status.success(), "{}", text(&made.stderr));
    let prompts = ["generate", "--prompts", &name("p.txt"), "--size=32x16", "--steps=2", "--sm-count=4"];
    let files = ["-o", &name("y.png"), "--save-tokens", &name("y")];
    let made = warpstep(&[&prompts[..], &files].concat());
    assert!(made.status.success(), "{}", text(&made.stderr));
    assert_eq!(names(dir.path()), ["p.txt", "x", "x.safetensors", "y-0.png", "y-0.safetensors"]);
    // Its own tokens are not what a decoded picture may replace.
    let message =
        refused(2, &["generate", "--from-tokens", &name("x.safetensors"), "-o", &name("x.safetensors")]);
    assert!(message.contains("is read by this command too"), "{message}");
}

#[test]
fn a_bad_request_is_refused_before_weights_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let name = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let picture = warpstep::image::RgbImage::new(16, 17, vec![9; 16 * 17 * 3]).unwrap();
    warpstep::image::write_png(&dir.path().join("odd.png"), &picture, None).unwrap();
    let long = "word ".repeat(20_000);
    for (arguments, expected) in [
        (&["generate", "x", "--size", "17x16"][..], "multiple of 16"),
        (&["generate", &long], "prompt"),
        (&["generate", "x", "--think", "--think-tokens", "0"], "max_tokens"),
        (&["generate", "x", "--think", "--think-temperature", "-1"], "temperature"),
        (&["complete", &long], "prompt"),
        (&["complete", "x", "--image", &name("odd.png")], "images"),
        (&["edit", &name("odd.png"), "x"], "images"),
        (&["reconstruct", &name("odd.png")], "images"),
    ] {
        // So many threads are refused by the load: whoever hears of the request was not kept waiting for one.
        let message = refused(2, &[arguments, &["--load-threads", "300", "--sm-count", "4"]].concat());
        assert!(message.contains(expected), "{message}");
    }
    assert!(
        refused(2, &["generate", "x", "--load-threads", "300", "-o", &name("x.png")])
            .contains("load_threads")
    );
}

/// The program with its streams as a shell's redirections leave them: `{}` in `redirected` is the program's command.
fn in_shell(redirected: &str, arguments: &[&str]) -> Output {
    let script = redirected.replace("{}", "\"$0\" \"$@\"");
    Command::new("bash")
        .args(["-o", "pipefail", "-c", &script, env!("CARGO_BIN_EXE_warpstep")])
        .args(arguments)
        .env("RUST_BACKTRACE", "1")
        .output()
        .unwrap()
}

#[test]
fn a_stdout_that_nobody_reads_ends_the_program_in_silence_and_a_full_one_with_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let picture = dir.path().join("x.png");
    let picture = picture.to_str().unwrap();
    for arguments in [
        &["--help"][..],
        &["doctor"],
        &["doctor", "--json"],
        &["kernels", "list"],
        &["kernels", "test", "--op", "to_rgb8", "--scale", "small"],
        &["kernels", "conformance", "--list"],
        &["bench", "--derive"],
        &["complete", "a", "--max-tokens", "2"],
        &[&QUICK[..], &[picture, "--json"]].concat(),
        &[&QUICK[..], &[picture, "--plan"]].concat(),
        &["inspect", picture],
    ] {
        let full = in_shell("{} >/dev/full", arguments);
        let message = text(&full.stderr);
        assert_eq!(full.status.code(), Some(1), "{arguments:?}: {message}");
        let last = message.lines().last().unwrap_or_default();
        assert!(last.starts_with("error: stdout: No space left on device"), "{arguments:?}: {message}");
        assert!(!message.contains("panicked"), "{arguments:?}: {message}");
        // Nobody has the other end from the beginning.
        let closed = in_shell("exec 3> >(:); wait $!; {} >&3", arguments);
        let message = text(&closed.stderr);
        assert_eq!(closed.status.code(), Some(0), "{arguments:?}: {message}");
        assert!(!message.contains("panicked") && !message.contains("error:"), "{arguments:?}: {message}");
    }
    // A reader that goes away in between.
    let output = in_shell("{} | head -n 1", &["kernels", "list"]);
    assert!(output.status.success() && output.stderr.is_empty(), "{}", text(&output.stderr));
}

#[test]
fn a_picture_is_made_whether_or_not_anybody_reads_of_its_progress() {
    let dir = tempfile::tempdir().unwrap();
    for (index, streams) in
        ["{} 2>/dev/full", "exec 3> >(:); wait $!; {} 2>&3", "{} 2>&-", "{} 2>&- >&-"].iter().enumerate()
    {
        let picture = dir.path().join(format!("{index}.png"));
        let think = ["--think", "--think-tokens", "2"];
        let made = in_shell(streams, &[&QUICK[..], &[picture.to_str().unwrap()], &think].concat());
        assert!(made.status.success() && picture.is_file(), "{streams}: {made:?}");
    }
}
