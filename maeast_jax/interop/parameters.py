"""Converts the authors' parameters (names and layouts of fairseq and torch) to ours, and back.

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

import operator
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

Tree = dict[str, Any]
Tensors = dict[str, Any]

# Prefixes of the tensors that only decoding needs. A file without them is an encoder.
DECODER_PREFIXES = (
    "decoder.", "decoder_mask_emb", "final_proj_", "post_enc_proj.", "dec_sine_pos_embed."
)  # fmt: skip


def parameters(tensors: Mapping[str, np.ndarray], heads: int) -> Tree:
    """Returns the authors' named tensors as our nested parameters, float32, with stacked layers.

    Gradients and anything else with the names and shapes of the parameters work too. The tensors of
    an encoder alone give the parameters of an encoder. Raises KeyError for a missing name.
    """
    tree = {
        "token_projection": _linear(tensors, "post_extract_proj"),
        "encoder": _transformer(tensors, "encoder", heads),
    }
    if not any(name.startswith(DECODER_PREFIXES) for name in tensors):
        return tree
    tree |= {
        "mask_token": _float32(tensors["decoder_mask_emb"]),
        "decoder": _transformer(tensors, "decoder", heads),
        "reconstruction_head": _linear(tensors, "final_proj_reconstruction"),
        "classification_head": _linear(tensors, "final_proj_classification"),
    }
    if "post_enc_proj.weight" in tensors:
        tree["decoder_projection"] = _linear(tensors, "post_enc_proj")
    return tree


def statistics(tensors: Mapping[str, np.ndarray]) -> Tree:
    """Returns the authors' batch norm buffers as our running statistics."""
    return {
        "input_norm": {
            "mean": _float32(tensors["batch_norm.running_mean"]).reshape(()),
            "variance": _float32(tensors["batch_norm.running_var"]).reshape(()),
            "num_batches": np.asarray(tensors["batch_norm.num_batches_tracked"], np.int32),
        }
    }


def tensors_of(params: Tree, statistics: Tree) -> Tensors:
    """Returns the authors' named tensors, the inverse of `parameters` and `statistics`.

    Takes numpy arrays, jax arrays and tracers, so that `jax.eval_shape` gives the shapes.
    """
    norm = statistics["input_norm"]
    tensors = {
        "batch_norm.running_mean": norm["mean"].reshape(1),
        "batch_norm.running_var": norm["variance"].reshape(1),
        "batch_norm.num_batches_tracked": norm["num_batches"],
        **_linear_tensors("post_extract_proj", params["token_projection"]),
        **_transformer_tensors("encoder", params["encoder"]),
    }
    if "decoder" not in params:
        return tensors
    tensors |= {
        "decoder_mask_emb": params["mask_token"],
        **_transformer_tensors("decoder", params["decoder"]),
        **_linear_tensors("final_proj_reconstruction", params["reconstruction_head"]),
        **_linear_tensors("final_proj_classification", params["classification_head"]),
    }
    if "decoder_projection" in params:
        tensors |= _linear_tensors("post_enc_proj", params["decoder_projection"])
    return tensors


def _float32(tensor) -> np.ndarray:
    return np.asarray(tensor, np.float32)


def _linear(tensors: Mapping[str, np.ndarray], name: str) -> Tree:
    # torch stores [outputs, inputs].
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
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
    return {"layers": stacked, "norm": _norm(tensors, f"{name}.layer_norm")}


def _linear_tensors(name: str, linear: Tree) -> Tensors:
    return {f"{name}.weight": linear["kernel"].T, f"{name}.bias": linear["bias"]}


def _norm_tensors(name: str, norm: Tree) -> Tensors:
    return {f"{name}.weight": norm["scale"], f"{name}.bias": norm["bias"]}


def _attention_tensors(name: str, attention: Tree) -> Tensors:
    kernel_Dx3xHxK, bias_3xHxK = attention["qkv_kernel"], attention["qkv_bias"]
    width = kernel_Dx3xHxK.shape[0]
    tensors = {}
    for index, which in enumerate("qkv"):
        tensors[f"{name}.{which}_proj.weight"] = kernel_Dx3xHxK[:, index].reshape(width, -1).T
        tensors[f"{name}.{which}_proj.bias"] = bias_3xHxK[index].reshape(-1)
    tensors[f"{name}.out_proj.weight"] = attention["out_kernel"].reshape(-1, width).T
    tensors[f"{name}.out_proj.bias"] = attention["out_bias"]
    return tensors


def _transformer_tensors(name: str, transformer: Tree) -> Tensors:
    tensors = {}
    layers = transformer["layers"]
    for index in range(layers["attention_norm"]["scale"].shape[0]):
        layer = jax.tree.map(operator.itemgetter(index), layers)
        prefix = f"{name}.layers.{index}"
        tensors |= _attention_tensors(f"{prefix}.self_attn", layer["attention"])
        tensors |= _norm_tensors(f"{prefix}.self_attn_layer_norm", layer["attention_norm"])
        tensors |= _linear_tensors(f"{prefix}.fc1", layer["mlp"]["up"])
        tensors |= _linear_tensors(f"{prefix}.fc2", layer["mlp"]["down"])
        tensors |= _norm_tensors(f"{prefix}.final_layer_norm", layer["mlp_norm"])
    return tensors | _norm_tensors(f"{name}.layer_norm", transformer["norm"])
