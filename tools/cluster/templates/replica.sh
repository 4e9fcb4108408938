replica)
  export OMP_NUM_THREADS=@THREADS@
  again "$python" @START@ learner.score "$yaml" "$address" --name "replica-$SLURM_PROCID"
  ;;
