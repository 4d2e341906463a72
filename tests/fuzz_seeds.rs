//! The fuzz targets without a fuzzer: every seed, and some thousand changes of each kind that anybody can repeat. What
//! a fuzzer finds becomes a seed here and a test of its own beside the code that it broke.

#[path = "../fuzz/targets.rs"]
mod targets;

use std::panic::catch_unwind;
use std::path::Path;
use std::time::{Duration, Instant};

const CHANGES: u32 = 1500;

/// Marsaglia's xorshift: the same changes on every machine.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % bound.max(1)
    }

    fn pick<'a, T: ?Sized>(&mut self, values: &[&'a T]) -> &'a T {
        values[self.below(values.len())]
    }
}

fn seeds(target: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds").join(target);
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files.into_iter().map(|file| std::fs::read(file).unwrap()).collect()
}

/// What numbers and texts in such files go wrong with.
const TOKENS: [&str; 16] = [
    "-1",
    "0",
    "1e999",
    "NaN",
    "null",
    "true",
    "\"\"",
    "[]",
    "{}",
    "18446744073709551615",
    "9223372036854775808",
    "4294967296",
    "0.5",
    "\"\\ud800\"",
    "..",
    "\u{202e}",
];

fn changed(random: &mut Random, seeds: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = seeds[random.below(seeds.len())].clone();
    for _ in 0..=random.below(4) {
        let at = random.below(bytes.len());
        let end = at + random.below((bytes.len() - at).min(64) + 1);
        match random.below(8) {
            _ if bytes.is_empty() => bytes.push(random.below(256) as u8),
            0 => bytes[at] ^= 1 << random.below(8),
            1 => bytes[at] = random.below(256) as u8,
            2 => bytes.truncate(at),
            3 => drop(bytes.drain(at..end)),
            4 => bytes.extend_from_within(at..end),
            5 => {
                let other = &seeds[random.below(seeds.len())];
                bytes.truncate(at);
                bytes.extend_from_slice(&other[random.below(other.len())..]);
            }
            6 => {
                // A number of the text, or what stands where it begins.
                let number = bytes[at..].iter().position(u8::is_ascii_digit).map_or(at, |digit| at + digit);
                let length = bytes[number..].iter().take_while(|byte| byte.is_ascii_digit()).count();
                bytes.splice(number..number + length, random.pick(&TOKENS).bytes());
            }
            _ => {
                let value = [0u64, 1, u64::MAX, 1 << 63, 1 << 32, u64::from(u32::MAX)][random.below(6)];
                let width = [1, 2, 4, 8][random.below(4)].min(bytes.len() - at);
                bytes[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
            }
        }
    }
    bytes
}

#[track_caller]
fn run(name: &str) {
    let (_, target) = targets::TARGETS.iter().find(|(target, _)| *target == name).unwrap();
    let seeds = seeds(name);
    assert!(!seeds.is_empty());
    let mut slowest = (Duration::ZERO, String::new());
    let mut give = |bytes: &[u8], what: String| {
        let start = Instant::now();
        let result = catch_unwind(|| target(bytes));
        assert!(result.is_ok(), "{what} of {name}: {}", bytes.escape_ascii());
        slowest = slowest.clone().max((start.elapsed(), what));
    };
    for (index, seed) in seeds.iter().enumerate() {
        give(seed, format!("seed {index}"));
    }
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for index in 0..CHANGES {
        give(&changed(&mut random, &seeds), format!("change {index}"));
    }
    assert!(slowest.0 < Duration::from_secs(5), "{slowest:?}");
}

#[test]
fn safetensors() {
    run("safetensors");
}

#[test]
fn index() {
    run("index");
}

#[test]
fn pt() {
    run("pt");
}

#[test]
fn config() {
    run("config");
}

#[test]
fn tokenizer() {
    run("tokenizer");
}

#[test]
fn request() {
    run("request");
}

/// Seeds that are refused at the first byte would leave the readers behind it untried.
#[test]
fn the_first_seed_of_every_target_is_accepted() {
    use warpstep::model::config::ModelConfig;
    use warpstep::request::RequestFields;
    use warpstep::weights::{Checkpoint, OpenOptions};
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds");
    Checkpoint::open(folder.join("safetensors/two.safetensors"), OpenOptions::default()).unwrap();
    Checkpoint::open(folder.join("pt/state_dict.pt"), OpenOptions::default()).unwrap();
    let text = |name: &str| std::fs::read_to_string(folder.join(name)).unwrap();
    ModelConfig::parse(Path::new("x"), &text("config/model.json")).unwrap();
    RequestFields::from_json(&text("request/all.json")).unwrap();
    targets::load_tokenizer(text("tokenizer/bytes.json").as_bytes()).unwrap();
}

// Findings.

/// The crate `tokenizers` 0.23.2 panics where its decoder's reader meets text that is no JSON.
#[test]
fn a_tokenizer_whose_decoder_is_no_json_is_refused() {
    let seed = String::from_utf8(seeds("tokenizer").remove(0)).unwrap();
    let at = seed.find("\"decoder\"").unwrap();
    let broken = seed[..at].to_owned() + &seed[at..].replacen("\"trim_offsets\":", "\"trim_offsets\"8", 1);
    assert_ne!(broken, seed);
    match targets::load_tokenizer(broken.as_bytes()) {
        Err(warpstep::Error::Tokenizer { reason, .. }) => {
            assert!(reason.contains("expected `:`"), "{reason}")
        }
        other => panic!("{other:?}"),
    }
}
