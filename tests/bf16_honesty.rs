//! How much bf16 costs, measured free running: the engine's mean error against the f32 twin may be at most twice
//! that of the official bf16 run (with f32 rotation frequencies) on the same draws.

use std::path::Path;
use std::sync::Arc;
use warpstep::device::Device;
use warpstep::device::emulated::{EmulatedDevice, EmulatedOptions};
use warpstep::ops::DType;
use warpstep::verify::{CaseFile, Models, VerifyOptions, free_run};

/// The recorded tensor, real prompt rows only, images channels last: as `free_run` returns it.
fn recorded(case: &CaseFile, name: &str) -> Vec<f32> {
    let tensor = case.tensor(name).unwrap();
    match name {
        "prefill.norm" => {
            let (shape, mask) = case.integers("attention_mask").unwrap();
            let width = tensor.values.len() / (shape[0] * shape[1]);
            let rows = tensor.values.chunks_exact(width).zip(&mask);
            rows.filter(|(_, m)| **m == 1).flat_map(|(row, _)| row.to_vec()).collect()
        }
        "image" => {
            let [images, channels, height, width] = tensor.shape[..] else { panic!("{:?}", tensor.shape) };
            let pixels = height * width;
            let mut values = Vec::with_capacity(tensor.values.len());
            for image in 0..images {
                for p in 0..pixels {
                    values.extend((0..channels).map(|c| tensor.values[(image * channels + c) * pixels + p]));
                }
            }
            values
        }
        _ => tensor.values,
    }
}

fn mean_error(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    assert!(!a.is_empty() && a.iter().all(|v| v.is_finite()));
    a.iter().zip(b).map(|(x, y)| f64::from((x - y).abs())).sum::<f64>() / a.len() as f64
}

#[test]
fn bf16_errs_at_most_twice_as_much_as_the_official_bf16_run() {
    let cases = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/cases");
    let device: Arc<dyn Device> = Arc::new(EmulatedDevice::new(EmulatedOptions::default()).unwrap());
    let options = VerifyOptions::default();
    let twin = CaseFile::open(&cases.join("t2i_aug_cfg_f32_twin.safetensors")).unwrap();
    let official = CaseFile::open(&cases.join("t2i_aug_cfg_bf16_f32rope.safetensors")).unwrap();
    let path = cases.join("t2i_aug_cfg_bf16_f32rope.safetensors");
    let ours = free_run(&path, &device, &options, &mut Models::default(), DType::Bf16).unwrap();
    let table: serde_json::Value =
        serde_json::from_slice(&std::fs::read(cases.join("bf16_twin.json")).unwrap()).unwrap();
    let names: Vec<&String> = table["bf16_vs_f32_max_mean_scale"].as_object().unwrap().keys().collect();
    assert!(names.len() >= 5);
    for name in names {
        let exact = recorded(&twin, name);
        let theirs = mean_error(&recorded(&official, name), &exact);
        let mine = mean_error(&ours[name.as_str()], &exact);
        println!("{name}: engine {mine:.3e}, official {theirs:.3e}, ratio {:.2}", mine / theirs);
        assert!(theirs > 0.0 && mine <= 2.0 * theirs, "{name}: {mine} against {theirs}");
    }
}
