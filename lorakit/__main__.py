"""`python -m lorakit`, for launchers that start modules: torchrun, accelerate launch."""

from lorakit.cli import main

main()
