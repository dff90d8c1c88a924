"""The demo of SmolLM2, a LLaMA that others trained, on the reference manual of Python: `petl-ext demo llama`."""
