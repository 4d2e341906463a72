//! Threads that fill staging memory together. They belong to one load and are gone when it returns.

use crate::error::{Error, Result};
use crate::event::panic_message;
use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread::JoinHandle;

/// Bytes that a thread fills at a time: small enough to stay in its own cache and to share a staging buffer evenly,
/// large enough to hide what handing it out costs.
pub(crate) const PIECE_BYTES: usize = 256 << 10;

/// Most threads that are taken unasked: from about there on memory is the bound, not cores.
const MOST_UNASKED: usize = 16;

/// Most threads that may be asked for.
const MOST: usize = 256;

/// Threads of a load, or none but the caller's.
pub(crate) struct Workers {
    pool: Option<ThreadPool>,
    handles: Vec<JoinHandle<()>>,
}

impl Workers {
    /// The calling thread alone.
    pub fn none() -> Workers {
        Workers { pool: None, handles: Vec::new() }
    }

    /// As many threads as asked for; else one per core that this process may use, at most 16, or none but the caller's
    /// where that number is not known or the system gives no more.
    pub fn new(threads: Option<NonZeroUsize>) -> Result<Workers> {
        match threads.map(NonZeroUsize::get) {
            Some(count) if count > MOST => {
                Err(Error::request("load_threads", format!("{count} threads, at most {MOST}")))
            }
            Some(count) => Workers::start(count).map_err(|error| {
                Error::request("load_threads", format!("{count} threads cannot be started: {error}"))
            }),
            None => {
                let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
                Ok(Workers::start(cores.min(MOST_UNASKED)).unwrap_or_else(|_| Workers::none()))
            }
        }
    }

    fn start(count: usize) -> Result<Workers, String> {
        if count == 1 {
            return Ok(Workers::none());
        }
        let mut workers = Workers::none();
        // The threads are our own, so that they can be awaited: a pool only tells its threads to end.
        let pool = ThreadPoolBuilder::new().num_threads(count).spawn_handler(|thread| {
            let name = format!("warpstep-load-{}", thread.index());
            workers.handles.push(std::thread::Builder::new().name(name).spawn(move || thread.run())?);
            Ok(())
        });
        // On failure the threads that did start are told to end, and awaited when `workers` is dropped.
        workers.pool = Some(pool.build().map_err(|error| error.to_string())?);
        Ok(workers)
    }

    /// Threads that fill.
    pub fn count(&self) -> usize {
        self.handles.len().max(1)
    }

    /// Fills all of `out`: `fill(first, part)` the part from byte `first` on. Parts are whole numbers of `unit` bytes
    /// wherever `out` is one, and do not depend on the number of threads. Of several errors the one of the first part is
    /// returned; a panic becomes an error.
    pub fn fill(
        &self,
        out: &mut [u8],
        unit: usize,
        fill: &(dyn Fn(usize, &mut [u8]) -> Result<()> + Sync),
    ) -> Result<()> {
        let piece = unit.max(PIECE_BYTES / unit.max(1) * unit).max(1);
        let part = |(index, part): (usize, &mut [u8])| fill(index * piece, part);
        match &self.pool {
            Some(pool) if out.len() > piece => contained(|| {
                let results: Vec<Result<()>> = pool
                    .install(|| out.par_chunks_mut(piece).enumerate().with_max_len(1).map(part).collect());
                results.into_iter().collect()
            }),
            _ => contained(|| out.chunks_mut(piece).enumerate().try_for_each(part)),
        }
    }

    /// Does `work(index)` for every index below `count`, in any order. Errors and panics as in [`fill`](Self::fill).
    pub fn each(&self, count: usize, work: &(dyn Fn(usize) -> Result<()> + Sync)) -> Result<()> {
        match &self.pool {
            Some(pool) => contained(|| {
                let results: Vec<Result<()>> =
                    pool.install(|| (0..count).into_par_iter().with_max_len(1).map(work).collect());
                results.into_iter().collect()
            }),
            None => contained(|| (0..count).try_for_each(work)),
        }
    }
}

/// A panic of the loading threads becomes an error; whatever was half done is not used.
fn contained(work: impl FnOnce() -> Result<()>) -> Result<()> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        Err(Error::Internal(format!("a thread that loads weights panicked: {}", panic_message(&*panic))))
    })
}

