//! Two threads for the loops of whole models: references are slow on purpose, not slower than they have to be.

/// Runs `work(row, values)` for every `row_len` values of `out`, on two threads.
pub fn split_rows<T: Send>(out: &mut [T], row_len: usize, work: impl Fn(usize, &mut [T]) + Sync) {
    let rows = out.len() / row_len.max(1);
    let half = rows / 2;
    let (first, second) = out.split_at_mut(half * row_len);
    let run = |from: usize, part: &mut [T]| {
        for (row, values) in part.chunks_mut(row_len).enumerate() {
            work(from + row, values);
        }
    };
    std::thread::scope(|scope| {
        if !first.is_empty() {
            scope.spawn(|| run(0, first));
        }
        run(half, second);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_visited_once() {
        for rows in [0, 1, 2, 5] {
            let mut out = vec![0; rows * 3];
            split_rows(&mut out, 3, |row, values| values.iter_mut().for_each(|v| *v += row + 1));
            let expected: Vec<_> = (0..rows).flat_map(|r| [r + 1; 3]).collect();
            assert_eq!(out, expected);
        }
    }
}
