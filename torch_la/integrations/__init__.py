"""Models of other libraries with the operators of this one. Nothing here imports those libraries.

- `transformers`: the linear attention layers of Hugging Face models
"""
