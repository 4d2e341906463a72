//! Prompt rows against the official pipelines of both generations, with three tokenizers.

use serde::Deserialize;
use std::path::PathBuf;
use warpstep::prompt::{Branch, Generation, Grid, Prompt, PromptRow, build_rows, official_padding};
use warpstep::sampler::Branches;
use warpstep::tokenizer::{ModelTokenIds, Tokenizer};
use warpstep::{Error, Result};

const DOWN_FACTOR: u32 = 16;
const POSITIONS: usize = 8192;

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn tokenizer(name: &str) -> Tokenizer {
    let ids = ModelTokenIds { vocab_size: 528, boi: 501, eoi: 502, image_placeholder_id: 503 };
    Tokenizer::from_dir(&golden(name), ids).unwrap()
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Captions {
    One(String),
    Many(Vec<String>),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Args {
    captions: Captions,
    num_images_per_caption: Option<usize>,
    positive_prompt: Option<String>,
    negative_prompt: Option<String>,
    #[serde(default = "one")]
    cfg: f64,
    #[serde(default = "one")]
    cfg_img: f64,
}

fn one() -> f64 {
    1.0
}

#[derive(Deserialize)]
struct Case {
    generation: String,
    tokenizer: String,
    args: Args,
    /// Width and height of the input picture.
    image_wh: Option<[u32; 2]>,
    target_hw_pixels: [u32; 2],
    input_ids: Vec<Vec<u32>>,
    attention_mask: Vec<Vec<u32>>,
}

#[test]
fn rows_are_those_of_the_official_code() {
    let cases: Vec<Case> =
        serde_json::from_slice(&std::fs::read(golden("cases/prompts.json")).unwrap()).unwrap();
    assert_eq!(cases.len(), 24);
    for (index, case) in cases.iter().enumerate() {
        let tokenizer = tokenizer(&case.tokenizer);
        let pad = tokenizer.pad().unwrap().id;
        let generation = if case.generation == "feb" { Generation::February } else { Generation::August };
        let images: Vec<Grid> =
            case.image_wh.iter().map(|&[w, h]| Grid::from_pixels(w, h, DOWN_FACTOR).unwrap()).collect();
        let [height, width] = case.target_hw_pixels;
        let captions = match &case.args.captions {
            Captions::One(caption) => std::slice::from_ref(caption),
            Captions::Many(captions) => captions,
        };
        // Branch by branch, caption by caption, image by image.
        let repeat = case.args.num_images_per_caption.unwrap_or(1);
        let mut branches: Vec<Vec<PromptRow>> = Vec::new();
        for caption in captions {
            let prompt = Prompt {
                caption,
                positive_prompt: case.args.positive_prompt.as_deref(),
                negative_prompt: case.args.negative_prompt.as_deref(),
                images: &images,
                target: Grid::from_pixels(width, height, DOWN_FACTOR).unwrap(),
                branches: Branches::from_scales(case.args.cfg, case.args.cfg_img).unwrap(),
            };
            let rows = build_rows(&tokenizer, generation, &prompt, POSITIONS).unwrap();
            if captions.len() == 1 {
                for (row, mask) in rows.iter().zip(case.attention_mask.iter().step_by(repeat)) {
                    let padding = mask.iter().filter(|&&real| real == 0).count();
                    assert_eq!(row.official_padding, padding, "case {index}");
                }
            }
            branches.resize(rows.len(), Vec::new());
            for (branch, row) in branches.iter_mut().zip(rows) {
                let placeholders = row.ids.iter().filter(|&&id| id == 503).count();
                let expected: usize = row.images.iter().map(|&image| images[image].tokens()).sum();
                assert_eq!(placeholders, expected, "case {index}: every picture has its places");
                branch.extend(std::iter::repeat_n(row, repeat));
            }
        }
        let rows = branches.concat();
        let padding = official_padding(&rows.iter().map(|row| row.ids.len()).collect::<Vec<_>>());
        let padded: Vec<Vec<u32>> = rows
            .iter()
            .zip(&padding)
            .map(|(row, &padding)| [vec![pad; padding], row.ids.clone()].concat())
            .collect();
        let masks: Vec<Vec<u32>> = rows
            .iter()
            .zip(&padding)
            .map(|(row, &padding)| [vec![0; padding], vec![1; row.ids.len()]].concat())
            .collect();
        assert_eq!(padded, case.input_ids, "case {index}");
        assert_eq!(masks, case.attention_mask, "case {index}");
    }
}

const TARGET: Grid = Grid { height: 4, width: 4 };

fn text_to_image(caption: &str) -> Prompt<'_> {
    Prompt {
        caption,
        positive_prompt: None,
        negative_prompt: None,
        images: &[],
        target: TARGET,
        branches: Branches::Text,
    }
}

fn build(generation: Generation, prompt: &Prompt) -> Result<Vec<PromptRow>> {
    build_rows(&tokenizer("tiny-a"), generation, prompt, POSITIONS)
}

/// Field and reason of the refusal that `result` must be.
fn refusal<T: std::fmt::Debug>(result: Result<T>) -> (&'static str, String) {
    match result {
        Err(Error::InvalidRequest { field, reason }) => (field, reason),
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_empty_prompt_is_the_negative_row() {
    let rows = build(Generation::August, &text_to_image("")).unwrap();
    assert_eq!(rows[0].ids, rows[1].ids);
    assert_eq!(rows[0].ids, [500, 19, 9, 19, 501]);
    assert_eq!((rows[0].branch, rows[1].branch), (Branch::Conditional, Branch::Negative));
}

#[test]
fn image_marks_need_their_pictures() {
    for generation in [Generation::August, Generation::February] {
        let (field, reason) = refusal(build(generation, &text_to_image("a cat <image>")));
        assert!(field == "prompt" && reason.contains("there is none"), "{field} {reason}");
        for (caption, pictures) in [("no mark", 1), ("<image><image>", 1), ("<image>", 2)] {
            let images = vec![TARGET; pictures];
            let prompt = Prompt { images: &images, ..text_to_image(caption) };
            assert_eq!(refusal(build(generation, &prompt)).0, "prompt", "{caption}");
        }
        let prompt = Prompt { positive_prompt: Some("<image>"), ..text_to_image("a") };
        assert_eq!(refusal(build(generation, &prompt)).0, "positive_prompt");
        let prompt = Prompt { negative_prompt: Some("<image>"), ..text_to_image("a") };
        assert_eq!(refusal(build(generation, &prompt)).0, "negative_prompt");
    }
}

#[test]
fn several_pictures_keep_their_order_and_their_sizes() {
    let images = [TARGET, Grid { height: 1, width: 2 }];
    let prompt = Prompt { images: &images, ..text_to_image("<image> and <image> together") };
    let rows = build(Generation::August, &prompt).unwrap();
    assert_eq!(rows, build(Generation::February, &prompt).unwrap());
    assert_eq!(rows[0].images, [0, 1]);
    assert_eq!(rows[0].ids.iter().filter(|&&id| id == 503).count(), 18);
    assert_eq!(rows[1].images, [0; 0]);
    let guided = Prompt { branches: Branches::TextAndImage, ..prompt };
    let rows = build(Generation::February, &guided).unwrap();
    assert_eq!((rows[1].branch, &rows[1].images[..]), (Branch::ImageOnly, &[0, 1][..]));
    assert_eq!(rows[1].ids.iter().filter(|&&id| id == 503).count(), 18);
    let without = Prompt { branches: Branches::TextAndImage, ..text_to_image("a") };
    assert_eq!(refusal(build(Generation::August, &without)).0, "image_guidance_scale");
}

#[test]
fn special_tokens_in_a_users_text_are_refused_by_name() {
    for (token, id) in [("<|image_placeholder|>", 503), ("[PAD]", 499), ("<|im_end|>", 498)] {
        let text = format!("a cat{token}<image>");
        for (field, prompt) in [
            ("prompt", text_to_image(&text[..text.len() - 7])),
            ("positive_prompt", Prompt { positive_prompt: Some(token), ..text_to_image("a") }),
            ("negative_prompt", Prompt { negative_prompt: Some(token), ..text_to_image("a") }),
            ("prompt", Prompt { images: &[TARGET], ..text_to_image(&text) }),
        ] {
            let (found, reason) = refusal(build(Generation::February, &prompt));
            assert_eq!(found, field);
            assert!(reason.contains(&format!("{token} (id {id})")), "{reason}");
        }
    }
}

#[test]
fn rows_beyond_the_position_limit_are_refused_with_numbers() {
    let tokenizer = tokenizer("tiny-a");
    let prompt = text_to_image("Cats over the river");
    let length = build(Generation::August, &prompt).unwrap()[0].ids.len();
    let limit = length + TARGET.tokens();
    build_rows(&tokenizer, Generation::August, &prompt, limit).unwrap();
    let (field, reason) = refusal(build_rows(&tokenizer, Generation::August, &prompt, limit - 1));
    assert_eq!(field, "prompt");
    assert!(reason.contains(&format!("{length} tokens, with 16 image tokens {limit}")), "{reason}");
    let prompt = Prompt { negative_prompt: Some("a much longer text than the caption"), ..prompt };
    assert_eq!(refusal(build_rows(&tokenizer, Generation::August, &prompt, limit)).0, "negative_prompt");
}

#[test]
fn right_to_left_and_combining_characters_survive() {
    for text in ["שלום עולם", "مرحبا", "e\u{301}\u{301}\u{301}", "\u{202e}abc", "👩‍👩‍👧‍👦"]
    {
        let rows = build(Generation::August, &text_to_image(text)).unwrap();
        assert!(rows[0].ids.len() > rows[1].ids.len(), "{text}");
    }
}

#[test]
fn grids_come_from_whole_cells() {
    assert_eq!(Grid::from_pixels(112, 144, 16).unwrap(), Grid { height: 9, width: 7 });
    assert_eq!(refusal(Grid::from_pixels(17, 16, 16)).0, "width");
    assert_eq!(refusal(Grid::from_pixels(16, 0, 16)).0, "height");
    assert_eq!(refusal(Grid::from_pixels(16, 8, 16)).0, "height");
}
