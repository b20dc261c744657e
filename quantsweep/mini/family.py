"""The architectures of the family, and what is held constant between them.

Both are decoders with tied input and output embeddings, full attention over 256 positions, no dropout:

    gpt-neox  rotary positions on a quarter of each head, attention and MLP in parallel on one residual,
              GELU, biases (as Pythia, arXiv:2304.01373)
    opt       learned positions, attention then MLP, pre-LayerNorm, ReLU, biases (arXiv:2205.01068)

Every linear layer has inputs in multiples of 64, so that block sizes up to 64 divide every row. Sizes
within a family grow by factors of about 2.6 to 3, which is what a fit over sizes wants. The name says
all parameters, embedding included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, OPTConfig, OPTForCausalLM

from quantsweep.mini.vocabulary import CONTEXT_LENGTH, END_OF_TEXT_ID, VOCABULARY_SIZE

MiniLM = GPTNeoXForCausalLM | OPTForCausalLM


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One model: its shape, and how it is trained.

    `learning_rate` is the peak; wider models take less. `epochs` counts passes over the training split.
    """

    name: str
    architecture: Literal["gpt-neox", "opt"]
    width: int
    num_layers: int
    num_heads: int
    learning_rate: float
    epochs: int
    seed: int


RECIPES: tuple[Recipe, ...] = (
    Recipe(name="mini-neox-0.3m", architecture="gpt-neox", width=64, num_layers=4, num_heads=2,
           learning_rate=6e-3, epochs=16, seed=101),
    Recipe(name="mini-neox-0.9m", architecture="gpt-neox", width=128, num_layers=3, num_heads=4,
           learning_rate=4e-3, epochs=16, seed=102),
    Recipe(name="mini-neox-2.2m", architecture="gpt-neox", width=192, num_layers=4, num_heads=6,
           learning_rate=3e-3, epochs=14, seed=103),
    Recipe(name="mini-neox-6.0m", architecture="gpt-neox", width=256, num_layers=7, num_heads=8,
           learning_rate=2e-3, epochs=10, seed=104),
    Recipe(name="mini-opt-0.4m", architecture="opt", width=64, num_layers=4, num_heads=2,
           learning_rate=3.5e-3, epochs=16, seed=201),
    Recipe(name="mini-opt-1.1m", architecture="opt", width=128, num_layers=4, num_heads=4,
           learning_rate=4e-3, epochs=16, seed=202),
    Recipe(name="mini-opt-3.8m", architecture="opt", width=256, num_layers=4, num_heads=8,
           learning_rate=3e-3, epochs=12, seed=203),
)  # fmt: skip


def recipe(name: str) -> Recipe:
    """The recipe of a bundled model, by name."""
    for candidate in RECIPES:
        if candidate.name == name:
            return candidate
    raise ValueError(f"no recipe is called {name!r}; there are {', '.join(r.name for r in RECIPES)}")


def build(recipe: Recipe) -> MiniLM:
    """A freshly initialised model in fp32; the seed decides the weights."""
    torch.manual_seed(recipe.seed)
    if recipe.architecture == "gpt-neox":
        return GPTNeoXForCausalLM(neox_config(recipe))
    return OPTForCausalLM(opt_config(recipe))


def neox_config(recipe: Recipe) -> GPTNeoXConfig:
    """The transformers configuration of a GPT-NeoX member."""
    return GPTNeoXConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=recipe.width,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        intermediate_size=4 * recipe.width,
        max_position_embeddings=CONTEXT_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25},
        use_parallel_residual=True,
        hidden_act="gelu",
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tie_word_embeddings=True,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
        pad_token_id=END_OF_TEXT_ID,
        use_cache=True,
    )


def opt_config(recipe: Recipe) -> OPTConfig:
    """The transformers configuration of an OPT member."""
    return OPTConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=recipe.width,
        word_embed_proj_dim=recipe.width,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        ffn_dim=4 * recipe.width,
        max_position_embeddings=CONTEXT_LENGTH,
        do_layer_norm_before=True,
        activation_function="relu",
        dropout=0.0,
        attention_dropout=0.0,
        layerdrop=0.0,
        tie_word_embeddings=True,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
        # Not END_OF_TEXT_ID: OPT's embedding would freeze the row of its padding index at zero.
        pad_token_id=None,
        use_cache=True,
    )
