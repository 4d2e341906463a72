//! Every case of every op on the emulated device, against the slow references, with NaN around every buffer.

use std::sync::Arc;
use warpstep::device::Node;
use warpstep::device::emulated::{AsyncCopies, EmulatedDevice, EmulatedOptions, Order, build_kind};
use warpstep::ops::harness::{Rig, Scale, encode};
use warpstep::ops::product::ProductScratch;
use warpstep::ops::{DType, Launch, Selection, gate_up, norm_rows, registry};
use warpstep::weights::pack::{Pairing, Tiles};

/// Runs all cases up to `largest`; `WARPSTEP_CASES` keeps those whose name contains it.
fn run_cases(options: EmulatedOptions, largest: Scale, data_seed: u64) {
    let wanted = std::env::var("WARPSTEP_CASES").unwrap_or_default();
    let (mut failures, mut ran) = (Vec::new(), 0);
    for op in registry() {
        for case in (op.cases)() {
            let name = format!("{} {} {} {}", op.name, case.variant, case.dtype.name(), case.label);
            if case.scale > largest || !name.contains(&wanted) {
                continue;
            }
            ran += 1;
            // A device of its own: a failed launch is sticky.
            let device = EmulatedDevice::new(options.clone()).expect("the emulated device");
            let mut rig = Rig::new(Arc::new(device), data_seed).expect("a rig");
            let checks = (case.run)(&mut rig).and_then(|checks| rig.check_guards().map(|()| checks));
            match checks {
                Ok(checks) if checks.is_empty() => failures.push(format!("{name}: compared nothing")),
                Ok(checks) => {
                    let bad = checks.iter().filter(|c| !c.ok);
                    failures.extend(bad.map(|c| {
                        format!(
                            "{name}: {}: error {:.3e} of {:.3e} allowed, worst (index, got, expected) {:?}",
                            c.output, c.max_error, c.allowed, c.worst
                        )
                    }));
                }
                Err(error) => failures.push(format!("{name}: {error}")),
            }
        }
    }
    assert!(ran > 0, "no case contains {wanted:?}");
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}

/// The instrumented builds are ten to a hundred times slower.
fn largest() -> Scale {
    if build_kind() == "opt" { Scale::Medium } else { Scale::Small }
}

#[test]
fn every_case_agrees_with_its_reference() {
    run_cases(EmulatedOptions::default(), largest(), 1);
}

#[test]
fn every_small_case_agrees_in_any_order_on_any_number_of_sms() {
    let random = EmulatedOptions {
        order: Order::Random,
        async_copies: AsyncCopies::Random,
        seed: 5,
        workers: 1,
        sm_count: 3,
        ..EmulatedOptions::default()
    };
    for seed in [5, 6] {
        run_cases(EmulatedOptions { seed, ..random.clone() }, Scale::Small, seed);
    }
    let reverse =
        EmulatedOptions { order: Order::Reverse, async_copies: AsyncCopies::AtOnce, sm_count: 7, ..random };
    run_cases(reverse, Scale::Small, 3);
}

/// An image's bits must not depend on how many are in the batch: with packed weights a row's sums and its norm are
/// the same whatever rows are beside it, and in whichever group of rows it is.
#[test]
fn a_row_of_a_packed_product_has_the_same_bits_beside_any_others() {
    // mma sums up K in two parts.
    const HIDDEN: usize = 1056;
    const INTERMEDIATE: usize = 100;
    const ROWS: usize = 300;
    let tiles = Tiles::new(2 * INTERMEDIATE, HIDDEN, Pairing::Stacked).unwrap();
    let options = EmulatedOptions { sm_count: 5, ..EmulatedOptions::default() };
    for variant in ["stream", "ring", "mma"] {
        let mut rig = Rig::new(Arc::new(EmulatedDevice::new(options.clone()).unwrap()), 4).unwrap();
        let values = rig.normal(2 * INTERMEDIATE * HIDDEN, 0.1);
        let (bytes, _) = encode(DType::Bf16, values);
        let w = rig.bytes("w", &tiles.pack(&bytes).unwrap()).unwrap();
        let norm_w = rig.random("norm_w", DType::Bf16, HIDDEN, 1.0).unwrap();
        let x = rig.random("x", DType::F32, ROWS * HIDDEN, 2.0).unwrap();
        let (floats, counters) = ProductScratch::sizes(5, ROWS);
        let partial = rig.output("partial", DType::F32, floats).unwrap();
        let arrivals = rig.indices("arrivals", &vec![0; counters]).unwrap();
        let selection = Selection::one(&gate_up::OP, variant).unwrap();
        let launch = Launch { selection: &selection, dtype: DType::Bf16, sm_count: 5, dependent: false };
        // SAFETY: over buffers of the rig; neither op has tables.
        let run = |rig: &mut Rig, node: &Node| unsafe { rig.launch(node) }.unwrap();
        let mut act = |first: usize, rows: usize| {
            let act = rig.output("act", DType::Bf16, rows * INTERMEDIATE).unwrap();
            let x = x.span.slice(first * HIDDEN * 4, rows * HIDDEN * 4);
            let normed = (variant == "mma").then(|| {
                let h = rig.output("h", DType::Bf16, rows * HIDDEN).unwrap();
                let norm_w = norm_w.span;
                let args = norm_rows::Args { x, norm_w, h, rows, hidden: HIDDEN, eps: 1e-6 };
                run(&mut rig, &norm_rows::node(&launch, "norm_rows", &args).unwrap());
                h
            });
            let args = gate_up::Args {
                x,
                norm_w: norm_w.span,
                normed,
                w: gate_up::Weights::Tiles(w),
                gate_bias: None,
                up_bias: None,
                act,
                rows,
                hidden: HIDDEN,
                intermediate: INTERMEDIATE,
                eps: 1e-6,
                scratch: Some(ProductScratch { partial, arrivals, next: None }),
            };
            run(&mut rig, &gate_up::node(&launch, "gate_up", &args).unwrap());
            rig.read_bytes(act).unwrap()
        };
        let together = act(0, ROWS);
        let row_bytes = INTERMEDIATE * 2;
        for (first, rows) in [(0, 1), (5, 1), (9, 2), (60, 3), (127, 6), (254, 4), (299, 1), (3, 20)] {
            let alone = act(first, rows);
            assert!(
                alone == together[first * row_bytes..][..rows * row_bytes],
                "{variant}: rows from {first}"
            );
        }
    }
}
