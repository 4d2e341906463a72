//! From stored elements to the ones that kernels want: f32, f16 and bf16 in, f32 and bf16 out, piece by piece so
//! that no tensor is ever held twice. Rounding is to nearest even, NaN stays NaN. Bytes are read at any alignment
//! (safetensors promises none for bf16).

use super::{Dtype, TensorView};
use crate::error::{Error, Result};
use half::f16;
use std::ops::Range;

/// Elements converted at a time: small enough for the L2 cache, large enough to hide a system call per piece.
const PIECE: usize = 16384;

/// All elements as f32.
pub fn to_f32(view: &TensorView<'_>) -> Result<Vec<f32>> {
    let mut out = vec![0f32; view.elements()];
    write_as(view, Dtype::F32, bytemuck::cast_slice_mut(&mut out))?;
    Ok(out)
}

/// Writes all elements as `dtype` (f32 or bf16, little endian) into `out`, which must be exactly as long as that.
pub fn write_as(view: &TensorView<'_>, dtype: Dtype, out: &mut [u8]) -> Result<()> {
    write_range_as(view, 0..view.elements(), dtype, out)
}

/// Writes the elements `range` (row-major order) as `dtype` into `out`: the form to stream a large tensor with.
pub fn write_range_as(
    view: &TensorView<'_>,
    range: Range<usize>,
    dtype: Dtype,
    out: &mut [u8],
) -> Result<()> {
    let broken = |what: String| Error::Internal(format!("converting {view:?} to {dtype}: {what}"));
    if range.start > range.end || range.end > view.elements() {
        return Err(broken(format!("elements {range:?} of {}", view.elements())));
    }
    if dtype == Dtype::F16 {
        return Err(broken("only f32 and bf16 are written".into()));
    }
    if out.len() != range.len() * dtype.size() {
        return Err(broken(format!("{} elements into {} bytes", range.len(), out.len())));
    }
    let size = view.dtype().size();
    if view.dtype() == dtype {
        return view.read_at(range.start * size, out);
    }
    for (piece, out) in out.chunks_mut(PIECE * dtype.size()).enumerate() {
        let start = range.start + piece * PIECE;
        let source = view.bytes_at(start * size, out.len() / dtype.size() * size)?;
        convert_piece(&source, view.dtype(), dtype, out);
    }
    Ok(())
}

fn convert_piece(source: &[u8], from: Dtype, to: Dtype, out: &mut [u8]) {
    let half = |bytes: &[u8; 2]| f16::from_le_bytes(*bytes).to_f32();
    let bf16 = |bytes: &[u8; 2]| f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
    match (from, to) {
        (Dtype::F16, Dtype::F32) => each(source, out, |x| half(x).to_le_bytes()),
        (Dtype::Bf16, Dtype::F32) => each(source, out, |x| bf16(x).to_le_bytes()),
        (Dtype::F32, Dtype::Bf16) => each(source, out, |x| bf16_bits(f32::from_le_bytes(*x)).to_le_bytes()),
        (Dtype::F16, Dtype::Bf16) => each(source, out, |x| bf16_bits(half(x)).to_le_bytes()),
        // `write_range_as` copies equal types itself and refuses f16 outputs.
        _ => out.copy_from_slice(source),
    }
}

fn each<const IN: usize, const OUT: usize>(
    source: &[u8],
    out: &mut [u8],
    f: impl Fn(&[u8; IN]) -> [u8; OUT],
) {
    for (source, out) in source.as_chunks::<IN>().0.iter().zip(out.as_chunks_mut::<OUT>().0) {
        *out = f(source);
    }
}

/// f32 to bf16, to nearest even. Written without a branch so that it vectorises: NextStep-1.1 is stored in f32,
/// and this runs over all of its 15 billion weights.
fn bf16_bits(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    // Rounding could carry a NaN's payload into infinity; keep its upper half and set the quiet bit.
    let nan = (bits >> 16) | 0x40;
    (if x.is_nan() { nan } else { rounded }) as u16
}

