//! The units: inputs and what the PTX manual makes of them, in plain Rust that shares nothing with the emulated device.

use super::{Expected, Step, Unit};
use crate::device::Geometry;
use half::bf16;

/// All units, in the order in which they are run.
pub static UNITS: &[Unit] = &[
    Unit {
        name: "indices",
        primitives: &[
            "tid_x", "tid_y", "tid_z", "ntid_x", "ntid_y", "ntid_z", "bid_x", "bid_y", "bid_z", "nbid_x",
            "nbid_y", "nbid_z", "lane_id",
        ],
        steps: &[Step {
            symbol: "conformance_indices",
            geometry: || Geometry { grid: [3, 2, 2], block: [8, 4, 2], ..Geometry::linear(1, 1) },
        }],
        input: || vec![0],
        expected: indices,
    },
    Unit {
        name: "shuffles",
        primitives: &["shfl_xor", "shfl_down", "shfl_up", "shfl_idx", "warp_ballot"],
        steps: &[Step { symbol: "conformance_shuffles", geometry: || Geometry::linear(1, 32) }],
        input: || noise(32, 1),
        expected: shuffles,
    },
    Unit {
        name: "reductions",
        primitives: &["warp_sum", "warp_sum_all", "warp_max", "block_sync"],
        steps: &[Step { symbol: "conformance_reductions", geometry: || Geometry::linear(1, 96) }],
        input: || uniform(96, 2, -3.0, 3.0),
        expected: reductions,
    },
    Unit {
        name: "named_barriers",
        primitives: &["bar_sync", "bar_arrive"],
        steps: &[Step { symbol: "conformance_named_barriers", geometry: || Geometry::linear(1, 128) }],
        input: || noise(128, 3),
        expected: |input| {
            let crossed = |i: usize| match i {
                0..64 => input[127 - i].wrapping_mul(5),
                _ => input[127 - i].wrapping_mul(3),
            };
            bits((0..128).map(crossed))
        },
    },
    Unit {
        name: "clusters",
        primitives: &["cluster_sync", "cluster_rank", "cluster_size", "cluster_map"],
        steps: &[Step {
            symbol: "conformance_clusters",
            geometry: || Geometry { cluster: [4, 1, 1], ..Geometry::linear(8, 32) },
        }],
        input: || vec![0],
        expected: |_| {
            let next = |block: u32| block / 4 * 4 + (block + 1) % 4;
            bits((0..8 * 32).flat_map(|i| {
                let (block, lane) = (i / 32, i % 32);
                [block % 4, 4, next(block) * 100 + 31 - lane]
            }))
        },
    },
    Unit {
        name: "loads",
        primitives: &[
            "ld_nc_v4",
            "ld_nc_v2",
            "ld_stream_v4",
            "ld_cg_v4",
            "ld_cg_f32",
            "ld_v4",
            "st_v4",
            "prefetch_l2",
        ],
        steps: &[Step { symbol: "conformance_loads", geometry: || Geometry::linear(1, 32) }],
        input: || noise(6 * 32 * 4, 4),
        expected: |input| bits(input.iter().copied()),
    },
    Unit {
        name: "atomics",
        primitives: &["atom_add_relaxed", "atom_max_relaxed", "red_add_f32", "atom_add_acqrel"],
        steps: &[Step { symbol: "conformance_atomics", geometry: || Geometry::linear(4, 64) }],
        input: || noise(256, 5),
        expected: |input| {
            let sum = input.iter().fold(0u32, |sum, v| sum.wrapping_add(*v));
            let max = input.iter().copied().max().unwrap_or(0);
            let head = [sum, max, ((255 * 256 / 2) as f32).to_bits(), 256];
            bits(head.into_iter().chain([1; 256]))
        },
    },
    Unit {
        name: "messages",
        primitives: &[
            "st_release",
            "ld_acquire",
            "st_relaxed",
            "poll_relaxed",
            "st_relaxed_v4",
            "poll_relaxed_v4",
            "warp_sync",
        ],
        steps: &[Step { symbol: "conformance_messages", geometry: || cooperative(2, 32) }],
        input: || noise(32, 6),
        expected: |input| {
            let mut words: Vec<u32> = input.iter().map(|v| v.wrapping_add(1)).collect();
            let mut value = input[0];
            for _ in 0..2 * 16 {
                let answer = value.wrapping_mul(3).wrapping_add(1);
                value = answer.wrapping_mul(3);
                words.extend([value, answer]);
            }
            words.extend([0, 4096]);
            bits(words)
        },
    },
    Unit {
        name: "grid_sync",
        primitives: &["grid_sync"],
        steps: &[Step { symbol: "conformance_grid_sync", geometry: || cooperative(4, 64) }],
        input: || noise(4, 7),
        expected: |input| {
            let mut values = input.to_vec();
            let mut words = Vec::new();
            for _ in 0..4 {
                let fold =
                    |b: usize| (0..4).fold(0u32, |v, j| v.wrapping_mul(31).wrapping_add(values[(b + j) % 4]));
                values = (0..4).map(fold).collect();
                words.extend(&values);
            }
            bits(words)
        },
    },
    Unit {
        name: "dependent_launch",
        primitives: &["griddep_wait", "griddep_launch"],
        steps: &[
            Step { symbol: "conformance_dependent_first", geometry: dependent },
            Step { symbol: "conformance_dependent_second", geometry: dependent },
        ],
        input: || noise(32, 8),
        expected: |input| bits(input.iter().map(|v| (v ^ 0x5a5a_5a5a).wrapping_add(1))),
    },
    Unit {
        name: "registers",
        primitives: &["regs_grow", "regs_shrink"],
        steps: &[Step { symbol: "conformance_registers", geometry: || Geometry::linear(1, 384) }],
        input: || noise(384, 16),
        expected: |input| {
            bits(input.iter().enumerate().map(|(i, v)| if i < 256 { v.wrapping_mul(3) } else { v ^ 5 }))
        },
    },
    Unit {
        name: "cp_async",
        primitives: &["cp_async16", "cp_async_commit", "cp_async_wait"],
        steps: &[Step { symbol: "conformance_cp_async", geometry: || Geometry::linear(1, 32) }],
        input: || noise(4 * 32 * 4, 9),
        expected: |input| {
            bits((0..4 * 32 * 4).map(|i| {
                let (group, lane, word) = (i / 128, i / 4 % 32, i % 4);
                let from = if group < 2 { lane } else { 31 - lane };
                if from % 3 == group % 3 { 0 } else { input[(group * 32 + from) * 4 + word] }
            }))
        },
    },
    Unit {
        name: "mbarrier",
        primitives: &["mbar_init", "mbar_init_fence", "mbar_arrive", "mbar_wait"],
        steps: &[Step { symbol: "conformance_mbarrier", geometry: || Geometry::linear(1, 64) }],
        input: || noise(64, 10),
        expected: |input| {
            let mut values = input.to_vec();
            let mut words = Vec::new();
            for phase in 0..4 {
                values = (0..64).map(|i| values[(i + 1) % 64].wrapping_mul(3).wrapping_add(phase)).collect();
                words.extend(&values);
            }
            bits(words)
        },
    },
    Unit {
        name: "bulk_copies",
        primitives: &["bulk_g2s", "bulk_g2s_hint", "l2_evict_first", "l2_evict_last", "mbar_arrive_tx"],
        steps: &[Step { symbol: "conformance_bulk_copies", geometry: || Geometry::linear(1, 64) }],
        input: || noise(512, 11),
        expected: |input| bits(input.iter().copied()),
    },
    Unit {
        name: "ldmatrix",
        primitives: &["ldmatrix_x4", "ldmatrix_x4_trans"],
        steps: &[Step { symbol: "conformance_ldmatrix", geometry: || Geometry::linear(1, 32) }],
        input: || (0..32 * 4).map(|i| (2 * i) | (2 * i + 1) << 16).collect(),
        expected: |input| bits([false, true].into_iter().flat_map(|t| ldmatrix(input, t))),
    },
    Unit {
        name: "ldmatrix_all",
        primitives: &["ldmatrix_x4_all", "ldmatrix_x4_trans_all"],
        steps: &[Step { symbol: "conformance_ldmatrix_all", geometry: || Geometry::linear(1, 32) }],
        input: || (0..64 * 4).map(|i| (2 * i) | (2 * i + 1) << 16).collect(),
        expected: |input| {
            let loads = |t| input.chunks(32 * 4).flat_map(move |load| ldmatrix(load, t));
            bits(loads(false).chain(loads(true)))
        },
    },
    Unit {
        name: "mma",
        primitives: &["mma_bf16_16816"],
        steps: &[Step { symbol: "conformance_mma", geometry: || Geometry::linear(1, 32) }],
        input: || mma_input(1, 1),
        expected: |_| mma(1, 1),
    },
    Unit {
        name: "mma_all",
        primitives: &["mma_bf16_all"],
        steps: &[Step { symbol: "conformance_mma_all", geometry: || Geometry::linear(1, 32) }],
        input: || mma_input(2, 3),
        expected: |_| mma(2, 3),
    },
    Unit {
        name: "exact_arithmetic",
        primitives: &["f_fma", "f_sqrt", "f_min", "f_max", "f_rint", "f_abs", "as_f32", "as_u32"],
        steps: &[Step { symbol: "conformance_exact_arithmetic", geometry: || Geometry::linear(1, 64) }],
        input: || pairs(&special_floats()),
        expected: exact_arithmetic,
    },
    Unit {
        name: "approximations",
        primitives: &["fast_exp2", "fast_exp", "fast_rsqrt", "fast_div", "fast_sincos", "f_exp", "f_log"],
        steps: &[Step { symbol: "conformance_approximations", geometry: || Geometry::linear(1, 64) }],
        input: || [uniform(192, 12, -3.1, 3.1), uniform(64, 13, -60.0, 60.0)].concat(),
        expected: approximations,
    },
    Unit {
        name: "conversions",
        primitives: &["pack_bf16"],
        steps: &[Step { symbol: "conformance_conversions", geometry: || Geometry::linear(1, 64) }],
        input: conversion_input,
        expected: |input| {
            let round = |bits: u32| match f32::from_bits(bits) {
                // cvt.rn.bf16x2.f32: "NaN results are flushed to positive canonical NaN" (PTX ISA, cvt).
                v if v.is_nan() => 0x7fff,
                v => u32::from(bf16::from_f32(v).to_bits()),
            };
            bits(
                input
                    .iter()
                    .flat_map(|&word| [round(word) | 0x3f80 << 16, 0xc000 | round(word) << 16, word << 16]),
            )
        },
    },
    Unit {
        name: "e4m3",
        primitives: &["e4m3_to_f32", "f32_to_e4m3"],
        steps: &[Step { symbol: "conformance_e4m3", geometry: || Geometry::linear(1, 64) }],
        input: e4m3_input,
        expected: e4m3,
    },
];

