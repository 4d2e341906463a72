//! The program's verbs that read and write pictures: prompts from files, previews, tokens, folders, resizing, and one named
//! test per bad request about pictures and sizes.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use warpstep::image::{ImageLimits, RgbImage, load_image, read_png_info, write_png};

fn warpstep(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_warpstep")).args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Two tokens and two steps: no test here looks at what pictures show.
const QUICK: [&str; 6] = ["--size", "32x16", "--steps", "2", "--seed", "5"];

/// A folder, and names in it.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Folder {
        Folder(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn name(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    /// A picture of stripes.
    fn picture(&self, name: &str, width: u32, height: u32) -> String {
        let data = (0..width * height * 3).map(|i| (i / 24 * 40 % 256) as u8).collect();
        write_png(&self.path(name), &RgbImage::new(width, height, data).unwrap(), None).unwrap();
        self.name(name)
    }
}

fn run(arguments: &[&str]) -> Output {
    let output = warpstep(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
    output
}

/// The message of a request that is refused as a usage error, before any work.
fn refused(arguments: &[&str]) -> String {
    let output = warpstep(arguments);
    let message = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {message}");
    message
}

#[test]
fn prompts_of_a_file_make_the_pictures_that_each_makes_alone() {
    let dir = Folder::new();
    std::fs::write(dir.path("p.txt"), "# colours\na red circle\n\n  a blue star  \n").unwrap();
    let (out, prompts) = (dir.name("out.png"), dir.name("p.txt"));
    let output =
        run(&[&["generate", "--prompts", &prompts, "-n", "2", "--json", "-o", &out][..], &QUICK].concat());
    let lines: Vec<serde_json::Value> =
        text(&output.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 2);
    assert_eq!(lines[1]["request"]["prompt"], "a blue star");
    // One session makes them all: the rows without caption went through the transformer once.
    let reuse = |line: usize, key: &str| lines[line]["reuse"][key].as_u64();
    assert_eq!((&lines[0]["reuse"]["lists"], &lines[1]["reuse"]["lists"]), (&false.into(), &true.into()));
    assert!(reuse(0, "kept_tokens") == Some(0) && reuse(1, "kept_tokens") > Some(0), "{lines:?}");
    // The second image of each has the prompts of the first.
    assert_eq!(reuse(0, "repeated_tokens"), reuse(0, "prefilled_tokens"));
    assert_eq!(reuse(1, "repeated_tokens"), reuse(1, "prefilled_tokens"));
    assert!(lines[1]["files"][1].as_str().unwrap().ends_with("out-1-1.png"));
    assert!(text(&output.stderr).contains("prompt 2 of 2: a blue star"));
    let alone = dir.name("alone.png");
    run(&[&["generate", "a blue star", "--first-image", "1", "-o", &alone][..], &QUICK].concat());
    assert_eq!(dir.read("alone.png"), dir.read("out-1-1.png"));
    assert_ne!(dir.read("out-0-0.png"), dir.read("out-1-0.png"));
    // One line is still a list.
    std::fs::write(dir.path("p.txt"), "a blue star").unwrap();
    run(&[&["generate", "--prompts", &prompts, "--first-image", "1", "-o", &out][..], &QUICK].concat());
    assert_eq!(dir.read("alone.png"), dir.read("out-0.png"));
}

#[test]
fn prompts_are_checked_before_the_first_picture_and_named_by_file_and_line() {
    let dir = Folder::new();
    let (out, prompts) = (dir.name("out.png"), dir.name("p.txt"));
    let refuse = |content: &[u8]| {
        std::fs::write(dir.path("p.txt"), content).unwrap();
        refused(&["generate", "--prompts", &prompts, "-o", &out])
    };
    let message = refuse(b"a circle\n\nmy <image> here\n");
    assert!(message.contains("p.txt:3: invalid request: prompt"), "{message}");
    assert!(refuse(b"a circle\nnot \xff text\n").contains("p.txt:2: is not UTF-8"));
    assert!(refuse(b"# nothing\n").contains("holds no prompt"));
    assert!(refused(&["generate", "a circle", "--prompts", &prompts]).contains("cannot be used with"));
    assert_eq!(warpstep(&["generate", "--prompts", &dir.name("none"), "-o", &out]).status.code(), Some(1));
    assert!(!dir.path("out-0.png").exists());
}

#[test]
fn instructions_of_a_file_edit_the_same_picture() {
    let dir = Folder::new();
    let (a, out, prompts) = (dir.picture("a.png", 16, 32), dir.name("out.png"), dir.name("p.txt"));
    std::fs::write(dir.path("p.txt"), "make it red\nmake it blue").unwrap();
    run(&["edit", &a, "--prompts", &prompts, "--cfg-img", "1.5", "--steps", "2", "--seed", "1", "-o", &out]);
    run(&["edit", &a, "make it blue", "--cfg-img", "1.5", "--steps", "2", "--seed", "1", "-o", &out]);
    assert_eq!(dir.read("out.png"), dir.read("out-1.png"));
    assert_ne!(dir.read("out-0.png"), dir.read("out-1.png"));
}

#[test]
fn pictures_are_compared() {
    let dir = Folder::new();
    let (a, b, small) =
        (dir.picture("a.png", 16, 32), dir.picture("b.png", 16, 48), dir.picture("c.png", 8, 8));
    let same = warpstep(&["compare", &a, &a, "--at-least", "40"]);
    assert!(same.status.success());
    let said = String::from_utf8(same.stdout).unwrap();
    assert_eq!(said, "PSNR inf dB, SSIM 1.0000, largest difference 0 of 255\n");
    // Too small for a window of SSIM, and no reason to refuse.
    assert_eq!(warpstep(&["compare", &small, &small]).stdout, b"PSNR inf dB, largest difference 0 of 255\n");
    assert!(refused(&["compare", &a, &b]).contains("16x32 and 16x48"));

    // Of one value in 1536 that is 16 off: 10 log10(255^2 * 1536 / 256) = 55.9.
    let mut pixels = load_image(Path::new(&a), &ImageLimits::default()).unwrap().data().to_vec();
    pixels[5] ^= 16;
    write_png(Path::new(&b), &RgbImage::new(16, 32, pixels).unwrap(), None).unwrap();
    let found = warpstep(&["compare", &a, &b, "--at-least", "55.9"]);
    assert!(String::from_utf8_lossy(&found.stdout).starts_with("PSNR 55.91 dB"), "{found:?}");
    assert!(found.status.success());
    assert_eq!(warpstep(&["compare", &a, &b, "--at-least", "56"]).status.code(), Some(1));
}

#[test]
fn the_editing_preset_draws_without_a_picture_too() {
    // Its picture guidance of 2 has nothing to guide towards, and was refused.
    let dir = Folder::new();
    run(&[
        "generate",
        "a circle",
        "--preset",
        "edit",
        "--size",
        "16x16",
        "--steps",
        "2",
        "-o",
        &dir.name("a.png"),
    ]);
    let info = read_png_info(&dir.path("a.png")).unwrap();
    assert!(!info.parameters.unwrap().contains("Image CFG scale"));
}

#[test]
fn a_preview_is_a_labelled_png_and_changes_no_byte_of_the_result() {
    let dir = Folder::new();
    let [plain, with, preview] = ["plain.png", "with.png", "preview.png"].map(|name| dir.name(name));
    let quick = ["generate", "a circle", "--size", "16x48", "--steps", "2", "--seed", "5", "-o"];
    run(&[&quick[..], &[&plain]].concat());
    run(&[&quick[..], &[&with, "--preview", &preview]].concat());
    assert_eq!(dir.read("plain.png"), dir.read("with.png"));
    // The last one is the finished picture, still by the name of a preview.
    let info = read_png_info(&dir.path("preview.png")).unwrap();
    assert_eq!((info.width, info.height), (16, 48));
    assert_eq!(info.parameters.as_deref(), Some("Preview: 3 of 3 rows of image tokens"));
    let json: serde_json::Value = serde_json::from_str(&info.json.unwrap()).unwrap();
    assert_eq!(json["preview"]["rows"], 3);
    assert!(refused(&[&quick[..], &[&plain, "--preview", &plain]].concat()).contains("preview"));
    assert!(refused(&[&quick[..], &[&plain, "--preview-rows", "2"]].concat()).contains("--preview"));
}

#[test]
fn a_preview_that_cannot_be_written_stops_the_work() {
    let output = warpstep(
        &[&["generate", "a circle", "--preview", "/proc/version", "-o"][..], &["/tmp/never.png"]].concat(),
    );
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("/proc/version"));
    assert!(!Path::new("/tmp/never.png").exists());
}

#[test]
fn stored_tokens_decode_to_the_same_files() {
    let dir = Folder::new();
    let [made, again, tokens] = ["made.png", "again.png", "t.safetensors"].map(|name| dir.name(name));
    run(&[&["generate", "a circle", "-n", "2", "--save-tokens", &tokens, "-o", &made][..], &QUICK].concat());
    run(&["generate", "--from-tokens", &tokens, "-o", &again]);
    for index in 0..2 {
        assert_eq!(dir.read(&format!("made-{index}.png")), dir.read(&format!("again-{index}.png")));
    }
    let output = run(&["generate", "--from-tokens", &tokens, "--precision", "f32", "-o", &again]);
    assert!(text(&output.stderr).contains("bf16") && text(&output.stderr).contains("f32"));
    // No option is accepted that would have no effect.
    for option in [
        "--size=16x16",
        "--negative=x",
        "--positive=x",
        "--cfg=2",
        "--cfg-schedule=linear",
        "--steps=3",
        "--sampler=ode",
        "--shift=2",
        "--noise-level=0.5",
        "--use-norm=true",
        "--rescale=true",
        "--seed=1",
        "-n2",
        "--first-image=1",
        "--preset=t2i",
        "--preview=p.png",
        "--save-tokens=t",
        "--plan",
        "--think",
        "--refine",
        "--prompts=p.txt",
        "a prompt",
    ] {
        let message = refused(&["generate", "--from-tokens", &tokens, option]);
        assert!(message.contains("cannot be used with"), "{option}: {message}");
    }
    let output = warpstep(&["generate", "--from-tokens", &made, "-o", &again]);
    assert_eq!(output.status.code(), Some(1));
    std::fs::write(dir.path("bad"), b"x").unwrap();
    let output = warpstep(&["generate", "--from-tokens", &dir.name("bad"), "-o", &again]);
    assert!(text(&output.stderr).contains("no safetensors file"), "{}", text(&output.stderr));
}

#[test]
fn a_folder_of_pictures_is_reconstructed_into_a_table_with_means() {
    let dir = Folder::new();
    std::fs::create_dir(dir.path("photos")).unwrap();
    dir.picture("photos/b.png", 16, 16);
    dir.picture("photos/a.png", 40, 33);
    std::fs::write(dir.path("photos/notes.txt"), "no picture").unwrap();
    let (photos, out) = (dir.name("photos"), dir.name("out.png"));
    let table = text(&run(&["reconstruct", &photos, "--resize", "crop:16x32", "-o", &out]).stdout);
    let rows: Vec<&str> = table.lines().take(4).collect();
    assert!(
        rows[0].ends_with("PSNR dB    SSIM") && rows[1].contains("a.png") && rows[2].contains("b.png"),
        "{table}"
    );
    let figures =
        |row: &str| -> Vec<f64> { row.split_whitespace().skip(1).map(|v| v.parse().unwrap()).collect() };
    let (a, b, mean) = (figures(rows[1]), figures(rows[2]), figures(rows[3]));
    assert!(rows[3].starts_with("mean") && ((a[0] + b[0]) / 2.0 - mean[0]).abs() < 0.011, "{table}");
    assert!(((a[1] + b[1]) / 2.0 - mean[1]).abs() < 0.00011, "{table}");
    let info = read_png_info(&dir.path("out-1.png")).unwrap();
    assert_eq!((info.width, info.height), (16, 32));
    // The sizes are theirs, so the model has to say that they will not do.
    assert!(refused(&["reconstruct", &photos, "-o", &out]).contains("a.png: invalid request: images"));
    std::fs::create_dir(dir.path("empty")).unwrap();
    assert!(refused(&["reconstruct", &dir.name("empty"), "-o", &out]).contains("holds no PNG"));
}

#[test]
fn a_picture_of_another_size_is_edited_once_a_resize_mode_is_chosen() {
    let dir = Folder::new();
    let (odd, out) = (dir.picture("odd.png", 40, 33), dir.name("out.png"));
    let edit = |more: &[&str]| {
        [&["edit", &odd, "make it red", "--cfg-img", "1.5", "--steps", "2", "-o", &out][..], more]
            .concat()
            .join("\n")
    };
    let arguments = edit(&[]);
    let message = refused(&arguments.split('\n').collect::<Vec<_>>());
    assert!(message.contains("40x33") && message.contains("resize mode"), "{message}");
    let arguments = edit(&["--resize", "crop:32x16"]);
    run(&arguments.split('\n').collect::<Vec<_>>());
    let info = read_png_info(&dir.path("out.png")).unwrap();
    assert_eq!((info.width, info.height), (32, 16));
    for mode in ["bucket:300", "crop:16", "stretch"] {
        assert!(refused(&["edit", &odd, "x", "--resize", mode]).contains("invalid value"), "{mode}");
    }
    assert!(refused(&["edit", &odd, "x", "--resize", "crop:17x16"]).contains("multiples of 16"));
}

#[test]
fn an_edit_without_a_picture_is_refused() {
    assert!(refused(&["edit", "make it red"]).contains("give pictures"));
    assert!(refused(&["edit"]).contains("IMAGE"));
}

#[test]
fn an_edit_without_an_instruction_is_refused() {
    let dir = Folder::new();
    assert!(refused(&["edit", &dir.picture("a.png", 16, 16)]).contains("instruction"));
}

#[test]
fn an_edit_of_two_pictures_is_made() {
    let dir = Folder::new();
    let (a, b, out) = (dir.picture("a.png", 16, 16), dir.picture("b.png", 16, 32), dir.name("out.png"));
    run(&["edit", &a, &b, "put <image> on <image>", "--cfg-img", "1.5", "--steps", "2", "-o", &out]);
    let info = read_png_info(&dir.path("out.png")).unwrap();
    assert_eq!((info.width, info.height), (16, 16));
}

#[test]
fn an_instruction_without_a_mark_is_one_with_the_mark_in_front() {
    let dir = Folder::new();
    let (a, x, y) = (dir.picture("a.png", 16, 16), dir.name("x.png"), dir.name("y.png"));
    for (prompt, out) in [("make it red", &x), ("<image>make it red", &y)] {
        run(&[
            "edit",
            &a,
            prompt,
            "--cfg-img",
            "1.5",
            "--steps",
            "2",
            "--seed",
            "1",
            "--no-metadata",
            "-o",
            out,
        ]);
    }
    assert_eq!(dir.read("x.png"), dir.read("y.png"));
}

#[test]
fn two_marks_for_one_picture_are_refused() {
    let dir = Folder::new();
    let message = refused(&["edit", &dir.picture("a.png", 16, 16), "<image> and <image>"]);
    assert!(message.contains("prompt"), "{message}");
}

#[test]
fn a_picture_given_to_text_to_image_is_refused() {
    let dir = Folder::new();
    assert!(
        refused(&["generate", &dir.picture("a.png", 16, 16), "a circle"]).contains("unexpected argument")
    );
    assert!(refused(&["generate", "<image> in red"]).contains("prompt"));
}

#[test]
fn sizes_that_are_no_picture_are_refused() {
    for (size, expected) in [
        ("0x16", "width"),
        ("16x0", "height"),
        ("-16x16", "invalid"),
        ("1x1", "multiple of 16"),
        ("17x16", "multiple of 16"),
        ("16x40", "multiple of 16"),
        ("65536x65536", "image tokens"),
        ("1048576x1048576", "image tokens"),
        ("4294967280x4294967280", "image tokens"),
        ("4294967296x16", "invalid"),
    ] {
        let message = refused(&["generate", "x", &format!("--size={size}")]);
        assert!(message.contains(expected), "{size}: {message}");
    }
}
