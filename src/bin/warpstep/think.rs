//! `--think` and `--refine`: the model writes before it draws.

use crate::console::printable;
use anyhow::Result;
use clap::Args;
use serde::Serialize;
use warpstep::Error;
use warpstep::engine::Engine;
use warpstep::event::{CancelToken, Control, Event};
use warpstep::request::GenerateRequest;
use warpstep::session::Session;
use warpstep::text::{Opening, RandomSampling, TextEnd, TextRequest, TextSampling};

/// What the model writes before it draws.
#[derive(Args)]
pub struct ThinkArgs {
    /// Let the model think first: it continues the caption from <|begin_of_thinking|>, and what it writes becomes part
    /// of the caption. The text is shown on stderr and stored in the PNG.
    #[arg(long, group = "writing", conflicts_with = "plan")]
    think: bool,

    /// Let the model refine the caption first: the same from <|begin_of_prompt_refinement|>.
    #[arg(long, group = "writing", conflicts_with = "plan")]
    refine: bool,

    /// The caption to draw, made of {prompt} and of the {text} that the model wrote. The official format is
    /// unpublished [default: {prompt}, then {text} between the two special tokens of --think or --refine].
    #[arg(long, value_name = "TEXT", requires = "writing")]
    think_template: Option<String>,

    /// Most tokens that the model writes before it draws.
    #[arg(long, value_name = "N", requires = "writing", default_value_t = 256)]
    think_tokens: u32,

    /// Draw what is written instead of taking the most probable token, unless it is 0: see `warpstep complete --help`.
    #[arg(long, value_name = "F", requires = "writing")]
    think_temperature: Option<f64>,
}

/// What the model wrote, as the PNG remembers it. Its `request.prompt` is the caption made of it, so that the picture
/// can be made again without writing again.
#[derive(Serialize)]
pub struct Thought {
    opening: Opening,
    /// The caption that was given.
    prompt: String,
    text: String,
    template: String,
    end: TextEnd,
    /// Only if the text was drawn; its seed is the picture's.
    temperature: Option<f64>,
}

/// Puts prompt and text in the places of their marks. Marks inside of either stay what they are.
fn fill(template: &str, prompt: &str, text: &str) -> String {
    let mut filled = String::new();
    let mut rest = template;
    while let Some(start) = rest.find('{') {
        filled += &rest[..start];
        rest = &rest[start..];
        let (mark, value) = match rest {
            _ if rest.starts_with(PROMPT) => (PROMPT, prompt),
            _ if rest.starts_with(TEXT) => (TEXT, text),
            _ => ("{", "{"),
        };
        filled += value;
        rest = &rest[mark.len()..];
    }
    filled + rest
}

const PROMPT: &str = "{prompt}";
const TEXT: &str = "{text}";

impl ThinkArgs {
    fn opening(&self) -> Option<Opening> {
        match (self.think, self.refine) {
            (true, _) => Some(Opening::Thinking),
            (_, true) => Some(Opening::Refinement),
            _ => None,
        }
    }

    /// What the text is drawn with; none where it is greedy, as at temperature 0.
    fn temperature(&self) -> Option<f64> {
        self.think_temperature.filter(|&temperature| temperature != 0.0)
    }

    /// Whether the LM head is needed.
    pub fn writes(&self) -> bool {
        self.opening().is_some()
    }

    /// Checks what needs no model.
    pub fn check(&self) -> Result<()> {
        match &self.think_template {
            Some(template) if !template.contains(TEXT) => {
                let reason = format!("has no {TEXT} mark: what the model writes would have no effect");
                Err(Error::request("think_template", reason).into())
            }
            _ => Ok(()),
        }
    }

    /// Checks what the model would be asked to write to the caption of `picture`.
    pub fn plan(&self, engine: &Engine, picture: &GenerateRequest) -> Result<()> {
        if let Some(opening) = self.opening() {
            engine.plan_text(&self.request(opening, picture))?;
        }
        Ok(())
    }

    fn request(&self, opening: Opening, picture: &GenerateRequest) -> TextRequest {
        let mut request = TextRequest::new(&picture.prompt);
        request.images = picture.images.clone();
        request.max_tokens = self.think_tokens;
        request.opening = Some(opening);
        request.seed = picture.seed;
        if let Some(temperature) = self.temperature() {
            let random = RandomSampling { temperature, ..RandomSampling::default() };
            request.sampling = TextSampling::Random(random);
        }
        request
    }

    /// Lets the model write to the caption of `picture`, shows it, and makes it the caption to draw; `None` where it
    /// was not asked to.
    pub fn apply(&self, session: &mut Session, picture: &mut GenerateRequest) -> Result<Option<Thought>> {
        let Some(opening) = self.opening() else { return Ok(None) };
        let request = self.request(opening, picture);
        let [begin, end] = opening.marks();
        eprint!("{begin}");
        let made = session.complete(&request, &CancelToken::new(), &mut |event| {
            if let Event::Text { piece, .. } = event {
                eprint!("{}", printable(piece));
            }
            Control::Continue
        });
        eprintln!();
        let made = made?;
        if made.end == TextEnd::MaxTokens {
            eprintln!("the text was cut off after {} tokens", made.ids.len());
        }
        let template = self.think_template.clone().unwrap_or_else(|| format!("{PROMPT}{begin}{TEXT}{end}"));
        let caption = fill(&template, &picture.prompt, &made.text);
        Ok(Some(Thought {
            opening,
            prompt: std::mem::replace(&mut picture.prompt, caption),
            text: made.text,
            template,
            end: made.end,
            temperature: self.temperature(),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_are_filled_once() {
        assert_eq!(fill("{prompt}<a>{text}<b>", "p", "t"), "p<a>t<b>");
        assert_eq!(fill("{text}", "p", "{prompt} {text}"), "{prompt} {text}");
        assert_eq!(fill("{{text}} {other} {", "p", "t"), "{t} {other} {");
    }
}
