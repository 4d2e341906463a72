use super::*;
use crate::files::check_destination;
use std::io;
use std::path::PathBuf;
use tempfile::TempDir;

/// 5 x 3 pixels, all different.
fn picture() -> RgbImage {
    RgbImage::new(5, 3, (0..45).map(|v| v * 5).collect()).unwrap()
}

fn text(parameters: &str, json: &str) -> Option<Metadata> {
    Some(Metadata { parameters: parameters.into(), json: json.into() })
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn bytes(image: &RgbImage, metadata: Option<Metadata>) -> Vec<u8> {
    let mut out = Vec::new();
    encode_png(&mut out, image, metadata.as_ref()).unwrap();
    out
}

fn info_of(bytes: &[u8]) -> Result<PngInfo> {
    read_info(io::Cursor::new(bytes), Path::new("x.png"))
}

#[test]
fn pixels_and_texts_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.png");
    for metadata in [
        None,
        text("a cat\nSteps: 3", r#"{"request": {"seed": 18446744073709551615}}"#),
        text("naïve — 東京 🐼\nSteps: 3", "{\"prompt\": \"é\"}"),
        text("", ""),
    ] {
        write_png(&path, &picture(), metadata.as_ref()).unwrap();
        let (parameters, json) = metadata.map(|m| (m.parameters, m.json)).unzip();
        assert_eq!(read_png_info(&path).unwrap(), PngInfo { width: 5, height: 3, parameters, json });
        let file = io::BufReader::new(File::open(&path).unwrap());
        let mut reader = png::Decoder::new(file).read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        reader.next_frame(&mut pixels).unwrap();
        assert_eq!(pixels, picture().data());
    }
    assert_eq!(names(dir.path()), ["a.png"]);
}

#[test]
fn ascii_goes_into_text_chunks_that_every_viewer_reads() {
    let find = |bytes: &[u8], kind: &[u8]| bytes.windows(4).filter(|window| *window == kind).count();
    let ascii = bytes(&picture(), text("a", "b"));
    assert_eq!((find(&ascii, b"tEXt"), find(&ascii, b"iTXt")), (2, 0));
    let other = bytes(&picture(), text("ä", "b"));
    assert_eq!((find(&other, b"tEXt"), find(&other, b"iTXt")), (1, 1));
}

#[test]
fn images_of_the_wrong_length_are_refused() {
    for (width, height, len) in [(5, 3, 44), (0, 0, 0), (0, 7, 0), (u32::MAX, u32::MAX, 3)] {
        let refused = RgbImage::new(width, height, vec![0; len]);
        assert!(matches!(refused, Err(Error::InvalidRequest { .. })), "{width}x{height} {len}");
    }
}

/// Error kind and message of a failed write.
fn io_error(result: Result<()>) -> (io::ErrorKind, String) {
    match result {
        Err(Error::Io { path, cause }) => (cause.kind(), format!("{}: {cause}", path.display())),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_missing_directory_is_an_error_that_names_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("missing/a.png");
    let (kind, message) = io_error(write_png(&path, &picture(), None));
    assert_eq!(kind, io::ErrorKind::NotFound);
    assert!(message.contains("missing/a.png") && message.contains("directory"), "{message}");
    assert!(names(dir.path()).is_empty());
}

/// A directory that takes no files: by permission, or, for root, whom permissions do not stop, one of the kernel's.
fn read_only_dir() -> (TempDir, PathBuf) {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o555)).unwrap();
    let refuses = File::create(dir.path().join("probe")).is_err();
    let path = if refuses { dir.path().to_path_buf() } else { PathBuf::from("/proc/self") };
    (dir, path)
}

#[test]
fn a_read_only_directory_is_an_error() {
    let (_guard, dir) = read_only_dir();
    let (_, message) = io_error(write_png(&dir.join("a.png"), &picture(), None));
    assert!(message.contains("cannot write into directory"), "{message}");
}

#[test]
fn a_write_protected_file_is_not_replaced() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.png");
    std::fs::write(&path, b"old").unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o444)).unwrap();
    for result in [check_destination(&path), write_png(&path, &picture(), None)] {
        assert_eq!(io_error(result).0, io::ErrorKind::PermissionDenied);
    }
    assert_eq!((names(dir.path()), std::fs::read(&path).unwrap()), (vec!["a.png".into()], b"old".to_vec()));
}

#[test]
fn directories_devices_and_nameless_paths_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let taken = dir.path().join("a.png");
    std::fs::create_dir(&taken).unwrap();
    let (kind, _) = io_error(write_png(&taken, &picture(), None));
    assert_eq!(kind, io::ErrorKind::IsADirectory);
    for path in ["/dev/null", "/dev/full", "/", "..", ""] {
        let (kind, message) = io_error(write_png(Path::new(path), &picture(), None));
        assert_eq!(kind, io::ErrorKind::InvalidInput, "{message}");
    }
    assert_eq!(names(dir.path()), ["a.png"]);
}

