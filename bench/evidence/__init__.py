"""Whether rank allocation pays: arms trained on real tasks, and the table of what came out.

A configuration (`config`) names tasks (`tasks`; `task` says what one is, `instructions` the causal
kind), arms (`arms`, `outside`), budgets and seeds.
`plan` says which runs that makes and which learning rates they get, `pool` works them off, `trial`
is one run, `store` keeps a JSON file for each, `statistics` and `table` make the table from the
files, and `command` is the command line.
"""

__all__: list[str] = []
