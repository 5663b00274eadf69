#!/usr/bin/env bash
# Puts into .whl/ what a GPU machine without network lacks to run Octavo: Python 3.12, x86-64.
# What that is follows from pyproject.toml, constraints.txt and the imports (needs.py, which also
# says what is there already). FlashAttention-3 is packed anew: xz makes half of its 60 MiB. Run it
# where pip works, in the environment that `make check` installs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PATH="$PWD/.venv/bin:$PATH"

FLASH_ATTENTION_3=tokenspeed-fa3==3.0.0.post20260810
MAX_BYTES=$((64 * 1024 * 1024))
platforms=()
for tag in manylinux_2_31 manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 \
    manylinux2014 manylinux1; do
    platforms+=(--platform "${tag}_x86_64")
done

fetch() {
    python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 \
        --implementation cp "${platforms[@]}" --dest "$1" "${@:2}"
}

pins=$(python3 bench/gpu/needs.py pins)
rm -rf .whl
mkdir .whl
mapfile -t pins <<<"$pins"
fetch .whl "${pins[@]}"

unpacked=$(mktemp -d)
trap 'rm -rf "$unpacked"' EXIT
fetch "$unpacked/wheel" "$FLASH_ATTENTION_3"
mkdir "$unpacked/site"
python3 -m zipfile -e "$unpacked"/wheel/*.whl "$unpacked/site"
tar --create --directory "$unpacked/site" . | xz -6 --threads=0 >.whl/flash-attention-3.tar.xz
bytes=$(du --summarize --bytes .whl | cut --fields 1)
echo "${#pins[@]} packages and FlashAttention-3: $((bytes / 1024 / 1024)) MiB"
if ((bytes > MAX_BYTES)); then
    echo "more than a machine takes: $MAX_BYTES bytes" >&2
    exit 1
fi
