"""Follows a run's ``metrics.jsonl`` into TensorBoard's event files and Weights & Biases.

::

    metrics.jsonl -> tail -> points -> events (RUN_DIR/tensorboard)
                                    -> wandb

It only reads what the run writes: where it fails or lags behind, the run does not notice.
"""
