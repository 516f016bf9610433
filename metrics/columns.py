"""What files of a run must have, at the least: the columns of tables, the keys of objects.

The engine writes more. A null means "not measured here", such as GPU memory on a CPU.
"""

STEP_COLUMNS = ("step", "tokens_seen", "train_loss", "lr", "grad_norm", "step_seconds", "tokens_per_second")
EVAL_COLUMNS = ("step", "tokens_seen", "val_loss")
COUNT_COLUMNS = ("step", "tokens_seen")
# Of a finished run.
METRIC_KEYS = (
    "train_loss",
    "val_loss",
    "best_val_loss",
    "step_seconds_median",
    "tokens_per_second",
    "tokens",
    "peak_memory_gib",
    "activation_mib",
)
NOISE_COLUMNS = (
    *COUNT_COLUMNS,
    "small_batch",
    "large_batch",
    "gradient_square",
    "noise",
    "noise_scale",
    "coherence",
)
ATTENTION_COLUMNS = (*COUNT_COLUMNS, "entropy_0", "reciprocity_0")  # and of the other layers
DEVICE_COLUMNS = (
    "step",
    "seconds",
    "device_memory_gib",
    "device_utilization_percent",
    "temperature_celsius",
    "power_watts",
    "sm_clock_mhz",
    "thermal_throttle",
    "power_cap",
    "process_memory_gib",
    "process_cpu_percent",
)
LATENCY_KEYS = (
    "length",
    "prefill_p50_ms",
    "prefill_p95_ms",
    "token_p50_ms",
    "token_p95_ms",
    "cache_bytes",
    "cache_bytes_per_token",
)
SPARSITY_COLUMNS = (*COUNT_COLUMNS, "target", "sparsity")
TEST_KEYS = ("test_loss", "test_perplexity", "test_bits_per_byte")
# The same of a classifier.
LABELLED_EVAL_COLUMNS = (*EVAL_COLUMNS, "val_accuracy")
LABELLED_METRIC_KEYS = (
    *METRIC_KEYS,
    "val_accuracy",
    "best_val_accuracy",
    "samples",
    "samples_per_second",
    "samples_per_epoch",
)
LABELLED_TEST_KEYS = ("test_loss", "test_accuracy", "examples")
