//! Sharded checkpoints: what `model.safetensors.index.json` may say, and what it may not.

use std::path::Path;
use tempfile::TempDir;
use warpstep::weights::{Checkpoint, OpenOptions};
use warpstep::{Error, Result};

/// A safetensors file of f32 scalars with these names.
fn shard(names: &[&str]) -> Vec<u8> {
    let entries = names.iter().enumerate().map(|(i, name)| {
        format!(r#""{name}":{{"dtype":"F32","shape":[],"data_offsets":[{},{}]}}"#, 4 * i, 4 * i + 4)
    });
    let header = format!("{{{}}}", entries.collect::<Vec<_>>().join(","));
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &vec![0; 4 * names.len()]].concat()
}

/// A directory with the shards `1.safetensors` (a, b) and `2.safetensors` (c), and this index.
fn model(index: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("1.safetensors"), shard(&["a", "b"])).unwrap();
    std::fs::write(dir.path().join("2.safetensors"), shard(&["c"])).unwrap();
    std::fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
    dir
}

const GOOD: &str = r#"{"metadata":{"total_size":12},"weight_map":{
    "a":"1.safetensors","b":"1.safetensors","c":"2.safetensors"}}"#;

fn open(dir: &Path) -> Result<Checkpoint> {
    let [mapped, read] = [true, false].map(|mmap| Checkpoint::open(dir, OpenOptions { mmap }));
    assert_eq!(mapped.as_ref().err().map(Error::to_string), read.as_ref().err().map(Error::to_string));
    mapped
}

#[track_caller]
fn reason(dir: &Path) -> String {
    match open(dir) {
        Err(Error::Checkpoint { reason, .. }) => {
            assert!(!reason.contains(char::is_control), "unescaped: {reason:?}");
            reason
        }
        other => panic!("expected a Checkpoint error, got {other:?}"),
    }
}

