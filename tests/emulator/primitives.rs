//! Every primitive, used as it should be, in every schedule.

use crate::rig::{Rig, clusters, cooperative, ramp, schedules};
use crate::streams::TestStream;
use half::bf16;
use warpstep::device::Geometry;
use warpstep::device::emulated::EmulatedOptions;

#[test]
fn warp_exchanges() {
    for options in schedules() {
        let input = ramp(32);
        let out: Vec<f32> = Rig::new(options).run("emu_exchange", Geometry::linear(1, 32), &input, 320, 0);
        let row = |r: usize| &out[r * 32..r * 32 + 32];
        let votes = (0..32).fold(0u32, |bits, i| bits | ((input[i] as i32 & 1) as u32) << i);
        let group = |i: usize| &input[i / 8 * 8..i / 8 * 8 + 8];
        for i in 0..32 {
            assert_eq!(row(0)[i], input[i ^ 5]);
            assert_eq!(row(1)[i], input[if i + 3 < 32 { i + 3 } else { i }]);
            assert_eq!(row(2)[i], input[if i >= 3 { i - 3 } else { i }]);
            assert_eq!(row(3)[i], input[7]);
            assert_eq!(row(4)[i].to_bits(), votes);
            assert_eq!(row(5)[i], input.iter().sum::<f32>());
            assert_eq!(row(6)[i], group(i).iter().sum::<f32>());
            assert_eq!(row(7)[i], input.iter().copied().fold(f32::MIN, f32::max));
            assert_eq!(row(8)[i], group(i).iter().copied().fold(f32::MIN, f32::max));
            assert_eq!(row(9)[i], input[i ^ 2]);
        }
    }
}

#[test]
fn block_sums_and_maxima() {
    for options in schedules() {
        let input = ramp(3 * 96);
        let out: Vec<f32> = Rig::new(options).run("emu_block_reduce", Geometry::linear(3, 96), &input, 6, 0);
        for (block, values) in input.chunks(96).enumerate() {
            assert_eq!(out[block], values.iter().sum::<f32>());
            assert_eq!(out[3 + block], values.iter().copied().fold(f32::MIN, f32::max));
        }
    }
}

#[test]
fn mma_of_fragments_from_ldmatrix() {
    for options in schedules() {
        let a: Vec<bf16> = (0..256).map(|i| bf16::from_f32((i * 5 % 17) as f32 - 8.0)).collect();
        let b: Vec<bf16> = (0..128).map(|i| bf16::from_f32((i * 3 % 13) as f32 / 4.0)).collect();
        let input: Vec<bf16> = a.iter().chain(&b).copied().collect();
        let out: Vec<f32> = Rig::new(options).run("emu_mma", Geometry::linear(1, 32), &input, 129, 0);
        for row in 0..16 {
            for col in 0..8 {
                let product = |k: usize| a[row * 16 + k].to_f32() * b[col * 16 + k].to_f32();
                assert_eq!(out[row * 8 + col], 1.0 + (0..16).map(product).sum::<f32>(), "at {row}, {col}");
            }
        }
        assert_eq!(out[128], 0.0, "lanes for which ldmatrix with .trans differs");
    }
}

#[test]
fn cp_async_double_buffer_with_zero_fill() {
    for options in schedules() {
        let tiles = 5;
        // The read of what zero fill leaves out would run past the end.
        let input = ramp(64 * (tiles - 1) + 20);
        let out: Vec<f32> =
            Rig::new(options).run("emu_cp_async", Geometry::linear(1, 64), &input, 64 * tiles, tiles as u32);
        for (i, value) in out.iter().enumerate() {
            let from = i / 64 * 64 + 63 - i % 64;
            assert_eq!(*value, input.get(from).copied().unwrap_or(0.0), "at {i}");
        }
    }
}

#[test]
fn bulk_copies_through_a_ring() {
    for options in schedules() {
        let tiles = 11; // more than three times round the ring
        let input = ramp(tiles * 128);
        let geometry = Geometry::linear(1, 96).with_shared(3 * 128 * 4);
        let out: Vec<f32> = Rig::new(options).run("emu_bulk_ring", geometry, &input, tiles * 2, tiles as u32);
        let sums: Vec<f32> = input.chunks(64).map(|half| half.iter().sum()).collect();
        assert_eq!(out, sums);
    }
}

#[test]
fn grid_barriers() {
    for options in schedules() {
        for blocks in [1, 2, 7, 8] {
            let input = ramp(blocks);
            let out: Vec<f32> = Rig::new(options.clone()).run(
                "emu_grid_rounds",
                cooperative(blocks as u32, 64),
                &input,
                2 * blocks,
                0,
            );
            for block in 0..blocks {
                assert_eq!(out[blocks + block], input[(block + 3) % blocks] + 3.0);
            }
        }
    }
}

