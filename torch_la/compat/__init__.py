"""The functions of other libraries by their own names, computed by the operators of this one.

- `fla`: linear attention, simple GLA, retention and lightning attention of flash-linear-attention
- `mamba`: the state-space scan and the one-token update of mamba_ssm

Same arguments, defaults and results; docs/moving lists every difference. Neither library needs to be installed.
"""
