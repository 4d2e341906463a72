#!/usr/bin/env python3
"""Do the kernels' tests notice a missing synchronisation? Removes every synchronisation call of a kernel file, one at
a time, and runs the tests with the changed kernel in the opt and race builds of the emulated device.

  tools/mutate.py kernels/attention.cu                          its op's tests, in both builds
  tools/mutate.py --builds race kernels/gemv.cuh -- kernels test --op qkv --scale small
  tools/mutate.py                                               every kernel file

What follows `--` are arguments of `warpstep`, which must fail when a kernel is wrong; without them they are
`kernels test --op NAME --scale small --quiet`, NAME being the file's stem where that is an op, else every op. A mutant
is a shared library with only the files that changed, preloaded into the one program per build; its kernels take the
place of the program's. A survivor is a mutant that no build noticed: a test that is missing, or a call that is not
needed. The exit status says whether there are any.
"""

import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
KERNELS = ROOT / "kernels"
WORK = ROOT / "target" / "mutants"

# As in build.rs: how the emulated kernels are compiled, and what each build adds.
COMPILE = ["-std=c++20", "-O2", "-fPIC", "-march=x86-64-v3", "-fno-strict-aliasing", "-w", "-xc++", "-c"]
INSTRUMENT = {
    "opt": ["-DWARPSTEP_EMULATOR_OPT"],
    "race": ["-DWARPSTEP_EMULATOR_RACE", "-g1", "-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0"],
}

# Calls that only wait, arrive or order: without one the rest still compiles.
REMOVED = (
    "block_sync warp_sync grid_sync cluster_sync bar_sync bar_arrive cp_async_wait mbar_wait mbar_arrive griddep_wait"
).split()
# Calls whose ordering alone is taken away.
WEAKENED = {"atom_add_acqrel": "atom_add_relaxed"}
CALL = re.compile(r"(?<![\w:.])(%s)\s*(<[^<>;]*>)?\s*\(" % "|".join(REMOVED + list(WEAKENED)))


def blank_comments(source):
    """The source with comments as spaces, so that positions stay."""
    blank = lambda match: re.sub(r"[^\n]", " ", match.group(0))
    return re.sub(r"//[^\n]*|/\*.*?\*/", blank, source, flags=re.S)


def closing(code, opening):
    """Position after the parenthesis that closes the one at `opening`."""
    depth = 0
    for at in range(opening, len(code)):
        depth += {"(": 1, ")": -1}.get(code[at], 0)
        if depth == 0:
            return at + 1
    raise ValueError("unbalanced parentheses")


def mutants(source):
    """(line, what, mutated source) for every call; calls inside expressions are only weakened, never removed."""
    code = blank_comments(source)
    # In dev.cuh only what both sides share; the rest are the primitives themselves.
    for match in CALL.finditer(code, max(source.find("// ---- common to both sides ----"), 0)):
        name, line = match.group(1), code.count("\n", 0, match.start()) + 1
        end = closing(code, match.end() - 1)
        text = " ".join(source[match.start() : end].split())
        if name in WEAKENED:
            yield line, text, source[: match.start()] + WEAKENED[name] + source[match.start() + len(name) :]
        elif code[end:].lstrip().startswith(";"):
            yield line, text, source[: match.start()] + source[end:]


def run(command, **options):
    return subprocess.run(command, capture_output=True, text=True, **options)


def checked(command, **options):
    done = run([str(word) for word in command], **options)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def program(build):
    """The `warpstep` of a build, with the emulator's functions visible to preloaded kernels."""
    environment = dict(os.environ, WARPSTEP_EMULATOR=build, NVCC="none", WARPSTEP_REQUIRE_CUBINS="0")
    command = ["cargo", "rustc", "--release", "--bin", "warpstep", "--", "-C", "link-arg=-rdynamic"]
    checked(command, cwd=ROOT, env=environment)
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    copy = WORK / f"warpstep-{build}"
    shutil.copy(target / "release" / "warpstep", copy)
    return copy