#[test]
fn a_full_disk_is_an_error() {
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    match encode_png(full, &picture(), None) {
        Err(png::EncodingError::IoError(e)) => assert_eq!(e.kind(), io::ErrorKind::StorageFull),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_write_that_fails_half_way_leaves_the_old_file_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.png");
    std::fs::write(&path, b"old").unwrap();
    let failed = write_atomically(&path, |out| {
        // More than the buffer, so that bytes have reached the file.
        out.write_all(&[7; 100_000]).unwrap();
        assert_eq!(names(dir.path()).len(), 2);
        Err(Error::Io { path: path.clone(), cause: io::ErrorKind::StorageFull.into() })
    });
    assert_eq!(io_error(failed).0, io::ErrorKind::StorageFull);
    assert_eq!((names(dir.path()), std::fs::read(&path).unwrap()), (vec!["a.png".into()], b"old".to_vec()));
    write_png(&path, &picture(), None).unwrap();
    assert_eq!(read_png_info(&path).unwrap().width, 5);
}

#[test]
fn links_are_written_through_and_long_names_work() {
    let dir = tempfile::tempdir().unwrap();
    let (target, link) = (dir.path().join("target.png"), dir.path().join("link.png"));
    std::fs::write(&target, b"old").unwrap();
    std::os::unix::fs::symlink(&target, &link).unwrap();
    write_png(&link, &picture(), None).unwrap();
    assert!(std::fs::symlink_metadata(&link).unwrap().is_symlink());
    assert_eq!(read_png_info(&target).unwrap().height, 3);
    write_png(&dir.path().join("n".repeat(255)), &picture(), None).unwrap();
    assert_eq!(names(dir.path()).len(), 3);
}

#[test]
fn malformed_files_are_errors() {
    let good = bytes(&picture(), text("parameters", "{}"));
    info_of(&good).unwrap();
    for bad in [&b""[..], b"\x89PNG\r\n\x1a\n", b"<svg/>", b"GIF89a", &good[8..]] {
        assert!(matches!(info_of(bad), Err(Error::Image { .. })), "{bad:?}");
    }
    // The last chunk, IEND, is 12 bytes that say nothing; every earlier cut must be noticed.
    for end in 0..good.len() - 12 {
        assert!(matches!(info_of(&good[..end]), Err(Error::Image { .. })), "cut at {end}");
    }
    assert!(matches!(read_png_info(Path::new("/dev/zero")), Err(Error::Image { .. })));
    assert!(matches!(read_png_info(Path::new("/nowhere/x.png")), Err(Error::Io { .. })));
}

#[test]
fn no_single_wrong_byte_makes_the_reader_panic() {
    let good = bytes(&picture(), text("parameters ä", "{}"));
    for index in 0..good.len() {
        for flip in [1, 0x80, 0xff] {
            let mut bad = good.clone();
            bad[index] ^= flip;
            // Some bytes are covered by no check when the pixels are not unpacked; what is read must be an error or sane.
            if let Ok(info) = info_of(&bad) {
                assert_eq!((info.width, info.height), (5, 3), "byte {index}");
            }
        }
    }
}

/// A chunk with its length and checksum.
fn chunk(kind: &[u8; 4], data: &[u8]) -> Vec<u8> {
    let mut crc = u32::MAX;
    for &byte in kind.iter().chain(data) {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0xedb8_8320 } else { crc >> 1 };
        }
    }
    [&(data.len() as u32).to_be_bytes(), &kind[..], data, &(!crc).to_be_bytes()].concat()
}

/// `good` with a chunk after its header (8 bytes of signature, 25 of IHDR).
fn with_chunk(good: &[u8], extra: &[u8]) -> Vec<u8> {
    [&good[..33], extra, &good[33..]].concat()
}

#[test]
fn compressed_text_is_read_and_bombs_are_not() {
    let good = bytes(&picture(), None);
    let compressed = |len: usize| {
        let mut chunk = png::text_metadata::ZTXtChunk::new(PARAMETERS, "a".repeat(len));
        chunk.compress_text().unwrap();
        let mut out = Vec::new();
        png::text_metadata::EncodableTextChunk::encode(&chunk, &mut out).unwrap();
        out
    };
    let found = info_of(&with_chunk(&good, &compressed(1000))).unwrap();
    assert_eq!(found.parameters, Some("a".repeat(1000)));
    let bomb = info_of(&with_chunk(&good, &compressed(TEXT_LIMIT_BYTES + 1)));
    assert!(matches!(bomb, Err(Error::Image { .. })), "{bomb:?}");
}

#[test]
fn huge_headers_cost_nothing() {
    let mut header = vec![0xff; 8];
    header[0] = 0x7f;
    header[4] = 0x7f;
    header.extend([8, 2, 0, 0, 0]);
    let bomb = [&b"\x89PNG\r\n\x1a\n"[..], &chunk(b"IHDR", &header), &chunk(b"IDAT", &[0; 40])].concat();
    assert!(matches!(info_of(&bomb), Err(Error::Image { .. })));
    let mut lying = bytes(&picture(), None);
    lying.truncate(33);
    lying.extend(0x7fff_ffffu32.to_be_bytes());
    lying.extend(b"tEXtparameters\0x");
    assert!(matches!(info_of(&lying), Err(Error::Image { .. })));
}