fn bits(words: impl IntoIterator<Item = u32>) -> Expected {
    Expected::Bits { words: words.into_iter().collect(), alike: |_, _| false }
}

/// Which NaN an operation makes is not said anywhere.
fn any_nan(a: u32, b: u32) -> bool {
    float(a).is_nan() && float(b).is_nan()
}

fn cooperative(blocks: u32, threads: u32) -> Geometry {
    Geometry { cooperative: true, ..Geometry::linear(blocks, threads) }
}

fn dependent() -> Geometry {
    Geometry { dependent: true, ..Geometry::linear(1, 32) }
}

/// Words without a pattern: a multiplicative hash of the index (Knuth's constant), mixed once more.
fn noise(count: usize, seed: u32) -> Vec<u32> {
    (0..count as u32)
        .map(|i| {
            let v = (i + seed * 0x1000).wrapping_mul(2_654_435_761);
            v ^ v >> 15
        })
        .collect()
}

/// Bits of floats spread evenly over `low..high`.
fn uniform(count: usize, seed: u32, low: f32, high: f32) -> Vec<u32> {
    noise(count, seed)
        .into_iter()
        .map(|v| (low + (high - low) * ((v >> 8) as f32 / (1 << 24) as f32)).to_bits())
        .collect()
}

fn float(word: u32) -> f32 {
    f32::from_bits(word)
}

