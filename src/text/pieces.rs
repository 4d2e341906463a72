//! Tokens to text as they come: a byte-level token may hold half a character, which waits for its other half.

use crate::error::Result;
use crate::tokenizer::Tokenizer;

/// What a decoder writes for bytes that are no character, so also for the first bytes of one.
const REPLACEMENT: char = '\u{fffd}';

/// Tokens whose text is not all out.
#[derive(Default)]
pub(super) struct Pieces {
    waiting: Vec<u32>,
    /// Bytes of their text that are out.
    sent: usize,
}

impl Pieces {
    /// The text that `id` completes; often its own, sometimes none. The pieces of a text together are what the
    /// tokenizer decodes it to at once.
    pub(super) fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> Result<String> {
        self.waiting.push(id);
        let text = tokenizer.decode(&self.waiting, false)?;
        let whole = text.strip_suffix(REPLACEMENT);
        let piece = text.get(self.sent..whole.unwrap_or(&text).len()).unwrap_or("").to_owned();
        match whole {
            Some(whole) => self.sent = whole.len(),
            None => *self = Pieces::default(),
        }
        Ok(piece)
    }

    /// What is left at the end: half a character, as the tokenizer writes one.
    pub(super) fn finish(&mut self, tokenizer: &Tokenizer) -> Result<String> {
        let text = tokenizer.decode(&self.waiting, false)?;
        let piece = text.get(self.sent..).unwrap_or("").to_owned();
        *self = Pieces::default();
        Ok(piece)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::ModelTokenIds;
    use std::path::Path;

    fn tokenizer() -> Tokenizer {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny-a");
        let ids = ModelTokenIds { vocab_size: 528, boi: 501, eoi: 502, image_placeholder_id: 503 };
        Tokenizer::from_dir(&dir, ids).unwrap()
    }

    fn pieces(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<String> {
        let mut pieces = Pieces::default();
        let mut all: Vec<String> = ids.iter().map(|&id| pieces.push(tokenizer, id).unwrap()).collect();
        all.push(pieces.finish(tokenizer).unwrap());
        all
    }

    #[test]
    fn characters_are_never_split() {
        let tokenizer = tokenizer();
        let text = "a 红色 circle, naïve \u{1f680}\u{1f680} end";
        let ids = tokenizer.encode(text, false).unwrap();
        let all = pieces(&tokenizer, &ids);
        assert_eq!(all.concat(), text);
        assert!(all.iter().all(|piece| !piece.contains(REPLACEMENT)));
        assert!(all.iter().any(String::is_empty), "no token held half a character: nothing was tested");
        assert_eq!(all.last().unwrap(), "");
    }

    #[test]
    fn bytes_that_are_no_character_come_out_as_the_tokenizer_writes_them() {
        let tokenizer = tokenizer();
        let rocket = tokenizer.encode("\u{1f680}", false).unwrap();
        assert!(rocket.len() > 1);
        let cut = &rocket[..rocket.len() - 1];
        let space = tokenizer.encode(" a", false).unwrap();
        for ids in [cut.to_vec(), [cut, cut, cut, &space[..]].concat(), [&space[..], cut].concat()] {
            assert_eq!(pieces(&tokenizer, &ids).concat(), tokenizer.decode(&ids, false).unwrap(), "{ids:?}");
        }
    }
}
