"""Model folders that scored something else than what was planned: each gives the right value now, or is refused in words."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from torch import nn

from quantsweep.checkpoints import headers, planned_layers
from quantsweep.checkpoints.left_out import guesses_next_tokens
from quantsweep.errors import EvaluationError, ModelError
from quantsweep.evaluation.evaluator import Evaluator
from quantsweep.failures import classes
from quantsweep.models.blocks import quantizable_linears
from quantsweep.models.loading import load_model
from quantsweep.models.session import Session
from quantsweep.pipeline.run import quantize
from quantsweep.running import child
from quantsweep.trial import identity
from quantsweep.trial.registry import ROUNDINGS
from quantsweep.trial.specs import ModelSpec, PlannedTrial, QuantizationSpec, RunSettings, StepSpec, TrialSpec, options_tuple
from tests import model_cases as cases
from tests.conftest import ROOT
from tests.contract.rounding_cases import help_for_tests


def spec_of(folder: Path, **changes: Any) -> ModelSpec:
    """As planning makes it."""
    spec = ModelSpec(name="m", family="f", path=str(folder), dtype="float32", content=identity.local_content(folder))
    return replace(spec, **changes)


class TestContent:
    """What is loaded is what was planned."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return cases.copy_of_mini(tmp_path / "model")

    def test_weights_that_were_overwritten_while_the_job_waited(self, folder: Path) -> None:
        spec = spec_of(folder)
        cases.spoil(folder, **{"gpt_neox.final_layer_norm.bias": torch.ones(64).half()})
        with pytest.raises(ModelError, match=r"model m .* is not what was planned: its content is sha256:\w+, the plan says sha256:"):
            load_model(spec, "cpu")

    @pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "special_tokens_map.json", "extra.safetensors"])
    def test_any_file_of_the_identity(self, folder: Path, name: str) -> None:
        spec = spec_of(folder)
        if name in ("config.json", "tokenizer.json"):
            (folder / name).write_text((folder / name).read_text() + "\n")
        elif name.endswith(".json"):
            (folder / name).write_text("{}")
        else:
            save_file({"x": torch.zeros(2)}, folder / name)
        with pytest.raises(ModelError, match="is not what was planned"):
            load_model(spec, "cpu")

    def test_a_link_that_points_elsewhere_now(self, folder: Path, tmp_path: Path) -> None:
        other = cases.own_head(tmp_path / "other")
        link = tmp_path / "link"
        link.symlink_to(folder)
        spec = spec_of(link)
        link.unlink()
        link.symlink_to(other)
        with pytest.raises(ModelError, match="is not what was planned"):
            load_model(spec, "cpu")

    def test_same_size_and_modification_time(self, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """What is remembered of a file ends with any change of it, also one that hides."""
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr(identity, "CACHED_FROM_BYTES", 0)
        spec, file = spec_of(folder), folder / "model.safetensors"
        before = file.stat()
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        with pytest.raises(ModelError, match="is not what was planned"):
            load_model(spec, "cpu")

    def test_unchanged_files_are_not_read_again(self, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr(identity, "CACHED_FROM_BYTES", 0)
        spec = spec_of(folder)
        monkeypatch.setattr(identity, "_sha256", lambda file: pytest.fail(f"{file} was read"))
        load_model(spec, "cpu")

    def test_a_snapshot_of_the_hub_is_held_against_its_blobs_names(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        commit = "a" * 40
        snapshot = tmp_path / "hub" / "models--lab--mini" / "snapshots" / commit
        blobs = snapshot.parents[1] / "blobs"
        for place in (snapshot, blobs):
            place.mkdir(parents=True)
        for file in folder.iterdir():
            name = identity._sha256(file) if file.suffix == ".safetensors" else identity._git_hash(file)
            shutil.copy(file, blobs / name)
            (snapshot / file.name).symlink_to(blobs / name)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        assert identity.snapshot_content(snapshot) == identity.BLOBS_AS_NAMED
        blob = (snapshot / "config.json").resolve()
        blob.write_text(blob.read_text().replace("\n", " \n"))
        assert identity.snapshot_content(snapshot).startswith("config.json with the hash ")
        named_otherwise = blob.rename(blob.with_name("0123456789abcdef0123456789abcdef"))  # by a mirror, as its ETag says
        (snapshot / "config.json").unlink()
        (snapshot / "config.json").symlink_to(named_otherwise)
        assert identity.snapshot_content(snapshot) == identity.BLOBS_AS_NAMED

    @pytest.mark.parametrize("dtype", ["float16", "float32"])
    def test_written_over_in_place_between_two_trials(self, folder: Path, dtype: str) -> None:
        """In float16 the file is the very memory that the model computes with; in float32 its originals."""
        loaded = load_model(spec_of(folder, dtype=dtype), "cpu")
        layer = next(iter(loaded.layers.values()))
        layer.write(torch.zeros(layer.out_features, layer.in_features))
        file = folder / "model.safetensors"
        tensors = {name: tensor * 2 for name, tensor in load_file(file).items()}
        save_file(tensors, folder.parent / "new", metadata={"format": "pt"})
        with file.open("r+b") as stream:
            stream.write((folder.parent / "new").read_bytes())
        with pytest.raises(ModelError, match="was written over while the model was in use"):
            loaded.restore()

    @pytest.mark.parametrize("when", ["before it is quantized", "before it is scored", "while it is scored"])
    @pytest.mark.parametrize("name", ["gpt_neox.layers.0.mlp.dense_h_to_4h.weight", "gpt_neox.embed_in.weight"])
    def test_written_over_in_place_makes_no_row(self, folder: Path, name: str, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Also where the modification time is set back."""
        events: list[Mapping[str, Any]] = []
        runner = child.TrialRunner(events.append)
        owner, method = {
            "before it is quantized": (ROUNDINGS["round_to_nearest"], "encode"),
            "before it is scored": (Evaluator, "prepare"),
            "while it is scored": (Evaluator, "evaluate"),
        }[when]
        wrapped = getattr(owner, method)

        def spoiled(*arguments: Any, **options: Any) -> Any:
            cases.write_over(folder / "model.safetensors", name)
            return wrapped(*arguments, **options)

        monkeypatch.setattr(owner, method, spoiled)
        trial = TrialSpec(model=spec_of(folder, dtype="float16"), quantization=int_quantization(4))
        with pytest.raises(ModelError, match=r"was written over while|is not the one that was loaded"):
            runner.run(PlannedTrial(trial=trial, tasks=(cases.mini_task("mini_ppl", 2),)), RunSettings(device="cpu"))
        assert "task" not in [event["event"] for event in events]

    def test_a_layer_is_read_as_it_was_loaded_or_not_at_all(self, folder: Path) -> None:
        loaded = load_model(spec_of(folder, dtype="float16"), "cpu")
        name = next(iter(loaded.layers))
        cases.write_over(folder / "model.safetensors", f"{name}.weight")
        with pytest.raises(ModelError, match="the original weight is not the one that was loaded"):
            loaded.layers[name].read()

    def test_replaced_by_a_new_file_the_loaded_one_is_still_right(self, folder: Path) -> None:
        loaded = load_model(spec_of(folder, dtype="float16"), "cpu")
        other = cases.own_head(folder.parent / "other")
        (other / "model.safetensors").rename(folder / "model.safetensors")
        session = Session(loaded)
        assert session.restore() == 0
        session.check_state(loaded.state)

    def test_a_touched_file_is_still_the_same(self, folder: Path) -> None:
        loaded = load_model(spec_of(folder), "cpu")
        os.utime(folder / "model.safetensors")
        assert loaded.restore() == 0


class TestUnchanged:
    """From load to score nothing changes a weight but the trial's session."""

    def test_a_head_of_its_own_stays_though_the_configuration_says_tied(self, tmp_path: Path) -> None:
        loaded = load_model(spec_of(cases.own_head(tmp_path / "model")), "cpu")
        assert cases.bits_per_byte(loaded) == pytest.approx(1.9331331, abs=1e-6)
        assert loaded.num_parameters == 462_208
        assert loaded.num_embedding_parameters == 2 * 2048 * 64
        Session(loaded).check_state(loaded.state)

    @pytest.mark.parametrize("what", ["head", "gain", "buffer", "tie"])
    def test_a_library_that_changes_a_weight_is_found_out(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
        folder = cases.own_head(tmp_path / "model")
        original = Evaluator.evaluate

        def spoiling(evaluator: Evaluator, task: Any) -> Any:
            model = evaluator._loaded.model
            with torch.no_grad():
                if what == "head":
                    model.lm_head.weight[3, 3] += 1
                elif what == "gain":
                    model.gpt_neox.final_layer_norm.weight.mul_(1.001)
                elif what == "buffer":
                    model.gpt_neox.rotary_emb.inv_freq.mul_(2)
                else:
                    model.lm_head.weight = model.gpt_neox.embed_in.weight
            return original(evaluator, task)

        monkeypatch.setattr(Evaluator, "evaluate", spoiling)
        events: list[Any] = []
        trial = TrialSpec(model=spec_of(folder), quantization=QuantizationSpec(rounding=StepSpec("none", 1)))
        planned = PlannedTrial(trial=trial, tasks=(cases.mini_task("mini_ppl", 2),))
        with pytest.raises(ModelError, match=r"model m: 1 parameters, buffers or modules changed while it was evaluated"):
            child.TrialRunner(events.append).run(planned, RunSettings(device="cpu"))
        assert "task" not in [event["event"] for event in events], "no row"

    def test_before_the_first_trial_too(self, tmp_path: Path) -> None:
        loaded = load_model(spec_of(cases.own_head(tmp_path / "model")), "cpu")
        loaded.model.lm_head.weight = loaded.model.gpt_neox.embed_in.weight
        with pytest.raises(ModelError, match=r"changed after loading, .* \(lm_head\.weight\)"):
            Session(loaded).written_state()

    def test_layers_that_were_written_are_no_change(self, tmp_path: Path) -> None:
        loaded = load_model(spec_of(cases.MINI), "cpu")
        session, layer = Session(loaded), next(iter(loaded.layers.values()))
        session.write(layer.name, layer.read() * 2)
        session.check_state(session.written_state())


class TestBelongTogether:
    """A checkpoint and its configuration."""

    def test_biases_that_the_configuration_forgot(self, tmp_path: Path) -> None:
        cases.biases(tmp_path / "good")
        assert cases.bits_per_byte(load_model(spec_of(tmp_path / "good"), "cpu")) == pytest.approx(3.5449231, abs=1e-6)
        dropped = Path(shutil.copytree(tmp_path / "good", tmp_path / "dropped"))
        cases.edit_json(dropped / "config.json", attention_bias=False)
        with pytest.raises(ModelError, match=r"8 weights of the checkpoint have no place .*\(model\.layers\.0\.self_attn\.k_proj\.bias"):
            load_model(spec_of(dropped), "cpu")

    def test_a_layer_fewer_in_the_configuration(self, tmp_path: Path) -> None:
        folder = cases.copy_of_mini(tmp_path / "model")
        cases.edit_json(folder / "config.json", num_hidden_layers=3)
        with pytest.raises(ModelError, match=r"12 weights of the checkpoint have no place .*gpt_neox\.layers\.3\."):
            load_model(spec_of(folder), "cpu")

    def test_a_bias_that_transformers_takes_for_a_mask(self, tmp_path: Path) -> None:
        """Its list for GPT-NeoX names `attention.bias`, by which it meant masks."""
        folder = cases.copy_of_mini(tmp_path / "model")
        cases.spoil(folder, **{"gpt_neox.layers.0.attention.bias": torch.ones(64)})
        with pytest.raises(ModelError, match=r"1 weights of the checkpoint have no place .*\(gpt_neox\.layers\.0\.attention\.bias\)"):
            load_model(spec_of(folder), "cpu")

    def test_layers_that_transformers_passes_over_by_their_number(self, tmp_path: Path) -> None:
        """Its list for GLM-4.5 names layers 46 and 92: they guess tokens beyond the next where the configuration says so."""
        folder = cases.many_layers(tmp_path / "model", 47)
        for wanted in (None, 1, 2):
            cases.edit_json(folder / "config.json", num_hidden_layers=46, layer_types=None, num_nextn_predict_layers=wanted)
            with pytest.raises(ModelError, match=r"weights of the checkpoint have no place .*\(model\.layers\.46\."):
                load_model(spec_of(folder), "cpu")
        cases.spoil(folder, **{"model.layers.46.eh_proj.weight": torch.ones(16, 32), "model.layers.46.enorm.weight": torch.ones(16)})
        with pytest.raises(ModelError, match=r"weights of the checkpoint have no place .*\(model\.layers\.46\."):
            load_model(spec_of(folder), "cpu")
        cases.edit_json(folder / "config.json", num_nextn_predict_layers=1)
        spec = spec_of(folder)
        assert {name.split(".")[2] for name in load_model(spec, "cpu").layers} == {str(number) for number in range(46)}
        (said,) = planned_layers.left_out({spec: folder})
        assert said.startswith("m: 11 tensors of its checkpoint (model.layers.46.")
        assert planned_layers.left_out({spec: cases.MINI}) == ()

    @pytest.mark.parametrize(
        ("names", "config", "found"),
        [
            (["layers.1.a", "layers.2.eh_proj.a"], {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}, {"layers.2.eh_proj.a"}),
            (["model.layers.3.eh_proj.a"], {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}, set()),
            (["layers.2.eh_proj.a", "layers.3.eh_proj.a"], {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}, set()),
            (["layers.2.a"], {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}, set()),
            (["layers.2.eh_proj.a"], {"num_hidden_layers": 2}, set()),
            (["layers.2.eh_proj.a"], {"text_config": {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}}, {"layers.2.eh_proj.a"}),
            (["mtp.layers.0.a", "model.mtp.fc", "model.mtpx"], {}, {"mtp.layers.0.a", "model.mtp.fc"}),
        ],
    )
    def test_which_layers_guess_tokens_beyond_the_next(self, names: list[str], config: dict[str, Any], found: set[str]) -> None:
        assert guesses_next_tokens(names, config) == found

    def test_tables_that_every_model_makes_anew_are_harmless(self, tmp_path: Path) -> None:
        folder = cases.copy_of_mini(tmp_path / "model")
        attention = "gpt_neox.layers.0.attention."
        tables = {"bias": torch.ones(1, 1, 8, 8).tril().bool(), "masked_bias": torch.tensor(-1e9), "rotary_emb.inv_freq": torch.ones(8)}
        cases.spoil(folder, **{f"{attention}{name}": tensor for name, tensor in tables.items()})
        assert cases.bits_per_byte(load_model(spec_of(folder), "cpu")) == pytest.approx(cases.PLAIN, abs=1e-6)

    @pytest.mark.parametrize(
        ("name", "shape", "harmless"),
        [
            ("h.0.attn.bias", (1, 1, 8, 8), True),
            ("h.0.attn.bias", (64,), False),
            ("h.0.attn.c_attn.bias", (64,), False),
            ("model.layers.0.self_attn.rotary_emb.inv_freq", (8,), True),
            ("embeddings.position_ids", (1, 8), True),
            ("model.decoder.version", (1,), True),
            ("model.decoder.layers.0.version", (1,), False),
            ("model.rotary_emb.original_inv_freq", (8,), True),
            ("model.layers.0.self_attn.rotary_emb.cos_cached", (1, 1, 8, 4), True),
            ("model.layers.0.self_attn.rotary_emb.sin_cached", (1, 1, 8, 4), True),
            ("model.layers.0.self_attn.cos_cached", (1, 1, 8, 4), False),
            ("lm_head.bias", (64,), False),
        ],
    )
    def test_what_is_harmless_by_name_and_shape(self, name: str, shape: tuple[int, ...], harmless: bool) -> None:
        assert headers.is_harmless(name, headers.TensorFact("F32", shape)) is harmless


def write_header(file: Path, tensors: dict[str, tuple[str, list[int]]]) -> None:
    """A safetensors file of zeros with these dtypes and shapes."""
    sizes = {"F32": 4, "F16": 2, "BF16": 2, "I32": 4}
    header, place = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = sizes.get(dtype, 1) * int(torch.tensor(shape).prod())
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(place))


class TestFolders:
    """What a folder's files tell is said at planning, in milliseconds, and again at loading."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return cases.copy_of_mini(tmp_path / "model")

    def refused(self, folder: Path, words: str) -> None:
        with pytest.raises(ModelError, match=words):
            headers.check_folder(folder)
        with pytest.raises(ModelError, match=words):
            load_model(ModelSpec(name="m", family="f", path=str(folder), dtype="float32"), "cpu")

    def test_the_bundled_models_are_taken(self) -> None:
        headers.check_folder(cases.MINI)

    def test_an_adapter_beside_its_base_model(self, tmp_path: Path) -> None:
        self.refused(cases.adapter(tmp_path / "model"), r"holds an adapter \(adapter_config\.json\), .*merge_and_unload")

    @pytest.mark.parametrize("where", ["quantization_config", "compression_config", "text_config"])
    @pytest.mark.parametrize("kind", ["bitsandbytes", "gptq", "awq", "compressed-tensors", "fp8"])
    def test_quantized_by_its_configuration(self, folder: Path, where: str, kind: str) -> None:
        found = {"quant_method": kind, "bits": 4}
        cases.edit_json(folder / "config.json", **{where: {"quantization_config": found} if where == "text_config" else found})
        self.refused(folder, rf"is quantized already \(\w+ in its config\.json says {kind}\)")

    @pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json", "hf_quant_config.json"])
    def test_quantized_by_a_file_of_its_own(self, folder: Path, name: str) -> None:
        (folder / name).write_text("{}")
        self.refused(folder, rf"is quantized already \(it holds {name}\)")

    @pytest.mark.parametrize(
        ("name", "dtype"),
        [("mlp.weight", "U8"), ("mlp.weight", "I8"), ("mlp.weight", "F8_E4M3"), ("mlp.qweight", "I32"), ("mlp.weight_packed", "I32")],
    )
    def test_quantized_by_its_tensors(self, folder: Path, name: str, dtype: str) -> None:
        write_header(folder / "model.safetensors", {"embed.weight": ("F16", [4, 4]), name: (dtype, [4, 4])})
        self.refused(folder, rf"is quantized already \(its tensor {name} is {dtype}\)")

    @pytest.mark.parametrize("dtype", ["I16", "I32", "I64", "U32", "BOOL"])
    def test_weights_that_are_whole_numbers(self, folder: Path, dtype: str) -> None:
        write_header(folder / "model.safetensors", {"gpt_neox.embed_in.weight": (dtype, [2, 2])})
        with pytest.raises(ModelError, match=rf"is quantized already \(its tensor gpt_neox\.embed_in\.weight is {dtype}\)"):
            headers.check_folder(folder)

    @pytest.mark.parametrize(
        ("file", "key", "other", "kept"),
        [
            ("config.json", "configuration_files", "config.4.0.0.json", "config.json"),
            ("tokenizer_config.json", "fast_tokenizer_files", "tokenizer.4.0.0.json", "tokenizer.json"),
        ],
    )
    def test_files_that_transformers_chooses_by_its_version(self, folder: Path, file: str, key: str, other: str, kept: str) -> None:
        cases.edit_json(folder / file, **{key: [kept]})
        headers.check_folder(folder)
        cases.edit_json(folder / file, **{key: [other]})
        with pytest.raises(ModelError, match=rf"{file} lists {other}, .* Rename the file that shall be read to {kept}, and take the list"):
            headers.check_folder(folder)

    @pytest.mark.parametrize(
        "name",
        [
            "tekken.json",
            "qwen.tiktoken",
            "source.spm",
            "spm.model",
            "sentencepiece.bpe.model",
            "bpe.codes",
            "vocab.bpe",
            "tokenizer.model.v3",
        ],
    )
    def test_files_of_rarer_tokenizers_are_part_of_the_identity(self, folder: Path, name: str) -> None:
        contents = [identity.local_content(folder)]
        for text in ("1", "2"):
            (folder / name).write_text(text)
            contents.append(identity.local_content(folder))
        assert len(set(contents)) == 3

    def test_a_chat_template_is_none(self, folder: Path) -> None:
        content = identity.local_content(folder)
        (folder / "chat_template.jinja").write_text("{{ messages }}")
        assert identity.local_content(folder) == content

    def test_a_tokenizer_without_a_vocabulary(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("")
        with pytest.raises(ModelError, match=r"tokenizer\.json is empty"):
            headers.check_folder(folder)
        (folder / "tokenizer.json").unlink()
        with pytest.raises(ModelError, match="holds no tokenizer"):
            headers.check_folder(folder)
        cases.edit_json(folder / "tokenizer_config.json", tokenizer_class="ByT5Tokenizer")
        headers.check_folder(folder)

    @pytest.mark.parametrize("key", ["vocab_size", "hidden_size"])
    def test_sizes_of_another_model(self, folder: Path, key: str) -> None:
        cases.edit_json(folder / "config.json", **{key: 100})
        with pytest.raises(ModelError, match=rf"config\.json says {key}=100, and gpt_neox\.embed_in\.weight is 2048×64"):
            headers.check_folder(folder)

    def test_no_tokenizer(self, folder: Path) -> None:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).unlink()
        self.refused(folder, "holds no tokenizer")

    def test_a_tokenizer_that_cannot_be_read_is_a_model_error(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")
        with pytest.raises(ModelError, match="the tokenizer of model m cannot be loaded from"):
            load_model(spec_of(folder), "cpu")

    @pytest.mark.parametrize("entry", ["../elsewhere.safetensors", "/elsewhere.safetensors", "sub/model.safetensors", "weights.bin"])
    def test_weights_outside_the_folders_own_files(self, folder: Path, entry: str) -> None:
        (folder / "model.safetensors").rename(folder / "other.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"embed.weight": entry}}))
        self.refused(folder, rf"names '{entry}': weights are read from \*\.safetensors files in the model's own folder")

    def test_weights_that_the_configuration_names_itself(self, folder: Path) -> None:
        (folder / "sub").mkdir()
        shutil.copy(folder / "model.safetensors", folder / "sub")
        cases.edit_json(folder / "config.json", transformers_weights="sub/model.safetensors")
        self.refused(folder, "names its weights itself")

    def test_one_file_is_read_before_the_parts_of_an_index(self, folder: Path) -> None:
        """As transformers does; what is loaded is compared, and planning says which of the two it is."""
        tensors = load_file(folder / "model.safetensors")
        save_file({name: tensor + 1 for name, tensor in tensors.items()}, folder / "model-00001-of-00001.safetensors")
        index = {"weight_map": dict.fromkeys(load_file(folder / "model.safetensors"), "model-00001-of-00001.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        assert [file.name for file in headers.weight_files(folder)] == ["model.safetensors"]
        loaded = load_model(spec_of(folder), "cpu").model.state_dict()
        name = next(iter(tensors.keys() & loaded.keys()))
        assert torch.equal(loaded[name].float(), tensors[name].float())
        (said,) = planned_layers.left_out({spec_of(folder): folder})
        assert "model.safetensors is read, as transformers does, and not the files of its index (model-00001-of-00001" in said
        (folder / "model.safetensors").unlink()
        headers.check_folder(folder)
        (folder / "consolidated.safetensors").write_bytes(b"not read")  # as Mistral's folders have it
        assert [file.name for file in headers.weight_files(folder)] == ["model-00001-of-00001.safetensors"]

    def test_a_part_that_is_not_there_and_a_tensor_in_no_part(self, folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
        parts = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
        self.refused(folder, r"lacks 1 of the 2 files of model\.safetensors\.index\.json \(model-00002-of-00002\.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": parts["a"]}}))
        self.refused(folder, r"1 tensors of model\.safetensors\.index\.json are in none of its files \(a")

    def test_a_name_that_nothing_reads(self, folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "weights.safetensors")
        self.refused(folder, r"neither model\.safetensors nor .* rename the file of its weights")

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (b"", "was cut short \\(0 bytes\\)"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "is a pointer of Git LFS"),
            (b"\xff" * 100, "is no safetensors file, or was cut short"),
            ((9).to_bytes(8, "little") + b"not JSON!", "its header cannot be read"),
            ((2).to_bytes(8, "little") + b"{}more", "has 14 bytes where its header promises 10"),
            ((2).to_bytes(8, "little") + b"[]", "its header cannot be read"),
        ],
    )
    def test_damaged_weights(self, folder: Path, content: bytes, words: str) -> None:
        (folder / "model.safetensors").write_bytes(content)
        self.refused(folder, words)

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (b"{", "is no JSON in UTF-8"),
            ("{}".encode("utf-16"), "is no JSON in UTF-8"),
            (b"[]", "holds no JSON object"),
            (b"{}", "has no model_type"),
            (b'{"model_type": "t5"}', "the installed transformers has no causal language model of type t5"),
            (b'{"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "mine.Mine"}}', "mine needs Python code of its own"),
        ],
    )
    def test_a_configuration_that_is_none(self, folder: Path, content: bytes, words: str) -> None:
        (folder / "config.json").write_bytes(content)
        self.refused(folder, words)

    def test_remote_code_beside_an_architecture_that_is_built_in_is_not_run_and_not_refused(self, folder: Path) -> None:
        cases.edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "mine.Mine"})
        (folder / "mine.py").write_text("raise SystemExit")
        load_model(spec_of(folder), "cpu")

    @pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
    @pytest.mark.parametrize("kind", ["dangling", "loop", "pipe", "folder"])
    def test_what_has_the_name_of_a_file_and_is_none(self, folder: Path, name: str, kind: str) -> None:
        file = folder / name
        file.unlink()
        if kind == "dangling":
            file.symlink_to("nowhere")
        elif kind == "loop":
            file.symlink_to(file)
        elif kind == "pipe":
            os.mkfifo(file)
        else:
            file.mkdir()
        words = {"dangling": "is a link to nowhere", "loop": "symbolic links", "pipe": "is a pipe", "folder": "is a folder"}
        self.refused(folder, rf"model file {file} .*{words[kind]}")

    def test_a_file_or_a_loop_in_place_of_the_folder(self, folder: Path) -> None:
        with pytest.raises(ModelError, match="is a file; give the folder"):
            headers.check_folder(folder / "config.json")
        loop = folder.parent / "loop"
        loop.symlink_to(loop)
        with pytest.raises(ModelError, match="cannot be looked at: Too many levels"):
            headers.check_folder(loop)
        with pytest.raises(ModelError, match="cannot be looked at: File name too long"):
            headers.check_folder(Path("/" + "x" * 3000))


class TestNumbers:
    """What only the values tell."""

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_weights_that_are_no_numbers(self, tmp_path: Path, value: float) -> None:
        folder = cases.copy_of_mini(tmp_path / "model")
        cases.spoil(folder, **{"gpt_neox.layers.1.mlp.dense_h_to_4h.bias": torch.full((256,), value).half()})
        with pytest.raises(
            ModelError, match=r"1 weights hold NaN or infinity in float32 \(gpt_neox\.layers\.1\.mlp\.dense_h_to_4h\.bias\)"
        ):
            load_model(spec_of(folder), "cpu")

    def test_weights_beyond_float16_outside_the_quantized_layers(self, tmp_path: Path) -> None:
        model = cases.random_model(tmp_path / "model", transformers.LlamaConfig(**cases.LLAMA), dtype=torch.bfloat16)
        with torch.no_grad():
            model.model.embed_tokens.weight[5] = 1e5
            model.model.norm.weight[3] = 7e4
        model.save_pretrained(tmp_path / "model")
        with pytest.raises(
            ModelError, match=r"2 weights hold NaN or infinity in float16 .* beyond float16's 65504\. Try model\.dtype=bfloat16"
        ):
            load_model(spec_of(tmp_path / "model", dtype="float16"), "cpu")
        load_model(spec_of(tmp_path / "model", dtype="bfloat16"), "cpu")

    def test_a_tokenizer_with_more_tokens_than_the_model(self, tmp_path: Path) -> None:
        cases.random_model(tmp_path / "model", transformers.LlamaConfig(**{**cases.LLAMA, "vocab_size": 300}))
        with pytest.raises(EvaluationError, match=r"the tokenizer of model m gives token \d+, and its embedding has 300"):
            cases.bits_per_byte(load_model(spec_of(tmp_path / "model"), "cpu"))

    def test_a_mistral_tokenizer_that_needs_its_fix(self, tmp_path: Path) -> None:
        """More than 100,000 tokens, as transformers 4 saved it: it would split texts wrongly, with a warning in a log."""
        folder, size = tmp_path / "model", 102_400
        cases.random_model(
            folder, transformers.MistralConfig(**{**cases.LLAMA, "vocab_size": size, "hidden_size": 16, "intermediate_size": 16})
        )
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary |= {f"\u0120zz{number}zz": number for number in range(len(vocabulary), size)}
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        cases.edit_json(folder / "config.json", transformers_version="4.50.0")
        with pytest.raises(ModelError, match=r'put "fix_mistral_regex": true into its tokenizer_config\.json'):
            load_model(spec_of(folder), "cpu")
        cases.edit_json(folder / "tokenizer_config.json", fix_mistral_regex=True)
        load_model(spec_of(folder), "cpu")

    def test_a_model_that_looks_ahead(self, tmp_path: Path) -> None:
        """A BERT is in transformers' list of causal models, and is none unless its configuration says so."""
        sizes = {"vocab_size": 2048, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        for is_decoder in (True, False):
            folder = tmp_path / str(is_decoder)
            cases.random_model(folder, transformers.BertConfig(**sizes, is_decoder=is_decoder))
            if is_decoder:
                load_model(spec_of(folder), "cpu")
            else:
                with pytest.raises(ModelError, match=r"model m \(bert\) is no causal language model"):
                    load_model(spec_of(folder), "cpu")

    def test_a_model_that_cannot_be_loaded_fails_all_its_trials_and_is_read_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = cases.copy_of_mini(tmp_path / "model")
        cases.spoil(folder, **{"gpt_neox.final_layer_norm.bias": torch.full((64,), torch.nan).half()})
        runner = child.TrialRunner(lambda event: None)
        failed = []
        for bits in (3, 4, 5):
            trial = TrialSpec(model=spec_of(folder), quantization=int_quantization(bits))
            with pytest.raises(ModelError, match="hold NaN") as caught:
                runner.run(PlannedTrial(trial=trial, tasks=(cases.mini_task("mini_ppl", 2),)), RunSettings(device="cpu"))
            failed.append(classes.from_exception(caught.value))
            assert not runner.holds_a_model, "the process may go on"
            monkeypatch.setattr("quantsweep.models.loading.load_model", lambda *_: pytest.fail("loaded again"))
        assert len({(failure.failure_class, failure.message, failure.fingerprint) for failure in failed}) == 1
        assert failed[0].failure_class == "model_or_data"
        other = TrialSpec(model=spec_of(cases.MINI), quantization=int_quantization(4))
        monkeypatch.undo()
        runner.run(PlannedTrial(trial=other, tasks=(cases.mini_task("mini_ppl", 2),)), RunSettings(device="cpu"))


class TestLayers:
    """Which layers are quantized, where a model has more than decoder blocks of attention and MLP."""

    @pytest.mark.parametrize(("bits", "value", "size"), [(2, 3.529797, 4_816_896), (3, 3.532777, 5_087_232)])
    def test_a_router_in_a_module_of_its_own_stays_at_16_bit(self, tmp_path: Path, bits: int, value: float, size: int) -> None:
        folder = cases.routers_apart(tmp_path / "model")
        loaded = load_model(spec_of(folder), "cpu")
        assert not [name for name in loaded.layers if "gate.wg" in name]
        assert len([name for name in loaded.layers if ".shared_mlp." in name]) == 6
        quantization = int_quantization(bits)
        outcome = quantize(Session(loaded), quantization, help_for_tests())
        assert child.model_sizes(loaded, outcome)["total_model_bits"] == size
        assert cases.bits_per_byte(loaded) == pytest.approx(value, abs=2e-6)

    def test_the_language_model_and_not_the_vision_tower(self, tmp_path: Path) -> None:
        folder = cases.vision_tower(tmp_path / "model")
        loaded = load_model(spec_of(folder), "cpu")
        assert len(loaded.layers) == 4 * 7
        assert {name.split(".layers.")[0] for name in loaded.layers} == {"model.language_model"}
        before = cases.bits_per_byte(loaded, limit=3)
        for layer in loaded.layers.values():
            layer.write(torch.zeros(layer.out_features, layer.in_features))
        assert cases.bits_per_byte(loaded, limit=3) != before, "2 bit would look lossless where the tower is quantized"

    @pytest.mark.parametrize("kind", ["git", "phi4_multimodal"])
    def test_a_tower_inside_the_decoder_that_is_deeper_than_the_language_model(self, kind: str) -> None:
        model = cases.towers_inside(kind)
        layers, prefix = quantizable_linears(model), {"git": "git.encoder.layer", "phi4_multimodal": "model.layers"}[kind]
        assert {name.rpartition(f"{prefix}.")[2].split(".")[0] for name in layers} == {"0", "1", "2", "3"}
        assert all(name.startswith(f"{prefix}.") for name in layers)

    def test_a_tower_that_cannot_be_told_from_the_language_model_is_refused(self) -> None:
        with pytest.raises(ModelError, match=r"several lists \(.*which of them decodes text is not known \(2 of them have 4 blocks of"):
            quantizable_linears(cases.towers_inside("git", depth=4, width=64))

    def test_experts_in_one_matrix_are_not_left_out_without_a_word(self) -> None:
        config = transformers.DbrxConfig(
            **{"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 256, "vocab_size": 2048},
            attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
            ffn_config={"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
        )
        model = cases.without_weights(config)
        with pytest.raises(ModelError, match=r"6 weights in the decoder blocks are linear maps in another form \(.*experts\.mlp\.\w1, "):
            quantizable_linears(model)
        assert {name.rpartition(".")[2] for name in quantizable_linears(model, ("*.experts.mlp.*",))} == {"Wqkv", "out_proj"}

    def test_what_chooses_tokens_for_attention_stays_at_16_bit(self) -> None:
        sizes = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "qk_nope_head_dim": 16}
        experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32}
        llama = {**cases.LLAMA, "num_key_value_heads": 4}
        model = cases.without_weights(transformers.DeepseekV32Config(**llama, **sizes, **experts, index_n_heads=2, index_head_dim=32))
        assert [name for name, _ in model.named_parameters() if ".indexer.weights_proj" in name]
        names = list(quantizable_linears(model))
        assert names
        assert not [name for name in names if "indexer" in name]

    def test_an_mlp_router_and_one_without_experts_beside_it(self) -> None:
        block = nn.Module()
        block.moe = nn.Module()
        block.moe.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        block.moe.scorer = nn.Sequential(nn.Linear(8, 4))
        block.moe.gate = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
        block.moe.shared_expert = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))
        block.other = nn.Module()
        block.other.router = nn.Sequential(nn.Linear(8, 3))
        model = nn.Module()
        model.layers = nn.ModuleList([block])
        names = [f"layers.0.moe.experts.{number}" for number in range(4)]
        assert list(quantizable_linears(model)) == [*names, "layers.0.moe.shared_expert.0", "layers.0.moe.shared_expert.1"]

    def test_two_lists_of_one_length_and_blocks_of_several_kinds_are_refused(self) -> None:
        model = nn.Module()
        model.encoder = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
        model.decoder = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
        with pytest.raises(ModelError, match=r"several lists \(encoder with 3 blocks, decoder with 3 blocks\)"):
            quantizable_linears(model)
        model.decoder.extend([nn.Sequential(nn.Linear(2, 2))])
        with pytest.raises(ModelError, match=r"the blocks of decoder are of several kinds \(Linear, Sequential\)"):
            quantizable_linears(model)


def int_quantization(bits: int) -> QuantizationSpec:
    """What `data_type=int block_size=64` comes to."""
    options = yaml.safe_load((ROOT / "conf" / "data_type" / "int.yaml").read_text())["options"]
    return QuantizationSpec(
        **{"rounding": StepSpec("round_to_nearest", 1), "data_type": "int", "data_type_version": 1, "bit_width": bits},
        **{"block_size": 64, "block_axis": "flat", "symmetric": True, "scale_dtype": "float16"},
        data_type_options=options_tuple(options),
    )
