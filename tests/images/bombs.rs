//! Small files that would become large: each is refused, or its bomb passed over, within 50 ms and 64 MiB.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::path::Path;
use std::time::{Duration, Instant};
use warpstep::image::{ImageLimits, RgbImage, load_image};

const MAX_TIME: Duration = Duration::from_millis(50);
const MAX_BYTES: isize = 64 << 20;
/// What the bombs would become.
const INFLATED: usize = 512 << 20;

/// Counts what every thread holds.
struct Counting;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    // Threads that are ending have no counter any more.
    let _ = HELD.try_with(|held| {
        held.set(held.get() + bytes);
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(held.get())));
    });
}

// SAFETY: every call goes to the system's allocator unchanged; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        count(new_size as isize - layout.size() as isize);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.realloc(ptr, layout, new_size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Reads a file, and asserts what it costs: the shortest of a few tries, because other tests run at the same time.
fn read_within_bounds(what: &str, bytes: &[u8]) -> Result<RgbImage, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bomb.png");
    std::fs::write(&path, bytes).unwrap();
    let attempt = |path: &Path| {
        let (before, start) = (HELD.get(), Instant::now());
        PEAK.set(before);
        let result = load_image(path, &ImageLimits::default()).map_err(|e| e.to_string());
        (start.elapsed(), PEAK.get() - before, result)
    };
    let mut attempts: Vec<_> = (0..5).map(|_| attempt(&path)).collect();
    attempts.sort_by_key(|(time, ..)| *time);
    let (time, peak, result) = attempts.swap_remove(0);
    println!("{what}: {} bytes, {time:?}, {peak} bytes held: {result:?}", bytes.len());
    assert!(time < MAX_TIME, "{what}: {time:?}");
    assert!(peak < MAX_BYTES, "{what}: {peak} bytes");
    result
}

#[test]
fn the_counter_counts() {
    let before = HELD.get();
    PEAK.set(before);
    drop(std::hint::black_box(vec![1u8; 10 << 20]));
    assert!(PEAK.get() - before >= 10 << 20 && HELD.get() - before < 1 << 20);
}

/// A zlib stream of `INFLATED` zeros: one literal, then copies of 258 bytes, 13 bits each.
fn zeros() -> Vec<u8> {
    let mut out = vec![0x78, 0x01];
    let (mut bits, mut held) = (0u64, 0);
    let mut put = |value: u64, count: u32, out: &mut Vec<u8>| {
        bits |= value << held;
        held += count;
        while held >= 8 {
            out.push(bits as u8);
            bits >>= 8;
            held -= 8;
        }
    };
    // Last block, fixed codes. Codes are written from their highest bit: 0x30 is the literal 0, 0xc5 the length 258.
    put(1, 1, &mut out);
    put(1, 2, &mut out);
    put(u64::from(0x30u8.reverse_bits()), 8, &mut out);
    let copies = (INFLATED - 1) / 258;
    for _ in 0..copies {
        put(u64::from(0xc5u8.reverse_bits()), 8, &mut out);
        put(0, 5, &mut out);
    }
    // End of block, and what fills its byte.
    put(0, 7, &mut out);
    put(0, 7, &mut out);
    let length = 1 + copies * 258;
    out.extend(((((length % 65521) as u32) << 16) | 1).to_be_bytes());
    out
}

fn chunk(kind: &[u8; 4], data: &[u8]) -> Vec<u8> {
    let table: Vec<u32> = (0..256u32)
        .map(|n| (0..8).fold(n, |c, _| if c & 1 == 1 { (c >> 1) ^ 0xedb8_8320 } else { c >> 1 }))
        .collect();
    let step = |crc: u32, byte: &u8| table[usize::from(crc as u8 ^ byte)] ^ (crc >> 8);
    let crc = !kind.iter().chain(data).fold(u32::MAX, step);
    [&(data.len() as u32).to_be_bytes(), &kind[..], data, &crc.to_be_bytes()].concat()
}

/// A PNG of 3x2 pixels with a chunk after its header (8 bytes of signature, 25 of IHDR).
fn with_chunk(kind: &[u8; 4], data: &[u8]) -> Vec<u8> {
    let good = super::rgb_png();
    [&good[..33], &chunk(kind, data), &good[33..]].concat()
}

#[test]
fn a_header_of_65535_x_65535_in_100_bytes_is_refused() {
    let mut header = [0xffffu32.to_be_bytes(), 0xffffu32.to_be_bytes()].concat();
    header.extend([8, 2, 0, 0, 0]);
    let bytes = [&b"\x89PNG\r\n\x1a\n"[..], &chunk(b"IHDR", &header), &chunk(b"IDAT", &[0; 55])].concat();
    assert_eq!(bytes.len(), 100);
    let reason = read_within_bounds("header", &bytes).unwrap_err();
    assert!(reason.contains("65535x65535"), "{reason}");
}

#[test]
fn pixels_that_inflate_beyond_their_size_are_not_unpacked() {
    let good = super::rgb_png();
    let bytes = [&good[..33], &chunk(b"IDAT", &zeros()), &chunk(b"IEND", b"")].concat();
    // The six pixels are there; what follows is never unpacked.
    if let Ok(image) = read_within_bounds("IDAT", &bytes) {
        assert_eq!(image.data(), [0; 18]);
    }
}

#[test]
fn a_profile_that_inflates_is_not_unpacked() {
    let data = [&b"profile\0\0"[..], &zeros()].concat();
    if let Ok(image) = read_within_bounds("iCCP", &with_chunk(b"iCCP", &data)) {
        assert_eq!(image.data(), super::RGB);
    }
}

#[test]
fn a_text_that_inflates_is_not_unpacked() {
    for (kind, head) in [(b"zTXt", &b"text\0\0"[..]), (b"iTXt", b"text\0\x01\0\0\0")] {
        let data = [head, &zeros()].concat();
        if let Ok(image) = read_within_bounds("text", &with_chunk(kind, &data)) {
            assert_eq!(image.data(), super::RGB);
        }
    }
}

#[test]
fn a_webp_canvas_of_16_million_pixels_a_side_is_refused() {
    // RIFF, WEBP, VP8X with all bits of both sides set.
    let canvas = [&b"VP8X\x0a\0\0\0\0\0\0\0"[..], &[0xff; 6]].concat();
    let body = [&b"WEBP"[..], &canvas, b"VP8L\x08\0\0\0", &[0x2f, 0xff, 0xff, 0xff, 0x0f, 0, 0, 0]].concat();
    let bytes = [&b"RIFF"[..], &(body.len() as u32).to_le_bytes(), &body].concat();
    read_within_bounds("WebP", &bytes).unwrap_err();
}
