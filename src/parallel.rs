//! All cores for loops over rows, where nothing faster than a plain loop is wanted: references, and what tests and
//! benches prepare. Threads end before a call returns.

use std::thread;

/// Runs `work(row, values)` for every `row_len` values of `out`, the last of which may be fewer, on as many threads as
/// there are cores.
pub(crate) fn split_rows<T: Send>(out: &mut [T], row_len: usize, work: impl Fn(usize, &mut [T]) + Sync) {
    let work = |row: usize, values: &mut [T]| -> Result<(), ()> {
        work(row, values);
        Ok(())
    };
    let done = try_split_rows(out, row_len, work);
    debug_assert_eq!(done, Ok(()));
}

/// The same for work that can fail: a thread stops at its first error, and that of the lowest rows is returned.
pub(crate) fn try_split_rows<T: Send, E: Send>(
    out: &mut [T],
    row_len: usize,
    work: impl Fn(usize, &mut [T]) -> Result<(), E> + Sync,
) -> Result<(), E> {
    let row_len = row_len.max(1);
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let rows = out.len().div_ceil(row_len).div_ceil(cores).max(1);
    let run = |from: usize, part: &mut [T]| {
        part.chunks_mut(row_len).enumerate().try_for_each(|(row, values)| work(from + row, values))
    };
    let run = &run;
    let mut parts = out.chunks_mut(rows * row_len).enumerate().map(|(i, part)| (i * rows, part));
    let Some(first) = parts.next() else { return Ok(()) };
    thread::scope(|scope| {
        let others: Vec<_> = parts.map(|(from, part)| scope.spawn(move || run(from, part))).collect();
        let mut outcome = run(first.0, first.1);
        for other in others {
            match other.join() {
                Ok(result) => outcome = outcome.and(result),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        outcome
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_visited_once() {
        for len in [0, 1, 3, 4, 6, 15, 16, 100, 301] {
            let mut out = vec![0; len];
            split_rows(&mut out, 3, |row, values| values.iter_mut().for_each(|v| *v += row + 1));
            let expected: Vec<_> = (0..len).map(|i| i / 3 + 1).collect();
            assert_eq!(out, expected);
        }
    }

    #[test]
    fn the_first_failing_row_is_named() {
        for (len, failing) in [(1, 0), (10, 3), (100, 0), (100, 99), (100, 50)] {
            let work = |row: usize, _: &mut [u8]| if row >= failing { Err(row) } else { Ok(()) };
            assert_eq!(try_split_rows(&mut vec![0; len], 1, work), Err(failing));
        }
    }
}
