#!/usr/bin/env python
"""The entry point: from a YAML to a number.

    python main.py fit -c experiments/quickstart.yaml                       train, then test once
    python main.py fit -c experiments/... -c experiments/machines/gpu.yaml  the same on that machine
    python main.py test -c experiments/...                                  evaluate what is trained

What a command does is written in `running.cli` and `running.commands`. Here stands only what must
happen before torch is imported.
"""

import sys

import preemption

if __name__ == "__main__" and sys.argv[1:2] == ["fit"]:
    preemption.listen()  # the import below takes seconds, in which a warning would end the process

from running import main

if __name__ == "__main__":
    sys.exit(main())
