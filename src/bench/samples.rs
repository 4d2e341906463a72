//! Timing one piece of work many times, and the rows that a report is made of.

use crate::device::Stream;
use crate::error::Result;
use serde::Serialize;
use std::time::Instant;

/// How often and how long something is timed.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Untimed runs before.
    pub warm_up: usize,
    /// Timed runs.
    pub repeats: usize,
    /// Stop after so many seconds even if there were fewer runs, but not before three.
    pub seconds: f64,
    /// Runs that are enqueued before the host waits: with one, the host's own time to launch shows in short work.
    pub in_flight: usize,
}

impl Effort {
    /// What the protocol asks for on a GPU, and little on the emulated device, whose times mean nothing.
    pub fn for_device(kind: &str) -> Effort {
        match kind {
            "cuda" => Effort { warm_up: 20, repeats: 100, seconds: 3.0, in_flight: 8 },
            _ => Effort { warm_up: 0, repeats: 3, seconds: 0.5, in_flight: 1 },
        }
    }
}

/// Fewest timed runs, whatever the time.
const FEWEST: usize = 3;

/// Times `work` by the device's clock, in milliseconds per run. `before` is enqueued ahead of every run, outside the
/// measured span.
pub fn time(
    stream: &mut dyn Stream,
    effort: &Effort,
    before: &mut dyn FnMut(&mut dyn Stream) -> Result<()>,
    work: &mut dyn FnMut(&mut dyn Stream) -> Result<()>,
) -> Result<Vec<f64>> {
    let start = Instant::now();
    for _ in 0..effort.warm_up {
        before(stream)?;
        work(stream)?;
        stream.synchronize()?;
        // Half of the time at most goes into warming up.
        if start.elapsed().as_secs_f64() > effort.seconds / 2.0 {
            break;
        }
    }
    stream.synchronize()?;
    let mut samples = Vec::with_capacity(effort.repeats);
    let start = Instant::now();
    while samples.len() < effort.repeats
        && (samples.len() < FEWEST || start.elapsed().as_secs_f64() < effort.seconds)
    {
        let mut marks = Vec::new();
        for _ in 0..effort.in_flight.clamp(1, effort.repeats - samples.len()) {
            before(stream)?;
            let begin = stream.record_timed()?;
            work(stream)?;
            marks.push((begin, stream.record_timed()?));
        }
        stream.synchronize()?;
        for (begin, end) in marks {
            samples.push(end.milliseconds_since(begin.as_ref())?);
        }
    }
    Ok(samples)
}

/// What bounds a row from below.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub enum Floor {
    /// Its bytes at the bandwidth of the run's own device copy.
    #[default]
    Copy,
    /// So many milliseconds: its bytes are not moved within device memory.
    Own(f64),
    /// Nothing that is known.
    None,
}

/// One measured thing.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Row {
    /// What was timed: `token @1024: FM head`, `gate_up`.
    pub test: String,
    /// Variant of an op, or of each op.
    pub variant: String,
    /// Element type, where the row is about one.
    pub dtype: String,
    /// Shape or settings.
    pub shape: String,
    /// `cold` or `hot`: whether what a launch reads has left the L2 cache or is what the last one read; empty where it
    /// does not matter.
    pub l2: String,
    /// Fewest bytes that must move through device memory.
    pub bytes: u64,
    /// Floating-point operations, 0 where only bytes are counted.
    pub flops: u64,
    /// Every sample, in milliseconds.
    pub samples_ms: Vec<f64>,
    /// What the samples are compared with.
    pub floor: Floor,
    /// Whether the figure was put together from other rows, and from which, or what is special about it.
    pub note: String,
}

impl Row {
    /// The value below which a share `q` of the samples lies, interpolated; NaN without samples.
    pub fn quantile(&self, q: f64) -> f64 {
        let mut sorted = self.samples_ms.clone();
        sorted.sort_by(f64::total_cmp);
        let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
        let at = q.clamp(0.0, 1.0) * last as f64;
        let (low, high) = (at.floor() as usize, at.ceil() as usize);
        sorted[low] + (sorted[high] - sorted[low]) * (at - low as f64)
    }

    /// The middle sample.
    pub fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    /// Bytes over the median, in GB/s.
    pub fn gb_per_s(&self) -> f64 {
        self.bytes as f64 / self.median() / 1e6
    }

    /// Operations over the median, in TFLOP/s.
    pub fn tflop_per_s(&self) -> f64 {
        self.flops as f64 / self.median() / 1e9
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;
    use crate::device::emulated::{EmulatedDevice, EmulatedOptions};

    #[test]
    fn quantiles_and_rates_follow_from_the_samples() {
        let row = Row {
            bytes: 6_000_000,
            flops: 9_000_000_000,
            samples_ms: vec![4.0, 1.0, 3.0, 2.0, 5.0],
            ..Row::default()
        };
        assert_eq!((row.median(), row.quantile(0.0), row.quantile(1.0)), (3.0, 1.0, 5.0));
        assert!((row.quantile(0.1) - 1.4).abs() < 1e-12 && (row.quantile(0.9) - 4.6).abs() < 1e-12);
        assert_eq!((row.gb_per_s(), row.tflop_per_s()), (2.0, 3.0));
        assert!(Row::default().median().is_nan());
    }

    #[test]
    fn work_runs_as_often_as_asked_and_only_it_is_timed() {
        let device = EmulatedDevice::new(EmulatedOptions::default()).unwrap();
        let mut stream = device.stream().unwrap();
        let effort = Effort { warm_up: 2, repeats: 7, seconds: 100.0, in_flight: 3 };
        let (mut prepared, mut ran) = (0, 0);
        let pause = |ms| std::thread::sleep(std::time::Duration::from_millis(ms));
        let mut before = |_: &mut dyn Stream| {
            prepared += 1;
            pause(100);
            Ok(())
        };
        let mut work = |_: &mut dyn Stream| {
            ran += 1;
            pause(2);
            Ok(())
        };
        let samples = time(stream.as_mut(), &effort, &mut before, &mut work).unwrap();
        assert_eq!((samples.len(), ran, prepared), (7, 9, 9));
        let row = Row { samples_ms: samples, ..Row::default() };
        assert!(row.quantile(0.0) >= 2.0 && row.quantile(0.0) < 100.0, "{row:?}");
        // No time left: three runs, not none.
        let hurried = Effort { seconds: 0.0, in_flight: 1, ..effort };
        let samples = time(stream.as_mut(), &hurried, &mut |_| Ok(()), &mut |_| Ok(())).unwrap();
        assert_eq!(samples.len(), 3);
    }
}