/// Writes `values` as `dtype` (f32 or bf16, little endian) into `out`, which must be exactly as long as that.
pub fn write_values_as(values: &[f32], dtype: Dtype, out: &mut [u8]) -> Result<()> {
    if dtype == Dtype::F16 || values.len().checked_mul(dtype.size()) != Some(out.len()) {
        let (count, bytes) = (values.len(), out.len());
        return Err(Error::Internal(format!("{count} values as {dtype} into {bytes} bytes")));
    }
    match dtype {
        Dtype::F32 => out.copy_from_slice(bytemuck::cast_slice(values)),
        _ => convert_piece(bytemuck::cast_slice(values), Dtype::F32, dtype, out),
    }
    Ok(())
}

/// A convolution weight `[O, I, kh, kw]` in the order `[O, kh, kw, I]`, where the input channels of one tap are
/// neighbours, as they are in the channels-last activations that the kernels read. `shape` is `[O, I, kh, kw]`.
pub fn conv_to_ohwi<T: Copy>(weight: &[T], shape: [usize; 4]) -> Result<Vec<T>> {
    let [o, i, kh, kw] = shape;
    let count = shape.iter().try_fold(1usize, |count, &dim| count.checked_mul(dim));
    if count != Some(weight.len()) {
        return Err(Error::Internal(format!(
            "a convolution of {} elements in shape {shape:?}",
            weight.len()
        )));
    }
    let taps = kh * kw;
    let mut out = Vec::with_capacity(weight.len());
    for o in 0..o {
        let filter = &weight[o * i * taps..(o + 1) * i * taps];
        for tap in 0..taps {
            out.extend((0..i).map(|i| filter[i * taps + tap]));
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::super::Checkpoint;
    use super::*;
    use half::bf16;

    /// A checkpoint with one tensor `t` of the given bytes, one byte off any alignment.
    fn unaligned(dtype: &str, size: usize, data: &[u8]) -> Checkpoint {
        let count = data.len() / size;
        let header = |pad: &str| {
            format!(
                r#"{{"t":{{"dtype":"{dtype}","shape":[{count}],"data_offsets":[0,{}]}}}}{pad}"#,
                data.len()
            )
        };
        let pad = if header("").len().is_multiple_of(2) { " " } else { "" };
        let header = header(pad);
        let bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat();
        assert!((bytes.len() - data.len()) % 2 == 1);
        Checkpoint::from_bytes("unaligned", bytes).unwrap()
    }

    /// Values at every kind of rounding boundary: ties, carries into the exponent, denormals, infinities, NaNs.
    fn edge_values() -> Vec<f32> {
        let mut bits =
            vec![0, 1, 0x7f7f_ffff, 0x7f80_0000, 0x7f80_0001, 0x7fbf_ffff, 0x7fff_ffff, 0x7fc0_0000];
        for high in [0x0000, 0x0001, 0x007f, 0x0080, 0x3f80, 0x3f81, 0x7f7e, 0x7f7f] {
            for low in [0x0000, 0x0001, 0x7fff, 0x8000, 0x8001, 0xffff] {
                bits.push(high << 16 | low);
            }
        }
        let mut state = 1u32;
        bits.extend((0..2 * PIECE + 3).map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state
        }));
        bits.iter().flat_map(|&b| [f32::from_bits(b), f32::from_bits(b | 1 << 31)]).collect()
    }

    #[test]
    fn f32_rounds_to_the_nearest_even_bf16() {
        let values = edge_values();
        let checkpoint = unaligned("F32", 4, bytemuck::cast_slice(&values));
        let view = checkpoint.get("t").unwrap();
        let mut out = vec![0u8; values.len() * 2];
        write_as(&view, Dtype::Bf16, &mut out).unwrap();
        for (x, bits) in values.iter().zip(out.chunks_exact(2)) {
            let found = bf16::from_le_bytes([bits[0], bits[1]]);
            let expected = bf16::from_f32(*x);
            assert!(found.to_bits() == expected.to_bits(), "{:#x}: {found:?} {expected:?}", x.to_bits());
            assert_eq!(found.is_nan(), x.is_nan());
        }
        let widened = to_f32(&view).unwrap();
        assert!(widened.iter().zip(&values).all(|(a, b)| a.to_bits() == b.to_bits()));
    }

    #[test]
    fn every_half_value_widens_exactly_and_rounds_through_f32() {
        let all: Vec<u16> = (0..=u16::MAX).collect();
        let checkpoint = unaligned("F16", 2, bytemuck::cast_slice(&all));
        let view = checkpoint.get("t").unwrap();
        let wide = to_f32(&view).unwrap();
        let mut narrow = vec![0u8; all.len() * 2];
        write_as(&view, Dtype::Bf16, &mut narrow).unwrap();
        for (i, &bits) in all.iter().enumerate() {
            let x = f16::from_bits(bits);
            assert!(wide[i].to_bits() == x.to_f32().to_bits(), "{x:?}");
            let found = bf16::from_le_bytes([narrow[2 * i], narrow[2 * i + 1]]);
            assert_eq!(found.to_bits(), bf16::from_f32(x.to_f32()).to_bits(), "{x:?}");
        }
        let checkpoint = unaligned("BF16", 2, bytemuck::cast_slice(&all));
        let view = checkpoint.get("t").unwrap();
        let wide = to_f32(&view).unwrap();
        assert!(wide.iter().zip(&all).all(|(x, &bits)| x.to_bits() == u32::from(bits) << 16));
        write_as(&view, Dtype::Bf16, &mut narrow).unwrap();
        assert_eq!(narrow, bytemuck::cast_slice::<u16, u8>(&all));
    }

    #[test]
    fn ranges_stream_a_tensor_in_any_pieces() {
        let values: Vec<f32> = (0..PIECE * 2 + 100).map(|i| i as f32 * 0.37 - 5.0).collect();
        let checkpoint = unaligned("F32", 4, bytemuck::cast_slice(&values));
        let view = checkpoint.get("t").unwrap();
        let mut whole = vec![0u8; values.len() * 2];
        write_as(&view, Dtype::Bf16, &mut whole).unwrap();
        let mut pieces = vec![0u8; values.len() * 2];
        let mut start = 0;
        for length in [1, PIECE - 1, PIECE + 3, values.len()] {
            let end = (start + length).min(values.len());
            write_range_as(&view, start..end, Dtype::Bf16, &mut pieces[start * 2..end * 2]).unwrap();
            start = end;
        }
        assert_eq!(whole, pieces);
        for (range, out) in [(0..values.len() + 1, values.len() + 1), (0..4, 3), (5..5, 1)] {
            let error = write_range_as(&view, range, Dtype::Bf16, &mut vec![0u8; out * 2]);
            assert!(matches!(error, Err(Error::Internal(_))));
        }
        assert!(write_as(&view, Dtype::F16, &mut whole).is_err());
    }

    #[test]
    fn values_are_written_as_stored_ones_are() {
        let values = edge_values();
        let checkpoint = unaligned("F32", 4, bytemuck::cast_slice(&values));
        let view = checkpoint.get("t").unwrap();
        for dtype in [Dtype::F32, Dtype::Bf16] {
            let (mut stored, mut written) = (vec![0; values.len() * dtype.size()], Vec::new());
            written.resize(stored.len(), 1);
            write_as(&view, dtype, &mut stored).unwrap();
            write_values_as(&values, dtype, &mut written).unwrap();
            assert!(stored == written, "{dtype}");
            assert!(write_values_as(&values[1..], dtype, &mut written).is_err());
        }
        assert!(write_values_as(&[1.0], Dtype::F16, &mut [0; 2]).is_err());
    }

    #[test]
    fn conv_weights_become_channels_last() {
        // [O 2, I 3, kh 2, kw 2], each element naming its own index.
        let weight: Vec<u32> = (0..24).collect();
        let out = conv_to_ohwi(&weight, [2, 3, 2, 2]).unwrap();
        for (at, &from) in out.iter().enumerate() {
            let (o, y, x, i) = (at / 12, at / 6 % 2, at / 3 % 2, at % 3);
            assert_eq!(from as usize, ((o * 3 + i) * 2 + y) * 2 + x);
        }
        assert!(conv_to_ohwi(&weight, [2, 3, 2, 3]).is_err());
        assert!(conv_to_ohwi(&weight, [usize::MAX, 2, 1, 1]).is_err());
    }
}
