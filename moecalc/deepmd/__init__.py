"""Training with DeePMD-kit: the descriptor type `dpa3_moe` for `dp --pt train` (docs/training.md).

`plugin` is what DeePMD-kit loads (entry point group `deepmd.pt`). Options are read by
`moecalc.nn.deepmd_input`.
"""
