"""The authors' parameter names and layouts (fairseq, torch) against ours: numpy in, numpy out.

| authors                                   | ours                                    |
|-------------------------------------------|-----------------------------------------|
| post_extract_proj                         | token_projection                        |
| encoder.layers.I.self_attn.{q,k,v}_proj   | encoder.layers.attention.qkv_*[I, .. 3] |
| encoder.layers.I.self_attn.out_proj       | encoder.layers.attention.out_*[I]       |
| encoder.layers.I.self_attn_layer_norm     | encoder.layers.attention_norm[I]        |
| encoder.layers.I.{fc1,fc2}                | encoder.layers.mlp.{up,down}[I]         |
| encoder.layers.I.final_layer_norm         | encoder.layers.mlp_norm[I]              |
| encoder.layer_norm                        | encoder.norm                            |
| post_enc_proj                             | decoder_projection                      |
| decoder_mask_emb                          | mask_token                              |
| final_proj_{reconstruction,classification}| {reconstruction,classification}_head    |
| batch_norm.*                              | input_norm.* (statistics)               |

The authors' encoder_mask_emb and layer_norm take no part in any result and have no counterpart.
"""

from collections.abc import Mapping

import numpy as np

Tree = dict


def parameters(tensors: Mapping[str, np.ndarray], heads: int) -> Tree:
    """The authors' named tensors as our nested parameters, float32, layers stacked.

    Works for anything with the parameters' names and shapes, gradients too. Raises KeyError for a
    name that is missing.
    """
    tree = {
        "token_projection": _linear(tensors, "post_extract_proj"),
        "encoder": _transformer(tensors, "encoder", heads),
        "mask_token": _float32(tensors["decoder_mask_emb"]),
        "decoder": _transformer(tensors, "decoder", heads),
        "reconstruction_head": _linear(tensors, "final_proj_reconstruction"),
        "classification_head": _linear(tensors, "final_proj_classification"),
    }
    if "post_enc_proj.weight" in tensors:
        tree["decoder_projection"] = _linear(tensors, "post_enc_proj")
    return tree


def statistics(tensors: Mapping[str, np.ndarray]) -> Tree:
    """The authors' batch norm buffers as our running statistics."""
    return {
        "input_norm": {
            "mean": _float32(tensors["batch_norm.running_mean"]).reshape(()),
            "variance": _float32(tensors["batch_norm.running_var"]).reshape(()),
            "num_batches": np.asarray(tensors["batch_norm.num_batches_tracked"], np.int32),
        }
    }


def _float32(tensor) -> np.ndarray:
    return np.asarray(tensor, np.float32)


def _linear(tensors: Mapping[str, np.ndarray], name: str) -> Tree:
    # torch keeps [outputs, inputs].
    return {
        "kernel": _float32(tensors[f"{name}.weight"]).T,
        "bias": _float32(tensors[f"{name}.bias"]),
    }


def _norm(tensors: Mapping[str, np.ndarray], name: str) -> Tree:
    return {
        "scale": _float32(tensors[f"{name}.weight"]),
        "bias": _float32(tensors[f"{name}.bias"]),
    }


def _attention(tensors: Mapping[str, np.ndarray], name: str, heads: int) -> Tree:
    projections = [_linear(tensors, f"{name}.{which}_proj") for which in "qkv"]
    out = _linear(tensors, f"{name}.out_proj")
    width = out["kernel"].shape[1]
    return {
        "qkv_kernel": np.stack([p["kernel"] for p in projections], axis=1).reshape(
            width, 3, heads, width // heads
        ),
        "qkv_bias": np.stack([p["bias"] for p in projections]).reshape(3, heads, width // heads),
        "out_kernel": out["kernel"].reshape(heads, width // heads, width),
        "out_bias": out["bias"],
    }


def _layer(tensors: Mapping[str, np.ndarray], name: str, heads: int) -> Tree:
    return {
        "attention": _attention(tensors, f"{name}.self_attn", heads),
        "attention_norm": _norm(tensors, f"{name}.self_attn_layer_norm"),
        "mlp": {"up": _linear(tensors, f"{name}.fc1"), "down": _linear(tensors, f"{name}.fc2")},
        "mlp_norm": _norm(tensors, f"{name}.final_layer_norm"),
    }


def _transformer(tensors: Mapping[str, np.ndarray], name: str, heads: int) -> Tree:
    prefix = f"{name}.layers."
    indices = {int(key[len(prefix) :].split(".")[0]) for key in tensors if key.startswith(prefix)}
    layers = [_layer(tensors, f"{prefix}{index}", heads) for index in sorted(indices)]
    return {"layers": _stack(layers), "norm": _norm(tensors, f"{name}.layer_norm")}


def _stack(trees: list[Tree]) -> Tree:
    first = trees[0]
    if not isinstance(first, dict):
        return np.stack(trees)
    return {key: _stack([tree[key] for tree in trees]) for key in first}
