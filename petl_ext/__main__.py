from petl_ext.cli import main

main()
