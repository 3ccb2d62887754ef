"""Shaped recipes: models trained here that programs of others hold, part by part.

``moesaic export`` writes them for transformers, and those without encoder for llama.cpp.
"""

from moesaic.data.collators import EncoderDecoderCollator
from moesaic.data.language_tag import FirstTargetToken
from moesaic.data.train_tokenizer import TrainedTokenizer
from moesaic.model.config import ModelConfig, Stack
from moesaic.model.head import LanguageModelHead
from moesaic.moe.auxiliary_losses import FirstChoiceBalance, SwitchBalance
from moesaic.moe.config import MoE
from moesaic.moe.expert_selection import Top2, TopK
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.embedding import EmbeddingConfig
from moesaic.nn.feed_forward import FeedForwardConfig, ReLU
from moesaic.nn.norm import LayerNorm, RMSNorm
from moesaic.nn.positional_encoding import Sinusoidal
from moesaic.nn.qk_norm import PerHeadQKNorm
from moesaic.recipes.demo_recipe import demo
from moesaic.recipes.language_model_recipes import language_model_demo
from moesaic.train.run import Run
from moesaic.train.text_data import TextData

_DIM = 128


def mixtral_shaped() -> Run:
    """The text of language-model-demo, in the shape of Mixtral: 8 wide experts, top 2."""
    model = _decoder(MoE(experts=8, hidden=2 * _DIM, select=TopK(k=2), balance=_balance(k=2)))
    return language_model_demo().replace(name="mixtral-shaped", model=model)


def qwen3_shaped() -> Run:
    """The text of language-model-demo, in the shape of Qwen3-MoE: 32 narrow experts, top 4."""
    model = _decoder(MoE(experts=32, hidden=_DIM // 2, select=TopK(k=4), balance=_balance(k=4)))
    attention = AttentionConfig(heads=4, kv_heads=2, qk_norm=PerHeadQKNorm(norm=RMSNorm()))
    return language_model_demo().replace(
        name="qwen3-shaped", model=model.replace(attention=attention)
    )


def nllb_shaped() -> Run:
    """The translations of demo, in the shape of NLLB-MoE: biases, sinusoids, top 2 of 8 experts."""
    run = demo()
    model = ModelConfig(
        vocab_size=run.model.vocab_size,
        dim=_DIM,
        encoder=Stack(layers=2, moe_every=2),
        decoder=Stack(layers=2, moe_every=2),
        attention=AttentionConfig(heads=4),
        feed_forward=FeedForwardConfig(hidden=2 * _DIM, activation=ReLU()),
        moe=MoE(experts=8, select=Top2(), balance=(FirstChoiceBalance(weight=0.01),)),
        norm=LayerNorm(bias=True),
        position=Sinusoidal(offset=1),  # behind the padding, whose id is 0
        bias=True,
        head=run.model.head,
    )
    assert isinstance(run.data, TextData)
    loader = run.data.loader.replace(collator=EncoderDecoderCollator(tag=FirstTargetToken()))
    # other programs read a text as it is, without copy units
    tokenizer = TrainedTokenizer(vocab_size=run.model.vocab_size)
    data = run.data.replace(loader=loader, tokenizer=tokenizer)
    return run.replace(name="nllb-shaped", model=model, data=data)


def _decoder(moe: MoE) -> ModelConfig:
    return ModelConfig(
        vocab_size=language_model_demo().model.vocab_size,
        dim=_DIM,
        encoder=Stack(layers=0),
        decoder=Stack(layers=3, moe_every=1),
        attention=AttentionConfig(heads=4, kv_heads=2),
        feed_forward=FeedForwardConfig(hidden=2 * _DIM),
        moe=moe,
        embedding=EmbeddingConfig(tied=False, scaled=False),
        head=LanguageModelHead(label_smoothing=0.0),
    )


def _balance(*, k: int) -> tuple[SwitchBalance]:
    return (SwitchBalance(weight=0.005 * k),)