#[test]
fn a_good_index() {
    let dir = model(GOOD);
    let checkpoint = open(dir.path()).unwrap();
    assert_eq!((checkpoint.len(), checkpoint.files().count()), (3, 2));
    assert_eq!(checkpoint.get("c").unwrap().file(), dir.path().join("2.safetensors"));
    // Without the total, or as the float that older writers made of it.
    assert!(open(model(&GOOD.replace(r#""total_size":12"#, "")).path()).is_ok());
    assert!(open(model(&GOOD.replace("12", "12.0")).path()).is_ok());
}

// Item 3: the same name in two shards.

#[test]
fn same_name_in_two_shards() {
    let dir = model(GOOD);
    std::fs::write(dir.path().join("2.safetensors"), shard(&["c", "a"])).unwrap();
    match open(dir.path()) {
        Err(Error::DuplicateTensor { tensor, first, second }) => {
            assert_eq!(tensor, "a");
            assert_eq!([first, second], ["1", "2"].map(|n| dir.path().join(format!("{n}.safetensors"))));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn same_name_twice_in_the_index() {
    let dir = model(&GOOD.replace(r#""c":"#, r#""a":"2.safetensors","c":"#));
    assert!(reason(dir.path()).contains("names tensor a twice"));
}

// Item 11: where shards may lie.

#[test]
fn shard_in_the_parent_directory() {
    let dir = model(&GOOD.replace("2.safetensors", "../2.safetensors"));
    assert!(reason(dir.path()).contains("only plain file names"));
    for name in ["..", ".", "", "/", "a/../2.safetensors", "sub/2.safetensors"] {
        let dir = model(&GOOD.replace("2.safetensors", name));
        assert!(reason(dir.path()).contains("only plain file names"), "{name}");
    }
}

#[test]
fn shard_at_an_absolute_path() {
    let dir = model(&GOOD.replace("2.safetensors", "/etc/passwd"));
    assert!(reason(dir.path()).contains("only plain file names"));
}

#[test]
fn shard_name_with_control_characters() {
    let dir = model(&GOOD.replace("2.safetensors", "\\u001b[2J"));
    assert!(reason(dir.path()).contains("\\u{1b}[2J"));
}

#[test]
fn shard_is_a_link_that_leaves_the_directory() {
    let (dir, elsewhere) = (model(GOOD), model(GOOD));
    let link = dir.path().join("2.safetensors");
    std::fs::remove_file(&link).unwrap();
    std::os::unix::fs::symlink(elsewhere.path().join("2.safetensors"), &link).unwrap();
    assert!(reason(dir.path()).contains("symbolic link that leaves"));
    // A link inside the directory is none of our business.
    std::fs::remove_file(&link).unwrap();
    std::fs::write(dir.path().join("real"), shard(&["c"])).unwrap();
    std::os::unix::fs::symlink("real", &link).unwrap();
    assert!(open(dir.path()).is_ok());
}

#[test]
fn shard_is_a_link_into_the_hub_cache() {
    // models--ORG--NAME/{blobs/HASH, snapshots/COMMIT/file -> ../../blobs/HASH}
    let cache = tempfile::tempdir().unwrap();
    let (blobs, snapshot) = (cache.path().join("blobs"), cache.path().join("snapshots/0123"));
    std::fs::create_dir_all(&blobs).unwrap();
    std::fs::create_dir_all(&snapshot).unwrap();
    let files = [("1.safetensors", shard(&["a", "b"])), ("2.safetensors", shard(&["c"]))];
    for (name, bytes) in files {
        std::fs::write(blobs.join(name), bytes).unwrap();
        std::os::unix::fs::symlink(format!("../../blobs/{name}"), snapshot.join(name)).unwrap();
    }
    std::fs::write(snapshot.join("model.safetensors.index.json"), GOOD).unwrap();
    assert_eq!(open(&snapshot).unwrap().len(), 3);
    // Beside the blobs is outside.
    std::fs::write(cache.path().join("2.safetensors"), shard(&["c"])).unwrap();
    std::fs::remove_file(snapshot.join("2.safetensors")).unwrap();
    std::os::unix::fs::symlink("../../2.safetensors", snapshot.join("2.safetensors")).unwrap();
    assert!(reason(&snapshot).contains("symbolic link that leaves"));
}

#[test]
fn shard_missing() {
    let dir = model(&GOOD.replace("2.safetensors", "3.safetensors"));
    assert!(reason(dir.path()).contains("shard 3.safetensors is missing"));
}

/// The index with its second shard replaced by what `make` puts there.
fn with_second(make: impl Fn(&Path)) -> TempDir {
    let dir = model(GOOD);
    let path = dir.path().join("2.safetensors");
    std::fs::remove_file(&path).unwrap();
    make(&path);
    dir
}

#[test]
fn shard_is_a_directory() {
    let dir = with_second(|path| std::fs::create_dir(path).unwrap());
    assert!(reason(dir.path()).contains("found a directory"));
}

#[test]
fn shard_is_a_fifo() {
    let dir = with_second(|path| {
        assert!(std::process::Command::new("mkfifo").arg(path).status().unwrap().success());
    });
    assert!(reason(dir.path()).contains("found a FIFO"));
}

#[test]
fn shard_is_dev_zero() {
    let dir = with_second(|path| std::os::unix::fs::symlink("/dev/zero", path).unwrap());
    assert!(reason(dir.path()).contains("symbolic link that leaves"));
}

// Item 12: index and shards must agree.

#[test]
fn total_size_wrong() {
    for wrong in ["11", "13", "-12", "12.5", "1e300"] {
        let found = reason(model(&GOOD.replace(":12}", &format!(":{wrong}}}"))).path());
        assert!(found.contains("total_size is") && found.contains("hold 12 bytes"), "{found}");
    }
    assert!(reason(model(&GOOD.replace(":12}", ":\"12\"}")).path()).contains("not a safetensors index"));
}

#[test]
fn tensor_listed_but_absent() {
    let dir = model(&GOOD.replace(r#""c":"#, r#""d":"2.safetensors","c":"#));
    match open(dir.path()) {
        Err(Error::MissingTensor { path, tensor }) => {
            assert_eq!((path, &*tensor), (dir.path().join("2.safetensors"), "d"));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn tensor_listed_for_another_shard() {
    let dir = model(&GOOD.replace(r#""b":"1"#, r#""b":"2"#));
    assert!(matches!(open(dir.path()), Err(Error::MissingTensor { tensor, .. }) if tensor == "b"));
}

#[test]
fn tensor_not_listed() {
    let dir = model(&GOOD.replace(r#""b":"1.safetensors","#, ""));
    match open(dir.path()) {
        Err(Error::UnexpectedTensor { path, tensor }) => {
            assert_eq!(path, dir.path().join("1.safetensors"));
            assert!(tensor.starts_with("b "), "{tensor}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn weight_map_empty_or_odd() {
    assert!(reason(model(r#"{"weight_map":{}}"#).path()).contains("weight_map is empty"));
    for text in ["", "[]", "{}", r#"{"weight_map":[]}"#, r#"{"weight_map":{"a":1}}"#, "{\"weight_map\":"] {
        assert!(reason(model(text).path()).contains("not a safetensors index"), "{text}");
    }
}

#[test]
fn index_of_ten_million_entries() {
    // Ten million entries take 170 MB or more: refused by its size, before it is read.
    let dir = model("{");
    let path = dir.path().join("model.safetensors.index.json");
    std::fs::File::options().write(true).open(path).unwrap().set_len(170_000_000).unwrap();
    assert!(reason(dir.path()).contains("170000000 bytes, more than the limit"));
}

#[test]
fn index_of_ten_thousand_shards() {
    let entries: Vec<_> = (0..10_000).map(|i| format!(r#""t{i}":"{i}.safetensors""#)).collect();
    let dir = model(&format!(r#"{{"weight_map":{{{}}}}}"#, entries.join(",")));
    assert!(reason(dir.path()).contains("10000 shards"));
}
