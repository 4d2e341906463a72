//! Files of prompts: one a line.

use anyhow::{Context, Result};
use std::fs::File;
use std::io::Read;
use std::path::Path;
use warpstep::Error;

/// Longest file.
const MAX_BYTES: u64 = 16 << 20;

/// A prompt, and where it stands.
#[derive(Debug)]
pub struct Prompt {
    /// The text, without the blanks around it.
    pub text: String,
    /// `FILE:LINE`, counted from 1; none for a prompt of the command line.
    pub place: Option<String>,
}

impl Prompt {
    /// Says where the prompt stands, in an error about it.
    pub fn about<T>(&self, result: Result<T>) -> Result<T> {
        match &self.place {
            Some(place) => result.with_context(|| place.clone()),
            None => result,
        }
    }
}

/// Reads the prompts of a file. Blanks around a line, empty lines, and lines that start with `#` are passed over.
pub fn read_prompts(path: &Path) -> Result<Vec<Prompt>> {
    let refuse = |reason: String| Error::request("prompts", format!("{}: {reason}", path.display()));
    let mut bytes = Vec::new();
    // A pipe will do; its end need not come.
    let file = File::open(path).map_err(Error::io(path))?;
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(Error::io(path))?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(refuse(format!("has more than {MAX_BYTES} bytes")).into());
    }
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&bytes);
    let mut prompts = Vec::new();
    for (index, line) in bytes.split(|&byte| byte == b'\n').enumerate() {
        let place = format!("{}:{}", path.display(), index + 1);
        let text = std::str::from_utf8(line)
            .map_err(|e| Error::request("prompts", format!("{place}: is not UTF-8: {e}")))?
            .trim();
        if !text.is_empty() && !text.starts_with('#') {
            prompts.push(Prompt { text: text.into(), place: Some(place) });
        }
    }
    match prompts.is_empty() {
        true => Err(refuse("holds no prompt".into()).into()),
        false => Ok(prompts),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8]) -> Result<Vec<(String, String)>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.txt");
        std::fs::write(&path, bytes).unwrap();
        let place = |p: &Prompt| p.place.as_ref().unwrap().rsplit_once('/').unwrap().1.to_owned();
        Ok(read_prompts(&path)?.iter().map(|p| (p.text.clone(), place(p))).collect())
    }

    #[test]
    fn a_prompt_a_line_without_blanks_empty_lines_and_comments() {
        let found = read(b"\xef\xbb\xbfa red circle\r\n\n  # not this\n\t two # stars \n").unwrap();
        let expected = [("a red circle", "p.txt:1"), ("two # stars", "p.txt:4")];
        assert_eq!(found, expected.map(|(text, place)| (text.to_owned(), place.to_owned())));
    }

    #[test]
    fn what_is_no_list_of_prompts_is_refused_with_file_and_line() {
        assert!(read(b"fine\n\xff\n").unwrap_err().to_string().contains("p.txt:2: is not UTF-8"));
        for nothing in [&b""[..], b"\n \n# a comment"] {
            assert!(read(nothing).unwrap_err().to_string().contains("holds no prompt"));
        }
        assert!(read_prompts(Path::new("/no/such/file")).unwrap_err().to_string().contains("/no/such/file"));
    }
}
