"""`python -m tiered_mem` is the `tiered-mem` command."""

from tiered_mem.cli import main

main()
