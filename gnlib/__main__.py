from gnlib.cli import main

main()
