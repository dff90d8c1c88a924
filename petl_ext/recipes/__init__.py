"""Experiments as files: a recipe names task, model, method and hyper-parameters; `petl-ext train`, `search`, `eval` and
`compare` do what it says.

Beside torch, its modules need transformers, accelerate, safetensors, PyYAML and Pillow; `commands` needs none of them.
"""
