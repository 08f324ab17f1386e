# Sourced by every job: its environment, a reason for each setting. What the site or you have set
# already stays as it is.
# shellcheck shell=bash

# One thread a rank unless told: eight ranks with a thread for every core each slow each other down.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Output reaches the log line by line: what a killed job said last is what one looks for.
export PYTHONUNBUFFERED=1
# Compute nodes may have no network, and stage=fetch has brought everything: a library that asks
# the hub all the same would wait for minutes, on every rank.
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
export TRANSFORMERS_OFFLINE=${TRANSFORMERS_OFFLINE:-1}
# A rank that finds a broken connection ends with an error that names it, instead of waiting.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
# NCCL speaks only of what goes wrong; INFO fills gigabytes with 64 ranks.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# Which network NCCL and gloo take is the site's to say: NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME and
# NCCL_IB_HCA are passed on and never guessed here.
