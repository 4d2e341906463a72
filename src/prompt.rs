//! From captions to rows of token ids, one per guidance branch: the layout that the model was trained on.
//!
//! A row is `[pictures and text] <|image_area|> h * w <|begin_of_image|>`, and generation goes on from there. The official
//! code pads the rows of a batch on the left to one length; here rows are ragged and carry the padding they would have
//! had as a number, which only `verify` needs. This module knows text, grids and branches, and nothing of pixels.

use crate::error::{Error, Result};
use crate::sampler::Branches;
use crate::tokenizer::{
    BEGIN_OF_REFINEMENT, BEGIN_OF_THINKING, END_OF_REFINEMENT, END_OF_THINKING, Tokenizer,
};
use std::borrow::Cow;

/// Which of the two official pipelines is followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Generation {
    /// August 2025: text as it is.
    August,
    /// February 2026: the tokenizer's bos text, if it has one, in front of every row.
    February,
}

/// Stands in a caption for a picture. Not a token of the vocabulary.
pub const IMAGE_MARK: &str = "<image>";

/// Size of a picture in tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Grid {
    /// Rows of tokens.
    pub height: u32,
    /// Tokens in a row.
    pub width: u32,
}

impl Grid {
    /// The grid of a picture in pixels. `down_factor`: pixels per token and side, 16 for the released models.
    pub fn from_pixels(width: u32, height: u32, down_factor: u32) -> Result<Grid> {
        for (field, side) in [("width", width), ("height", height)] {
            if side == 0 || !side.is_multiple_of(down_factor) {
                let reason = format!("is {side} pixels; it must be a positive multiple of {down_factor}");
                return Err(Error::request(field, reason));
            }
        }
        Ok(Grid { height: height / down_factor, width: width / down_factor })
    }

    /// Number of image tokens.
    pub fn tokens(self) -> usize {
        self.height as usize * self.width as usize
    }
}

/// The caption with a mark per picture in front, if it has none.
pub fn with_marks(caption: &str, pictures: usize) -> Cow<'_, str> {
    if pictures == 0 || caption.contains(IMAGE_MARK) {
        return Cow::Borrowed(caption);
    }
    Cow::Owned(IMAGE_MARK.repeat(pictures) + caption)
}

/// What one row conditions on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Branch {
    /// Caption and pictures.
    Conditional,
    /// Pictures and negative prompt.
    ImageOnly,
    /// Negative prompt alone.
    Negative,
}

/// What the rows of one caption are made of.
#[derive(Clone, Copy, Debug)]
pub struct Prompt<'a> {
    /// The caption, with one [`IMAGE_MARK`] per picture.
    pub caption: &'a str,
    /// Added to the caption after a space; not to the other rows.
    pub positive_prompt: Option<&'a str>,
    /// Text of the rows without caption.
    pub negative_prompt: Option<&'a str>,
    /// Input pictures, in the order of their marks. Empty for text to image.
    pub images: &'a [Grid],
    /// The picture to be generated.
    pub target: Grid,
    /// Which rows there are.
    pub branches: Branches,
}

/// The token ids of one branch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PromptRow {
    /// What the row conditions on.
    pub branch: Branch,
    /// Ids, without padding; picture positions hold the placeholder's id.
    pub ids: Vec<u32>,
    /// Which input pictures fill the placeholders, in order.
    pub images: Vec<usize>,
    /// Padding tokens that the official code would put in front, if these rows were its batch.
    pub official_padding: usize,
}

/// The rows of a caption, conditional first, as `generation` builds them. `max_positions`: most tokens in a row, the
/// generated ones included.
///
/// Text in which the tokenizer sees a special token is refused; the caption alone may hold those around a thought or a
/// refined prompt, which a model writes before it draws. The official code lets such text through, so that a
/// caption can close a picture or open another: a way to garbage, and to other people's rows.
pub fn build_rows(
    tokenizer: &Tokenizer,
    generation: Generation,
    prompt: &Prompt,
    max_positions: usize,
) -> Result<Vec<PromptRow>> {
    check_text(tokenizer, prompt)?;
    let bos = match (generation, tokenizer.bos()) {
        (Generation::February, Some(bos)) => bos.text.as_str(),
        _ => "",
    };
    let prefix = target_prefix(tokenizer, prompt.target)?;
    let row = |branch, text: String, images: Vec<usize>| -> Result<PromptRow> {
        let mut ids = tokenizer.encode(&format!("{bos}{text}"), true)?;
        ids.extend_from_slice(&prefix);
        Ok(PromptRow { branch, ids, images, official_padding: 0 })
    };

    let negative = prompt.negative_prompt.unwrap_or("");
    let all_images: Vec<usize> = (0..prompt.images.len()).collect();
    let mut rows = vec![row(Branch::Conditional, conditional_text(prompt), all_images.clone())?];
    if prompt.branches == Branches::TextAndImage {
        if prompt.images.is_empty() {
            return Err(Error::request("image_guidance_scale", "is above 1, but there is no input picture"));
        }
        // The official row has the first picture's placeholders, yet is given every picture. For one that is this.
        let pictures: String = prompt.images.iter().map(|&image| image_string(image)).collect();
        rows.push(row(Branch::ImageOnly, pictures + negative, all_images.clone())?);
    }
    if prompt.branches != Branches::Conditional {
        rows.push(row(Branch::Negative, negative.to_owned(), vec![])?);
    }

    for row in &rows {
        let total = row.ids.len() + prompt.target.tokens();
        if total > max_positions {
            let field = if row.branch == Branch::Conditional { "prompt" } else { "negative_prompt" };
            let reason = format!(
                "gives a row of {} tokens, with {} image tokens {total}; the limit is {max_positions}",
                row.ids.len(),
                prompt.target.tokens()
            );
            return Err(Error::request(field, reason));
        }
    }
    let padding = official_padding(&rows.iter().map(|row| row.ids.len()).collect::<Vec<_>>());
    for (row, padding) in rows.iter_mut().zip(padding) {
        row.official_padding = padding;
    }
    Ok(rows)
}

