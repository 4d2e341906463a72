//! What the program prints: machine output on stdout, human text on stderr.
//!
//! `println!` and its sisters of the standard library panic where a stream takes no more: a crash, by the looks of it,
//! and the end of a picture whose progress nobody reads. The macros here have their names and stand in front of them in
//! the whole program, so that no line of it needs to think of this.

use std::fmt::Arguments;
use std::io::{ErrorKind, Result, Write};

/// Prints to stdout. The program ends where that fails.
pub fn out(text: Arguments<'_>) {
    let mut stdout = std::io::stdout().lock();
    // What is still in the buffer when the program ends would be lost without a word.
    written(stdout.write_fmt(text).and_then(|()| stdout.flush()));
}

/// Ends the program if stdout took no more: in silence where its reader has seen enough, as in `warpstep | head`, with
/// an error where the rest is lost, as on a full disk.
pub fn written(result: Result<()>) {
    let Err(error) = result else { return };
    if error.kind() == ErrorKind::BrokenPipe {
        std::process::exit(0);
    }
    err(format_args!("error: stdout: {error}\n"));
    std::process::exit(1);
}

/// Prints to stderr. It is for people: where nobody reads it the work goes on.
pub fn err(text: Arguments<'_>) {
    let _ = std::io::stderr().lock().write_fmt(text);
}

/// Text of a file or a model, with what could move a terminal's cursor or hide other text escaped. Lines stay lines.
pub fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        let hidden = matches!(c, '\u{200b}' | '\u{200e}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}');
        match c {
            '\n' | '\t' => shown.push(c),
            _ if hidden || c.is_control() => shown.extend(c.escape_unicode()),
            _ => shown.push(c),
        }
    }
    shown
}

macro_rules! print {
    ($($text:tt)*) => { $crate::console::out(format_args!($($text)*)) };
}

macro_rules! println {
    () => { $crate::console::out(format_args!("\n")) };
    ($($text:tt)*) => { $crate::console::out(format_args!("{}\n", format_args!($($text)*))) };
}

macro_rules! eprint {
    ($($text:tt)*) => { $crate::console::err(format_args!($($text)*)) };
}

macro_rules! eprintln {
    () => { $crate::console::err(format_args!("\n")) };
    ($($text:tt)*) => { $crate::console::err(format_args!("{}\n", format_args!($($text)*))) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_of_others_moves_no_cursor() {
        assert_eq!(printable("a\nb\tc \"é\" \\ 🐈"), "a\nb\tc \"é\" \\ 🐈");
        assert_eq!(printable("\u{1b}[2J\r\u{9b}"), "\\u{1b}[2J\\u{d}\\u{9b}");
        assert_eq!(printable("\u{202e}x"), "\\u{202e}x");
    }
}
