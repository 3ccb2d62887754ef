#!/usr/bin/env bash
# Make .venv and install moesaic into it. Usage: tools/setup.sh runtime|dev|docs|interop
#
# Versions are pinned by constraints.txt. torch goes first, because its default build on Linux
# x86-64 brings several gigabytes of CUDA: where no NVIDIA driver is found, and the configured
# index does not offer a CPU build by itself, the CPU build is taken from PyTorch's own index.
# TORCH_INDEX=URL asks for any other index; TORCH_INDEX=default asks for plain `pip install torch`.
set -euo pipefail
cd "$(dirname "$0")/.."

want=${1:?runtime, dev, docs or interop}
cpu_index=https://download.pytorch.org/whl/cpu

die() { echo "setup: $*" >&2; exit 1; }

# -qq keeps errors and hides progress and warnings (an unused --find-links folder, for example).
install() { .venv/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt "$@"; }

usable() {
  "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
  if [ -n "${PYTHON:-}" ]; then
    usable "$PYTHON" || die "PYTHON=$PYTHON is not a Python >= 3.11 with venv and ensurepip"
    echo "$PYTHON"
    return
  fi
  local candidate
  for candidate in python3.12 python3.11 python3.13 python3 python3.14 python; do
    if usable "$candidate"; then echo "$candidate"; return; fi
  done
  die "no Python >= 3.11 with venv found; install one (on Debian also python3-venv) or set PYTHON="
}

torch_from() {
  case "${TORCH_INDEX:-}" in
    default) return ;;
    ?*) echo "--index-url=$TORCH_INDEX"; return ;;
  esac
  [ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] || return 0
  command -v nvidia-smi >/dev/null && return
  local offered  # empty with a pip too old to know `pip index`
  offered=$(.venv/bin/python -m pip index versions torch 2>/dev/null || true)
  [[ "$offered" = *" $torch+cpu"* ]] || echo "--extra-index-url=$cpu_index"
}

if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  python=$(find_python)
  echo "setup: making .venv with $("$python" --version)"
  rm -rf .venv
  "$python" -m venv .venv
fi

if [ "$want" = runtime ]; then
  torch=$(sed -n 's/^torch==//p' constraints.txt)
  echo "setup: installing torch $torch and the other dependencies (a few minutes, once)"
  from=$(torch_from)
  install ${from:+"$from"} "torch==$torch"
  install -e .
elif [ "$want" = docs ]; then
  echo "setup: installing the tools of the site"
  install -e '.[docs]'
elif [ "$want" = interop ]; then
  echo "setup: installing transformers, PEFT and llama.cpp"
  install -e '.[interop]'
else
  echo "setup: installing the developer's tools"
  install -e '.[dev]'
fi