/// The padding that the official code puts in front of rows of these lengths: up to the longest of the batch.
pub fn official_padding(lengths: &[usize]) -> Vec<usize> {
    let longest = lengths.iter().copied().max().unwrap_or(0);
    lengths.iter().map(|length| longest - length).collect()
}

/// What follows the text of every row: the area of the picture to come, and begin-of-image.
///
/// The official code drops the first id whenever a bos token is defined, on the belief that the tokenizer put it there.
/// Where it does not, `<|image_area|>` itself is lost. Rows are built the same here: the model was trained on them.
fn target_prefix(tokenizer: &Tokenizer, target: Grid) -> Result<Vec<u32>> {
    let mut ids = tokenizer.encode(&Tokenizer::image_area(target.height, target.width), true)?;
    if tokenizer.bos().is_some() && !ids.is_empty() {
        ids.remove(0);
    }
    ids.push(tokenizer.model_ids().boi);
    Ok(ids)
}

/// The caption with its pictures' strings and the positive prompt.
fn conditional_text(prompt: &Prompt) -> String {
    let mut text = with_pictures(prompt.caption, prompt.images);
    if let Some(positive) = prompt.positive_prompt
        && !positive.is_empty()
    {
        text.push(' ');
        text += positive;
    }
    text
}

/// A text with the string of a picture for each of its marks.
fn with_pictures(text: &str, images: &[Grid]) -> String {
    let mut pieces = text.split(IMAGE_MARK);
    let mut whole = pieces.next().unwrap_or("").to_owned();
    for (piece, image) in pieces.zip(images) {
        whole += &image_string(*image);
        whole += piece;
    }
    whole
}

fn image_string(image: Grid) -> String {
    Tokenizer::image_string(image.height, image.width)
}

/// What a caption may hold of the special tokens.
const WRITTEN: [&str; 4] = [BEGIN_OF_THINKING, END_OF_THINKING, BEGIN_OF_REFINEMENT, END_OF_REFINEMENT];

/// The ids of a text that is to be continued, its pictures' placeholders included: plain tokenization, as the official
/// text path does it. `opening`: a special token put at the end. At most `max_tokens` of them.
pub fn text_row(
    tokenizer: &Tokenizer,
    text: &str,
    images: &[Grid],
    opening: Option<&str>,
    max_tokens: usize,
) -> Result<Vec<u32>> {
    check_marks(text, images.len())?;
    check_specials(tokenizer, "prompt", text)?;
    let mut ids = tokenizer.encode(&with_pictures(text, images), true)?;
    if let Some(opening) = opening {
        let missing = || Error::request("opening", format!("this model's tokenizer has no {opening}"));
        ids.push(tokenizer.special_id(opening).ok_or_else(missing)?);
    }
    match ids.len() {
        0 => Err(Error::request("prompt", "is empty: there is nothing to continue")),
        count if count > max_tokens => {
            let reason = format!("gives {count} tokens; with those to be written at most {max_tokens} fit");
            Err(Error::request("prompt", reason))
        }
        _ => Ok(ids),
    }
}

fn check_marks(caption: &str, pictures: usize) -> Result<()> {
    let marks = caption.matches(IMAGE_MARK).count();
    if pictures == 0 && marks > 0 {
        let reason = format!("contains {IMAGE_MARK}, which stands for an input picture; there is none");
        return Err(Error::request("prompt", reason));
    }
    if marks != pictures {
        let reason = format!("contains {IMAGE_MARK} {marks} times for {pictures} input pictures");
        return Err(Error::request("prompt", reason));
    }
    Ok(())
}

fn check_text(tokenizer: &Tokenizer, prompt: &Prompt) -> Result<()> {
    check_marks(prompt.caption, prompt.images.len())?;
    for (field, text) in [
        ("prompt", Some(prompt.caption)),
        ("positive_prompt", prompt.positive_prompt),
        ("negative_prompt", prompt.negative_prompt),
    ] {
        let text = text.unwrap_or("");
        if field != "prompt" && text.contains(IMAGE_MARK) {
            return Err(Error::request(
                field,
                format!("contains {IMAGE_MARK}; pictures belong into the prompt"),
            ));
        }
        check_specials(tokenizer, field, text)?;
    }
    Ok(())
}

/// Refuses special tokens between the marks of pictures.
fn check_specials(tokenizer: &Tokenizer, field: &'static str, text: &str) -> Result<()> {
    let allowed: &[&str] = if field == "prompt" { &WRITTEN } else { &[] };
    for piece in text.split(IMAGE_MARK) {
        if let Some(token) = tokenizer.special_token_but(piece, allowed)? {
            let reason = format!(
                "contains the special token {} (id {}), which would change the layout of the row",
                token.text, token.id
            );
            return Err(Error::request(field, reason));
        }
    }
    Ok(())
}
