"""`python -m medusa_ext` is `medusa-ext`."""

from medusa_ext.cli import main

main()
