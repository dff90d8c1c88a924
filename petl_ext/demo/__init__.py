"""What `petl-ext demo` and `petl-ext search` run. Nothing of the library imports it."""
