"""Loading: what is refused and how it is said, what is counted, where originals come from, GGUF conversion."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from quantsweep.checkpoints import gguf
from quantsweep.errors import ModelError
from quantsweep.mini import model_path
from quantsweep.models.blocks import decoder_blocks, quantizable_linears
from quantsweep.models.loading import _max_length, load_model, wrap_model
from quantsweep.models.originals import FileTensors, expert_original_of, original_of
from quantsweep.trial.specs import ModelSpec

MINI = model_path("mini-neox-0.3m")
SPEC = ModelSpec(name="m", family="f", path=str(MINI), dtype="float32")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of a bundled model that a test may spoil."""
    return Path(shutil.copytree(MINI, tmp_path / "model"))


def spoil(folder: Path, **changes: torch.Tensor | None) -> None:
    file = folder / "model.safetensors"
    tensors = {**load_file(file), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file, metadata={"format": "pt"})


class TestRefusals:
    def test_a_checkpoint_that_lacks_a_weight(self, folder: Path) -> None:
        spoil(folder, **{"gpt_neox.layers.1.mlp.dense_h_to_4h.weight": None})
        with pytest.raises(ModelError, match=r"1 weights are missing in the checkpoint \(gpt_neox\.layers\.1\.mlp\.dense_h_to_4h\.weight"):
            load_model(replace(SPEC, path=str(folder)), "cpu")

    def test_a_weight_of_another_shape(self, folder: Path) -> None:
        spoil(folder, **{"gpt_neox.layers.1.mlp.dense_h_to_4h.weight": torch.zeros(3, 3)})
        with pytest.raises(ModelError, match=r"1 weights are mismatched"):
            load_model(replace(SPEC, path=str(folder)), "cpu")

    def test_a_file_that_was_not_copied_whole(self, folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:100_000])
        with pytest.raises(ModelError, match=r"model\.safetensors has 100,000 bytes where its header promises 667,736"):
            load_model(replace(SPEC, path=str(folder)), "cpu")

    def test_files_that_are_not_there(self, folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        with pytest.raises(ModelError, match=r"holds no \*\.safetensors"):
            load_model(replace(SPEC, path=str(folder)), "cpu")

    def test_an_architecture_that_transformers_does_not_know(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "no_such_type"}))
        with pytest.raises(ModelError, match="no_such_type"):
            load_model(replace(SPEC, path=str(folder)), "cpu")

    def test_a_hub_model_without_network(self) -> None:
        with pytest.raises(ModelError, match="cannot be loaded from no-such-org/no-such-model"):
            load_model(ModelSpec(name="m", family="f", hub_id="no-such-org/no-such-model", revision="a" * 40), "cpu")

    def test_a_model_without_public_weights(self) -> None:
        with pytest.raises(ModelError, match="model m cannot be loaded: behind a request form"):
            load_model(ModelSpec(name="m", family="f", unavailable="behind a request form"), "cpu")


class TestUnquantized:
    def test_patterns_leave_layers_out(self) -> None:
        loaded = load_model(replace(SPEC, unquantized=("*.mlp.*", "gpt_neox.layers.0.*")), "cpu")
        assert set(loaded.layers) == {f"gpt_neox.layers.{i}.attention.{kind}" for i in (1, 2, 3) for kind in ("query_key_value", "dense")}

    def test_a_pattern_that_matches_nothing(self) -> None:
        with pytest.raises(ModelError, match=r"unquantized pattern '\*\.lm_head' matches no linear layer; .* gpt_neox\.layers\.0\."):
            load_model(replace(SPEC, unquantized=("*.lm_head",)), "cpu")


class Experts(nn.Module):
    """A block with a linear layer of its own, and a router beside experts in a form that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.Linear(2, 2))
        self.gate = nn.Linear(2, 2)
        self.experts = nn.Parameter(torch.zeros(4, 2, 2))


class FusedExperts(nn.Module):
    """All experts in two parameters, out×in as Mixtral's or in×out."""

    def __init__(self, *, transposed: bool = False) -> None:
        super().__init__()
        shapes = {"gate_up_proj": (4, 6, 5), "down_proj": (4, 5, 3)}
        for name, (experts, rows, columns) in shapes.items():
            shape = (experts, columns, rows) if transposed else (experts, rows, columns)
            setattr(self, name, nn.Parameter(torch.randn(shape), requires_grad=False))


