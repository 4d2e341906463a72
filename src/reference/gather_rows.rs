//! Rows picked from a table: `embed` (by token id) and `gather_rows` (by row index).

/// `table[index[s], :]` for every s, `[indices, width]`; a row of NaN for an index outside the table.
pub fn gather_rows(table: &[f32], width: usize, index: &[u32]) -> Vec<f64> {
    let row = |i: u32| table.chunks_exact(width).nth(i as usize);
    index
        .iter()
        .flat_map(|&i| {
            row(i).map_or_else(|| vec![f64::NAN; width], |r| r.iter().map(|&v| v.into()).collect())
        })
        .collect()
}
