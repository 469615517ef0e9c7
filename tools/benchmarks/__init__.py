"""Benchmarks: ours beside plain torch and beside other libraries, each in a process and an environment of its own."""
