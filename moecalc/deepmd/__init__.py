"""Training with DeePMD-kit: the descriptor type `dpa3_moe` for `dp --pt train` (docs/training.md).

`plugin` is what DeePMD-kit loads (entry point group `deepmd.pt`); `options` reads the `moe` section and needs no DeePMD-kit.
"""
