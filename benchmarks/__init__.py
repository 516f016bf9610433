"""The engine's speed and memory beside its peers', measured in one run on one machine. See benchmarks/README.md."""
