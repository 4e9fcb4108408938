@ROLE@)
  export OMP_NUM_THREADS=@THREADS@
  again "$python" @START@ learner.score "$yaml" "$address" --name "@ROLE@-$SLURM_PROCID"@SERVES@
  ;;
