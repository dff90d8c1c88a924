"""The demo of dynamic visual prompting: `petl-ext demo dvp` and `petl-ext search placement`."""