def blocks_with_experts(experts: nn.Module) -> nn.Module:
    block = nn.Module()
    block.mlp = nn.Module()
    block.mlp.gate = nn.Linear(5, 4)
    block.mlp.experts = experts
    block.attention = nn.Linear(5, 5)
    model = nn.Module()
    model.layers = nn.ModuleList([block])
    return model


class TestBlocks:
    def test_the_outer_list_is_taken_not_the_experts(self) -> None:
        class Block(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(8))

        model = nn.Module()
        model.inner = nn.Module()
        model.inner.layers = nn.ModuleList(Block() for _ in range(2))
        assert decoder_blocks(model)[0] == "inner.layers"
        assert len(quantizable_linears(model)) == 16

    def test_each_expert_of_a_fused_parameter_is_a_layer_and_the_router_is_none(self) -> None:
        names = [f"layers.0.mlp.experts.{kind}.{n}" for kind in ("gate_up_proj", "down_proj") for n in range(4)]
        assert list(quantizable_linears(blocks_with_experts(FusedExperts()))) == [*names, "layers.0.attention"]
        some = quantizable_linears(blocks_with_experts(FusedExperts()), ("*.gate_up_proj.[123]", "*.down_proj.*"))
        assert list(some) == ["layers.0.mlp.experts.gate_up_proj.0", "layers.0.attention"]

    def test_fused_experts_that_are_stored_in_times_out_are_refused(self) -> None:
        with pytest.raises(ModelError, match=r"2 weights .* linear maps in another form \(layers\.0\.mlp\.experts\.gate_up_proj"):
            quantizable_linears(blocks_with_experts(FusedExperts(transposed=True)))

    def test_weights_of_more_dimensions_are_refused_unless_named(self) -> None:
        model = nn.Module()
        model.layers = nn.ModuleList(Experts() for _ in range(2))
        with pytest.raises(ModelError, match=r"2 weights in the decoder blocks are linear maps in another form \(layers\.0\.experts"):
            quantizable_linears(model)
        assert set(quantizable_linears(model, ("*.experts",))) == {"layers.0.attention.0", "layers.1.attention.0"}

    def test_a_model_without_blocks(self) -> None:
        with pytest.raises(ModelError, match="Sequential has no list of decoder blocks"):
            decoder_blocks(nn.Sequential(nn.Linear(2, 2)))


class TestOriginals:
    @pytest.fixture
    def files(self, tmp_path: Path) -> FileTensors:
        save_file({"h.weight": torch.ones(2, 2), "m.g.weight": torch.full((2, 2), 2.0)}, tmp_path / "a.safetensors")
        return FileTensors([tmp_path / "a.safetensors"])

    @pytest.mark.parametrize(("name", "value"), [("m.h.weight", 1.0), ("h.weight", 1.0), ("g.weight", 2.0), ("m.g.weight", 2.0)])
    def test_names_with_and_without_the_base_prefix(self, files: FileTensors, name: str, value: float) -> None:
        parameter = torch.full((2, 2), value, dtype=torch.float16)
        assert original_of(name, parameter, files, "m").dtype == torch.float32  # the file's, not a clone

    @pytest.mark.parametrize("parameter", [torch.zeros(2, 2), torch.ones(4), torch.ones(2, 2) + 2**-20])
    def test_other_values_and_shapes_are_cloned(self, files: FileTensors, parameter: torch.Tensor) -> None:
        original = original_of("h.weight", parameter, files, "m")
        assert torch.equal(original, parameter)
        assert original.data_ptr() != parameter.data_ptr()

    @pytest.mark.parametrize(
        ("gate", "up", "down", "folder"),
        [("w1", "w3", "w2", "block_sparse_moe"), ("gate_proj", "up_proj", "down_proj", "mlp"), (None, None, None, "mlp")],
        ids=["mixtral", "matrices", "fused"],
    )
    @pytest.mark.parametrize("prefix", ["", "m."])
    def test_an_expert_is_found_in_every_layout_of_a_file(
        self, tmp_path: Path, prefix: str, gate: str | None, up: str | None, down: str | None, folder: str
    ) -> None:
        experts = FusedExperts()
        tensors = {f"{prefix}h.0.{folder}.experts.{name}": parameter.detach() for name, parameter in experts.named_parameters()}
        if gate is not None:
            halves = zip((gate, up), experts.gate_up_proj.chunk(2, dim=1), strict=True)
            matrices = [*halves, (down, experts.down_proj)]
            tensors = {f"{prefix}h.0.{folder}.experts.{n}.{name}.weight": fused[n].clone() for n in range(4) for name, fused in matrices}
        save_file(tensors, tmp_path / "a.safetensors")
        files = FileTensors([tmp_path / "a.safetensors"])
        for name, parameter in experts.named_parameters():
            parts = expert_original_of(f"m.h.0.mlp.experts.{name}", 2, parameter[2].half().float(), files, "m")
            assert len(parts) == 1  # a clone: other bits than the file's
            parts = expert_original_of(f"m.h.0.mlp.experts.{name}", 2, parameter[2].bfloat16(), files, "m")
            assert {part.dtype for part in parts} == {torch.float32}, "the file's, not a clone"
            assert torch.equal(torch.cat(parts), parameter[2])

    def test_a_model_without_files_is_cloned_and_restored(self) -> None:
        source = load_model(SPEC, "cpu")
        loaded = wrap_model(source.model, source.tokenizer, SPEC, None)
        layer = next(iter(loaded.layers.values()))
        before = layer.read()
        layer.write(torch.zeros_like(before))
        assert loaded.restore() == 1
        assert torch.equal(layer.module.weight.float(), before)


