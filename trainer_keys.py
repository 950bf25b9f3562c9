"""What of a YAML's trainer section decides the result of a run: one list for runs and for reports.

The rest says how long, where and how verbosely a run trains, and may change between two attempts.
"""

TRAINER = (
    "accumulate_grad_batches",
    "check_val_every_n_epoch",
    "gradient_clip_algorithm",
    "gradient_clip_val",
    "limit_train_batches",
    "limit_val_batches",
    "overfit_batches",
    "precision",
    "sync_batchnorm",
    "use_distributed_sampler",
    "val_check_interval",
)
LIMITS = {
    "limit_train_batches": 1.0,
    "limit_val_batches": 1.0,
    "overfit_batches": 0.0,
    "val_check_interval": 1.0,
}
"""The defaults of those that are numbers: whole ones are batches, others are shares."""
