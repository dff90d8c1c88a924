"""The demo of the ViLT: `petl-ext demo` and `petl-ext search das`."""