@pytest.mark.parametrize(
    ("config", "tokenizer_length", "expected"),
    [
        (transformers.GPT2Config(n_positions=77), 5, 77),
        (transformers.LlamaConfig(max_position_embeddings=99), 5, 99),
        (transformers.BloomConfig(), 123, 123),
        (transformers.BloomConfig(), int(1e30), 2048),
    ],
)
def test_max_length_is_lm_evals(config: transformers.PretrainedConfig, tokenizer_length: int, expected: int) -> None:
    from lm_eval.models.utils import resolve_max_length

    tokenizer = transformers.AutoTokenizer.from_pretrained(MINI)
    tokenizer.model_max_length = tokenizer_length
    assert _max_length(config, tokenizer) == expected == resolve_max_length(config, tokenizer)


class TestGguf:
    @pytest.fixture(autouse=True)
    def own_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        pytest.importorskip("gguf")
        return write_tiny_gguf(tmp_path / "tiny.gguf")

    def test_a_file_is_converted_once_and_loads(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        spec = ModelSpec(name="g", family="f", path=str(file.parent), gguf_file=file.name, dtype="float32")
        loaded = load_model(spec, "cpu")
        assert len(loaded.layers) == 7
        name = "model.layers.0.mlp.down_proj"
        torch.testing.assert_close(loaded.layers[name].read(), torch.arange(16 * 32).reshape(16, 32) / 512)
        monkeypatch.setattr(gguf, "_convert", lambda *_: pytest.fail("converted again"))
        assert list(load_model(spec, "cpu").layers) == list(loaded.layers)

    def test_a_conversion_that_was_changed_since_is_not_loaded(self, file: Path) -> None:
        folder = gguf.converted_folder(file.parent, file.name)
        tensors = load_file(folder / "model.safetensors")
        save_file({name: tensor + 1 for name, tensor in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
        spec = ModelSpec(name="g", family="f", path=str(file.parent), gguf_file=file.name, dtype="float32")
        with pytest.raises(ModelError, match=r"the converted model .* is not what was planned"):
            load_model(spec, "cpu")

    @pytest.mark.parametrize(
        ("also", "words"),
        [
            (lambda writer: writer.add_tensor("rope_freqs.weight", np.array([1, 1, 1, 8], np.float32)), r"rope_freqs\.weight"),
            (lambda writer: writer.add_string("llama.rope.scaling.type", "linear"), r"llama\.rope\.scaling\.type=linear"),
            (lambda writer: writer.add_float32("llama.rope.scaling.factor", 4.0), r"llama\.rope\.scaling\.factor=4"),
            (lambda writer: writer.add_uint32("llama.expert_count", 8), r"llama\.expert_count=8"),
            (lambda writer: writer.add_uint32("llama.attention.sliding_window", 8), r"llama\.attention\.sliding_window=8"),
            (lambda writer: writer.add_float32("llama.logit_scale", 0.5), r"llama\.logit_scale=0\.5"),
            (lambda writer: writer.add_uint32("llama.attention.key_length", 16), r"llama\.attention\.key_length=16"),
            (lambda writer: writer.add_uint32("llama.rope.dimension_count", 4), r"llama\.rope\.dimension_count=4"),
        ],
    )
    def test_what_the_conversion_would_lose_is_refused(self, tmp_path: Path, also: Callable[[Any], None], words: str) -> None:
        pytest.importorskip("gguf")
        file = write_tiny_gguf(tmp_path / "tiny.gguf", also=also)
        with pytest.raises(ModelError, match=rf"tiny\.gguf: the installed transformers would drop .*\({words}.*\); use the checkpoint"):
            gguf.converted_folder(file.parent, file.name)

    @pytest.mark.parametrize(("turned", "is_taken"), [(8, True), (4, False)])
    def test_rope_that_turns_a_part_of_each_head(self, tmp_path: Path, turned: int, is_taken: bool) -> None:
        """transformers' table knows the name, and carries it nowhere."""
        pytest.importorskip("gguf")

        def also(writer: Any) -> None:
            writer.add_rope_dimension_count(turned)
            for part in "qkv":
                writer.add_tensor(f"blk.0.attn_{part}.bias", np.zeros(16, np.float32))

        file = write_tiny_gguf(tmp_path / "tiny.gguf", "qwen2", also=also)
        if is_taken:
            assert gguf.converted_folder(file.parent, file.name).is_dir()
        else:
            with pytest.raises(ModelError, match=rf"would drop what .* \(qwen2\.rope\.dimension_count={turned}\); use the checkpoint"):
                gguf.converted_folder(file.parent, file.name)

    def test_tensors_that_do_not_fit_what_the_file_says(self, tmp_path: Path) -> None:
        pytest.importorskip("gguf")
        file = write_tiny_gguf(tmp_path / "tiny.gguf", also=lambda writer: writer.add_vocab_size(300))
        with pytest.raises(ModelError, match=r"(?s)tiny\.gguf cannot be read as a GGUF model: .*; use the checkpoint in safetensors"):
            gguf.converted_folder(file.parent, file.name)

    def test_what_says_nothing_new_is_taken(self, tmp_path: Path) -> None:
        pytest.importorskip("gguf")

        def also(writer: Any) -> None:
            writer.add_tensor("rope_freqs.weight", np.ones(4, np.float32))
            writer.add_string("llama.rope.scaling.type", "none")
            writer.add_uint32("llama.attention.key_length", 8)
            writer.add_uint32("llama.attention.sliding_window", 64)

        file = write_tiny_gguf(tmp_path / "tiny.gguf", also=also)
        assert gguf.converted_folder(file.parent, file.name).is_dir()

    def test_the_cache_holds_whole_folders_only(self, file: Path) -> None:
        folder = gguf.converted_folder(file.parent, file.name)
        assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= {entry.name for entry in folder.iterdir()}

    def test_a_second_process_that_was_quicker_wins(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def convert_while_another_finishes(_file: Path, folder: Path) -> None:
            (folder / "ours").write_bytes(b"")
            other = folder.parent / "other"
            other.mkdir()
            (other / "theirs").write_bytes(b"")
            other.rename(target)

        target = gguf.cache_dir() / "gguf" / f"{gguf.local_content(file.parent, file.name).removeprefix('sha256:')[:16]}-{gguf._CONVERSION}"
        monkeypatch.setattr(gguf, "_write_safetensors", convert_while_another_finishes)
        folder = gguf.converted_folder(file.parent, file.name)
        assert [entry.name for entry in folder.iterdir()] == ["theirs"]
        assert list(folder.parent.iterdir()) == [folder]

    def test_a_file_that_is_no_gguf(self, tmp_path: Path) -> None:
        pytest.importorskip("gguf")
        (tmp_path / "bad.gguf").write_bytes(b"not a gguf file at all" * 10)
        with pytest.raises(ModelError, match=r"bad\.gguf cannot be read as a GGUF model"):
            gguf.converted_folder(tmp_path, "bad.gguf")


def write_tiny_gguf(file: Path, kind: str = "llama", *, also: Callable[[Any], None] = lambda writer: None) -> Path:
    """One decoder block of LLaMA with simple weights and a byte-level tokenizer of 260 tokens; `also` says more of it."""
    import gguf as gguf_package
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    hidden, inner, tokens = 16, 32, [*bytes_to_unicode().values(), "<s>", "</s>", "th", "he"]
    writer = gguf_package.GGUFWriter(str(file), kind)
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["t h", "h e"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    shapes = {"token_embd": (len(tokens), hidden), "output_norm": (hidden,), "output": (len(tokens), hidden)}
    shapes |= {f"blk.0.attn_{part}": (hidden, hidden) for part in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": (inner, hidden), "blk.0.ffn_up": (inner, hidden), "blk.0.ffn_down": (hidden, inner)}
    shapes |= {"blk.0.attn_norm": (hidden,), "blk.0.ffn_norm": (hidden,)}
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        writer.add_tensor(f"{name}.weight", (np.arange(size, dtype=np.float32) / size).reshape(shape))
    also(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