def users(file):
    """The .cu files that a change of `file` changes."""
    if file.suffix == ".cu":
        return [file]
    found, names = [], {file.name}
    while True:
        pattern = re.compile(r'#include "(%s)"' % "|".join(map(re.escape, names)))
        found = [f for f in sorted(KERNELS.glob("*.cu*")) if pattern.search(f.read_text())]
        if {f.name for f in found} <= names:
            return [f for f in found if f.suffix == ".cu"]
        names |= {f.name for f in found}


def library(build, file, mutated):
    """The kernels that `file` is part of, with its text replaced, as a shared library; None if it does not compile."""
    folder = WORK / "kernels"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(KERNELS, folder)
    (folder / file.relative_to(KERNELS)).write_text(mutated)
    compiler, objects = os.environ.get("CXX", "g++"), []
    for user in users(file):
        objects.append(str(WORK / f"{user.stem}.o"))
        source = str(folder / user.relative_to(KERNELS))
        if run([compiler, *COMPILE, *INSTRUMENT[build], "-I", str(folder), source, "-o", objects[-1]]).returncode:
            return None
    output = WORK / "mutant.so"
    checked([compiler, "-shared", "-o", output, *objects])
    return output


def verdict(command, preload, seconds):
    """`-` if the tests pass, else in a few words how they fail."""
    environment = dict(os.environ, LD_PRELOAD=str(preload)) if preload else None
    try:
        done = run(command, env=environment, timeout=seconds, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return "timeout"
    if done.returncode == 0:
        return "-"
    if done.returncode < 0:
        return f"signal {-done.returncode}"
    words = r"race|uninitialised|deadlock|in flight|divergent|have exited|griddep_wait"
    report = re.search(words, done.stdout + done.stderr)
    return report.group(0) if report else "wrong result"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=pathlib.Path, help="kernel files; all of kernels/ if none")
    parser.add_argument("--builds", default="opt,race", help="comma-separated, of opt and race")
    parser.add_argument("--timeout", type=float, default=120, help="seconds per run")
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    arguments, given = parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]
    builds = arguments.builds.split(",")
    if unknown := set(builds) - set(INSTRUMENT):
        parser.error(f"unknown builds: {', '.join(sorted(unknown))}")
    WORK.mkdir(parents=True, exist_ok=True)
    programs = {build: program(build) for build in builds}
    listing = checked([programs[builds[0]], "kernels", "list"])
    ops = set(re.findall(r"^(\w+):", listing, re.M))

    survivors, total = [], 0
    for file in arguments.files or sorted(KERNELS.glob("*.cu*")):
        file = file.resolve()
        source = file.read_text()
        op = ["--op", file.stem] if file.stem in ops else []
        tests = given or ["kernels", "test", *op, "--scale", "small", "--quiet"]
        # Unchanged, the tests pass; with empty kernels they do not. Else the verdicts would mean nothing.
        for build in builds:
            name = f"{file.name} in the {build} build"
            if found := verdict([programs[build], *tests], library(build, file, source), arguments.timeout).strip("-"):
                sys.exit(f"{name}: the tests fail without a mutation: {found}")
            returning = re.sub(r"^(KERNEL\(.*\) \{)", r"\1 return;", source, flags=re.M)
            if returning != source:
                if verdict([programs[build], *tests], library(build, file, returning), arguments.timeout) == "-":
                    sys.exit(f"{name}: the tests pass with empty kernels; do they run them?")
        for line, what, mutated in mutants(source):
            total += 1
            row = {}
            for build in builds:
                preload = library(build, file, mutated)
                row[build] = verdict([programs[build], *tests], preload, arguments.timeout) if preload else "no compile"
            print(f"{file.name}:{line:<4} {what:44.44}", *(f"{b}: {v:14}" for b, v in row.items()), flush=True)
            if all(v in ("-", "no compile") for v in row.values()):
                survivors.append(f"{file.name}:{line} {what}")
    print(f"{total} mutants, {len(survivors)} survivors")
    for survivor in survivors:
        print(f"  {survivor}")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
