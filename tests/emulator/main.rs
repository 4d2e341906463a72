//! The emulated device itself: every primitive of `dev.cuh` against values computed here (`primitives`), the
//! behaviour of the device (`device`), what each build says of planted bugs (`bugs`), and how a generation ends that meets
//! one (`variants`). The build is the one of
//! `WARPSTEP_EMULATOR`; `tools/emulator-test.sh` runs the others. Kernels: `kernels/emulator/bugs`.

mod bugs;
mod device;
mod primitives;
mod rig;
#[path = "../support/streams.rs"]
mod streams;
mod variants;