fn indices(_: &[u32]) -> Expected {
    let packed = |x: u32, y: u32, z: u32| x | (y << 8) | (z << 16);
    bits((0..12u32).flat_map(move |block| {
        (0..64u32).flat_map(move |thread| {
            [
                packed(thread % 8, thread / 8 % 4, thread / 32),
                packed(8, 4, 2),
                packed(block % 3, block / 3 % 2, block / 6),
                packed(3, 2, 2),
                thread % 32,
                thread,
                thread / 32,
                2,
            ]
        })
    }))
}

/// PTX ISA, shfl.sync: a source lane outside the warp leaves the lane its own value; idx takes the low five bits.
fn shuffles(input: &[u32]) -> Expected {
    let vote = |voters: u32, of: fn(u32, usize) -> bool| {
        (0..voters as usize).fold(0u32, |votes, i| votes | u32::from(of(input[i], i)) << i)
    };
    let odd = vote(32, |v, _| v & 1 != 0);
    let low_half = vote(16, |v, _| v & 2 != 0);
    let rows: [&dyn Fn(usize) -> u32; 16] = [
        &|i| input[i ^ 1],
        &|i| input[i ^ 16],
        &|i| input[i ^ 31],
        &|i| input[if i + 1 < 32 { i + 1 } else { i }],
        &|i| input[if i + 31 < 32 { i + 31 } else { i }],
        &|i| input[i.saturating_sub(1)],
        &|i| input[if i >= 31 { i - 31 } else { i }],
        &|i| input[i],
        &|_| input[31],
        &|_| input[37 % 32],
        &|i| input[i * 7 % 32],
        &|i| input[i ^ 5],
        &|_| odd,
        &|_| 1 << 31,
        &|i| if i < 16 { input[i ^ 9] } else { 0 },
        &|i| if i < 16 { low_half } else { 0 },
    ];
    bits(rows.iter().flat_map(|row| (0..32).map(row)))
}

