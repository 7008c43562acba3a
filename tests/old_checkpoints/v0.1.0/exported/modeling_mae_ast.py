"""MAE-AST (Baade, Peng, Harwath 2022, arXiv:2203.16691) in PyTorch: the encoder, and classifiers.

Names of shapes: b clips, T frames, N tokens, D hidden_size. Tokens are numbered time-major: the R
tokens of a time step, lowest band first, and then those of the next. Modules have the names of the
authors' checkpoints.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import ModelOutput

from .configuration_mae_ast import MaeAstConfig


@dataclass
class MaeAstOutput(ModelOutput):
    """What MaeAstModel returns.

    Attributes:
      last_hidden_state: [b, N, D], the encoder's output.
      token_mask: bool [b, N], False where a token is padding.
      hidden_states: on request, the input of the first layer and then the output of each layer,
        num_hidden_layers + 1 tensors [b, N, D]. The encoder's output is the last of them, in a
        pre-norm model after one more layer norm.
    """

    last_hidden_state: torch.FloatTensor | None = None
    token_mask: torch.BoolTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None


class InputNorm(nn.Module):
    """Normalises log energies to mean 0 and deviation 0.5, by the statistics of the pretraining.

    The statistics are constants, in training mode too.
    """

    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(1))
        self.register_buffer("running_var", torch.ones(1))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x):
        deviation = (self.running_var.float() + 1e-5).sqrt()
        return 0.5 * (x.float() - self.running_mean.float()) / deviation


class Attention(nn.Module):
    def __init__(self, config: MaeAstConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.dropout = config.attention_dropout
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, nn.Linear(config.hidden_size, config.hidden_size))

    def forward(self, x, token_mask):
        q, k, v = (
            projection(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        dropout = self.dropout if self.training else 0.0
        mask = token_mask[:, None, None, :]
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, config: MaeAstConfig):
        super().__init__()
        self.pre_norm = config.pre_norm
        self.self_attn = Attention(config)
        self.self_attn_layer_norm = nn.LayerNorm(config.hidden_size)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, token_mask):
        if self.pre_norm:
            x = x + self.dropout(self.self_attn(self.self_attn_layer_norm(x), token_mask))
            return x + self.dropout(self._mlp(self.final_layer_norm(x)))
        x = self.self_attn_layer_norm(x + self.dropout(self.self_attn(x, token_mask)))
        return self.final_layer_norm(x + self.dropout(self._mlp(x)))

    def _mlp(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Encoder(nn.Module):
    """The layers, and a layer norm before them (post-norm) or after them (pre-norm)."""

    def __init__(self, config: MaeAstConfig):
        super().__init__()
        self.pre_norm, self.layer_drop = config.pre_norm, config.layer_drop
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.layer_norm = nn.LayerNorm(config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, token_mask):
        """Returns the output [b, N, D], and the input of the first layer with each layer's output.

        token_mask: bool [b, N], False for tokens that no token may attend to.
        """
        x = self.dropout(x if self.pre_norm else self.layer_norm(x))
        hidden_states = [x]
        for layer in self.layers:
            if not (self.training and torch.rand(()) < self.layer_drop):
                x = layer(x, token_mask)
            hidden_states.append(x)
        return self.layer_norm(x) if self.pre_norm else x, tuple(hidden_states)


class Head(nn.Module):
    """Hidden states to logits, by the head of SSAST or of SUPERB."""

    def __init__(self, config: MaeAstConfig):
        super().__init__()
        head, self.bands = config.head, config.num_mel_bins // config.patch_shape[1]
        self.pool, self.kind = head["pool"], head["kind"]
        width = config.hidden_size * (self.bands if self.pool == "time" else 1)
        self.layer_weights = None
        if head["layer"] == "weighted":
            self.layer_weights = nn.Parameter(torch.zeros(config.num_hidden_layers))
        if self.kind == "ssast":
            self.norm = nn.LayerNorm(width)
        else:
            self.projection = nn.Linear(width, head["projection"])
            width = head["projection"]
        self.output = nn.Linear(width, config.num_labels)

    def forward(self, output, hidden_states, token_mask):
        """Returns logits [b, num_labels]; the arguments are what the encoder returns and takes."""
        states = output.float()
        if self.layer_weights is not None:
            weights = self.layer_weights.float().softmax(0)
            layers = torch.stack(hidden_states[1:]).float()
            states = torch.einsum("l,lbnd->bnd", weights, layers)
        is_real = token_mask[:, :: self.bands, None]
        steps = states.unflatten(1, (-1, self.bands)).flatten(2)
        pooled = (steps * is_real).sum(1) / is_real.sum(1)
        if self.pool == "mean":
            pooled = pooled.unflatten(1, (self.bands, -1)).mean(1)
        pooled = pooled.to(self.output.weight.dtype)
        return self.output(self.norm(pooled) if self.kind == "ssast" else self.projection(pooled))


class MaeAstPreTrainedModel(PreTrainedModel):
    """The encoder that all models share."""

    config_class = MaeAstConfig
    main_input_name = "input_values"
    _supports_sdpa = True
    _no_split_modules = ["Layer"]  # noqa: RUF012
    # The decoder and the heads of the pretraining, and a classifier that the model does not have.
    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012
        r"^decoder", r"^final_proj_", r"^post_enc_proj\.", r"^classifier\."
    ]  # fmt: skip

    def __init__(self, config: MaeAstConfig):
        super().__init__(config)
        self.batch_norm = InputNorm()
        self.post_extract_proj = nn.Linear(math.prod(config.patch_shape), config.hidden_size)
        self.input_dropout = nn.Dropout(config.input_dropout)
        self.encoder = Encoder(config)

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, InputNorm):
            nn.init.zeros_(module.running_mean)
            nn.init.ones_(module.running_var)
            nn.init.zeros_(module.num_batches_tracked)
        elif isinstance(module, Head) and module.layer_weights is not None:
            nn.init.zeros_(module.layer_weights)

    def encode(self, input_values, attention_mask, only_whole=False):
        """Returns the encoder's output, its hidden states and the token mask, for [b, T, bands].

        A token is real if one of its frames is. Frames past the batch's last whole token are
        dropped; a batch shorter than one token is filled up to one.

        only_whole: whether a token is real only if all its frames are, or if it is the first.
        """
        frames, bands = self.config.patch_shape
        fill = max(0, frames - input_values.shape[1])
        x, mask = F.pad(input_values, (0, 0, 0, fill)), F.pad(attention_mask.bool(), (0, fill))
        x = self.batch_norm(x.masked_fill(~mask[..., None], 0.0))
        steps = x.shape[1] // frames
        x, mask = x[:, : steps * frames], mask[:, : steps * frames]
        frame_mask = mask.unflatten(1, (steps, frames))
        is_real = frame_mask.any(2)
        if only_whole:
            is_real[:, 1:] = frame_mask[:, 1:].all(2)
        # [b, steps * frames, R * bands] to [b, steps, R, frames, bands], and then to tokens.
        x = x.unflatten(2, (-1, bands)).unflatten(1, (steps, frames)).transpose(2, 3)
        token_mask = is_real.repeat_interleave(x.shape[2], 1)
        x = x.flatten(3).flatten(1, 2)
        x = self.input_dropout(self.post_extract_proj(x.to(self.dtype)))
        x = x + sinusoid(*x.shape[1:], x.device).to(x.dtype)
        return *self.encoder(x, token_mask), token_mask


class MaeAstModel(MaeAstPreTrainedModel):
    """The encoder."""

    def __init__(self, config: MaeAstConfig):
        super().__init__(config)
        self.post_init()

    def forward(
        self, input_values, attention_mask=None, output_hidden_states=None, return_dict=None
    ):
        """Returns a MaeAstOutput for log energies [b, T, bands] and their mask [b, T].

        Both come from MaeAstFeatureExtractor; without a mask all frames are real. The partly filled
        last token of a clip is a token where a longer clip of the batch leaves room for it.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_values[..., 0])
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        output, hidden_states, token_mask = self.encode(input_values, attention_mask)
        result = MaeAstOutput(output, token_mask, hidden_states if output_hidden_states else None)
        return result.to_tuple() if return_dict is False else result


