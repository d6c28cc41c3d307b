#!/usr/bin/env bash
# vtp.bench.gpu.command from a bare checkout: links the folders as vtp/<name> (nothing is installed) and runs it.
# An unpacked onnxruntime-gpu goes in front: PYTHONPATH=DIR bench/gpu_run.sh [options]. PYTHON names a Python,
# VTP_LINKS a folder for the links where the checkout cannot be written. `bench/gpu_run.sh pytest ...` runs
# pytest in the same way, and `bench/gpu_run.sh shape ...` vtp.bench.gpu.shape.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
links="${VTP_LINKS:-$root/build/links}"
mkdir -p "$links/vtp"
for name in engines runtime export calib scenes bench; do
  if [ -d "$root/$name" ]; then ln -sfn "$root/$name" "$links/vtp/$name"; fi
done
export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$links"
if [ "${1:-}" = pytest ]; then exec "${PYTHON:-python3}" -m "$@"; fi
if [ "${1:-}" = shape ]; then shift; exec "${PYTHON:-python3}" -m vtp.bench.gpu.shape "$@"; fi
exec "${PYTHON:-python3}" -m vtp.bench.gpu.command "$@"
