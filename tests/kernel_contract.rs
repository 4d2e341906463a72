//! The source contract of the kernels: what keeps one `.cu` file true for nvcc and for the emulated device.
//! Everything that differs between the two lives in `kernels/dev.cuh`; kernels are plain C++ around its primitives.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Words that reach past `dev.cuh`. Every identifier that starts with two underscores is refused as well
/// (`__shared__`, `__syncthreads`, `__shfl_sync`, `__asm__`, `__CUDA_ARCH__`, ...).
const FORBIDDEN_WORDS: &[&str] = &[
    "asm",
    "threadIdx",
    "blockIdx",
    "blockDim",
    "gridDim",
    "warpSize",
    "printf",
    "malloc",
    "free",
    "new",
    "delete",
    "try",
    "throw",
    "goto",
    "volatile",
    "std",
    "cuda",
];
const ALLOWED_WORDS: &[&str] = &["__restrict__"];

/// What a loop may poll with: these let the other fibers run, so the emulated device cannot hang in them.
const POLLS: &[&str] = &["ld_acquire", "poll_relaxed", "poll_relaxed_v4", "mbar_wait"];

/// What the opening comment of a `.cu` file has to say: a formula, shapes, and what bounds the kernel.
const HEADER_WORDS: &[&str] = &["=", "[", "bound"];

/// Everything wrong with one file, as `line: what`.
fn violations(name: &str, source: &str, headers: &BTreeSet<String>) -> Vec<String> {
    let mut found = Vec::new();
    let header = opening_comment(source).to_lowercase();
    if header.is_empty() {
        found.push("1: starts with no comment".to_owned());
    } else if name.ends_with(".cu") {
        let missing: Vec<_> = HEADER_WORDS.iter().filter(|word| !header.contains(**word)).collect();
        if !missing.is_empty() {
            found.push(format!("1: the opening comment lacks {missing:?}: formula, shapes, bound"));
        }
    }
    let code = without_comments(source);
    for (at, line) in code.lines().enumerate() {
        let mut refuse = |what: String| found.push(format!("{}: {what}", at + 1));
        if let Some(directive) = line.trim().strip_prefix('#') {
            match directive.trim().split_once(char::is_whitespace) {
                Some(("include", file)) => {
                    let file = file.trim().trim_matches('"');
                    if !headers.contains(file) {
                        refuse(format!(
                            "#include {file}: kernels include dev.cuh, params.h and kernels/*.cuh"
                        ));
                    }
                }
                Some(("pragma", _)) => {}
                _ => refuse(format!("#{directive}: no conditional code and no macros in kernels")),
            }
        }
        for word in words(line) {
            let reserved = word.starts_with("__") && !ALLOWED_WORDS.contains(&word);
            if reserved || FORBIDDEN_WORDS.contains(&word) {
                refuse(format!("{word}: use a primitive of dev.cuh"));
            }
        }
        if line.contains("<<<") {
            refuse("<<<: launches belong to the host".to_owned());
        }
    }
    found.extend(bare_spins(&code).into_iter().map(|line| format!("{line}: spins without {POLLS:?}")));
    found
}

fn words(code: &str) -> impl Iterator<Item = &str> {
    code.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').filter(|word| !word.is_empty())
}

/// The comment that the file begins with, markers included.
fn opening_comment(source: &str) -> &str {
    if source.starts_with("/*") {
        return source.split_inclusive("*/").next().unwrap_or_default();
    }
    let lines = source.split_inclusive('\n').take_while(|line| line.starts_with("//"));
    &source[..lines.map(str::len).sum::<usize>()]
}

/// The source with comments blanked and line breaks kept.
fn without_comments(source: &str) -> String {
    let mut code = String::new();
    let mut rest = source;
    while let Some(start) = rest.find("//").into_iter().chain(rest.find("/*")).min() {
        code += &rest[..start];
        let comment = &rest[start..];
        let end = if comment.starts_with("//") {
            comment.find('\n').unwrap_or(comment.len())
        } else {
            comment.find("*/").map_or(comment.len(), |end| end + 2)
        };
        code.extend(comment[..end].chars().filter(|c| *c == '\n'));
        rest = &comment[end..];
    }
    code + rest
}

/// Lines of loops that wait for memory by themselves: an empty body, or a condition that dereferences.
fn bare_spins(code: &str) -> Vec<usize> {
    let mut lines = Vec::new();
    for (at, _) in code.match_indices("while") {
        let whole = !code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_');
        let Some(open) = code[at + 5..].trim_start().strip_prefix('(').filter(|_| whole) else { continue };
        let mut depth = 1;
        let close = open.find(|c| {
            depth += i32::from(c == '(') - i32::from(c == ')');
            depth == 0
        });
        let Some(close) = close else { continue };
        let (condition, body) = (&open[..close], open[close + 1..].trim_start());
        let idle = (body.starts_with(';') && !ends_a_do_block(&code[..at]))
            || body.strip_prefix('{').is_some_and(|body| body.trim_start().starts_with('}'));
        let dereferences = condition.trim_start().trim_start_matches('!').starts_with('*');
        if (idle || dereferences) && !words(condition).any(|word| POLLS.contains(&word)) {
            lines.push(code[..at].matches('\n').count() + 1);
        }
    }
    lines
}

