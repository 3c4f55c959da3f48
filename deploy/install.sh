#!/bin/sh
# Install the pinned requirements into .venv, for `make setup`: install.sh [auto|cpu|cuda] [STAMP]
#   cpu   PyTorch's CPU build (requirements-cpu.lock); its CUDA build, which runs on CPUs too, where that cannot be had
#   cuda  the CUDA build (requirements.lock)
#   auto  cuda where an NVIDIA driver is, else cpu
# STAMP is a file that says afterwards which build is installed.
set -eu
torch=${1:-auto} stamp=${2:-.venv/.installed}
python=.venv/bin/python uv=.venv/bin/uv
# Compiled here once: Ray starts many processes, and where Python writes no bytecode each would compile for itself.
common="--quiet --compile-bytecode --python $python"

case $torch in
auto) if command -v nvidia-smi >/dev/null || test -e /proc/driver/nvidia/version; then torch=cuda; else torch=cpu; fi ;;
cpu | cuda) ;;
*) echo "TORCH=$torch is unknown: auto, cpu or cuda." >&2; exit 2 ;;
esac

# Both builds have the same version, so that the installed one would be kept.
other_build() {
    before=$(cat "$stamp" 2>/dev/null || true)
    if [ -n "$before" ] && [ "$before" != "$torch" ]; then echo "--reinstall-package torch --reinstall-package torchvision"; fi
}

if [ "$torch" = cpu ]; then
    echo "installing the pinned requirements with PyTorch's CPU build into .venv: about 3.3 GB on disk, once ..."
    # shellcheck disable=SC2046,SC2086 # words on purpose
    if ! "$uv" pip install $common $(other_build) --torch-backend=cpu -r requirements-cpu.lock; then
        torch=cuda
        echo "PyTorch's CPU build cannot be had, as said above; its CUDA build runs on CPUs too and is taken instead."
    fi
fi
if [ "$torch" = cuda ]; then
    echo "installing the pinned requirements into .venv: 3 GB to download, about 8 GB on disk (most of it for GPUs), once ..."
    # shellcheck disable=SC2046,SC2086 # words on purpose
    "$uv" pip install $common $(other_build) -r requirements.lock
fi
"$uv" pip install --quiet --python "$python" --no-deps -e .
echo "$torch" >"$stamp"
echo "installed."
