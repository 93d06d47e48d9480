"""Everything about a model and the random generators that a search must leave as it was."""

import random

import numpy as np
import torch


def tensor_bytes(tensor):
    return None if tensor is None else tensor.detach().cpu().numpy().tobytes()


def attribute_state(owner):
    """Identities of all attributes, and what the containers among them hold, by identity too."""
    state = {}
    for key, value in owner.__dict__.items():
        content = None
        if isinstance(value, dict):
            content = [(k, id(v)) for k, v in value.items()]
        elif isinstance(value, (list, set)):
            content = list(map(id, value))
        state[key] = (id(value), content)
    return state


def fingerprint(model):
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {
        "tree": [(name, id(m), type(m), m.training) for name, m in model.named_modules()],
        "attributes": [attribute_state(m) for m in model.modules()],
        "tensors": [(name, id(t), tensor_bytes(t), t.requires_grad) for name, t in tensors],
        "gradients": [(id(p.grad), tensor_bytes(p.grad)) for p in model.parameters()],
        "state_dict": {name: tensor_bytes(t) for name, t in model.state_dict().items()},
        "config": (id(model.config), model.config.to_dict()),
    }


def random_states():
    numpy_state = np.random.get_state()
    return (
        torch.get_rng_state().tolist(),
        [part.tolist() if isinstance(part, np.ndarray) else part for part in numpy_state],
        random.getstate(),
    )


def lived_in(made):
    """Give the model a state worth preserving: frozen parts, gradients, mixed modes."""
    model = made.model
    parameters = list(model.parameters())
    for parameter in parameters[::3]:
        parameter.requires_grad_(False)
    for parameter in parameters[1::3]:
        parameter.grad = torch.randn_like(parameter)
    for module in list(model.modules())[::2]:
        module.training = True
    torch.rand(3)
    np.random.rand(3)
    random.random()
    return model