/// Whether the code ends in `do { ... }`, so that `while (...);` only closes the loop.
fn ends_a_do_block(code: &str) -> bool {
    let Some(block) = code.trim_end().strip_suffix('}') else { return false };
    let mut depth = 1;
    let open = block.rfind(|c| {
        depth += i32::from(c == '}') - i32::from(c == '{');
        depth == 0
    });
    open.is_some_and(|open| words(block[..open].trim_end()).last() == Some("do"))
}

/// Names that `KERNEL(name, ...)` defines.
fn kernels(source: &str) -> Vec<String> {
    let code = without_comments(source);
    let defined = code.split("KERNEL(").skip(1);
    defined.map(|rest| rest.split([',', ')']).next().unwrap_or_default().trim().to_owned()).collect()
}

/// Kernel files and their shared headers, but not `dev.cuh`, by name.
fn sources() -> BTreeMap<String, String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    let mut sources = BTreeMap::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        if (name.ends_with(".cu") || name.ends_with(".cuh")) && name != "dev.cuh" {
            sources.insert(name, std::fs::read_to_string(&path).unwrap());
        }
    }
    sources
}

fn headers<'a>(names: impl Iterator<Item = &'a String>) -> BTreeSet<String> {
    let own = names.filter(|name| name.ends_with(".cuh")).cloned();
    own.chain(["dev.cuh".to_owned(), "params.h".to_owned()]).collect()
}

#[test]
fn kernels_keep_the_source_contract() {
    let sources = sources();
    assert!(sources.keys().any(|name| name.ends_with(".cu")), "no kernels found");
    let headers = headers(sources.keys());
    let found: Vec<String> = sources
        .iter()
        .flat_map(|(name, source)| {
            violations(name, source, &headers).into_iter().map(move |what| format!("kernels/{name}:{what}"))
        })
        .collect();
    assert!(found.is_empty(), "{}", found.join("\n"));
}

/// Symbols are looked up by name, and a name tells its file, its variant and its element type.
#[test]
fn kernel_names_are_unique_and_begin_with_their_file() {
    let mut owners = BTreeMap::new();
    for (name, source) in sources() {
        let Some(op) = name.strip_suffix(".cu") else {
            assert!(kernels(&source).is_empty(), "{name} defines a kernel: only .cu files do");
            continue;
        };
        let defined = kernels(&source);
        assert!(!defined.is_empty(), "{name} defines no KERNEL");
        for symbol in defined {
            assert!(
                symbol.starts_with(&format!("{op}_")),
                "{name}: {symbol} is not called {op}_VARIANT[_DTYPE]"
            );
            if let Some(other) = owners.insert(symbol.clone(), name.clone()) {
                panic!("{symbol} is defined in {other} and in {name}");
            }
        }
    }
}

const GOOD: &str = "\
/* y[i] = 2 x[i]; x, y [N] float. Bound by bytes: 8 per element. threadIdx and `#if` in a comment do no harm. */
#include \"dev.cuh\"
#include \"tile.cuh\"
#pragma once
KERNEL(double_plain_f32, DoubleParams, 256, 2) {
  float* __restrict__ y = ptr<float>(p.y); // __shared__ would be wrong
  while (ld_acquire(p.flag) == 0) {}
  do { y[0] += 1; } while (y[0] < 3);
  while (y[1] > 0) y[1] -= 1;
}
";

fn planted(from: &str, to: &str) -> Vec<String> {
    let broken = GOOD.replace(from, to);
    assert_ne!(broken, GOOD, "nothing was planted");
    violations("double.cu", &broken, &headers([&"tile.cuh".to_owned()].into_iter()))
}

#[test]
fn a_good_kernel_passes() {
    assert_eq!(violations("double.cu", GOOD, &headers([&"tile.cuh".to_owned()].into_iter())), [""; 0]);
    assert_eq!(kernels(GOOD), ["double_plain_f32"]);
}

#[test]
fn planted_violations_are_found_on_their_line() {
    for statement in [
        "asm volatile(\"nop;\");",
        "int t = threadIdx.x;",
        "int b = blockIdx.x;",
        "__shared__ float s[4];",
        "other<<<1, 2>>>();",
        "__syncthreads();",
        "float s = __shfl_xor_sync(~0u, 1, 2);",
        "printf(\"%d\", 1);",
        "while (*flag) {}",
        "while (!*flag) continue;",
        "while (flag[0] == 0);",
        "while (peek(flag) == 0) { }",
        "volatile int* v = flag;",
        "#if 1",
        "#ifdef __CUDACC__",
        "#define N 4",
        "#include <stdint.h>",
        "#include \"emulator/emu.hpp\"",
        "#include \"missing.cuh\"",
    ] {
        let found = planted("  do {", &format!("{statement}\n  do {{"));
        assert!(!found.is_empty(), "{statement} passes");
        assert!(found.iter().all(|what| what.starts_with("8: ")), "{statement}: {found:?}");
    }
}

#[test]
fn a_poor_opening_comment_is_found() {
    assert_eq!(planted("Bound by bytes", "Slow").len(), 1);
    assert_eq!(planted("/* y[i] = 2 x[i]", "\n/* y[i] = 2 x[i]").len(), 1);
}
