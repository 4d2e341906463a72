//! Text generation: against the recorded run of the official code, its statistics, checkpoints of other layouts,
//! refusals; and `complete`, `--think` and `--refine` as a user runs them.

mod checkpoints;
mod cli;
mod generation;
mod requests;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use warpstep::device::emulated::{EmulatedDevice, EmulatedOptions};
use warpstep::engine::{Engine, EngineOptions, ModelSource};
use warpstep::event::{CancelToken, Control};
use warpstep::ops::DType;
use warpstep::text::{Completion, TextRequest};
use warpstep::verify::CaseFile;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn load(source: &ModelSource, options: EngineOptions) -> warpstep::Result<Arc<Engine>> {
    let device = Arc::new(EmulatedDevice::new(EmulatedOptions::default()).unwrap());
    Engine::load(source, device, options).map(Arc::new)
}

fn with_text() -> EngineOptions {
    EngineOptions { text: true, ..EngineOptions::default() }
}

fn demo() -> Arc<Engine> {
    load(&ModelSource::Demo, with_text()).unwrap()
}

/// The random model of the recorded case, in f32.
fn tiny() -> Arc<Engine> {
    let options = EngineOptions { dtype: DType::F32, ..with_text() };
    load(&ModelSource::Dir(golden("tiny-a")), options).unwrap()
}

fn recorded() -> CaseFile {
    CaseFile::open(&golden("cases/text_tiny-a.safetensors")).unwrap()
}

/// The first text of the recorded case.
fn recorded_prompt() -> String {
    recorded().meta["texts"][0].as_str().unwrap().to_owned()
}

fn complete(engine: &Arc<Engine>, request: &TextRequest) -> warpstep::Result<Completion> {
    engine.session().complete(request, &CancelToken::new(), &mut |_| Control::Continue)
}
