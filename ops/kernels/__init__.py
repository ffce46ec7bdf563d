"""The Triton kernels. Nothing here is imported before a CUDA tensor (or the interpreter) needs it: see `launch.py`."""
