"""One thread a process, told before torch is imported: tests then neither wait for spinning threads, nor differ by the
load of the machine."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
