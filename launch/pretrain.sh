#!/usr/bin/env bash
# Pre-training without a scheduler: on this machine, or on the hosts of a file. Start it in the repository.
#
#   launch/pretrain.sh --config launch/runs/iu_xray_resnet50.yaml [--set key=value ...]     every GPU of this machine
#   RANKS=2 DS_ACCELERATOR=cpu launch/pretrain.sh --config launch/runs/iu_xray_cpu.yaml     two ranks on its CPU
#   HOSTFILE=hosts launch/pretrain.sh --config launch/runs/mimic_resnet50.yaml              every host; a line each: node1 slots=8
#
# Hosts are reached without a password, by pdsh where there is one, else by ssh. The repository, its .venv and HOSTFILE lie at the
# same place on all of them. Nobody starts a run again here: it goes on with --set train.resume=true.
# From the environment: ENTRANCE (imitate_ds.pretrain), MASTER_PORT (29500), and what `passed` names.
set -uo pipefail

# What the other hosts are told of this environment, and no more: no credential travels.
passed=(DS_ACCELERATOR OMP_NUM_THREADS IMITATE_DS_CACHE NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME NCCL_DEBUG HF_HOME HF_HUB_OFFLINE)
passed+=(AWS_ENDPOINT_URL FSSPEC_S3_ANON)

[[ -x .venv/bin/deepspeed ]] && PATH=$PWD/.venv/bin:$PATH
program=(--master_port="${MASTER_PORT:-29500}" --module "${ENTRANCE:-imitate_ds.pretrain}" "$@")
[[ -z ${HOSTFILE:-} ]] && exec deepspeed ${RANKS:+--num_gpus="$RANKS"} "${program[@]}"

HOSTFILE=$(realpath "$HOSTFILE")
mapfile -t hosts < <(sed -n 's/^\([^#[:space:]]\+\).*/\1/p' "$HOSTFILE")
[[ ${#hosts[@]} -gt 0 ]] || { echo "HOSTFILE = $HOSTFILE: names no host; a line for each, as in: node1 slots=8" >&2; exit 2; }
environment=(PATH="$PATH" PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}")
for name in "${passed[@]}"; do [[ -n ${!name:-} ]] && environment+=("$name=${!name}"); done

if type -P pdsh >/dev/null; then
  DS_ENV_FILE=$(mktemp) && export DS_ENV_FILE # in place of .deepspeed_env, which would be read from the home folder too
  trap 'rm -f "$DS_ENV_FILE"' EXIT
  printf '%s\n' "${environment[@]}" >"$DS_ENV_FILE"
  deepspeed --hostfile="$HOSTFILE" --master_addr="${hosts[0]}" "${program[@]}"
  exit
fi

pids=()
trap 'kill "${pids[@]}"' INT TERM # -tt: what runs on a host ends with its connection
for rank in "${!hosts[@]}"; do
  command=(env "${environment[@]}" deepspeed --hostfile="$HOSTFILE" --no_ssh --node_rank="$rank" --master_addr="${hosts[0]}" "${program[@]}")
  ssh -tt "${hosts[$rank]}" "cd $(printf %q "$PWD") && exec ${command[*]@Q}" </dev/null &
  pids+=($!)
done
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit $status
