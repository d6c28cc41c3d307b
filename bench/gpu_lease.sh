#!/usr/bin/env bash
# All that waits for a GPU, in pieces, for a machine that is lent by the minute and for a few minutes a call:
#
#   bench/gpu_lease.sh [SECONDS]
#
# Every piece has its own limit and is done once (build/gpu-lease says which; remove a name there to do it
# again): the next call goes on where this one ended. No piece is started that cannot end within SECONDS (default: 570). Wants, in build/: ort_cuda.tar.xz (an onnxruntime-gpu to
# unpack, unless one is installed), gpu-bundles.tar.xz and gpu-shape.tar.xz (CONTRIBUTING, "On a machine with a
# GPU"); what is not there is left out, and said. Results go to OUT where it is set, else to bench/results.
# The tests marked gpu are not here: they export tiny bundles, which needs the export extra. Their checks (cache,
# agreement, times) are those that gpu_run.sh makes on the built-in bundles.
# VTP_WEIGHTS names another place for the shape's weights. ENGINE=ort-cpu runs the same pieces without a GPU.
set -uo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
build="${VTP_BUILD:-$root/build}"
results="${OUT:-$root/bench/results}"
state="$build/gpu-lease"  # what is done, and results, which OUT may lose between calls
engine="${ENGINE:-ort-cuda}"
ends=$((SECONDS + ${1:-570}))
mkdir -p "$state" "$results"

# piece NAME LIMIT COMMAND...: run it once, within LIMIT seconds, if that much is left.
piece() {
  local name="$1" limit="$2" began=$SECONDS
  shift 2
  if [ -e "$state/$name" ]; then echo "== $name: done before"; return 0; fi
  if [ $((SECONDS + limit)) -gt "$ends" ]; then echo "== $name: waits for the next call (needs $limit s)"; return 1; fi
  echo "== $name"
  timeout -k 5 "$limit" "$@"
  local code=$?
  # What was measured before a limit is kept, so that the next call goes on from there.
  if [ "$code" = 0 ]; then touch "$state/$name"; fi
  echo "== $name: exit $code after $((SECONDS - began)) s"
  return "$code"
}

# unpack NAME FOLDER: an archive of build/ into FOLDER.
unpack() {
  if [ -e "$state/unpack-$1" ]; then return 0; fi
  if [ ! -e "$build/$1" ]; then echo "== $1 is not there: its pieces are left out"; return 1; fi
  mkdir -p "$2" && piece "unpack-$1" 60 tar -xJf "$build/$1" -C "$2"
}

# Weights are written once and read often: into memory where there is room for LLaVA-1.5-7B.
shared=$(df --output=avail -BG /dev/shm 2>/dev/null | tail -1 | tr -dc 0-9)
if [ "${shared:-0}" -ge 20 ]; then place=/dev/shm; else place="$build"; fi
place="${VTP_WEIGHTS:-$place}"

if unpack ort_cuda.tar.xz "$build/gpu-site"; then export PYTHONPATH="$build/gpu-site${PYTHONPATH:+:$PYTHONPATH}"; fi
run="$root/bench/gpu_run.sh"
if unpack gpu-bundles.tar.xz "$build"; then
  first="$build/gpu-bundles/vispruner"
  piece quick 150 "$run" --engine "$engine" --quick --json "$state/quick.json" --bundle "$first"
fi
if unpack gpu-shape.tar.xz "$place"; then
  piece shape-quick 400 "$run" shape --engine "$engine" --work "$place/gpu-shape" --quick --json "$state/shape-quick.json"
  piece shape 400 "$run" shape --engine "$engine" --work "$place/gpu-shape" --json "$state/shape.json"
fi
if [ -d "$build/gpu-bundles" ]; then
  piece built-in 300 "$run" --engine "$engine" --resume --json "$state/built-in.json" --bundle "$build"/gpu-bundles/*/
fi
for file in "$state"/*.json "$state"/*.md; do
  if [ -e "$file" ]; then cp "$file" "$results"; fi
done
