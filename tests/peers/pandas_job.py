"""pandas.read_csv on the file it is called with; prints its version and seconds."""

import sys
import time

import pandas

start = time.perf_counter()
frame = pandas.read_csv(sys.argv[1])
print(pandas.__version__, time.perf_counter() - start, len(frame))
