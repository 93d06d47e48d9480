"""Training by transformers' Trainer: `run.train`, and what it adds to Trainer.

`callbacks` and `trainers` are those additions, `cuda_graphs` replays a step with one launch, and
`checkpoints` is the folder of a run. All of them may be imported from outside; `heterolora` itself
offers `FuseCallback` and `GraphedTrainer`.
"""
