"""`fuse` and `unfuse`: LoRA layers bound to the group operation, and back.

From outside, import `fuse`, what goes with it from `fusion.fuse`, and `fusion.interface`, the one
way to change or run a layer's call; `decline` says why a layer keeps the forward of PEFT. A call
goes down this list: fused_model, member, decline, group, call, kernels.
"""
