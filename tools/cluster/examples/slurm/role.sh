#!/usr/bin/env bash
# One task of run qwen3-30b-a3b, started by srun from job.sbatch: role.sh broker|learner|replica|actor
# Rendered; see job.sbatch. What the YAML cannot know, the nodes' names, is given here.
set -euo pipefail

role=$1
yaml=$PWD/run.yaml
python=/shared/croupier/.venv/bin/python
cd /shared # relative paths of the YAML are taken from here

export PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1 TOKENIZERS_PARALLELISM=false

stopping=
trap 'stopping=1' TERM # Slurm sends it to the process as well

again() { # COMMAND: until it ends well; what failed is started again, 3 times
  local tries=0 code process
  while :; do
    "$@" &
    process=$!
    code=0
    wait "$process" || code=$?
    while kill -0 "$process" 2>/dev/null; do # a signal ends the wait, not the process
      code=0
      wait "$process" || code=$?
    done
    if [ "$code" -eq 0 ] || [ -n "$stopping" ] || [ "$tries" -ge 3 ]; then return "$code"; fi
    tries=$((tries + 1))
    echo "$role ended with exit code $code; started again ($tries of 3)" >&2
    sleep 5
  done
}

address=broker.address=tcp://$CROUPIER_BROKER:5700
case $role in
broker)
  export OMP_NUM_THREADS=1
  again "$python" -m broker "$yaml" "broker.address=tcp://*:5700"
  ;;
learner) # each node names itself: rank 0 tells the receivers where the weights come from
  export OMP_NUM_THREADS=1
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=80 # for ranks to write a checkpoint after SIGTERM, below STOP_S; torchrun's 30
  host=false
  if [ "$SLURM_PROCID" -eq 0 ]; then host=true; fi
  exec "$python" -m torch.distributed.run --nnodes 2 --nproc-per-node 8 \
    --rdzv-backend c10d --rdzv-endpoint "$CROUPIER_LEARNER:$CROUPIER_RENDEZVOUS" \
    --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" --rdzv-conf "is_host=$host,read_timeout=600" \
    --local-addr "$SLURMD_NODENAME" --max-restarts 3 \
    -m learner "$yaml" "$address" "weights.host=$SLURMD_NODENAME" learner.resume=true
  ;;
replica)
  export OMP_NUM_THREADS=1
  again "$python" -m torch.distributed.run --standalone --nproc-per-node 2 -m learner.score "$yaml" "$address" --name "replica-$SLURM_PROCID"
  ;;
actor)
  export OMP_NUM_THREADS=1
  again "$python" -m actor "$yaml" "$address" --name "actor-$SLURM_PROCID"
  ;;
*)
  echo "role.sh: unknown role $role" >&2
  exit 2
  ;;
esac
