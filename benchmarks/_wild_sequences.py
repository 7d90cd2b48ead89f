"""Networks on text, sound and tokens from other libraries, for ``coverage.py wild``: small configurations, random weights.

Nothing is downloaded. Each is called as its users call it, without ``use_cache=False``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torchaudio.models as sound
import x_transformers as xt
from _coverage_networks import Inputs, Network
from _wild_inputs import Given, causal, experts, ids, noise, noise_and_lengths, of_class, pairs, quiet, seeded, tokens
from _wild_vision import VISION
from torch import Tensor, nn

__all__ = ["SEQUENCES"]

_WIDE = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
_GROUPED = {**_WIDE, "num_key_value_heads": 2}
_EXPERTS = {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}


def _of_sound(build: Callable[[], nn.Module], inputs: Given, dtype: torch.dtype = torch.float64) -> Network:
    return Network(quiet(build), inputs, resizable=False, reads_values=True, dtype=dtype)


def _x(build: Callable[[], nn.Module], inputs: Given = tokens) -> Network:
    return Network(build, inputs, resizable=False, reads_values=True)


class EncoderDecoder(nn.Module):
    """An encoder of tokens, and a decoder that attends to it."""

    def __init__(self) -> None:
        super().__init__()
        layers = {"dim": 64, "depth": 2, "heads": 4, "attn_dim_head": 16}
        self.encoder = xt.TransformerWrapper(num_tokens=128, max_seq_len=32, attn_layers=xt.Encoder(**layers))
        self.decoder = xt.TransformerWrapper(num_tokens=128, max_seq_len=32, attn_layers=xt.Decoder(cross_attend=True, **layers))

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.decoder(target, context=self.encoder(source, return_embeddings=True))


def _two(batch: int, small: bool, dtype: torch.dtype) -> Inputs:
    return (ids(batch), ids(batch, 8, seed=9)), {}


def _language(kind: type[nn.Module], wrapper: dict[str, Any] | None = None, **layers: Any) -> Network:
    sizes = {"dim": 64, "depth": 2, "heads": 4, "attn_dim_head": 16, **layers}
    return _x(lambda: xt.TransformerWrapper(num_tokens=128, max_seq_len=32, attn_layers=kind(**sizes), **(wrapper or {})))


def _waves(ssl: Callable[..., nn.Module], **more: Any) -> nn.Module:
    return ssl(
        extractor_mode="group_norm", extractor_conv_layer_config=[(16, 10, 5), (16, 3, 2)], extractor_conv_bias=False,
        encoder_embed_dim=64, encoder_projection_dropout=0.1, encoder_num_layers=2,
        encoder_num_heads=4, encoder_attention_dropout=0.1, encoder_ff_interm_features=128,
        encoder_ff_interm_dropout=0.0, encoder_dropout=0.1, encoder_layer_norm_first=False, encoder_layer_drop=0.05,
        aux_num_out=29, **more,
    )  # fmt: skip


_POSITIONS = {"encoder_pos_conv_kernel": 16, "encoder_pos_conv_groups": 4}


def _wave_rnn(batch: int, small: bool, dtype: torch.dtype) -> Inputs:
    wave = torch.randn(batch, 1, (12 - 5 + 1) * 16, generator=seeded(batch), dtype=dtype)
    return (wave, torch.randn(batch, 1, 20, 12, generator=seeded(9 + batch), dtype=dtype)), {}


def _transducer(batch: int, small: bool, dtype: torch.dtype) -> Inputs:
    sources = torch.randn(batch, 28, 20, generator=seeded(batch), dtype=dtype)
    lengths, targets = torch.full((batch,), 28), ids(batch, 6) % 30
    return (sources, lengths, targets.int(), torch.full((batch,), 6, dtype=torch.int32)), {}


def _emformer_transducer() -> nn.Module:
    return sound.emformer_rnnt_model(
        input_dim=20, encoding_dim=32, num_symbols=30, segment_length=16, right_context_length=4, time_reduction_input_dim=16,
        time_reduction_stride=4, transformer_num_heads=4, transformer_ffn_dim=64, transformer_num_layers=2,
        transformer_dropout=0.1, transformer_activation="gelu", transformer_left_context_length=8,
        transformer_max_memory_size=0, transformer_weight_init_scale_strategy="depthwise", transformer_tanh_on_mem=True,
        symbol_embedding_dim=24, num_lstm_layers=2, lstm_layer_norm=True, lstm_layer_norm_epsilon=1e-3, lstm_dropout=0.3,
    )  # fmt: skip


SOUND: dict[str, Network] = {
    "ta_conformer": _of_sound(lambda: sound.Conformer(32, 4, 64, 2, 7), noise_and_lengths(24, 32)),
    "ta_emformer": _of_sound(lambda: sound.Emformer(32, 4, 64, 2, 8, left_context_length=8, right_context_length=4),
    noise_and_lengths(28, 32)),
    "ta_emformer_rnnt": _of_sound(_emformer_transducer, _transducer),
    "ta_hdemucs": _of_sound(lambda: sound.HDemucs(["a", "b"], nfft=1024, depth=5, channels=8), noise(2, 8192)),
    "ta_wav2vec2": _of_sound(lambda: _waves(sound.wav2vec2_model, **_POSITIONS), noise(800)),
    "ta_wavlm": _of_sound(
        lambda: _waves(sound.wavlm_model, encoder_pos_conv_kernel=16, encoder_pos_conv_groups=4, encoder_num_buckets=8,
                       encoder_max_distance=16),
        noise(800),
    ),
    "ta_conv_tasnet": _of_sound(
        lambda: sound.ConvTasNet(enc_num_feats=32, msk_num_feats=16, msk_num_hidden_feats=32, msk_num_layers=3,
        msk_num_stacks=2),
        noise(1, 800),
    ),
    "ta_deepspeech": _of_sound(lambda: sound.DeepSpeech(20, n_hidden=64, n_class=10), noise(1, 30, 20)),
    "ta_wav2letter": _of_sound(lambda: sound.Wav2Letter(10, "mfcc", 20), noise(20, 100)),
    "ta_wavernn": _of_sound(
        lambda: sound.WaveRNN([4, 4], n_classes=16, hop_length=16, n_res_block=2, n_rnn=32, n_fc=32, kernel_size=5, n_freq=20,
                              n_hidden=16, n_output=16),
        _wave_rnn,
    ),
}  # fmt: skip

X_TRANSFORMERS: dict[str, Network] = {
    "xt_encoder": _language(xt.Encoder, {"emb_dropout": 0.1}),
    "xt_decoder_rotary": _language(xt.Decoder, rotary_pos_emb=True, use_rmsnorm=True, ff_swish=True, ff_glu=True),
    "xt_decoder_alibi": _language(xt.Decoder, alibi_pos_bias=True, alibi_num_heads=2),
    "xt_decoder_grouped": _language(xt.Decoder, attn_kv_heads=2, attn_flash=True, attn_qk_norm=True),
    "xt_decoder_t5_bias": _language(xt.Decoder, rel_pos_bias=True, sandwich_norm=True),
    "xt_encoder_gated": _language(
        xt.Encoder, {"num_memory_tokens": 4}, gate_residual=True, ff_glu=True, attn_gate_values=True, use_scalenorm=True
    ),
    "xt_decoder_shifted": _language(xt.Decoder, shift_tokens=1, residual_attn=True, macaron=True),
    "xt_vit": _x(
        lambda: xt.ViTransformerWrapper(
            image_size=32, patch_size=8, num_classes=10, attn_layers=xt.Encoder(dim=64, depth=2, heads=4, attn_dim_head=16)
        ),
        noise(3, 32, 32),
    ),
    "xt_continuous": _x(
        lambda: xt.ContinuousTransformerWrapper(
            dim_in=8, dim_out=6, max_seq_len=32, attn_layers=xt.Encoder(dim=64, depth=2, heads=4, attn_dim_head=16)
        ),
        noise(16, 8),
    ),
    "xt_encoder_decoder": _x(EncoderDecoder, _two),
}

_LATENT = {
    "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}  # fmt: skip
_MANY = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
EXPERTS: dict[str, Network] = {
    "mixtral": experts("Mixtral", **_EXPERTS),
    "qwen2_moe": experts("Qwen2Moe", shared_expert_intermediate_size=64, **_MANY, **_GROUPED),
    "qwen3_moe": experts("Qwen3Moe", head_dim=16, **_MANY, **_GROUPED),
    "olmoe": experts("Olmoe", num_experts=4, num_experts_per_tok=2, **_GROUPED),
    "deepseek_v2": experts("DeepseekV2", n_group=1, topk_group=1, **_LATENT, **_WIDE),
    "deepseek_v3": experts("DeepseekV3", n_group=2, topk_group=1, **_LATENT, **_WIDE),
    "gpt_oss": experts("GptOss", head_dim=16, sliding_window=8, **_EXPERTS),
    "granite_moe": experts("GraniteMoe", **_EXPERTS),
    "switch_transformers": of_class(
        "SwitchTransformersForConditionalGeneration", pairs, vocab_size=128, d_model=32, d_kv=8, num_layers=2, num_heads=4,
        d_ff=64, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_decoder_layers=2, num_experts=4,
        expert_capacity=8, decoder_start_token_id=0, router_jitter_noise=0.0,
    ),
}  # fmt: skip

_STATE = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2}
_SCAN = {"mamba_n_heads": 4, "mamba_d_state": 8, "mamba_d_head": 16, "mamba_chunk_size": 8}
STATE_SPACES: dict[str, Network] = {
    "mamba2": causal(
        "Mamba2", torch.float32, num_heads=4, head_dim=16, expand=2, state_size=8, n_groups=1, chunk_size=8, **_STATE
    ),
    "falcon_mamba": causal("FalconMamba", state_size=8, **_STATE),
    "jamba": experts(
        "Jamba", mamba_d_state=8, use_mamba_kernels=False, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
        expert_layer_offset=1, num_experts=4, num_experts_per_tok=2, **_GROUPED,
    ),
    "bamba": causal("Bamba", torch.float32, attn_layer_indices=[1], mamba_n_groups=1, mamba_expand=1, **_SCAN, **_GROUPED),
    "recurrent_gemma": causal(
        "RecurrentGemma", head_dim=16, lru_width=64, attention_window_size=8, block_types=["recurrent", "attention"],
        **_GROUPED,
    ),
    "rwkv": causal("Rwkv", context_length=32, attention_hidden_size=32, intermediate_size=64, **_STATE),
    "lfm2": causal("Lfm2", layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False, **_GROUPED),
}  # fmt: skip


SEQUENCES: dict[str, Network] = SOUND | X_TRANSFORMERS | EXPERTS | STATE_SPACES | VISION