class MaeAstForAudioClassification(MaeAstPreTrainedModel):
    """The encoder and a classifier.

    Whole tokens alone count, so the logits of a clip do not depend on the rest of the batch.
    """

    def __init__(self, config: MaeAstConfig):
        super().__init__(config)
        self.classifier = Head(config)
        self.post_init()

    def forward(
        self,
        input_values,
        attention_mask=None,
        labels=None,
        output_hidden_states=None,
        return_dict=None,
    ):
        """Returns a SequenceClassifierOutput for log energies [b, T, bands] and their mask [b, T].

        labels: int [b], or [b, num_labels] of 0 and 1 for problem_type
          "multi_label_classification". With labels, `loss` is the mean cross-entropy.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_values[..., 0])
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        output, hidden_states, token_mask = self.encode(
            input_values, attention_mask, only_whole=True
        )
        logits = self.classifier(output, hidden_states, token_mask)
        loss = None
        if labels is not None and self.config.problem_type == "multi_label_classification":
            loss = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
        elif labels is not None:
            loss = F.cross_entropy(logits, labels)
        result = SequenceClassifierOutput(
            loss, logits, hidden_states if output_hidden_states else None
        )
        return result.to_tuple() if return_dict is False else result


def sinusoid(num_tokens, width, device):
    """Returns the position table, float32 [N, D]: sines in even columns, cosines in odd ones."""
    columns = torch.arange(0, width, 2, dtype=torch.float32, device=device)
    rates = torch.exp(columns * (-math.log(10_000.0) / width))
    positions = torch.arange(num_tokens, dtype=torch.float32, device=device)
    angles = positions[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)
