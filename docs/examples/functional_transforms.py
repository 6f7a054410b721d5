"""`torch.func` on the whole model: vmap over keys, gradients of each example, slopes and curvature.

    python docs/examples/functional_transforms.py

The loss of NEST, from waveform to number, is a pure function of its arguments. Nothing has to be prepared for the
transformations of `torch.func`: no hooks, no copies of a module, no buffers to take care of.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.func import grad, jvp, vmap

from nest_fn import Config, init, key, loss, loss_sum, split
from nest_fn.layers import random
from nest_fn.layers.tree import flatten, tree_map


def dot(a, b):
    """The inner product of two trees of tensors."""
    return sum((x * y).sum() for x, y in zip(flatten(a).values(), flatten(b).values(), strict=True))


def main() -> dict[str, Any]:
    """Print what each transformation gives, and return it by name."""
    cfg = Config.preset("tiny", ["masking.mask_prob=0.03"])
    init_key, audio_key, loss_key, way_key = split(key(0), 4)
    params, state = init(init_key, cfg)
    audio = 0.1 * random.normal(audio_key, (4, 32000))  # [B, N], two seconds
    length = torch.full((4,), 32000)
    batch = {"audio": audio, "audio_len": length, "noisy_audio": audio, "noisy_audio_len": length}
    batch["row"] = torch.arange(4)  # the name of each row: its random draws depend on the key and on this alone
    found = {}

    # vmap over keys: the same loss under eight draws of the masks. How noisy is one of them?
    found["losses"] = vmap(lambda k: loss(params, state, batch, cfg, key=k, train=False)[0])(split(loss_key, 8))
    print(f"loss over eight masks: {found['losses'].mean():.4f} +- {found['losses'].std():.4f}")

    # Gradients of each example: grad of the sum over one row, and vmap over rows. In evaluation mode a row does not
    # depend on its batch (no batch statistics), so that the gradients add up to that of the whole batch.
    def summed(p, rows):
        return loss_sum(p, state, rows, cfg, key=loss_key, train=False)[0]

    rows = {name: value[:, None] for name, value in batch.items()}  # four batches of one
    each = vmap(grad(summed), in_dims=(None, 0))(params, rows)  # every leaf [B, ...]
    found["norms"] = vmap(lambda g: dot(g, g).sqrt())(each)
    found["each"], found["whole"] = each, grad(summed)(params, batch)
    print("gradient norm of each example:", " ".join(f"{norm:.2f}" for norm in found["norms"]))

    # jvp: the slope of the loss along a direction, in one forward pass and without a backward one.
    def value(p):
        return loss(p, state, batch, cfg, key=loss_key, train=False)[0]

    keys = iter(split(way_key, len(flatten(params))))
    direction = tree_map(lambda leaf: random.normal(next(keys), leaf.shape), params)
    _, found["slope"] = jvp(value, (params,), (direction,))
    found["gradient"] = grad(value)(params)
    found["direction"], found["value"], found["params"] = direction, value, params
    print(f"slope along a direction: {found['slope']:.4f} by jvp, {dot(found['gradient'], direction):.4f} by grad")

    # jvp of grad: a product with the Hessian, without ever making the Hessian. Here: the curvature along the gradient,
    # and from it the step with which gradient descent would go furthest if the loss were a parabola.
    gradient = found["gradient"]
    _, found["hessian_gradient"] = jvp(grad(value), (params,), (gradient,))
    curvature = dot(gradient, found["hessian_gradient"]) / dot(gradient, gradient)
    print(f"curvature along the gradient: {curvature:.4f}; best step there: {1 / curvature:.4f}")
    return found


if __name__ == "__main__":
    main()
