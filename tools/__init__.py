"""Launch, doctor, warm start, report and benchmarks: the only package that may import all the others."""
