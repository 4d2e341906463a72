//! `to_rgb8`: decoder output to 8-bit pixels.

use super::harness::{self, Case, Check, Rig};
use super::params::ToRgb8Params;
use super::shared::{Checks, case, scale_for};
use super::{DType, Launch, Op, Variant};
use crate::device::{Geometry, Node, ParamBytes, Span};
use crate::error::Result;
use crate::reference::PlainF32;
use crate::reference::to_rgb8::to_rgb8 as reference;

/// The row of the registry.
pub static OP: Op = Op {
    name: "to_rgb8",
    summary: "clamp(x / 2 + 0.5, 0, 1) * 255, rounded half to even",
    bound: "bytes: 0.8 M values for a 512x512 picture",
    variants: &[Variant {
        name: "plain",
        kernels: crate::kernels!("to_rgb8", f32: "to_rgb8_plain_f32", bf16: "to_rgb8_plain_bf16"),
        summary: "one value per thread",
    }],
    cases,
};

const THREADS: usize = 256;

/// Bytes of the bits that mark values which are not finite.
pub fn bad_bytes(elements: usize) -> usize {
    elements.div_ceil(32) * 4
}

/// The first value that the bits mark.
pub fn first_bad(bits: &[u8]) -> Option<usize> {
    let at = bits.iter().position(|&byte| byte != 0)?;
    Some(8 * at + bits[at].trailing_zeros() as usize)
}

/// One conversion.
#[derive(Clone, Copy, Debug)]
pub struct Args {
    /// `[elements]` E: pictures, channels last.
    pub x: Span,
    /// `[elements]` uint8, written.
    pub rgb: Span,
    /// [`bad_bytes`], written: a bit per value that is not finite, 32 to a little-endian word.
    pub bad: Span,
    /// Values.
    pub elements: usize,
}

/// Checks and records one launch.
pub fn node(launch: &Launch, label: &str, args: &Args) -> Result<Node> {
    let variant = launch.selection.variant(&OP, "plain")?;
    let checks = Checks::new(OP.name, variant.name);
    let x = checks.span("x", args.x, launch.dtype.bytes(), &[args.elements])?;
    let rgb = checks.span("rgb", args.rgb, 1, &[args.elements])?;
    let bad = checks.span("bad", args.bad, 4, &[args.elements.div_ceil(32)])?;
    let params = ToRgb8Params { x: x.ptr.0, rgb: rgb.ptr.0, bad: bad.ptr.0, elements: args.elements as u64 };
    let mut geometry =
        Geometry::linear(checks.dim("blocks", args.elements.div_ceil(THREADS))?, THREADS as u32);
    geometry.dependent = launch.dependent;
    Ok(Node {
        label: label.into(),
        kernel: variant.kernel(OP.name, launch.dtype)?,
        geometry,
        params: ParamBytes::of(&params),
        reads: vec![x],
        writes: vec![rgb, bad],
    })
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for elements in [3, 45, 771, 49_152] {
        for &dtype in DType::ALL {
            let bytes = (elements * (dtype.bytes() + 1) + bad_bytes(elements)) as u64;
            let scale = scale_for(4 * elements as u64);
            let label = format!("elements={elements}");
            let cost = (bytes, 4 * elements as u64);
            cases.push(case(&OP, "plain", dtype, scale, cost, label, move |rig, launch| {
                run(rig, launch, elements)
            }));
        }
    }
    cases
}

fn run(rig: &mut Rig, launch: &Launch, elements: usize) -> Result<Vec<Check>> {
    let mut values = rig.normal(elements, 0.8);
    // The ends of the range, what lies outside, and level 127.5, which is even at 128.
    for (v, special) in values.iter_mut().zip([0.0, -1.0, 1.0, -7.0, 7.0, f32::INFINITY, f32::NEG_INFINITY]) {
        *v = special;
    }
    // The last value is in a word of its own in most cases. The level of NaN is 0.
    values[elements - 1] = f32::NAN;
    let x = rig.input("x", launch.dtype, values)?;
    let rgb = rig.bytes("rgb", &vec![0xee; elements])?;
    let bad = rig.bytes("bad", &vec![0xee; bad_bytes(elements)])?;
    rig.run(&node(launch, "to_rgb8", &Args { x: x.span, rgb, bad, elements })?)?;
    let got: Vec<f32> = rig.read_bytes(rgb)?.into_iter().map(f32::from).collect();
    // Every operation is a single correctly rounded float operation, so the levels are equal, not close.
    let expected: Vec<f64> = reference::<PlainF32>(&x.values).into_iter().map(f64::from).collect();
    let marked = |word: &[f32]| word.iter().rev().fold(0u32, |bits, v| bits << 1 | u32::from(!v.is_finite()));
    let expected_bad: Vec<u8> = x.values.chunks(32).flat_map(|word| marked(word).to_le_bytes()).collect();
    let got_bad: Vec<f32> = rig.read_bytes(bad)?.into_iter().map(f32::from).collect();
    let expected_bad: Vec<f64> = expected_bad.into_iter().map(f64::from).collect();
    Ok(vec![
        harness::within("rgb", &got, &expected, 0.0),
        harness::within("bad", &got_bad, &expected_bad, 0.0),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_marked_value_is_found() {
        assert_eq!(first_bad(&[0; 8]), None);
        assert_eq!(first_bad(&[0, 0, 0, 0, 0, 0b0110_0000, 1, 0]), Some(45));
    }
}
