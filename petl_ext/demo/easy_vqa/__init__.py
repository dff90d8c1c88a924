"""The demo of dynamic visual prompting on weights that others trained: `petl-ext demo dvp`.

EfficientNet sees the images of easy-VQA, MiniLM or SmolLM2 reads its questions; both come from packages (packages.py).
"""