/// Sums over aligned groups of `width` lanes, folded in halves: the order of additions is part of the result.
fn folded(values: &[f32], width: usize, join: fn(f32, f32) -> f32) -> Vec<f32> {
    let mut values = values.to_vec();
    let mut distance = width / 2;
    while distance > 0 {
        values = (0..values.len()).map(|i| join(values[i], values[i ^ distance])).collect();
        distance /= 2;
    }
    values
}

fn reductions(input: &[u32]) -> Expected {
    let values: Vec<f32> = input.iter().map(|&w| float(w)).collect();
    let sum: Vec<f32> = folded(&values, 32, |a, b| a + b);
    let negative: Vec<f32> = values.iter().map(|v| -v).collect();
    // The first lane of every warp, in the order of the warps, from zero.
    let total = [0, 32, 64].iter().fold(0.0f32, |total, &i| total + sum[i]);
    let largest = values.iter().copied().fold(f32::MIN, f32::max);
    let least = values.iter().copied().fold(f32::MAX, f32::min);
    let rows = [
        sum,
        folded(&values, 8, |a, b| a + b),
        folded(&values, 16, f32::max),
        folded(&negative, 32, |a, b| a + b),
        vec![total; 96],
        vec![largest - least; 96],
    ];
    bits(rows.concat().into_iter().map(f32::to_bits))
}

/// PTX ISA, ldmatrix: lane i holds of matrix m row i / 4, columns 2 (i % 4) and the next; transposed, column i / 4,
/// rows 2 (i % 4) and the next.
fn ldmatrix(input: &[u32], transposed: bool) -> Vec<u32> {
    let element = |matrix: usize, row: usize, column: usize| {
        let word = input[(matrix * 8 + row) * 4 + column / 2];
        word >> (column % 2 * 16) & 0xffff
    };
    let fragment = |lane: usize, matrix: usize| {
        let (major, minor) = (lane / 4, lane % 4 * 2);
        let at = |offset: usize| match transposed {
            false => element(matrix, major, minor + offset),
            true => element(matrix, minor + offset, major),
        };
        at(0) | at(1) << 16
    };
    (0..32).flat_map(|lane| (0..4).map(move |matrix| (lane, matrix))).map(|(l, m)| fragment(l, m)).collect()
}

