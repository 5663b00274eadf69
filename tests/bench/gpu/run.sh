#!/usr/bin/env bash
# Proves and measures everything that was written for CUDA, in under nine minutes, on a GPU machine
# that has torch and triton and no network. First, elsewhere: `tests/bench/gpu/carry.sh`.
# Figures land in $OUT (default: docs/results); exit status 1 if a check failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
out=${OUT:-docs/results}
site=${SITE:-/tmp/site}
mkdir -p "$out"

if [[ -d .whl ]]; then
    python3 -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade \
        --target "$site" .whl/*.whl || exit
    tar --extract --xz --file .whl/flash-attention-3.tar.xz --directory "$site" || exit
    export PYTHONPATH="$site:$PWD"
else
    export PYTHONPATH=$PWD
fi
export PYTHONUNBUFFERED=1
commit=${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}

# Says in a line what is there, and whether FlashAttention-3 can be loaded at all.
python3 -c 'import torch, triton; print(torch.__version__, triton.__version__, torch.cuda.get_device_name())'
python3 -c 'import flash_attn_interface; print("FlashAttention-3 loads")'

timeout 120 python3 tests/bench/gpu/prove.py 2>&1 | tee "$out/gpu-proof.txt"
proved=${PIPESTATUS[0]}
timeout 200 python3 tests/bench/gpu/measure.py "$out" --commit "$commit" --budget-s 150 \
    --only limits attention engine 2>&1 | tee "$out/gpu-measure.txt"

# Through HTTP: the real daemon, one stream and 64, each with a thousand tokens before it.
config=$(mktemp --suffix .json)
python3 -c 'import json, sys; sys.path.insert(0, "tests/bench/gpu"); import measure
print(json.dumps(measure.LLAMA_8B))' >"$config"
timeout 150 python3 -m loadtest run --start "python3 -m server serve dummy:$config --port {port} \
    --device cuda --max-num-batched-tokens 8192 --max-num-seqs 256" --log-folder "$out" --no-progress \
    --workload c1 --concurrency 1,64 --prompt-tokens 1024 --max-tokens 256 \
    --out "$out/gpu-http.jsonl" 2>&1 | tee "$out/gpu-http.txt"
timeout 60 python3 tests/bench/gpu/measure.py "$out/peer" --commit "$commit" --only peer
exit "$proved"
