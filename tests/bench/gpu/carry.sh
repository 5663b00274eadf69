#!/usr/bin/env bash
# Puts into .whl/ what a GPU machine without network lacks to run Octavo: Python 3.12, x86-64, with
# torch, triton, transformers, numpy, tokenizers, jinja2, uvloop and prometheus-client there already.
# 30 MiB in all: FlashAttention-3 is packed anew, xz makes half of its 60 MiB. Run it where pip works.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."

FLASH_ATTENTION_3=tokenspeed-fa3==3.0.0.post20260810
names=(fastapi starlette uvicorn httptools orjson gguf pydantic pydantic_core annotated-types
    typing-inspection)
platforms=()
for tag in manylinux_2_31 manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 \
    manylinux2014 manylinux1; do
    platforms+=(--platform "${tag}_x86_64")
done

fetch() {
    python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 \
        --implementation cp "${platforms[@]}" --dest "$1" "${@:2}"
}

rm -rf .whl
mkdir .whl
pins=()
for name in "${names[@]}"; do
    pins+=("$(grep "^$name==" constraints.txt)")
done
fetch .whl "${pins[@]}"

unpacked=$(mktemp -d)
trap 'rm -rf "$unpacked"' EXIT
fetch "$unpacked/wheel" "$FLASH_ATTENTION_3"
mkdir "$unpacked/site"
python3 -m zipfile -e "$unpacked"/wheel/*.whl "$unpacked/site"
tar --create --directory "$unpacked/site" . | xz -6 --threads=0 >.whl/flash-attention-3.tar.xz
du --summarize --human-readable .whl
