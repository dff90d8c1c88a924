"""Layers: they own parameters and their initialisation, and call one op."""

from petl_ext.nn.adapter import AdapterLayer
from petl_ext.nn.apt import APTLayer

__all__ = ["APTLayer", "AdapterLayer"]
