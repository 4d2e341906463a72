//! Every case of every op on the emulated device, against the slow references, with NaN around every buffer.

use std::sync::Arc;
use warpstep::device::emulated::{AsyncCopies, EmulatedDevice, EmulatedOptions, Order, build_kind};
use warpstep::ops::harness::{Rig, Scale};
use warpstep::ops::registry;

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
