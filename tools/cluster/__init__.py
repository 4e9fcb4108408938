"""Files that start one run on a Slurm or Kubernetes cluster, rendered from the run's YAML.

``plan`` says how many processes there are and what they need, ``slurm`` and ``kubernetes`` write it down.
"""