/// A `[16 m, 16]`, B `[8 n, 16]` by column and C `[16 m, 8 n]`: small whole numbers, so that every order of summation
/// gives the same float.
fn mma_values(m: usize, n: usize) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let a = (0..256 * m).map(|i| (i * 37 % 101) as f32 - 50.0).collect();
    let b = (0..128 * n).map(|i| (i * 29 % 97) as f32 - 48.0).collect();
    let c = (0..128 * m * n).map(|i| (i * 11) as f32 - 700.0).collect();
    (a, b, c)
}

fn mma_input(m: usize, n: usize) -> Vec<u32> {
    let (a, b, c) = mma_values(m, n);
    let packed = |values: &[f32]| -> Vec<u32> {
        let half = |v: f32| u32::from(bf16::from_f32(v).to_bits());
        values.chunks_exact(2).map(|pair| half(pair[0]) | half(pair[1]) << 16).collect()
    };
    [packed(&a), packed(&b), c.into_iter().map(f32::to_bits).collect()].concat()
}

fn mma(m: usize, n: usize) -> Expected {
    let (a, b, c) = mma_values(m, n);
    bits((0..128 * m * n).map(|at| {
        let (row, column) = (at / (8 * n), at % (8 * n));
        let product: f32 = (0..16).map(|k| a[row * 16 + k] * b[column * 16 + k]).sum();
        (c[at] + product).to_bits()
    }))
}

/// Zeros, halves for rounding, the ends of the range, subnormals, infinities, NaN, and ordinary numbers.
fn special_floats() -> Vec<f32> {
    let mut values = vec![
        1.0,
        -1.0,
        0.5,
        1.5,
        2.5,
        -2.5,
        0.0,
        0.1,
        -7.3,
        f32::MAX,
        f32::MIN_POSITIVE,
        1e-45,
        -1e-40,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
        8_388_607.5,
        1e10,
        -3e-30,
        16_777_217.0,
    ];
    values.extend(uniform(20, 14, -100.0, 100.0).into_iter().map(float));
    values
}

/// Every value beside two others.
fn pairs(values: &[f32]) -> Vec<u32> {
    let count = values.len();
    [3, 11]
        .iter()
        .flat_map(|shift| (0..count).flat_map(move |i| [values[i], values[(i + shift) % count]]))
        .map(f32::to_bits)
        .collect()
}

fn exact_arithmetic(input: &[u32]) -> Expected {
    let pairs: Vec<(f32, f32)> = input.chunks_exact(2).map(|p| (float(p[0]), float(p[1]))).collect();
    let rows: [fn(f32, f32) -> f32; 10] = [
        |a, b| a + b,
        |a, b| a * b,
        |a, b| a / b,
        |a, b| a.mul_add(b, -a),
        |a, _| a.abs().sqrt(),
        |a, b| a.min(b),
        |a, b| a.max(b),
        |a, _| a.round_ties_even(),
        |a, _| if a.is_finite() { 1.0 } else { 0.0 },
        |_, b| b.abs(),
    ];
    let words = rows.iter().flat_map(|row| pairs.iter().map(|&(a, b)| row(a, b).to_bits())).collect();
    Expected::Bits { words, alike: any_nan }
}

/// Bounds of the CUDA C++ programming guide, "Mathematical Functions": intrinsics in the second half.
fn approximations(input: &[u32]) -> Expected {
    let pairs: Vec<(f64, f64)> =
        input.chunks_exact(2).map(|p| (f64::from(float(p[0])), f64::from(float(p[1])))).collect();
    let ulps = |value: f64, count: f64| {
        let exponent = (value.abs().log2().floor()).max(-126.0);
        (value, count * (exponent - 23.0).exp2())
    };
    // Of __sinf and __cosf within -pi..pi; beyond, the argument's own rounding in the reduction comes on top.
    let reduced = |a: f64, value: f64, within: f64| (value, within.exp2() + a.abs() * (-22.0f64).exp2());
    let rows: [&dyn Fn(f64, f64) -> (f64, f64); 8] = [
        &|a, _| ulps(a.exp2(), 2.0),
        &|a, _| ulps(a.exp(), 2.0 + (1.173 * a).abs().floor()),
        &|a, _| ulps(1.0 / a.abs().sqrt(), 2.0),
        &|a, b| ulps(a / b, 2.0),
        &|a, _| reduced(a, a.sin(), -21.41),
        &|a, _| reduced(a, a.cos(), -21.19),
        &|a, _| ulps(a.exp(), 2.0),
        &|a, _| ulps(a.abs().ln(), 2.0),
    ];
    Expected::Near(rows.iter().flat_map(|row| pairs.iter().map(move |&(a, b)| row(a, b))).collect())
}

