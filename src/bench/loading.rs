//! Loading: how fast weights go from files to the device, beside what the host can read of the same files and what
//! the bus can carry in the same run.

use super::samples::{Effort, Floor, Row, time};
use crate::device::{Copies, Device, STAGING_BYTES, Stream};
use crate::engine::{EngineOptions, Loading, open_files};
use crate::error::{Error, Result};
use crate::event::milliseconds;
use crate::model::workers::{PIECE_BYTES, Workers};
use crate::weights::{ModelWeights, Part, TensorView, VaeWeights};
use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

/// The share of the slower ceiling that a load should reach.
pub const TARGET: f64 = 0.7;

/// Timed runs of each ceiling: they move gigabytes.
const REPEATS: usize = 3;

/// Most bytes that the copies to the device move in one run.
const MOST_COPIED: u64 = 4 << 30;

/// The row of a model whose weights are made on the device.
pub fn nothing() -> Row {
    Row {
        test: "load".into(),
        note: "synthetic weights are made on the device: nothing is loaded".into(),
        ..Row::default()
    }
}

/// Rows of the ceilings, then of `loads`: an engine was loaded so often from the folder `dir` with `options`, one load
/// after the other. Only the first may have waited for a disk.
pub fn measure(
    dir: &Path,
    device: &Arc<dyn Device>,
    options: &EngineOptions,
    loads: &[Loading],
    effort: &Effort,
) -> Result<Vec<Row>> {
    let Some(&Loading { weight_bytes, .. }) = loads.first() else { return Ok(Vec::new()) };
    let read = host_read(dir, options)?;
    let copied = copies(device, effort, weight_bytes)?;
    let ceilings = [read, copied];
    let rows = loads.iter().enumerate().map(|(index, load)| row(load, index == 0, &ceilings));
    let rows = rows.collect::<Vec<_>>();
    Ok(ceilings.into_iter().chain(rows).collect())
}

/// The row of one load. Its floor is the time that the slower of both ceilings takes for the bytes that pass it.
fn row(load: &Loading, first: bool, [read, copied]: &[Row; 2]) -> Row {
    let reading_ms = load.read_bytes as f64 / read.gb_per_s() / 1e6;
    let copying_ms = load.weight_bytes as f64 / copied.gb_per_s() / 1e6;
    let (floor, slower) = match reading_ms > copying_ms {
        true => (reading_ms, "host read"),
        false => (copying_ms, "host to device"),
    };
    Row {
        test: if first { "load: weights, first time" } else { "load: weights, again" }.into(),
        shape: format!("{} bytes in files, {} on the device", load.read_bytes, load.weight_bytes),
        bytes: load.weight_bytes,
        samples_ms: vec![load.weights_ms],
        floor: Floor::Own(floor),
        note: format!(
            "{:.2} of the slower ceiling ({slower}), target {TARGET:.2}; {} threads, {:.3} GB read; opening took \
             {:.0} ms before{}",
            floor / load.weights_ms,
            load.threads,
            load.read_bytes as f64 / 1e9,
            load.open_ms,
            if first { "; the files may have come from a disk" } else { "" }
        ),
        ..Row::default()
    }
}

/// Reads what a load reads, through the same kind of mapping, with as many threads, and does nothing with it.
fn host_read(dir: &Path, options: &EngineOptions) -> Result<Row> {
    let workers = Workers::new(options.load_threads)?;
    let mut row = Row {
        test: "ceiling: host read of the weight files".into(),
        floor: Floor::None,
        note: format!("page cache, {} threads", workers.count()),
        ..Row::default()
    };
    for _ in 0..REPEATS {
        // Opened anew, because pages that were touched once are cheaper.
        let ((config, checkpoint), (vae_config, vae_checkpoint)) = open_files(dir, options)?;
        let weights = ModelWeights::new(checkpoint, &config)?;
        let vae_weights = VaeWeights::new(vae_checkpoint, &vae_config)?;
        let mut views = Vec::new();
        for spec in weights.specs().iter().filter(|spec| spec.part != Part::LmHead || options.text) {
            views.push(weights.get(&spec.name)?);
        }
        for spec in vae_weights.specs() {
            views.push(vae_weights.get(&spec.name)?);
        }
        let pieces: Vec<(&TensorView<'_>, usize)> = views
            .iter()
            .flat_map(|view| (0..view.byte_len()).step_by(PIECE_BYTES).map(move |start| (view, start)))
            .collect();
        let start = Instant::now();
        workers.each(pieces.len(), &|index| {
            let (view, start) = pieces[index];
            let bytes = view.bytes_at(start, PIECE_BYTES.min(view.byte_len() - start))?;
            let words = bytes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word));
            black_box(words.fold(0, u64::wrapping_add));
            Ok(())
        })?;
        row.samples_ms.push(milliseconds(start.elapsed()));
        row.bytes = views.iter().map(|view| view.byte_len() as u64).sum();
    }
    Ok(row)
}