#[test]
fn grid_barrier_survives_replays() {
    let mut rig = Rig::new(EmulatedOptions::default());
    for _ in 0..5 {
        let out: Vec<f32> = rig.run("emu_grid_rounds", cooperative(3, 64), &[1.0f32, 2.0, 3.0], 6, 0);
        assert_eq!(out[3..], [4.0, 5.0, 6.0]);
    }
}

#[test]
fn a_whole_hopper_of_blocks_is_resident() {
    let mut rig = Rig::new(EmulatedOptions { sm_count: 132, ..EmulatedOptions::default() });
    let input = ramp(132);
    let out: Vec<f32> = rig.run("emu_grid_rounds", cooperative(132, 64), &input, 264, 0);
    assert!((0..132).all(|b| out[132 + b] == input[(b + 3) % 132] + 3.0));
}

#[test]
fn named_barriers() {
    for options in schedules() {
        let input = ramp(64);
        let out: Vec<f32> =
            Rig::new(options).run("emu_named_barriers", Geometry::linear(1, 96), &input, 128, 0);
        for i in 0..128 {
            assert_eq!(out[i], 2.0 * input[i / 64 * 32 + i % 32]);
        }
    }
}

#[test]
fn last_block_combines() {
    for options in schedules() {
        let input = ramp(6 * 32);
        // One worker: the blocks' order is part of the schedule.
        let options = EmulatedOptions { workers: 1, ..options };
        let out: Vec<f32> = Rig::new(options).run("emu_last_block", Geometry::linear(6, 32), &input, 7, 0);
        assert_eq!(out[0], input.iter().sum::<f32>());
    }
}

#[test]
fn words_that_carry_their_epoch() {
    for options in schedules() {
        let out: Vec<u32> = Rig::new(options).run("emu_ping_pong", cooperative(2, 32), &[0.0f32], 2, 9);
        assert_eq!(out, [18, 17]);
    }
}

#[test]
fn flags_maxima_and_float_sums() {
    for options in schedules() {
        let mut rig = Rig::new(options);
        let input = rig.upload("in", &[42.0f32]);
        let out = rig.upload("out", &[0.0f32; 3]);
        let node = rig.node("emu_flags", cooperative(2, 32), &input, &out, 0);
        rig.stream.start(&node).unwrap();
        assert_eq!(rig.download::<f32>(&out), [42.0, 2.0 * 496.0, 42.0]);
        let counters = rig.counters.clone();
        assert_eq!(rig.download::<u32>(&counters)[..3], [1, 131, 64]);
    }
}

#[test]
fn clusters_read_each_others_shared_memory() {
    for options in schedules() {
        let input = ramp(8);
        let geometry = clusters(8, 4, 64).with_shared(64);
        let out: Vec<f32> = Rig::new(options).run("emu_cluster_sum", geometry, &input, 8, 0);
        for block in 0..8 {
            let cluster = &input[block / 4 * 4..block / 4 * 4 + 4];
            assert_eq!(out[block], 0.5 + 3.0 * cluster.iter().sum::<f32>());
        }
    }
}

#[test]
fn vectors_of_both_element_types() {
    let input = ramp(128);
    let options = EmulatedOptions::default;
    let out: Vec<f32> = Rig::new(options()).run("emu_copy_f32", Geometry::linear(1, 32), &input, 128, 0);
    let reversed = |len: usize, per: usize, i: usize| (len / per - 1 - i / per) * per + i % per;
    assert!((0..128).all(|i| out[i] == input[reversed(128, 4, i)]));
    let input: Vec<bf16> = ramp(256).into_iter().map(bf16::from_f32).collect();
    let out: Vec<bf16> = Rig::new(options()).run("emu_copy_bf16", Geometry::linear(1, 32), &input, 256, 0);
    assert!((0..256).all(|i| out[i] == input[reversed(256, 8, i)]));
}

#[test]
fn bf16_rounds_to_nearest_even_and_has_one_nan() {
    let patterns = [
        0x0000_0000u32,
        0x8000_0000,
        0x3f80_0000,
        0x3f80_8000,
        0x3f81_8000,
        0x3f80_7fff,
        0x3f80_8001,
        0x0000_8000,
        0x0001_8000,
        0x007f_ffff,
        0x7f7f_ffff,
        0x7f7f_8000,
        0x7f7f_7fff,
        0x7f80_0000,
        0xff80_0000,
        0x7fc0_0000,
        0xffc1_2345,
        0x7f80_0001,
    ];
    let input: Vec<f32> = patterns.iter().map(|&bits| f32::from_bits(bits)).collect();
    let out: Vec<u16> = Rig::new(EmulatedOptions::default()).run(
        "emu_round_bf16",
        Geometry::linear(1, 32),
        &input,
        input.len(),
        input.len() as u32,
    );
    for (&bits, &rounded) in patterns.iter().zip(&out) {
        let value = f32::from_bits(bits);
        // The device's cvt.rn.bf16x2 gives 0x7fff for every NaN; `half` keeps payload bits.
        let expected = if value.is_nan() { 0x7fff } else { bf16::from_f32(value).to_bits() };
        assert_eq!(rounded, expected, "{bits:#010x}");
    }
}
