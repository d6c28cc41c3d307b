#!/usr/bin/env bash
# vtp.bench.gpu.command from a bare checkout: nothing is installed. The import root's links are made again where
# a copy of the checkout lost them, in the folder VTP_LINKS if the checkout cannot be written.
# An unpacked onnxruntime-gpu goes in front: PYTHONPATH=DIR bench/gpu_run.sh [options]. PYTHON names a Python.
# `bench/gpu_run.sh pytest ...` runs pytest in the same way, and `bench/gpu_run.sh shape ...` vtp.bench.gpu.shape.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
links="${VTP_LINKS:-$root}"
mkdir -p "$links/vtp"
if [ "$links" != "$root" ]; then cp "$root/vtp/__init__.py" "$links/vtp/"; fi
for name in engines runtime export calib scenes bench; do
  if [ ! -e "$links/vtp/$name" ]; then ln -sfn "$root/$name" "$links/vtp/$name"; fi
done
export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$links"
if [ "${1:-}" = pytest ]; then exec "${PYTHON:-python3}" -m "$@"; fi
if [ "${1:-}" = shape ]; then shift; exec "${PYTHON:-python3}" -m vtp.bench.gpu.shape "$@"; fi
exec "${PYTHON:-python3}" -m vtp.bench.gpu.command "$@"