/// Copies about `bytes` bytes to the device through its staging memory, which nobody fills.
fn copies(device: &Arc<dyn Device>, effort: &Effort, bytes: u64) -> Result<Row> {
    let most = if device.info().kind == "cuda" { MOST_COPIED } else { MOST_COPIED / 16 };
    let count = bytes.min(most).div_ceil(STAGING_BYTES as u64).max(1);
    let buffer = device.alloc(STAGING_BYTES, "bench.upload")?;
    let mut stream = device.stream()?;
    let mut work = |stream: &mut dyn Stream| {
        (0..count).try_for_each(|_| stream.put_with(buffer.span(), &mut |_| Ok(())))
    };
    let effort = Effort { warm_up: 1, repeats: REPEATS, in_flight: 1, ..*effort };
    let samples_ms = time(stream.as_mut(), &effort, &mut |_| Ok(()), &mut work)?;
    let bytes = count.checked_mul(STAGING_BYTES as u64);
    Ok(Row {
        test: "ceiling: host to device".into(),
        bytes: bytes.ok_or_else(|| Error::Internal(format!("{count} copies of {STAGING_BYTES} bytes")))?,
        samples_ms,
        floor: Floor::None,
        note: format!("from pinned memory, {} MiB at a time", STAGING_BYTES >> 20),
        ..Row::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::emulated::{EmulatedDevice, EmulatedOptions};

    #[test]
    fn a_load_is_compared_with_the_slower_of_both_ceilings() {
        let ceiling = |bytes| Row { bytes, samples_ms: vec![1e3], ..Row::default() };
        let ceilings = [ceiling(4_000_000_000), ceiling(1_000_000_000)];
        let load = |read_bytes| Loading {
            read_bytes,
            weight_bytes: 2_000_000_000,
            threads: 3,
            open_ms: 12.0,
            weights_ms: 2_500.0,
        };
        // Two seconds on the bus, one to read.
        let found = row(&load(4_000_000_000), false, &ceilings);
        assert!(matches!(found.floor, Floor::Own(ms) if (ms - 2_000.0).abs() < 1e-6), "{found:?}");
        assert!(
            found.note.starts_with("0.80 of the slower ceiling (host to device), target 0.70; 3 threads")
        );
        // Ten times as many to read: ten seconds.
        let found = row(&load(40_000_000_000), true, &ceilings);
        assert!(matches!(found.floor, Floor::Own(ms) if (ms - 10_000.0).abs() < 1e-6), "{found:?}");
        assert!(found.note.contains("(host read)") && found.note.ends_with("disk"), "{}", found.note);
    }

    #[test]
    fn both_ceilings_are_measured_on_the_files_that_were_loaded() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny-a");
        let device: Arc<dyn Device> = Arc::new(EmulatedDevice::new(EmulatedOptions::default()).unwrap());
        let options = EngineOptions::default();
        let source = crate::engine::ModelSource::Dir(dir.clone());
        let loading =
            crate::engine::Engine::load(&source, device.clone(), options.clone()).unwrap().loading();
        let rows = measure(&dir, &device, &options, &[loading; 2], &Effort::for_device("emulated")).unwrap();
        assert_eq!(rows.len(), 4);
        // A load reads small tensors twice that two kernels want in different layouts.
        assert!(rows[0].bytes.abs_diff(loading.read_bytes) < loading.read_bytes / 10, "{rows:?} {loading:?}");
        assert_eq!(rows[0].samples_ms.len(), REPEATS);
        assert!(rows.iter().all(|row| row.gb_per_s() > 0.0), "{rows:?}");
        assert!(measure(&dir, &device, &options, &[], &Effort::for_device("emulated")).unwrap().is_empty());
    }
}
