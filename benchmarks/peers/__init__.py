"""PEERS: name → module with `measure(task)`. To add one: a file here, and its line."""

PEERS = {
    "engine": "benchmarks.peers.engine",
    "bare": "benchmarks.peers.bare",
    "nanogpt": "benchmarks.peers.nanogpt",
    "nanogpt_char": "benchmarks.peers.nanogpt_char",
    "hf": "benchmarks.peers.hf",
    "hashed": "benchmarks.peers.hashed",
    "padded": "benchmarks.peers.padded",
    "torchtitan": "benchmarks.peers.titan",
}
