"""The machine: trains one run from one TOML file.

It knows no study, no DVC and no chart, and needs only torch, torchtitan and numpy, so that it runs on a bare
GPU node. `python -m engine.train FILE` is its door; `engine/config.py` lists every setting.
"""
