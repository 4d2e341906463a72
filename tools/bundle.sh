#!/usr/bin/env bash
# Makes .dist/: what a machine with a GPU, but without Rust, needs to test and time the kernels.
#
#   tools/bundle.sh            builds, and fills .dist/ anew
#   .dist/run.sh               there: facts, every kernel against its reference, the recorded cases
#
# The binary carries its own cubins; the loose ones are for cuobjdump and nvdisasm.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# A bundle without GPU kernels would be for nothing.
messages=$(WARPSTEP_REQUIRE_CUBINS=1 cargo build --release --locked --message-format=json-render-diagnostics)
read -r binary out < <(python3 -c '
import json, sys
binary = out = ""
for message in map(json.loads, sys.stdin):
    if message.get("executable") and message["target"]["name"] == "warpstep":
        binary = message["executable"]
    if message["reason"] == "build-script-executed" and "/warpstep-" in message["out_dir"]:
        out = message["out_dir"]
print(binary, out)' <<<"$messages")

rm -rf .dist
mkdir -p .dist/cubins
strip -o .dist/warpstep "$binary"
cp "$out"/ptxas-report.txt .dist/cubins/
# By name: cargo's folder keeps the cubins of removed kernels.
for source in kernels/*.cu; do
    cp "$out/$(basename "$source" .cu).cubin" .dist/cubins/
done
cp -R tests/golden .dist/golden

cat >.dist/run.sh <<'RUN'
#!/usr/bin/env bash
# Tests this bundle on this machine; the exit status is 0 when everything passed. Reports are left in report/.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
mkdir -p report
failed=0
check() { # check NAME ARGUMENTS...
    echo "=== $1"
    ./warpstep "${@:2}" 2>&1 | tee "report/$1.txt"
    ((PIPESTATUS[0] == 0)) || { failed=1; echo "=== $1 FAILED"; }
}
check doctor doctor
check kernels kernels test
check cases verify golden/cases/*
exit "$failed"
RUN
chmod +x .dist/run.sh
du -sh .dist
