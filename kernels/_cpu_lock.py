"""One lock around every call into compiled CPU code.

The threading layer that Numba falls back to, "workqueue", ends the process when two threads enter
it at once, and hooks run on the threads of autograd.
"""

import threading

LOCK = threading.RLock()
