"""Device code: a Triton kernel a file with its launcher; `passes` says what each pass launches.

`ops` imports `passes`. Benchmarks and ahead-of-time cases also import single launchers, with what
they take: `tables.Pass`, and tiles and options from `launch`.
"""
