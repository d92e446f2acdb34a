#!/usr/bin/env bash
# Serve a Forgetting Transformer with an OpenAI-compatible API on http://127.0.0.1:8000/v1.
#
#   examples/serve.sh                                     the shipped model
#   examples/serve.sh NAME_OR_PATH [vllm serve options]   another one; your options come last and win
#
# On a GPU these are worth knowing:
#   --max-model-len 16384             longest request; pages are given up sooner for a smaller one
#   --gpu-memory-utilization 0.9      share of the GPU for weights and KV cache
#   --max-num-seqs 512                requests at once; forgetting leaves room for more than usual
#   --tensor-parallel-size 2          a divisor or a multiple of the number of KV heads
#   --host 0.0.0.0 --api-key SECRET   to be reached from other machines
#   --additional-config '{"fox": {"log_pruning_tolerance": -10, "release": true, "page_size": 64}}'
set -euo pipefail

model=$(cd "$(dirname "$0")" && pwd)/fox-tiny
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
    model=$1
    shift
fi
command -v vllm >/dev/null || {
    echo "serve.sh: vllm is not on PATH: run 'make serve', or activate .venv (made by 'make setup') first." >&2
    exit 1
}
if ! nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
    # vllm_fox/cpu.py says why. tests/test_cpu.py holds the two against each other.
    export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}
    export VLLM_CPU_OMP_THREADS_BIND=${VLLM_CPU_OMP_THREADS_BIND:-nobind}
    export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
fi
exec vllm serve "$model" --host 127.0.0.1 --port 8000 "$@"