/// Every exponent with mantissas on, just below and just above the middle between two bf16 values, both signs; NaNs
/// whose payload lies in the half that is cut off.
fn conversion_input() -> Vec<u32> {
    let mantissas = [0x0000, 0x7fff, 0x8000, 0x8001, 0x1_8000, 0x7f_7fff, 0x7f_8000, 0x7f_ffff];
    let mut words: Vec<u32> =
        (0..256u32).flat_map(|e| mantissas.map(|m| e << 23 | m | (e & 1) << 31)).collect();
    words.extend([0x7f80_0001, 0xff80_0001, 0x7fc0_0000, 0xffff_ffff, 0x8000_0000]);
    words
}

/// The 127 numbers of the codes without a sign (OCP 8-bit floating point, E4M3): by definition, in f64.
fn e4m3_numbers() -> Vec<f64> {
    let number = |code: i32| match (code / 8, f64::from(code % 8) / 8.0) {
        (0, fraction) => fraction * (-6f64).exp2(),
        (exponent, fraction) => (1.0 + fraction) * f64::from(exponent - 7).exp2(),
    };
    (0..127).map(number).collect()
}

/// Every number, every middle between two, and the floats beside both; what lies beyond the largest; both signs.
fn e4m3_input() -> Vec<u32> {
    let numbers = e4m3_numbers();
    let middles = numbers.windows(2).map(|pair| (pair[0] + pair[1]) / 2.0);
    // 464 would be the middle between 448 and 480, if that were a number.
    let beyond = [449.0, 464.0, 480.0, 1e30, f64::from(f32::MAX), f64::INFINITY];
    let near = |value: f64| [(value as f32).next_down(), value as f32, (value as f32).next_up()];
    let mut values: Vec<f32> = numbers.iter().copied().chain(middles).chain(beyond).flat_map(near).collect();
    values.extend([f32::from_bits(1), f32::MIN_POSITIVE, f32::NAN]);
    values.iter().flat_map(|value| [value.to_bits(), (-value).to_bits()]).collect()
}

/// PTX ISA, cvt: to the nearest, to the even code of two equally near; .satfinite takes what is too large to the
/// largest number; a NaN becomes a NaN, of which there are two. Whose sign it has is the hardware's own affair: 0x7f and
/// 0xff are alike, and neither is expected of anything but a NaN.
fn e4m3(input: &[u32]) -> Expected {
    let numbers = e4m3_numbers();
    let decoded = (0..256usize).map(|code| match (numbers.get(code % 128), code < 128) {
        (None, _) => f32::NAN.to_bits(),
        (Some(&number), true) => (number as f32).to_bits(),
        (Some(&number), false) => (-number as f32).to_bits(),
    });
    let encode = |word: u32| {
        let value = f64::from(float(word));
        if value.is_nan() {
            return 0x7f;
        }
        let size = value.abs().min(448.0);
        let distance = |code: usize| (numbers[code] - size).abs();
        let nearest =
            (0..127usize).min_by(|&a, &b| distance(a).total_cmp(&distance(b)).then((a % 2).cmp(&(b % 2))));
        nearest.map_or(0, |code| code as u32) | (word >> 24 & 0x80)
    };
    let words = decoded.chain(input.iter().map(|&word| encode(word))).collect();
    Expected::Bits { words, alike: |a, b| any_nan(a, b) || [a, b].iter().all(|word| word & !0x80 == 0x7f) }
}
