#!/usr/bin/env bash
# Proves and measures everything that was written for CUDA, in under nine minutes, on a GPU machine
# that has torch and triton and no network. First, elsewhere: `bench/gpu/carry.sh`.
# Figures land in $OUT (default: docs/results); exit status 1 if a part failed.
# REHEARSE=1 runs every step on a CPU with a tiny model, without a GPU; what it prints is no figure.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
here=bench/gpu
site=${SITE:-/tmp/site} wheels=${WHEELS-.whl}
if [[ ${REHEARSE:-} ]]; then
    # A laptop may be slow; a GPU's minutes are counted.
    device=cpu config=$here/tiny.json time_factor=4
    out=${OUT:-$(mktemp --directory)}
    engine=(--max-num-batched-tokens 128 --max-num-seqs 8)
    load=(--concurrency 1,4 --prompt-tokens 64 --max-tokens 16)
else
    device=cuda config=$here/llama-3.1-8b.json time_factor=1
    out=${OUT:-docs/results}
    engine=(--max-num-batched-tokens 8192 --max-num-seqs 256)
    load=(--concurrency 1,64 --prompt-tokens 1024 --max-tokens 256)
fi
mkdir -p "$out"

if [[ -d $wheels ]]; then
    python3 -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade \
        --target "$site" "$wheels"/*.whl || exit
    tar --extract --xz --file "$wheels/flash-attention-3.tar.xz" --directory "$site" || exit
    export PYTHONPATH="$site:$PWD"
else
    export PYTHONPATH=$PWD
fi
export PYTHONUNBUFFERED=1
commit=${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}

# Runs a part within so many seconds, keeps what it prints, and notes if it failed: a part that
# hangs or fails costs the others nothing.
failed=()
part() {
    local name=$1 limit_s=$(($2 * time_factor)) began_s=$SECONDS
    timeout --kill-after 20 "$limit_s" "${@:3}" 2>&1 | tee "$out/gpu-$name.txt"
    local status=${PIPESTATUS[0]}
    ((status == 0)) || failed+=("$name ($status)")
    echo "-- $name: $((SECONDS - began_s)) s, exit status $status"
}

# What is missing is known after seconds.
part imports 60 python3 $here/needs.py check
((${#failed[@]} == 0)) || exit 1
python3 -c 'import torch; print("torch", torch.__version__, "triton", __import__("triton").__version__)
print(torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")'
python3 -c 'import flash_attn_interface; print("FlashAttention-3 loads")' ||
    echo "FlashAttention-3 does not load; attention is Triton's"
if [[ $device == cpu ]]; then
    echo "a rehearsal: CUDA graphs, FlashAttention and Triton are not run (torch stands in for them);"
    echo "Triton's kernels are compiled, and FlashAttention-3 is called with tensors without memory"
    part kernels 100 python3 tests/model/cuda/compile_kernels.py --all 90
    part dtypes 60 python3 $here/dtypes.py
fi

part proof 140 python3 $here/prove.py --device $device
part measure 200 python3 $here/measure.py "$out" --device $device --commit "$commit" --budget-s 150

# Through HTTP: the real daemon, one stream and many, each with a prompt before it.
part http 150 python3 -m loadtest run \
    --start "python3 -m server serve dummy:$config --port {port} --device $device ${engine[*]}" \
    --log-folder "$out" --no-progress --workload c1 "${load[@]}" --out "$out/gpu-http.jsonl"
part peer 60 python3 $here/peer.py --device $device
((${#failed[@]} == 0)) || echo "failed: ${failed[*]}"
echo "in all $SECONDS s; results are in $out"
exit $((${#failed[@]} > 0))