impl Drop for Workers {
    fn drop(&mut self) {
        drop(self.pool.take());
        for handle in self.handles.drain(..) {
            // A panic in one was reported by the `fill` that it happened in.
            let _ = handle.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;
    use std::sync::Mutex;

    fn workers(threads: usize) -> Workers {
        Workers::new(NonZeroUsize::new(threads)).unwrap()
    }

    #[test]
    fn every_byte_is_filled_once_in_the_same_parts_by_any_number_of_threads() {
        for (bytes, unit) in
            [(0, 1), (1, 1), (3 * PIECE_BYTES + 5, 1), (100_000 * 12, 12), (7 << 19, 1 << 19)]
        {
            let mut parts = Vec::new();
            for threads in [1, 2, 7] {
                let seen = Mutex::new(Vec::new());
                let mut out = vec![0u8; bytes];
                let workers = workers(threads);
                assert_eq!(workers.count(), threads);
                let fill = |first: usize, part: &mut [u8]| {
                    seen.lock().unwrap().push((first, part.len()));
                    part.iter_mut().enumerate().for_each(|(i, byte)| *byte += ((first + i) % 251) as u8 + 1);
                    Ok(())
                };
                workers.fill(&mut out, unit, &fill).unwrap();
                assert!(out.iter().enumerate().all(|(i, &byte)| byte == (i % 251) as u8 + 1));
                let mut seen = seen.into_inner().unwrap();
                seen.sort_unstable();
                assert!(seen.iter().all(|(first, bytes)| first % unit == 0 && bytes % unit == 0));
                parts.push(seen);
            }
            assert!(parts[0] == parts[1] && parts[0] == parts[2]);
        }
    }

    #[test]
    fn parts_are_shared_between_threads() {
        let names = Mutex::new(HashSet::new());
        let barrier = std::sync::Barrier::new(2);
        let fill = |_: usize, _: &mut [u8]| {
            // Nobody gets past it alone.
            barrier.wait();
            names.lock().unwrap().insert(std::thread::current().name().map(str::to_owned));
            Ok(())
        };
        workers(2).fill(&mut vec![0; 2 * PIECE_BYTES], 1, &fill).unwrap();
        let names = names.into_inner().unwrap();
        assert_eq!(names.len(), 2, "{names:?}");
        assert!(names.iter().flatten().all(|name| name.starts_with("warpstep-load-")), "{names:?}");
    }

    #[test]
    fn no_thread_outlives_its_load() {
        let named = || {
            let tasks = std::fs::read_dir("/proc/self/task").unwrap();
            let names = tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
            names.filter(|name| name.starts_with("warpstep-load-")).count()
        };
        // Other tests run beside this one, with fewer threads.
        const THREADS: usize = 64;
        let workers = workers(THREADS);
        let barrier = std::sync::Barrier::new(THREADS);
        let most = Mutex::new(0);
        let count = |_| {
            // All have begun, and so have their names.
            barrier.wait();
            let mut most = most.lock().unwrap();
            *most = named().max(*most);
            Ok(())
        };
        workers.each(THREADS, &count).unwrap();
        drop(workers);
        let (during, after) = (most.into_inner().unwrap(), named());
        assert!(during >= THREADS && after < THREADS, "{during} threads, then {after}");
    }

    #[test]
    fn errors_and_panics_are_values_and_the_threads_go_on() {
        for threads in [1, 2, 7] {
            let workers = workers(threads);
            let mut out = vec![0; 9 * PIECE_BYTES];
            let broken = |first: usize, _: &mut [u8]| match first / PIECE_BYTES {
                part @ (3 | 5 | 8) => Err(Error::Internal(format!("part {part}"))),
                _ => Ok(()),
            };
            let error = workers.fill(&mut out, 1, &broken).unwrap_err();
            assert_eq!(error.to_string(), "internal error: part 3", "{threads} threads");
            let panics = |first: usize, _: &mut [u8]| match first / PIECE_BYTES {
                4 => panic!("part 4"),
                _ => Ok(()),
            };
            let error = workers.fill(&mut out, 1, &panics).unwrap_err();
            assert!(
                matches!(&error, Error::Internal(reason) if reason.ends_with("panicked: part 4")),
                "{error}"
            );
            let nines = |_: usize, part: &mut [u8]| {
                part.fill(9);
                Ok(())
            };
            workers.fill(&mut out, 1, &nines).unwrap();
            assert!(out.iter().all(|&byte| byte == 9));
        }
    }

    #[test]
    fn each_index_is_worked_on_once() {
        for threads in [1, 2, 7] {
            let seen = Mutex::new(Vec::new());
            let workers = workers(threads);
            let work = |index| {
                seen.lock().unwrap().push(index);
                Ok(())
            };
            workers.each(100, &work).unwrap();
            let mut seen = seen.into_inner().unwrap();
            seen.sort_unstable();
            assert!(seen.into_iter().eq(0..100));
            let error = workers.each(9, &|index| panic!("index {}", index / 9)).unwrap_err();
            assert!(error.to_string().ends_with("panicked: index 0"), "{error}");
        }
    }

    #[test]
    fn too_many_threads_are_refused() {
        let error = Workers::new(NonZeroUsize::new(257)).err().unwrap();
        assert_eq!(error.to_string(), "invalid request: load_threads: 257 threads, at most 256");
        assert!((1..=MOST_UNASKED).contains(&Workers::new(None).unwrap().count()));
    }
}
