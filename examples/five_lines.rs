//! A picture in five lines: `cargo run --release --example five_lines`.

use std::{path::Path, sync::Arc};
use warpstep::device::emulated::{EmulatedDevice, EmulatedOptions};
use warpstep::engine::{Engine, EngineOptions, ModelSource};
use warpstep::{event::CancelToken, event::Control, image::write_png};

fn main() -> warpstep::Result<()> {
    let device = Arc::new(EmulatedDevice::new(EmulatedOptions::default())?);
    let engine = Arc::new(Engine::load(&ModelSource::Demo, device, EngineOptions::default())?);
    let request = engine.request("a red circle on a blue background")?;
    let result = engine.session().generate(&request, &CancelToken::new(), &mut |_| Control::Continue)?;
    write_png(Path::new("target/five_lines.png"), &result.images[0], None)
}
