"""`python -m rankworks ...`: the command line of this very interpreter, e.g. under `torchrun -m rankworks train`."""

from rankworks.cli import main

main()
