"""What the server imports from which data workers are forked: once for all of them, deaf to signals meant for the run.

A signal to the whole job reaches it, too. It must live until the ranks have saved: workers end when it does.
"""

import signal

from pipeline.data import loader

for number in (signal.SIGTERM, signal.SIGUSR2):
    signal.signal(number, signal.SIG_IGN)

__all__ = ["loader"]
