"""Configuration of MAE-AST (Baade, Peng, Harwath 2022, arXiv:2203.16691) for transformers."""

from transformers import PretrainedConfig


class MaeAstConfig(PretrainedConfig):
    """The architecture of an MAE-AST encoder. The defaults are the paper's model of 16x16 patches.

    Args:
      patch_shape: (frames, mel bands) per token.
      num_mel_bins: mel bands of the input.
      hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: the transformer.
      pre_norm: whether layers normalise their input; otherwise their output.
      input_dropout, dropout, attention_dropout: rates after the token projection, inside the
        layers, and of the attention weights. They act in training mode only.
      layer_drop: probability that a layer is skipped in training mode.
      num_frames: frames (of 10 ms) of the clips that the model was trained on. Longer clips work
        best in pieces of this length.
      head: the classifier of MaeAstForAudioClassification.
        kind: "ssast" (layer norm, linear) or "superb" (two linear layers).
        layer: "last" (the encoder's output) or "weighted" (a learnt mean of all layers).
        pool: "time" (the mean over time, with the bands side by side) or "mean" (over all tokens).
        projection: width of the first linear layer of "superb".
      pretraining: decoder and masking of the pretraining. The PyTorch model has neither; they are
        kept so that maeast_jax can go on with it.
    """

    model_type = "mae_ast"

    def __init__(
        self,
        patch_shape=(16, 16),
        num_mel_bins=128,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        pre_norm=False,
        input_dropout=0.1,
        dropout=0.1,
        attention_dropout=0.1,
        layer_drop=0.05,
        num_frames=1024,
        head=None,
        pretraining=None,
        **kwargs,
    ):
        self.patch_shape = list(patch_shape)
        self.num_mel_bins = num_mel_bins
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.pre_norm = pre_norm
        self.input_dropout = input_dropout
        self.dropout = dropout
        self.attention_dropout = attention_dropout
        self.layer_drop = layer_drop
        self.num_frames = num_frames
        defaults = {"kind": "ssast", "layer": "last", "pool": "time", "projection": 256}
        self.head = {**defaults, **(head or {})}
        self.pretraining = pretraining
        super().__init__(**kwargs)
