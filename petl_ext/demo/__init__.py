"""What `petl-ext demo` runs."""

from petl_ext.demo.run import run_demo, tune

__all__ = ["run_demo", "tune"]
