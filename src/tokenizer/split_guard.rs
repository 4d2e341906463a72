//! Catches split patterns that give up.
//!
//! The pre-tokenizer's regular expressions come with the checkpoint and backtrack. The engine that runs them stops after
//! a million steps, and the crate `tokenizers` takes that for "no more matches": the rest of the text stays in one piece and
//! the ids come out wrong without a word. So each pattern is run once more over the pieces it will see, and giving up is
//! an error. Prompts are short, the cost does not show.

use fancy_regex::Regex;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::split::SplitPattern;
use tokenizers::{OffsetReferential, OffsetType, PreTokenizer};

/// One compiled regular expression per pre-tokenizer step that has one.
pub(super) struct SplitGuard {
    patterns: Vec<Option<Regex>>,
}

impl SplitGuard {
    pub(super) fn new(tokenizer: &tokenizers::Tokenizer) -> Result<SplitGuard, String> {
        let compile = |step: &PreTokenizerWrapper| match step {
            PreTokenizerWrapper::Split(split) => match &split.pattern {
                SplitPattern::Regex(pattern) => Regex::new(pattern).map(Some).map_err(|e| e.to_string()),
                SplitPattern::String(_) => Ok(None),
            },
            PreTokenizerWrapper::Sequence(_) => Err("a pre-tokenizer sequence inside another".to_string()),
            _ => Ok(None),
        };
        Ok(SplitGuard { patterns: steps(tokenizer).iter().map(compile).collect::<Result<_, _>>()? })
    }

    /// Whether every pattern gets to the end of what it is given of `text`.
    pub(super) fn check(&self, tokenizer: &tokenizers::Tokenizer, text: &str) -> Result<(), String> {
        if self.patterns.iter().all(Option::is_none) {
            return Ok(());
        }
        let vocabulary = tokenizer.get_added_vocabulary();
        let mut pieces = vocabulary.extract_and_normalize(tokenizer.get_normalizer(), text);
        for (step, pattern) in steps(tokenizer).iter().zip(&self.patterns) {
            if let Some(pattern) = pattern {
                // Pieces that hold tokens already are special tokens: no step touches them.
                let open = pieces.get_splits(OffsetReferential::Normalized, OffsetType::Byte);
                for (piece, _, _) in open.into_iter().filter(|(_, _, tokens)| tokens.is_none()) {
                    if let Some(Err(e)) = pattern.find_iter(piece).find(|found| found.is_err()) {
                        return Err(format!("the pre-tokenizer's split pattern fails on this text: {e}"));
                    }
                }
            }
            step.pre_tokenize(&mut pieces).map_err(|e| e.to_string())?;
        }
        Ok(())
    }
}

fn steps(tokenizer: &tokenizers::Tokenizer) -> &[PreTokenizerWrapper] {
    match tokenizer.get_pre_tokenizer() {
        None => &[],
        Some(PreTokenizerWrapper::Sequence(sequence)) => sequence.as_ref(),
        Some(single) => std::slice::from_ref(single),
    }
}
