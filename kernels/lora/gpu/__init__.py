"""Device code: a Triton kernel a file with its launcher; `passes` says what each pass launches.

`ops` calls `passes`; the benchmarks and ahead-of-time cases also call single
launchers, with tiles from `tiles` and options from `launch`.
"""
