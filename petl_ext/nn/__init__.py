"""Layers: they own parameters and their initialization, and call one op."""

from petl_ext.nn.adapter import AdapterLayer
from petl_ext.nn.apt import APTLayer
from petl_ext.nn.visual_prompt import VisualPromptLayer

__all__ = ["APTLayer", "AdapterLayer", "VisualPromptLayer"]
